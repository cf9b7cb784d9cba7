"""What to build: the student method, how much it takes away, and where the model is cut."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ndonnx.config.panel import Panel
from ndonnx.config.setting import Flag, Section
from ndonnx.config.values import Sparsity


class Build(Section):
    """Settings of what is built: the student method, how much it takes away, and where the model is cut."""

    method: Annotated[str, Flag("NAME", Panel.BUILD)] = "width"
    """Student method, by which every neighbourhood is shrunk: `width`, `sparsity`, `lowrank`, `activation`, `removal`
    or `custom`."""
    keep: Annotated[float | None, Flag("K", Panel.BUILD)] = Field(None, gt=0, le=1)
    """Fraction of each neighbourhood's inner channels that is kept, above 0 to 1; with `lowrank`, of its weights.
    Default: 0.5; with a time budget and the method `width` as much more as runs in 0.6 of the teacher's time."""
    sparsity: Annotated[Sparsity, Flag("S", Panel.BUILD)] = "0.5"
    """With the method `sparsity`: fraction of the weights that becomes zero, or N zeros in every M weights as `N:M`."""
    swap: Annotated[tuple[str, ...], Flag("OLD=NEW", Panel.BUILD, repeatable=True)] = ()
    """With the method `activation`: activation operator and the one that replaces it. Default: cheap operators for
    costly ones."""
    student: Annotated[str | None, Flag("MODULE:FUNCTION", Panel.BUILD)] = None
    """With the method `custom`: function that builds the student of a slice, a torch module. Default: needed with
    `custom`."""
    round_to: Annotated[int | None, Flag("N", Panel.BUILD)] = Field(None, ge=1)
    """Number to whose multiples kept widths and ranks are rounded. Default: 8 for widths of at least 64 (16 with
    `--bits 8`) and ranks of layers of at least 16, else 1."""
    bits: Annotated[Literal[8, 32], Flag("8|32", Panel.BUILD)] = 32
    """Bits of the weights and activations of the student: with 8 it is quantised at the end, for onnxruntime on CPUs,
    and pieces that lose too much by it stay in float. In a search (`--target`, `--max-drop`) every candidate has a twin
    in 8 bits as well (`width 0.5 + int8`), and which pieces are in 8 bits is chosen together with their widths."""
    granularity: Annotated[Literal["block", "layer"], Flag("block|layer", Panel.BUILD)] = "block"
    """Granularity of the partition: `block` takes the smallest regions with a width to shrink inside, `layer` one
    operator with weights each."""
    cut: Annotated[tuple[str, ...], Flag("VALUE", Panel.BUILD, repeatable=True)] = ()
    """Value of the graph that must be a boundary between neighbourhoods. Default: no such value."""
    freeze: Annotated[tuple[str, ...], Flag("VALUE", Panel.BUILD, repeatable=True)] = ()
    """Value of the graph whose producing neighbourhood stays as the teacher has it. Default: no such value."""
    simplify: Annotated[bool, Flag("", Panel.BUILD)] = True
    """Whether the teacher is simplified first: scales, shifts and batch normalisations folded into the weights beside
    them, activations that are spelled out written as one operator, and what does nothing left out; its answers stay the
    same but for rounding. With `--keep 1 --steps 0` it never is."""
    init: Annotated[Literal["teacher", "least-squares", "random"], Flag("START", Panel.BUILD)] = "least-squares"
    """Initial weights of a student: the teacher's (`teacher`), those of a least-squares fit to the teacher's output
    (`least-squares`), or `random`."""
