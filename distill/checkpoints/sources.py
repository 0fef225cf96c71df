"""Where a checkpoint comes from. Every room is given a source and gets a local diffusers folder.

org/name              a Hugging Face model id
path/to/folder        a diffusers pipeline folder
path/to/file.safetensors   a single-file checkpoint (as ZavyChromaXL and JuggernautXL ship)
random:NAME           an architecture of the catalogue at its true size with random weights (nothing to download)
mini:sdxl             the mini teacher that ships with the package
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from distill.checkpoints.tensors import (
    component_tensors,
    component_weights,
    other_variants,
    plain_names,
    read_safetensors_header,
    write_index,
)
from distill.common.errors import UserError, unknown
from distill.common.files import (
    exclusive,
    read_json,
    read_object,
    remove_leftovers,
    replacing,
    sha256_file,
    sha256_file_once,
    sha256_json,
    write_json,
)
from distill.common.hub import NO_SAFETENSORS, explaining_hub
from distill.common.ownership import require_our_folder
from distill.common.progress import say
from distill.models.architectures import Architecture, architecture_at, find_architecture, whole
from distill.models.conditioning import Conditioning, conditioning_of, context_width
from distill.models.depth import Depth
from distill.models.families import SDXL_FAMILY, Family, check_fit, family_of
from distill.models.networks import network_class, stated_config

if TYPE_CHECKING:
    import torch

MINI_TEACHERS = {"sdxl": Path(__file__).parents[1] / "mini" / "teacher"}
WORKDIR = Path("out/models")
"""The folder in which all rooms keep the checkpoints that `resolve` makes, unless another is given."""
CONVERSION = 1
"""Raised whenever a random, converted or fused checkpoint comes out otherwise than before: older ones are made again."""
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
"""The architecture of checkpoints that recipes name, so that these are checked and planned before anything is fetched."""
PART_CLASSES = {"diffusers": "EulerDiscreteScheduler", "transformers": "CLIPTokenizer"}
"""The usual class of the scheduler and of the tokenizers, by its library: an example for a message."""
FORMS = "a Hugging Face id, a diffusers folder, a single .safetensors file, random:NAME or mini:sdxl"


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """config.json of a component, with the library's defaults for what it leaves out. Raises UserError where it is
    missing or no JSON object, and for a UNet that is not expressible here."""
    path = folder / component / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no checkpoint: {component}/config.json is missing; allowed are {FORMS}")
    return stated_config(component, read_object(path), path)


def check_checkpoint(folder: Path) -> None:
    """Raises UserError, with what is missing, where `folder` is no whole diffusers pipeline of a known kind."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no checkpoint: it has no model_index.json; allowed are {FORMS}")
    read_object(folder / "model_index.json")
    unet = read_config(folder, "unet")
    conditioning = _text_to_image(unet, folder)
    Depth.from_config(unet, folder)
    if _is_refiner(folder, unet, conditioning):
        raise UserError(f"{folder} is SDXL's refiner, which finishes another model's pictures; give the base model")
    check_fit({component: read_config(folder, component) for component in conditioning.networks}, folder)
    for component in conditioning.networks:
        component_tensors(folder / component)


def _is_refiner(folder: Path, unet: Mapping[str, Any], conditioning: Conditioning) -> bool:
    """Whether the first text encoder is missing, and the UNet reads the one alone that its pooled input comes from."""
    first, last = conditioning.encoders[0], conditioning.pooled_from
    if last is None or (folder / first).is_dir():
        return False
    return context_width(unet) == read_config(folder, last)["hidden_size"]


def network_folders(folder: Path) -> tuple[str, ...]:
    """The folders of a checkpoint's networks."""
    return tuple(conditioning_of(read_config(folder, "unet"), folder).networks)


def left_out(folder: Path) -> list[str]:
    """What model_index.json names beside the networks and parts that are used here: a safety checker, say."""
    conditioning = conditioning_of(read_config(folder, "unet"), folder)
    used = (*conditioning.networks, *conditioning.parts)
    stated = read_object(folder / "model_index.json").items()
    return [name for name, value in stated if isinstance(value, list) and any(value) and name not in used]


