"""How long, how fast and on what a module is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Plan:
    """How long, how fast, on what."""

    steps: int
    batch_size: int
    lr: float
    """Peak step, relative to each weight's root mean square; of several that are tried, the first."""
    warmup: float
    seed: int
    device: str = "cpu"
    bf16: bool = False
    """Whether the forward pass computes in bfloat16."""
    seconds: float | None = None
    """Wall time after which the training ends, its learning rate fallen to zero, whatever the steps."""
    enough: float | None = None
    """NMSE of the target at or under which the training is over, wherever it is measured anyway, the start included.
    None: never."""
    worth: int = 0
    """Steps for which there has to be time, or there are none: what follows makes better use of so little."""

    optimiser: Literal["muon", "adam"] = "adam"
    """What moves matrices where that is cheap; see `ndonnx.distill.optimiser`."""
    fastest: bool = False
    """Whether number format and memory layout are those in which a gradient is measured to take least time here;
    only where the training has a given time. Else `bf16` says it: the same steps give the same student everywhere."""
    tries: bool = False
    """Whether short trials find the peak step, or it is lowered on the way where it leads nowhere, see
    `ndonnx.distill.rates`; else it is as given."""
    memory: int | None = None
    """Bytes of activations that a step may keep, where memory is scarce; gradients are then added up from parts of a
    batch, whose sizes decide the last bits. None: as many as `ndonnx.distill.steps` gives to each thread."""

    threads: int = 1
    """Number of threads that share every batch, on a CPU; students do not depend on it in their keys."""

    def key(self) -> dict[str, Any]:
        """What a student depends on. Without what older students did not have, so that they are found again."""
        older = {"enough": None, "optimiser": "adam", "memory": None, "tries": False, "fastest": False, "worth": 0}
        found = {name: value for name, value in asdict(self).items() if name != "threads"}
        return {name: value for name, value in found.items() if name not in older or value != older[name]}
