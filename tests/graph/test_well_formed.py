"""What every ONNX file has to keep is looked at once, when it is read: what breaks it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from ndonnx.errors import ModelError
from ndonnx.graph import load
from ndonnx.graph.storage.well_formed import check_well_formed
from tests.helpers.families import detector, half_quantised, scanned
from tests.helpers.models import BUILDERS, mlp, with_if


def weight(model: onnx.ModelProto) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)


def more_sizes(model: onnx.ModelProto) -> None:
    weight(model).dims.append(2**40)


def negative_size(model: onnx.ModelProto) -> None:
    weight(model).dims[0] = -1


def nothing_in_it(model: onnx.ModelProto) -> None:
    weight(model).ClearField("raw_data")


def another_field(model: onnx.ModelProto) -> None:
    nothing_in_it(model)
    weight(model).int32_data.extend([1, 2])


def two_fields(model: onnx.ModelProto) -> None:
    weight(model).float_data.extend([1.0])


def another_type(model: onnx.ModelProto) -> None:
    weight(model).data_type = TensorProto.INT64


def no_type(model: onnx.ModelProto) -> None:
    weight(model).data_type = 99


def in_an_attribute(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="held", data_type=1, dims=[2**40])
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def in_a_branch(model: onnx.ModelProto) -> None:
    branch = next(a.g for node in model.graph.node for a in node.attribute if a.type == AttributeProto.GRAPH)
    branch.initializer.append(TensorProto(name="held", data_type=1, dims=[3]))


def wrong_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(AttributeProto(name="axis", type=AttributeProto.INT, f=0.5))


def attribute_without_graph(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(AttributeProto(name="body", type=AttributeProto.GRAPH))


def attribute_twice(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.extend([helper.make_attribute("axis", 1)] * 2)


def reference_outside(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(AttributeProto(name="alpha", ref_attr_name="alpha", type=1))


def two_values(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value_float=1.0, value_int=2))


def made_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["x"], [model.graph.node[0].output[0]]))


def made_over_a_weight(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[0] = weight(model).name


def input_twice(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


REFUSED: dict[Callable[[onnx.ModelProto], None], str] = {
    more_sizes: "should hold",
    negative_size: "has the shape",
    nothing_in_it: "numbers, found 0",
    another_field: "keeps numbers of type FLOAT in int32_data",
    two_fields: "keeps numbers of type FLOAT in float_data",
    another_type: "of type INT64",
    no_type: "of no type that there is",
    in_an_attribute: "tensor 'held'",
    in_a_branch: "tensor 'held'",
    wrong_attribute: "'axis' of node '.*' is not of the type that it states",
    attribute_without_graph: "'body' of node '.*' is not of the type that it states",
    attribute_twice: "has an attribute twice",
    reference_outside: "refers to one of a function",
    two_values: "should have one attribute",
    made_twice: "is made by node",
    made_over_a_weight: "is made by a constant and by node",
    input_twice: "two inputs are called",
}


@pytest.mark.parametrize(("change", "told"), REFUSED.items(), ids=[change.__name__ for change in REFUSED])
def test_what_breaks_a_rule_is_refused_by_name(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], told: str
) -> None:
    model = with_if()
    change(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=rf"m\.onnx: the graph is malformed: .*{told}") as caught:
        load(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    """Protobuf gives such a text as bytes, which end up in reports and fail there."""
    (tmp_path / "m.onnx").write_bytes(mlp().SerializeToString().replace(b"Relu", b"R\xff\xfeu"))
    with pytest.raises(ModelError, match="is not UTF-8"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("build", [*BUILDERS.values(), detector, half_quantised, scanned])
def test_sound_models_pass(build: Callable[[], onnx.ModelProto]) -> None:
    check_well_formed(build())


def test_numbers_may_stand_in_the_fields_of_their_type() -> None:
    model = mlp()
    values: dict[int, list[Any]] = {
        TensorProto.FLOAT16: [1.0, 2.0],
        TensorProto.INT4: [1, 2, 3],
        TensorProto.BOOL: [True, False],
        TensorProto.COMPLEX64: [1 + 2j],
        TensorProto.STRING: ["a", "b"],
        TensorProto.FLOAT: [],
    }
    for kind, numbers in values.items():
        model.graph.initializer.append(helper.make_tensor(f"kind{kind}", kind, [len(numbers)], numbers))
    check_well_formed(model)


@pytest.mark.parametrize("calls", [1, 2])
def test_functions_that_grow_beyond_measure_are_refused_before_they_are_written_out(calls: int) -> None:
    """Sixty that call the next one twice are 10^18 nodes; as many that call it once are sixty."""
    model = mlp()
    for level in range(60):
        after, domain = (f"f{level + 1}", "d") if level < 59 else ("Relu", "")
        nodes = [helper.make_node(after, [f"v{i}"], [f"v{i + 1}"], domain=domain) for i in range(calls)]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
        model.functions.append(helper.make_function("d", f"f{level}", ["v0"], [f"v{calls}"], nodes, imports))
    model.graph.node.append(helper.make_node("f0", [model.graph.output[0].name], ["called"], domain="d"))
    if calls == 1:
        check_well_formed(model)
    else:
        with pytest.raises(ValueError, match="written out are 1e\\+18 nodes"):
            check_well_formed(model)
