"""Kernels: operations that take arrays and return arrays.

Each operation is a folder: `reference.py` is simple enough to be obviously right, `api.py` chooses the backend, and
each other file is a backend.
"""

if __name__ == "kernels":
    raise ImportError("the name of this package is bimedix_jax.kernels; a second copy would not share its settings")
