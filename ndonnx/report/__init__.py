"""What a run tells when it is over, as the contract of `compress --json` states it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ndonnx.distill.tasks.fidelity import OutputFidelity
from ndonnx.metrics.baselines import Baselines
from ndonnx.metrics.evaluation import Evaluation, finite
from ndonnx.runtime.atomic import atomic_write_json


@dataclass(frozen=True)
class ModelSummary:
    """A model in numbers; `bytes` of the file (None if not written), external data included."""

    path: str | None
    parameters: int
    macs: int | None
    """Multiply-accumulates for one sample; None where they depend on a size that nothing states."""
    bytes: int | None
    zeros: int = 0
    """Weights that are exactly 0."""
    compressed_bytes: int | None = None
    """Bytes of the file after zlib, where zeros were made; onnxruntime gains no speed from them."""


@dataclass(frozen=True)
class NeighbourhoodReport:
    """How one neighbourhood ended: `distilled`, `reused` (from the run directory) or `kept`."""

    name: str
    candidate: str | None
    status: str
    nmse: float | None
    """Normalised squared error after the training, on the samples by which its best state was chosen: what a training
    came to, and no promise."""
    nmse_start: float | None
    """Normalised squared error before the first step."""
    steps: int
    seconds: float
    parameters: int
    macs: int | None
    reason: str | None
    tolerance: float | None = None
    """The NMSE that it tolerates alone, as far as that is known: see `ndonnx threshold`."""
    steps_saved: int | None = None
    """Steps that were not needed, because the student was near enough before; None without a tolerance or with a time
    budget."""
    warning: str | None = None
    """That the student is beyond the tolerance, and the way out."""
    student_of: str | None = None
    """The neighbourhood with the same weights whose student stands here too; None: its own."""
    traceback: str | None = None
    """Path of a text file in the run directory, where the reason is something that nobody foresaw."""
    input: str | None = None
    """The stream value that it reads; None where there is none."""
    output: str | None = None
    """The value that it makes."""
    teacher_parameters: int | None = None
    """Parameters of the teacher's own slice."""
    teacher_macs: int | None = None
    """Multiply-accumulates of the teacher's own slice for one sample; None where they cannot be told."""
    curve: Sequence[tuple[int, float]] = ()
    """Steps at which the training measured its held-out NMSE, with what it was; empty where nothing was trained."""
    lr: float | None = None
    """Peak learning rate of its training, given or found by short trials; None where it was not trained."""
    format: str | None = None
    """Number format and memory layout of its training (`fp32, channels last`); None where it was not trained."""
    bits: int | None = None
    """Bits of most of its weights, 8 or 32, in a student of which some are in 8; None in any other, and where it has no
    weights."""


@dataclass(frozen=True)
class FinetuneReport:
    """The fine-tuning of the whole student: loss and NMSE of the output before and after, on the samples by which its
    best state was chosen."""

    steps: int
    seconds: float
    loss_start: float | None = None
    loss: float | None = None
    nmse_start: float | None = None
    nmse: float | None = None
    reason: str | None = None
    """Why there was none."""
    traceback: str | None = None
    """Path of a text file in the run directory, where the reason is something that nobody foresaw."""
    curve: Sequence[tuple[int, float]] = ()
    """Steps at which the held-out NMSE of the outputs was measured, with what it was."""
    lr: float | None = None
    """Peak learning rate, as it was given or as short trials found it."""
    format: str | None = None
    """Number format and memory layout of its steps (`fp32, channels last`); None where there were none."""


@dataclass(frozen=True)
class StageReport:
    """The whole student after a stage that changed it, on held-out samples by which the best stage was chosen."""

    stage: str
    """`spliced`, `reconstructed` (each student's last layer refitted down the chain), `fine-tuned` or `quantised`; and
    `teacher`, where it is quantised itself."""
    loss: float | None
    """One figure, less is better: of each output the softened divergence of its classes, one minus its cosine, or its
    NMSE."""
    outputs: Mapping[str, OutputFidelity]
    """Each float output in the measure of its task, by name."""
    written: bool
    """Whether this is the student that was written: the best of all stages, or the quantised one where that was asked
    for."""
    metric: float | None = None
    """The user's own, higher is better, by which the best is then chosen; None where there is none."""


@dataclass(frozen=True)
class SimplifiedReport:
    """What the simplification of the teacher came to, before it was partitioned."""

    nodes_before: int
    """Nodes of the teacher's main graph that compute something."""
    nodes_after: int
    """The same of the graph that was partitioned; as before where the simplification was not kept."""
    rules: tuple[str, ...]
    """Kinds of simplification that were kept."""
    difference: float | None
    """Largest difference of an output on a few samples, relative to the output's largest value; None where it was not
    measured."""
    latency_ratio: float | None
    """Time of a run over that of the teacher's file; None where it was not measured."""
    reason: str | None = None
    """Why some of it, or all, was not kept."""


@dataclass(frozen=True)
class QuantisationTrial:
    """A quantised student that was measured on the way to the one that was written."""

    scheme: str
    loss: float | None
    """As of a stage; where a metric of the user's own is what counts, how much less it is than the float student's."""
    time: float
    """Latency for one sample, as a part of the float student's."""
    size: float
    """Bytes, as a part of the float student's."""


