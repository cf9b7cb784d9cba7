"""Files that are to blame for what falls over them, and loops that have no end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ndonnx import compress, inspect
from ndonnx.api.evaluate import evaluate
from ndonnx.api.models import placed
from ndonnx.errors import ModelError, VerificationError
from ndonnx.graph import fold_constants, load
from ndonnx.runtime import endless
from ndonnx.teacher.sessions import make_session
from tests.helpers.models import Net, floats, inputs_of, mlp


def test_whoever_gives_an_invalid_model_is_told_so_whatever_fell_over_it(tmp_path: Path) -> None:
    """Errors of libraries are the file's where onnxruntime refuses it, and bugs of ours where it does not."""
    onnx.save(mlp(), tmp_path / "good.onnx")
    broken = mlp()
    broken.graph.node[0].op_type = "Conv"
    onnx.save(broken, tmp_path / "bad.onnx")
    with (
        pytest.raises(ModelError, match=r"bad\.onnx: the model is not valid, export it again: ") as caught,
        placed(tmp_path / "bad.onnx"),
    ):
        raise KeyError("of a library")
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError), placed(tmp_path / "good.onnx"):
        raise KeyError("a bug")


def test_a_student_that_fails_is_the_models_fault_where_that_states_what_it_is_not(tmp_path: Path) -> None:
    """onnxruntime opens a model whose output is of another rank than it says, and may refuse what is made of it."""
    model = mlp()
    model.graph.output[0].type.tensor_type.shape.dim.add(dim_value=7)
    onnx.save(model, tmp_path / "m.onnx")
    with (
        pytest.raises(ModelError, match=r"m\.onnx: does not run; and the model is not valid"),
        placed(tmp_path / "m.onnx"),
    ):
        raise VerificationError("does not run")


def test_a_model_that_opens_and_does_not_run_is_told_so(tmp_path: Path) -> None:
    """Some contradictions of weights only show in a run, of which no checker says anything."""
    net = Net(0)
    y = net.conv(net.relu(net.conv(net.input("x", "N", "C", 6, 6), 3, 4, 3, out="first")), 4, 2, 1, out="y")
    onnx.save(net.proto(y), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.zeros((40, 5, 6, 6), np.float32))
    told = r"(m\.onnx|graph 'net'): onnxruntime fail"
    for simplify in (True, False):
        with pytest.raises(ModelError, match=told) as caught:
            compress(tmp_path / "m.onnx", data=str(tmp_path / "d.npz"), steps=1, simplify=simplify)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=told):
        evaluate(tmp_path / "m.onnx", data=str(tmp_path / "d.npz"))
    with pytest.raises(ModelError, match=told):
        inspect(tmp_path / "m.onnx", data=str(tmp_path / "d.npz"))


@pytest.mark.parametrize("start", ["x", "state"])
def test_a_loop_without_an_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setattr(endless, "SECONDS", 0.5)
    onnx.save(round_and_round(start), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"stopped after 0 s|stopped after 1 s"):
        if start == "state":
            fold_constants(model)  # a constant that takes for ever
        make_session(tmp_path / "m.onnx").run(None, {"x": np.ones(4, np.float32)})


def test_a_loop_that_ends_is_run_as_ever(tmp_path: Path) -> None:
    onnx.save(round_and_round("x", rounds=3), tmp_path / "m.onnx")
    (found,) = make_session(tmp_path / "m.onnx").run(None, {"x": np.ones(4, np.float32)})
    assert found.tolist() == [8, 8, 8, 8]


def test_the_letters_of_a_loop_are_none(tmp_path: Path) -> None:
    """A run that takes long is stopped where a `Loop` is, not where a name or a weight has its letters."""
    model = mlp()
    model.graph.node[0].name = "/decoder/Loop_1"
    onnx.save(model, tmp_path / "m.onnx")
    onnx.save(round_and_round("x", rounds=3), tmp_path / "loop.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"Loop" * 5)
    found = [endless.may_be_endless(tmp_path / f"{name}.onnx") for name in ("m", "loop", "broken", "missing")]
    assert found == [False, True, False, False]
    assert endless.may_be_endless(round_and_round("x").SerializeToString())
    assert not endless.may_be_endless(model.SerializeToString())


def round_and_round(start: str, rounds: int = 2**62) -> onnx.ModelProto:
    """A model that doubles a value so many times."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["s", "s"], ["t"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("s", 4),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), floats("t", 4)],
    )
    nodes = [helper.make_node("Loop", ["count", "go_on", start], ["y"], body=body)]
    weights = [
        numpy_helper.from_array(np.array(rounds, np.int64), "count"),
        numpy_helper.from_array(np.array(True), "go_on"),
        numpy_helper.from_array(np.ones(4, np.float32), "state"),
    ]
    graph = helper.make_graph(nodes, "g", [floats("x", 4)], [floats("y", 4)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("name", ["model.onnx", "teacher.onnx"])
def test_a_file_is_looked_at_before_onnxruntime_opens_it(tmp_path: Path, name: str) -> None:
    """It writes functions out as it opens them: of sixty that call the next one twice it makes 10^18 nodes."""
    model = mlp()
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    for level in range(60):
        after, domain = (f"f{level + 1}", "d") if level < 59 else ("Relu", "")
        nodes = [helper.make_node(after, [f"v{i}"], [f"v{i + 1}"], domain=domain) for i in range(2)]
        model.functions.append(helper.make_function("d", f"f{level}", ["v0"], ["v2"], nodes, imports))
    model.opset_import.append(helper.make_opsetid("d", 1))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("f0", ["before"], [model.graph.output[0].name], domain="d"))
    for each in ("model.onnx", "teacher.onnx"):
        onnx.save(model if each == name else mlp(), tmp_path / each)
    np.savez(tmp_path / "d.npz", **inputs_of(mlp(), 8))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=rf"{name}: the graph is malformed: its functions written out are"):
        evaluate(tmp_path / "model.onnx", tmp_path / "d.npz", teacher=tmp_path / "teacher.onnx")
