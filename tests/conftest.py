"""Settings of the whole test suite."""

from __future__ import annotations

from hypothesis import settings

# A busy machine must not fail a property: no test has a time limit.
settings.register_profile("ndonnx", deadline=None)
settings.load_profile("ndonnx")
