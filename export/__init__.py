"""What a component is, and its graph: a diffusers checkpoint becomes an ONNX folder in optimum's layout."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "components": ["COMPONENTS", "Component", "TensorSpec"],
        "folder": ["export_checkpoint"],
        "job": ["ExportOptions"],
        "checks.verify": ["verify_folder"],
    },
)
