"""The tables: which cells each asks for, and what the paper has in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.paper import published
from benchmarks.paper.lab import Cell, Lab
from benchmarks.time_to_quality import Reach, speed_up, time_to

Row = dict[str, Any]

CE_SCRATCH, KD_SCRATCH, KD_PRUNED = "CE from scratch", "KD from scratch", "KD from the pruned teacher"
ND, ND_ORDERED, ND_TUNED = "ND", "ND in order", "ND + fine-tune"


@dataclass(frozen=True)
class Table:
    """A table as it was measured: accuracies and shares from 0 to 1, differences in points, None where unknown."""

    number: int
    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    remark: str = ""


def table1(lab: Lab) -> Table:
    """Width: ND against end-to-end training of the same student, which gets more time."""
    rows = []
    for keep in lab.scale.keeps:
        nd = lab.nd(keep=keep, inputs="teacher")
        tuned = lab.nd(keep=keep, inputs="teacher", finetune_steps=lab.scale.finetune_steps)
        seconds = lab.scale.baseline_seconds or tuned.seconds or nd.seconds
        if seconds is None:
            failed = Cell(note=f"there is no time to match: {tuned.note}")
            cells = dict.fromkeys((CE_SCRATCH, KD_SCRATCH, KD_PRUNED), failed)
        else:
            cells = {
                CE_SCRATCH: lab.baseline(CE_SCRATCH, "ce", "random", keep, seconds),
                KD_SCRATCH: lab.baseline(KD_SCRATCH, "kd", "random", keep, seconds, judged=True),
                KD_PRUNED: lab.baseline(KD_PRUNED, "kd", "teacher", keep, seconds),
            }
        ordered = lab.nd(keep=keep, inputs="student")
        known = {ND: published.ND.get(keep), ND_ORDERED: None, ND_TUNED: published.ND_TUNED.get(keep)}
        for method, cell in (cells | {ND: nd, ND_ORDERED: ordered, ND_TUNED: tuned}).items():
            faster = _over_kd(cell, cells[KD_SCRATCH]) if method in known else None
            rows.append({"k": keep, "method": method} | _measured(lab, cell, known.get(method)) | {"speed-up": faster})
    return Table(
        1,
        "Width: ND and end-to-end training",
        ("k", "method", lab_quality(lab), "difference", "paper", "seconds", "speed-up"),
        rows,
        "speed-up: of ND over KD from scratch, to ND's accuracy; the paper's is "
        f"{published.SPEED_UP:g}. KD from scratch keeps the teacher's weights outside the students.",
    )


def table3(lab: Lab) -> Table:
    """Sparsity, layer by layer."""
    rows = []
    for sparsity in lab.scale.sparsities:
        for init, inputs in (("teacher", "teacher"), ("least-squares", "teacher"), ("least-squares", "student")):
            cell = lab.nd(
                method="sparsity",
                sparsity=f"{sparsity:g}",
                granularity="layer",
                init=init,
                inputs=inputs,
                steps=lab.scale.layer_steps,
            )
            known = published.SPARSE.get(sparsity) if init == "teacher" else None
            order = "apart" if inputs == "teacher" else "in order"
            rows.append({"sparsity": sparsity, "start": init, "layers": order} | _measured(lab, cell, known))
    columns = ("sparsity", "start", "layers", lab_quality(lab), "difference", "paper", "seconds")
    return Table(3, "Sparsity, layer by layer, without fine-tuning", columns, rows)


def table4(lab: Lab) -> Table:
    """No data: noise at each neighbourhood, and made-up inputs of the whole."""
    rows = []
    for keep in lab.scale.free_keeps:
        noise = lab.nd(keep=keep, inputs="noise")
        made_up = lab.nd(keep=keep, inputs="refit", data_free=True)
        rows.append({"k": keep, "inputs": "noise"} | _measured(lab, noise, published.DATA_FREE.get(keep)))
        rows.append({"k": keep, "inputs": "made up, refit"} | _measured(lab, made_up))
    columns = ("k", "inputs", lab_quality(lab), "difference", "paper", "seconds")
    return Table(4, "Without data and without fine-tuning", columns, rows)


def table5(lab: Lab) -> Table:
    """Hardening of the teacher, and what its students gain."""
    hardened = lab.hardened()
    rows: list[Row] = [
        {"teacher": "as it is", "k": None} | _measured(lab, Cell(lab.teacher)),
        {"teacher": "hardened", "k": None} | _measured(lab, hardened),
    ]
    failed = Cell(note=f"there is no hardened teacher: {hardened.note}")
    for keep in lab.scale.hardened_keeps:
        rows.append({"teacher": "as it is", "k": keep} | _measured(lab, lab.nd(keep=keep, inputs="teacher")))
        cell = failed if hardened.path is None else lab.nd(hardened.path, keep=keep, inputs="teacher")
        rows.append({"teacher": "hardened", "k": keep} | _measured(lab, cell))
    return Table(
        5,
        f"Hardening with noise of {lab.scale.noise:g} of the deviation, and ND without fine-tuning",
        ("teacher", "k", lab_quality(lab), "difference", "paper", "seconds"),
        rows,
        "differences are from the teacher as it is; the seconds of ND of the hardened teacher leave the hardening out.",
    )


def table6(lab: Lab) -> Table:
    """Look-ahead, for as many steps and for as much time, of neighbourhoods apart and in order."""
    scale = lab.scale
    rows = _looking(lab, "teacher", scale.look_aheads, scale.equal_times, (False, True))
    rows += _looking(lab, "student", scale.ordered_look_aheads, scale.ordered_look_aheads[1:], (False,))
    return Table(
        6,
        f"Look-ahead at k={scale.middle:g}",
        (
            "neighbourhoods",
            "look-ahead",
            "steps",
            "fine-tune",
            lab_quality(lab),
            "difference",
            "gain",
            "paper",
            "seconds",
        ),
        rows,
        "gain: over no look-ahead for as many steps, in points, which is what the paper's number is too.",
    )


def table7(lab: Lab) -> Table:
    """Where the time goes."""
    keep, tuning = lab.scale.middle, lab.scale.finetune_steps
    cell = lab.nd(keep=keep, inputs="teacher", finetune_steps=tuning)
    rows: list[Row] = [
        {"stage": stage, "seconds": spent, "share": spent / (cell.seconds or 1.0), "paper": None, "note": ""}
        for stage, spent in cell.stages.items()
        if spent > 0
    ]
    if cell.seconds is None:
        rows = [{"stage": "all", "seconds": None, "share": None, "paper": None, "note": cell.note}]
    else:
        rows.append({"stage": "all", "seconds": cell.seconds, "share": 1.0, "paper": None, "note": cell.note})
    return Table(7, f"Time of ND and fine-tuning by stage, k={keep:g}", ("stage", "seconds", "share", "paper"), rows)


TABLES: Mapping[str, Callable[[Lab], Table]] = {
    "1": table1,
    "3": table3,
    "4": table4,
    "5": table5,
    "6": table6,
    "7": table7,
}


def lab_quality(lab: Lab) -> str:
    """The name of what is measured."""
    return "accuracy" if lab.labelled else "agreement"


def _measured(lab: Lab, cell: Cell, known: float | None = None) -> Row:
    return {
        lab_quality(lab): cell.quality,
        "difference": lab.difference(cell),
        "paper": known,
        "seconds": cell.seconds,
        "note": cell.note,
    }


def _over_kd(nd: Cell, kd: Cell) -> str | None:
    """How many times longer KD from scratch takes to ND's quality."""
    if nd.quality is None or nd.seconds is None or not kd.curve:
        return None
    return speed_up(Reach(nd.seconds, True), time_to(nd.quality, kd.curve, KD_SCRATCH))


