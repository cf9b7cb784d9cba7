"""Hardening: what noise goes where, that the hardened model tolerates it better, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import ndonnx
from ndonnx.config.recipe import DataRecipe
from ndonnx.data import input_specs, open_source
from ndonnx.distill.finetune import finetune
from ndonnx.distill.noisy_body import NoisyBody, measure_noises
from ndonnx.distill.plan import Plan
from ndonnx.distill.whole import WholeSettings, tasks_from
from ndonnx.errors import SliceError, UsageError
from ndonnx.graph import fold_constants, load
from ndonnx.partition import Partition, partition
from ndonnx.teacher import capture, make_session
from ndonnx.teacher.noise_inputs import Noise, add_noise_inputs
from ndonnx_cli.main import main
from tests.helpers.models import Array, Net, inputs_of, residual_cnn, run
from tests.helpers.training import silent

SAMPLES = 160
RECIPE = ndonnx.Recipe(executor="serial", precision="fp32", batch_size=16, holdout=0.2, temperature=1.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def written(folder: Path, model: onnx.ModelProto, samples: int = SAMPLES, **further: Array) -> tuple[Path, str]:
    """The model and its data as files."""
    onnx.save(model, folder / "teacher.onnx")
    np.savez(folder / "data.npz", **inputs_of(model, samples), **further)
    return folder / "teacher.onnx", str(folder / "data.npz")


def noises_of(path: Path, data: str, amount: float) -> tuple[Partition, tuple[Noise, ...]]:
    parts = partition(fold_constants(load(path)))
    source = open_source(data, input_specs(make_session(path)), DataRecipe())
    return parts, measure_noises(parts, source, amount)


def error_under_noise(model: ir.Model, noises: tuple[Noise, ...], feeds: dict[str, Array], expected: Array) -> float:
    """Mean squared error of the output with noise on the exits, by onnxruntime."""
    noisy = add_noise_inputs(fold_constants(model.clone()), noises)
    rng = np.random.default_rng(5)
    count = len(expected)
    drawn = {n.input: rng.normal(0, n.std, (count, *n.shape)).astype(np.float32) for n in noises}
    name = noisy.graph.outputs[0].name
    return float(np.square(run(noisy, feeds | drawn)[name or ""] - expected).mean())


def interface(model: onnx.ModelProto) -> object:
    graph = model.graph
    nodes = [(n.op_type, n.name, list(n.input), list(n.output)) for n in graph.node]
    weights = sorted((w.name, list(w.dims), w.data_type) for w in graph.initializer)
    outer = [v.SerializeToString() for v in (*graph.input, *graph.output)]
    return nodes, weights, outer, [(o.domain, o.version) for o in model.opset_import], model.ir_version


def test_the_hardened_model_bears_noise_better_and_keeps_its_interface(tmp_path: Path) -> None:
    model = residual_cnn(norm=True)
    path, data = written(tmp_path, model)
    before = path.read_bytes()
    output = tmp_path / "hardened.onnx"
    result = ndonnx.harden(path, data=data, noise=1.0, steps=60, output=output, recipe=RECIPE)
    parts, noises = noises_of(path, data, 1.0)
    assert result.report.values == tuple(n.value for n in noises) and len(noises) == len(parts.distillable)
    fresh = inputs_of(model, 200, seed=9)
    clean = run(model, fresh)["logits"]
    theirs, ours = (error_under_noise(load(p), noises, fresh, clean) for p in (path, output))
    assert ours < 0.8 * theirs
    assert result.report.loss < result.report.loss_start and result.report.steps == 60
    hardened = onnx.load(output)
    assert interface(hardened) == interface(onnx.load(path))
    assert path.read_bytes() == before
    assert result.report.metrics["teacher"].samples == SAMPLES // 10, "rows that nothing was trained on"


def test_without_noise_and_steps_nothing_changes(tmp_path: Path) -> None:
    model = residual_cnn()
    path, data = written(tmp_path, model, 80)
    output = tmp_path / "hardened.onnx"
    report = ndonnx.harden(path, data=data, noise=0.0, steps=0, output=output, recipe=RECIPE).report
    fresh = inputs_of(model, 7, seed=3)
    assert np.array_equal(run(onnx.load(output), fresh)["logits"], run(model, fresh)["logits"])
    weights = [{w.name: w.raw_data for w in onnx.load(p).graph.initializer} for p in (path, output)]
    assert weights[0] == weights[1]
    # Captured answers are rounded to half precision; nothing else stands between the model and itself.
    assert report.nmse == report.nmse_start < 1e-4
    assert report.metrics["hardened"].max_error == 0


def test_noise_is_in_proportion_to_the_activation_and_leaves_the_output_alone(tmp_path: Path) -> None:
    model = residual_cnn(2)
    path, data = written(tmp_path, model, 100)
    parts, noises = noises_of(path, data, 0.25)
    exits = [n.exit.name for n in parts.distillable if n.exit is not None]
    assert [n.value for n in noises] == exits and "logits" not in exits
    opened = load(path)
    values = ir.convenience.create_value_mapping(opened.graph)
    opened.graph.outputs.extend(values[name or ""] for name in exits)
    found = run(opened, inputs_of(model, 100))
    for noise in noises:
        assert noise.shape == found[noise.value].shape[1:]
        assert noise.std == pytest.approx(0.25 * found[noise.value].std(), rel=1e-5)


def test_every_reader_gets_the_noise(tmp_path: Path) -> None:
    """A unit's exit is read by the next unit's convolution and by its sum: both see the same noise."""
    model = residual_cnn(2)
    path, _ = written(tmp_path, model, 4)
    shape = (8, 8, 8)
    noisy = add_noise_inputs(fold_constants(load(path)), [Noise("unit1", shape, 1.0)])
    rng = np.random.default_rng(0)
    feeds = inputs_of(model, 4)
    drawn = rng.standard_normal((4, *shape)).astype(np.float32)
    opened = load(path)
    values = ir.convenience.create_value_mapping(opened.graph)
    opened.graph.outputs.append(values["unit1"])
    behind = ir.Model(
        ir.convenience.extract(fold_constants(load(path)).graph, ["unit1"], ["logits"]), ir_version=model.ir_version
    )
    expected = run(behind, {"unit1": run(opened, feeds)["unit1"] + drawn})["logits"]
    np.testing.assert_allclose(run(noisy, feeds | {"unit1/noise": drawn})["logits"], expected, rtol=1e-4, atol=1e-5)
    assert "unit1/noise" not in [value.name for value in load(path).graph.inputs]


class _Sum(torch.nn.Module):
    def forward(self, x: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x + noise) * weight


def test_noise_is_new_in_training_and_the_same_where_states_are_compared() -> None:
    body = NoisyBody(_Sum(), 1, [Noise("v", (500,), 2.0)], seed=3)
    x, weight = torch.zeros(64, 500), torch.ones((), requires_grad=True)
    first, second = body(x, weight), body(x, weight)
    assert not torch.equal(first, second)
    assert float(first.detach().std()) == pytest.approx(2.0, rel=0.05)
    with torch.no_grad():
        assert torch.equal(body(x, weight), body(x, weight))
        body.quiet = True
        assert not body(x, weight).any()


def test_labels_pull_the_model_their_way(tmp_path: Path) -> None:
    model = residual_cnn()
    path, data = written(tmp_path, model, label=np.full(SAMPLES, 3))
    recipe = RECIPE.model_copy(update={"label_weight": 1.0, "finetune_lr": 0.1})
    hardened = ndonnx.harden(path, data=data, steps=30, recipe=recipe).model
    assert (run(hardened, inputs_of(model, 50, seed=9))["logits"].argmax(1) == 3).mean() > 0.9


def _ones(rows: Array) -> Iterator[dict[str, Array]]:
    """One sample at a time."""
    for row in rows:
        yield {"x": row[None]}


def test_a_fixed_batch_of_one_is_trained_on_all_the_same(tmp_path: Path) -> None:
    model = residual_cnn(2)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "teacher.onnx")
    rows = np.random.default_rng(0).standard_normal((60, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=rows)
    result = ndonnx.harden(
        tmp_path / "teacher.onnx", data=str(tmp_path / "data.npz"), noise=1.0, steps=10, recipe=RECIPE
    )
    assert result.report.loss < result.report.loss_start
    assert result.model.graph.inputs[0].shape == ir.Shape([1, 3, 8, 8])
    store = capture(
        load(tmp_path / "teacher.onnx"), ["x", "logits"], lambda: _ones(rows), tmp_path / "store", samples=60
    )
    plan = Plan(steps=2, batch_size=16, lr=0.01, warmup=0.05, seed=0)
    tasks = tasks_from(store, ["logits"], labelled=False, told=())
    settings = WholeSettings(plan, temperature=1.0, label_weight=0.0, holdout=0.2, parity=1e-4, tasks=tasks)
    _, training = finetune(result.model, store, settings, silent)
    assert training.steps == 2


def test_old_files_whose_weights_are_inputs_are_trained_too(tmp_path: Path) -> None:
    path, data = written(tmp_path, residual_cnn(2, ir_version=3, opset=9), 48)
    result = ndonnx.harden(path, data=data, noise=1.0, steps=10, recipe=RECIPE)
    assert len(result.model.graph.inputs) == len(load(path).graph.inputs) > 1
    recipe = RECIPE.model_copy(update={"steps": 1, "finetune_steps": 2})
    report = ndonnx.compress(path, data=data, recipe=recipe, run_dir=tmp_path / "run").report
    assert report.finetune is not None and report.finetune.reason is None and report.finetune.steps == 2


def custom_tail() -> onnx.ModelProto:
    """A net whose whole does not convert: random numbers at its end."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="a")
    x = net.relu(net.conv(net.relu(net.conv(x, 8, 8)), 8, 8), out="b")
    flat = net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 8, 4)
    net.op("Bernoulli", net.op("Sigmoid", flat), out="y", dtype=1)
    return net.proto("y")


