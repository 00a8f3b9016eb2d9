"""The live node as a source of batches: one loop that asks every sensor once a tick."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from k8sdiag import __version__
from k8sdiag.facts import AnyFact, Clock, Cost, DropKey, Lost, Node
from k8sdiag.host.bpf import Compilation, possible_cpus
from k8sdiag.host.instances import Instance
from k8sdiag.host.inventory import Inventory
from k8sdiag.host.sensors.conntrack import ConntrackStatistics, failures
from k8sdiag.host.sensors.counters import NetnsCounters
from k8sdiag.host.sensors.drops import DropSensor
from k8sdiag.host.sensors.table import TableReader
from k8sdiag.host.sensors.unseen import Unseen
from k8sdiag.host.symbols import KernelSymbols
from k8sdiag.host.wire import map_bytes
from k8sdiag.source import Batch

if TYPE_CHECKING:
    import psutil

LAST_READING_S = 2.0
"""How long the end of a watch waits for connection tables to be read once more."""
CLOCK_STEP_NS = 100_000_000
"""A change of the offset between wall clock and boot time beyond this is a step, and said again."""


class LiveSource:
    """This machine, from the moment the probes are attached until close() or the end of `duration_s`.

    The first batch says that the probes count, and on what machine; the second, who is who on it; each further
    one is a tick. Raises the errors of host.bpf when the probe cannot be loaded.
    """

    def __init__(
        self,
        interval_s: float = 1.0,
        duration_s: float | None = None,
        samples_per_s: int = 50,
        root: Path = Path("/"),
        compilation: Compilation | None = None,
    ) -> None:
        """`compilation`: of the drop probe, if it was begun while this module was still to be imported."""
        self._interval_s = interval_s
        self._duration_s = duration_s
        self._closing = threading.Event()
        compilation = compilation or Compilation("drops").begin(KernelSymbols())
        self._symbols = compilation.symbols
        self._drops = DropSensor(compilation, samples_per_s)
        self._inventory = Inventory(root)
        self._counters = NetnsCounters(self._inventory)
        self._holders = TableReader(_boottime_ns)
        self._instance: Instance | None = None
        self._process: psutil.Process | None = None
        self._root = root
        self._clock_ns = 0

    def __iter__(self) -> Iterator[Batch]:
        try:
            self._inventory.notice()  # while the probe is compiled
            self._drops.load()
            # What conntrack counted is read before anything is attached, or its first refusals could not be told.
            # What else the kernel counted, after it: nothing from before the watch is a loss of the watch.
            earlier = self._counters.read(everything=True)
            self._drops.baseline(failures(earlier))
            named = self._drops.start()
            self._instance = Instance(self._root)
            named.append(self._instance.capability())
            begin_s = time.monotonic()
            yield Batch(_boottime_ns(), (node_fact(self._inventory), *self._clock(), *named))
            t_ns = _boottime_ns()
            who = tuple(self._inventory.facts(t_ns))
            self._unseen = Unseen(self._drops.reasons, self._symbols.name)
            self._conntrack = ConntrackStatistics(self._drops.counts_chains)
            later = self._counters.read(everything=True)
            self._unseen.before(later)
            tables = (*self._conntrack.facts(earlier), *self._conntrack.facts(later))
            yield Batch(t_ns, (*who, *tables))
            end_s = None if self._duration_s is None else begin_s + self._duration_s
            last = False
            while not last:
                now_s = time.monotonic()
                # Ticks keep to the clock; those that were missed are not made up for.
                due_s = begin_s + ((now_s - begin_s) // self._interval_s + 1) * self._interval_s
                if end_s is not None:
                    due_s = min(due_s, end_s)
                closed = self._closing.wait(max(0.0, due_s - now_s))
                last = closed or (end_s is not None and time.monotonic() >= end_s - 0.001)
                yield self._tick(last)
        finally:
            self._drops.stop()
            self._holders.close()
            if self._instance:
                self._instance.close()

    def close(self) -> None:
        """End the iteration after one last read; from any thread."""
        self._closing.set()

    def _tick(self, last: bool) -> Batch:
        readings = self._counters.read(everything=last)
        self._unseen.before(readings)
        tables: list[AnyFact] = list(self._conntrack.facts(readings))
        self._read_tables(last=last)
        counted = self._drops.read(last=last)
        missed = self._unseen.after(counted)
        t_ns = _boottime_ns()
        strange = {
            fact.netns
            for fact in counted
            if isinstance(fact, DropKey)
            and fact.netns
            and not self._inventory.knows(fact.netns, fact.netns_cookie, fact.ifindex)
        }
        self._inventory.suspect(strange)
        self._unseen.forget(self._inventory.inodes)
        self._counters.busy(self._unseen.active | self._drops.filtered)
        who = list(self._inventory.facts(t_ns))
        tables += [*self._conntrack.ended(self._inventory.inodes, t_ns), *self._holders.collect()]
        return Batch(t_ns, (*self._clock(), *who, *tables, *counted, self._lost(missed), self._cost()))

    def _read_tables(self, *, last: bool) -> None:
        """Have who holds the connection tables read, aside of the ticks; the end waits for it, within limits."""
        spaces = [
            (path, *space, count)
            for space, count in self._conntrack.counts.items()
            if (path := self._inventory.path(space[0]))
        ]
        if last:
            self._holders.wait(LAST_READING_S / 2)
        self._holders.begin(spaces, everything=last, pressed=self._conntrack.pressed)
        if last:
            self._holders.wait(LAST_READING_S / 2)

    def _clock(self) -> Iterator[Clock]:
        now_ns = time.time_ns() - _boottime_ns()
        if abs(now_ns - self._clock_ns) > CLOCK_STEP_NS:
            self._clock_ns = now_ns
            yield Clock(now_ns)

    def _lost(self, missed: int) -> Lost:
        losses, runs = self._drops.losses(), self._drops.runs()
        # A drop that interrupted the program may also be missing from a counter's namesake: not both are added.
        # What found no room was seen, though no count has it.
        return Lost(max(runs.misses, missed - losses.keys), losses.keys, losses.samples, losses.hooks)

    def _cost(self) -> Cost:
        if self._process is None:
            import psutil  # 30 ms: after the probe has begun to count

            self._process = psutil.Process()
        times = self._process.cpu_times()
        runs = self._drops.runs()
        return Cost(
            cpu_s=round(times.user + times.system, 3),
            rss_bytes=self._process.memory_info().rss,
            map_bytes=map_bytes(possible_cpus()),
            bpf_runs=runs.runs or None,
            bpf_ns=runs.run_ns or None,
        )


def node_fact(inventory: Inventory) -> Node:
    """This machine."""
    return Node(
        platform.node(), platform.release(), inventory.host_inode,
        architecture=platform.machine(), tool=__version__,
    )  # fmt: skip


def _boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
