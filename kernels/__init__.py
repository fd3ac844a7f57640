"""Kernels: arrays in, arrays out.

Each operation is a folder: `reference.py` is simple enough to be obviously right, each other file is
a backend, and `api.py` chooses the backend.
"""
