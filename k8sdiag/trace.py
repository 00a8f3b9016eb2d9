"""Trace files: the facts of a watch, as JSON lines in independent zstd frames (`zstdcat FILE | jq` reads them).

    {"type":"header","schema":"k8sdiag/trace/v1",…}      first line
    {"type":"drop_key",…}  {"type":"drops",…}  …         facts, in the order they became known
    {"type":"tick","t_ns":…,"seq":…}                     ends a batch; what follows the last tick is ignored
    {"type":"checkpoint","t_ns":…}                       once a minute: all lasting state follows again

A frame holds whole lines and is closed after each tick or 256 KiB, so a file that was cut anywhere, by a crash or a
full disk, replays up to its last whole frame. Facts are as measured, before attribution and diagnosis.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import IO

import msgspec

from k8sdiag import __version__
from k8sdiag.errors import TraceError
from k8sdiag.facts import (
    KEYS_IN_USE,
    REMEMBERED_NS,
    STATE_FACTS,
    Address,
    AnyFact,
    Capability,
    ClashesResolved,
    Clock,
    ConntrackStats,
    ConntrackTable,
    DropKey,
    Drops,
    HostPod,
    Link,
    NetnsOwner,
    Node,
    Reason,
    Sample,
    Symbol,
)
from k8sdiag.source import Batch

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SCHEMA = "k8sdiag/trace/v1"
SUFFIX = ".k8sd"
LEVEL = 3
FRAME_BYTES = 256 << 10
CENTURIES_NS = 200 * 365 * 86400 * 10**9
CHECKPOINT_NS = 60 * 10**9
LINE_BYTES_MAX = 16 << 20
"""A longer line is not ours: the largest real one, a tick's columns, stays below 1 MiB."""


class Header(msgspec.Struct, frozen=True, tag="header"):
    """First line of a trace."""

    schema: str = SCHEMA
    node: str = ""
    kernel: str = ""
    tool: str = __version__
    boot_to_wall_ns: int = 0
    payload_bytes: int = 0
    """Payload read of each sampled packet; 0 unless it was asked for."""
    capabilities: tuple[Capability, ...] = ()


class Tick(msgspec.Struct, frozen=True, tag="tick"):
    t_ns: int
    seq: int


class Checkpoint(msgspec.Struct, frozen=True, tag="checkpoint"):
    t_ns: int


_ENCODER = msgspec.json.Encoder()
_LINE: msgspec.json.Decoder[AnyFact | Header | Tick | Checkpoint] = msgspec.json.Decoder(
    AnyFact | Header | Tick | Checkpoint
)
_TYPE = msgspec.json.Decoder(msgspec.defstruct("_Type", [("type", str)]))


_OPTIONS: dict[int, int] = {
    zstd.CompressionParameter.compression_level: LEVEL,
    zstd.CompressionParameter.checksum_flag: 1,
}


