"""`search`: the trade-off curve of a teacher over the students in its library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ndonnx.api.models import Model, Student, placed
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data
from ndonnx.flow.block_table import Tabulated
from ndonnx.flow.prepare import Request, prepare
from ndonnx.flow.search_session import SearchSession
from ndonnx.flow.trade_off import Curve
from ndonnx.report.search import SearchReport
from ndonnx.runtime.progress import Listener, Progress, listening
from ndonnx.select import parse_drop, parse_target

PARETO = 5
"""Students on the curve."""


@dataclass(frozen=True)
class SearchResult:
    """The trade-off curve, its students, and whether the target was reached."""

    report: SearchReport
    missed: str | None
    """Why the target was not reached; None where it was, or where there was none."""
    folder: Path | None
    """Folder that students, CSV, picture and report were written to; None: they were not."""
    students: Mapping[str, Student] = field(default_factory=dict)
    """Students of the curve and of the target, by the names that they have in the report."""


def search(
    model: Model,
    *,
    data: Data | None = None,
    recipe: RecipeLike | None = None,
    output: str | Path | None = None,
    pareto: int = PARETO,
    eval_data: Data | None = None,
    run_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Listener | None = None,
    **settings: Any,
) -> SearchResult:
    """Train candidates for every neighbourhood, and choose among them along the trade-off of cost and quality.

    The last layer of each student is refitted on its own inputs; a whole student is fine-tuned only if the recipe sets
    `finetune_steps`.

    Args:
        model: teacher as a path, an `onnx.ModelProto` or an `onnx_ir.Model`; never modified.
        data: inputs to distil on, as `compress` takes them; some of the rows are held out to choose by and to compare
            on.
        recipe: candidates under `[search]`, a target, and how to train, as a `Recipe`, its keys in a mapping, or the
            path of a TOML file.
        output: folder for the Pareto students, `search.csv`, `search.png` and `search.json`. None: nothing is written.
        pareto: how many students on the curve.
        eval_data: data to compare the students on, as `data`. None: rows of `data` that nothing else has seen.
        run_dir: folder of the library of trained candidates. None: beside `output` (or the model) with the suffix
            `.run`; for a model that is no file, a temporary folder.
        dry_run: only tell what is in the library and what would be trained.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: keys of the recipe, laid over it, as `search={"candidates": [ndonnx.Width(0.5)]}`.

    Raises:
        UsageError: bad input; one line that names the file, node or value and the way out.
    """
    chosen, told = recipe_of(recipe, settings), listening(progress)
    chosen = chosen.model_copy(update={"finetune_steps": chosen.finetune_steps or 0})
    where = None if output is None else Path(output)
    with placed(model, run_dir) as place:
        library = place.run_dir or (where or place.path).with_suffix(".run")
        request = Request(place.path, data, eval_data, None, library)
        found = _searched(request, chosen, told, where, None if dry_run else pareto)
        if not place.temporary:
            return found
        students = {name: place.kept(student.model, student.path) for name, student in found.students.items()}
        return replace(found, report=replace(found.report, model=place.name, run_dir=None), students=students)


def _searched(
    request: Request, recipe: Recipe, progress: Progress, folder: Path | None, pareto: int | None
) -> SearchResult:
    """Search for so many students on the curve; None: only tell what would be done."""
    shares = parse_target(recipe.target) if recipe.target else {}
    max_drop = None if recipe.max_drop is None else parse_drop(recipe.max_drop)
    with prepare(request, recipe, progress, searched=True) as run, SearchSession(run) as session:
        curve = Curve(session, shares, max_drop, request.eval_data is not None)
        if pareto is None:
            return SearchResult(curve.report([], None), None, None)
        session.train(max_drop)
        with run.clock.measure("evaluate"):
            table = Tabulated(session.library).table(latency="latency" in shares)
        wholes, missed = curve.students(table, pareto)
        named = [curve.point(*each, table, folder) for each in wholes]
        report = curve.report([curve.teacher(table), *named], table)
        report.write(run.directory.path / "search.json")
        if folder is not None:
            report.write(folder / "search.json")
            report.write_csv(folder / "search.csv")
            report.draw(folder / "search.png")
        paths = {point.name: point.path for point in named}
        students = {
            name: Student(whole.model(), None if (path := paths[name]) is None else Path(path))
            for name, source, whole in wholes
            if source == "searched"
        }
    return SearchResult(report, missed, folder, students)
