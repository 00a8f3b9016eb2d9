"""A watch on this machine, for the live tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from k8sdiag.engine import Engine
from k8sdiag.host.live import LiveSource
from k8sdiag.snapshot import DropRow, Snapshot
from k8sdiag.source import Batch, Source, Tee


class Watch:
    """k8sdiag watching this machine in a thread: from the moment the probe counts until end()."""

    def __init__(self, interval_s: float = 0.2, write: Callable[[Batch], None] = lambda _: None) -> None:
        self.engine = Engine()
        self.snapshots: list[Snapshot] = []
        self._live = LiveSource(interval_s)
        self._source: Source = Tee(self._live, write)
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            for batch in self._source:
                self.engine.fold(batch)
                self.snapshots.append(self.engine.snapshot())
                if len(self.snapshots) == 2:  # attached, and who is who is known
                    self._ready.set()
        except BaseException as error:  # noqa: BLE001 -- handed to the test's thread
            self._error = error
            self._ready.set()

    def begin(self) -> Watch:
        self._thread.start()
        assert self._ready.wait(30)
        if self._error:
            raise self._error
        return self

    def end(self) -> Snapshot:
        self._source.close()
        self._thread.join(30)
        if self._error:
            raise self._error
        return self.engine.snapshot()


@contextmanager
def watching(interval_s: float = 0.2, write: Callable[[Batch], None] = lambda _: None) -> Iterator[Watch]:
    watch = Watch(interval_s, write).begin()
    try:
        yield watch
    finally:
        if watch._thread.is_alive():
            watch.end()


def drops_of(snapshot: Snapshot, owner: str) -> list[DropRow]:
    """Rows of one owner that are no benign noise, by the label it is shown with."""
    return [row for row in snapshot.drops if row.owner.label == owner and not row.benign]
