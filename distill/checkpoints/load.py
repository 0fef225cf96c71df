"""The networks, parts and whole pipeline of a checkpoint folder, loaded by diffusers and transformers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from distill.checkpoints.folder import read_config
from distill.checkpoints.tensors import component_weights, other_variants, plain_names, write_index
from distill.common.errors import UserError
from distill.common.files import read_object
from distill.common.progress import say
from distill.models.conditioning import conditioning_of
from distill.models.networks import network_class

if TYPE_CHECKING:
    import torch

PART_CLASSES = {"diffusers": "EulerDiscreteScheduler", "transformers": "CLIPTokenizer"}
"""The usual class of the scheduler and of the tokenizers, by its library: an example for a message."""


def load_component(folder: Path, component: str, dtype: torch.dtype) -> Any:
    """One network of a checkpoint folder in eval mode; `component` is its subfolder, as `unet` or `vae`.

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
