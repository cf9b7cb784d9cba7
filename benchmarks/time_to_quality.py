"""Time to quality: neighbourhood distillation (ND) against end-to-end distillation (KD) of the same student.

    python -m benchmarks.time_to_quality MODEL --data SRC --eval SRC [--recipe FILE] [--out DIR]
    python -m benchmarks.time_to_quality --demo

What is compared. One student architecture (the recipe's, at --keep), images of one source, no labels, the same
machine, threads, device and precision, in one process; the runs of both methods take turns. KD has --samples of the
images, as they are; ND draws as many as its budget has time for, and may change copies of them, as it does by itself.

ND: `ndonnx.compress` as it is by default (fine-tuning on the teacher's answers included), once for each time budget
of --nd-seconds, or for each number of steps of --nd-steps, every time from nothing in a fresh run directory. Its
seconds are the wall time of the whole call (load, capture, distil with its worker processes, fine-tune, splice,
checks), less the stage that evaluates.

KD: the whole student is trained in torch on KL(teacher || student) of logits softened at temperature 4, times 16.
Adam with linear warm-up, then a cosine to zero at the end of the budget; batches as ND reads them, from a memory map.
Three baselines:
  random         He-random weights in the student slices. What the partition keeps (a stem, a head) keeps the
                 teacher's weights. A BatchNorm stays at the teacher's statistics, a folded one is not put back:
                 a student with BatchNorm of its own would learn faster from scratch.
  teacher        the teacher's weights with the unimportant channels cut out
  least-squares  the same, refitted to the teacher's activations in closed form (ND's default start)
KD's seconds are one sweep of onnxruntime that stores images and teacher's logits (measured once, charged to each
baseline), the making of the start (not charged to `random`, which needs no data for it), the conversion to torch,
and the training, for --kd-seconds. The learning rate is chosen for each baseline by short trainings, judged by
their loss on held-out training images; this is not charged. ND's learning rate is the recipe's, not searched for.

Quality is top-1 accuracy on the evaluation data, or agreement with the teacher where there are no labels. All models
are judged by onnxruntime with weights written back to ONNX; the clock stands still meanwhile.

Before the end of its budget a KD run has not annealed its learning rate, and its checkpoints are worse than those of
a shorter run. Give several budgets (--kd-seconds 30,60,120) to have each trained on its own; a baseline's time to a
quality is then the shortest over its runs. Times between two measured points are interpolated linearly, for ND
between two runs; `>` stands before a time or a speed-up where the quality was never reached.

--out writes curve.csv (every point), curve.png and table.json (all that is printed, and the settings).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import ndonnx
from benchmarks import common
from benchmarks.common import Notes, Stopwatch, Subject
from benchmarks.end_to_end import EndToEnd, Images, starting_student
from benchmarks.time_to_quality_plot import Point, plot
from ndonnx.teacher import make_session

BASELINES = ("random", "teacher", "least-squares")
FULL_SECONDS, DEMO_SECONDS = 600.0, 20.0
"""KD's budget unless --kd-seconds says otherwise."""
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SWEEP_PART = 0.1
"""Part of the longest KD budget that each trial of a learning rate takes, unless --sweep-seconds says otherwise."""
FIRST_CHECKPOINT = 0.02
"""Part of a KD budget at which its first checkpoint lies."""
SHORTFALLS = (0.05, 0.02, 0.01, 0.005)
"""How far below the teacher the qualities of the table lie, unless --levels says otherwise."""
_CURVE = ("method", "budget", "seconds", "steps", "accuracy", "agreement")


@dataclass(frozen=True)
class Reach:
    """The seconds to a quality, or those that were not enough."""

    seconds: float
    reached: bool

    def __str__(self) -> str:
        return f"{'' if self.reached else '> '}{self.seconds:.1f} s"


@dataclass(frozen=True)
class Baseline:
    """How a KD baseline was set up."""

    lr: float
    sweep: dict[str, float]
    """Held-out loss by learning rate; empty where the rate was given."""
    setup_seconds: float
    """Charged before the first step."""


