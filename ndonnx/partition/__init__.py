"""Which parts of the teacher can be replaced: regions, neighbourhoods, channel groups."""

from ndonnx.partition.channels.group import (
    ChannelGroup,
    ChannelGroups,
    ChannelStatistic,
    DimensionEdit,
    FrozenWidth,
    WeightAxis,
    stays,
)
from ndonnx.partition.channels.groups import find_groups
from ndonnx.partition.neighbourhoods import partition
from ndonnx.partition.parts import Neighbourhood, Partition
from ndonnx.partition.paths import nodes_between, sort_nodes
from ndonnx.partition.regions import Atom, Chain, find_chains
from ndonnx.partition.slices import extract, is_opaque, region_nodes

__all__ = [
    "Atom",
    "Chain",
    "ChannelGroup",
    "ChannelGroups",
    "ChannelStatistic",
    "DimensionEdit",
    "FrozenWidth",
    "Neighbourhood",
    "Partition",
    "WeightAxis",
    "extract",
    "find_chains",
    "find_groups",
    "is_opaque",
    "nodes_between",
    "partition",
    "region_nodes",
    "sort_nodes",
    "stays",
]
