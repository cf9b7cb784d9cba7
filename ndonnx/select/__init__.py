"""The choice among trained students: which neighbourhood gets which candidate, for what cost and what quality.

Nothing here runs a model. A table of measured options goes in, a choice comes out: greedily as in
the paper, or by an exact 0/1 programme, for one target or along the whole trade-off curve.
"""

from ndonnx.select.candidates import DEFAULT_CANDIDATES, Candidate, parse_candidates
from ndonnx.select.greedy import greedy, greedy_to, greedy_under
from ndonnx.select.milp import nearest, solve
from ndonnx.select.pareto import pareto
from ndonnx.select.promise import ERROR, Promise, first_confidence, least_bound
from ndonnx.select.table import INT8, TEACHER, Choice, Option, Table, bits_of, in_float
from ndonnx.select.targets import COSTS, parse_drop, parse_target

__all__ = [
    "COSTS",
    "DEFAULT_CANDIDATES",
    "ERROR",
    "INT8",
    "TEACHER",
    "Candidate",
    "Choice",
    "Option",
    "Promise",
    "Table",
    "bits_of",
    "first_confidence",
    "greedy",
    "greedy_to",
    "greedy_under",
    "in_float",
    "least_bound",
    "nearest",
    "pareto",
    "parse_candidates",
    "parse_drop",
    "parse_target",
    "solve",
]
