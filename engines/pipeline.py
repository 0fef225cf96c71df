"""Loads a bundle as a diffusers pipeline: the networks are engines; sampler, scheduler and prompts are diffusers' own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.common.errors import UserError, quiet_imports, require_above
from distill.common.files import read_json
from distill.models.conditioning import conditioning_named
from engines.bundle import Engine, read_manifest, rebuild_command
from engines.choices import TASKS, Layout, Precision, Task
from engines.flavors import LoadOptions
from engines.hub import fetch_files, fetch_manifest, is_hub_id
from engines.integrity import find_faults, unnamed_files
from engines.onnx_folder import OnnxComponent, weights_for
from engines.selection import choose_device, choose_flavor, choose_task, select_engines

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load(
    bundle: str | Path,
    flavor: str | None = None,
    *,
    task: Task | None = None,
    device: str | None = None,
    layout: Layout | None = None,
    precision: Precision | None = None,
    cuda_graphs: bool = True,
    specialization: Literal["eager", "lazy", "none"] | None = None,
    runtime_cache: str | Path | None = None,
    vram_gb: float | None = None,
    weights: str | Path | None = None,
) -> DiffusionPipeline:
    """A diffusers pipeline of the bundle's kind (StableDiffusionXLPipeline for SDXL) whose networks are its engines; that
    of a few-step model has its own steps and guidance scale as defaults.

    bundle: a folder, or the name of a bundle on the Hugging Face hub, `org/name`; of that only the files that are loaded are
    fetched.
    task: what it draws from: "text-to-image", "image-to-image" or "inpaint", by diffusers' class for it; None is the first
    that the model can do, image-to-image of SDXL's refiner; "controlnet",
    "controlnet-image-to-image" and "controlnet-inpaint" under the control of pictures, one for each of its ControlNets.
    device: "cpu" or "cuda[:n]"; None is the flavor's own, and of several GPUs the first that the engines fit.
    layout: which to load where the bundle has several.
    precision: of the UNet where the bundle has several: by default fp16, not int8 or fp8.
    cuda_graphs, specialization, runtime_cache: for TensorRT only; `runtime_cache` is a folder, by default in the bundle.
    vram_gb: what the plans may take of the GPU's memory, in 10^9 bytes, beside CUDA's own: weights leave while others run.
    weights: an ONNX folder of the same architecture, for plans built with --refit or --strip.

    Before a file is opened the manifest is checked, then driver, GPU and version, then the file's hash. Raises UserError
    with what was found, what is needed and the command that rebuilds it, and torch.OutOfMemoryError where the GPU's memory
    is too small.
    """
    quiet_imports()
    import diffusers
    import torch
    from transformers import CLIPTokenizer

    from engines.component import EngineComponent
    from engines.modules.controlnet import EngineControlNet
    from engines.modules.pipelines import bundle_class, drawing_as
    from engines.modules.text_encoder import EngineTextEncoder
    from engines.modules.unet import EngineUNet
    from engines.modules.vae import EngineVAE

    if vram_gb is not None:
        require_above(0, vram_gb=vram_gb)
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device {device!r} is not known: cpu, cuda, cuda:1, … are")
    hub_id = str(bundle) if is_hub_id(bundle) else None
    bundle = fetch_manifest(hub_id) if hub_id else Path(bundle)
    manifest = read_manifest(bundle)
    backend = choose_flavor(manifest, flavor, device)
    chosen_device = choose_device(manifest, backend, device)
    selected = select_engines(manifest, backend, chosen_device, layout, weights is not None, precision)
    chosen = [engine for engines in selected.values() for engine in engines]
    if chosen_device == "cuda":  # the current GPU, which was checked; another thread may have another
        chosen_device = f"cuda:{torch.cuda.current_device()}"
    kind = conditioning_named(manifest.source.pipeline)
    wanted, controlnets = choose_task(kind, task, list(selected), backend.name)
    new_weights = _weights_by_key(chosen, Path(weights)) if weights else {}
    options = LoadOptions(
        device=chosen_device,
        cuda_graphs=cuda_graphs,
        specialization=specialization,
        runtime_cache=Path(runtime_cache) if runtime_cache else bundle / ".runtime-cache",
        vram_bytes=None if vram_gb is None else int(vram_gb * 1e9),
        weights=new_weights,
    )
    backend.check_room(chosen, options)
    owned = [(record, selected["unet"][0]) for record in manifest.files]
    owned += [(record, engine) for engine in chosen for record in engine.files]
    if hub_id:
        fetch_files(hub_id, bundle, [record.path for record, _ in owned])
    records = [(record, f"rebuild it with: {rebuild_command(bundle, engine)}") for record, engine in owned]
    for fault in find_faults(bundle, records) or unnamed_files(bundle, manifest):
        raise UserError(fault)
    shared = backend.open_bundle(options)

    def component(name: str) -> EngineComponent:
        engines = [(engine, backend.load(bundle, engine, shared)) for engine in selected[name]]
        return EngineComponent(engines, chosen_device)

    encoder = component("vae_encoder") if "vae_encoder" in selected else None
    vae = EngineVAE(component("vae_decoder"), read_json(bundle / "vae_decoder/config.json"), encoder)
    unet = EngineUNet(component("unet"), read_json(bundle / "unet/config.json"), vae.image_scale)
    controls = [
        EngineControlNet(component(n), read_json(bundle / n / "config.json"), vae.image_scale) for n in controlnets
    ]
    encoders = {
        name: EngineTextEncoder(component(name), read_json(bundle / name / "config.json")) for name in kind.encoders
    }
    backend.settle(shared)
    tokenizers = {name: CLIPTokenizer.from_pretrained(bundle / name) for name in kind.tokenizers}
    index = read_json(bundle / "model_index.json")
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(bundle / "scheduler")
    stated = {name: index[name] for name in kind.options if not isinstance(index.get(name, []), list)}
    settings = stated | kind.load_options
    if controls:
        settings["controlnet"] = controls if len(controls) > 1 else controls[0]
    name = f"{kind.stem}{TASKS[wanted]}Pipeline"
    pipeline = drawing_as(bundle_class(getattr(diffusers, name), bundle), manifest.source.sampling)
    return pipeline(vae=vae, unet=unet, scheduler=scheduler, **encoders, **tokenizers, **settings)


def refit(pipeline: DiffusionPipeline, onnx: str | Path) -> list[str]:
    """Gives the pipeline's plans the weights of another ONNX folder of the same architecture (a fine-tune, a merged
    LoRA). Nothing is rebuilt; CUDA graphs are captured again. Returns the components it changed.

    Raises UserError where the folder does not fit, and, before anything is changed, where a plan cannot take other weights.
    """
    parts: Any = pipeline
    if getattr(parts, "loras", None):
        raise UserError(f"the LoRAs {', '.join(parts.loras)} are added to the weights: unload_lora_weights() first")
    modules = [part for part in parts.components.values() if hasattr(part, "component")]
    engines = [pair for module in modules for pair in module.engines]
    weights = _weights_by_key([engine for engine, _ in engines], Path(onnx))
    refittable = [
        (engine, loaded) for engine, loaded in engines if engine.options.get("refit") and engine.key in weights
    ]
    for engine, loaded in refittable:
        loaded.refit(weights[engine.key])
    return list(dict.fromkeys(engine.component for engine, _ in refittable))


def _weights_by_key(engines: list[Engine], onnx: Path) -> dict[str, OnnxComponent]:
    """The components of the ONNX folder, by the key of the engine that takes their weights. Raises UserError where the
    folder has none of them, and where an engine cannot take other weights."""
    found = {}
    for engine in engines:
        if (weights := weights_for(engine, onnx)) is None:
            continue
        found[engine.key] = weights
        if not engine.options.get("refit") and not weights.is_source_of(engine):
            raise UserError(
                f"{engine.files[0].path} keeps the weights it was built from, {weights.folder} has others: build with "
                "--flavor tensorrt --refit on the GPU, or build a bundle of its own: "
                f"python -m engines build --onnx {onnx} --out BUNDLE"
            )
    if not found:
        raise UserError(f"{onnx} holds no component of this pipeline; make an ONNX folder with python -m export onnx")
    return found
