"""Every flag, declared once: its name, its metavar and its line of help."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_TRAIN = "How to train it"
_RUN = "How to run it"
_TELL = "What it tells"

SOURCES = "a .npz, .npy or .parquet file, a directory of images, or module:function"


def _flag(name: str, metavar: str, text: str, default: str, panel: str | None = None) -> Any:
    """An option whose own default is None: the recipe holds the real one, and the help tells it.

    To ask the recipe for it would cost an import of pydantic, so a test keeps the two equal.
    """
    return typer.Option(name, metavar=metavar, help=f"{text} (default: {default})", rich_help_panel=panel)


def given(context: typer.Context) -> dict[str, Any]:
    """The settings that a command's flags give, by their keys in a recipe.

    A command says by the name of a parameter that it is a recipe's key; where a flag of the same name means
    something else there, its parameter has another name.
    """
    from ndonnx.config.recipe import KEYS, parse_inputs  # noqa: PLC0415 - pydantic is not for `--help`

    said = {name: value for name, value in context.params.items() if name in KEYS}
    kept = {name: value for name, value in said.items() if value not in (None, [], ()) and value is not False}
    of_inputs = parse_inputs(context.params.get("input_settings") or (), context.params.get("shapes") or ())
    return kept | ({"model_inputs": of_inputs} if of_inputs else {})


Model = Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file; never modified.", show_default=False)]

# What goes in and out
Data = Annotated[
    str | None, typer.Option("--data", metavar="SRC", help=f"Inputs to run on: {SOURCES}; leaves makes pictures up.")
]
Eval = Annotated[
    str | None,
    _flag(
        "--eval",
        "SRC",
        "Data for the final comparison; labels give accuracy.",
        "samples of --data that nothing else sees",
    ),
]
Teacher = Annotated[
    str | None, typer.Option("--teacher", metavar="FILE.onnx", help="Also measure agreement with it, and the error.")
]
RecipeFile = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE.toml", help="Recipe; a flag goes before what it says.")
]
Svg = Annotated[str | None, typer.Option("--svg", metavar="FILE.svg", help="Also draw it, from top to bottom.")]

InputSettings = Annotated[
    list[str] | None,
    _flag(
        "--input",
        "NAME=VALUE",
        "One value that an input has for all samples (sr=16000, scales=0.6,1,0.8), or with NAME:axis=1 where its "
        "samples lie; repeatable.",
        "as the data have it",
    ),
]
Shapes = Annotated[
    list[str] | None,
    _flag(
        "--shape",
        "NAME=N,N",
        "Sizes of an input that the model leaves open, for made-up data, costs and timings; repeatable.",
        "found by trying",
    ),
]

# What to build
Method = Annotated[
    str | None,
    _flag(
        "--method",
        "NAME",
        "How a neighbourhood is shrunk: width, sparsity, lowrank, activation, removal or custom.",
        "width",
    ),
]
Keep = Annotated[float | None, _flag("--keep", "K", "Part of the inner channels that is kept, above 0 to 1.", "0.5")]
Sparsity = Annotated[
    str | None,
    _flag("--sparsity", "S", "With sparsity: part of the weights that becomes zero, or N zeros of M as N:M.", "0.5"),
]
Swap = Annotated[
    list[str] | None,
    _flag("--swap", "OLD=NEW", "With activation: operator to put in another's place; repeatable.", "cheap ones"),
]
Student = Annotated[
    str | None,
    _flag("--student", "MODULE:FUNCTION", "With custom: builds a torch module for a slice.", "needed with custom"),
]
RoundTo = Annotated[
    int | None,
    _flag("--round-to", "N", "Kept widths become multiples of N.", "8 where the width is at least 64, else 1"),
]
Granularity = Annotated[
    str | None, _flag("--granularity", "block|layer", "How finely the model is partitioned.", "block")
]
Cut = Annotated[
    list[str] | None,
    _flag("--cut", "VALUE", "Value that must be a boundary between neighbourhoods; repeatable.", "none"),
]
Freeze = Annotated[
    list[str] | None,
    _flag("--freeze", "VALUE", "Value whose neighbourhood stays as the teacher has it; repeatable.", "none"),
]
Init = Annotated[
    str | None,
    _flag("--init", "START", "Starting weights: teacher, least-squares or random.", "least-squares"),
]

# What to reach
Target = Annotated[
    list[str] | None,
    _flag(
        "--target",
        "COST=PART",
        "Search for a student with this part of the teacher's params, macs, size or latency; repeatable.",
        "none",
    ),
]
MaxDrop = Annotated[
    str | None,
    _flag(
        "--max-drop",
        "DROP",
        "Most quality to lose, with 95% confidence, as 1% or 0.01.",
        "any",
    ),
]

# How to train it
Inputs = Annotated[
    str | None,
    _flag(
        "--inputs",
        "WHOSE",
        "What students learn on: teacher, student, refit (teacher, then a refit on the students' own) or noise.",
        "teacher before a fine-tuning, else student",
        _TRAIN,
    ),
]
DataFree = Annotated[
    bool,
    typer.Option("--data-free", help="Make inputs up where no --data is given. (default: off)", rich_help_panel=_TRAIN),
]
LookAhead = Annotated[
    int | None,
    _flag("--look-ahead", "N", "Also measure the error after the next N teacher slices.", "0", _TRAIN),
]
LookAheadWeights = Annotated[
    list[float] | None,
    _flag("--look-ahead-weights", "W", "Weight of each of these errors; repeatable.", "1 each", _TRAIN),
]
FinetuneSteps = Annotated[
    int | None,
    _flag(
        "--finetune-steps",
        "N",
        "Steps of the whole student against the teacher's answers.",
        "three times --steps",
        _TRAIN,
    ),
]
FinetuneSamples = Annotated[
    int | None, _flag("--finetune-samples", "N", "Most samples of fine-tuning.", "50000", _TRAIN)
]
Augment = Annotated[
    str | None,
    _flag("--augment", "KINDS", "Changes of images in fine-tuning: flip, shift, mixup; or none.", "flip,shift", _TRAIN),
]
FinetuneLr = Annotated[
    float | None, _flag("--finetune-lr", "RATE", "Peak step in fine-tuning, as --lr.", "0.01", _TRAIN)
]
Temperature = Annotated[float | None, _flag("--temperature", "T", "Of the class scores in fine-tuning.", "4.0", _TRAIN)]
LabelWeight = Annotated[
    float | None,
    _flag("--label-weight", "PART", "Of labels in fine-tuning; the teacher's answers have the rest.", "0.0", _TRAIN),
]
Threshold = Annotated[
    str | None,
    _flag(
        "--threshold",
        "FILE.json",
        "What ndonnx threshold wrote: train no part further than it needs, and warn where one bears less.",
        "as many steps for each",
        _TRAIN,
    ),
]
TimeBudget = Annotated[
    str | None,
    _flag(
        "--time-budget", "TIME", "Choose the steps to fit this time (90s, 3m, 1h).", "as long as the steps take", _TRAIN
    ),
]
Steps = Annotated[int | None, _flag("--steps", "N", "Optimiser steps per neighbourhood.", "1000", _TRAIN)]
BatchSize = Annotated[int | None, _flag("--batch-size", "N", "Samples per optimiser step.", "64", _TRAIN)]
Lr = Annotated[float | None, _flag("--lr", "RATE", "Peak step, relative to the size of each weight.", "0.1", _TRAIN)]
Optimiser = Annotated[
    str | None,
    _flag("--optimiser", "muon|adam", "What moves matrices where that is cheap; Adam the rest.", "muon", _TRAIN),
]
Warmup = Annotated[
    float | None,
    _flag("--warmup", "PART", "Part of the steps over which the learning rate rises.", "0.05", _TRAIN),
]
Holdout = Annotated[
    float | None,
    _flag("--holdout", "PART", "Part of a training's samples that chooses its best state.", "0.05", _TRAIN),
]
Samples = Annotated[int | None, _flag("--samples", "N", "Most samples of a neighbourhood's training.", "16000", _TRAIN)]
Parity = Annotated[
    float | None,
    _flag("--parity", "ERROR", "Largest relative error of a slice converted to torch.", "0.0001", _TRAIN),
]
Seed = Annotated[int | None, _flag("--seed", "N", "Of everything that is drawn at random.", "0", _TRAIN)]

# How to run it
Workers = Annotated[
    int | None,
    _flag(
        "--workers",
        "N",
        "Neighbourhoods trained at the same time.",
        "one per core, fewer for few neighbourhoods",
        _RUN,
    ),
]
Executor = Annotated[str | None, _flag("--executor", "serial|process", "Where they are trained.", "process", _RUN)]
Device = Annotated[str | None, _flag("--device", "auto|cpu|cuda", "What computes.", "auto", _RUN)]
Precision = Annotated[
    str | None,
    _flag("--precision", "auto|fp32|bf16", "Of training; auto is bf16 where the machine computes in it.", "auto", _RUN),
]
CacheBudget = Annotated[
    str | None,
    _flag("--cache-budget", "SIZE", "Most disk that captured activations may take (4GB, 512MiB).", "4GB", _RUN),
]
MemoryBudget = Annotated[
    str | None,
    _flag("--memory-budget", "SIZE", "Memory for the run and its workers (3GB).", "a quarter of the machine's", _RUN),
]
RunDir = Annotated[
    str | None,
    _flag("--run-dir", "DIR", "Where the run keeps its state, to continue from.", "beside the output", _RUN),
]

# What it tells
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=_TELL)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=_TELL)]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also tell how long each stage took, and more steps.", rich_help_panel=_TELL),
]


def output(default: str) -> Any:
    """`-o FILE.onnx`, where the student goes."""
    return typer.Option(
        "--output", "-o", metavar="FILE.onnx", help=f"Where the student is written. (default: {default})"
    )


# Of `ndonnx harden`
Noise = Annotated[
    float | None,
    _flag("--noise", "PART", "Deviation of the noise, as a part of each activation's own.", "0.3", _TRAIN),
]
HardenSteps = Annotated[
    int | None,
    _flag("--steps", "N", "Optimiser steps of the whole model.", "the recipe's finetune_steps, else 2000", _TRAIN),
]
HardenLr = Annotated[
    float | None, _flag("--lr", "RATE", "Peak step, relative to the size of each weight.", "0.01", _TRAIN)
]
HardenSamples = Annotated[int | None, _flag("--samples", "N", "Most samples taken from the data.", "50000", _TRAIN)]

# Of `ndonnx benchmark`
Against = Annotated[
    str | None, typer.Option("--against", metavar="FILE.onnx", help="Time this model too, by turns, and compare.")
]
BatchSizes = Annotated[
    str,
    typer.Option(
        "--batch-sizes",
        metavar="N,N",
        help="Samples in a run, one after the other. (default: 1,8,32)",
        show_default=False,
    ),
]
Provider = Annotated[
    list[str] | None,
    _flag("--provider", "cpu|cuda", "onnxruntime's execution provider, or another one; repeatable.", "cpu"),
]
Threads = Annotated[int | None, _flag("--threads", "N", "Threads inside one operator.", "all usable cores")]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        metavar="N",
        help="Load and time everything anew in so many processes, one after the other. (default: 8)",
        show_default=False,
    ),
]
Rounds = Annotated[
    int | None,
    _flag("--rounds", "N", "Timed runs of each model in each process.", "what a second has room for, 3 to 30"),
]
FidelitySamples = Annotated[
    int | None, _flag("--samples", "N", "Most samples on which the answers are compared.", "all of --data")
]
Picture = Annotated[
    str | None,
    typer.Option("--picture", metavar="FILE.png|svg", help="Also draw latency over batch sizes, and the ratio."),
]

# Of `ndonnx threshold`
StudyFolder = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder for figures, tables and the document. (default: MODEL-threshold in this folder)",
    ),
]
Amplitudes = Annotated[
    str | None,
    _flag("--amplitudes", "A,A", "Of the noise, as parts of each value's deviation.", "0.05,0.1,0.2,0.4,0.8,1.6"),
]
Repeats = Annotated[int | None, _flag("--repeats", "N", "Draws of the noise at each amplitude.", "3")]
Multipliers = Annotated[
    str | None, _flag("--keep", "K,K", "Widths of the untrained students, above 0 to 1.", "0.25,0.5,0.75")
]
StudyDrop = Annotated[
    str,
    typer.Option(
        "--max-drop",
        metavar="DROP",
        help="What one neighbourhood's error may cost, as 1% or 0.01. (default: 1%)",
        show_default=False,
    ),
]
StudySamples = Annotated[
    int,
    typer.Option(
        "--samples",
        metavar="N",
        help="Most samples on which the answers are judged. (default: 2000)",
        show_default=False,
    ),
]

# Of `ndonnx search`
Candidates = Annotated[
    list[str] | None,
    _flag(
        "--candidates",
        "NAME",
        "What is tried: width K, sparsity S, lowrank K, activation, removal; by commas, and repeatable.",
        "width 0.1 to 0.9, lowrank 0.3 to 0.75",
    ),
]
SearchFolder = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder for the students, table and picture. (default: MODEL-search in this folder)",
    ),
]
Pareto = Annotated[
    int,
    typer.Option(
        "--pareto", metavar="N", min=0, help="Students on the trade-off curve. (default: 5)", show_default=False
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Tell what is in the library and what would be trained. (default: off)")
]
CandidateSteps = Annotated[
    int | None, _flag("--steps", "N", "Optimiser steps of a candidate.", "200, a fifth of those of compress", _TRAIN)
]
SearchFinetuneSteps = Annotated[
    int | None,
    _flag("--finetune-steps", "N", "Steps of each whole student against the teacher's answers.", "0", _TRAIN),
]
Quality = Annotated[
    str | None,
    _flag("--quality", "NAME", "What a candidate is judged by: divergence, metric or nmse.", "divergence"),
]
Solver = Annotated[str | None, _flag("--solver", "milp|greedy", "How students are chosen.", "milp")]
SearchThreshold = Annotated[
    str | None,
    _flag(
        "--threshold",
        "FILE.json",
        "What ndonnx threshold wrote: warn where the student of --target or --max-drop is beyond it.",
        "no warnings",
    ),
]
HeldOut = Annotated[
    int | None,
    _flag(
        "--held-out",
        "N",
        "Samples that measure candidates; 2N choose a whole, 5N test --max-drop.",
        "2000",
        _TRAIN,
    ),
]
