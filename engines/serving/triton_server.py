"""Starts a Triton Inference Server over a model repository: the one on the PATH (as in Triton's container), or the one
from the PyPI wheel nvidia-pytriton, in an environment of its own, since it was compiled for NumPy 1.26.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from distill.common.errors import UserError
from distill.common.files import sha256_json
from engines.gpus import version_tuple

SERVER_PACKAGES = ("nvidia-pytriton==0.7.0", "tritonclient[http,grpc]==2.73.0", "numpy==1.26.4")
WHEEL_VERSION = "24.10"
"""Of Triton in that wheel, as its containers are counted."""
FIRST_SOUND_VERSION = (25, 7)
CLIENT_PACKAGES = ("tritonclient[grpc]==2.73.0",)
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LAST_PYTHON = (3, 12)
"""The last Python that the server has a wheel for."""
READY = ".slimxl-ready"
START_SECONDS = 1800
"""How long a server may take to load, warm up and answer."""
DRAIN_SECONDS = 60
"""How long requests under way may take to finish after SIGTERM."""
ANSWERED = re.compile(r"^\S+ \S+ \S+ server\.cc:\d+\] .?All models are stopped", re.MULTILINE)
"""What Triton's log says after SIGTERM, once no request is under way: its core says so, not a request by its name."""
UNLOAD_SECONDS = 20
"""How long it may then take to end. Where an answer found the shared memory full, it waits until DRAIN_SECONDS are over."""
WATCH_SECONDS = 1.0
"""How often the model's processes are looked at."""
CLOSED_APIS = "shared-memory,model-repository,trace,logging"
"""What a client of a picture service never needs, and what Triton's known attacks go through."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds the server and its client, or the client alone."""

    folder: Path

    @classmethod
    def named(cls, name: str, packages: tuple[str, ...], workdir: Path) -> Environment:
        """In a folder that Python's version and the packages name: what another Python or slimxl installed is another."""
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


@dataclass(frozen=True)
class Address:
    """Where a server listens; `host` is an IPv4 number, for Triton takes a name as 255.255.255.255."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001

    @classmethod
    def resolve(cls, name: str, http_port: int, grpc_port: int) -> Address:
        """Raises UserError for a name that has no IPv4 number."""
        try:
            found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"--address {name!r} has no IPv4 number ({error}), and Triton listens on no other; pass one, e.g. 127.0.0.1"
            ) from None
        return cls(str(found[0][4][0]), http_port, grpc_port)

    @property
    def is_loopback(self) -> bool:
        return self.host.startswith("127.")

    def require_free(self) -> None:
        """Raises UserError where it cannot be listened on."""
        for name, port in (("http", self.http_port), ("grpc", self.grpc_port)):
            try:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((self.host, port))
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"cannot listen on {self.host}:{port} ({error}); choose another with --{name}-port, or wait up to "
                    f"{DRAIN_SECONDS} s for a server that was just killed with its requests under way"
                ) from None


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
    """The server's where that is in `workdir`, else one with the client alone. Raises UserError where pip cannot."""
    servers = Environment.named("environment", SERVER_PACKAGES, workdir)
    if servers.is_whole:
        return servers
    alone = Environment.named("client", CLIENT_PACKAGES, workdir)
    _install(alone, CLIENT_PACKAGES, "Triton's client (0.15 GB, once)")
    return alone


def _install(
    environment: Environment,
    packages: tuple[str, ...],
    what: str,
    finish: Callable[[Environment], None] = lambda environment: None,
) -> None:
    """Once, whoever else asks for it meanwhile. In place, since a virtual environment cannot be moved."""
    folder = environment.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if environment.is_whole:
            return
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


def find_environment(workdir: Path) -> Environment | None:
    """None where a tritonserver is on the PATH already, else the environment below `workdir`, made if need be."""
    return None if shutil.which("tritonserver") else make_environment(workdir)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises UserError where another process serves out of `folder`; the system frees the lock of a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"another serve has its model in {folder}; choose another --http-port or another --workdir"
        ) from None


def require_unexposed(address: Address) -> None:
    """Raises UserError where a server would listen to other machines that can be crashed, or does not tell its version."""
    version = os.environ.get("NVIDIA_TRITON_SERVER_VERSION", "") if shutil.which("tritonserver") else WHEEL_VERSION
    if not address.is_loopback and version_tuple(version) < FIRST_SOUND_VERSION:
        raise UserError(
            f"this Triton is {version or 'of an unknown version (NVIDIA_TRITON_SERVER_VERSION is not set)'}, and one before "
            "25.07 can be crashed by anyone who reaches it (CVE-2025-23310, CVE-2025-23311): it does not listen on "
            f"{address.host}; put a tritonserver of 25.07 or newer on the PATH (Triton's container), a proxy that passes on "
            "no chunked bodies in front of 127.0.0.1, or pass --allow-exposed"
        )


def require_plans_backend() -> None:
    """Raises UserError where the server would be the one from PyPI, which opens no tensorrt plans itself."""
    if not shutil.which("tritonserver"):
        raise UserError(
            "--plans needs Triton's tensorrt backend, and the server on PyPI has none; put a tritonserver with it on the "
            "PATH (Triton's container), or leave out --plans"
        )


