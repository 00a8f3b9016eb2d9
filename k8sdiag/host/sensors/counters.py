"""The kernel's own counters of network namespaces, read inside each of them: a few namespaces per tick, in turn.

Entering a namespace and reading its files costs a fifth of a millisecond. So a tick reads those where something
goes on (drops, or tracked connections) and some others, and the last tick of a watch reads all.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from k8sdiag.host.inventory import Inventory
from k8sdiag.host.inventory.netns import inside

LOOKS_PER_TICK = 2
BUSY_PER_TICK = 20
"""Of namespaces where something goes on, the most that one tick reads."""

Space: TypeAlias = tuple[int, int]
"""Inode and cookie of a namespace."""


class Reading(NamedTuple):
    """Cumulative counters of one namespace. Fields that its kernel lacks are absent from the dicts."""

    protocols: dict[str, int]
    """/proc/net/snmp, netstat and snmp6: prefix and name joined, such as UdpNoPorts, Udp6NoPorts."""
    conntrack: tuple[dict[str, int], ...]
    """/proc/net/stat/nf_conntrack: a line for each possible CPU, as the header names the columns; `entries` says the
    same, all entries of the namespace, on every line. Empty without conntrack."""


def read_namespace(path: str, inode: int) -> Reading:
    """The counters of the namespace that `path` opens. Raises OSError, also when it now opens another one."""
    with inside(path, inode):
        here = Path("/proc/thread-self/net")
        texts = {name: (here / name).read_text() for name in ("snmp", "snmp6", "netstat") if (here / name).exists()}
        statistics = here / "stat/nf_conntrack"
        conntrack = parse_conntrack(statistics.read_text()) if statistics.exists() else ()
    return Reading(parse_protocols(texts), conntrack)


def parse_protocols(texts: dict[str, str]) -> dict[str, int]:
    """All counters of snmp and netstat (pairs of lines) and snmp6 (a line each)."""
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


def parse_conntrack(text: str) -> tuple[dict[str, int], ...]:
    """The hexadecimal columns by name, a dict for each CPU."""
    header, *rows = text.splitlines()
    names = header.split()
    return tuple({name: int(word, 16) for name, word in zip(names, row.split(), strict=False)} for row in rows)


def read_softnet_dropped(path: Path = Path("/proc/net/softnet_stat")) -> int:
    """Packets that found the input queue of their CPU full, all CPUs: second column, hexadecimal."""
    return sum(int(line.split()[1], 16) for line in path.read_text().splitlines())


class NetnsCounters:
    """Decides which namespaces are read in a tick."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._busy: set[int] = set()
        self._turn = 0

    def busy(self, inodes: Iterable[int]) -> None:
        """Something goes on in these: read them in the next tick."""
        self._busy.update(inodes)

    def read(self, *, everything: bool = False) -> dict[Space, Reading]:
        inodes = self._inventory.inodes
        self._turn += 1
        chosen = set(inodes)
        if not everything:
            busy = sorted(self._busy & chosen)
            first = self._turn * BUSY_PER_TICK % len(busy) if len(busy) > BUSY_PER_TICK else 0
            turn = range(self._turn * LOOKS_PER_TICK, (self._turn + 1) * LOOKS_PER_TICK)
            chosen = {*(busy + busy)[first : first + BUSY_PER_TICK], *(inodes[i % len(inodes)] for i in turn if inodes)}
        self._busy -= chosen  # the others have their turn
        readings = {}
        for inode in chosen:
            path = self._inventory.path(inode)
            if not path:
                continue
            try:
                reading = read_namespace(path, inode)
            except OSError:
                continue  # gone in this moment
            readings[inode, self._inventory.cookie(inode)] = reading
            if reading.conntrack and reading.conntrack[0].get("entries"):
                self._busy.add(inode)
        return readings
