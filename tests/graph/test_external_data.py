"""Weights beside the model: where they may lie, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from ndonnx.errors import ModelError
from ndonnx.graph import load, serialise
from tests.helpers.models import CUSTOM, floats, mlp, run
from tests.helpers.written import external, put_outside, written

# External data


def test_external_data_stay_on_disk_and_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path)
    monkeypatch.chdir("/")
    model = load(path)
    tensor = model.graph.initializers["h1.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), numpy_helper.to_array(mlp().graph.initializer[0]))


@pytest.mark.parametrize("location", ["/etc/hostname", "../w.bin", "a/../../w.bin", "link.bin", "folder/w.bin"])
def test_external_data_may_not_leave_the_folder(tmp_path: Path, location: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = external(inside, location)
    (tmp_path / "w.bin").write_bytes((inside / "w.bin").read_bytes())
    (inside / "link.bin").symlink_to(tmp_path / "w.bin")
    (inside / "folder").symlink_to(tmp_path)
    with pytest.raises(ModelError, match=r"'h1.weight' keeps its data in '.*', outside the model's folder"):
        load(path)


def test_external_data_may_be_a_link_or_a_folder_inside(tmp_path: Path) -> None:
    path = external(tmp_path, "sub/link.bin")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.bin").symlink_to(tmp_path / "w.bin")
    assert load(path).graph.initializers["h1.weight"].const_value is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"write": False}, "needs the missing file 'w.bin'"),
        ({"location": ""}, "needs the missing file ''"),
        ({"location": "."}, r"needs the missing file '\.'"),
        ({"cut": 1}, r"needs 640 bytes of 'w\.bin', which has 639"),
        ({"offset": 8}, r"needs 648 bytes of 'w\.bin', which has 640"),
        ({"location": "w\0.bin"}, "names no usable file"),
        ({"location": "w" * 5000}, "names no usable file"),
        ({"offset": -8}, "malformed"),
        ({"offset": "many"}, "malformed"),
    ],
)
def test_external_data_that_are_not_there_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(external(tmp_path, **options))  # type: ignore[arg-type]


def external_constant(folder: Path, location: str) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), "inner")
    put_outside(tensor, folder, location)
    return helper.make_node("Constant", [], ["c"], value=tensor)


@pytest.mark.parametrize("place", ["node", "function", "branch"])
def test_external_data_are_checked_wherever_they_hang(tmp_path: Path, place: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    add = helper.make_node("Add", ["x", "c"], ["y"])
    for location in ("../w.bin", "w.bin"):
        constant = external_constant(inside, location)
        nodes, functions = [constant, add], []
        if place == "function":
            opsets = [helper.make_opsetid("", 18)]
            functions = [helper.make_function(CUSTOM, "F", ["x"], ["y"], nodes, opsets)]
            nodes = [helper.make_node("F", ["x"], ["y"], domain=CUSTOM)]
        elif place == "branch":
            branch = helper.make_graph(nodes, "branch", [], [floats("y", 4)])
            yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
            nodes = [yes, helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)]
            branch.output[0].name = branch.node[1].output[0] = "z"
            nodes[1] = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
        path = written(inside / "m.onnx", nodes, functions=functions)
        (tmp_path / "w.bin").write_bytes((inside / "w.bin").read_bytes())
        if location == "../w.bin":
            with pytest.raises(ModelError, match="outside the model's folder"):
                load(path)
        else:
            answer = run(onnx.load_from_string(serialise(load(path))), {"x": np.ones(4, np.float32)})
            np.testing.assert_array_equal(answer["y"], np.arange(1, 5, dtype=np.float32))
