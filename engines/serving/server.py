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
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
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
UNLOAD_SECONDS = 20
"""How long the server may then take to end. Where an answer found the shared memory full it would wait for all of
DRAIN_SECONDS."""
WATCH_SECONDS = 1.0
"""How often the model's processes are looked at."""
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


def command(repository: Path, environment: Environment | None, address: Address, key: str) -> list[str]:
    """The server's command line. Only those who know `key` can use CLOSED_APIS, and nobody can load another model."""
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
        line = command(repository, environment, address, secrets.token_hex(16))
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
        """Returns the exit status of a server that was stopped; 0 also where it answered all requests and then had to be
        killed. Raises UserError where the server ends by itself, or a process of its model does: Triton starts no other,
        stays "ready" and answers every request with an error."""
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
            if not self.stopping and not all(map(is_alive, self._models)):
                self.stop()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(DRAIN_SECONDS)
                self._kill()
                raise UserError(
                    "a process of the model ended by itself, killed by the system for want of memory or by a crash, and "
                    f"Triton starts no other; the log is {self.log}"
                )

    def _hangs(self) -> bool:
        """Whether the last request was answered more than UNLOAD_SECONDS ago."""
        if self._answered is None and ANSWERED.search(self.log.read_text(encoding="utf-8", errors="replace")):
            self._answered = time.monotonic()
        return self._answered is not None and time.monotonic() - self._answered > UNLOAD_SECONDS

    def _kill(self) -> None:
        """Kills the model's processes too: one that hangs does not notice that its server is gone."""
        for process in [*self._models, self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Refuses new requests and finishes those under way; `wait` then returns."""
        self.stopping = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


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