class Judge:
    """Accuracy and agreement of models on the evaluation data, by onnxruntime."""

    def __init__(self, subject: Subject, spec: str, folder: Path) -> None:
        self._images = Images(subject, spec, folder, None)
        self._teacher = np.asarray(self._images.store.array(self._images.logits)).argmax(axis=1)

    @property
    def teacher(self) -> float:
        """The teacher's own quality."""
        labels = self._images.labels
        return 1.0 if labels is None else float(np.mean(self._teacher == labels))

    def score(self, model: ir.Model) -> tuple[float | None, float]:
        """Accuracy (None without labels) and agreement with the teacher."""
        images = self._images
        session = make_session(model)
        answers = [session.run([images.logits], feeds)[0] for feeds in images.feeds(0, images.store.samples)]
        logits = np.concatenate(answers)
        # A broken model's NaN would count as class 0.
        top = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
        accuracy = None if images.labels is None else float(np.mean(top == images.labels))
        return accuracy, float(np.mean(top == self._teacher))


@dataclass
class Comparison:
    """All runs of both methods on one subject."""

    subject: Subject
    judge: Judge
    folder: Path
    options: argparse.Namespace
    points: list[Point] = field(default_factory=list)
    baselines: dict[str, Baseline] = field(default_factory=dict)

    def run(self) -> None:
        """Every run of both methods, taking turns, so that a drift of the machine falls on both."""
        clock = Stopwatch()
        data = Images(self.subject, self.subject.data, self.folder / "images", self.subject.recipe.samples)
        sweep_seconds = clock.seconds
        budgets: list[dict[str, Any]] = [{"steps": steps} for steps in self.options.nd_steps]
        if self.options.nd_seconds:
            budgets = [{"time_budget": seconds} for seconds in self.options.nd_seconds]
        nd = [self._nd(budget) for budget in budgets]
        kd = [self._kd(init, data, sweep_seconds) for init in self.options.baselines]
        for turn in chain.from_iterable(zip_longest(nd, kd)):
            if turn is not None:
                turn()

    def _nd(self, budget: dict[str, Any]) -> Callable[[], None]:
        def turn() -> None:
            recipe = self.subject.recipe.model_copy(update=budget)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                clock = Stopwatch()
                result = ndonnx.compress(
                    self.subject.model,
                    data=self.subject.data,
                    recipe=recipe,
                    output=Path(scratch, "student.onnx"),
                    run_dir=Path(scratch, "run"),
                    progress=Notes(),
                )
                seconds = clock.seconds - result.report.seconds.evaluate
                steps = sum(n.steps for n in result.report.neighbourhoods)
                tuned = result.report.finetune.steps if result.report.finetune is not None else 0
                name = " ".join(f"{key} {value:g}" for key, value in budget.items())
                self._add("ND", name, seconds, steps + tuned, result.student.model)

        return turn

    def _kd(self, init: str, data: Images, sweep_seconds: float) -> Callable[[], None]:
        def turn() -> None:
            recipe = common.with_init(self.subject.recipe, init)
            clock = Stopwatch()
            student = starting_student(self.subject, recipe, data, self.folder / f"start-{init}")
            # Random weights need no data: only the other starts are paid for.
            making = 0.0 if init == "random" else clock.seconds
            clock = Stopwatch(sweep_seconds + making)
            samples = data.training(recipe.holdout)
            kd = EndToEnd(student, samples, data.logits, recipe, self._batch(data))
            setup = clock.seconds
            sweep = {} if self.options.kd_lr else kd.sweep(LEARNING_RATES, self._sweep_seconds())
            rate = self.options.kd_lr or min(sweep, key=sweep.__getitem__)
            self.baselines[init] = Baseline(rate, {f"{lr:g}": loss for lr, loss in sweep.items()}, setup)
            Notes().note(f"KD {init}: learning rate {rate:g}, {setup:.1f} s to set up")
            for number, budget in enumerate(self.options.kd_seconds):
                self._train(kd, f"KD {init}", rate, budget, setup, with_start=number == 0)

        return turn

    def _train(self, kd: EndToEnd, method: str, rate: float, budget: float, setup: float, *, with_start: bool) -> None:
        spread = np.geomspace(FIRST_CHECKPOINT * budget, budget, self.options.checkpoints)
        stops = [float(stop) for stop in ([0.0] if with_start else []) + spread.tolist()]
        clock = Stopwatch(setup)

        def visit(steps: int) -> None:
            self._add(method, f"{budget:g} s", clock.seconds, steps, kd.model())

        kd.train(rate, budget, clock, stops, visit)

    def _add(self, method: str, budget: str, seconds: float, steps: int, model: ir.Model) -> None:
        accuracy, agreement = self.judge.score(model)
        point = Point(method, budget, seconds, steps, accuracy, agreement)
        self.points.append(point)
        Notes().note(f"{method}, {steps} steps, {seconds:.1f} s: {common.percent(point.quality)}")

    def _batch(self, data: Images) -> int:
        fixed = make_session(self.subject.model).get_inputs()[0].shape[0]
        return fixed if isinstance(fixed, int) else int(self.options.kd_batch_size)

    def _sweep_seconds(self) -> float:
        return float(self.options.sweep_seconds or SWEEP_PART * max(self.options.kd_seconds))


