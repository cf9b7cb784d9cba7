"""A finished run as a page that a reviewer can read, print and sign, and as a short table for a pull request."""

from __future__ import annotations

from ndonnx.report.receipt.document import RunDocument, read_run
from ndonnx.report.receipt.markdown import markdown
from ndonnx.report.receipt.page import page

__all__ = ["RunDocument", "markdown", "page", "read_run"]