def test_what_cannot_be_hardened_says_so_in_one_line(tmp_path: Path) -> None:
    path, data = written(tmp_path, custom_tail(), 32)
    output = tmp_path / "hardened.onnx"
    with pytest.raises(UsageError, match=r"teacher.onnx: cannot be hardened: .*Bernoulli"):
        ndonnx.harden(path, data=data, steps=1, output=output, recipe=RECIPE)
    net = Net()
    net.gemm(net.input("x", "N", 6), 6, 4, out="y")
    path, data = written(tmp_path, net.proto("y"), 32)
    with pytest.raises(UsageError, match="no neighbourhood ends inside"):
        ndonnx.harden(path, data=data, output=output, recipe=RECIPE)
    net = Net()
    net.relu(net.gemm(net.input("x", "N", 6), 6, 4, out="a"), out="b")
    path, data = written(tmp_path, net.proto("a", "b"), 32)
    with pytest.raises(UsageError, match="has 2 outputs"):
        ndonnx.harden(path, data=data, output=output, recipe=RECIPE)
    assert not output.exists()


def test_a_training_that_breaks_down_leaves_no_file(tmp_path: Path) -> None:
    path, data = written(tmp_path, residual_cnn(2), 64)
    output = tmp_path / "hardened.onnx"
    recipe = RECIPE.model_copy(update={"finetune_lr": 1e30})
    with pytest.raises(UsageError, match=r"cannot be hardened: the loss became .*lower --lr"):
        ndonnx.harden(path, data=data, steps=20, output=output, recipe=recipe)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "teacher.onnx"]


