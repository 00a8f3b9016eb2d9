"""Who holds the connection table of a network namespace: read by ctnetlink, added up while it is read.

The kernel describes each entry in a message of about 200 bytes. Messages of one kind (TCP over IPv4, no mark, …)
have all their attributes at the same places. So the attributes of the first one are walked, and from it comes a mask
that leaves the attributes' headers and what entries are counted by. Each further message is one long integer: masked,
it is the key of a dict, and no attribute of it is looked at again. Because the headers are part of the key, a message
that is laid out otherwise never meets a key of another kind; it is new, and what is new is walked.

What is left of the cost is mostly the kernel's, which makes every message in full: no question asks for less. So a
big table is added up by the kernel itself, where it allows that (walk.py), and this is for small ones and for others.

A table is a moving thing: entries that come and go while it is read are in the sum or not, and one whose hash bucket
moves (nf_conntrack_buckets was written) may be there twice or not at all. The kernel marks such a dump at most by
NLM_F_DUMP_INTR, which is not an error here: the next reading is seconds away. Entries that no packet has confirmed
yet, and those whose time is over, are not listed, so the sum may be a little below nf_conntrack_count.

The kernel keeps one hash table for all namespaces, so that to read even an empty one it walks the entries of all.
Layout: include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from k8sdiag.errors import K8sdiagError
from k8sdiag.facts import ConntrackTable
from k8sdiag.host.inventory.netns import inside

if TYPE_CHECKING:
    from k8sdiag.host.sensors.walk import Walk

KEYS = 20_000
"""Kinds of entries told apart while reading; each takes about a kilobyte, and a flood has as many as entries."""
LINES = 1_000
"""Of a finished table, the lines with both addresses that are kept: the largest."""
SIDES = 500
"""The lines with one address that the others are folded into: the largest."""
WALKED_FROM = 20_000
"""Entries of a table that is left to the kernel; to begin with that costs as much as to read so many by ctnetlink."""
PAUSE_S = 5.0
PAUSE_RATIO = 50
"""A pause is so many times as long as the CPU time of the reading before: reading takes 2 % of a CPU at most."""

Space: TypeAlias = tuple[int, int]
"""Inode and cookie of a namespace."""

_NETLINK_NETFILTER = 12
_RECEIVE_BYTES = 1 << 16
"""The kernel never puts more than 32 KiB into one answer of a dump."""
_ANSWER_S = 10
"""A dump is made by the very call that asks for its next part: an answer that takes longer will not come."""
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
_LENGTH = struct.Struct("=I")
_ATTRIBUTE = struct.Struct("=HH")
"""struct nlattr: length, type."""
_NUMBER = struct.Struct("=i")
_SECONDS = struct.Struct("!I")
_BODY = _HEADER.size + 4
"""Attributes stand behind struct nfgenmsg: family, version, resource."""
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_ENTRY, _GET = 0x100, 0x101
"""NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET."""
_QUESTION = _HEADER.pack(_BODY, _GET, _REQUEST | _DUMP, 1, 0) + bytes((socket.AF_UNSPEC, 0, 0, 0))

# enum ctattr_type; ctattr_tuple; ctattr_ip; ctattr_l4proto; ctattr_protoinfo; ctattr_protoinfo_tcp
_ORIG, _REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _ZONE = 1, 2, 3, 4, 7, 18
_TUPLE_IP, _TUPLE_PROTO, _TUPLE_ZONE = 1, 2, 3
_V4_SRC, _V6_SRC = 1, 3
_PROTO_NUM = 1
_INFO_TCP, _TCP_STATE = 1, 1
_TYPE_BITS = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_SEEN_REPLY = 0x02  # IPS_SEEN_REPLY

_TCP_STATES = (
    "NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE",
    "SYN_SENT2",
)  # fmt: skip
"""enum tcp_conntrack."""


class Line(NamedTuple):
    """What entries are counted by."""

    zone: int
    """Of the original direction, where the two differ."""
    source: bytes
    """Packed address; empty: several."""
    target: bytes
    protocol: int
    state: int
    """enum tcp_conntrack; -1: none, also of a connection in a flow table, whose state the kernel does not follow."""

    def sides(self) -> tuple[Line, ...]:
        """Without its target, and without its source; itself where one of them is missing already."""
        if not (self.source and self.target):
            return (self,)
        return self._replace(target=b""), self._replace(source=b"")


class Sum:
    """What is added up over the entries of a line."""

    __slots__ = ("entries", "timeout_s", "unreplied")

    def __init__(self) -> None:
        self.entries = self.unreplied = self.timeout_s = 0

    def add(self, other: Sum) -> None:
        self.entries += other.entries
        self.unreplied += other.unreplied
        self.timeout_s += other.timeout_s


class _Shape:
    """Where things are in messages that are laid out like this one. Masks are little-endian: byte n is bits 8n….

    A message that ends in the middle of an attribute is read as far as it goes.
    """

    def __init__(self, message: bytes) -> None:
        self._length = len(message)
        self._headers = [(0, 6)]  # of the message itself: length and type, not its flags
        self._source = self._target = self._zone = (0, 0)
        self._protocol = self._state = self._status = 0
        self.timeout_at = 0
        """Where the seconds are; 0: nowhere."""
        self._walk(message)
        self.headers_mask = self._bits(*self._headers)
        self.headers = int.from_bytes(message, "little") & self.headers_mask
        single = [(at, at + 1) for at in (self._protocol, self._state) if at]
        self.mask = self.headers_mask | self._bits(self._source, self._target, self._zone, *single)
        if self._status:
            self.mask |= _SEEN_REPLY << 8 * self._status
        # An address is left out together with its header, which no message of the kernel's is without: 0.0.0.0 is
        # an address too, that of a DHCP client.
        source, target = (self._bits((begin - 4, end)) if begin else 0 for begin, end in (self._source, self._target))
        self.by_source, self.by_target = self.mask & ~target, self.mask & ~source
        """Masks without the target, without the source."""

    def _walk(self, message: bytes) -> None:
        for kind, at, end in self._attributes(message, _BODY, self._length):
            size = end - at
            if kind in {_ORIG, _REPLY}:
                self._walk_tuple(message, at, end, original=kind == _ORIG)
            elif kind == _STATUS and size == 4:
                self._status = end - 1
            elif kind == _TIMEOUT and size == 4:
                self.timeout_at = at
            elif kind == _ZONE and size == 2:
                self._zone = at, end
            elif kind == _PROTOINFO:
                for info, info_at, info_end in self._attributes(message, at, end):
                    if info == _INFO_TCP:
                        for part, part_at, _ in self._attributes(message, info_at, info_end):
                            if part == _TCP_STATE:
                                self._state = part_at

    def _walk_tuple(self, message: bytes, begin: int, end: int, *, original: bool) -> None:
        for kind, at, behind in self._attributes(message, begin, end):
            if kind == _TUPLE_IP:
                for part, part_at, part_end in self._attributes(message, at, behind):
                    if (part, part_end - part_at) in {(_V4_SRC, 4), (_V6_SRC, 16)}:
                        if original:
                            self._source = part_at, part_end
                        else:
                            self._target = part_at, part_end
            elif kind == _TUPLE_PROTO and original:
                for part, part_at, _ in self._attributes(message, at, behind):
                    if part == _PROTO_NUM:
                        self._protocol = part_at
            elif kind == _TUPLE_ZONE and original and behind - at == 2:
                self._zone = at, behind

    def _attributes(self, message: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(type, where its value begins, where it ends); what has a header here is part of the shape."""
        while at + _ATTRIBUTE.size <= end:
            length, kind = _ATTRIBUTE.unpack_from(message, at)
            self._headers.append((at, at + _ATTRIBUTE.size))
            if length < _ATTRIBUTE.size or at + length > end:
                return
            # An empty attribute has no byte to look at.
            if length > _ATTRIBUTE.size:
                yield kind & _TYPE_BITS, at + _ATTRIBUTE.size, at + length
            at += length + 3 & ~3

    def _bits(self, *places: tuple[int, int]) -> int:
        taken = bytearray(self._length)
        for begin, end in places:
            taken[begin:end] = b"\xff" * (end - begin)
        return int.from_bytes(taken, "little")

    def line(self, key: int) -> tuple[Line, bool]:
        """What a masked message says, and whether a reply was seen."""
        raw = key.to_bytes(self._length, "little")
        source, target = (
            raw[begin:end] if any(raw[begin - 4 : begin]) else b"" for begin, end in (self._source, self._target)
        )
        return Line(
            int.from_bytes(raw[slice(*self._zone)], "big"),
            source,
            target,
            raw[self._protocol] if self._protocol else 0,
            raw[self._state] if self._state else -1,
        ), bool(self._status and raw[self._status])


