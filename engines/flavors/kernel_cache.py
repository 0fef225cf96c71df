"""TensorRT-RTX's just-in-time compiled kernels, kept in a file so that only the first start compiles them."""

from __future__ import annotations

import atexit
import hashlib
import weakref
from pathlib import Path
from typing import Any

from distill.common.files import replacing


class KernelCache:
    """The file holds the sha256 of the kernels, then the kernels. A damaged file is ignored here, and TensorRT-RTX ignores
    one made for another GPU, driver or version."""

    def __init__(self, folder: Path | None, title: str, cache: Any) -> None:
        """`cache` is TensorRT-RTX's IRuntimeCache. Without a folder nothing is kept."""
        self._path = folder / f"{title}.kernels" if folder else None
        self._cache = cache
        self._saved = b""
        if self._path and self._path.is_file():
            content = self._path.read_bytes()
            digest, kernels = content[:32], content[32:]
            if hashlib.sha256(kernels).digest() == digest and cache.deserialize(kernels):
                self._saved = digest
        save = weakref.WeakMethod(self.save)  # also at exit: a lazy specialisation compiles after a run
        atexit.register(lambda: (alive := save()) and alive())

    def save(self) -> None:
        """Writes the file again if kernels were added. A folder that cannot be written to is no error."""
        content = self._cache.serialize() if self._path else None
        if self._path is None or content is None:
            return
        kernels = bytes(content)
        digest = hashlib.sha256(kernels).digest()
        if digest == self._saved:
            return
        try:
            with replacing(self._path) as temporary:
                temporary.write_bytes(digest + kernels)
        except OSError:
            self._path = None
        self._saved = digest
