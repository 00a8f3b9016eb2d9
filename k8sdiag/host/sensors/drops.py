"""Every packet the kernel drops, from probes/drops.c: exact sums, a few samples, and what was lost."""

from __future__ import annotations

import mmap
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from k8sdiag.facts import AnyFact, Capability, ClashesResolved, DropKey, Drops, Reason, Sample, Symbol
from k8sdiag.host import wire
from k8sdiag.host.bpf import BpfMap, Compilation, GracePeriod, Probe, ProgramRuns, RingBuffer, possible_cpus
from k8sdiag.host.loader import KPROBE_PMU, KPROBED_FUNCTIONS
from k8sdiag.host.symbols import KernelSymbols

STACKS_PER_S = 5000
"""Per CPU: at 3 µs each, 1.5 % of it."""
FLOWS_PER_TICK = 2000
"""Flows passed on with their addresses per tick, largest first; the rest goes under what explains them."""
KEYS_REMEMBERED = 10_000

_EXPLAINS = wire.DROP_KEY.size
_HOOK_AT = wire.DROP_KEY.offsets["hook"]
_COOKIE, _NETNS = struct.Struct("<Q"), struct.Struct("<I")
_V4_MAPPED = bytes(10) + b"\xff\xff"
_FAMILIES = (wire.Family.IPV4, wire.Family.IPV6)


class ConntrackSeen(NamedTuple):
    """What a CPU counted in a namespace, as the probe compares it. See wire.CONNTRACK_SEEN."""

    insert_failed: int
    drop: int
    chain_too_long: int


class Losses(NamedTuple):
    """Since attaching. See wire.Loss."""

    keys: int
    samples: int
    hooks: int