def command(
    repository: Path, environment: Environment | None, address: Address, key: str, flags: Sequence[str] = ()
) -> list[str]:
    """The server's command line, which ends in `flags`: what is not needed to draw answers only those who know `key`, and no
    other model can be loaded from outside even by them."""
    program = str(environment.server) if environment else "tritonserver"
    backends = [f"--backend-directory={environment.backends}"] if environment else []
    return [
        program,
        f"--model-repository={repository.resolve()}",
        *backends,
        "--model-control-mode=none",
        f"--http-restricted-api={CLOSED_APIS}:slimxl-key={key}",
        f"--grpc-restricted-protocol={CLOSED_APIS}:slimxl-key={key}",
        f"--http-address={address.host}",
        f"--http-port={address.http_port}",
        f"--grpc-address={address.host}",
        f"--grpc-port={address.grpc_port}",
        "--allow-metrics=false",
        f"--exit-timeout-secs={DRAIN_SECONDS}",
        *flags,
    ]


def variables(environment: Environment | None) -> dict[str, str]:
    """Where the server finds its libraries, and the model this program."""
    found = dict(os.environ)
    paths = [str(Path(__file__).parents[2]), sysconfig.get_path("purelib")]
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [found.get("PYTHONPATH")])])
    if environment:
        libraries = [str(environment.packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        found["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [found.get("LD_LIBRARY_PATH")])])
    return found


class Server:
    """A tritonserver in a process of its own, which is told to drain when this one ends, however it ends."""

    def __init__(
        self,
        repository: Path,
        environment: Environment | None,
        address: Address,
        log: Path,
        flags: Sequence[str] = (),
    ) -> None:
        self.address, self.log, self.stopping = address, log, False
        self._answered: float | None = None
        line = command(repository, environment, address, secrets.token_hex(16), flags)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                line,
                env=variables(environment),
                stdout=file,
                stderr=file,
                start_new_session=True,  # so that Ctrl-C reaches it once, through `stop`
                preexec_fn=terminate_with_parent,  # noqa: PLW1509, for it calls only prctl
            )

    def wait_ready(self) -> None:
        """Returns once the model can be asked. Raises UserError where the server ends by itself, with its reason, and where
        it answers nothing for START_SECONDS."""
        ends = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if self.process.poll() is not None:
                if self.stopping:
                    return
                raise UserError(f"Triton did not start: {reason(self.log)}; the whole log is {self.log}")
            if time.monotonic() > ends:
                self.process.kill()
                raise UserError(f"Triton did not answer within {START_SECONDS} s; its log is {self.log}")
            time.sleep(0.2)
        self._models = psutil.Process(self.process.pid).children()

    def is_ready(self) -> bool:
        host = "127.0.0.1" if self.address.host == "0.0.0.0" else self.address.host
        connection = http.client.HTTPConnection(host, self.address.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait(self) -> int:
        """Returns the server's exit status, once it was stopped: 0 also where it answered all and then did not end. Raises
        UserError where it ends by itself, and where a process of the model does: Triton starts no other, answers every
        request with an error and stays "ready"."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(WATCH_SECONDS)
                if self.stopping:
                    return status
                raise UserError(
                    f"Triton ended by itself with status {status}: {reason(self.log)}; the whole log is {self.log}"
                )
            if self.stopping and self._hangs():
                self._kill()
                print(
                    f"every request was answered, but Triton kept its model for {UNLOAD_SECONDS} s: killed", flush=True
                )
                return 0
            if not self.stopping and not all(map(_is_alive, self._models)):
                self.stop()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(DRAIN_SECONDS)
                self._kill()
                raise UserError(
                    "a process of the model ended by itself, killed by the system for want of memory or by a crash, and "
                    f"Triton starts no other; the log is {self.log}"
                )

    def _hangs(self) -> bool:
        """Whether the last request was answered long ago."""
        if self._answered is None and ANSWERED.search(self.log.read_text(encoding="utf-8", errors="replace")):
            self._answered = time.monotonic()
        return self._answered is not None and time.monotonic() - self._answered > UNLOAD_SECONDS

    def _kill(self) -> None:
        """The processes of the model too: one that hangs does not notice that its server is gone."""
        for process in [*self._models, self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Refuses new requests and finishes those under way; `wait` then returns."""
        self.stopping = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


LIBC = ctypes.CDLL(None)


def terminate_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone (prctl(2), PR_SET_PDEATHSIG)."""
    LIBC.prctl(1, signal.SIGTERM)


def reason(log: Path) -> str:
    """What the server's log says of why it ended, in one line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for pattern in (r"UserError: (.*)", r"failed to load '[^']*' version \S+ (.*)", r"(?:error|Error): (.*)"):
        for line in lines:
            if found := re.search(pattern, line):
                return found[1].strip()
    return lines[-1].strip() if lines else "it said nothing"


def serve(
    repository: Path, environment: Environment | None, address: Address, log: Path, flags: Sequence[str] = ()
) -> int:
    """Serves until Ctrl-C or SIGTERM, and then until what is under way is drawn. Returns the server's exit status.

    Raises UserError where the server or a process of the model ends by itself.
    """
    server = Server(repository, environment, address, log, flags)

    def stop(number: int, frame: object) -> None:
        print(f"stopping: requests under way are finished, for {DRAIN_SECONDS} s at most", flush=True)
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.wait_ready()
    if not server.stopping:
        grpc = f"{address.host}:{address.grpc_port}"
        print(
            f"ready: HTTP http://{address.host}:{address.http_port}/v2/models/slimxl, gRPC {grpc}"
            f"\nmeasure it with: python -m engines load --server {grpc} --out out/load.json"
            "\nCtrl-C or SIGTERM stops it",
            flush=True,
        )
        if not address.is_loopback:
            print(f"listening on {address.host}: whoever reaches it can draw, there is no authentication", flush=True)
    return server.wait()
