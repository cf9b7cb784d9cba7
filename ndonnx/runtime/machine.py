"""What the machine at hand can do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ndonnx.errors import UsageError


def usable_cores() -> int:
    """Cores that this process may run on: its affinity where the system tells, else all."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of the machine, or of the part of it that this process may use, in bytes."""
    import psutil  # noqa: PLC0415 - not needed for help texts

    total = int(psutil.virtual_memory().total)
    limits = (path.read_text() for path in map(Path, _LIMITS) if path.is_file()) if sys.platform == "linux" else ()
    return min([total, *(int(limit) for limit in limits if limit.strip().isdecimal())])


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux tells how much a container may have."""


def pick_device(wanted: str) -> str:
    """`cpu` or `cuda`; `auto` takes cuda where torch has it.

    Raises:
        UsageError: cuda was asked for and is not there.
    """
    import torch  # noqa: PLC0415 - seconds to import, not needed for help texts

    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return "cpu"


def computes_in_bf16(device: str) -> bool:
    """Whether bfloat16 is a native type of the device, and so faster than float32."""
    import torch  # noqa: PLC0415

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # older releases of torch do not tell
    return capabilities is not None and bool(capabilities().get("avx512_bf16", False))


def peak_rss_bytes() -> int:
    """Most memory that this process has held, in bytes; 0 where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return 0
    import resource  # noqa: PLC0415 - POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
