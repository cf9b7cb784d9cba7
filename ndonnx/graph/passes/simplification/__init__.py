"""Exact simplification: the same function in fewer operators, by rules that each look at a few neighbouring nodes."""
