"""How large a model may be: seconds and peak memory of load, partition and inspect, by number of nodes and by bytes.

    python -m benchmarks.scale [--nodes 1000,3000,10000,30000,100000] [--gigabytes 3] [--out DIR]

Two graphs of each number of nodes: `units`, a chain of residual units that are a neighbourhood each, and `nested`,
blocks of several such units with a long skip around them. And one model whose weights lie in a file beside
it, of a size that one protobuf cannot hold; that file is all holes, so that no disk is measured. Each model is
measured in a process of its own, which is stopped after --time-limit seconds. Memory is what the process held at
most, less what it held after its imports.

--out writes scale.csv (every measurement) and scale.png. Needs matplotlib for --out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ndonnx.config.recipe import Recipe
from ndonnx.graph import fold_constants, load
from ndonnx.partition import partition
from ndonnx.report.inspection import Inspection
from ndonnx.runtime.executor.worker import peak_rss

SHAPES = ("units", "nested")
_NODES = (1_000, 3_000, 10_000, 30_000, 100_000)
_TIME_LIMIT = 600
_WIDTH, _INNER = 8, 16
_UNIT = 5
"""Nodes of a residual unit."""
_INSIDE = 4
"""Units inside a block of `nested`."""
_HIDDEN = 4096
"""Width of the model that is large in bytes; four times that inside its units."""
_ONE = "--one"
"""Hidden flag: measure one file in this process and print JSON."""


@dataclass(frozen=True)
class Scale:
    """What one model took, in seconds and in bytes above what the imports took."""

    shape: str
    nodes: int
    weight_bytes: int
    neighbourhoods: int
    load: float
    fold: float
    partition: float
    inspect: float
    cpu: float
    """Processor time of all stages, which other work on the machine does not lengthen."""
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """All stages together."""
        return self.load + self.fold + self.partition + self.inspect


class _Builder:
    """Nodes and weights of a chain of residual units."""

    def __init__(self, width: int, inner: int) -> None:
        self.width, self.inner = width, inner
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[tuple[str, tuple[int, int]]] = []

    def unit(self, x: str) -> str:
        """Expand, activate, project, add, activate: `_UNIT` nodes."""
        number = len(self.nodes)
        sizes = ((self.width, self.inner), (self.inner, self.width))
        up, down = (self._weight(f"{way}{number}", size) for way, size in zip(("up", "down"), sizes, strict=True))
        hidden, active, back, added, out = (f"{name}{number}" for name in ("hidden", "active", "back", "sum", "unit"))
        self._add("MatMul", [x, up], hidden)
        self._add("Relu", [hidden], active)
        self._add("MatMul", [active, down], back)
        self._add("Add", [back, x], added)
        self._add("Relu", [added], out)
        return out

    def block(self, x: str) -> str:
        """Units with a skip around all of them."""
        y = x
        for _ in range(_INSIDE):
            y = self.unit(y)
        out = f"block{len(self.nodes)}"
        self._add("Add", [y, x], out)
        return out

    def proto(self, last: str, initializers: Sequence[TensorProto]) -> onnx.ModelProto:
        """The model that ends in this value."""
        ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", self.width]) for name in ("x", last))
        start, end = ends
        graph = helper.make_graph(self.nodes, "scale", [start], [end], initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def _weight(self, name: str, shape: tuple[int, int]) -> str:
        self.weights.append((name, shape))
        return name

    def _add(self, operator: str, inputs: Sequence[str], output: str) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{operator}{len(self.nodes)}"))


def many_nodes(shape: str, nodes: int, path: Path) -> None:
    """Write a model of about so many nodes and small weights."""
    rng, builder, x = np.random.default_rng(0), _Builder(_WIDTH, _INNER), "x"
    add, step = (builder.block, _INSIDE * _UNIT + 1) if shape == "nested" else (builder.unit, _UNIT)
    for _ in range(nodes // step):
        x = add(x)
    arrays = [(name, rng.standard_normal(size, dtype=np.float32) / 4) for name, size in builder.weights]
    onnx.save(builder.proto(x, [numpy_helper.from_array(array, name) for name, array in arrays]), path)


def many_bytes(size: int, path: Path, hidden: int = _HIDDEN) -> None:
    """Write a model with at least so many bytes of weights, all in one file of holes beside it."""
    builder, x, at = _Builder(hidden, 4 * hidden), "x", 0
    while at < size:
        x = builder.unit(x)
        at += 2 * 4 * hidden * 4 * hidden
    data = path.with_suffix(".data")
    initializers, offset = [], 0
    for name, shape in builder.weights:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        length = 4 * math.prod(shape)
        for key, value in (("location", data.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        offset += length
        initializers.append(tensor)
    with data.open("wb") as file:
        file.truncate(offset)
    path.write_bytes(builder.proto(x, initializers).SerializeToString())


def measure(shape: str, path: Path) -> Scale:
    """Load, fold, partition and inspect a model here."""
    before, began = peak_rss(), time.process_time()
    seconds: list[float] = []

    def lap() -> None:
        seconds.append(time.perf_counter())

    lap()
    model = load(path)
    lap()
    working = fold_constants(model)
    lap()
    parts = partition(working, granularity=Recipe().granularity)
    lap()
    found = Inspection.of(path.name, parts)
    json.dumps(found.to_json())
    lap()
    loading, folding, partitioning, inspecting = (round(b - a, 3) for a, b in pairwise(seconds))
    tensors = (value.const_value for value in working.graph.initializers.values())
    return Scale(
        shape=shape,
        nodes=sum(1 for _ in working.graph),
        weight_bytes=sum(tensor.nbytes for tensor in tensors if tensor is not None),
        neighbourhoods=len(parts.distillable),
        load=loading,
        fold=folding,
        partition=partitioning,
        inspect=inspecting,
        cpu=round(time.process_time() - began, 3),
        peak_bytes=peak_rss() - before,
    )


def growth(found: Sequence[Scale]) -> list[float | None]:
    """Exponent of the processor time in the nodes, from the size before to each; 1 is linear. None for the first."""
    exponents: list[float | None] = [None] * min(1, len(found))
    for a, b in pairwise(found):
        exponents.append(math.log(b.cpu / a.cpu) / math.log(b.nodes / a.nodes))
    return exponents


def in_process(shape: str, path: Path, limit: int) -> Scale | str:
    """Measure a file in a process of its own; why there is nothing where it fails."""
    command = [sys.executable, "-m", "benchmarks.scale", _ONE, shape, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return f"not done after {limit} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Scale(**json.loads(done.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    options = _parser().parse_args(arguments)
    if options.one is not None:
        print(json.dumps(asdict(measure(options.one[0], Path(options.one[1])))))
        return

    from benchmarks.common import machine, machine_line, write_csv  # noqa: PLC0415 - torch, which no measurement needs

    print(machine_line(machine(Recipe())))
    found: list[Scale] = []
    lost: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
        path = Path(folder) / "model.onnx"
        for shape in options.shapes:
            for nodes in options.nodes:
                many_nodes(shape, nodes, path)
                _take(in_process(shape, path, options.time_limit), f"{shape} of {nodes} nodes", found, lost)
        if options.gigabytes:
            many_bytes(int(options.gigabytes * 1e9), path)
            name = f"{options.gigabytes:g} GB of weights"
            _take(in_process("weights", path, options.time_limit), name, found, lost)
    _print(found)
    print("\n".join(lost), end="\n" if lost else "")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(options.out / "scale.csv", [field.name for field in fields(Scale)], map(astuple, found))
        _plot(options.out / "scale.png", found)


def _take(result: Scale | str, name: str, found: list[Scale], lost: list[str]) -> None:
    if isinstance(result, str):
        lost.append(f"{name}: {result}")
    else:
        found.append(result)
    print(f"{name}: {result if isinstance(result, str) else f'{result.seconds:.1f} s'}", file=sys.stderr, flush=True)


def _print(found: Sequence[Scale]) -> None:
    columns = (
        "graph", "nodes", "weights MB", "pieces", "load s", "fold s", "partition s", "inspect s", "all s", "cpu s",
        "exponent", "peak MB",
    )  # fmt: skip
    rows = []
    for shape in dict.fromkeys(scale.shape for scale in found):
        own = [scale for scale in found if scale.shape == shape]
        for scale, exponent in zip(own, growth(own), strict=True):
            stages = (scale.load, scale.fold, scale.partition, scale.inspect, scale.seconds, scale.cpu)
            rows.append(
                (
                    shape,
                    f"{scale.nodes:,}",
                    f"{scale.weight_bytes / 1e6:,.1f}",
                    f"{scale.neighbourhoods:,}",
                    *(f"{seconds:.2f}" for seconds in stages),
                    "-" if exponent is None else f"{exponent:.2f}",
                    f"{scale.peak_bytes / 1e6:,.0f}",
                )
            )

    from benchmarks.common import print_table  # noqa: PLC0415 - as above

    print_table("Load, partition and inspect", columns, rows)


def _plot(path: Path, found: Sequence[Scale]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - needed for --out only
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for shape in dict.fromkeys(scale.shape for scale in found):
        own = [scale for scale in found if scale.shape == shape]
        label = f"{shape} ({own[0].weight_bytes / 1e9:.1f} GB)" if shape not in SHAPES else shape
        axes.plot([s.nodes for s in own], [s.seconds for s in own], marker="o", markersize=3, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("nodes")
    axes.set_ylabel("seconds to load, partition and inspect")
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _sizes(text: str) -> list[int]:
    sizes = sorted(int(part) for part in text.split(","))
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"{sizes[0]}: expected at least 1")
    return sizes


def _shapes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(SHAPES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=_sizes, default=list(_NODES), metavar="N,N", help="sizes of the graphs")
    parser.add_argument("--shapes", type=_shapes, default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--gigabytes", type=float, default=3.0, metavar="GB", help="of the large model; 0 for none")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write scale.csv and scale.png")
    parser.add_argument(
        "--time-limit", type=int, default=_TIME_LIMIT, metavar="S", help="seconds for each model (default: 600)"
    )
    parser.add_argument(_ONE, nargs=2, metavar=("SHAPE", "FILE"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
