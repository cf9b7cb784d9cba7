"""How to run it: worker processes, devices, precision, and the disk and memory that a run may take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ndonnx.config.panel import Panel
from ndonnx.config.setting import Flag, Section
from ndonnx.config.values import Bytes


class Execution(Section):
    """Settings of how a run uses the machine: workers, device, precision, disk and memory."""

    workers: Annotated[int | None, Flag("N", Panel.RUN)] = Field(None, ge=1)
    """Number of neighbourhoods trained at the same time. Default: one per core, fewer for few neighbourhoods."""
    executor: Annotated[str, Flag("serial|process|ray", Panel.RUN)] = "process"
    """Executor of the training jobs: one after the other in this process (`serial`), in worker processes (`process`),
    on a Ray cluster (`ray`), or one that an installed package or the program itself has registered."""
    ray_address: Annotated[str | None, Flag("ADDRESS", Panel.RUN)] = None
    """Address of the Ray cluster of `--executor ray`. Default: what the variable `RAY_ADDRESS` says, else a cluster on
    this machine, which is started where there is none."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Flag("auto|cpu|cuda", Panel.RUN)] = "auto"
    """Device of training and inference; `auto` is cuda where torch has it."""
    precision: Annotated[Literal["auto", "fp32", "bf16"], Flag("auto|fp32|bf16", Panel.RUN)] = "auto"
    """Floating-point precision of training; `auto` is bf16 on a GPU that computes in it, and on a CPU under a time
    budget where steps in it are measured to be faster, else fp32."""
    cache_budget: Annotated[Bytes, Flag("SIZE", Panel.RUN)] = 4 * 10**9
    """Maximum disk space of captured activations, in bytes (`4GB`, `512MiB`). Default: 4GB."""
    memory_budget: Annotated[Bytes | None, Flag("SIZE", Panel.RUN)] = None
    """Maximum memory of the run with all its workers, in bytes (`3GB`): it limits how many workers there are, and how
    many samples are computed at a time. Default: a quarter of the machine's."""
