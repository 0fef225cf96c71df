"""A finished ONNX folder against the checkpoint it was made from, component by component, in every resolution."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from distill.checkpoints.folder import file_hashes
from distill.checkpoints.load import load_component
from distill.checkpoints.sources import WORKDIR
from distill.common.errors import UserError, require_least, unknown
from distill.common.files import read_object, sha256_file, sha256_json
from distill.models.resolution import Resolution
from export.checkpoint.prepare import prepare
from export.checks.parity import Parity, compare
from export.components import COMPONENTS, TEXT_ENCODERS
from export.job import weights_hashes
from export.prompts import some_text
from export.records import read_about, read_record


def verify_folder(
    folder: Path,
    checkpoint: Path,
    *,
    components: Sequence[str] = (),
    sizes: Sequence[Resolution] = (),
    batch: int = 2,
    seed: int | None = None,
    workdir: Path = WORKDIR,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Parity]]:
    """Compares every component of an ONNX folder with its checkpoint, in `sizes` or every resolution of slimxl.json.

    `progress` is told every comparison as it is done. A component that fails is renamed to NAME.failed.

    Raises UserError where the checkpoint, a LoRA or the VAE is another one than the folder was made from, and where a
    component failed before or there is none.
    """
    from export.graph.wrappers import TORCH_DTYPES, wrap

    require_least(1, batch=batch)
    seed = secrets.randbits(31) if seed is None else seed
    about = read_about(folder)
    chosen = _choose_components(folder, components)
    prepared = prepare_again(folder, checkpoint, workdir)
    results: dict[str, list[Parity]] = {}
    for name in chosen:
        export, config = read_record(folder / name), read_object(folder / name / "config.json")
        network = load_component(prepared, COMPONENTS[name].source, TORCH_DTYPES[export["precision"]])
        module = wrap(name, network)
        resolutions = list(sizes) or [Resolution.parse(text) for text in about["resolutions"]]
        if name in TEXT_ENCODERS:
            resolutions = resolutions[:1]
        graphs: dict[str, list[Resolution]] = {}
        for resolution in resolutions:
            if name in TEXT_ENCODERS:
                graphs["model.onnx"] = [resolution]
                continue
            if export["graphs"] and str(resolution) not in export["graphs"]:
                raise unknown("resolution of this folder's static graphs", str(resolution), export["graphs"])
            graphs.setdefault(export["graphs"].get(str(resolution), "model.onnx"), []).append(resolution)
        batches = [batch if export["dynamic"] else export["inputs"][0]["shape"][0]]
        results[name] = []
        quantised = export.get("quantised")
        real = {"bound": quantised["precision"], "text": some_text(prepared)} if quantised else {}
        for file, fitting in graphs.items():
            model = folder / name / file
            for parity in compare(name, model, module, config, fitting, batches, export["precision"], seed, **real):
                results[name].append(parity)
                progress(f"{name}: {parity}")
        if not all(parity.passed for parity in results[name]):
            failed = folder / f"{name}.failed"
            shutil.rmtree(failed, ignore_errors=True)  # of an earlier verify
            (folder / name).replace(failed)
    return results


def _choose_components(folder: Path, components: Sequence[str]) -> Sequence[str]:
    """Those named, or every one of the folder. Raises UserError where there is none, and for one that failed before."""
    present = [name for name in COMPONENTS if (folder / name / "export.json").is_file()]
    for name in components or COMPONENTS:
        if name not in present and (folder / f"{name}.failed").is_dir():
            raise UserError(
                f"{folder} has no {name}: it disagreed with torch before and is {name}.failed now; export it again, with "
                "--opset 18 or --precision fp32"
            )
        if components and name not in present:
            raise unknown("component of this folder", name, present)
    if not present:
        raise UserError(f"{folder} holds no component to compare; export it again")
    return components or present


def prepare_again(folder: Path, checkpoint: Path, workdir: Path) -> Path:
    """The checkpoint as it was exported. Raises UserError where it, a LoRA or the VAE is another one now."""
    about, hashes = read_about(folder), file_hashes(checkpoint)
    if sha256_json(hashes) != about["source"]["sha256"]:
        made_from = about["source"]["name"]
        raise UserError(f"{folder} was made from {made_from}, not from {checkpoint}; give its own --model")
    again = f"changed since {folder} was made; put back what was there, or export again"
    loras = [(Path(lora["file"]), lora["scale"]) for lora in about["loras"]]
    for (path, _), lora in zip(loras, about["loras"], strict=True):
        if path.is_file() and sha256_file(path) != lora["sha256"]:
            raise UserError(f"the LoRA {path} {again}")
    prepared, hashes = prepare(
        checkpoint, hashes, about["vae"]["identity"], loras, about.get("controlnets", []), workdir
    )
    if list(weights_hashes(prepared, "vae", hashes, about["vae"]["precision"]).values()) != about["vae"]["sha256"]:
        raise UserError(f"the VAE {about['vae']['identity']} {again}")
    return prepared