@dataclass(frozen=True)
class QuantisationReport:
    """How the student came to be in 8 bits, on the samples by which that was chosen and on this machine."""

    bits: int
    scheme: str | None = None
    """Which operators are quantised, and how their ranges were found."""
    kept: list[str] = field(default_factory=list)
    """Names of the nodes that stay in float, since that is worth its time."""
    loss: float | None = None
    float_loss: float | None = None
    """Loss of the same student in float."""
    time: float | None = None
    """Latency for one sample, as a part of the same student's in float."""
    size: float | None = None
    """Bytes, as a part of the same student's in float."""
    quantised_nodes: int | None = None
    """Convolutions, matrix products and recurrent layers that onnxruntime computes with integers here."""
    float_nodes: int | None = None
    """Those that it computes with floats."""
    qdq_left: int | None = None
    """`QuantizeLinear` and `DequantizeLinear` that it computes as such."""
    opset: int | None = None
    """Opset of the student, where it had to be raised."""
    trials: list[QuantisationTrial] = field(default_factory=list)
    reason: str | None = None
    """Why the student stays in float; None where it does not."""

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> QuantisationReport:
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**document, "trials": [QuantisationTrial(**trial) for trial in document["trials"]]})


@dataclass(frozen=True)
class Seconds:
    """Wall time of the stages."""

    load: float = 0.0
    partition: float = 0.0
    capture: float = 0.0
    distil: float = 0.0
    refit: float = 0.0
    splice: float = 0.0
    finetune: float = 0.0
    quantise: float = 0.0
    evaluate: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class TargetReport:
    """What was asked for, and what was reached by measurement."""

    target: dict[str, float]
    """Parts of the teacher's costs."""
    max_drop: float | None
    reached: dict[str, float]
    """Parts of the teacher's costs that the student has."""
    quality: str
    """What the drop is of: accuracy, agreement or nmse."""
    samples: int
    """Samples that no training and no choice saw: those on which `max_drop` was tested; without it, those of the
    comparison."""
    drop: float | None
    """Measured on them; None where the student's answers are not finite."""
    bound: float | None
    """One-sided upper confidence bound of it: of the student's own test, which `max_drop` is compared with, or 95%.
    Where `missed` is None, the drop is at most `max_drop` with 95% confidence, all tests of the run counted."""
    missed: str | None
    """Why this is not what was asked for; None where it is."""


@dataclass(frozen=True)
class CompressReport:
    """The whole of a run."""

    teacher: ModelSummary
    student: ModelSummary
    metrics: dict[str, Evaluation]
    neighbourhoods: list[NeighbourhoodReport]
    finetune: FinetuneReport | None
    """None where it was not asked for."""
    seconds: Seconds
    peak_rss_bytes: int
    run_dir: str | None
    """Folder of the run's state; None: a temporary one, which is gone."""
    shapes: dict[str, list[int]] | None = None
    """Shape of each input in the run that MACs are told for; None where they are not told."""
    target: TargetReport | None = None
    """None where there was none; the document then has no such key."""
    stages: tuple[StageReport, ...] = ()
    """The whole student after each stage that changed it."""
    simplified: SimplifiedReport | None = None
    """What became of the simplification; None where none was asked for, or nothing was to be simplified. The document
    then has no such key."""
    quantised: QuantisationReport | None = None
    """How the student was quantised. The document has this key only where that was asked for."""
    unchanged: bool = False
    """Whether the teacher itself was asked for: every channel kept, no steps. The document has this key only then."""
    task: Mapping[str, str] = field(default_factory=dict)
    """What each float output was taken for, by name."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What the run was asked for: `model`, `data`, `eval`, `output`, and every setting of the `recipe`."""
    command: str | None = None
    """A command that repeats the run; None where the model or the data are no files."""
    files: Mapping[str, Any] = field(default_factory=dict)
    """SHA-256 of the `teacher`, the `student` and the `recipe`, and fingerprints of the `data`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that the result depends on."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Processor, usable cores, memory in bytes, system."""
    warnings: tuple[str, ...] = ()
    """What the run remarked on, a line each."""
    baselines: Baselines | None = None
    """The comparison with what there is without this library; the document has this key only where it was asked for."""

    @property
    def unforeseen(self) -> dict[str, str]:
        """Paths of the text files that tell of errors which nobody foresaw, by what ended in them."""
        found = {n.name: n.traceback for n in self.neighbourhoods if n.traceback is not None}
        if self.finetune is not None and self.finetune.traceback is not None:
            found["fine-tuning"] = self.finetune.traceback
        return found

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        whole = asdict(self)
        if self.target is None:
            del whole["target"]
        if self.simplified is None:
            del whole["simplified"]
        if self.quantised is None:
            del whole["quantised"]
        if not self.unchanged:
            del whole["unchanged"]
        if self.baselines is None:
            del whole["baselines"]
        else:
            whole["baselines"] = self.baselines.to_json()
        whole["stages"] = [finite(stage) for stage in whole["stages"]]
        whole["metrics"] = {name: metrics.to_json() for name, metrics in self.metrics.items()}
        return whole

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all."""
        atomic_write_json(path, self.to_json())
