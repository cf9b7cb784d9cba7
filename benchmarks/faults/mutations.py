"""What is done to a sound model: damage to its bytes, and lies that only somebody who knows the format would tell.

Each mutation takes a `random.Random` and changes a model in place, as far as it has what the mutation is about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper

Mutation = Callable[[random.Random, onnx.ModelProto], None]

ABSURD = (0, -1, 1, 2, 7, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, -(2**63), 2**63 - 1)
"""Numbers that sizes, axes and counts should not be."""
NAMES = (
    "", " ", ".", "..", "../outside/secret.bin", "/dev/zero", "CON", "a\x00b", "\x1b[31m", "\u202e", "é" * 300,
    "x" * 100_000,
    "{0}", "%s%n", "$(touch owned)", "'; drop", "\n", "done.json", "lock", "label",
)  # fmt: skip
"""Names that end up in paths, messages and terminals."""
_OPERATORS = sorted({(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas()})
_MICROSOFT = ("FusedConv", "Attention", "SkipLayerNormalization", "BiasGelu", "MatMulNBits", "QLinearAdd", "NhwcConv")
_TYPES = (*range(25), 99, -1, 2**31 - 1)


def flipped(rng: random.Random, whole: bytes) -> bytes:
    """Some bytes changed, most of them where the structure stands and not the weights."""
    damaged = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        near = rng.random() < 0.7
        at = rng.randrange(min(len(damaged), 600)) if near else rng.randrange(len(damaged))
        damaged[at if rng.random() < 0.5 else -1 - at] ^= rng.randrange(1, 256)
    return bytes(damaged)


def cut(rng: random.Random, whole: bytes) -> bytes:
    """The beginning of a file."""
    return whole[: rng.randrange(len(whole))]


def spliced(rng: random.Random, whole: bytes) -> bytes:
    """A part of the file once more, gone, at another place, or as noise."""
    start = rng.randrange(len(whole))
    stop = min(len(whole), start + rng.choice((1, 4, 30, 300)))
    part, at = whole[start:stop], rng.randrange(len(whole))
    return rng.choice(
        (
            whole[:at] + part + whole[at:],
            whole[:start] + whole[stop:],
            whole[:start] + rng.randbytes(stop - start) + whole[stop:],
            whole + part,
        )
    )


def nested(rng: random.Random, whole: bytes) -> bytes:
    """Graphs inside graphs, deeper than any library writes them: a thousand of them, or a hundred thousand bytes."""
    inner = b""
    for level in range(rng.choice((60, 120, 1200))):
        kind = (b"\x0a", b"\x32", b"\x2a")[level % 3]  # a node, the graph of its attribute, the attribute
        inner = kind + _varint(len(inner)) + inner
    return whole + b"\x3a" + _varint(len(inner)) + inner


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


BYTES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "flipped": flipped, "flipped again": flipped, "cut": cut, "spliced": spliced, "nested": nested,
}  # fmt: skip
"""Damage to bytes, by name."""


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _some_node(rng: random.Random, model: onnx.ModelProto) -> onnx.NodeProto:
    return rng.choice(list(_nodes(model.graph)) or [model.graph.node.add()])


def _names(model: onnx.ModelProto) -> list[str]:
    made = [name for node in _nodes(model.graph) for name in node.output]
    return [*made, *(tensor.name for tensor in model.graph.initializer), *(value.name for value in model.graph.input)]


def _some_tensor(rng: random.Random, model: onnx.ModelProto) -> onnx.TensorProto:
    held = [a.t for node in _nodes(model.graph) for a in node.attribute if a.type == AttributeProto.TENSOR]
    return rng.choice([*model.graph.initializer, *held] or [model.graph.initializer.add(name="none")])


def _some_value(rng: random.Random, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    graph = model.graph
    return rng.choice([*graph.input, *graph.output, *graph.value_info] or [graph.input.add(name="none")])


# Attributes


def wrong_value(rng: random.Random, model: onnx.ModelProto) -> None:
    """An attribute of the right type, with numbers that make no sense."""
    node = next((n for n in rng.sample(list(_nodes(model.graph)), len(list(_nodes(model.graph)))) if n.attribute), None)
    attribute = rng.choice(node.attribute) if node is not None else None
    if attribute is None:
        return
    if attribute.type == AttributeProto.INT:
        attribute.i = rng.choice(ABSURD)
    elif attribute.type == AttributeProto.INTS:
        count = rng.choice((0, 1, len(attribute.ints), len(attribute.ints) + 1, 9))
        del attribute.ints[:]
        attribute.ints.extend(rng.choice(ABSURD) for _ in range(count))
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38))
    elif attribute.type == AttributeProto.STRING:
        attribute.s = rng.choice((b"", b"\xff\xfe", b"SAME_UPPER", b"x" * 10_000))
    else:
        attribute.type = rng.randrange(15)


def wrong_type(rng: random.Random, model: onnx.ModelProto) -> None:
    """An attribute that says it is of another type than it is."""
    node = _some_node(rng, model)
    if node.attribute:
        rng.choice(node.attribute).type = rng.choice((*range(15), 99))
    else:
        node.attribute.append(AttributeProto(name="axis", type=rng.randrange(15)))


def foreign_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    """An attribute that the operator does not have, or has of another type."""
    schema = onnx.defs.get_schema(rng.choice([name for domain, name in _OPERATORS if domain == ""]))
    known = [name for name in schema.attributes]
    value = rng.choice((3, -1, 2**62, 0.5, "text", [1, 2], [0.5], ["a"], helper.make_tensor("t", 1, [2], [1.0, 2.0])))
    node = _some_node(rng, model)
    node.attribute.append(helper.make_attribute(rng.choice(known or ["axis"]), value))


def lost_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    """An attribute is missing, or there twice."""
    nodes = [node for node in _nodes(model.graph) if node.attribute]
    if nodes:
        node = rng.choice(nodes)
        at = rng.randrange(len(node.attribute))
        if rng.random() < 0.5:
            node.attribute.append(node.attribute[at])
        else:
            del node.attribute[at]


def reference(rng: random.Random, model: onnx.ModelProto) -> None:
    """An attribute that refers to one of a function, outside any."""
    node = _some_node(rng, model)
    node.attribute.append(AttributeProto(name=rng.choice(("axis", "alpha", "to")), ref_attr_name="alpha", type=1))


# Operators and wires


def other_operator(rng: random.Random, model: onnx.ModelProto) -> None:
    """Any other operator in the place of one."""
    node = _some_node(rng, model)
    node.domain, node.op_type = rng.choice([*_OPERATORS, *(("com.microsoft", name) for name in _MICROSOFT)])


def odd_operator(rng: random.Random, model: onnx.ModelProto) -> None:
    """An operator, or a domain, that nobody knows."""
    node = _some_node(rng, model)
    if rng.random() < 0.5:
        node.op_type = rng.choice(NAMES)
    else:
        node.domain = rng.choice((*NAMES, "ai.onnx.ml", "com.microsoft", "ai.onnx.training"))


def cycle(rng: random.Random, model: onnx.ModelProto) -> None:
    """A node reads what is made behind it, or itself."""
    nodes = model.graph.node
    if nodes:
        early = rng.randrange(len(nodes))
        late = rng.randrange(early, len(nodes))
        if nodes[early].input and nodes[late].output:
            nodes[early].input[rng.randrange(len(nodes[early].input))] = nodes[late].output[0]


def rewired(rng: random.Random, model: onnx.ModelProto) -> None:
    """A node reads any other value, of whatever type and shape."""
    node = _some_node(rng, model)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(_names(model) or [""])


def missing_input(rng: random.Random, model: onnx.ModelProto) -> None:
    """A node reads what is not there, nothing, too little or too much."""
    node = _some_node(rng, model)
    way = rng.randrange(4)
    if way == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(("nowhere", ""))
    elif way == 1 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif way == 2:
        del node.input[:]
    else:
        node.input.extend(rng.choices(_names(model) or [""], k=rng.choice((1, 3, 50))))


def odd_outputs(rng: random.Random, model: onnx.ModelProto) -> None:
    """A node has too few outputs, too many, unnamed ones, or none."""
    node = _some_node(rng, model)
    way = rng.randrange(4)
    if way == 0:
        del node.output[:]
    elif way == 1 and node.output:
        node.output[rng.randrange(len(node.output))] = ""
    else:
        node.output.extend(f"more{i}" for i in range(rng.choice((1, 2, 40))))


def lost_node(rng: random.Random, model: onnx.ModelProto) -> None:
    """A node is missing, there twice, or all are in another order."""
    nodes = model.graph.node
    if nodes:
        at = rng.randrange(len(nodes))
        way = rng.randrange(3)
        if way == 0:
            del nodes[at]
        elif way == 1:
            nodes.append(nodes[at])
        else:
            mixed = rng.sample(list(nodes), len(nodes))
            del nodes[:]
            nodes.extend(mixed)


# Names


def double_name(rng: random.Random, model: onnx.ModelProto) -> None:
    """Two things have one name."""
    graph, names = model.graph, _names(model) or [""]
    way = rng.randrange(5)
    if way == 0:
        node = _some_node(rng, model)
        if node.output:
            node.output[0] = rng.choice(names)
    elif way == 1 and graph.initializer:
        rng.choice(graph.initializer).name = rng.choice(names)
    elif way == 2 and graph.input:
        rng.choice(graph.input).name = rng.choice(names)
    elif way == 3 and graph.output:
        rng.choice(graph.output).name = rng.choice(names)
    elif graph.input:
        rng.choice((graph.input, graph.output)).append(rng.choice(graph.input))


def odd_name(rng: random.Random, model: onnx.ModelProto) -> None:
    """A value, everywhere, a node, the graph or a size is called something odd."""
    new, way = rng.choice(NAMES), rng.randrange(4)
    if way == 0:
        _some_node(rng, model).name = new
    elif way == 1:
        model.graph.name = new
    elif way == 2:
        value = _some_value(rng, model)
        for size in value.type.tensor_type.shape.dim:
            size.dim_param = new
    else:
        rename(model.graph, rng.choice(_names(model) or [""]), new)


def rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Call a value something else wherever it stands, in graphs inside as well."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        if value.name == old:
            value.name = new
    for node in graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                if name == old:
                    names[at] = new
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                rename(attribute.g, old, new)


# Types and shapes


def inconsistent_type(rng: random.Random, model: onnx.ModelProto) -> None:
    """An input, an output or a value in between is said to be of another type."""
    value = _some_value(rng, model)
    way = rng.randrange(6)
    if way < 3:
        value.type.tensor_type.elem_type = rng.choice(_TYPES)
    elif way == 3:
        value.ClearField("type")
    elif way == 4:
        inner = onnx.TypeProto()
        inner.CopyFrom(value.type)
        value.type.sequence_type.elem_type.CopyFrom(inner)
    else:
        value.type.map_type.key_type = rng.choice(_TYPES)


def inconsistent_shape(rng: random.Random, model: onnx.ModelProto) -> None:
    """An input, an output or a value in between is said to have other sizes, or another rank."""
    shape = _some_value(rng, model).type.tensor_type.shape
    way = rng.randrange(4)
    if way == 0 and shape.dim:
        rng.choice(shape.dim).dim_value = rng.choice(ABSURD)
    elif way == 1 and shape.dim:
        del shape.dim[rng.randrange(len(shape.dim))]
    elif way == 2:
        shape.dim.add(dim_value=rng.choice(ABSURD))
    else:
        shape.dim.extend([onnx.TensorShapeProto.Dimension(dim_value=1)] * rng.choice((1, 5, 70)))


def invented_value(rng: random.Random, model: onnx.ModelProto) -> None:
    """A type is stated of an inner value, or of one that there is not."""
    sizes = [rng.choice((*ABSURD, 3, 8)) for _ in range(rng.randrange(6))]
    name = rng.choice((*_names(model), "nowhere"))
    model.graph.value_info.append(helper.make_tensor_value_info(name, rng.choice(_TYPES[:24]), sizes))


def odd_ends(rng: random.Random, model: onnx.ModelProto) -> None:
    """The model has no inputs, no outputs, or other values as such."""
    graph, way = model.graph, rng.randrange(5)
    if way == 0:
        del graph.input[:]
    elif way == 1:
        del graph.output[:]
    elif way == 2:
        graph.output.append(onnx.ValueInfoProto(name=rng.choice(_names(model) or [""])))
    elif way == 3:
        graph.input.append(onnx.ValueInfoProto(name=rng.choice((*_names(model), "more"))))
    elif graph.input and graph.output:
        graph.output[0].CopyFrom(rng.choice(graph.input))


# Weights


def absurd_tensor(rng: random.Random, model: onnx.ModelProto) -> None:
    """A weight claims sizes that its bytes do not have."""
    tensor, way = _some_tensor(rng, model), rng.randrange(4)
    if way == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(ABSURD)
    elif way == 1:
        tensor.dims.append(rng.choice(ABSURD))
    elif way == 2:
        tensor.dims.extend([2**20] * 3)
    elif tensor.dims:
        del tensor.dims[0]


def odd_tensor(rng: random.Random, model: onnx.ModelProto) -> None:
    """A weight is of another type, its bytes are cut, or stand in the wrong field, or in two."""
    tensor, way = _some_tensor(rng, model), rng.randrange(5)
    if way == 0:
        tensor.data_type = rng.choice(_TYPES)
    elif way == 1:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif way == 2:
        tensor.float_data.extend([1.0, 2.0])
    elif way == 3:
        tensor.string_data.extend([b"a", b"\xff"])
    else:
        tensor.ClearField("raw_data")
        tensor.int32_data.extend([2**31 - 1, -1])


def odd_numbers(rng: random.Random, model: onnx.ModelProto) -> None:
    """A weight holds NaN, infinities, the largest numbers or nothing but zeros."""
    tensor = _some_tensor(rng, model)
    if tensor.raw_data:
        four = rng.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0", b"\x01\0\0\0", b"\xff" * 4)
        )
        if rng.random() < 0.5:
            tensor.raw_data = (four * (len(tensor.raw_data) // 4 + 1))[: len(tensor.raw_data)]
        else:
            tensor.raw_data = (four + tensor.raw_data[4:])[: len(tensor.raw_data)]


def lost_weight(rng: random.Random, model: onnx.ModelProto) -> None:
    """A weight is missing, is there twice with other numbers, or is an input as well."""
    weights, way = model.graph.initializer, rng.randrange(3)
    if weights:
        at = rng.randrange(len(weights))
        if way == 0:
            del weights[at]
        elif way == 1:
            weights.append(weights[at])
            odd_numbers(rng, model)
        else:
            tensor = weights[at]
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, rng.choice((1, 7)), list(tensor.dims)))


def sparse_weight(rng: random.Random, model: onnx.ModelProto) -> None:
    """A weight is sparse, with indices that lead elsewhere."""
    dense = rng.choice(list(model.graph.initializer) or [TensorProto(name="w", dims=[4], data_type=1)])
    values = helper.make_tensor(dense.name, 1, [3], [1.0, float("nan"), 2.0])
    indices = helper.make_tensor("", 7, rng.choice(([3], [3, 1], [1, 3], [3])), [rng.choice(ABSURD) for _ in range(3)])
    sizes = rng.choice((list(dense.dims), [2**40], [-1], [0], [], [2**20] * 4))
    kept = [tensor for tensor in model.graph.initializer if tensor.name != dense.name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, sizes))


def outside(rng: random.Random, model: onnx.ModelProto) -> None:
    """A weight lies in a file that is not its own, or at a place that the file does not have."""
    tensor = _some_tensor(rng, model)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=rng.choice(PLACES))
    for key, values in (("offset", ABSURD_TEXT), ("length", ABSURD_TEXT), ("checksum", ("x",))):
        if rng.random() < 0.4:
            tensor.external_data.add(key=key, value=rng.choice(values))
    if rng.random() < 0.2:
        tensor.dims.append(2**40)


ABSURD_TEXT = (
    "-1",
    "0",
    "4096",
    "99999999999999999999999",
    "1e3",
    "",
    "0x10",
    "None",
    "nan",
    " 8",
    "18446744073709551615",
)
PLACES = (
    "weights.bin", "../outside/secret.bin", "inner/../../outside/secret.bin", "{bait}/secret.bin", "link.bin",
    "loop.bin",
    "/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd", "", ".", "..", "tmp", "fifo.bin", "nowhere.bin",
    "a\x00b",
    "file://{bait}/secret.bin", "..\\outside\\secret.bin", "linked/secret.bin", "x" * 5000, "model.onnx", "hard.bin",
)  # fmt: skip
"""Where weights may be said to lie; `{bait}` is the folder of the baits."""


# Graphs inside graphs, functions, and what is only large when it is run


def deep(rng: random.Random, model: onnx.ModelProto) -> None:
    """Graphs inside graphs inside graphs."""
    out = model.graph.output[0].name if model.graph.output else "y"
    inner = helper.make_graph([helper.make_node("Identity", [out], ["z"])], "g", [], [onnx.ValueInfoProto(name="z")])
    for _ in range(rng.choice((1, 3, 12, 20))):  # protobuf writes no more than about 25; see `nested`
        node = helper.make_node(
            "If", ["yes"], ["z"], then_branch=inner, else_branch=inner if rng.random() < 0.1 else None
        )
        inner = helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name="z")])
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    model.graph.node.extend(inner.node)
    model.graph.output.append(helper.make_tensor_value_info("z", 1, None))


def functions(rng: random.Random, model: onnx.ModelProto) -> None:
    """Functions that call themselves, each other, or two of the next, which is more nodes than there are atoms."""
    depth, way = rng.choice((1, 2, 12, 60, 300)), rng.randrange(3)
    for level in range(depth):
        after = f"f{(level + 1) % depth}" if way == 0 else (f"f{level + 1}" if level + 1 < depth else "Relu")
        domain = "d" if after.startswith("f") else ""
        nodes = [
            helper.make_node(after, ["a"], ["b"], domain=domain),
            helper.make_node(after, ["b"], ["c"], domain=domain),
        ]
        if way == 1:
            nodes = [helper.make_node(after, ["a"], ["c"], domain=domain)]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
        model.functions.append(helper.make_function("d", f"f{level}", ["a"], ["c"], nodes, imports))
    model.opset_import.append(helper.make_opsetid("d", 1))
    if model.graph.output:
        model.graph.node.append(helper.make_node("f0", [model.graph.output[0].name], ["called"], domain="d"))
        model.graph.output.append(helper.make_tensor_value_info("called", 1, None))


def bomb(rng: random.Random, model: onnx.ModelProto) -> None:
    """A few numbers that become a huge constant, or an endless computation, when they are computed."""
    huge = [rng.choice((2**20, 2**31, 2**40, 2**62)) for _ in range(rng.choice((1, 2, 4)))]
    model.graph.initializer.append(helper.make_tensor("bomb.sizes", 7, [len(huge)], huge))
    model.graph.initializer.append(helper.make_tensor("bomb.one", 1, [1] * len(huge), [1.0]))
    model.graph.initializer.append(helper.make_tensor("bomb.count", 7, [], [huge[0]]))
    model.graph.initializer.append(helper.make_tensor("bomb.zero", 7, [], [0]))
    model.graph.initializer.append(helper.make_tensor("bomb.unit", 7, [], [1]))
    way = rng.choice(("ConstantOfShape", "Expand", "Tile", "Range", "RandomNormal", "EyeLike", "Pad", "Resize"))
    inputs = {"ConstantOfShape": ["bomb.sizes"], "Range": ["bomb.zero", "bomb.count", "bomb.unit"], "RandomNormal": []}
    node = helper.make_node(way, inputs.get(way, ["bomb.one", "bomb.sizes"]), ["bomb"])
    if way == "RandomNormal":
        node.attribute.append(helper.make_attribute("shape", huge))
    model.graph.node.append(node)
    model.graph.node.append(helper.make_node("ReduceMax", ["bomb"], ["bomb.out"], keepdims=0))
    model.graph.output.append(onnx.ValueInfoProto(name="bomb.out"))


def endless(rng: random.Random, model: onnx.ModelProto) -> None:
    """A loop that never ends, over constants or over the input."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["s", "s"], ["t"])],
        "body",
        [
            helper.make_tensor_value_info("i", 7, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", 1, None),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("t", 1, None)],
    )
    model.graph.initializer.append(helper.make_tensor("loop.count", 7, [], [rng.choice((2**40, 2**62))]))
    model.graph.initializer.append(helper.make_tensor("loop.go", TensorProto.BOOL, [], [True]))
    model.graph.initializer.append(helper.make_tensor("loop.state", 1, [2], [1.0, 1.0]))
    start = rng.choice(("loop.state", rng.choice([value.name for value in model.graph.input] or ["loop.state"])))
    model.graph.node.append(helper.make_node("Loop", ["loop.count", "loop.go", start], ["loop.out"], body=body))
    model.graph.output.append(helper.make_tensor_value_info("loop.out", 1, None))


def long(rng: random.Random, model: onnx.ModelProto) -> None:
    """A chain of thousands of nodes, or one node with thousands of readers or outputs."""
    name = model.graph.output[0].name if model.graph.output else "x"
    count = rng.choice((500, 3000))
    if rng.random() < 0.5:
        model.graph.node.extend(
            helper.make_node("Relu", [name if i == 0 else f"long{i - 1}"], [f"long{i}"]) for i in range(count)
        )
    else:
        model.graph.node.extend(helper.make_node("Relu", [name], [f"long{i}"]) for i in range(count))
    model.graph.output.append(helper.make_tensor_value_info(f"long{count - 1}", 1, None))


# The file


def odd_versions(rng: random.Random, model: onnx.ModelProto) -> None:
    """A version that there is not, of the format or of the operators."""
    way = rng.randrange(4)
    if way == 0:
        model.ir_version = rng.choice((0, -1, 1, 3, 99, 2**62))
    elif way == 1 and model.opset_import:
        model.opset_import[0].version = rng.choice((0, -1, 1, 5, 99, 2**62))
    elif way == 2:
        del model.opset_import[:]
    else:
        model.opset_import.append(
            helper.make_opsetid(rng.choice(("", "ai.onnx", *NAMES[:9])), rng.choice((1, 9, 17, -3)))
        )


def odd_metadata(rng: random.Random, model: onnx.ModelProto) -> None:
    """Keys of metadata that are odd, twice there, or this package's own."""
    for key in rng.choices((*NAMES, "ndonnx.opsets", "ndonnx.map_types", "pkg.onnx"), k=3):
        model.metadata_props.add(key=key, value=rng.choice(NAMES))
        model.graph.metadata_props.add(key=key, value=rng.choice(NAMES))
        _some_node(rng, model).metadata_props.add(key=key, value=rng.choice(NAMES))


def annotated(rng: random.Random, model: onnx.ModelProto) -> None:
    """Quantisation of values that there are not, and training that nobody asked for."""
    note = model.graph.quantization_annotation.add(tensor_name=rng.choice((*_names(model), "nowhere")))
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=rng.choice((*_names(model), "nowhere")))
    model.training_info.add().algorithm.node.add(op_type="Relu", input=["nowhere"], output=["y"])


