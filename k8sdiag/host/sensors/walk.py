"""Who holds a connection table, added up by the kernel itself: probes/walk.c, which runs only when it is called.

ctnetlink writes 200 bytes about each entry; here only the sums are read. The program walks the hash table of all
namespaces, a few hundred entries in each call of BPF_PROG_TEST_RUN (from 5.10); for that it is attached to nothing.

Where the table is, no symbol tells on kernels without CONFIG_KALLSYMS_ALL. But every hash chain leads there: the first
entry of a chain points back at its bucket, and the last one ends in the bucket's number. So before each reading,
ctnetlink is asked to make a connection, in an empty namespace that is made for it and ends with it, while the program
notes what this thread allocates (raw tracepoint kmem_cache_alloc). Both directions of that connection have to lead to
the same place; all that takes 2 ms. In the walk each empty bucket and each end of a chain confirms it: a table that is
replaced meanwhile (nf_conntrack_buckets was written) is noticed, and the walk begins anew. The time that the
connection has left in jiffies, beside the seconds that were asked for, is HZ.

As with ctnetlink, entries that come and go meanwhile are in the sum or not, and those whose time is over are not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import NamedTuple

from k8sdiag.host.bpf import BpfMap, Compilation, Probe, bpf
from k8sdiag.host.sensors.table import Line, Sum
from k8sdiag.host.symbols import KernelSymbols

LINES = 8_192
"""Lines told apart in the kernel, before the rest of the table is folded into those that were prominent until then."""
PROMINENT = 8
"""Entries that make a line, or a side, prominent among the first LINES."""
TRIES = 3

BUCKETS = Path("/proc/sys/net/netfilter/nf_conntrack_buckets")
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_TEST_RUN = 10
_NETLINK_NETFILTER = 12
_NEW, _DELETE = 0x100, 0x102
"""NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_DELETE."""
_TRACEPOINT = "kmem_cache_alloc"

# probes/walk.c
_WALK, _LOOK, _LOOK_BACK, _REMEMBER_ME = range(4)
_GOES_ON, _DONE, _MANY_LINES, _NOT_THERE, _TOO_LONG = range(5)
_CANDIDATES = 64
_HAS_SOURCE, _HAS_TARGET = 1, 2
_NO_STATE = 255
_KEY = struct.Struct("<16s16sHBBBBH")
_SUM = struct.Struct("<QIIII")
_STATE = struct.Struct("<QQ10I")
_ZERO = bytes(4)

_TIMEOUT_S = 1000


class _State(NamedTuple):
    """struct walk."""

    base: int = 0
    net: int = 0
    netns: int = 0
    buckets: int = 0
    bucket: int = 0
    hz: int = 1
    lines: int = 0
    lines_max: int = 0
    moved: int = 0
    thread: int = 0
    allocated: int = 0
    left: int = 0


class _Totals(dict[bytes, list[int]]):
    """By struct line_key: seconds left, entries, entries without a reply."""

    def add(self, keys: bytes, values: bytes) -> None:
        at = 0
        for timeout_s, entries, unreplied, _, _ in _SUM.iter_unpack(values):
            key = keys[at : at + 40]
            at += 40
            if not entries:
                continue
            total = self.get(key)
            if total is None:
                self[key] = [timeout_s, entries, unreplied]
            else:
                total[0] += timeout_s
                total[1] += entries
                total[2] += unreplied

    def prominent(self) -> Iterator[tuple[bytes, int]]:
        """The lines that are worth to be told apart further on, and the sides to fold others into; with entries."""
        sides: Counter[bytes] = Counter()
        for key, (_, entries, _) in self.items():
            if entries >= PROMINENT:
                yield key, entries
            sides[key[:16] + bytes(16) + key[32:37] + b"\1\0\0"] += entries
            sides[bytes(16) + key[16:37] + b"\2\0\0"] += entries
        for side, entries in sides.items():
            if entries >= PROMINENT:
                yield side, entries

    def by_line(self) -> dict[Line, Sum]:
        lines: dict[Line, Sum] = {}
        for key, (timeout_s, entries, unreplied) in self.items():
            source, target, zone, protocol, state, family, has, _ = _KEY.unpack(key)
            size = 4 if family == socket.AF_INET else 16
            line = Line(
                zone,
                source[:size] if has & _HAS_SOURCE else b"",
                target[:size] if has & _HAS_TARGET else b"",
                protocol,
                -1 if state == _NO_STATE else state,
            )
            total = lines.setdefault(line, Sum())
            total.entries += entries
            total.unreplied += unreplied
            total.timeout_s += timeout_s
        return lines


class Walk:
    """The loaded program. For one thread at a time. Raises BccMissing, BtfMissing or ProbeRefused.

    Compiling takes about half a second of CPU time in a process of its own, and the kernel a few MB for the lines.
    """

    def __init__(self) -> None:
        # No address of a function is needed, so the symbol table is not read.
        self._probe = Probe(Compilation("walk").begin(KernelSymbols(b"")))
        fds = self._probe.map_fds
        self._state = BpfMap(fds["walks"], 4, _STATE.size)
        self._lines = BpfMap(fds["lines"], _KEY.size, _SUM.size)
        self.base = self._hz = 0
        """Where the table begins: nf_conntrack_hash."""

    def read(self, inode: int, stop: Event | None = None) -> dict[Line, Sum]:
        """All entries of the namespace with that inode. What has no line of its own is folded as in table.Tally.

        Raises OSError: ECANCELED once `stop` is set; EOVERFLOW, or ENOSPC from 5.15 on, where chains are too long
        (nf_conntrack_buckets is far too small); ENXIO where the table is not found; EAGAIN where it is replaced again
        and again; others as ctnetlink and bpf(2) do. Raises ProbeRefused where the tracepoint may not be used.
        """
        for _ in range(TRIES):
            buckets = _buckets()
            self._locate()  # what was the table once may be free memory by now, and look unchanged
            totals = self._read(inode, buckets, stop)
            if totals is not None and _buckets() == buckets:
                return totals.by_line()
        raise _error(errno.EAGAIN)

    def close(self) -> None:
        self._probe.close()

    def _read(self, inode: int, buckets: int, stop: Event | None) -> _Totals | None:
        """None: there is no such table any more."""
        totals = _Totals()
        for _ in self._lines.drain():  # of a reading that ended half-way
            pass
        self._set(_State(self.base, 0, inode, buckets, hz=self._hz, lines_max=LINES))
        while (result := self._run(_WALK)) != _DONE:
            if stop and stop.is_set():
                raise _error(errno.ECANCELED)
            if result == _TOO_LONG:
                raise _error(errno.EOVERFLOW)
            if result == _NOT_THERE:
                return None
            if result == _MANY_LINES:
                self._drain(totals)
                self._set(self._get()._replace(lines_max=0))
                # The last one is for what finds no room at all.
                for key, weight in [*totals.prominent(), (_KEY.pack(b"", b"", 0, 0, _NO_STATE, 0, 0, 0), 0)]:
                    self._lines.update(key, _SUM.pack(0, 0, 0, weight, 0))
        self._drain(totals)
        # A few entries are freed and used again while one looks; many mean that this is an array of old.
        return totals if self._get().moved <= 16 + buckets // 100 else None

    def _drain(self, totals: _Totals) -> None:
        for keys, values in self._lines.drain():
            totals.add(keys, values)

    def _run(self, *arguments: int) -> int:
        """Run the program once with these arguments of a raw tracepoint. Returns what it returns. Raises OSError."""
        context = ctypes.create_string_buffer(struct.pack("<QQ", *arguments, *(2 - len(arguments)) * (0,)), 16)
        attributes = struct.pack(
            "<IIIIQQIIIIQQII", self._probe.program, 0, 0, 0, 0, 0, 0, 0, 16, 0, ctypes.addressof(context), 0, 0, 0
        )
        _, after = bpf(_TEST_RUN, attributes)
        return int.from_bytes(after[4:8], "little")

    def _get(self) -> _State:
        return _State(*_STATE.unpack(self._state.lookup(_ZERO)))

    def _set(self, state: _State) -> None:
        self._state.update(_ZERO, _STATE.pack(*state))

    def _locate(self) -> None:
        """Find out where the table begins, and HZ. Raises OSError, ProbeRefused."""

        def away() -> None:
            if _LIBC.unshare(_CLONE_NEWNET):
                raise _error(ctypes.get_errno())
            self._locate_here()

        # The namespace ends with the only thread that was ever there.
        with ThreadPoolExecutor(1, "conntrack-base") as elsewhere:
            elsewhere.submit(away).result()

    def _locate_here(self) -> None:
        inode = os.stat("/proc/thread-self/ns/net").st_ino
        self.base = self._hz = 0
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as asking:
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 2, 0))
            for number in range(TRIES):
                self._set(_State(netns=inode))
                self._run(_REMEMBER_ME)
                self._probe.attach(_TRACEPOINT)
                try:
                    _ask(asking, _NEW, 1024 + number)
                finally:
                    self._probe.detach()
                for candidate in range(min(self._get().allocated, _CANDIDATES)):
                    if self._run(_LOOK, candidate) == _DONE:
                        found = self._get()
                        if self._run(_LOOK_BACK, candidate) == _DONE and self._get().base == found.base:
                            self.base, self._hz = found.base, round(found.left / _TIMEOUT_S)
                            break
                # Else the end of the namespace would search the whole table for it.
                _ask(asking, _DELETE, 1024 + number)
                if self._hz:
                    return
        raise _error(errno.ENXIO)


def _buckets() -> int:
    return int(BUCKETS.read_text())


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "nf_conntrack_hash")


def _ask(asking: socket.socket, kind: int, port: int) -> None:
    """Make or delete a UDP connection between addresses that are for documentation. Raises OSError."""

    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def nested(kind: int, *parts: bytes) -> bytes:
        return attribute(0x8000 | kind, b"".join(parts))

    def direction(kind: int, source: bytes, target: bytes, *ports: int) -> bytes:
        protocol = attribute(1, bytes([socket.IPPROTO_UDP]))
        sides = (attribute(2 + number, struct.pack("!H", port)) for number, port in enumerate(ports))
        return nested(kind, nested(1, attribute(1, source), attribute(2, target)), nested(2, protocol, *sides))

    here, there = bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))
    body = bytes((socket.AF_INET, 0, 0, 0)) + direction(1, here, there, port, 9)
    if kind == _NEW:
        body += direction(2, there, here, 9, port) + attribute(7, struct.pack("!I", _TIMEOUT_S))
    flags = 0x1 | 0x4 | (0x200 | 0x400 if kind == _NEW else 0)  # REQUEST, ACK; EXCL, CREATE
    asking.send(struct.pack("=IHHII", 16 + len(body), kind, flags, port, 0) + body)
    (refused,) = struct.unpack_from("=i", asking.recv(4096), 16)
    if refused:
        raise _error(-refused)
