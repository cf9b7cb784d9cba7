"""Least squares on captured activations: one accumulator of normal equations, one solver.

A linear operator is a matrix on rows of features (`rows.py`). A bounded number of rows, spread over all samples,
goes into moments chunk by chunk (`moments.py`), and symmetric systems are solved by Cholesky factors (`solver.py`).
`regression.py` puts the three together for one operator.
"""

from ndonnx.students.least_squares.moments import Accumulator, Moments
from ndonnx.students.least_squares.regression import FeatureEnergies, Regression, fit
from ndonnx.students.least_squares.rows import (
    MOST_FEATURES,
    RowSampler,
    features_of,
    groups_of,
    kernel_of,
    output_rows,
    rows_needed,
    rows_of,
    shape_of,
)
from ndonnx.students.least_squares.solver import cholesky, one_thread, ridge_of, solve, solve_masked

__all__ = [
    "MOST_FEATURES",
    "Accumulator",
    "FeatureEnergies",
    "Moments",
    "Regression",
    "RowSampler",
    "cholesky",
    "features_of",
    "fit",
    "groups_of",
    "kernel_of",
    "one_thread",
    "output_rows",
    "ridge_of",
    "rows_needed",
    "rows_of",
    "shape_of",
    "solve",
    "solve_masked",
]