MUTATIONS: dict[Mutation, int] = {
    wrong_value: 12, wrong_type: 6, foreign_attribute: 8, lost_attribute: 4, reference: 3, other_operator: 8,
    odd_operator: 4,
    cycle: 4, rewired: 8, missing_input: 8, odd_outputs: 4, lost_node: 4, double_name: 8, odd_name: 4,
    inconsistent_type: 8,
    inconsistent_shape: 8, invented_value: 4, odd_ends: 4, absurd_tensor: 8, odd_tensor: 8, odd_numbers: 4,
    lost_weight: 4,
    sparse_weight: 4, outside: 10, deep: 3, functions: 3, bomb: 5, endless: 1, long: 1, odd_versions: 4,
    odd_metadata: 4,
    annotated: 3,
}  # fmt: skip
"""All of them, and how often each is done: those that have many forms often, those that take long seldom."""


def mutated(rng: random.Random, model: onnx.ModelProto) -> list[str]:
    """Do one thing, sometimes two or three, to a model in place; their names."""
    chosen = rng.choices(list(MUTATIONS), list(MUTATIONS.values()), k=rng.choice((1, 1, 1, 2, 3)))
    done = []
    for mutation in chosen:
        try:
            mutation(rng, model)
        except (ValueError, TypeError, OverflowError, DecodeError):  # some of it protobuf refuses to write
            continue
        done.append(mutation.__name__)
    return done