def test_activations_that_overflow_are_named(tmp_path: Path) -> None:
    path, data = written(tmp_path, residual_cnn(2), 8)
    np.savez(data, x=np.full((8, 3, 8, 8), 3e38, np.float32))
    with pytest.raises(SliceError, match="'unit1' holds NaN or Inf"):
        noises_of(path, data, 1.0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    path, data = written(tmp_path, residual_cnn(2), 64, label=np.arange(64) % 5)
    common = [str(path), "--data", data, "--executor", "serial", "-q"]
    code = main(["harden", *common, "--steps", "3", "--noise", "0.5", "--batch-size", "16"])
    printed = capsys.readouterr().out
    assert code == 0 and (tmp_path / "teacher-hardened.onnx").is_file()
    assert "noise of 0.5" in printed and "3 steps" in printed and "accuracy" in printed
    assert main(["harden", *common, "--steps", "0", "-o", "o.onnx", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["noise"] == ndonnx.harden.__kwdefaults__["noise"] == 0.3
    assert document["steps"] == 0 and document["output"] == "o.onnx"
    assert set(document["metrics"]) == {"teacher", "hardened"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data", "none.npz"], "none.npz: no such file"),
        (["--data", "data.npz", "--noise", "-1"], "--noise -1: expected a number from 0"),
        (["--data", "data.npz", "--steps", "-1"], "--steps -1: expected at least 0"),
        (["--data", "data.npz", "-o", "teacher.onnx"], "is the teacher itself"),
        (["--data", "data.npz", "-o", "nowhere/o.onnx"], "nowhere/o.onnx: cannot write there"),
        (["--data", "data.npz", "--freeze", "nosuch"], "nosuch"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, residual_cnn(2), 8)
    assert main(["harden", "teacher.onnx", "-q", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "teacher.onnx"]


@pytest.mark.parametrize(("task", "told"), [("nobody:loss", "cannot import 'nobody'"), ("box=regression", "no output")])
def test_a_task_that_is_not_there_is_told_before_anything_is_trained(tmp_path: Path, task: str, told: str) -> None:
    path, data = written(tmp_path, residual_cnn())
    with pytest.raises(ndonnx.UsageError, match=told):
        ndonnx.harden(path, data=data, steps=1, recipe=RECIPE.model_copy(update={"task": (task,)}))
