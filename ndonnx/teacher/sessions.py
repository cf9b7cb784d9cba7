"""How a model becomes an onnxruntime session: quiet, on the cores we may use, on the device asked for.

Everything in this package that runs a model goes through `make_session`, so that a model
that is too large for one protobuf, or that onnxruntime refuses, is met in one place.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _ort

from ndonnx.errors import ModelError, UsageError, first_line
from ndonnx.graph.save import PROTOBUF_LIMIT
from ndonnx.runtime.endless import session_class
from ndonnx.runtime.machine import usable_cores

OrtError: tuple[type[Exception], ...] = (
    _ort.EPFail,
    _ort.Fail,
    _ort.InvalidArgument,
    _ort.InvalidGraph,
    _ort.InvalidProtobuf,
    _ort.NoModel,
    _ort.NoSuchFile,
    _ort.NotImplemented,
    _ort.RuntimeException,
)
"""What onnxruntime raises when it refuses a model or fails in a run; they share no base class."""

REFUSALS: tuple[type[Exception], ...] = (ModelError, *OrtError)
"""What opening or running a slice raises when onnxruntime does not take it."""

_FATAL = 4
_SUFFIX = "ExecutionProvider"
_USUAL = ("cpu", "cuda")


def make_session(
    model: ir.Model | bytes | Path | str,
    *,
    threads: int | None = None,
    device: str = "cpu",
    optimise: bool = True,
    spin: bool = True,
    rest: bool = False,
) -> ort.InferenceSession:
    """Open a model in onnxruntime; a run that may have no end is stopped (`ndonnx.runtime.endless`).

    Args:
        model: an IR model, a serialised one, or the path of a file (external data beside it is found).
        threads: threads inside one operator; None takes the cores of the process's affinity.
        device: `cpu`, `cuda`, or another execution provider of onnxruntime by the beginning of its name (`coreml`).
        optimise: False turns every graph optimisation off.
        spin: False lets idle threads sleep, for when other work shares the cores.
        rest: threads stop to spin once a run is over: for sessions that take turns on the same cores.

    Raises:
        ModelError: onnxruntime refuses the model, or its file cannot be read.
        UsageError: the device is unknown, or onnxruntime cannot use it.
    """
    providers = _providers(device)
    options = _options(threads, optimise, spin, rest)
    if isinstance(model, ir.Model):
        name = f"graph '{model.graph.name or ''}'"
        session = _open_ir(model, name, options, providers)
    elif isinstance(model, bytes):
        session = _open(model, "model", options, providers)
    else:
        session = _open(str(model), str(model), options, providers)
    if providers[0] not in session.get_providers():
        raise UsageError(f"device '{device}': onnxruntime could not start {providers[0]} on this machine; use cpu")
    return session


def _providers(device: str) -> list[str]:
    known = {name.removesuffix(_SUFFIX).lower(): name for name in ort.get_all_providers()}
    here = {short for short, name in known.items() if name in ort.get_available_providers()}
    if device not in known and device not in _USUAL:
        raise UsageError(f"device '{device}': expected one of {', '.join((*_USUAL, *sorted(here.difference(_USUAL))))}")
    if device not in here:
        raise UsageError(
            f"device '{device}': this onnxruntime was built without it; install the build that has it "
            f"(onnxruntime-gpu for cuda), or use {' or '.join(sorted(here))}"
        )
    return [known[device]] if device == "cpu" else [known[device], known["cpu"]]


def _options(threads: int | None, optimise: bool, spin: bool, rest: bool) -> ort.SessionOptions:
    ort.set_default_logger_severity(_FATAL)  # a CUDA library that fails to load is told by us, on one line
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if rest:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _open(model: bytes | str, name: str, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
    try:
        # With its fallback, onnxruntime prints on stdout and goes on with another provider than the one asked for.
        return session_class(model)(model, options, providers=providers, enable_fallback=0)
    except OrtError as error:
        raise ModelError(f"{name}: onnxruntime cannot open the model: {first_line(error)}") from error
    except (RuntimeError, ValueError) as error:  # of the provider's own libraries
        raise UsageError(
            f"{name}: onnxruntime cannot start {providers[0]} on this machine; install what it needs, or use cpu"
        ) from error


def _open_ir(model: ir.Model, name: str, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    external = any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    if not external and sum(tensor.nbytes for tensor in tensors) <= PROTOBUF_LIMIT:
        return _open(ir.to_proto(model).SerializeToString(), name, options, providers)
    # A serialised model would point at external files by a path that onnxruntime cannot resolve
    # without the model's own folder, so the weights are written once more, into a folder of ours.
    with tempfile.TemporaryDirectory(prefix="ndonnx-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "model.onnx")
        try:
            ir.save(model.clone(), path, external_data="model.data")
        except OSError as error:
            raise ModelError(f"{name}: cannot write the model to {folder}: {error.strerror or error}") from error
        return _open(str(path), name, options, providers)


def optimised(model: ir.Model | bytes) -> onnx.ModelProto:
    """The graph that onnxruntime makes of a model on the CPU, with its own fused operators, less the weights.

    Raises:
        ModelError: onnxruntime refuses the model.
    """
    options = _options(1, True, False, False)
    with tempfile.TemporaryDirectory(prefix="ndonnx-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "optimised.onnx")
        options.optimized_model_filepath = str(path)
        if isinstance(model, ir.Model):
            _open_ir(model, f"graph '{model.graph.name or ''}'", options, _providers("cpu"))
        else:
            _open(model, "model", options, _providers("cpu"))
        return onnx.load(path, load_external_data=False)
