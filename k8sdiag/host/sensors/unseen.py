"""Drops that the kernel's own counters know of and no program saw: what an exact count has to own up to.

A drop is missed when it interrupts the drop program itself (counted by the kernel as recursion_misses), or where
the machine runs no tracing programs at all for moments, as some hardened sandboxes do while their agent has the
CPU. For some reasons the kernel keeps a counter per namespace that rises once per drop; what it counts beyond our
count was missed. Counters are read before the maps are switched, so traffic in between can only hide a gap until
the next tick, never invent one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from k8sdiag.facts import KEYS_IN_USE, AnyFact, DropKey, Drops
from k8sdiag.host.sensors.counters import Reading, Space, read_softnet_dropped

_UDP = 17


class Counter(NamedTuple):
    """A kernel counter and the drops it counts one by one."""

    name: str
    reason: str
    family: int
    protocol: int
    """Where several protocols share a reason; 0 stands for all."""


COUNTERS = (
    Counter("UdpNoPorts", "NO_SOCKET", 2, _UDP),
    Counter("Udp6NoPorts", "NO_SOCKET", 10, _UDP),
    Counter("UdpRcvbufErrors", "SOCKET_RCVBUFF", 2, _UDP),
    Counter("Udp6RcvbufErrors", "SOCKET_RCVBUFF", 10, _UDP),
    Counter("TcpExtIPReversePathFilter", "IP_RPFILTER", 2, 0),
)
_MACHINE: Space = (0, 0)
_SOFTNET = "softnet dropped"


class Unseen:
    """Compares what the kernel counted with what the program counted, cumulatively since the start."""

    def __init__(self, reasons: dict[int, str], symbol_name: Callable[[int], str]) -> None:
        """`reasons`: the kernel's names for its drop reasons; a counter of one that it lacks is not compared."""
        self._reasons = reasons
        self._counters = [counter for counter in COUNTERS if counter.reason in reasons.values()]
        self._symbol_name = symbol_name
        self._started: dict[Space, dict[str, int]] = {}
        self._kernel: dict[Space, dict[str, int]] = {}
        self._ours: dict[Space, dict[str, int]] = {}
        self._classes: dict[int, tuple[Space, str] | None] = {}
        self._gaps: dict[Space, dict[str, int]] = {}
        self._forgotten = 0
        self.active: set[int] = set()
        """Inodes of the namespaces whose counters rose with the drops of the last tick."""

    def before(self, readings: dict[Space, Reading]) -> None:
        """Take in counters; the maps must be switched after they were read, and the program count already.

        Where a namespace is met for the first time, nothing is taken to have been missed in it so far.
        """
        names = [*(counter.name for counter in self._counters), _SOFTNET]
        counters = {space: reading.protocols for space, reading in readings.items()}
        counters[_MACHINE] = {_SOFTNET: read_softnet_dropped()}
        for space, values in counters.items():
            named = {name: values[name] for name in names if name in values}
            if space not in self._started:
                ours = self._ours.get(space, {})
                self._started[space] = {name: value - ours.get(name, 0) for name, value in named.items()}
            self._kernel[space] = named

    def after(self, facts: Iterable[AnyFact]) -> int:
        """Take in what the program counted until the switch. Returns drops known to be missed since the start."""
        self.active = set()
        for fact in facts:
            if isinstance(fact, DropKey):
                self._classes[fact.id] = self._classify(fact)
                self._classes.pop(fact.id - KEYS_IN_USE, None)
            elif isinstance(fact, Drops):
                for key_id, skbs in zip(fact.key, fact.skbs, strict=True):
                    found = self._classes.get(key_id)
                    if found:
                        space, name = found
                        ours = self._ours.setdefault(space, {})
                        ours[name] = ours.get(name, 0) + skbs
                        self.active.add(space[0])
        for space, values in self._kernel.items():
            ours = self._ours.get(space, {})
            gaps = self._gaps.setdefault(space, {})
            for name, value in values.items():
                gap = value - self._started[space][name] - ours.get(name, 0)
                gaps[name] = max(gap, gaps.get(name, 0))
        return self._forgotten + sum(gap for gaps in self._gaps.values() for gap in gaps.values())

    def forget(self, inodes: Iterable[int]) -> None:
        """Let go of namespaces that are none of these any more; what was missed in them stays counted."""
        living = {0, *inodes}
        for space in [space for space in self._started if space[0] not in living]:
            self._forgotten += sum(self._gaps.pop(space, {}).values())
            for table in (self._started, self._kernel, self._ours):
                table.pop(space, None)

    def _classify(self, key: DropKey) -> tuple[Space, str] | None:
        reason = self._reasons.get(key.reason)
        if reason == "CPU_BACKLOG" or self._symbol_name(key.location) == "enqueue_to_backlog":
            return _MACHINE, _SOFTNET
        for counter in self._counters:
            if (counter.reason, counter.family) == (reason, key.family) and counter.protocol in (0, key.protocol):
                return (key.netns, key.netns_cookie), counter.name
        return None
