"""Runs a Triton Inference Server over a model repository: the one on the PATH (as in Triton's container), or the one
of `environment.py`. Sees to it that the server, its model's processes and slimxl end together.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from distill.common.errors import UserError
from engines.gpus import version_tuple
from engines.serving.environment import Environment

WHEEL_VERSION = "24.10"
"""Of Triton in the wheel nvidia-pytriton, as its containers are counted."""
FIRST_SOUND_VERSION = (25, 7)
START_SECONDS = 1800
"""How long a server may take to load, warm up and answer."""
DRAIN_SECONDS = 60
"""How long requests under way may take to finish after SIGTERM."""
ANSWERED = re.compile(r"^\S+ \S+ \S+ server\.cc:\d+\] .?All models are stopped", re.MULTILINE)
"""What Triton's core writes into its log after SIGTERM once no request is under way. Anchored to server.cc: a client could
call its request so."""
LOST_GPU = re.compile(r"cuda:\d+ answers no more")
"""What the model writes before it ends its process."""
UNLOAD_SECONDS = 20
"""How long the server may then take to end. Where an answer found the shared memory full it would wait for all of
DRAIN_SECONDS."""
WATCH_SECONDS = 1.0
"""How often the log is looked at while the server stops."""
SHARED_MEMORY = Path("/dev/shm")
"""Where Triton's Python backend has its regions: one for each process of the model, as large as the answers have been."""
CLOSED_APIS = "shared-memory,model-repository,trace,logging"
"""What a client of a picture service never needs, and what the published attacks on Triton go through."""


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
        if self.http_port == self.grpc_port:
            raise UserError(f"--http-port and --grpc-port are both {self.http_port}: choose two that differ")
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


def require_unexposed(address: Address) -> None:
    """Raises UserError where other machines could reach a Triton that they can crash, or one of unknown version."""
    version = os.environ.get("NVIDIA_TRITON_SERVER_VERSION", "") if shutil.which("tritonserver") else WHEEL_VERSION
    if not address.is_loopback and version_tuple(version) < FIRST_SOUND_VERSION:
        raise UserError(
            f"this Triton is {version or 'of an unknown version (NVIDIA_TRITON_SERVER_VERSION is not set)'}, and one before "
            "25.07 can be crashed by anyone who reaches it (CVE-2025-23310, CVE-2025-23311): it does not listen on "
            f"{address.host}; put a tritonserver of 25.07 or newer on the PATH (Triton's container), a proxy that passes on "
            "no chunked bodies in front of 127.0.0.1, or pass --allow-exposed"
        )


def command(repository: Path, environment: Environment | None, address: Address, key: str, region: str) -> list[str]:
    """The server's command line. Only those who know `key` can use CLOSED_APIS, and nobody can load another model.
    `region` is how the names of its shared memory begin."""
    program = str(environment.server) if environment else "tritonserver"
    backends = [f"--backend-directory={environment.backends}"] if environment else []
    return [
        program,
        f"--model-repository={repository.resolve()}",
        *backends,
        f"--backend-config=python,shm-region-prefix-name={region}",
        "--model-control-mode=none",
        f"--http-restricted-api={CLOSED_APIS}:slimxl-key={key}",
        f"--grpc-restricted-protocol={CLOSED_APIS}:slimxl-key={key}",
        f"--http-address={address.host}",
        f"--http-port={address.http_port}",
        f"--grpc-address={address.host}",
        f"--grpc-port={address.grpc_port}",
        "--allow-metrics=false",
        f"--exit-timeout-secs={DRAIN_SECONDS}",
    ]


