"""Blocks of networks whose operators see several channels at once: norms, means, maxima, shuffles, products.

Each takes a value (N, c, 6, 6) and returns one of the same kind, as those of `models.BLOCKS` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.helpers.models import BLOCKS, Net

Block = Callable[[Net, str, int], tuple[str, int]]
_WIDTH = 12
_IMAGE = 6


def number(net: Net, value: float) -> str:
    """A float32 scalar."""
    return net.constant(f"number{len(net.weights)}", np.array(value, np.float32))


def scales(net: Net, *shape: int) -> str:
    """Factors around 1."""
    return net.constant(f"scale{len(net.weights)}", net.rng.uniform(0.5, 1.5, shape).astype(np.float32))


def normalised(net: Net, x: str, axes: Sequence[int], *, centred: bool = True) -> str:
    """`LayerNormalization` (or RMS) without scale, as exporters of old opsets write it."""
    if centred:
        x = net.op("Sub", x, net.op("ReduceMean", x, net.ints(*axes)))
    square = net.op("ReduceMean", net.op("Pow", x, number(net, 2)), net.ints(*axes))
    return net.op("Div", x, net.op("Sqrt", net.op("Add", square, number(net, 1e-5))))


def _between(middle: Callable[[Net, str], str], width: int = _WIDTH) -> Block:
    """Something between two convolutions, with an activation behind it."""

    def block(net: Net, x: str, c: int) -> tuple[str, int]:
        return net.conv(net.relu(middle(net, net.conv(x, c, width))), width, c), c

    return block


def _group_norm(groups: int) -> Block:
    return _between(lambda net, y: net.op(
        "GroupNormalization", y, scales(net, groups), net.weight(f"shift{len(net.weights)}", groups), num_groups=groups
    ))  # fmt: skip


def _group_norm_by_instances(groups: int) -> Block:
    """As torch exports it: groups as instances, then scale and bias by channel."""

    def middle(net: Net, y: str) -> str:
        ones, zeros = (net.constant(f"{n}{len(net.weights)}", np.full(groups, n, np.float32)) for n in (1, 0))
        z = net.op("Reshape", y, net.ints(0, groups, -1))
        z = net.op("Reshape", net.op("InstanceNormalization", z, ones, zeros), net.op("Shape", y))
        return net.op("Add", net.op("Mul", z, scales(net, _WIDTH, 1, 1)), scales(net, _WIDTH, 1, 1))

    return _between(middle)


def _group_norm_by_means(groups: int) -> Block:
    def middle(net: Net, y: str) -> str:
        z = net.op("Reshape", y, net.ints(-1, groups, _WIDTH // groups, _IMAGE, _IMAGE))
        z = net.op("Reshape", normalised(net, z, [2, 3, 4]), net.ints(-1, _WIDTH, _IMAGE, _IMAGE))
        return net.op("Mul", z, scales(net, 1, _WIDTH, 1, 1))

    return _between(middle)


def _channels_last(op: str, *, bias: bool) -> Block:
    def middle(net: Net, y: str) -> str:
        y = net.op("Transpose", y, perm=[0, 2, 3, 1])
        weights = [scales(net, _WIDTH), *([scales(net, _WIDTH)] * bias)]
        return net.op("Transpose", net.op(op, y, *weights, axis=-1), perm=[0, 3, 1, 2])

    return _between(middle)


def _norm_over_image(net: Net, y: str) -> str:
    """A `LayerNormalization` over channels and pixels together."""
    shape = (_WIDTH, _IMAGE, _IMAGE)
    return net.op("LayerNormalization", y, scales(net, *shape), scales(net, *shape), axis=1)


def _channels_first(net: Net, y: str) -> str:
    return net.op("Add", net.op("Mul", normalised(net, y, [1]), scales(net, _WIDTH, 1, 1)), scales(net, _WIDTH, 1, 1))


def _root_mean_square(net: Net, y: str) -> str:
    return net.op("Mul", normalised(net, y, [1], centred=False), scales(net, 1, _WIDTH, 1, 1))


def _unit_length(net: Net, y: str) -> str:
    length = net.op("Max", net.op("ReduceL2", y, net.ints(1)), number(net, 1e-12))
    return net.op("Div", y, length)


def _unit_length_spread(net: Net, y: str) -> str:
    """As torch exports it: the length is first repeated for every channel."""
    length = net.op("Clip", net.op("ReduceL2", y, net.ints(1)), number(net, 1e-12))
    return net.op("Div", y, net.op("Expand", length, net.op("Shape", y)))


def _computed_halves(net: Net, y: str) -> str:
    """The first half of the channels, by the length of the axis, gates the second."""
    size = net.op("Gather", net.op("Shape", y), net.ints(1))
    half = net.op("Div", net.op("Add", size, net.ints(1)), net.ints(2))
    gate = net.op("Slice", y, net.ints(0), half, net.ints(1))
    halves = net.op("Mul", net.op("Slice", y, half, net.op("Mul", half, net.ints(2)), net.ints(1)), gate)
    return net.op("Concat", halves, net.op("Neg", gate), axis=1)


def _response_norm(net: Net, y: str) -> str:
    """ConvNeXt-V2's global response normalisation."""
    energy = net.op("ReduceL2", y, net.ints(2, 3))
    share = net.op("Div", energy, net.op("Add", net.op("ReduceMean", energy, net.ints(1)), number(net, 1e-6)))
    scaled = net.op("Mul", net.op("Mul", y, share), scales(net, 1, _WIDTH, 1, 1))
    return net.op("Add", net.op("Add", scaled, scales(net, 1, _WIDTH, 1, 1)), y)