class TraceWriter:
    """Writes batches to a binary file object; each is in the kernel's hands when write() returns."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._seq = 0
        self._state: dict[tuple[object, ...], AnyFact] = {}
        self._keys: dict[int, DropKey] = {}
        self._stated: set[int] = set()
        self._checkpoint_t_ns: int | None = None
        self._buffer = bytearray()
        self.bytes_written = 0

    def write(self, batch: Batch) -> None:
        """Append one batch. Raises OSError (disk full): what was written before stays readable."""
        if self._checkpoint_t_ns is None:
            self._line(_header(batch))
            self._checkpoint_t_ns = batch.t_ns
        elif batch.t_ns - self._checkpoint_t_ns >= CHECKPOINT_NS:
            self._checkpoint(batch.t_ns)
        for fact in batch.facts:
            if isinstance(fact, DropKey):
                self._keys[fact.id] = fact
                self._stated.add(fact.id)
            elif isinstance(fact, STATE_FACTS):
                self._state[_state_key(fact)] = fact
            elif isinstance(fact, (Drops, ClashesResolved, Sample)):
                # Keys are many: after a checkpoint each is said again when it is next used.
                for key_id in (fact.key,) if isinstance(fact, Sample) else fact.key:
                    if key_id not in self._stated and key_id in self._keys:
                        self._stated.add(key_id)
                        self._line(self._keys[key_id])
            self._line(fact)
        self._line(Tick(batch.t_ns, self._seq))
        self._seq += 1
        self._flush()

    def _checkpoint(self, t_ns: int) -> None:
        self._checkpoint_t_ns = t_ns
        self._line(Checkpoint(t_ns))
        forgotten_ns = t_ns - REMEMBERED_NS
        self._state = {
            key: fact
            for key, fact in self._state.items()
            if (getattr(fact, "until_t_ns", None) or t_ns) >= forgotten_ns
        }
        for key, fact in list(self._state.items()):
            # Who held a table has no end of its own: it goes with the table's statistics.
            if isinstance(fact, ConntrackTable) and (ConntrackStats, *key[1:]) not in self._state:
                del self._state[key]
        for fact in self._state.values():
            self._line(fact)
        oldest = max(self._keys, default=0) - KEYS_IN_USE
        self._keys = {key_id: key for key_id, key in self._keys.items() if key_id > oldest}
        self._stated.clear()

    def _line(self, record: AnyFact | Header | Tick | Checkpoint) -> None:
        self._buffer += _ENCODER.encode(record)
        self._buffer += b"\n"
        if len(self._buffer) >= FRAME_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            frame = zstd.compress(bytes(self._buffer), options=_OPTIONS)
            self._buffer.clear()
            self._file.write(frame)
            self._file.flush()
            self.bytes_written += len(frame)

    def close(self) -> None:
        self._flush()
        self._file.close()


class TraceSource:
    """A recorded watch as a source of batches. Iterating reads the file; it may be iterated once.

    `warning` is set after a file that ended in the middle of a frame. Raises TraceError for what is no trace.
    """

    def __init__(self, file: IO[bytes], name: str = "trace") -> None:
        self._file = file
        self._name = name
        self._closed = False
        self._keys: set[int] = set()
        self.header = Header()
        self.warning = ""

    @classmethod
    def open(cls, path: str) -> TraceSource:
        """Open a file, or standard input for "-". Raises TraceError."""
        if path == "-":
            return cls(io.BufferedReader(sys.stdin.buffer), "standard input")  # type: ignore[type-var]
        try:
            return cls(Path(path).open("rb"), path)
        except OSError as error:
            raise TraceError(f"Cannot read {path}: {error.strerror}.") from error

    def __iter__(self) -> Iterator[Batch]:
        facts: list[AnyFact] = []
        first = True
        last_t_ns = 0
        for at, line in self._lines():
            try:
                record = _decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                what = "not a k8sdiag trace" if first else f"damaged at byte {at}"
                raise TraceError(f"{self._name} is {what}: {error}.") from error
            if first:
                self._check(record)
                first = False
            match record:
                case None | Header() | Checkpoint():
                    pass
                case Tick():
                    if record.t_ns < last_t_ns:
                        raise TraceError(f"{self._name} is damaged at byte {at}: time runs backwards.")
                    last_t_ns = record.t_ns
                    yield Batch(record.t_ns, tuple(facts))
                    facts = []
                case _:
                    if not self._makes_sense(record):
                        raise TraceError(f"{self._name} is damaged at byte {at}: a {record.__struct_config__.tag} "
                                         "record contradicts itself or what stands before it.")  # fmt: skip
                    facts.append(record)
            if self._closed:
                break
        self._file.close()
        if first:
            raise TraceError(f"{self._name} is not a k8sdiag trace: it holds no whole frame.")

    def _makes_sense(self, fact: AnyFact) -> bool:
        """What the engine relies on and the shape of a line does not assure."""
        match fact:
            case DropKey():
                self._keys.add(fact.id)
                if len(self._keys) > 2 * KEYS_IN_USE:
                    self._keys = {key for key in self._keys if key > fact.id - KEYS_IN_USE}
                return all(map(_is_address, (fact.src, fact.dst, fact.reply_src, fact.reply_dst)))
            case Address():
                return _is_address(fact.address)
            case ConntrackTable():
                columns = (fact.zone, fact.source, fact.target, fact.protocol, fact.state, fact.entries,
                           fact.unreplied, fact.timeout_s)  # fmt: skip
                return len({len(column) for column in columns}) == 1 and all(
                    map(_is_address, (*fact.source, *fact.target))
                )
            case Clock():
                return abs(fact.boot_to_wall_ns) < CENTURIES_NS
            case Drops():
                if min((0, *fact.skbs, *fact.packets, *fact.bytes)) < 0:
                    return False
                lengths = {len(fact.key), len(fact.skbs), len(fact.packets), len(fact.bytes)}
                return len(lengths) == 1 and self._keys.issuperset(fact.key)
            case ClashesResolved():
                return len(fact.key) == len(fact.packets) and self._keys.issuperset(fact.key)
            case _:
                return True

    def close(self) -> None:
        self._closed = True

    def _check(self, record: object) -> None:
        if not isinstance(record, Header):
            raise TraceError(f"{self._name} is not a k8sdiag trace: its first line is no header.")
        if record.schema != SCHEMA:
            raise TraceError(
                f"{self._name} has schema {record.schema}; this version ({__version__}) reads {SCHEMA}.\n"
                "Read it with the k8sdiag that wrote it, or a newer one."
            )
        self.header = record

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(compressed byte the frame begins at, line) of every whole frame."""
        at = 0
        rest = b""
        while not self._closed:
            decompressor = zstd.ZstdDecompressor()
            chunk = rest or self._file.read(64 << 10)
            if not chunk:
                return
            consumed = 0
            text = bytearray()
            while True:
                try:
                    # No more than is needed to see that it is too much: a few bytes may unpack to gigabytes.
                    text += decompressor.decompress(chunk, max(0, LINE_BYTES_MAX + 1 - len(text)))
                except zstd.ZstdError as error:
                    if at == 0:
                        raise TraceError(f"{self._name} is not a k8sdiag trace: {error}.") from error
                    self.warning = f"{self._name} is damaged at byte {at}: replayed up to there."
                    return
                consumed += len(chunk)
                if len(text) > LINE_BYTES_MAX:
                    raise TraceError(f"{self._name}: a frame at byte {at} is larger than any of ours.")
                if decompressor.eof:
                    break
                if not decompressor.needs_input:
                    chunk = b""
                    continue
                chunk = self._file.read(64 << 10)
                if not chunk:
                    self.warning = f"{self._name} was cut at byte {at + consumed}: replayed up to its last whole frame."
                    return
            rest = decompressor.unused_data
            for line in bytes(text).splitlines():
                yield at, line
            at += consumed - len(rest)


