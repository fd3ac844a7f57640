"""Sums of rows by group, as sparse matrices; SciPy ships no types for these."""

from typing import Any

import numpy as np
from scipy import sparse

SparseMatrix = Any
"""A scipy.sparse.csr_array of float64."""


def table(place: tuple[np.ndarray, np.ndarray], values: np.ndarray, shape: tuple[int, int]) -> SparseMatrix:
    """A matrix of this shape with the sums of `values` at their places (rows, columns)."""
    return sparse.coo_array((np.asarray(values, np.float64), place), shape).tocsr()


def summing(group_P: np.ndarray, groups: int, weight_P: np.ndarray | None = None) -> SparseMatrix:
    """[groups, P]: times an array of P rows, it gives the (weighted) sum of each group's rows."""
    weight_P = np.ones(len(group_P)) if weight_P is None else weight_P
    return table((group_P, np.arange(len(group_P))), weight_P, (groups, len(group_P)))


def dense(matrix: SparseMatrix) -> np.ndarray:
    """The matrix as an array."""
    return np.asarray(matrix.toarray())


def row_sums(matrix: SparseMatrix) -> np.ndarray:
    """The sum of each row."""
    return np.asarray(matrix.sum(1)).ravel()


def row_shares(matrix: SparseMatrix) -> SparseMatrix:
    """The same with rows that sum to 1; empty rows stay empty."""
    total_P = row_sums(matrix)
    return (sparse.diags_array(1 / np.where(total_P > 0, total_P, 1)) @ matrix).tocsr()


def components(first_X: np.ndarray, second_X: np.ndarray, nodes: int) -> np.ndarray:
    """[nodes]: number of the connected component of each node, given the two ends of each edge."""
    edges = table((first_X, second_X), np.ones(len(first_X)), (nodes, nodes))
    return np.asarray(sparse.csgraph.connected_components(edges, directed=False)[1])
