"""Kernels: operations that take arrays and return arrays.

Each operation is a folder: `reference.py` is simple enough to be obviously right, `api.py` chooses the backend, and
each other file is a backend.
"""