def _decode(line: bytes) -> AnyFact | Header | Tick | Checkpoint | None:
    """None for a kind of record that a newer minor version added."""
    try:
        return _LINE.decode(line)
    except msgspec.ValidationError:
        kind = _TYPE.decode(line).type  # type: ignore[attr-defined]
        if kind in _KINDS:
            raise
        return None


_KINDS = {"header", "tick", "checkpoint"} | {str(fact.__struct_config__.tag) for fact in AnyFact.__args__}


def _is_address(text: str) -> bool:
    try:
        return not text or bool(ip_address(text))
    except ValueError:
        return False


def _header(batch: Batch) -> Header:
    node = next((fact for fact in batch.facts if isinstance(fact, Node)), None)
    clock = next((fact for fact in batch.facts if isinstance(fact, Clock)), Clock(0))
    return Header(
        node=node.name if node else "",
        kernel=node.kernel if node else "",
        boot_to_wall_ns=clock.boot_to_wall_ns,
        capabilities=tuple(fact for fact in batch.facts if isinstance(fact, Capability)),
    )


_SAME: dict[type, Callable[..., tuple[object, ...]]] = {
    Node: lambda _: (),
    Clock: lambda _: (),
    Capability: lambda fact: (fact.signal,),
    Reason: lambda fact: (fact.number,),
    Symbol: lambda fact: (fact.address,),
    NetnsOwner: lambda fact: (fact.netns, fact.netns_cookie, fact.kind, fact.uid or fact.name, fact.from_t_ns),
    HostPod: lambda fact: (fact.uid,),
    Link: lambda fact: (fact.netns, fact.netns_cookie, fact.ifindex, fact.from_t_ns),
    Address: lambda fact: (fact.netns, fact.netns_cookie, fact.address, fact.from_t_ns),
    ConntrackStats: lambda fact: (fact.netns, fact.netns_cookie),
    ConntrackTable: lambda fact: (fact.netns, fact.netns_cookie),
}


def _state_key(fact: AnyFact) -> tuple[object, ...]:
    """What makes two state facts statements about the same thing: the later one stands."""
    return type(fact), *_SAME[type(fact)](fact)


def create(path: str, *, is_new: bool = False) -> IO[bytes]:
    """A trace file, mode 0600, belonging to the user behind sudo. "-" is standard output.

    `is_new` refuses a name that exists, a link too: for names that nobody chose. Raises OSError.
    """
    if path == "-":
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if is_new else os.O_TRUNC), 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "wb")
    os.fchmod(descriptor, 0o600)
    if os.geteuid() == 0 and "SUDO_UID" in os.environ:
        os.fchown(descriptor, int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", "-1")))
    return os.fdopen(descriptor, "wb")
