"""Where a checkpoint comes from. Every room is given a source and gets a local diffusers folder.

org/name              a Hugging Face model id
path/to/folder        a diffusers StableDiffusionXLPipeline folder
path/to/file.safetensors   a single-file checkpoint (as ZavyChromaXL and JuggernautXL ship)
random:NAME           an architecture of the catalogue at its true size with random weights (nothing to download)
mini:sdxl             the mini teacher that ships with the package
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.architectures import ARCHITECTURES, Architecture, Depth, find_architecture
from distill.errors import UserError, unknown
from distill.files import exclusive, read_json, remove_leftovers, replacing, sha256_file, sha256_json
from distill.tensors import component_tensors, component_weights, read_safetensors_header

if TYPE_CHECKING:
    import torch

MINI_TEACHER = Path(__file__).parent / "mini" / "teacher"
COMPONENT_FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2")
FORMS = "a Hugging Face id, a diffusers folder, a single .safetensors file, random:NAME or mini:sdxl"


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


def check_successor(first: Path, teacher: Path) -> None:
    """Raises UserError where a later teacher differs from the first in architecture or prediction type."""
    ignored = ("_class_name", "_diffusers_version", "_name_or_path", "sample_size")
    before, now = (read_config(folder, "unet") for folder in (first, teacher))
    for key in sorted((before.keys() | now.keys()) - set(ignored)):
        if before.get(key) != now.get(key):
            raise UserError(
                f"teacher {teacher} cannot succeed {first}: UNet {key} is {now.get(key)!r}, was {before.get(key)!r}"
            )
    for folder in (first, teacher):
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        if scheduler.get("prediction_type", "epsilon") != "epsilon":
            raise UserError(
                f"teacher {folder} predicts {scheduler['prediction_type']!r}; SDXL's distillation needs 'epsilon'"
            )


def file_hashes(folder: Path, components: Collection[str] = COMPONENT_FOLDERS) -> dict[str, str]:
    """sha256 of every config and weights file of the four networks, or of some, by its path inside the checkpoint."""
    return {
        f"{component}/{path.name}": sha256_file(path)
        for component in components
        for path in [folder / component / "config.json", *component_weights(folder / component)]
    }


def checkpoint_hash(folder: Path) -> str:
    """sha256 over `file_hashes`: equal content, equal hash, whatever the file dates."""
    return sha256_json(file_hashes(folder))


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


def load_pipeline(folder: Path, dtype: torch.dtype, without: Collection[str] = ()) -> Any:
    """The checkpoint folder as a diffusers StableDiffusionXLPipeline on the CPU; the networks in `without` are None."""
    import diffusers
    from diffusers import StableDiffusionXLPipeline

    diffusers.utils.logging.disable_progress_bar()
    components = {name: None if name in without else load_component(folder, name, dtype) for name in COMPONENT_FOLDERS}
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
    """The fp16 weights where the hub has them apart, else the plain ones; what an interrupted call left is gone on with."""
    from diffusers import StableDiffusionXLPipeline
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    def download(variant: str | None) -> Path:
        return Path(StableDiffusionXLPipeline.download(repo_id, variant=variant, use_safetensors=True))

    try:
        try:
            return download("fp16")
        except ValueError as error:
            if isinstance(error, OSError):  # the network went, which says nothing of the variant
                raise
            return download(None)  # there is none in fp16
    except (OSError, ValueError) as error:  # every error of the hub's and of the network's is an OSError
        known = isinstance(error, HfHubHTTPError)
        reason = error if known else error.__cause__ or error  # diffusers may hide the hub's behind one of the cache
        if isinstance(reason, GatedRepoError):
            told = (
                "is gated: accept its terms on its page and log in (hf auth login, or HF_TOKEN), or give a local folder"
            )
        elif isinstance(reason, RepositoryNotFoundError):
            told = (
                "is neither a local folder nor on the hub, unless it is private: check the name, or log in (HF_TOKEN)"
            )
        elif isinstance(reason, EntryNotFoundError) and not isinstance(reason, FileNotFoundError):
            told = f"is no pipeline folder: it has no model_index.json; allowed are {FORMS}"
        else:
            first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
            told = f"cannot be had from the hub ({first}); check the network and run the same command again: it goes on"
        raise UserError(f"model {repo_id!r} {told}") from None


def _converted_single_file(path: Path, workdir: Path) -> Path:
    from distill.single_file import convert_single_file

    if not path.is_file():
        raise UserError(f"model {str(path)!r} does not exist; allowed are {FORMS}")
    read_safetensors_header(path)  # before the whole file is hashed
    folder = workdir / f"{path.stem}-{sha256_file(path)[:12]}"
    return make_checkpoint(folder, lambda temporary: convert_single_file(path, temporary))


def _random_checkpoint(name: str, workdir: Path) -> Path:
    from distill.assemble import assemble, random_tensors

    architecture = find_architecture(name)
    folder = workdir / f"random-{re.sub('[^a-z0-9]+', '-', name)}"
    return make_checkpoint(folder, lambda temporary: assemble(temporary, architecture, random_tensors(architecture)))


def make_checkpoint(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made where it is absent or not whole. Processes that want the same one take turns, and what a killed
    one left is removed."""
    try:
        check_checkpoint(folder)
        return folder
    except UserError:
        pass
    with exclusive(folder):
        try:
            check_checkpoint(folder)
        except UserError:
            remove_leftovers(folder.parent, folder.name)
            with replacing(folder) as temporary:
                make(temporary)
    return folder