def variables(environment: Environment | None) -> dict[str, str]:
    """Environment variables: where the server finds its libraries, and its model finds slimxl."""
    found = dict(os.environ)
    paths = [str(Path(__file__).parents[2]), sysconfig.get_path("purelib")]
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [found.get("PYTHONPATH")])])
    if environment:
        libraries = [str(environment.packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        found["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [found.get("LD_LIBRARY_PATH")])])
    return found


class Server:
    """A tritonserver in a process of its own. It gets SIGTERM when this process ends, however this one ends."""

    def __init__(self, repository: Path, environment: Environment | None, address: Address, log: Path) -> None:
        self.address, self.log, self.stopping = address, log, False
        self._answered: float | None = None
        self._models: list[psutil.Process] = []
        self._region = f"slimxl-{secrets.token_hex(4)}-"
        line = command(repository, environment, address, secrets.token_hex(16), self._region)
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
        """Returns once the model can be asked. Raises UserError where the server ends by itself or does not answer within
        START_SECONDS."""
        ends = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if self.process.poll() is not None:
                self._kill()
                if self.stopping:
                    return
                raise UserError(f"Triton did not start: {self._how_it_ended()}")
            if time.monotonic() > ends:
                self._kill()
                raise UserError(f"Triton did not answer within {START_SECONDS} s; its log is {self.log}")
            self._find_models()
            time.sleep(0.2)
        self._find_models()

    def _find_models(self) -> None:
        """They are no longer its children once it has ended."""
        self._models = psutil.Process(self.process.pid).children() or self._models

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
        """Returns the exit status of a server that was stopped; 0 also where it answered all requests and then had to be
        killed. Raises UserError as soon as the server ends by itself, or a process of its model does: Triton starts no
        other, stays "ready" and answers every request with an error. Its shared memory is freed in any case."""
        try:
            while self.process.poll() is None:
                if self.stopping and self._hangs():
                    print(
                        f"every request was answered, but Triton kept its model for {UNLOAD_SECONDS} s: killed",
                        flush=True,
                    )
                    return 0
                if not self.stopping and not all(map(is_alive, self._models)):
                    lost = LOST_GPU.findall(self.log.read_text(encoding="utf-8", errors="replace"))
                    why = lost[-1] if lost else "killed by the system for want of memory, by somebody, or by a crash"
                    raise UserError(
                        f"a process of the model ended by itself ({why}), and Triton starts no other: the server was ended, "
                        f"with the requests under way; start it again; the log is {self.log}"
                    )
                wait_any([self.process, *([] if self.stopping else self._models)], WATCH_SECONDS)
            if not self.stopping:
                raise UserError(f"Triton ended by itself: {self._how_it_ended()}")
            return self.process.returncode
        finally:
            self._kill()

    def _how_it_ended(self) -> str:
        """A signal is its own reason: what the log says last has nothing to do with it."""
        status = self.process.returncode
        why = f"status {status}, {reason(self.log)}"
        if status < 0:
            why = f"it got {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            why += ", from somebody or from the system for want of memory"
        return f"{why}; the whole log is {self.log}"

    def _hangs(self) -> bool:
        """Whether the last request was answered more than UNLOAD_SECONDS ago."""
        if self._answered is None and ANSWERED.search(self.log.read_text(encoding="utf-8", errors="replace")):
            self._answered = time.monotonic()
        return self._answered is not None and time.monotonic() - self._answered > UNLOAD_SECONDS

    def _kill(self) -> None:
        """Kills what still runs, the model's processes too: one that hangs does not notice that its server is gone. Then
        removes the shared memory, which only a server that ends in order does by itself."""
        for process in [*self._models, self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        for region in SHARED_MEMORY.glob(f"{self._region}*"):
            region.unlink(missing_ok=True)

    def stop(self) -> None:
        """Refuses new requests and finishes those under way; `wait` then returns."""
        self.stopping = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_any(processes: Sequence[psutil.Process | subprocess.Popen[bytes]], seconds: float) -> None:
    """Returns as soon as one of them has ended, at the latest after `seconds`. They need not be children."""
    with contextlib.ExitStack() as opened:
        handles = []
        for process in processes:
            try:
                handles.append(os.pidfd_open(process.pid))
            except ProcessLookupError:
                return
            opened.callback(os.close, handles[-1])
        select.select(handles, [], [], seconds)


LIBC = ctypes.CDLL(None)


def terminate_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone (prctl(2), PR_SET_PDEATHSIG)."""
    LIBC.prctl(1, signal.SIGTERM)


def reason(log: Path) -> str:
    """Why the server ended, from its log, in one line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for pattern in (r"UserError: (.*)", r"failed to load '[^']*' version \S+ (.*)", r"(?:error|Error): (.*)"):
        for line in lines:
            if found := re.search(pattern, line):
                return found[1].strip()
    return lines[-1].strip() if lines else "it said nothing"