def _spatial_attention(net: Net, y: str) -> str:
    """CBAM's: the mean and the maximum over channels make a map by which every channel is scaled."""
    maps = net.op("Concat", net.op("ReduceMean", y, net.ints(1)), net.op("ReduceMax", y, net.ints(1)), axis=1)
    return net.op("Mul", y, net.op("Sigmoid", net.conv(maps, 2, 1)))


def _shuffled(groups: int, width: int) -> Block:
    """ShuffleNet's unit: grouped 1x1 convolutions with a shuffle between them."""

    def block(net: Net, x: str, c: int) -> tuple[str, int]:
        grouped = net.conv(x, c, groups * 2, 1)
        y = net.relu(net.conv(grouped, groups * 2, width, 1, group=groups))
        y = net.op("Reshape", y, net.ints(-1, groups, width // groups, _IMAGE, _IMAGE))
        y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.ints(-1, width, _IMAGE, _IMAGE))
        y = net.conv(net.conv(y, width, width, group=width), width, groups * 2, 1, group=groups)
        return net.conv(net.relu(net.op("Add", y, grouped)), groups * 2, c, 1), c

    return block


def _from_a_vector(net: Net, x: str, c: int) -> tuple[str, int]:
    """A generator: a dense layer makes feature maps."""
    y = net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), c, 8 * 9)
    y = net.relu(net.norm(net.op("Reshape", y, net.ints(-1, 8, 3, 3)), 8))
    weight = net.weight(f"up{len(net.weights)}", 8, c, 2, 2)
    return net.op("ConvTranspose", y, weight, strides=[2, 2]), c


def _upsampled(group: int, out_of_each: int, **attributes: object) -> Block:
    """A grouped transposed convolution between two convolutions, pooled back to the old size."""

    def block(net: Net, x: str, c: int) -> tuple[str, int]:
        y = net.relu(net.conv(x, c, _WIDTH, stride=2))
        weight = net.weight(f"up{len(net.weights)}", _WIDTH, out_of_each, 4, 4)
        bias = net.weight(f"up{len(net.weights)}", group * out_of_each)
        y = net.op("ConvTranspose", y, weight, bias, group=group, strides=[2, 2], **attributes)
        return net.conv(net.relu(y), group * out_of_each, c), c

    return block


def _mean_then_softmax(net: Net, y: str) -> str:
    gate = net.conv(net.op("GlobalAveragePool", y), _WIDTH, _WIDTH, 1)
    return net.op("Mul", y, net.op("Softmax", gate, axis=1))


def _neighbours_gate(net: Net, y: str) -> str:
    """Efficient channel attention: a short kernel along the channels."""
    gate = net.op("Transpose", net.op("Squeeze", net.op("GlobalAveragePool", y), net.ints(-1)), perm=[0, 2, 1])
    gate = net.op("Conv", gate, net.weight(f"across{len(net.weights)}", 1, 1, 3), pads=[1, 1])
    return net.op(
        "Mul", y, net.op("Sigmoid", net.op("Unsqueeze", net.op("Transpose", gate, perm=[0, 2, 1]), net.ints(-1)))
    )


