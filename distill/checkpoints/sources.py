"""Where a checkpoint comes from. Every room is given a source and gets a local diffusers folder.

org/name              a Hugging Face model id
path/to/folder        a diffusers pipeline folder
path/to/file.safetensors   a single-file checkpoint (as ZavyChromaXL and JuggernautXL ship)
random:NAME           an architecture of the catalogue, or a depth, at its true size with random weights (no download)
mini:sdxl, mini:sd    the mini teachers that ship with the package
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from distill.checkpoints.folder import FORMS, check_checkpoint, find_architecture_of, require_text_to_image
from distill.checkpoints.tensors import read_safetensors_header
from distill.common.errors import UserError, unknown
from distill.common.files import (
    exclusive,
    read_json,
    read_object,
    remove_leftovers,
    replacing,
    sha256_file,
    write_json,
)
from distill.common.hub import NO_SAFETENSORS, explaining_hub
from distill.common.ownership import require_our_folder
from distill.models.architectures import Architecture, find_architecture, whole
from distill.models.families import Family
from distill.models.networks import stated_config

MINI_TEACHERS = {
    "sdxl": Path(__file__).parents[1] / "mini" / "teacher",
    "sd": Path(__file__).parents[1] / "mini" / "teacher_sd",
}
WORKDIR = Path("out/models")
"""The folder in which all rooms keep the checkpoints that `resolve` makes, unless another is given."""
CONVERSION = 2
"""Raised whenever a random, converted or fused checkpoint comes out otherwise than before: older ones are made again."""
IN_A_FOLDER_NAME = str.maketrans({"/": "_", ":": "+", ",": "."})
"""Each mark of a depth by one of its own, so that no two depths share a folder."""
ON_HUB = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stablediffusionapi/zavychromaxl-v80": "sdxl",
    "RunDiffusion/Juggernaut-XL-v9": "sdxl",
    "segmind/SSD-1B": "ssd-1b",
    "segmind/Segmind-Vega": "vega",
    "SG161222/Realistic_Vision_V4.0": "sd-1.5",
    "CompVis/stable-diffusion-v1-4": "sd-1.5",
    "stabilityai/stable-diffusion-2-1-base": "sd-2.1-base",
}
"""The architecture of checkpoints that recipes name, so that these are checked and counted before anything is fetched."""


def peek_architecture(source: str, family: Family) -> Architecture:
    """The architecture of `source` without fetching or making anything. A hub id of which nothing is on this machine yet
    is taken for the whole model of `family`, unless it is in `ON_HUB`.

    Raises UserError as `resolve` does.
    """
    kind, _, name = source.partition(":")
    path = MINI_TEACHERS[name] if kind == "mini" and name in MINI_TEACHERS else Path(source)
    if kind == "random":
        return find_architecture(name)
    if path.is_dir():
        return find_architecture_of(path)
    if path.suffix == ".safetensors":
        from distill.checkpoints.single_file import find_single_file_architecture

        return find_single_file_architecture(read_safetensors_header(_single_file(path)), path)
    if source in ON_HUB:
        return find_architecture(ON_HUB[source])
    fetched = _already_fetched(source)
    return find_architecture_of(fetched) if fetched else whole(family)


def is_known(source: str) -> bool:
    """Whether `peek_architecture` finds the architecture of `source` itself, and takes it for no other's."""
    at_hand = source.startswith(("random:", "mini:")) or Path(source).exists()
    return at_hand or source in ON_HUB or _already_fetched(source) is not None


