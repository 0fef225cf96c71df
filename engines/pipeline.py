"""A bundle as a diffusers pipeline: sampler, scheduler and prompts stay diffusers' own, the nets are engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.common.errors import UserError
from distill.common.files import read_json
from engines.building.layouts import DEFAULT_LAYOUTS
from engines.bundle import (
    Engine,
    Layout,
    Manifest,
    checked_path,
    read_manifest,
    rebuild_command,
    unnamed_files,
)
from engines.flavors import FLAVORS, Flavor, LoadOptions, find_flavor
from engines.onnx_folder import OnnxComponent, weights_for

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

REQUIRED = ("unet", "vae_decoder", "text_encoder", "text_encoder_2")


def choose_flavor(manifest: Manifest, flavor: str | None, device: str | None = None) -> Flavor:
    """The named flavor, or the first of tensorrt, tensorrt-rtx, onnxruntime that the bundle has and this machine runs.

    Raises UserError where there is none; it then says why for each.
    """
    if flavor is not None:
        found = find_flavor(flavor)
        if flavor not in manifest.flavors:
            raise UserError(
                f"the bundle has no {flavor} engines, it has {', '.join(manifest.flavors) or 'none'}; "
                f"add them with: python -m engines build --onnx ONNX --out BUNDLE --flavor {flavor}"
            )
        return found
    reasons = []
    for name in FLAVORS:
        if name not in manifest.flavors:
            continue
        candidate = find_flavor(name)
        try:
            select_engines(manifest, candidate, device or candidate.default_device())
            return candidate
        except UserError as error:
            reasons.append(str(error))
    raise UserError("; ".join(reasons) or "the bundle has no engines; build some with python -m engines build")


def select_engines(
    manifest: Manifest, flavor: Flavor, device: str, layout: str | None = None, with_weights: bool = False
) -> dict[str, list[Engine]]:
    """For each component the engines of this flavor that fit the device, in one layout: the named one (only the UNet
    must have it), else the one that serves most sizes, else the flavor's default. Built with --refit, where weights
    are given and there are such; else not with --strip, where there are others.

    Raises UserError where one is missing or where what is there does not fit GPU, driver or version: nothing has been
    opened by then.
    """
    selected: dict[str, list[Engine]] = {}
    refusal: UserError | None = None
    for engine in manifest.engines:
        if engine.flavor != flavor.name:
            continue
        try:
            flavor.check_load(engine, device)
        except UserError as error:
            refusal = error
            continue
        selected.setdefault(engine.component, []).append(engine)
    missing = [name for name in REQUIRED if name not in selected]
    if missing:
        raise refusal or UserError(
            f"the bundle has no {flavor.name} engine for {', '.join(missing)}; build it with: python -m engines build "
            f"--onnx ONNX --out BUNDLE --flavor {flavor.name} --components {','.join(missing)}"
        )
    return {name: _best(engines, flavor.name, layout, with_weights) for name, engines in selected.items()}


def _best(engines: list[Engine], flavor: str, layout: str | None, with_weights: bool) -> list[Engine]:
    """Weights are held once for each plan, so none is loaded that serves only what others do; of two that serve the
    same, the newer stays."""
    layouts = {engine.layout for engine in engines}
    if layout and engines[0].component == "unet" and layout not in layouts:
        raise UserError(
            f"the bundle's unet has no engine in layout {layout}, it has {', '.join(sorted(layouts))}; "
            f"add it with: python -m engines build --onnx ONNX --out BUNDLE --layout {layout}"
        )
    engines = [engine for engine in engines if engine.layout == layout] or engines
    able = [e for e in engines if (e.options.get("refit") if with_weights else not e.options.get("strip"))]
    engines = able or engines

    def worth(name: str) -> tuple[int, bool]:
        sizes = {text for engine in engines if engine.layout == name for text in engine.resolutions}
        return len(sizes), name == DEFAULT_LAYOUTS[flavor]

    chosen = max((engine.layout for engine in engines), key=worth)
    engines = [engine for engine in engines if engine.layout == chosen]
    kept: list[Engine] = []
    for position, engine in enumerate(engines):  # the manifest names the oldest first
        others = [profile for other in (*kept, *engines[position + 1 :]) for profile in other.profiles]
        if not all(any(other.covers(profile) for other in others) for profile in engine.profiles):
            kept.append(engine)
    return kept


def _weights_by_key(engines: list[Engine], onnx: Path) -> dict[str, OnnxComponent]:
    """What the ONNX folder holds for the engines. Raises UserError where that is nothing for any, or other weights for
    one that cannot take them."""
    found = {}
    for engine in engines:
        if (weights := weights_for(engine, onnx)) is None:
            continue
        found[engine.key] = weights
        if not engine.options.get("refit") and not weights.made(engine):
            raise UserError(
                f"{engine.files[0].path} keeps the weights it was built from, {weights.folder} has others: build with "
                "--flavor tensorrt --refit on the GPU, or build a bundle of its own: "
                f"python -m engines build --onnx {onnx} --out BUNDLE"
            )
    if not found:
        raise UserError(f"{onnx} holds no component of this pipeline; make an ONNX folder with python -m export onnx")
    return found


def refit(pipeline: StableDiffusionXLPipeline, onnx: str | Path) -> list[str]:
    """Gives the pipeline's plans the weights of another ONNX folder of the same architecture (a fine-tune, a merged
    LoRA), in place: nothing is rebuilt, CUDA graphs are captured anew. Returns the components it changed.

    Raises UserError, before anything is changed, where the folder has other weights for a plan that cannot take them;
    and where it does not fit.
    """
    parts: Any = pipeline
    modules = (parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2)
    engines = [pair for module in modules for pair in module.component.engines]
    weights = _weights_by_key([engine for engine, _ in engines], Path(onnx))
    able = [(engine, loaded) for engine, loaded in engines if engine.options.get("refit") and engine.key in weights]
    for engine, loaded in able:
        loaded.refit(weights[engine.key])
    return list(dict.fromkeys(engine.component for engine, _ in able))


def load(
    bundle: str | Path,
    flavor: str | None = None,
    *,
    device: str | None = None,
    layout: Layout | None = None,
    cuda_graphs: bool = True,
    specialization: Literal["eager", "lazy", "none"] | None = None,
    runtime_cache: str | Path | None = None,
    weights: str | Path | None = None,
) -> StableDiffusionXLPipeline:
    """A diffusers StableDiffusionXLPipeline whose unet, vae and text encoders are the bundle's engines.

    `device` is "cpu" or "cuda[:n]"; None takes the flavor's own; `layout` matters where the bundle has several.
    `cuda_graphs`, `specialization` and `runtime_cache` (a folder, by default inside the bundle) concern TensorRT only;
    `weights` is an ONNX folder of the same architecture whose weights replace those of plans built with --refit or
    --strip. Everything is verified before it is opened: the manifest, then driver, GPU and version, then each file's
    hash. Raises UserError with what was found, what is needed and the command that mends it, and torch.OutOfMemoryError
    where the GPU has no room for it.
    """
    import diffusers
    import torch
    from transformers import CLIPTokenizer

    from engines.modules import EngineComponent, EngineTextEncoder, EngineUNet, EngineVAE

    bundle = Path(bundle)
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device {device!r} is not known: cpu, cuda, cuda:1, … are")
    manifest = read_manifest(bundle)
    backend = choose_flavor(manifest, flavor, device)
    place = device or backend.default_device()
    selected = select_engines(manifest, backend, place, layout, weights is not None)
    chosen = [engine for engines in selected.values() for engine in engines]
    if place == "cuda":  # the one that was checked, whichever is current in the thread that draws
        place = f"cuda:{torch.cuda.current_device()}"
    new_weights = _weights_by_key(chosen, Path(weights)) if weights else {}
    mend = f"mend it with: {rebuild_command(bundle, selected['unet'][0])}"
    for record in manifest.files:
        checked_path(bundle, record, mend)
    for fault in unnamed_files(bundle, manifest):
        raise UserError(fault)
    cache = Path(runtime_cache) if runtime_cache else bundle / ".runtime-cache"
    options = LoadOptions(
        device=place,
        cuda_graphs=cuda_graphs,
        specialization=specialization,
        runtime_cache=cache,
        weights=new_weights,
    )
    shared = backend.open_bundle(bundle, options)

    def component(name: str) -> EngineComponent:
        engines = [(engine, backend.load(bundle, engine, shared)) for engine in selected[name]]
        return EngineComponent(engines, place)

    vae = EngineVAE(component("vae_decoder"), read_json(bundle / "vae_decoder/config.json"))
    unet = EngineUNet(component("unet"), read_json(bundle / "unet/config.json"), vae.image_scale)
    first = EngineTextEncoder(component("text_encoder"), read_json(bundle / "text_encoder/config.json"))
    second = EngineTextEncoder(component("text_encoder_2"), read_json(bundle / "text_encoder_2/config.json"))
    index = read_json(bundle / "model_index.json")
    scheduler = getattr(diffusers, index["scheduler"][1])
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=CLIPTokenizer.from_pretrained(bundle / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(bundle / "tokenizer_2"),
        unet=unet,
        scheduler=scheduler.from_pretrained(bundle / "scheduler"),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
        add_watermarker=False,
    )
    return pipeline
