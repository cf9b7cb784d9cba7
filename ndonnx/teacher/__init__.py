"""The teacher at work: onnxruntime sessions, one sweep of capture, and the store it fills."""

from __future__ import annotations

from ndonnx.teacher.capture import CaptureSettings, capture, input_type
from ndonnx.teacher.sessions import make_session
from ndonnx.teacher.sizes import capture_bytes
from ndonnx.teacher.store import ActivationStore, StoreWriter

__all__ = [
    "ActivationStore",
    "CaptureSettings",
    "StoreWriter",
    "capture",
    "capture_bytes",
    "input_type",
    "make_session",
]
