"""Shapes of a graph's values: inferred, computed, bound to numbers, or found by trying."""