class _Cell:
    """Entries of one key."""

    __slots__ = ("entries", "shape", "timeout_at", "timeout_s")

    def __init__(self, shape: _Shape) -> None:
        self.shape = shape
        self.timeout_at = shape.timeout_at
        self.entries = self.timeout_s = 0


class Tally:
    """Adds up the messages of a dump. Its memory is bounded by KEYS, whatever the table holds.

    Once there are KEYS keys, new ones are folded into one side: the source or the target, whichever had more of the
    entries until then (a scanner has one source, a flood has one target); those of neither into no address at all.
    The order of a dump is that of a keyed hash, so what was read first is a fair sample: an owner of 0.1 % of the
    table is all but certain to have been seen.
    """

    def __init__(self) -> None:
        self.done = False
        """The kernel said that this was all."""
        self._cells: dict[int, _Cell] = {}
        self._shapes: dict[int, list[_Shape]] = {}
        self._latest: dict[int, _Shape] = {}
        """By length of the message: what the last of that length was like."""
        self._sides: dict[int, int] | None = None

    def add(self, data: bytes) -> None:
        """One answer of the kernel's: whole messages. Raises OSError, also for what is no message."""
        at, end = 0, len(data)
        cells, latest = self._cells, self._latest
        length_at, seconds_at, integer = _LENGTH.unpack_from, _SECONDS.unpack_from, int.from_bytes
        while at + _HEADER.size <= end:
            (length,) = length_at(data, at)
            behind = at + length
            if length < _HEADER.size or behind > end:
                raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG), "ctnetlink")
            shape = latest.get(length)
            value = integer(data[at:behind], "little")
            cell = cells.get(value & shape.mask) if shape else None
            if cell is None:
                cell = self._unknown(data[at:behind], value)
            if cell is not None:
                cell.entries += 1
                if cell.timeout_at:
                    cell.timeout_s += seconds_at(data, at + cell.timeout_at)[0]
            at = behind + 3 & ~3

    def _unknown(self, message: bytes, value: int) -> _Cell | None:
        """The cell for a message that the last shape of its length, or the keys so far, do not know."""
        length = len(message)
        for shape in self._shapes.get(length, ()):
            if value & shape.headers_mask == shape.headers:
                break
        else:
            if not self._is_entry(message):
                return None
            shape = _Shape(message)
            self._shapes.setdefault(length, []).append(shape)
        self._latest[length] = shape
        key = value & shape.mask
        cell = self._cells.get(key)
        if cell is None and len(self._cells) >= KEYS:
            key = self._folded(key, shape)
            cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _Cell(shape)
        return cell

    def _is_entry(self, message: bytes) -> bool:
        """Raises the OSError that the message may tell."""
        length, kind, *_ = _HEADER.unpack_from(message)
        if kind in {_DONE, _ERROR}:
            self.done = True
            number = _NUMBER.unpack_from(message, _HEADER.size)[0] if length >= _BODY else 0
            if number < 0:
                raise OSError(-number, os.strerror(-number), "ctnetlink")
        return bool(kind == _ENTRY)

    def _folded(self, key: int, shape: _Shape) -> int:
        """The key without its target, or its source, or both."""
        if self._sides is None:
            sides: Counter[int] = Counter()
            for one, cell in self._cells.items():
                sides[one & cell.shape.by_source] += cell.entries
                sides[one & cell.shape.by_target] += cell.entries
            fewest = KEYS // LINES
            self._sides = {side: entries for side, entries in sides.items() if entries >= fewest}
        by_source, by_target = key & shape.by_source, key & shape.by_target
        from_source, to_target = self._sides.get(by_source, 0), self._sides.get(by_target, 0)
        if from_source or to_target:
            return by_source if from_source >= to_target else by_target
        return by_source & by_target

    def lines(self) -> dict[Line, Sum]:
        """The LINES largest, up to SIDES that stand for many with one address in common, and the rest.

        The rest is a line for each zone, protocol and state. Nothing is left out of the sums.
        """
        lines: dict[Line, Sum] = {}
        for key, cell in self._cells.items():
            line, replied = cell.shape.line(key)
            total = lines.setdefault(line, Sum())
            total.entries += cell.entries
            total.unreplied += 0 if replied else cell.entries
            total.timeout_s += cell.timeout_s
        return _largest(lines)


