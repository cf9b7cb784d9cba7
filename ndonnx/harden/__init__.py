"""Harden a teacher: make it bear errors inside, so that its students may be worse (the paper's appendix B.1).

The teacher is trained as a whole against its own clean answers while Gaussian noise is added behind
every neighbourhood. Neighbourhood distillation on the hardened model then finds more errors that do not matter.
"""

from ndonnx.harden.run import HardenReport, HardenResult, harden

__all__ = ["HardenReport", "HardenResult", "harden"]