def _already_fetched(repo_id: str) -> Path | None:
    """Its folder in the hub's cache on this machine, where a whole pipeline is."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, "model_index.json")
        folder = Path(found).parent if isinstance(found, str) else None
        if folder:
            check_checkpoint(folder)
        return folder
    except (UserError, HFValidationError):
        return None


def resolve(source: str, workdir: Path) -> Path:
    """The local diffusers folder of `source`; what has to be made or converted is kept under `workdir`.

    Raises UserError for an unknown name, a folder that is no checkpoint, a truncated file, or an unreachable hub.
    """
    if not source.strip():
        raise UserError(f"the model is empty: is a variable unset? allowed are {FORMS}")
    kind, colon, name = source.partition(":")
    if colon and kind == "random":
        folder = _random_checkpoint(name, workdir)
    elif colon and kind == "mini":
        if name not in MINI_TEACHERS:
            raise unknown("mini checkpoint", name, MINI_TEACHERS)
        folder = MINI_TEACHERS[name]
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


def _check_on_hub(repo_id: str) -> None:
    """Raises UserError for a model of another kind before its gigabytes are fetched."""
    from huggingface_hub import hf_hub_download, model_info

    try:
        files = [file.rfilename for file in model_info(repo_id).siblings or ()]
    except Exception:  # the download meets it as well, and may find all in its cache
        return
    model, config = f"model {repo_id!r}", "unet/config.json"
    known = stated_config("unet", read_object(Path(hf_hub_download(repo_id, config))), model) if config in files else {}
    networks = require_text_to_image(known, model).networks
    for needed in ("model_index.json", *(f"{component}/config.json" for component in networks)):
        if needed not in files:
            raise UserError(f"{model} is no pipeline folder: it has no {needed}; allowed are {FORMS}")


def _downloaded(repo_id: str) -> Path:
    """The fp16 weights where the hub has them apart, else the plain ones; what an interrupted call left is gone on with."""
    from diffusers import DiffusionPipeline

    def download(variant: str | None) -> Path:
        return Path(DiffusionPipeline.download(repo_id, variant=variant, use_safetensors=True))

    with explaining_hub(f"model {repo_id!r}"):
        _check_on_hub(repo_id)
        try:
            return download("fp16")
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and NO_SAFETENSORS not in str(error):
                raise  # the network went, which says nothing of the variant
            return download(None)  # there is none in fp16, or a pickled one


def _single_file(path: Path) -> Path:
    """Raises UserError where it does not exist."""
    if not path.is_file():
        raise UserError(f"model {str(path)!r} does not exist; allowed are {FORMS}")
    return path


def _converted_single_file(path: Path, workdir: Path) -> Path:
    from distill.checkpoints.single_file import convert_single_file

    read_safetensors_header(_single_file(path))  # before the whole file is hashed
    folder = workdir / f"{path.stem}-{sha256_file(path)[:12]}"
    return make_checkpoint(folder, lambda temporary: convert_single_file(path, temporary))


def _random_checkpoint(name: str, workdir: Path) -> Path:
    from distill.checkpoints.assemble import assemble, random_tensors

    architecture = find_architecture(name)
    folder = workdir / f"random-{name.translate(IN_A_FOLDER_NAME)}"
    return make_checkpoint(folder, lambda temporary: assemble(temporary, architecture, random_tensors(architecture)))


def _check_made(folder: Path) -> None:
    """Raises UserError where `folder` is no whole checkpoint, or was made before CONVERSION was raised."""
    check_checkpoint(folder)
    if read_json(folder / "made.json") != {"conversion": CONVERSION}:
        raise UserError(f"{folder} was made by another version of slimxl")


def make_checkpoint(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made where it is absent, not whole, or of another version. Processes that want the same one take turns,
    and what a killed one left is removed. Raises UserError for a folder of that name which holds something else."""
    try:
        _check_made(folder)
        return folder
    except UserError:
        require_our_folder(folder, "a model", ["made.json"], ("conversion",), option="--workdir")
    with exclusive(folder):
        try:
            _check_made(folder)
        except UserError:
            remove_leftovers(folder.parent, folder.name)
            with replacing(folder) as temporary:
                make(temporary)
                write_json(temporary / "made.json", {"conversion": CONVERSION})
    return folder