def copy_index(folder: Path, to: Path) -> None:
    """Copies model_index.json to the file `to`, without what is `left_out`, and says so."""
    index, left = read_object(folder / "model_index.json"), left_out(folder)
    if not left:
        shutil.copyfile(folder / "model_index.json", to)
        return
    say(f"{folder}: its {' and '.join(left)} are left out")
    needless = {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    write_json(to, index | {name: [None, None] for name in left} | needless)


def find_family(folder: Path) -> Family:
    """Of a checkpoint folder. Raises UserError."""
    return family_of({component: read_config(folder, component) for component in network_folders(folder)}, folder)


def _text_to_image(config: Mapping[str, Any], model: object) -> Conditioning:
    """How a UNet of this config is conditioned. Raises UserError for that of another kind of model."""
    channels = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != (4, 4):
        raise UserError(
            f"{model} is no text-to-image checkpoint: its UNet has {channels[0]} channels in and {channels[1]} out, not 4 "
            "(9 are for inpainting, 8 for instructed edits)"
        )
    return conditioning_of(config, model)


def prediction_type_of(folder: Path) -> str:
    """What a checkpoint's UNet predicts: `epsilon`, the noise, as a rule."""
    return read_object(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")


def file_hashes(folder: Path, components: Collection[str] | None = None) -> dict[str, str]:
    """sha256 of every config and weights file of its networks, or of some, by its path inside the checkpoint; where it
    has weights for fp16 and others, of both."""
    files = {
        f"{component}/{path.name}": path
        for component in (network_folders(folder) if components is None else components)
        for precision in ("fp32", "fp16")
        for path in [folder / component / "config.json", *component_weights(folder / component, precision)]
    }
    return {name: sha256_file_once(path) for name, path in files.items()}


def checkpoint_hash(folder: Path) -> str:
    """sha256 over `file_hashes`: equal content, equal hash, whatever the file dates."""
    return sha256_json(file_hashes(folder))


def find_architecture_of(folder: Path) -> Architecture:
    """The catalogue's architecture whose UNet config matches the checkpoint's; a custom one where it has none."""
    return architecture_at(find_family(folder), Depth.from_config(read_config(folder, "unet")))


def peek_architecture(source: str, family: Family = SDXL_FAMILY) -> Architecture:
    """The architecture of `source` without fetching or making anything. A hub id that is not known is taken for the whole
    model of `family`.

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
    return find_architecture(ON_HUB[source]) if source in ON_HUB else whole(family)


def is_known(source: str) -> bool:
    """Whether `peek_architecture` finds the architecture of `source` itself: of all but other models on the hub."""
    kind = source.partition(":")[0]
    return kind in ("random", "mini") or source in ON_HUB or Path(source).exists()


def load_component(folder: Path, component: str, dtype: torch.dtype) -> Any:
    """One network of a checkpoint folder in eval mode: `unet`, `vae`, `text_encoder` or `text_encoder_2`.

    Weights named fp16 are read for float16 alone, where there are others. Raises UserError where weights are missing.
    """
    import torch

    kind = network_class(component, read_config(folder, component))
    place = folder / component
    files = component_weights(place, "fp16" if dtype == torch.float16 else "fp32")
    if others := other_variants(place, files):
        say(f"{place}: read from {files[0].name}, not from {others[0]}")
    with (
        TemporaryDirectory() as temporary,
        explaining_library(place),
    ):  # links to what is read, and to nothing else beside it
        (Path(temporary) / "config.json").symlink_to((place / "config.json").resolve())
        names = plain_names(files)
        for name, file in names.items():
            (Path(temporary) / name).symlink_to(file.resolve())
        write_index(Path(temporary), names)
        network, info = kind.from_pretrained(temporary, torch_dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{place} lacks {len(missing)} weights, the first is {missing[0]}; fetch the checkpoint again")
    if hasattr(network, "register_to_config"):
        network.register_to_config(_name_or_path=str(place))
    else:
        network.config._name_or_path = str(place)
    return network.eval()


@contextmanager
def explaining_library(what: Path) -> Iterator[None]:
    """Whatever diffusers or transformers raise while they load `what` is a UserError; what the system refuses is not."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{what} cannot be loaded ({reason}); fetch it again, or mend its config.json") from None


def load_parts(folder: Path) -> dict[str, Any]:
    """The scheduler and the tokenizers of a checkpoint, as model_index.json names them. Raises UserError where one is
    missing or cannot be loaded, or its class is unknown."""
    index = read_object(folder / "model_index.json")
    names = conditioning_of(read_config(folder, "unet"), folder).parts
    return {name: _load_part(folder, name, index.get(name)) for name in names}


def _load_part(folder: Path, name: str, stated: Any) -> Any:
    library = "diffusers" if name == "scheduler" else "transformers"
    if not (folder / name).is_dir():
        raise UserError(f"{folder} is no whole checkpoint: it has no {name}/")
    kind = stated[1] if isinstance(stated, list) and len(stated) == 2 else None
    found = getattr(import_module(library), kind, None) if isinstance(kind, str) else None
    if found is None or not hasattr(found, "from_pretrained"):
        raise UserError(
            f"{folder / 'model_index.json'} says that its {name} is {json.dumps(stated)}, which {library} "
            f"{version(library)} does not have; name one that it has, as {json.dumps([library, PART_CLASSES[library]])}"
        )
    if name == "scheduler":
        read_object(folder / name / "scheduler_config.json")
    with explaining_library(folder / name):
        return found.from_pretrained(folder / name)


def load_pipeline(folder: Path, dtype: torch.dtype, without: Collection[str] = ()) -> Any:
    """The checkpoint folder as a diffusers pipeline on the CPU; the networks in `without` are None. Raises UserError."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    conditioning = conditioning_of(read_config(folder, "unet"), folder)
    components: dict[str, Any] = load_parts(folder)
    for name in conditioning.networks:
        components[name] = None if name in without else load_component(folder, name, dtype)
    kind = getattr(diffusers, conditioning.pipeline)
    with explaining_library(folder):
        return kind.from_pretrained(folder, torch_dtype=dtype, **components, **conditioning.load_options)


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
    networks = _text_to_image(known, model).networks
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
    folder = workdir / f"random-{re.sub('[^a-z0-9]+', '-', name)}"
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
