"""How the resolutions are spread over plans and profiles: `per-resolution`, `shared` or `ranged`.

- `per-resolution`: a plan each, the weights as many times on disk as there are resolutions.
- `shared`: one plan with an exact-size profile for each resolution, the weights once.
- `ranged`: one plan with one profile over all sizes; the runtime specialises its kernels to the size it meets.

The default follows from where kernels are chosen. TensorRT chooses them while it builds and for the given profile, so it
needs exact profiles (`shared`) to tune for. TensorRT-RTX compiles its kernels on the user's GPU for the shapes it meets
there, so one range (`ranged`) takes a sixth of the build time and a tenth of the extra disk, and should run as fast.

Guidance: for b images the UNet gets 2b latents with guidance, b without. A ranged profile takes both. An exact profile
takes one of them, by default 2b: nine profiles that are exact in the batch too build in two thirds of the time and take less
disk. A call without guidance is then padded. Build models that need none (LCM, Turbo) with guidance `never`; `any` makes
the batch a range.

Where the UNet takes prompts of several lengths (`export onnx --tokens`), every profile is a range over them, tuned for the
shortest.
"""

from __future__ import annotations

from collections.abc import Callable

from distill.common.errors import UserError
from distill.models.resolution import Resolution
from engines.bundle import Profile, ShapeRange
from engines.choices import Guidance, Layout
from engines.onnx_folder import OnnxComponent
from export.components import GUIDED, TEXT_ENCODERS

DEFAULT_LAYOUTS: dict[str, Layout] = {"tensorrt": "shared", "tensorrt-rtx": "ranged", "onnxruntime": "ranged"}


def _rows(component: OnnxComponent, batch: int, guidance: Guidance) -> int:
    """How many rows the component gets for `batch` images. A static graph has a fixed number; calls are padded to it."""
    rows = 2 * batch if component.name in GUIDED and guidance != "never" else batch
    if component.fixed_rows is not None and rows > component.fixed_rows:
        raise UserError(
            f"{component.model} was exported for {component.fixed_rows} row(s), {batch} image(s) make {rows}; "
            f"export with --batch {batch}, or with --resolutions dynamic"
        )
    return component.fixed_rows or rows


def _least_rows(component: OnnxComponent, batch: int, guidance: Guidance, exact: bool) -> int:
    """The fewest rows that a profile takes without padding."""
    if component.fixed_rows is not None or (exact and component.name in GUIDED):
        return _rows(component, batch, "never" if guidance == "any" else guidance)
    return 1


def _shapes(
    component: OnnxComponent, resolution: Resolution, rows: int, pick: Callable[[list[int]], int] = min
) -> dict[str, list[int]]:
    """The shape of every input; `pick` as `OnnxComponent.input_specs` has it. Raises UserError where the graph
    was exported for another size only."""
    shapes = {spec.name: list(spec.shape) for spec in component.input_specs(resolution, rows, pick)}
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
    upper = _shapes(component, highest, _rows(component, batch, guidance), max)
    shapes = {name: ShapeRange(min=lower[name], opt=tuned[name], max=upper[name]) for name in upper if upper[name]}
    return Profile(index=index, resolutions=[str(r) for r in resolutions], batch=batch, shapes=shapes)


def make_profiles(
    component: OnnxComponent,
    layout: Layout,
    resolutions: list[Resolution],
    batches: list[int],
    guidance: Guidance = "always",
) -> list[list[Profile]]:
    """The profiles of each plan of the component."""
    if layout == "ranged" or component.name in TEXT_ENCODERS:
        return [[_profile(0, component, resolutions, (min(batches), max(batches)), guidance)]]
    groups = [[resolution] for resolution in resolutions] if layout == "per-resolution" else [resolutions]
    return [
        [
            _profile(index, component.at(resolution), [resolution], (batch, batch), guidance, exact=True)
            for index, (resolution, batch) in enumerate((r, b) for r in group for b in batches)
        ]
        for group in groups
    ]
