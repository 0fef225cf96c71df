"""The one exception that means "the input was wrong", and the one place that turns it into exit code 2."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from safetensors import SafetensorError

FULL_DISK = re.compile(rf"{os.strerror(errno.ENOSPC)}|\d+ requested and \d+ written")
"""Messages of a full disk: the system's, which safetensors repeats without an errno, and that of numpy's `tofile`."""


class UserError(Exception):
    """A mistake the user can mend. Its message is one line: what was got, what is allowed, what to do."""


def unknown(kind: str, got: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not in a catalogue; it lists the known names and the nearest one."""
    names = sorted(allowed)
    near = get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {got!r}: known are {', '.join(names)}{hint}")


def require_least(least: float, **numbers: float) -> None:
    """Raises UserError for the first option, called as in Python, whose number is below `least`, NaN or infinite."""
    for name, number in numbers.items():
        _require_finite(name, number)
        if number < least:
            raise UserError(f"--{name.replace('_', '-')} is {number}; the least is {least}")


def require_between(least: float, most: float, **numbers: float) -> None:
    """Raises UserError for the first option whose number is not from `least` to `most`."""
    require_least(least, **numbers)
    for name, number in numbers.items():
        if number > most:
            raise UserError(f"--{name.replace('_', '-')} is {number}; the most is {most}")


def require_above(limit: float, **numbers: float) -> None:
    """Raises UserError for the first option whose number is not above `limit`."""
    for name, number in numbers.items():
        _require_finite(name, number)
        if number <= limit:
            raise UserError(f"--{name.replace('_', '-')} is {number}; it must be above {limit}")


def _require_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise UserError(f"--{name.replace('_', '-')} is {number}; it must be a finite number")


def parse_counts(option: str, text: str, most: int = 1024) -> list[int]:
    """Whole numbers from 1 to `most` between commas. Raises UserError for anything else."""
    from distill.common.options import whole_number

    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        numbers = [whole_number(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= number <= most for number in numbers):
        shown = text if len(text) < 60 else f"{text[:57]}..."
        raise UserError(f"{option} {shown!r} is not a list of whole numbers from 1 to {most}, e.g. 1 or 1,4")
    return numbers


def describe_error(error: BaseException) -> str:
    """An exception of someone else's code, for a note or a record."""
    return f"{type(error).__name__}: {error}"


@contextmanager
def explaining_full_memory(advice: str) -> Iterator[None]:
    """A GPU whose memory runs out inside is a UserError: what was wanted and what there is, in torch's words, and
    `advice` on what to do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = ". ".join(str(error).split(". ")[:3])
        raise UserError(f"the GPU's memory is full ({wanted}); {advice}") from None


def quiet_imports() -> None:
    """Keeps out of sight what libraries say of each other's packages while they are imported."""
    for name in ("bitsandbytes", "diffusers.utils.import_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Keeps the libraries' own notices out of the user's sight, unless the environment asks for them."""
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    quiet_imports()


def exit_on_user_error(command: Callable[[], int | None]) -> int:
    """Runs `command` and returns its exit code. A UserError, and what the system refuses (a full disk, a folder that may
    not be written, links in a circle), becomes one line on stderr and exit code 2; Ctrl-C becomes 130.

    Options are read by the rules of `common.options`, the libraries keep quiet, GPUs are numbered as nvidia-smi does.
    """
    quiet_libraries()
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    from distill.common.options import OPTIONS

    try:
        with OPTIONS:
            return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads stdout has gone, as `… | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, SafetensorError, RuntimeError) as error:
        print(f"error: {_of_the_system(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130


def _of_the_system(error: OSError | SafetensorError | RuntimeError) -> str:
    """One line for what the system refused; any other error is raised again."""
    if "Symlink loop" in str(error):  # of Path.resolve, up to Python 3.12
        return f"links that lead in a circle: {error}"
    if FULL_DISK.search(str(error)):
        where = f" of {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"the disk{where} is full; free some space and run the same command again"
    if not isinstance(error, OSError) or error.errno is None:
        raise error
    return ": ".join(filter(None, (error.strerror, error.filename and str(error.filename))))
