"""The stages in order: load, partition, capture, distil, refit, splice, fine-tune, verify, report.

This room alone knows all the others. Stages talk through the run directory, so a run that
was interrupted continues with what is done there, whichever executor did it.
"""

from ndonnx.pipeline.compress import compress
from ndonnx.pipeline.opening import partition_model
from ndonnx.pipeline.results import CompressResult, Student
from ndonnx.pipeline.searching import SearchResult, search

__all__ = ["CompressResult", "SearchResult", "Student", "compress", "partition_model", "search"]
