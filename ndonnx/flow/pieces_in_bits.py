"""The last stage of a student whose pieces were searched: those that were chosen in 8 bits are written so."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ndonnx.assemble.verify_quantised import verify_quantised
from ndonnx.errors import first_line
from ndonnx.flow.mixed_precision import MixedPrecision
from ndonnx.flow.quantise import STAGE, notes_on, quantisation_report
from ndonnx.flow.quantise_trials import REFUSED
from ndonnx.flow.stages import Stage, Stages
from ndonnx.report import QuantisationReport
from ndonnx.teacher.batches import probe


@dataclass(frozen=True)
class PiecesInBits:
    """Pieces of a student that a search has chosen to be in 8 bits."""

    precision: MixedPrecision
    names: tuple[str, ...]
    """Of the neighbourhoods, kept pieces among them; none: all of the student stays in float."""

    def quantise(self, stages: Stages) -> QuantisationReport | None:
        """Let the best student so far, with these pieces of it in 8 bits, be the last stage and what is written.

        It stays in float where that cannot be had, and the report says why.
        """
        best = stages.best
        if best is None or not self.names:
            return None
        with self.precision.run.clock.measure("quantise"):
            try:
                report = self._quantise(best.model, stages)
            except REFUSED as error:
                report = QuantisationReport(bits=8, reason=first_line(error))
        for note in notes_on(report):
            self.precision.run.progress.note(note)
        return report

    def _quantise(self, student: ir.Model, stages: Stages) -> QuantisationReport:
        run = self.precision.run
        made = self.precision.finished(student, self.names, stages)
        verify_quantised(run.teacher.model, student, made.model, run.parts.interface, probe(run.split.source))
        stages.add(Stage(STAGE, made.model, {}), asked=True)
        how = f"{made.scheme}, biases corrected" if made.corrected else str(made.scheme)
        return quantisation_report(made.trials, made.model, how, made.measured)
