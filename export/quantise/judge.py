"""What 8 bits cost a mini model: the UNets of several ONNX folders of one checkpoint, held against the first's.

All draw in diffusers' own pipeline with the checkpoint's text encoders and VAE in torch, so that only UNets differ. ONNX
Runtime on the CPU runs them; it has no kernels for fp8 and takes those pairs one by one, as they stand in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.checkpoints.folder import find_family
from distill.checkpoints.load import load_pipeline
from distill.common.errors import UserError, require_least
from distill.common.files import replacing, sha256_json
from distill.common.progress import say, track
from distill.data.shapes import Scene
from distill.mini.judge import GUIDANCE_SCALE, READER, check_pictures, draw_scenes, share_followed
from distill.studies.few_steps import wilson
from export.bench import unet_latency
from export.checks.parity import cpu_session, psnr_db
from export.checks.verify import prepare_again
from export.folder import check_files
from export.job import library_versions
from export.quantise.ranges import unet_hash
from export.records import read_about, read_record

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
SEED = 10_000


class OnnxUNet:
    """A folder's UNet, called as diffusers' pipeline calls the torch one; `calls` keeps what went in and came out of each
    call while it is a list."""

    def __init__(self, folder: Path) -> None:
        self.session = cpu_session(folder / "unet" / "model.onnx", threads=torch.get_num_threads())
        self.calls: list[tuple[dict[str, Tensor], Tensor]] | None = None

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        timestep_cond: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        inputs = {"sample": sample, "timestep": timestep.reshape(1), "encoder_hidden_states": encoder_hidden_states}
        inputs |= added_cond_kwargs or {}
        if timestep_cond is not None:
            inputs["timestep_cond"] = timestep_cond
        noise_pred = self.run(inputs)
        if self.calls is not None:
            self.calls.append(({name: value.clone() for name, value in inputs.items()}, noise_pred))
        return (noise_pred,)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        feeds = {
            value.name: inputs[value.name].numpy().astype(NUMPY_TYPES[value.type])
            for value in self.session.get_inputs()
        }
        return torch.from_numpy(self.session.run(None, feeds)[0].astype(np.float32))


@dataclass(frozen=True)
class Judged:
    """One folder. `step_errors` are those of noise_pred, relative in the 2-norm, on the inputs that the first folder's UNet
    had at each step; `psnr_db` is the least and the median of its pictures that differ from the first's, None where none
    does; `cpu_ms` of one call of two rows on a small picture, one thread."""

    name: str
    precision: str
    unet_bytes: int
    followed: dict[str, float]
    interval: tuple[float, float]
    step_errors: list[float]
    psnr_db: tuple[float, float] | None
    cpu_ms: float


@torch.no_grad()
def judge_folders(
    folders: Sequence[Path],
    checkpoint: Path,
    workdir: Path,
    *,
    count: int,
    steps: int,
    rounds: int,
    guidance_scale: float = GUIDANCE_SCALE,
) -> list[Judged]:
    """`count` pictures of unseen captions by each, over the family's sizes. They are kept under `workdir`, so an interrupted
    run goes on after the last folder.

    Raises UserError for fewer than two folders, unlike ones, and a checkpoint that is none of a mini family's.
    """
    records = _require_alike(folders)
    require_least(1, rounds=rounds)
    if find_family(checkpoint).vocabulary is None:
        raise UserError(
            f"{checkpoint} is of no mini family: only their pictures can be read; bench run takes any model"
        )
    sizes = find_family(checkpoint).resolutions
    check_pictures(count, steps, sizes)
    pipe = load_pipeline(prepare_again(folders[0], checkpoint, workdir), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    graphs = {folder: OnnxUNet(folder) for folder in folders}

    def draw(folder: Path, number: int) -> tuple[list[Scene], list[np.ndarray]]:
        pipe.unet.forward = graphs[folder]
        return draw_scenes(pipe, sizes, number, steps, guidance_scale, SEED)

    errors = _step_errors(folders, graphs, lambda folder: draw(folder, len(sizes)), len(sizes))
    rows: list[Judged] = []
    first: list[np.ndarray] = []
    cpu_ms = unet_latency({folder.name: folder for folder in folders}, checkpoint, rounds)
    for folder, record in zip(track(folders, "pictures", "folder"), records, strict=True):
        key = sha256_json([record["sha256"], count, steps, guidance_scale, READER, library_versions()])[:16]
        scenes, pictures = _kept(workdir / f"pictures-{key}.npz", lambda folder=folder: draw(folder, count))  # type: ignore[misc]
        first = first or pictures
        followed = share_followed(scenes, pictures)
        ratios = [psnr_db(one, other) for one, other in zip(pictures, first, strict=True)]
        unlike = [ratio for ratio in ratios if math.isfinite(ratio)]
        rows.append(
            Judged(
                name=folder.name,
                precision=record.get("quantised", record)["precision"],
                unet_bytes=sum(record["bytes"].values()),
                followed=followed,
                interval=wilson(followed["all"], count),
                step_errors=errors[folder],
                psnr_db=(min(unlike), median(unlike)) if unlike else None,
                cpu_ms=median(cpu_ms[folder.name]),
            )
        )
        say(f"{folder.name}: {followed['all']:.1%} of {count} pictures follow their captions")
    return rows


def _require_alike(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """export.json of each UNet. Raises UserError where one is not whole, or of other weights than the first's."""
    if len(folders) < 2 or len({folder.name for folder in folders}) < len(folders):
        raise UserError("give two folders or more, of different names; the first is what the others are held against")
    records = []
    for folder in folders:
        read_about(folder)
        check_files(folder, ["unet"])
        records.append(read_record(folder / "unet"))
        if records[-1]["graphs"]:
            raise UserError(f"{folder} holds a graph for each size; export with --resolutions dynamic")
        if unet_hash(records[-1]["source_sha256"]) != unet_hash(records[0]["source_sha256"]):
            raise UserError(f"{folder} is of another UNet than {folders[0]}; give folders of one checkpoint")
    return records