def _largest(lines: dict[Line, Sum]) -> dict[Line, Sum]:
    """Fold what is beyond the largest, as Tally.lines() says."""
    if len(lines) <= LINES:
        return lines
    ranked = sorted(lines.items(), key=lambda item: item[1].entries, reverse=True)
    kept, rest = ranked[:LINES], ranked[LINES:]
    sides: Counter[Line] = Counter()
    for line, total in rest:
        for side in line.sides():
            sides[side] += total.entries
    folded: dict[Line, Sum] = {}
    for line, total in rest:
        folded.setdefault(max(line.sides(), key=sides.__getitem__), Sum()).add(total)
    result = dict(kept)
    ranked = sorted(folded.items(), key=lambda item: item[1].entries, reverse=True)
    for number, (line, total) in enumerate(ranked):
        place = line if number < SIDES else line._replace(source=b"", target=b"")
        result.setdefault(place, Sum()).add(total)
    return result


def read_table(
    path: str, inode: int, cookie: int, t_ns: Callable[[], int], stop: Event | None = None
) -> ConntrackTable:
    """The table of the namespace that `path` opens, both address families. `t_ns`: the clock of the facts.

    Raises OSError: ESTALE if the path leads to another namespace by now; EPERM without CAP_NET_ADMIN there; EINVAL
    or EOPNOTSUPP on a kernel without ctnetlink; ECANCELED once `stop` is set. A namespace that tracks nothing has an
    empty table. The kernel loads nf_conntrack_netlink for the question where it is a module, as for `conntrack -L`.
    """
    with inside(path, inode):
        asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    # From here on outside: the socket goes on speaking of the namespace that it was opened in.
    tally = Tally()
    with asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _ANSWER_S, 0))
        asking.send(_QUESTION)
        while not tally.done:
            if stop and stop.is_set():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), path)
            tally.add(asking.recv(_RECEIVE_BYTES))
    return _fact(tally.lines(), inode, cookie, t_ns())


