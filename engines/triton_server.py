"""Starts a Triton Inference Server over a model repository: the one on the PATH (as in Triton's container), or the one
from the PyPI wheel nvidia-pytriton, in an environment of its own, since it was compiled for NumPy 1.26.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError

PACKAGES = ("nvidia-pytriton==0.7.0", "tritonclient[http,grpc]", "numpy<2")
READY = ".slimxl-ready"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds the server and its client."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    @property
    def server(self) -> Path:
        return self.packages / "pytriton/tritonserver/bin/tritonserver"

    @property
    def backends(self) -> Path:
        return self.folder / "backends"


def make_environment(folder: Path) -> Environment:
    """Installs the server from PyPI, once. Raises UserError where pip cannot."""
    environment = Environment(folder.resolve())
    if (folder / READY).is_file():
        return environment
    venv.create(folder, with_pip=True, clear=True)
    install = [str(environment.python), "-m", "pip", "install", "--quiet", *PACKAGES]
    result = subprocess.run(install, capture_output=True, text=True, check=False)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"cannot install the Triton server into {folder} ({last[0]}); check the network, or install it by hand"
        )
    source = environment.packages / "pytriton/tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(source / "backends/python", environment.backends / "python")
    stub = source / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy2(stub, environment.backends / "python")
    (folder / READY).touch()
    return environment


def command(
    repository: Path, environment: Environment | None, address: str, http_port: int, grpc_port: int
) -> list[str]:
    """The server's command line: no other models can be loaded from outside, requests are bounded by the model."""
    program = str(environment.server) if environment else "tritonserver"
    backends = [f"--backend-directory={environment.backends}"] if environment else []
    return [
        program,
        f"--model-repository={repository.resolve()}",
        *backends,
        "--model-control-mode=none",
        f"--http-address={address}",
        f"--http-port={http_port}",
        f"--grpc-address={address}",
        f"--grpc-port={grpc_port}",
        "--allow-metrics=false",
        "--exit-timeout-secs=60",
    ]


def variables(environment: Environment | None) -> dict[str, str]:
    """Where the server finds its libraries, and the model this program."""
    found = dict(os.environ)
    paths = [str(Path(__file__).parents[1]), sysconfig.get_path("purelib")]
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [found.get("PYTHONPATH")])])
    if environment:
        libraries = [str(environment.packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        found["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [found.get("LD_LIBRARY_PATH")])])
    return found


def find_environment(folder: Path) -> Environment | None:
    """None where a tritonserver is on the PATH already, else the environment in `folder`, made if need be."""
    return None if shutil.which("tritonserver") else make_environment(folder)