def envelope(points: Sequence[Point], method: str) -> list[tuple[float, float]]:
    """Seconds and best quality so far of a method, over all of its runs; quality rises strictly."""
    rising: list[tuple[float, float]] = []
    for point in sorted((p for p in points if p.method == method), key=lambda p: p.seconds):
        if not rising or point.quality > rising[-1][1]:
            rising.append((point.seconds, point.quality))
    return rising


def time_to(level: float, points: Sequence[Point], method: str) -> Reach:
    """Seconds until a method reaches a quality, interpolated between its points; its first point is its earliest."""
    rising = envelope(points, method)
    for index, (seconds, quality) in enumerate(rising):
        if quality >= level:
            if index == 0:
                return Reach(seconds, True)
            before, lower = rising[index - 1]
            return Reach(before + (seconds - before) * (level - lower) / (quality - lower), True)
    return Reach(max(point.seconds for point in points if point.method == method), False)


def speed_up(nd: Reach, kd: Reach) -> str:
    """How many times faster ND is; a bound where one of them never got there, nothing where neither did."""
    if not nd.reached and not kd.reached:
        return "-"
    bound = "" if nd.reached and kd.reached else ("> " if nd.reached else "< ")
    return f"{bound}{kd.seconds / nd.seconds:.2f}x"


def levels_table(points: Sequence[Point], levels: Sequence[float]) -> list[dict[str, Any]]:
    """For each quality: every method's time to it, and ND's speed-up over each baseline."""
    baselines = [m for m in dict.fromkeys(point.method for point in points) if m != "ND"]
    rows = []
    for level in levels:
        nd = time_to(level, points, "ND")
        reached = {method: time_to(level, points, method) for method in baselines}
        rows.append(
            {
                "level": level,
                "ND": str(nd),
                **{method: str(reach) for method, reach in reached.items()},
                **{f"ND over {method}": speed_up(nd, reach) for method, reach in reached.items()},
            }
        )
    return rows


