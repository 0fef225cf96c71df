"""Which layers may go into 8 bits within a bound on noise_pred: measured, layer by layer.

Each layer's own error is that of noise_pred when it alone is rounded, on calls of the UNet that the pipeline makes while
it draws. Ranked by it, the layers go in from the least harmful on, and the longest such row whose *joint* error stays
within the bound is found by halving: errors of single layers do not simply add up, so the joint one is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from distill.checkpoints.load import load_pipeline
from distill.common.errors import UserError, require_above
from distill.common.files import read_object, replacing, sha256_json, write_json
from distill.common.progress import track
from export.job import library_versions
from export.quantise.calibrate import Drawing
from export.quantise.fake import rounded
from export.quantise.layers import PRECISIONS, find_layers
from export.quantise.ranges import Ranges
from export.quantise.scales import find_scales

RANKING = ("sensitivity.json", "sensitivity.svg")
PROMPTS = 2
"""Prompts whose calls are looked at: of each the first, the middle and the last step."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """`errors` are of each layer alone, the least first; `low` how many of them go into 8 bits, `error` what these do
    together; all relative, in the 2-norm of noise_pred, root mean square over the `calls`."""

    precision: str
    max_error: float
    errors: dict[str, float]
    low: int
    error: float
    calls: int

    @property
    def kept(self) -> tuple[str, ...]:
        """The layers that stay in half precision."""
        return tuple(self.errors)[self.low :]


def largest_row(count: int, error_of: Callable[[int], float], bound: float) -> tuple[int, float]:
    """The largest number up to `count` whose error is within `bound`, by halving, and that error; 0 where none is."""
    low, found, high = 0, 0.0, count
    while low < high:
        middle = (low + high + 1) // 2
        if (error := error_of(middle)) <= bound:
            low, found = middle, error
        else:
            high = middle - 1
    return low, found


@torch.no_grad()
def find_sensitivity(
    onnx: Path,
    checkpoint: Path,
    ranges: Ranges,
    drawing: Drawing,
    recipe: Mapping[str, Any],
    max_error: float,
    workdir: Path,
) -> Sensitivity:
    """On the CPU in fp32. Errors of single layers are kept under `workdir`, for other bounds too, and an interrupted run
    goes on after the last. Raises UserError where no layer at all stays within the bound."""
    require_above(0, max_error=max_error)
    precision = PRECISIONS[recipe["precision"]]
    layers = find_layers(ir.load(onnx / "unet" / "model.onnx").graph, recipe["keep"])
    scales = find_scales(layers, ranges, precision, recipe["alpha"], recipe["percentile"])
    pipe = load_pipeline(checkpoint, torch.float32, without=("vae",))
    calls = _record_calls(pipe, drawing)
    exact = [_outputs(pipe.unet, call) for call in calls]

    def error_of(names: Sequence[str]) -> float:
        inside: AbstractContextManager[None] = rounded(pipe.unet, scales, names, precision)
        with inside:
            got = [_outputs(pipe.unet, call) for call in calls]
        squares = [
            _relative(one, other) ** 2
            for outputs, wanted in zip(got, exact, strict=True)
            for one, other in zip(outputs, wanted, strict=True)
        ]
        return float(sum(squares) / len(squares)) ** 0.5

    names = [layer.name for layer in layers]
    key = sha256_json([ranges.sha256, drawing.about, recipe, names, library_versions()])[:16]
    kept = workdir / f"sensitivity-{key}.json"
    alone: dict[str, float] = read_object(kept) if kept.is_file() else {}
    for name in track([name for name in names if name not in alone], "sensitivity", "layer", len(alone)):
        alone[name] = error_of([name])
        write_json(kept, alone)
    errors = dict(sorted(alone.items(), key=lambda item: item[1]))
    low, error = largest_row(len(errors), lambda count: error_of(tuple(errors)[:count]), max_error)
    if not low:
        raise UserError(
            f"--max-error {max_error}: no layer stays within it in {precision.name}, the least harmful one alone makes "
            f"{min(errors.values()):.1e}; allow more, or stay with fp16"
        )
    return Sensitivity(
        precision=precision.name, max_error=max_error, errors=errors, low=low, error=error, calls=sum(map(len, exact))
    )


def _record_calls(pipe: Any, drawing: Drawing) -> list[dict[str, Any]]:
    """Arguments of the UNet's calls at the first, the middle and the last step of the first prompts, those of a prompt as
    one call: a narrow UNet takes hardly longer for it."""
    seen: list[dict[str, Any]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("sample", "timestep", "encoder_hidden_states")
        call = dict(zip(names, args, strict=False)) | kwargs | {"return_dict": False}
        seen.append({name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()})

    pipe.set_progress_bar_config(disable=True)
    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    calls = []
    for index, prompt in enumerate(drawing.prompts[:PROMPTS]):
        drawing.draw(pipe, index, prompt)
        calls.append(_joined([seen[place] for place in sorted({0, len(seen) // 2, len(seen) - 1})]))
        seen.clear()
    hook.remove()
    return calls


def _joined(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One call with the rows of all; their number is kept as `calls`."""
    rows = len(calls[0]["sample"])

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {name: join([value[name] for value in values]) for name in values[0]}
        if not isinstance(values[0], Tensor):
            return values[0]
        return torch.cat([value.expand(rows) if value.dim() == 0 else value for value in values])

    return {name: join([call[name] for call in calls]) for name in calls[0]} | {"calls": len(calls)}


def _outputs(unet: Any, call: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """noise_pred of each of the calls that were joined."""
    arguments = {name: value for name, value in call.items() if name != "calls"}
    return tuple(unet(**arguments)[0].chunk(call["calls"]))


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def write_sensitivity(out: Path, found: Sensitivity) -> None:
    """`RANKING`: the figures, and a plot of them."""
    write_json(out / RANKING[0], asdict(found) | {"errors": list(found.errors.items())})
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    values, places = list(found.errors.values()), range(1, len(found.errors) + 1)
    kept = len(values) - found.low
    for part, colour, label in (
        (slice(0, found.low), "#4477aa", f"{found.precision}: {found.low}"),
        (slice(found.low, None), "#cc6677", f"half precision: {kept}"),
    ):  # an area, which stays small on the disk where bars would be one path a layer
        axes.fill_between(places[part], values[part], values[0] / 2, step="mid", color=colour, linewidth=0, label=label)
    axes.axhline(found.max_error, color="black", linewidth=0.8, linestyle="--", label=f"bound {found.max_error:g}")
    axes.axhline(
        found.error, color="#4477aa", linewidth=0.8, label=f"all in {found.precision} together {found.error:.2g}"
    )
    axes.set(yscale="log", xlabel="layers, the least harmful first", ylabel="relative error of noise_pred, each alone")
    axes.annotate(
        tuple(found.errors)[-1], (len(values), values[-1]), ha="right", fontsize=7, xytext=(-10, 0),
        textcoords="offset points",
    )  # fmt: skip
    axes.legend(fontsize=8)
    with replacing(out / RANKING[1]) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)
