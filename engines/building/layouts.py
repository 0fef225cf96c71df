"""How the resolutions are spread over plans and profiles: `per-resolution`, `shared` or `ranged`.

- `per-resolution`: a plan each, the weights as many times on disk as there are resolutions.
- `shared`: one plan with an exact-size profile for each resolution, the weights once.
- `ranged`: one plan with one profile over all sizes; the runtime specialises its kernels to the size it meets.

The default follows where kernels are chosen. TensorRT chooses them while it builds, for the profile it is given, so
exact profiles (`shared`) are what it can tune. TensorRT-RTX compiles its kernels on the user's GPU, for the shape it
meets there, so one range costs a sixth of the build time and a tenth of the extra disk, and loses nothing that is
decided ahead of time.

A UNet that serves b images sees 2b latents under guidance and b without. A range takes both. An exact profile takes
one, by default the guided: exact in batch too, nine profiles build in two thirds of the time and take less disk. An
unguided call on it works, padded; models made for it (LCM, Turbo) are better built with guidance `never`, and `any`
makes the batch a range again.
"""

from __future__ import annotations

from typing import Literal

from distill.common.errors import UserError
from distill.models.resolution import Resolution
from engines.bundle import Layout, Profile, ShapeRange
from engines.onnx_folder import OnnxComponent

DEFAULT_LAYOUTS: dict[str, Layout] = {"tensorrt": "shared", "tensorrt-rtx": "ranged", "onnxruntime": "ranged"}
UNSIZED = ("text_encoder", "text_encoder_2")
"""Components that do not see the image size: one engine serves every size and layout."""


Guidance = Literal["always", "never", "any"]


def _rows(component: OnnxComponent, batch: int, guidance: Guidance) -> int:
    """What `batch` images are to the component; a static graph takes what it takes, and a call is padded to it."""
    rows = 2 * batch if component.name == "unet" and guidance != "never" else batch
    if component.fixed_rows is not None and rows > component.fixed_rows:
        raise UserError(
            f"{component.model} was exported for {component.fixed_rows} row(s), {batch} image(s) make {rows}; "
            f"export with --batch {batch}, or with --resolutions dynamic"
        )
    return component.fixed_rows or rows


def _least_rows(component: OnnxComponent, batch: int, guidance: Guidance, exact: bool) -> int:
    """The fewest rows that a profile takes without padding."""
    if component.fixed_rows is not None or (exact and component.name == "unet"):
        return _rows(component, batch, "never" if guidance == "any" else guidance)
    return 1


def _shapes(component: OnnxComponent, resolution: Resolution, rows: int) -> dict[str, list[int]]:
    """The shape of every input. Raises UserError where the graph was exported for another size only."""
    shapes = {spec.name: list(spec.shape) for spec in component.input_specs(resolution, rows)}
    for tensor in component.inputs:
        wanted = shapes.get(tensor.name)
        if (
            wanted is None
            or len(tensor.shape) != len(wanted)
            or any(isinstance(side, int) and side != size for side, size in zip(tensor.shape, wanted, strict=True))
        ):
            raise UserError(
                f"{component.model}: input {tensor.name} is {tensor.shape}, for {resolution} and {rows} row(s) it must "
                f"admit {wanted}; export with --resolutions dynamic, or build only the exported size and batch"
            )
    return shapes


def _profile(
    index: int,
    component: OnnxComponent,
    resolutions: list[Resolution],
    batches: tuple[int, int],
    guidance: Guidance,
    exact: bool = False,
) -> Profile:
    """`batches` are the number of images it is tuned for, and the most."""
    widths, heights = zip(*((resolution.width, resolution.height) for resolution in resolutions), strict=True)
    lowest, highest = Resolution(min(widths), min(heights)), Resolution(max(widths), max(heights))
    tuned_batch, batch = batches
    lower = _shapes(component, lowest, _least_rows(component, batch, guidance, exact))
    tuned = _shapes(component, resolutions[0], _rows(component, tuned_batch, guidance))
    upper = _shapes(component, highest, _rows(component, batch, guidance))
    shapes = {name: ShapeRange(min=lower[name], opt=tuned[name], max=upper[name]) for name in upper if upper[name]}
    return Profile(index=index, resolutions=[str(r) for r in resolutions], batch=batch, shapes=shapes)


def plan_profiles(
    component: OnnxComponent,
    layout: Layout,
    resolutions: list[Resolution],
    batches: list[int],
    guidance: Guidance = "always",
) -> list[list[Profile]]:
    """For each plan of the component its profiles."""
    if layout == "ranged" or component.name in UNSIZED:
        return [[_profile(0, component, resolutions, (min(batches), max(batches)), guidance)]]
    groups = [[resolution] for resolution in resolutions] if layout == "per-resolution" else [resolutions]
    return [
        [
            _profile(index, component.at(resolution), [resolution], (batch, batch), guidance, exact=True)
            for index, (resolution, batch) in enumerate((r, b) for r in group for b in batches)
        ]
        for group in groups
    ]
