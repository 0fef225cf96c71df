"""Where a checkpoint comes from. Every room is given a source and gets a local diffusers folder.

org/name              a Hugging Face model id
path/to/folder        a diffusers StableDiffusionXLPipeline folder
path/to/file.safetensors   a single-file checkpoint (as ZavyChromaXL and JuggernautXL ship)
random:NAME           an architecture of the catalogue at its true size with random weights (nothing to download)
mini:sdxl             the mini teacher that ships with the package
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.architectures import ARCHITECTURES, SDXL_FAMILY, Architecture, Depth, find_architecture
from distill.errors import UserError, unknown
from distill.files import replacing, require_free_disk, sha256_file, sha256_json

if TYPE_CHECKING:
    import torch

MINI_TEACHER = Path(__file__).parent / "mini" / "teacher"
COMPONENT_FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2")
FORMS = "a Hugging Face id, a diffusers folder, a single .safetensors file, random:NAME or mini:sdxl"


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor's bytes lie: `start`..`end` are offsets in `file`; `dtype` is safetensors' name for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors_header(path: Path) -> dict[str, TensorRecord]:
    """The tensors of one file, from its header alone. Raises UserError for a truncated or foreign file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is no whole safetensors file ({size} bytes): truncated? fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path} has no safetensors header: damaged or of another format") from None
    begin = 8 + length
    records = {
        key: TensorRecord(
            path, entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"])
        )
        for key, entry in header.items()
        if key != "__metadata__"
    }
    needed = max((record.end for record in records.values()), default=begin)
    if needed != size:
        raise UserError(f"{path} holds {size} bytes where its header says {needed}: truncated? fetch it again")
    return records


def component_weights(folder: Path) -> list[Path]:
    """The safetensors files of a component folder: the plain ones, or where there are none the fp16 variant's.

    Raises UserError where there is none at all.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if ".fp16" not in file.name]
    if not files:
        raise UserError(f"{folder} holds no .safetensors weights (pickled .bin weights are not read)")
    return plain or files


def component_tensors(folder: Path) -> dict[str, TensorRecord]:
    """All tensors of a component folder, over its shards."""
    return {key: record for file in component_weights(folder) for key, record in read_safetensors_header(file).items()}


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """config.json of a component. Raises UserError where it is missing or not JSON."""
    path = folder / component / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} is no SDXL checkpoint: {component}/config.json is missing or not JSON") from None


def check_checkpoint(folder: Path) -> None:
    """Raises UserError, with what is missing, where `folder` is no whole SDXL-format diffusers pipeline."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no SDXL checkpoint: it has no model_index.json; allowed are {FORMS}")
    unet = read_config(folder, "unet")
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(
            f"{folder} is no SDXL checkpoint: its UNet has addition_embed_type {unet.get('addition_embed_type')!r}, SDXL "
            "has 'text_time'"
        )
    for component in COMPONENT_FOLDERS:
        read_config(folder, component)
        component_tensors(folder / component)


def checkpoint_hash(folder: Path) -> str:
    """sha256 over the configs and weights of the four networks: equal content, equal hash, whatever the file dates."""
    files = {
        f"{component}/{path.name}": sha256_file(path)
        for component in COMPONENT_FOLDERS
        for path in [folder / component / "config.json", *component_weights(folder / component)]
    }
    return sha256_json(files)


def find_architecture_of(folder: Path) -> Architecture:
    """The catalogue's architecture whose UNet config matches the checkpoint's; a custom one where only the depth
    differs. Raises UserError for widths of neither family."""
    config = read_config(folder, "unet")
    depth = Depth.from_config(config)
    widths = tuple(config["block_out_channels"])
    for architecture in ARCHITECTURES.values():
        if tuple(architecture.family.unet["block_out_channels"]) == widths and architecture.depth == depth:
            return architecture
    for architecture in ARCHITECTURES.values():
        if tuple(architecture.family.unet["block_out_channels"]) == widths:
            return Architecture(name=str(depth), family=architecture.family, depth=depth)
    raise UserError(f"{folder}: UNet widths {widths} belong to no family of the catalogue")