class DropSensor:
    """Owns the drop probe. start() attaches it, read() gives what was counted since the last read."""

    def __init__(self, compilation: Compilation, samples_per_s: int = 50) -> None:
        self._compilation = compilation
        self._symbols = compilation.symbols
        self._samples_per_s = samples_per_s
        self._credit = float(samples_per_s)
        """Samples that may still be taken: grows with time, up to one second's worth."""
        self._switched_s = time.monotonic() - 1.0
        self._cpus = possible_cpus()
        self._turn = 0
        self._ids: dict[bytes, int] = {}
        self._next_id = 1
        self._named: set[int] = set()
        self._probe: Probe | None = None
        self._ring: RingBuffer | None = None
        self._grace: GracePeriod | None = None
        self._baselined = False
        self.filtered: set[int] = set()
        """Inodes of the namespaces in which netfilter dropped anything before the last read."""
        self._tallies = struct.Struct("<" + wire.TALLY.codec.format.lstrip("<") * self._cpus)

    def load(self) -> None:
        """Have the probe in the kernel, not yet attached. Raises the errors of host.bpf."""
        probe = self._probe = Probe(self._compilation)
        sizes = {"flows": (wire.FLOW_KEY.size, wire.TALLY.size), "drops": (wire.DROP_KEY.size, wire.TALLY.size),
                 "repairs": (wire.FLOW_KEY.size, wire.TALLY.size),
                 "slots": (4, wire.SLOTS * (wire.FLOW_KEY.size + wire.TALLY.size))}  # fmt: skip
        self._maps = {
            name: BpfMap(fd, *sizes[name.partition("_")[0]], self._cpus)
            for name, fd in probe.map_fds.items()
            if name.partition("_")[0] in sizes
        }
        self._control = BpfMap(probe.map_fds["control"], 4, wire.CONTROL.size)
        if "anchor" in probe.map_fds:
            BpfMap(probe.map_fds["anchor"], 4, 4).update(bytes(4), struct.pack("<I", probe.map_fds["budget"]))
        self._losses = BpfMap(probe.map_fds["losses"], 4, 8, self._cpus)
        self._ring = RingBuffer(probe.map_fds["samples"], wire.SAMPLE_PAGES * mmap.PAGESIZE)
        self._grace = GracePeriod()
        self._switch()

    def start(self) -> list[AnyFact]:
        """Attach, after loading if that was not done. Returns what this kernel calls things. Raises as load()."""
        if self._probe is None:
            self.load()
        probe = self._probe
        assert probe is not None
        probe.attach("kfree_skb")
        why_not = probe.attach_kprobes() if probe.about["kprobes"] else _why_no_kprobes(self._symbols)
        return [
            *(Reason(number, name) for number, name in self.reasons.items()),
            *self._capabilities(why_not),
        ]

    def _capabilities(self, why_not: str) -> Iterator[Capability]:
        assert self._probe is not None
        about = self._probe.about
        hook = f"raw_tracepoint:kfree_skb ({about['arguments']} arguments)"
        if about["arguments"] < 3:
            yield Capability("drops", "inferred", hook, "this kernel gives no drop reasons: told by function names")
        else:
            yield Capability("drops", "full", hook)
        if self._symbols.hidden:
            why = ("kernel.kptr_restrict (or a missing CAP_SYSLOG) hides addresses: functions are shown as numbers, "
                   "some hooks stay UNKNOWN; sysctl -w kernel.kptr_restrict=1")  # fmt: skip
            yield Capability("symbols", "missing", "/proc/kallsyms", why)
        else:
            yield Capability("symbols", "full", "/proc/kallsyms")
        if "state" not in about["conntrack"]:
            why = "no type information of nf_conntrack (module not loaded): new and confirmed cannot be told apart"
            yield Capability("conntrack-state", "missing", "nf_conn.status", why)
        else:
            yield Capability("conntrack-state", "full", "nf_conn.status")
        yield self._conntrack_capability(why_not)

    def _conntrack_capability(self, why_not: str) -> Capability:
        assert self._probe is not None
        if not why_not:
            return Capability("conntrack", "full", "kprobe:__nf_conntrack_confirm, nf_ct_resolve_clash, early_drop")
        if "statistics" in self._probe.about["conntrack"]:
            hook = "raw_tracepoint:kfree_skb, and there this CPU's conntrack statistics"
            return Capability("conntrack", "inferred", hook, f"{why_not}: refusals are told by what rose")
        why = "no type information of nf_conntrack: netfilter drops are told apart by hook and statistics alone"
        return Capability("conntrack", "counters", "/proc/net/stat/nf_conntrack", why)

    @property
    def counts_chains(self) -> bool:
        """Whether this kernel counts hash chains that grew too long (from 5.15)."""
        assert self._probe is not None
        return "chains" in self._probe.about["conntrack"]

    def baseline(self, failures: dict[tuple[int, int], list[ConntrackSeen]]) -> None:
        """Say what conntrack had counted before the watch: by inode and cookie, a line for each possible CPU.

        To be told once, between load() and start(), of all namespaces; of those not named here, nothing is taken to
        have been counted so far.
        """
        assert self._probe is not None
        if "seen" in self._probe.map_fds:
            seen = BpfMap(self._probe.map_fds["seen"], 8, wire.CONNTRACK_SEEN.size, self._cpus)
            for (inode, cookie), rows in failures.items():
                if len(rows) == self._cpus:
                    values = b"".join(wire.CONNTRACK_SEEN.codec.pack(*row, 0) for row in rows)
                    seen.update(struct.pack("<Q", cookie or inode), values)
        self._baselined = True
        self._say()

    def runs(self) -> ProgramRuns:
        assert self._probe is not None
        return self._probe.runs()

    def losses(self) -> Losses:
        def total(which: wire.Loss) -> int:
            value = self._losses.lookup(struct.pack("<I", which))
            return sum(count for (count,) in struct.iter_unpack("<Q", value))

        return Losses(total(wire.Loss.KEYS), total(wire.Loss.SAMPLES), total(wire.Loss.HOOKS))

    @property
    def reasons(self) -> dict[int, str]:
        """What this kernel calls its drop reasons, without their SKB_DROP_REASON_; empty before 5.17."""
        assert self._probe is not None
        return {int(number): name for number, name in self._probe.about["reasons"].items()}

    def read(self, *, last: bool = False) -> list[AnyFact]:
        """Facts of what was dropped since the last read: new keys and names first, then one Drops, then samples.

        The last read ends the counting first.
        """
        if last and self._probe is not None:
            self._probe.detach()
        records = self._samples()
        idle = self._switch()
        assert self._grace is not None
        self._grace.wait()
        sums = self._drain(idle)
        facts: list[AnyFact] = []
        if len(self._ids) > KEYS_REMEMBERED:
            self._ids.clear()
        columns: list[tuple[int, int, int, int]] = []
        self.filtered = set()
        for key, (skbs, packets, length) in sums.items():
            columns.append((self._id(key, facts), skbs, packets, length))
            if key[_HOOK_AT]:
                self.filtered.add(_NETNS.unpack(key[-_NETNS.size :])[0])
        if columns:
            facts.append(Drops(*zip(*columns, strict=True)))
        repairs = [(self._id(key, facts), skbs) for key, skbs in self._repairs(idle)]
        if repairs:
            facts.append(ClashesResolved(*zip(*repairs, strict=True)))
        for record in (*records, *self._samples()):
            facts.append(self._sample(record, facts))
        return facts

    def _samples(self) -> list[bytes]:
        assert self._ring is not None
        records = list(self._ring.read())
        self._credit -= len(records)
        return records

    def _switch(self) -> int:
        """Let the program write to the other maps. Returns the side that it no longer writes to."""
        self._turn += 1
        side = self._turn & 1
        now_s = time.monotonic()
        passed_s = min(now_s - self._switched_s, 60.0)
        self._switched_s = now_s
        # Each CPU has a budget of its own; what none of them used stays.
        self._credit = min(self._credit + self._samples_per_s * passed_s, self._samples_per_s)
        samples = max(1, int(self._credit) // self._cpus) if self._credit >= 1 else 0
        self._said = side, self._turn, samples, max(1, int(STACKS_PER_S * passed_s))
        self._say()
        return 1 - side

    def _say(self) -> None:
        self._control.update(bytes(4), wire.CONTROL.codec.pack(*self._said, int(self._baselined), 0))

    def _drain(self, side: int) -> dict[bytes, tuple[int, int, int]]:
        """(skbs, packets, bytes) by identity (see _identity()), of flows and of what is beyond the limit."""
        flows: dict[bytes, tuple[int, int, int]] = {}
        rest: dict[bytes, tuple[int, int, int]] = {}
        for key, tallies in (*self._slots(side), *self._entries(f"flows_{side}", wire.FLOW_KEY.size)):
            _add(flows, *_identity(key, tallies))
        for key, tallies in self._entries(f"drops_{side}", wire.DROP_KEY.size):
            _add(rest, *_identity(key, tallies))
        if len(flows) > FLOWS_PER_TICK:
            ranked = sorted(flows.items(), key=lambda item: (-item[1][1], item[0]))
            flows = dict(ranked[:FLOWS_PER_TICK])
            for identity, sums in ranked[FLOWS_PER_TICK:]:
                _add(rest, identity[:_EXPLAINS] + identity[-_NETNS.size :], sums)
        return flows | rest

    def _repairs(self, side: int) -> Iterator[tuple[bytes, int]]:
        """Identity and packets of the flows whose clashes were resolved."""
        name = f"repairs_{side}"
        for key, tallies in self._entries(name, wire.FLOW_KEY.size) if name in self._maps else ():
            identity, (skbs, _, _) = _identity(key, tallies)
            yield identity, skbs

    def _entries(self, name: str, size: int) -> Iterator[tuple[bytes, Sequence[int]]]:
        for keys, values in self._maps[name].drain():
            for i, tallies in enumerate(self._tallies.iter_unpack(values)):
                yield keys[i * size : (i + 1) * size], tallies

    def _slots(self, side: int) -> Iterator[tuple[bytes, Sequence[int]]]:
        """What was counted in slots; they are empty afterwards."""
        slots = self._maps.get(f"slots_{side}")
        if slots is None:
            return
        values = slots.lookup(bytes(4))
        if values.count(0) == len(values):
            return
        slots.update(bytes(4), bytes(len(values)))
        size, key = wire.FLOW_KEY.size + wire.TALLY.size, wire.FLOW_KEY.size
        for at in range(0, len(values), size):
            tally = wire.TALLY.codec.unpack_from(values, at + key)
            if tally[0]:
                yield values[at : at + key], tally

    def _id(self, key: bytes, facts: list[AnyFact]) -> int:
        known = self._ids.get(key)
        if known is None:
            known = self._ids[key] = self._next_id
            self._next_id += 1
            fact = _drop_key(known, key)
            facts.append(fact)
            self._name(fact.location, facts)
        return known

    def _name(self, address: int, facts: list[AnyFact]) -> None:
        if address not in self._named:
            self._named.add(address)
            facts.append(Symbol(address, self._symbols.name(address)))

    def _sample(self, record: bytes, facts: list[AnyFact]) -> Sample:
        fields = wire.SAMPLE.codec.unpack_from(record)
        cookie, t_ns, netns, length, captured, frames, _ = fields[len(wire.FLOW_KEY.fields) :][:7]
        stack = fields[-(wire.STACK_DEPTH + 1) : -1][:frames]
        identity = _COOKIE.pack(cookie) + record[_COOKIE.size : wire.FLOW_KEY.size] + _NETNS.pack(netns)
        for address in stack:
            self._name(address, facts)
        return Sample(self._id(identity, facts), t_ns, length, fields[-1][:captured].hex(), stack)

    def stop(self) -> None:
        """Detach and let go of everything; safe to call twice."""
        if self._probe is None:
            self._compilation.cancel()
        else:
            self._probe.detach()
            if self._ring is not None:
                self._ring.close()
            if self._grace is not None:
                self._grace.close()
            self._probe.close()
            self._probe = None


def _why_no_kprobes(symbols: KernelSymbols) -> str:
    """Why the loader gave no programs for conntrack's functions."""
    if not KPROBE_PMU.exists():
        return "this kernel has no kprobes"
    if symbols.hidden:
        return "kernel.kptr_restrict (or a missing CAP_SYSLOG) hides whether conntrack's functions are there"
    missing = sorted(set(KPROBED_FUNCTIONS) - symbols.spans(KPROBED_FUNCTIONS).keys())
    if len(missing) == len(KPROBED_FUNCTIONS):
        return "nf_conntrack was not loaded when the watch began, and only then are its functions probed"
    if missing:
        return f"this kernel has no function {missing[0]}"
    return "the kernel refused the programs for kprobes"


def _identity(key: bytes, tallies: Sequence[int]) -> tuple[bytes, tuple[int, int, int]]:
    """What is counted under a key, and its sums over CPUs.

    The identity is the key with the namespace's cookie in the place of its address, and its inode behind: addresses
    of dead namespaces are given out again. Only the CPU that inserted the key has written those two.
    """
    step = len(wire.TALLY.fields)
    identity = _COOKIE.pack(max(tallies[3::step])) + key[_COOKIE.size :] + _NETNS.pack(max(tallies[4::step]))
    return identity, (sum(tallies[0::step]), sum(tallies[1::step]), sum(tallies[2::step]))


def _add(to: dict[bytes, tuple[int, int, int]], identity: bytes, sums: tuple[int, int, int]) -> None:
    skbs, packets, length = to.get(identity, (0, 0, 0))
    to[identity] = skbs + sums[0], packets + sums[1], length + sums[2]


def _drop_key(number: int, identity: bytes) -> DropKey:
    """The fact behind an identity: of a flow, or of the beginning of one, which is a drop key."""
    folded = len(identity) == _EXPLAINS + _NETNS.size
    (netns,) = _NETNS.unpack(identity[-_NETNS.size :])
    fields = (wire.DROP_KEY if folded else wire.FLOW_KEY).codec.unpack(identity[: -_NETNS.size])
    explains, flow = fields[:12], (b"", b"", 0, 0, 0, b"", b"", 0, 0) if folded else fields[12:21]
    cookie, location, ifindex, reason, hook, verdict, conntrack, nat, netns_from, family, protocol, segment = explains
    reply_src, reply_dst, reply_sport, reply_dport, iif, src, dst, sport, dport = flow
    has_addresses = not folded and family in _FAMILIES
    is_translated = has_addresses and nat != wire.Nat.NONE
    return DropKey(
        id=number,
        reason=reason,
        location=location,
        netns=netns,
        netns_cookie=cookie,
        netns_from=wire.NetnsFrom(netns_from).name if netns_from else "",
        ifindex=ifindex,
        iif=iif,
        hook=wire.Hook(hook).name if hook else "",
        conntrack=wire.Conntrack(conntrack).name if conntrack else "",
        family=family,
        protocol=protocol,
        src=_address(src) if has_addresses else "",
        dst=_address(dst) if has_addresses else "",
        sport=sport,
        dport=dport,
        folded=folded,
        verdict=wire.Verdict(verdict & ~wire.PROBED).name if verdict else "",
        probed=bool(verdict & wire.PROBED),
        segment=wire.Segment(segment).name if segment else "",
        nat=wire.Nat(nat & wire.Nat.BOTH).name if nat else "",
        is_reply=bool(nat & wire.Nat.REPLY),
        reply_src=_address(reply_src) if is_translated else "",
        reply_dst=_address(reply_dst) if is_translated else "",
        reply_sport=reply_sport,
        reply_dport=reply_dport,
    )


def _address(raw: bytes) -> str:
    if raw.startswith(_V4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)
