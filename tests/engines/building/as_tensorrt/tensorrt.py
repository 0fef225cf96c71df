"""TensorRT-RTX under TensorRT's name, less what TensorRT 10.14 to 11.1 lack by their public headers.

A folder that holds this, put on the path, lets a build of the flavor `tensorrt` run from end to end without a GPU; whatever
it asks for that only TensorRT-RTX has is an AttributeError, as it would be with TensorRT.
"""

from types import SimpleNamespace
from typing import Any

import tensorrt_rtx as _rtx

_RTX_ONLY = ("ComputeCapability", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "EngineValidity")
_RTX_ONLY_FLAGS = ("REQUIRE_USER_ALLOCATION",)

globals().update({name: getattr(_rtx, name) for name in dir(_rtx) if name not in _RTX_ONLY})
__version__ = "11.1.0"
BuilderFlag = SimpleNamespace(
    **{name: flag for name, flag in _rtx.BuilderFlag.__members__.items() if name not in _RTX_ONLY_FLAGS}
)


class Builder(_rtx.Builder):
    """It builds for an A100, since the machine may have no GPU of its own."""

    def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> Any:
        assert config.num_compute_capabilities == 0, "TensorRT has no targets to set"
        assert config.get_preview_feature(_rtx.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10), (
            "a range takes its corner"
        )
        config.num_compute_capabilities = 1
        config.set_compute_capability(_rtx.ComputeCapability.SM80, 0)
        return super().build_serialized_network_to_stream(network, config, writer)