def _step_errors(
    folders: Sequence[Path], graphs: Mapping[Path, OnnxUNet], draw: Callable[[Path], Any], sizes: int
) -> dict[Path, list[float]]:
    """Of each folder at each step, root mean square over one picture of each size, on what the first folder's UNet is
    given while it draws them."""
    first = graphs[folders[0]]
    first.calls = []
    draw(folders[0])
    calls, first.calls = first.calls, None
    found = {}
    for folder in folders:
        errors = [_relative(graphs[folder].run(inputs), wanted) for inputs, wanted in calls]
        found[folder] = [float(one) for one in np.sqrt(np.square(errors).reshape(sizes, -1).mean(axis=0))]
    return found


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def _kept(path: Path, draw: Callable[[], tuple[list[Scene], list[np.ndarray]]]) -> tuple[list[Scene], list[np.ndarray]]:
    """Scenes and pictures of an earlier run, or of `draw`."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            captions = arrays["captions"]
            return [Scene.parse(str(one)) for one in captions], [arrays[f"{place}"] for place in range(len(captions))]
    scenes, pictures = draw()
    with replacing(path) as temporary, temporary.open("wb") as file:
        named: dict[str, Any] = {f"{place}": picture for place, picture in enumerate(pictures)}
        np.savez_compressed(file, **named, captions=[scene.caption for scene in scenes])
    return scenes, pictures


def table(rows: Sequence[Judged], pictures: int) -> str:
    """Markdown: a line a folder; bytes, error and time beside the first folder's."""
    first = rows[0]
    lines = [
        "| UNet | bytes | error of noise_pred, first to last step (median) | PSNR, median (least) "
        "| captions followed (95 %) | CPU time of a call |",
        "|---|" + "---:|" * 5,
    ]
    for row in rows:
        errors, psnr = row.step_errors, row.psnr_db
        cells = [
            f"{row.unet_bytes / first.unet_bytes:.2f}",
            f"{errors[0]:.1e} to {errors[-1]:.1e} ({median(errors):.1e})" if row is not first else "",
            f"{psnr[1]:.1f} dB ({psnr[0]:.1f} dB)" if psnr else "" if row is first else "equal",
            f"{round(row.followed['all'] * pictures)} of {pictures} ({row.interval[0]:.0%} to {row.interval[1]:.0%})",
            f"{row.cpu_ms / first.cpu_ms:.2f}",
        ]
        lines.append(f"| {row.name} ({row.precision}) | {' | '.join(cells)} |")
    return "\n".join(lines)
