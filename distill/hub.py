"""Checkpoints from the Hugging Face hub, and what is said of those that cannot be had from it."""

from __future__ import annotations

from pathlib import Path

from distill.errors import FULL_DISK, UserError
from distill.files import read_json
from distill.sources import COMPONENT_FOLDERS, FORMS, unet_family

NO_SAFETENSORS = "necessary `safetensors` weights"
"""As diffusers says where the hub has weights in no other format than pickle."""


def _check_on_hub(repo_id: str) -> None:
    """Raises UserError for a model of another kind before its gigabytes are fetched."""
    from huggingface_hub import hf_hub_download, model_info

    try:
        files = [file.rfilename for file in model_info(repo_id).siblings or ()]
    except Exception:  # the download meets it as well, and may find all in its cache
        return
    for needed in ("model_index.json", *(f"{component}/config.json" for component in COMPONENT_FOLDERS)):
        if needed not in files:
            raise UserError(f"model {repo_id!r} is no SDXL pipeline folder: it has no {needed}; allowed are {FORMS}")
    unet_family(read_json(Path(hf_hub_download(repo_id, "unet/config.json"))), f"model {repo_id!r}")


def download_checkpoint(repo_id: str) -> Path:
    """The fp16 weights where the hub has them apart, else the plain ones; what an interrupted call left is gone on with.

    Raises UserError for another kind of model, and for whatever keeps one from being fetched.
    """
    from diffusers import StableDiffusionXLPipeline

    def download(variant: str | None) -> Path:
        return Path(StableDiffusionXLPipeline.download(repo_id, variant=variant, use_safetensors=True))

    try:
        _check_on_hub(repo_id)
        try:
            return download("fp16")
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and NO_SAFETENSORS not in str(error):
                raise  # the network went, which says nothing of the variant
            return download(None)  # there is none in fp16, or a pickled one
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model {repo_id!r} {why_not_had(error)}") from None


def why_not_had(error: Exception) -> str:
    """What is said, after its name, of a model that could not be fetched. `error` is of any kind: those of the hub, of
    requests, httpx and xet have no base in common."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    known = isinstance(error, HfHubHTTPError)
    reason = error if known else error.__cause__ or error  # diffusers may hide the hub's behind one of the cache
    if isinstance(reason, GatedRepoError):
        return "is gated: accept its terms on its page and log in (hf auth login, or HF_TOKEN), or give a local folder"
    if isinstance(reason, RepositoryNotFoundError):
        return "is neither a local folder nor on the hub, unless it is private: check the name, or log in (HF_TOKEN)"
    if NO_SAFETENSORS in str(reason):
        return "has no .safetensors weights (pickled ones are not read): give a model that has"
    if FULL_DISK.search(str(reason)):
        return (
            f"does not fit the disk of {constants.HF_HUB_CACHE}: free some space there, or name a folder of another "
            "disk in HF_HOME, and run the same command again"
        )
    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    return (
        f"cannot be had from the Hugging Face hub ({first}); check the network and run the same command again, which "
        "goes on, or give a local folder"
    )
