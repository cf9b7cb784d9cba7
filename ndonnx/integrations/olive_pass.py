"""A pass of Microsoft Olive that compresses the model, to stand before Olive's own quantisation (extra `olive`).

    python -m ndonnx.integrations.olive_pass > olive_package.json
    olive run --config workflow.json --package-config olive_package.json

Olive finds passes by its package configuration, which the first line prints with this pass beside Olive's own.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ndonnx.api.compress import compress
from ndonnx.errors import UsageError

try:
    from olive.common.config_utils import validate_config
    from olive.data.config import DataConfig
    from olive.model import ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
except (ImportError, RuntimeError) as missing:  # a torchvision of another torch raises the latter
    raise ImportError(f"Olive cannot be imported ({missing}); pip install 'ndonnx-compress[olive]'") from missing

logger = logging.getLogger(__name__)


class NdonnxCompress(Pass):  # type: ignore[misc, unused-ignore]
    """Neighbourhood distillation of an ONNX model; see `ndonnx.compress`."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        """What a workflow may say of this pass."""
        del accelerator_spec
        return {
            "data": PassConfigParam(
                type_=str | None,
                default_value=None,
                description="Unlabelled inputs: .npz, .npy, .parquet, a folder of images, or module:function.",
            ),
            "data_config": PassConfigParam(
                type_=DataConfig | dict | None,
                default_value=None,
                description="The same as one of Olive's data configs, as quantisation takes it; labels are left out.",
            ),
            "recipe": PassConfigParam(
                type_=str | dict | None,
                default_value=None,
                description="Path of a recipe in TOML, or its keys: {'keep': 0.5, 'steps': 1000}.",
            ),
            "run_dir": PassConfigParam(
                type_=str | None,
                default_value=None,
                description="Folder in which the run keeps its state, to continue from. None: a temporary one.",
            ),
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        """Compress one model.

        Raises:
            UsageError: ndonnx refuses the model, the data or the recipe, or both kinds of data are given.
        """
        output = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        with tempfile.TemporaryDirectory() as scratch:
            result = compress(
                model.model_path,
                data=_data(config),
                recipe=config.recipe,
                output=output,
                run_dir=config.run_dir or Path(scratch) / "run",
            )
        found = result.report
        logger.info("ndonnx: %d of %d parameters are left", found.student.parameters, found.teacher.parameters)
        # A folder and a name would be needed for weights beside the file only, and Olive then takes a file of that name
        # in the working directory for it.
        if any(output.parent.glob(f"{output.name}?*")):
            return ONNXModelHandler(model_path=str(output.parent), onnx_file_name=output.name)
        return ONNXModelHandler(model_path=str(output))


def _data(config: Any) -> str | Iterator[Any] | None:
    """What the pass was given to distil on, as `compress` takes it."""
    if config.data is not None and config.data_config is not None:
        raise UsageError("NdonnxCompress: both 'data' and 'data_config' are given; leave one out")
    if config.data_config is None:
        return None if config.data is None else str(config.data)
    loader = validate_config(config.data_config, DataConfig).to_data_container().create_dataloader()
    return (batch[0] if isinstance(batch, tuple | list) else batch for batch in loader)


def package_config() -> dict[str, Any]:
    """Olive's own package configuration, with this pass in it: the `package_config` of `olive.workflows.run`."""
    own = Path(OlivePackageConfig.get_default_config_path())
    found: dict[str, Any] = json.loads(own.read_text(encoding="utf-8"))
    found["passes"]["NdonnxCompress"] = {
        "module_path": f"{_MODULE}.NdonnxCompress",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
        "dataset": "dataset_optional",
    }
    return found


_MODULE = "ndonnx.integrations.olive_pass"
"""Where this file is imported from; it has another name when it is run."""


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=2))