def _pixels(mode: str) -> Block:
    """Channels become pixels and pixels channels again, with a convolution in between."""

    def block(net: Net, x: str, c: int) -> tuple[str, int]:
        y = net.op("DepthToSpace", net.conv(x, c, _WIDTH), blocksize=2, mode=mode)
        y = net.op("SpaceToDepth", net.relu(net.conv(y, _WIDTH // 4, 3)), blocksize=2)
        return net.conv(y, _WIDTH, c), c

    return block


def _added_up_along_a_line(net: Net, y: str) -> str:
    return net.op("CumSum", y, net.constant(f"axis{len(net.weights)}", np.array(-1)))


def _image_attention(net: Net, x: str, c: int) -> tuple[str, int]:
    """One head over the pixels, as diffusion models have it: a channel of the values goes with one of the queries."""
    packed = net.op("Reshape", net.conv(x, c, 3 * _WIDTH, 1), net.ints(0, 3, _WIDTH, -1))
    places = (net.constant(f"place{len(net.weights)}_{i}", np.array(i)) for i in range(3))
    queries, keys, values = (net.op("Gather", packed, place, axis=1) for place in places)
    scores = net.op("Mul", net.op("MatMul", net.op("Transpose", queries, perm=[0, 2, 1]), keys), number(net, 0.5))
    seen = net.op("Transpose", net.op("Softmax", scores, axis=-1), perm=[0, 2, 1])
    image = net.op("Slice", net.op("Shape", x), net.ints(2), net.ints(4))
    mixed = net.op("Reshape", net.op("MatMul", values, seen), net.op("Concat", net.ints(0, _WIDTH), image, axis=0))
    return net.conv(mixed, _WIDTH, c, 1), c


CHANNEL_BLOCKS: dict[str, Block] = {
    "group_norm": _group_norm(4),
    "group_norm_of_all": _group_norm(1),
    "group_norm_of_each": _group_norm(_WIDTH),
    "group_norm_of_halves": _group_norm(2),
    "group_norm_by_instances": _group_norm_by_instances(4),
    "group_norm_of_all_by_instances": _group_norm_by_instances(1),
    "group_norm_by_means": _group_norm_by_means(4),
    "group_norm_of_halves_by_means": _group_norm_by_means(2),
    "layer_norm": _channels_last("LayerNormalization", bias=True),
    "layer_norm_over_image": _between(_norm_over_image),
    "channels_first_norm": _between(_channels_first),
    "root_mean_square": _between(_root_mean_square),
    "unit_length": _between(_unit_length),
    "unit_length_spread": _between(_unit_length_spread),
    "computed_halves": _between(_computed_halves),
    "lp_normalization": _between(lambda net, y: net.op("LpNormalization", y, axis=1)),
    "response_norm": _between(_response_norm),
    "spatial_attention": _between(_spatial_attention),
    "channel_softmax": _between(_mean_then_softmax),
    "neighbours_gate": _between(_neighbours_gate),
    "local_response": _between(lambda net, y: net.op("LRN", y, size=3)),
    "mean_variance": _between(lambda net, y: net.op("MeanVarianceNormalization", y, axes=[1, 2, 3])),
    "added_up_along_a_line": _between(_added_up_along_a_line),
    "image_attention": _image_attention,
    "pixels": _pixels("DCR"),
    "pixels_by_channel": _pixels("CRD"),
    "shuffled_2": _shuffled(2, 16),
    "shuffled_3": _shuffled(3, 24),
    "shuffled_unevenly": _shuffled(3, 30),
    "from_a_vector": _from_a_vector,
    "depthwise_upsampling": _upsampled(_WIDTH, 1, pads=[1, 1, 1, 1]),
    "grouped_upsampling": _upsampled(3, 4, pads=[1, 1, 1, 1]),
    "upsampling_to_same_size": _upsampled(1, 8, auto_pad="SAME_UPPER"),
    "upsampling_to_a_size": _upsampled(1, 8, output_shape=[6, 6]),
}

ALL_BLOCKS = {**BLOCKS, **CHANNEL_BLOCKS}
