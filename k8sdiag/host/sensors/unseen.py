"""Drops that the kernel's own counters know of and no program saw: what an exact count has to own up to.

A drop is missed when it interrupts the drop program itself (counted by the kernel as recursion_misses), or where
the machine runs no tracing programs at all for moments, as some hardened sandboxes do while their agent has the
CPU. For some reasons the kernel keeps a counter per namespace that rises once per drop; what it counts beyond our
count was missed. Counters are read before the maps are switched, so traffic in between can only hide a gap until
the next tick, never invent one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from k8sdiag.facts import AnyFact, DropKey, Drops
from k8sdiag.host.inventory import Inventory
from k8sdiag.host.inventory.netns import inside

LOOKS_PER_TICK = 2
_UDP = 17


class Counter(NamedTuple):
    """A kernel counter and the drops it counts one by one."""

    file: str
    """Below /proc/net."""
    name: str
    reason: str
    family: int
    protocol: int


COUNTERS = (
    Counter("snmp", "UdpNoPorts", "NO_SOCKET", 2, _UDP),
    Counter("snmp6", "Udp6NoPorts", "NO_SOCKET", 10, _UDP),
    Counter("snmp", "UdpRcvbufErrors", "SOCKET_RCVBUFF", 2, _UDP),
    Counter("snmp6", "Udp6RcvbufErrors", "SOCKET_RCVBUFF", 10, _UDP),
    Counter("netstat", "TcpExtIPReversePathFilter", "IP_RPFILTER", 2, 0),
)
"""Where several protocols share a reason the protocol decides; 0 stands for all."""


def read_counters(path: str) -> dict[str, int]:
    """The COUNTERS of the namespace that `path` opens, by name, cumulative. Raises OSError."""
    with inside(path):
        directory = Path("/proc/thread-self/net")
        texts = {file: (directory / file).read_text() for file in {counter.file for counter in COUNTERS}
                 if (directory / file).exists()}  # fmt: skip
    values = parse_counters(texts)
    return {counter.name: values[counter.name] for counter in COUNTERS if counter.name in values}


def parse_counters(texts: dict[str, str]) -> dict[str, int]:
    """All counters of /proc/net/snmp, netstat (pairs of lines) and snmp6 (a line each), prefix and name joined."""
    values: dict[str, int] = {}
    for file in ("snmp", "netstat"):
        lines = texts.get(file, "").splitlines()
        for names, numbers in zip(lines[::2], lines[1::2], strict=False):
            prefix, *columns = names.split()
            for name, number in zip(columns, numbers.split()[1:], strict=False):
                values[prefix.rstrip(":") + name] = int(number)
    for line in texts.get("snmp6", "").splitlines():
        name, number = line.split()
        values[name] = int(number)
    return values


def read_softnet_dropped(path: Path = Path("/proc/net/softnet_stat")) -> int:
    """Packets that found the input queue of their CPU full, all CPUs: second column, hexadecimal."""
    return sum(int(line.split()[1], 16) for line in path.read_text().splitlines())


class Unseen:
    """Compares what the kernel counted with what the program counted, cumulatively since the start."""

    def __init__(
        self, inventory: Inventory, reason_name: Callable[[int], str], symbol_name: Callable[[int], str]
    ) -> None:
        self._inventory = inventory
        self._reason_name = reason_name
        self._symbol_name = symbol_name
        self._started: dict[tuple[int, int], dict[str, int]] = {}
        self._kernel: dict[tuple[int, int], dict[str, int]] = {}
        self._ours: dict[tuple[int, int], dict[str, int]] = {}
        self._classes: dict[int, tuple[tuple[int, int], str] | None] = {}
        self._active: set[int] = set()
        self._gaps: dict[tuple[tuple[int, int], str], int] = {}
        self._softnet_started = 0
        self._softnet = 0
        self._turn = 0

    def start(self) -> None:
        """Remember where the counters of all namespaces stand; those that appear later began at zero.

        To be called once the program counts, so that nothing counted before it is taken for missed.
        """
        self._softnet_started = read_softnet_dropped()
        for inode in self._inventory.inodes:
            values = self._read(inode)
            if values is not None:
                self._started[values[0]] = values[1]

    def before(self, *, everything: bool) -> None:
        """Read the kernel's counters; the maps must be switched after this."""
        inodes = self._inventory.inodes
        self._turn += 1
        chosen = set(inodes) if everything else {
            *(inode for inode in inodes if inode in self._active),
            *(inodes[(self._turn * LOOKS_PER_TICK + i) % len(inodes)] for i in range(min(LOOKS_PER_TICK, len(inodes)))),
        }  # fmt: skip
        self._active.clear()
        for inode in chosen:
            values = self._read(inode)
            if values is not None:
                self._kernel[values[0]] = values[1]
        self._softnet = read_softnet_dropped() - self._softnet_started

    def after(self, facts: Iterable[AnyFact]) -> int:
        """Take in what the program counted until the switch. Returns drops known to be missed since the start."""
        for fact in facts:
            if isinstance(fact, DropKey):
                self._classes[fact.id] = self._classify(fact)
            elif isinstance(fact, Drops):
                for key_id, skbs in zip(fact.key, fact.skbs, strict=True):
                    found = self._classes.get(key_id)
                    if found:
                        space, name = found
                        ours = self._ours.setdefault(space, {})
                        ours[name] = ours.get(name, 0) + skbs
                        self._active.add(space[0])
        for space, values in self._kernel.items():
            started = self._started.get(space, {})
            ours = self._ours.get(space, {})
            for name, value in values.items():
                gap = value - started.get(name, 0) - ours.get(name, 0)
                if gap > self._gaps.get((space, name), 0):
                    self._gaps[space, name] = gap
        backlog = self._softnet - self._ours.get(_MACHINE, {}).get(_SOFTNET, 0)
        if backlog > self._gaps.get((_MACHINE, _SOFTNET), 0):
            self._gaps[_MACHINE, _SOFTNET] = backlog
        return sum(self._gaps.values())

    def _read(self, inode: int) -> tuple[tuple[int, int], dict[str, int]] | None:
        path = self._inventory.path(inode)
        if not path:
            return None
        try:
            return (inode, self._inventory.cookie(inode)), read_counters(path)
        except OSError:
            return None  # gone in this moment

    def _classify(self, key: DropKey) -> tuple[tuple[int, int], str] | None:
        reason = self._reason_name(key.reason)
        if reason == "CPU_BACKLOG" or self._symbol_name(key.location) == "enqueue_to_backlog":
            return _MACHINE, _SOFTNET
        for counter in COUNTERS:
            if (counter.reason, counter.family) == (reason, key.family) and counter.protocol in (0, key.protocol):
                return (key.netns, key.netns_cookie), counter.name
        return None


_MACHINE = (0, 0)
_SOFTNET = "softnet dropped"
