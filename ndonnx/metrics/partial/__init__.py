"""Partial models: the teacher with one neighbourhood replaced, and how much worse its answers are (section 5)."""

from ndonnx.metrics.partial.models import Batches, Change, Judged, PartialModels
from ndonnx.metrics.partial.quality import Kind, Losses, Outputs, Quality

__all__ = ["Batches", "Change", "Judged", "Kind", "Losses", "Outputs", "PartialModels", "Quality"]
