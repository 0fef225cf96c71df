"""Why a model cannot be fetched from the Hugging Face hub, in one line for the user."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from distill.common.errors import FULL_DISK, UserError

NO_SAFETENSORS = "necessary `safetensors` weights"
"""Part of diffusers' message for a model whose weights are pickled, all of them."""
NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)


@contextmanager
def explaining_hub(model: str) -> Iterator[None]:
    """Whatever keeps `model` from being fetched inside is a UserError: those of the hub, of requests, httpx and xet have
    no base in common."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{model} {_reason(error)}") from None


def _root(error: BaseException) -> BaseException:
    """The first cause: clients wrap the errors of one another."""
    while under := error.__cause__ or error.__context__:
        error = under
    return error


def _reason(error: Exception) -> str:
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
    root = _root(reason)
    if isinstance(root, NETWORK) and root.strerror:
        why = root.strerror
    else:
        why = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    return (
        f"cannot be had from the Hugging Face hub ({why}); check the network and run the same command again, which "
        "goes on, or give a local folder"
    )
