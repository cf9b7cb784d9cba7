"""The stages in order: load, partition, capture, distil, refit, splice, fine-tune, verify, report.

This room alone knows all the others. Stages talk through the run directory, so a run that
was interrupted continues with what is done there, whichever executor did it.
"""

from ndonnx.pipeline.compress import CompressResult, Student, compress, partition_model

__all__ = ["CompressResult", "Student", "compress", "partition_model"]