def walk_table(
    walk: Walk, path: str, inode: int, cookie: int, t_ns: Callable[[], int], stop: Event | None = None
) -> ConntrackTable:
    """The same, added up by the kernel. Raises OSError: ESTALE as read_table(), and what Walk.read() raises."""
    with inside(path, inode):
        pass  # it is still that namespace
    return _fact(_largest(walk.read(inode, stop)), inode, cookie, t_ns())


def _fact(lines: dict[Line, Sum], inode: int, cookie: int, t_ns: int) -> ConntrackTable:
    ranked = sorted(lines.items(), key=lambda item: (-item[1].entries, item[0]))
    return ConntrackTable(
        netns=inode,
        t_ns=t_ns,
        netns_cookie=cookie,
        entries_total=sum(total.entries for total in lines.values()),
        zone=tuple(line.zone for line, _ in ranked),
        source=tuple(_address(line.source) for line, _ in ranked),
        target=tuple(_address(line.target) for line, _ in ranked),
        protocol=tuple(line.protocol for line, _ in ranked),
        state=tuple(_state(line.state) for line, _ in ranked),
        entries=tuple(total.entries for _, total in ranked),
        unreplied=tuple(total.unreplied for _, total in ranked),
        timeout_s=tuple(total.timeout_s for _, total in ranked),
    )


def _address(packed: bytes) -> str:
    if not packed:
        return ""
    return sys.intern(socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed))


def _state(number: int) -> str:
    if number < 0:
        return ""
    return _TCP_STATES[number] if number < len(_TCP_STATES) else str(number)


class _Pace(NamedTuple):
    """Of a namespace that was read."""

    next_s: float
    """When it is to be read again, by time.monotonic()."""
    empty: bool


