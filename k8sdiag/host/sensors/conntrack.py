"""Connection tables by their statistics: what each namespace that tracks has in use, and what failed since the start.

Counters are 32 bits wide, per CPU, and wrap: they are added up from their steps. Columns that no kernel of today
counts any more (`new`, `ignore`, `delete`) are not looked at, nor is `insert`, which only ctnetlink raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from k8sdiag.facts import ConntrackStats
from k8sdiag.host.sensors.counters import Reading, Space
from k8sdiag.host.sensors.drops import ConntrackSeen

_SYSCTL = Path("/proc/sys/net/netfilter")
_COLUMNS = {
    "found": "found",
    "invalid": "invalid",
    "insert_failed": "insert_failed",
    "drop": "drop",
    "early_drop": "early_drop",
    "clash_resolved": "clashres",
    "chain_too_long": "chainlength",
}
"""Our names, and those of /proc/net/stat/nf_conntrack."""
_NO_STEP = 1 << 31
"""No counter rises by as much between two readings: it is another namespace that got the inode, and began at zero."""


class Limits(NamedTuple):
    """Entries and hash buckets, one value each for the whole machine; None where there is no conntrack, or no limit."""

    max: int | None
    buckets: int | None


def read_limits(directory: Path = _SYSCTL) -> Limits:
    """nf_conntrack_max (0 stands for no limit on kernels before 7.1, and is None here) and nf_conntrack_buckets."""
    return Limits(_number(directory / "nf_conntrack_max") or None, _number(directory / "nf_conntrack_buckets"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def failures(readings: dict[Space, Reading]) -> dict[Space, list[ConntrackSeen]]:
    """What each CPU had counted in the namespaces where anything had failed."""
    found = {}
    for space, reading in readings.items():
        rows = [
            ConntrackSeen(*(row.get(name, 0) for name in ("insert_failed", "drop", "chainlength")))
            for row in reading.conntrack
        ]
        if any(any(row) for row in rows):
            found[space] = rows
    return found


class ConntrackStatistics:
    """Turns readings into facts: one for each namespace that tracks, again whenever anything in it has changed."""

    def __init__(self, has_chains: bool) -> None:
        """`has_chains`: this kernel counts chains that are too long (before 5.15 the column is another's)."""
        self._columns = dict(_COLUMNS)
        if not has_chains:
            del self._columns["chain_too_long"]
        self._rows: dict[Space, tuple[dict[str, int], ...]] = {}
        self._facts: dict[Space, ConntrackStats] = {}
        self._started = False
        self.pressed: set[Space] = set()
        """Namespaces in which something was refused or evicted between the last two readings."""

    def facts(self, readings: dict[Space, Reading]) -> Iterator[ConntrackStats]:
        """What changed. The first call sets the start; namespaces that come later had counted nothing before."""
        limits = read_limits()
        self.pressed = set()
        for space, reading in readings.items():
            if not reading.conntrack:
                continue
            known = self._facts.get(space)
            before = self._rows.get(space) or (reading.conntrack if not self._started else ())
            self._rows[space] = reading.conntrack
            counts = {ours: 0 if known is None else getattr(known, ours) or 0 for ours in self._columns}
            steps = self._steps(before, reading.conntrack) or self._steps((), reading.conntrack) or {}
            for ours, step in steps.items():
                counts[ours] += step
            fact = ConntrackStats(*space, reading.conntrack[0].get("entries", 0), *limits, **counts)
            if known is None and not fact.count and not any(counts.values()):
                continue
            self._facts[space] = fact
            if known and (fact.drop, fact.early_drop) != (known.drop, known.early_drop):
                self.pressed.add(space)
            if fact != known:
                yield fact
        self._started = True

    def _steps(self, before: Sequence[dict[str, int]], now: Sequence[dict[str, int]]) -> dict[str, int] | None:
        """By how much each counter rose, all CPUs together. None: these are not the same counters."""
        steps = dict.fromkeys(self._columns, 0)
        for cpu, row in enumerate(now):
            was = before[cpu] if cpu < len(before) else {}
            for ours, theirs in self._columns.items():
                step = (row.get(theirs, 0) - was.get(theirs, 0)) & 0xFFFFFFFF
                if step >= _NO_STEP and was:
                    return None
                steps[ours] += step
        return steps

    @property
    def counts(self) -> dict[Space, int]:
        """Entries in use, of the namespaces that track or have tracked."""
        return {space: fact.count for space, fact in self._facts.items()}

    def ended(self, living: Iterable[int], t_ns: int) -> Iterator[ConntrackStats]:
        """Namespaces that are gone, said once."""
        inodes = set(living)
        latest = {inode: (inode, cookie) for inode, cookie in self._rows}  # inodes are given out again
        for space in [space for space in self._rows if space[0] not in inodes or latest[space[0]] != space]:
            del self._rows[space]
            fact = self._facts.pop(space, None)
            if fact is not None:
                yield replace(fact, count=0, until_t_ns=t_ns)
