"""The teacher's graph: read safely, seen as a flow of values, priced in parameters and MACs."""

from ndonnx.graph.costs import Cost, cost_of, slice_cost
from ndonnx.graph.dataflow import Dataflow, Kind
from ndonnx.graph.load import load, save, serialise
from ndonnx.graph.normalise import fold_constants

__all__ = ["Cost", "Dataflow", "Kind", "cost_of", "fold_constants", "load", "save", "serialise", "slice_cost"]
