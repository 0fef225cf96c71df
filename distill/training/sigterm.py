"""SIGTERM, which schedulers send some time before they kill: noted now, obeyed where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noting_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM ends nothing; what is yielded says whether it came. Python lets the main thread alone take
    signals: in another they do what they did."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
