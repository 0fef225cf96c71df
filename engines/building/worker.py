"""The process that builds one engine: a request as a line of JSON on stdin, progress and the result on stdout.

A process of its own releases all its memory when it ends, can be killed, and keeps a crash of the builder's native code away
from the other builds. It ends when its parent does: stdin is then closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any, TextIO

import psutil

from distill.common.errors import UserError
from engines.flavors import BuildRequest, find_flavor


def _die_with_parent() -> None:
    def watch() -> None:
        sys.stdin.read()
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def cpu_seconds() -> float:
    """User and system time of all threads of this process. Other work on the machine hardly changes it."""
    return time.process_time()


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far; Linux counts in KiB, macOS in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def main() -> int:
    channel: TextIO = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between our lines
    request = BuildRequest.model_validate_json(sys.stdin.readline())
    _die_with_parent()
    started = time.monotonic()

    def tell(**event: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            channel.write(json.dumps(event) + "\n")

    try:
        outputs = find_flavor(request.flavor).build(request, lambda phase, part: tell(phase=phase, fraction=part))
    except (UserError, OSError) as error:
        tell(error=str(error))
        return 2
    except Exception as error:  # the builder's native exceptions have no common base
        tell(error=f"{type(error).__name__}: {error}")
        return 1
    tell(
        outputs=[tensor.model_dump() for tensor in outputs],
        seconds=time.monotonic() - started,
        cpu_seconds=cpu_seconds(),
        peak_rss_bytes=peak_rss_bytes(),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
