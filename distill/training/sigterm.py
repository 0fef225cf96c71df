"""SIGTERM, which schedulers send some time before they kill: noted now, obeyed where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noting_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside the block SIGTERM only sets a flag; yields a function that tells whether it is set. In a thread other than the
    main one, where Python lets nobody handle signals, nothing is changed."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
