"""A terminal that may vanish: a closed window or a lost ssh connection must not hold the program, nor its probes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TextIO, cast

from textual.app import App
from textual.drivers.linux_driver import LinuxDriver

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_RESORT_S = 5.0
"""After a signal the program ends by then at the latest, even where the terminal takes no more output."""


class _Forgiving:
    """Writes until the terminal is gone, and then into nothing.

    Textual writes from a thread of its own through a queue of thirty entries: an error would end that thread, and
    the event loop would wait for room in the queue for ever.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._gone = False

    def write(self, text: str) -> None:
        self._try(lambda: self._file.write(text))

    def flush(self) -> None:
        self._try(self._file.flush)

    def fileno(self) -> int:
        return self._file.fileno()

    def _try(self, write: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            write()
        except OSError:
            self._gone = True
            os.kill(os.getpid(), signal.SIGHUP)  # the kernel sends it to the foreground only; leaving is right for all


class TerminalDriver(LinuxDriver):
    """Textual's driver (Linux and macOS), over such a file."""

    def __init__(
        self, app: App[object], *, debug: bool = False, mouse: bool = True, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(app, debug=debug, mouse=mouse, size=size)
        self._file = cast("TextIOWrapper", _Forgiving(cast("TextIO", self._file)))


@contextmanager
def leaving_on_signals(leave: Callable[[], bool]) -> Iterator[None]:
    """Signals that end a program call `leave`, or raise KeyboardInterrupt where that says there is no screen.

    Python's own handlers rather than the event loop's: they run even while the loop waits for the terminal.
    """

    def handle(_number: int, _frame: object) -> None:
        if not leave():
            raise KeyboardInterrupt
        last_resort = threading.Timer(LAST_RESORT_S, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