def _looking(
    lab: Lab, inputs: str, look_aheads: Sequence[int], equal_times: Sequence[int], tuned: Sequence[bool]
) -> list[Row]:
    """Rows of every look-ahead, the first of them none; behind some, none for as long."""
    steps = lab.scale.look_ahead_steps

    def cells(look_ahead: int, steps: int) -> list[Cell]:
        settings: dict[str, Any] = {"keep": lab.scale.middle, "inputs": inputs, "look_ahead": look_ahead}
        tunings = [{"finetune_steps": lab.scale.finetune_steps} if each else {} for each in tuned]
        return [lab.nd(**settings, steps=steps, **tuning) for tuning in tunings]

    def told(name: str, steps: int | None, found: Sequence[Cell], known: float | None = None) -> list[Row]:
        return [
            {
                "neighbourhoods": "in order" if inputs == "student" else "apart",
                "look-ahead": name,
                "steps": steps,
                "fine-tune": "yes" if each else "no",
                "gain": _gain(cell, base),
            }
            | _measured(lab, cell, None if each or inputs == "student" else known)
            for cell, base, each in zip(found, none, tuned, strict=True)
        ]

    none = cells(0, steps)
    rows = told("0", steps, none)
    for look_ahead in look_aheads[1:]:
        found = cells(look_ahead, steps)
        rows += told(str(look_ahead), steps, found, published.LOOK_AHEAD_GAIN.get(look_ahead))
        if look_ahead in equal_times:
            longer = _as_long(found[0], none[0], steps)
            same = cells(0, longer) if longer else [Cell(note=f"look-ahead {look_ahead} failed")] * len(tuned)
            rows += told(f"0, as long as {look_ahead}", longer, same)
    return rows


def _gain(cell: Cell, base: Cell) -> float | None:
    if cell.quality is None or base.quality is None:
        return None
    return 100 * (cell.quality - base.quality)


def _as_long(found: Cell, none: Cell, steps: int) -> int | None:
    """Steps without look-ahead that take as long as the found cell's training did; None where either failed."""
    ours, theirs = found.stages.get("distil"), none.stages.get("distil")
    return round(steps * ours / theirs) if ours and theirs else None
