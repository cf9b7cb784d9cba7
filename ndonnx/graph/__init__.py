"""The teacher's graph: read safely, seen as a flow of values, priced in parameters and MACs."""

from ndonnx.graph.costs import Cost
from ndonnx.graph.dataflow import Dataflow, Kind
from ndonnx.graph.load import load
from ndonnx.graph.macs import slice_cost
from ndonnx.graph.passes.normalise import fold_constants
from ndonnx.graph.save import save, serialise, to_proto

__all__ = ["Cost", "Dataflow", "Kind", "fold_constants", "load", "save", "serialise", "slice_cost", "to_proto"]
