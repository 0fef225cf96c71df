"""The builder's switches, as a command states them."""

from __future__ import annotations

from distill.common.errors import UserError
from engines.bundle import Options
from engines.gpus import gpu_at_hand


def builder_options(
    flavor: str,
    refit: bool = False,
    strip: bool = False,
    version_compatible: bool = False,
    hardware_compatible: str = "none",
) -> Options:
    """The options that are switched on. Raises UserError for those that this flavor or machine does not have."""
    switches = {"refit": refit, "strip": strip, "version_compatible": version_compatible}
    options: Options = {name: True for name, on in switches.items() if on}
    if hardware_compatible != "none":
        options["hardware_compatible"] = hardware_compatible
    if flavor != "tensorrt" and (version_compatible or "hardware_compatible" in options):
        raise UserError(
            f"--version-compatible and --hardware-compatible belong to --flavor tensorrt, not {flavor}; "
            "a tensorrt-rtx plan serves several GPUs by naming them: --gpus rtx"
        )
    if (refit or strip) and flavor == "tensorrt-rtx" and gpu_at_hand() is None:
        raise UserError(
            "--refit and --strip need a GPU while building, found none (TensorRT-RTX compiles such plans on it); build"
            " on a machine with one, or without them"
        )
    return options