def default_levels(points: Sequence[Point], teacher: float) -> list[float]:
    """Qualities a little below the teacher's, and those that ND's runs reached."""
    own = {point.quality for point in points if point.method == "ND"}
    return sorted({teacher - shortfall for shortfall in SHORTFALLS if teacher > shortfall} | own)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the files."""
    options = _parser().parse_args(arguments)
    subject = common.subject_of(options, judged=True, keep=options.keep, samples=options.samples)
    assert subject.judge is not None
    options.kd_seconds = options.kd_seconds or ([DEMO_SECONDS] if options.demo else [FULL_SECONDS])
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    machine = common.machine(subject.recipe)
    print(common.machine_line(machine), flush=True)
    with tempfile.TemporaryDirectory(prefix="ndonnx-", dir=options.work) as folder:
        judge = Judge(subject, subject.judge, Path(folder, "judge"))
        comparison = Comparison(subject, judge, Path(folder), options)
        comparison.run()
    points = sorted(
        comparison.points, key=lambda p: (p.method != "ND", p.method, p.budget * (p.method != "ND"), p.steps)
    )
    levels = [level / 100 for level in options.levels] or default_levels(points, judge.teacher)
    table = levels_table(points, levels)
    _print(judge.teacher, points, table, comparison.baselines)
    if options.out is not None:
        common.write_csv(options.out / "curve.csv", _CURVE, [tuple(asdict(point).values()) for point in points])
        plot(options.out / "curve.png", points, judge.teacher)
        common.write_json(
            options.out / "table.json",
            {
                "machine": machine,
                "model": subject.model.name,
                "recipe": subject.recipe.model_dump(mode="json"),
                "kd_batch_size": options.kd_batch_size,
                "teacher": judge.teacher,
                "baselines": {init: asdict(baseline) for init, baseline in comparison.baselines.items()},
                "points": [asdict(point) for point in points],
                "levels": table,
            },
        )


def _parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--keep", type=float, help="part of the inner channels that students keep (default: the recipe's, 0.5)")
    add("--samples", type=common.positive, help="training images (default: the recipe's, 20000)")
    add("--nd-seconds", type=_numbers, metavar="S,S", help="ND's time budgets (`--time-budget`), instead of steps")
    add("--nd-steps", type=_whole_numbers, default=[0, 100, 300, 1000, 3000], metavar="N,N", help="ND's budgets")
    add("--kd-seconds", type=_numbers, metavar="S,S", help="training time of each KD run (default: 600; demo: 20)")
    add("--kd-lr", type=float, help="KD's learning rate, for all baselines (default: chosen by a sweep)")
    add("--kd-batch-size", type=common.positive, default=128, help="images of a KD step (default: %(default)s)")
    add("--sweep-seconds", type=float, help="length of each trial of the sweep (default: a tenth of --kd-seconds)")
    add("--checkpoints", type=common.positive, default=10, help="models judged in a KD run (default: %(default)s)")
    add("--baselines", type=_baselines, default=BASELINES, metavar="INIT,INIT", help=f"of {', '.join(BASELINES)}")
    add("--levels", type=_numbers, default=[], metavar="P,P", help="qualities in percent (default: near the teacher's)")
    add("--out", type=Path, metavar="DIR", help="where curve.csv, curve.png and table.json go")
    add("--work", type=Path, metavar="DIR", help="where scratch files go (default: the system's temporary folder)")
    return parser


def _numbers(text: str) -> list[float]:
    numbers = [float(part) for part in text.split(",")]
    if not all(number > 0 and math.isfinite(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: expected numbers above 0")
    return numbers


def _whole_numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers from 0")
    return numbers


def _baselines(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BASELINES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(BASELINES)}")
    return names


def _print(
    teacher: float,
    points: Sequence[Point],
    table: Sequence[dict[str, Any]],
    baselines: dict[str, Baseline],
) -> None:
    print(f"teacher: {common.percent(teacher)}\n")
    rows = [
        (p.method, p.budget, f"{p.seconds:.1f}", str(p.steps), common.percent(p.accuracy), common.percent(p.agreement))
        for p in points
    ]
    common.print_table("Models by method", _CURVE, rows)
    rates = [
        (init, f"{b.lr:g}", f"{b.setup_seconds:.1f}", "  ".join(f"{lr}: {loss:.4g}" for lr, loss in b.sweep.items()))
        for init, b in baselines.items()
    ]
    common.print_table(
        "KD learning rates", ("baseline", "learning rate", "set-up s", "held-out loss by learning rate"), rates
    )
    columns = list(table[0])
    cells = [[common.percent(row["level"]), *(row[column] for column in columns[1:])] for row in table]
    common.print_table("Time to quality, and ND's speed-up", ["time to", *columns[1:]], cells)


if __name__ == "__main__":
    common.run(main)