class TableReader:
    """Reads tables in a thread of its own, one after another, and paces itself.

    A thread and not a process: it lets go of the interpreter for each part of a dump, which is a call into the
    kernel every 150 entries or so, and nothing else in it runs long without the interpreter switching. `scripts/bench
    table` prints how late another thread's timer gets. A process would be one more to start, to feed and to end.
    Methods are for one thread.
    """

    def __init__(self, t_ns: Callable[[], int]) -> None:
        self._t_ns = t_ns
        self._paces: dict[Space, _Pace] = {}
        self._lock = Lock()
        self._finished: list[ConntrackTable] = []
        self._failures: dict[Space, OSError] = {}
        self._rest_until_s = 0.0
        """No reading before that, by time.monotonic()."""
        self._stop = Event()
        self._thread: Thread | None = None
        self._walk: Walk | None = None
        self.walks = False
        """Whether the latest big table was added up by the kernel itself."""
        self.walk_refused = ""
        """Why not; empty as long as there was no big one."""
        self._never_walks = False

    def begin(
        self,
        spaces: Sequence[tuple[str, int, int, int]],
        *,
        everything: bool = False,
        pressed: Collection[Space] = (),
    ) -> None:
        """Start to read those whose pause is over, or `everything`; the fullest first. Nothing if still reading.

        Those that are `pressed` (something was refused or evicted) need not wait longer than reading costs.

        Each is (path, inode, cookie, entries in use). One without entries is not read: its table is empty, which is
        said once.
        """
        if self._stop.is_set() or (self._thread and self._thread.is_alive()):
            return
        now_s = time.monotonic()
        present = {(inode, cookie) for _, inode, cookie, _ in spaces}
        self._paces = {space: pace for space, pace in self._paces.items() if space in present}
        with self._lock:
            self._failures = {space: error for space, error in self._failures.items() if space in present}
        due = []
        for path, inode, cookie, count in spaces:
            pace = self._paces.get((inode, cookie))
            if count:
                if everything or pace is None or pace.next_s <= now_s or (inode, cookie) in pressed:
                    due.append((count, path, inode, cookie))
            elif pace and not pace.empty:
                self._paces[inode, cookie] = _Pace(now_s, empty=True)
                with self._lock:
                    self._finished.append(ConntrackTable(inode, self._t_ns(), cookie))
        if due and (everything or self._rest_until_s <= now_s):
            due.sort(reverse=True)
            self._thread = Thread(target=self._run, args=(due,), name="conntrack-table", daemon=True)
            self._thread.start()

    def collect(self) -> list[ConntrackTable]:
        """The tables read since the last call; does not wait."""
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def failures(self) -> dict[Space, OSError]:
        """Namespaces whose last reading failed, and why."""
        with self._lock:
            return dict(self._failures)

    def wait(self, timeout_s: float) -> bool:
        """Until what has begun is read. False if it takes longer."""
        if self._thread:
            self._thread.join(timeout_s)
        return not (self._thread and self._thread.is_alive())

    def close(self) -> None:
        """End a reading half-way; what was finished may still be collected. Returns within a part of a dump."""
        self._stop.set()
        if self.wait(1.0):
            self._let_go()

    def _let_go(self) -> None:
        walk, self._walk = self._walk, None
        if walk:
            walk.close()

    def _run(self, due: list[tuple[int, str, int, int]]) -> None:
        try:
            self._read(due)
        finally:
            if self._stop.is_set():  # nobody may wait for it any more
                self._let_go()

    def _read(self, due: list[tuple[int, str, int, int]]) -> None:
        for count, path, inode, cookie in due:
            begin_s = time.thread_time()
            failure = None
            try:
                table = self._table(count, path, inode, cookie)
            except OSError as error:
                failure = error
            if self._stop.is_set() and failure:
                return
            self._paces[inode, cookie] = _Pace(time.monotonic() + PAUSE_S, empty=False)
            # For all tables together: reading one goes through the hash table of the whole machine.
            self._rest_until_s = max(self._rest_until_s, time.monotonic())
            self._rest_until_s += PAUSE_RATIO * (time.thread_time() - begin_s)
            with self._lock:
                if failure:
                    self._failures[inode, cookie] = failure
                else:
                    self._failures.pop((inode, cookie), None)
                    self._finished.append(table)

    def _table(self, count: int, path: str, inode: int, cookie: int) -> ConntrackTable:
        if count >= WALKED_FROM and not self._never_walks:
            try:
                table = walk_table(self._begun_walk(), path, inode, cookie, self._t_ns, self._stop)
            except (OSError, K8sdiagError) as error:
                if self._stop.is_set() or (isinstance(error, OSError) and error.errno == errno.ESTALE):
                    raise
                self.walks, self.walk_refused = False, str(error)
                self._never_walks = self._walk is None
            else:
                self.walks, self.walk_refused = True, ""
                return table
        return read_table(path, inode, cookie, self._t_ns, self._stop)

    def _begun_walk(self) -> Walk:
        """Raises K8sdiagError where it cannot be loaded, which it never will then."""
        if self._walk is None:
            from k8sdiag.host.sensors.walk import Walk

            self._walk = Walk()
        return self._walk
