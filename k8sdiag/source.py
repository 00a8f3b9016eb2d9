"""Where facts come from. Nothing behind this seam can tell a live node from a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from k8sdiag.facts import AnyFact


class Batch(msgspec.Struct, frozen=True):
    """Everything that became known up to `t_ns`. Facts about who is who come before counts."""

    t_ns: int
    """CLOCK_BOOTTIME, ns."""
    facts: tuple[AnyFact, ...]


class Source(Protocol):
    """Yields batches until there are no more; close() may be called from another thread and ends it."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


class Tee:
    """A source that also hands each batch to `write`, before passing it on."""

    def __init__(self, source: Source, write: Callable[[Batch], None]) -> None:
        self._source = source
        self._write = write

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._source:
            self._write(batch)
            yield batch

    def close(self) -> None:
        self._source.close()


class Paced:
    """A source whose batches come as far apart as when they were recorded, divided by `speed`.

    `speed` may be changed while it runs; `paused` holds it. Reads the clock: only faces use it.
    """

    def __init__(self, source: Source, speed: float = 1.0) -> None:
        self._source = source
        self.speed = speed
        self.paused = False
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        last_t_ns: int | None = None
        for batch in self._source:
            if last_t_ns is not None:
                self._sleep((batch.t_ns - last_t_ns) / 1e9)
            last_t_ns = batch.t_ns
            if self._closed:
                return
            yield batch

    def _sleep(self, event_s: float) -> None:
        left_s = event_s
        while left_s > 0 and not self._closed:
            step_s = min(0.05, left_s / self.speed)
            time.sleep(step_s)
            if not self.paused:
                left_s -= step_s * self.speed

    def close(self) -> None:
        self._closed = True
        self._source.close()
