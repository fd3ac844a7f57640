"""Kernels: arrays in, arrays out.

Each operation is a folder: `reference.py` is obviously right, every other file is one backend, and `api.py` picks one.
"""