def load_component(folder: Path, component: str, dtype: torch.dtype) -> Any:
    """One network of a checkpoint folder in eval mode: `unet`, `vae`, `text_encoder` or `text_encoder_2`."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes: dict[str, Any] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderTiny if read_config(folder, "vae").get("_class_name") == "AutoencoderTiny" else AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    variant = "fp16" if ".fp16" in component_weights(folder / component)[0].name else None
    return classes[component].from_pretrained(folder / component, torch_dtype=dtype, variant=variant).eval()


def load_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """The whole checkpoint folder as a diffusers StableDiffusionXLPipeline on the CPU."""
    import diffusers
    from diffusers import StableDiffusionXLPipeline

    diffusers.utils.logging.disable_progress_bar()
    components = {component: load_component(folder, component, dtype) for component in COMPONENT_FOLDERS}
    return StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype, add_watermarker=False, **components)


def resolve(source: str, workdir: Path) -> Path:
    """The local diffusers folder of `source`; what has to be made or converted is kept under `workdir`.

    Raises UserError for an unknown name, a folder that is no SDXL checkpoint, a truncated file, or an unreachable hub.
    """
    kind, colon, name = source.partition(":")
    if colon and kind == "random":
        folder = _random_checkpoint(name, workdir)
    elif colon and kind == "mini":
        if name != "sdxl":
            raise unknown("mini checkpoint", name, ["sdxl"])
        folder = MINI_TEACHER
    elif source.endswith(".safetensors"):
        folder = _converted_single_file(Path(source), workdir)
    elif Path(source).is_dir():
        folder = Path(source)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        folder = _downloaded(source)
    else:
        raise UserError(f"model {source!r} is neither a folder nor a known form; allowed are {FORMS}")
    check_checkpoint(folder)
    return folder


def _downloaded(repo_id: str) -> Path:
    from diffusers import StableDiffusionXLPipeline
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(StableDiffusionXLPipeline.download(repo_id, use_safetensors=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {repo_id!r} is no local folder and cannot be had from the Hugging Face hub ({reason}); "
            "check the name and the network, or give a local folder"
        ) from None


def _converted_single_file(path: Path, workdir: Path) -> Path:
    from diffusers import StableDiffusionXLPipeline

    if not path.is_file():
        raise UserError(f"model {str(path)!r} does not exist; allowed are {FORMS}")
    records = read_safetensors_header(path)
    if not any(key.startswith("conditioner.embedders.1.") for key in records):
        raise UserError(f"{path} is no SDXL single-file checkpoint: it has no second text encoder")
    folder = workdir / f"{path.stem}-{sha256_file(path)[:12]}"
    if not folder.exists():
        try:
            pipe = StableDiffusionXLPipeline.from_single_file(str(path), add_watermarker=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{path} cannot be converted ({reason}); a single file holds no tokenizer, so SDXL's is needed from the "
                "Hugging Face hub or its cache"
            ) from None
        with replacing(folder) as temporary:
            pipe.save_pretrained(temporary, safe_serialization=True)
    return folder


def _random_checkpoint(name: str, workdir: Path) -> Path:
    """Random weights at true size, in fp16 (mini: fp32), written component by component."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from distill.shapes import WORDS
    from distill.tokenizer import make_clip_tokenizer

    architecture = find_architecture(name)
    family = architecture.family
    folder = workdir / f"random-{re.sub('[^a-z0-9]+', '-', name)}"
    if folder.exists():
        return folder
    dtype = torch.float16 if family is SDXL_FAMILY else torch.float32
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(**architecture.unet_config),
            "vae": AutoencoderKL(**family.vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**family.text_encoder)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**family.text_encoder_2)),
        }
    size = sum(math.prod(t.shape) for module in modules.values() for t in module.parameters()) * dtype.itemsize
    require_free_disk(workdir, size, f"random:{name}")
    generator = torch.Generator().manual_seed(0)
    special = {key: family.text_encoder[key] for key in ("bos_token_id", "eos_token_id")}
    length = family.text_encoder["max_position_embeddings"]
    words = () if family is SDXL_FAMILY else WORDS
    with replacing(folder) as temporary:
        for component, module in modules.items():
            is_diffusers = component in ("unet", "vae")
            (module.save_config if is_diffusers else module.config.save_pretrained)(temporary / component)
            tensors = {key: _random_tensor(key, value, dtype, generator) for key, value in module.state_dict().items()}
            stem = "diffusion_pytorch_model" if is_diffusers else "model"
            save_file(tensors, temporary / component / f"{stem}.safetensors", metadata={"format": "pt"})
        for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
            tokenizer = make_clip_tokenizer(words, max_length=length, pad_token=pad, **special)
            tokenizer.save_pretrained(temporary / name)
        EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ).save_pretrained(temporary / "scheduler")
        index = {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (temporary / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


def _random_tensor(key: str, like: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Torch's own initial scale: uniform within 1/sqrt(fan_in); norms 1; biases 0. Keeps fp16 activations in range."""
    import torch

    tensor = torch.zeros(like.shape, dtype=dtype)
    if like.ndim >= 2:
        bound = (like.numel() / like.shape[0]) ** -0.5
        tensor.uniform_(-bound, bound, generator=generator)
    elif "norm" in key and key.endswith("weight"):
        tensor.fill_(1)
    return tensor
