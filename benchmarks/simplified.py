"""Exact simplification alone: nodes, latency and largest difference of a model before and after it.

    python -m benchmarks.simplified MODEL --data SRC [--recipe FILE] [--rounds N] [--out FILE]
    python -m benchmarks.simplified --demo

Both are run in turn, one thread, one sample; the ratio is the median of the ratios of neighbouring
rounds, with its interval. The difference is that of the outputs of eight samples, over each output's largest value.
The floor of the ratio is what the folded operators took: nothing is added. --out writes it as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks import common
from ndonnx.data import DataSource
from ndonnx.graph import load
from ndonnx.graph.passes.simplification.simplify import nodes_in, simplify
from ndonnx.metrics.latency import benchmark, ratio
from ndonnx.teacher import make_session
from ndonnx.teacher.batches import whole_batches

_SAMPLES = 8
_ROUNDS = 40


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one model."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--rounds", type=common.positive, default=_ROUNDS, metavar="N", help="timed runs of each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what was found as JSON")
    options = parser.parse_args(arguments)
    subject = common.subject_of(options, judged=False)
    source, before = subject.open(subject.data), load(subject.model)
    after = simplify(before)
    one = next(whole_batches(source, 1, samples=1))
    timed = benchmark({"before": subject.model, "after": after}, one, rounds=options.rounds, threads=1)
    found = ratio(timed["after"], timed["before"])
    document: dict[str, Any] = {
        "machine": common.machine(subject.recipe),
        "model": str(subject.model),
        "nodes": [nodes_in(before), nodes_in(after)],
        "ratio": [found.median, found.low, found.high],
        "difference": _difference(subject.model, after, source),
    }
    print(common.machine_line(document["machine"]))
    told = f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})"
    nodes = f"{document['nodes'][0]} to {document['nodes'][1]}"
    row = (subject.model.name, nodes, told, f"{document['difference']:.2g}")
    common.print_table("Simplification", ("model", "nodes", "time after / before", "largest difference"), [row])
    if options.out:
        common.write_json(options.out, document)


def _difference(before: Path, after: ir.Model, source: DataSource) -> float:
    """Largest difference of an output, over its largest value."""
    feeds = dict(next(whole_batches(source, _SAMPLES, samples=_SAMPLES)))
    theirs, ours = (make_session(model, threads=1).run(None, feeds) for model in (before, after))
    return max(
        float(np.abs(one - other).max(initial=0.0) / (np.abs(one).max(initial=0.0) or 1.0))
        for one, other in zip(theirs, ours, strict=True)
    )


if __name__ == "__main__":
    common.run(main)
