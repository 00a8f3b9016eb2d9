"""The one thread beside the screen: it iterates the source, folds, and leaves the latest Snapshot to be fetched."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from k8sdiag.snapshot import Snapshot
from k8sdiag.source import Batch, Source

STOP_S = 0.5
"""How long after close() the source may take to end: leaving takes less than a second, whatever the source does.

The thread is a daemon, so that one that hangs does not hold the program; the kernel takes back its probes then."""
EARLY = 0.9
"""A batch this share of the interval after the last Snapshot is due: ticks of a live source waver a little."""


class Folding(Protocol):
    """What the feed needs of an Engine."""

    def fold(self, batch: Batch) -> None: ...

    def snapshot(self) -> Snapshot: ...

    def zero(self) -> None: ...


class Feed:
    """Runs a source through an engine. The owner starts and stops it; everybody may ask for the latest()."""

    def __init__(self, source: Source, engine: Folding, interval_s: float = 1.0) -> None:
        self._source = source
        self._engine = engine
        self._interval_s = interval_s
        self._latest: Snapshot | None = None
        self._zero = threading.Event()
        self._stopping = False
        self._closed_s = 0.0
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self.error: Exception | None = None
        """What ended the source before its time."""
        self.ended = False
        """The source has no more batches."""
        self.begun = threading.Event()
        """Set with the first Snapshot, or when there will be none."""

    def start(self) -> None:
        self._thread.start()

    def latest(self) -> Snapshot | None:
        """The newest Snapshot, None before the first batch. From any thread."""
        return self._latest

    def zero(self) -> None:
        """Count from here on; seen with the next batch. From any thread."""
        self._zero.set()

    def close(self) -> None:
        """Ask the source to end, without waiting for it."""
        if not self._stopping:
            self._stopping = True
            self._closed_s = time.monotonic()
            self._source.close()

    def stop(self) -> bool:
        """Close the source and wait for the thread. False if it did not end in time."""
        self.close()
        if self._thread.is_alive():
            self._thread.join(max(self._closed_s + STOP_S - time.monotonic(), 0.05))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._follow()
        except Exception as error:  # noqa: BLE001 - a thread has no caller: the owner of the feed raises it again
            self.error = error
        finally:
            self.ended = True
            self.begun.set()

    def _follow(self) -> None:
        published_s = float("-inf")
        behind = False
        for batch in self._source:
            if self._stopping:
                break  # the screen is gone; letting go of the source's iterator lets it clean up
            if self._zero.is_set():
                self._zero.clear()
                self._engine.zero()
                published_s = float("-inf")
            self._engine.fold(batch)
            now_s = time.monotonic()
            behind = now_s - published_s < self._interval_s * EARLY
            if not behind:
                self._publish()
                # From the end: an engine with much to sum up gets its time between two Snapshots.
                published_s = time.monotonic() if time.monotonic() - now_s > self._interval_s else now_s
        if behind and not self._stopping:
            self._publish()

    def _publish(self) -> None:
        self._latest = self._engine.snapshot()
        self.begun.set()
