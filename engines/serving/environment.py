"""Virtual environments for Triton from PyPI: the server with its client, or the client alone.

The server of the wheel nvidia-pytriton was compiled for NumPy 1.26, so it cannot share slimxl's environment.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from distill.common.errors import UserError
from distill.common.files import sha256_json
from distill.common.ownership import require_our_folder

SERVER_PACKAGES = ("nvidia-pytriton==0.7.0", "tritonclient[http,grpc]==2.73.0", "numpy==1.26.4")
CLIENT_PACKAGES = ("tritonclient[grpc]==2.73.0",)
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LAST_PYTHON = (3, 12)
"""The last Python that the server has a wheel for."""
READY = ".slimxl-ready"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds the server and its client, or the client alone."""

    folder: Path

    @classmethod
    def named(cls, name: str, packages: tuple[str, ...], workdir: Path) -> Environment:
        """The folder's name holds Python's version and a hash of the packages: another Python or another slimxl never
        touches it."""
        return cls((workdir / f"{name}-{PYTHON}-{sha256_json(packages)[:8]}").absolute())

    @property
    def is_whole(self) -> bool:
        return (self.folder / READY).is_file()

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{PYTHON}" / "site-packages"

    @property
    def server(self) -> Path:
        return self.packages / "pytriton/tritonserver/bin/tritonserver"

    @property
    def backends(self) -> Path:
        return self.folder / "backends"


def find_environment(workdir: Path) -> Environment | None:
    """None where a tritonserver is on the PATH already, else the environment below `workdir`, made if need be."""
    return None if shutil.which("tritonserver") else make_environment(workdir)


def make_environment(workdir: Path) -> Environment:
    """Installs the server from PyPI below `workdir`. Raises UserError where pip cannot."""

    def copy_backend(environment: Environment) -> None:
        source = environment.packages / "pytriton/tritonserver"
        shutil.copytree(source / "backends/python", environment.backends / "python")
        stub = source / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
        shutil.copy2(stub, environment.backends / "python")

    if sys.version_info[:2] > LAST_PYTHON:
        raise UserError(
            f"the Triton server on PyPI is for Python 3.10 to 3.{LAST_PYTHON[1]}, this is {PYTHON}; use one of those, "
            "or put a tritonserver on the PATH (as in Triton's container)"
        )
    environment = Environment.named("environment", SERVER_PACKAGES, workdir)
    _install(environment, SERVER_PACKAGES, "the Triton server (0.4 GB, a minute or two, once)", copy_backend)
    return environment


def make_client_environment(workdir: Path) -> Environment:
    """The server's environment where `workdir` has it, else one with the client alone. Raises UserError where pip
    cannot."""
    with_server = Environment.named("environment", SERVER_PACKAGES, workdir)
    if with_server.is_whole:
        return with_server
    environment = Environment.named("client", CLIENT_PACKAGES, workdir)
    _install(environment, CLIENT_PACKAGES, "Triton's client (0.15 GB, once)")
    return environment


def _install(
    environment: Environment,
    packages: tuple[str, ...],
    what: str,
    finish: Callable[[Environment], None] = lambda environment: None,
) -> None:
    """Once; a second process that asks for the same environment waits. Written in place, since a virtual environment
    cannot be moved."""
    folder = environment.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if environment.is_whole:
            return
        if not (folder / "pyvenv.cfg").is_file():  # what is begun anew is an installation that was not finished
            require_our_folder(folder, "a virtual environment", [], (), option="--workdir")
        print(f"installing {what} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(environment.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode:
            last = result.stderr.strip().splitlines()[-1:] or ["no message"]
            raise UserError(
                f"cannot install {', '.join(packages)} into {folder} ({last[0]}); check the network; a tritonserver on the "
                "PATH (as in Triton's container) needs no installation"
            )
        finish(environment)
        (folder / READY).touch()
