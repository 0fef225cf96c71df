"""Bundles on the Hugging Face hub: pushed whole, fetched by the parts that a machine runs.

A fetched bundle lies in the hub's cache. Its manifest says what every file must be, so it is checked as any other.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from distill.common.errors import UserError
from distill.common.files import size_text
from distill.common.hub import explaining_hub
from engines.bundle import MANIFEST, read_manifest
from engines.integrity import verify_bundle
from export.components import COMPONENTS

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(bundle: str | Path) -> bool:
    """Whether it is text like `org/name` and no folder of this machine."""
    return isinstance(bundle, str) and HUB_ID.fullmatch(bundle) is not None and not Path(bundle).exists()


def fetch_manifest(repo_id: str) -> Path:
    """The newest bundle of that name as a folder of the hub's cache: its manifest alone, besides what was fetched before.

    Raises UserError where it cannot be had or is no bundle.
    """
    folder = _fetch(repo_id, [MANIFEST])
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"bundle {repo_id!r} has no {MANIFEST} on the hub: push one with python -m engines push BUNDLE {repo_id}"
        )
    return folder


def fetch_files(repo_id: str, folder: Path, paths: Iterable[str]) -> None:
    """Fetches the bundle's files with these paths into `folder`, as they were when its manifest was fetched."""
    _fetch(repo_id, paths, revision=folder.name)


def _fetch(repo_id: str, paths: Iterable[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    with explaining_hub(f"bundle {repo_id!r}"):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*map(glob.escape, paths)]))


def push_bundle(bundle: Path, repo_id: str, private: bool = False) -> int:
    """Uploads what the manifest names, in one commit; engines that it no longer names are removed there.

    Raises UserError, before anything is sent, for a damaged bundle and for a name that is no `org/name`, and where the hub
    takes nothing.
    """
    from huggingface_hub import HfApi

    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is not a name on the hub: give one like org/name")
    files = read_manifest(bundle).all_files
    if faults := verify_bundle(bundle):
        raise UserError(faults[0])
    hub = HfApi()
    with explaining_hub(f"bundle {repo_id!r}"):
        hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id,
            folder_path=bundle,
            allow_patterns=[MANIFEST, *(glob.escape(file.path) for file in files)],
            delete_patterns=[f"{component}/*" for component in COMPONENTS],
            commit_message=f"bundle of {bundle.resolve().name}",
        )
    size = size_text(sum(file.size_bytes for file in files))
    print(f"{repo_id}: {len(files)} files, {size}; load it with engines.load({repo_id!r})")
    return 0
