# Trace files: what is written comes back, whatever happens to the file on the way.

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8sdiag import trace
from k8sdiag.engine import Engine
from k8sdiag.errors import TraceError
from k8sdiag.facts import (
    REMEMBERED_NS,
    Address,
    AnyFact,
    Capability,
    ClashesResolved,
    Clock,
    ConntrackStats,
    ConntrackTable,
    Cost,
    DropKey,
    Drops,
    HostPod,
    Link,
    Lost,
    NetnsOwner,
    Node,
    Reason,
    Sample,
    Symbol,
)
from k8sdiag.snapshot import Snapshot
from k8sdiag.source import Batch, Tee
from k8sdiag.trace import Checkpoint, TraceSource, TraceWriter

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

S = 10**9
HOST, CART, SHOP = 4026531840, 4026532100, 4026532200
KINDS = get_args(AnyFact)

text = st.text(max_size=12)
number = st.integers(0, 2**63 - 1)
address = st.ip_addresses().map(str)
fact_strategies: dict[type, st.SearchStrategy[Any]] = {
    Address: st.builds(Address, number, address, number, number, st.none() | number),
    DropKey: st.builds(
        DropKey,
        id=number,
        reason=number,
        location=number,
        src=address | st.just(""),
        hook=text,
        dst=address | st.just(""),
        sport=number,
        dport=number,
        folded=st.booleans(),
        verdict=text,
        reply_src=address | st.just(""),
        reply_dst=address | st.just(""),
    ),
    Node: st.builds(Node, name=text, kernel=text, netns=number),
    Clock: st.builds(Clock, st.integers(-(2**62), 2**62)),
    Cost: st.builds(Cost, st.floats(0, 1e9), number, number, st.none() | number, st.none() | number),
    Sample: st.builds(
        Sample, number, number, number, st.binary(max_size=20).map(bytes.hex), st.lists(number, max_size=3).map(tuple)
    ),
    Drops: st.lists(st.tuples(number, number, number, number), max_size=4).map(
        lambda rows: Drops(*(tuple(row[i] for row in rows) for i in range(4)))
    ),
    ClashesResolved: st.lists(st.tuples(number, number), max_size=4).map(
        lambda rows: ClashesResolved(tuple(key for key, _ in rows), tuple(packets for _, packets in rows))
    ),
    ConntrackTable: st.builds(
        lambda netns, t_ns, rows: ConntrackTable(netns, t_ns, 0, 0, *(tuple(row[i] for row in rows) for i in range(8))),
        number,
        number,
        st.lists(st.tuples(number, address, address | st.just(""), number, text, number, number, number), max_size=4),
    ),
}
facts = st.one_of([fact_strategies.get(kind, st.from_type(kind)) for kind in KINDS])


class Kept(io.BytesIO):
    """A file whose content can still be read after it was closed."""

    content = b""

    def close(self) -> None:
        self.content = self.getvalue()
        super().close()


class ListSource:
    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = list(batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def close(self) -> None:
        self._batches = []


def written(batches: Iterable[Batch]) -> bytes:
    file = Kept()
    writer = TraceWriter(file)
    for batch in batches:
        writer.write(batch)
    writer.close()
    return file.content


def source(content: bytes) -> TraceSource:
    return TraceSource(io.BytesIO(content), "it.k8sd")


def frames(content: bytes) -> list[bytes]:
    """The text of each zstd frame."""
    found = []
    while content:
        decompressor = zstd.ZstdDecompressor()
        found.append(decompressor.decompress(content))
        assert decompressor.eof
        content = decompressor.unused_data
    return found


def lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in b"".join(frames(content)).splitlines()]


def packed(*records: object) -> bytes:
    """One frame of lines."""
    encoded = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    return zstd.compress(b"".join(line + b"\n" for line in encoded))


HEADER = {"type": "header", "schema": "k8sdiag/trace/v1", "node": "n", "kernel": "6.18"}
TICK = {"type": "tick", "t_ns": 5, "seq": 0}


def at(t_s: float, *facts: AnyFact) -> Batch:
    return Batch(round(t_s * S), facts)


def closed_port(key_id: int, netns: int = CART, sport: int = 40000) -> DropKey:
    return DropKey(key_id, 3, 0xFFFFFFFF81000010, netns, family=2, protocol=17, src="10.244.1.6", dst="10.244.1.5",
                   sport=sport, dport=9)  # fmt: skip


def drops(*counts: tuple[int, int]) -> Drops:
    keys, packets = zip(*counts, strict=True)
    return Drops(keys, packets, packets, tuple(100 * count for count in packets))


BEGINNING = (
    Node("node-1", "6.18.0", HOST), Clock(1_700_000_000 * S), Capability("drops", "full", "raw_tracepoint"),
    Reason(3, "NO_SOCKET"), Symbol(0xFFFFFFFF81000010, "__udp4_lib_rcv"),
    NetnsOwner(CART, "pod", "cart", 0, "prod", uid="u1"), Address(CART, "10.244.1.5"),
    NetnsOwner(SHOP, "pod", "shop", 0, "prod", uid="u2"), Address(SHOP, "10.244.1.6"),
    HostPod("u3", "kube-proxy", "kube-system"), Link(HOST, 7, "cali01", 0, "veth", 2, CART),
)  # fmt: skip


def tracking(
    tracked: dict[int, ConntrackStats], pods: dict[int, NetnsOwner], rng: random.Random, t_ns: int
) -> list[AnyFact]:
    """One tick of some namespaces' connections; `tracked` are the statistics so far."""
    living = {HOST: 0, CART: 0, **{netns: owner.netns_cookie for netns, owner in pods.items()}}
    ended = [netns for netns, stats in tracked.items() if living.get(netns) != stats.netns_cookie]
    facts: list[AnyFact] = [msgspec.structs.replace(tracked.pop(netns), count=0, until_t_ns=t_ns) for netns in ended]
    for netns, cookie in living.items():
        if rng.random() < 0.3:
            continue
        was = tracked.get(netns, ConntrackStats(netns, cookie, clash_resolved=0))
        names = rng.sample(("found", "invalid", "insert_failed", "drop", "early_drop", "clash_resolved"), 2)
        steps = {name: getattr(was, name) + rng.randrange(9) for name in names}
        tracked[netns] = msgspec.structs.replace(was, count=rng.randrange(1, 500), max=500, buckets=64, **steps)
        facts.append(tracked[netns])
        if rng.random() < 0.2:
            entries = tuple(rng.randrange(1, 99) for _ in range(3))
            facts.append(
                ConntrackTable(netns, t_ns, cookie, sum(entries), (0, 0, 7), ("10.244.1.5", "10.244.1.6", ""),
                               ("10.244.1.6", "192.0.2.7", ""), (6, 17, 6), ("SYN_SENT", "", ""), entries, (1, 0, 1),
                               (30, 20, 10))
            )  # fmt: skip
    return facts


def watch(seconds: int, begin_s: float = 100) -> list[Batch]:
    """A watch with everything in it: new keys, pods and their connections that come and go, losses, samples."""
    batches = [at(begin_s, *BEGINNING)]
    rng = random.Random(7)
    key_id = 0
    pods: dict[int, NetnsOwner] = {}
    tracked: dict[int, ConntrackStats] = {}
    races = random.Random(8)
    for tick in range(1, seconds + 1):
        t_s = begin_s + tick
        facts: list[AnyFact] = []
        if tick == 20:
            facts.append(Clock(1_700_000_007 * S))
        if tick % 9 == 0:
            inode = 4026533000 + tick % 4
            if inode in pods:
                facts.append(msgspec.structs.replace(pods.pop(inode), until_t_ns=round(t_s * S)))
            pods[inode] = NetnsOwner(inode, "pod", f"job-{tick}", tick, "batch", from_t_ns=round(t_s * S))
            facts.append(pods[inode])
        new = []
        for _ in range(rng.randrange(3)):
            key_id += 1
            netns = rng.choice([CART, SHOP, *pods])
            cookie = pods[netns].netns_cookie if netns in pods else 0
            new.append(
                msgspec.structs.replace(closed_port(key_id, netns, rng.randrange(40000, 40009)), netns_cookie=cookie)
            )
        facts += new
        used = sorted({*(key.id for key in new), *(rng.randrange(1, key_id + 1) for _ in range(2) if key_id)})
        if used:
            facts.append(drops(*((used_id, rng.randrange(1, 50)) for used_id in used)))
            facts.append(Sample(used[0], round(t_s * S), 60, "4500", (0xFFFFFFFF81000010,)))
        facts += tracking(tracked, pods, races, round(t_s * S))
        if used:
            facts.append(ClashesResolved((used[0],), (races.randrange(1, 9),)))
        facts += [Lost(tick // 10, 0, tick), Cost(tick / 100, 5 << 20)]
        batches.append(at(t_s, *facts))
    return batches


def snapshots(batches: Iterable[Batch], window_s: float | None = None) -> list[Snapshot]:
    engine = Engine(window_s)
    found = []
    for batch in batches:
        engine.fold(batch)
        found.append(engine.snapshot())
    return found


# What is written comes back


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_kind_of_fact_comes_back_as_it_was(kind: type[AnyFact], data: st.DataObject) -> None:
    fact: AnyFact = data.draw(fact_strategies.get(kind, st.from_type(kind)))
    used = fact.key if isinstance(fact, (Drops, ClashesResolved)) else ()
    before: list[AnyFact] = [DropKey(key_id, 1, 2) for key_id in used]
    batch = Batch(7, (*before, fact))
    assert list(source(written([batch]))) == [batch]


anything_but_counts = st.lists(facts.filter(lambda fact: not isinstance(fact, (Drops, ClashesResolved))), max_size=5)


@given(st.lists(st.builds(Batch, number, anything_but_counts.map(tuple)), min_size=1, max_size=4))
def test_batches_come_back_whole_and_in_order(batches: list[Batch]) -> None:
    spread = [msgspec.structs.replace(batch, t_ns=tick) for tick, batch in enumerate(batches)]
    assert list(source(written(spread))) == spread


def test_a_replay_of_what_was_recorded_while_it_ran_gives_equal_snapshots() -> None:
    file = Kept()
    writer = TraceWriter(file)
    live = snapshots(Tee(ListSource(watch(200)), writer.write))
    writer.close()
    replayed = source(file.content)
    assert snapshots(replayed) == live
    assert replayed.warning == ""
    assert len(live) == 201
    assert live[-1].skbs > 1000
    assert sum(table.invalid for table in live[-1].conntrack) > 500
    # and what is recorded of a replay says the same again
    assert snapshots(source(written(source(file.content)))) == live


def test_the_first_line_describes_the_watch() -> None:
    replayed = source(written(watch(3)))
    list(replayed)
    header = replayed.header
    assert (header.schema, header.node, header.kernel) == ("k8sdiag/trace/v1", "node-1", "6.18.0")
    assert (header.boot_to_wall_ns, header.payload_bytes) == (1_700_000_000 * S, 0)
    assert [capability.signal for capability in header.capabilities] == ["drops"]
    first = lines(written(watch(3)))[0]
    assert {"type", "schema", "node", "kernel", "tool", "boot_to_wall_ns", "capabilities"} <= first.keys()


def test_the_first_line_has_every_field_of_the_contract() -> None:
    first = lines(written([at(1)]))[0]
    assert list(first) == [
        "type",
        "schema",
        "node",
        "kernel",
        "tool",
        "boot_to_wall_ns",
        "payload_bytes",
        "capabilities",
    ]


def test_the_file_is_json_lines_in_zstd_frames_of_whole_lines() -> None:
    content = written(watch(150))
    texts = frames(content)
    assert len(texts) >= 151
    assert all(text.endswith(b"\n") for text in texts)
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    assert {record["type"] for record in records} >= {"header", "tick", "checkpoint", "drops", "drop_key", "sample"}
    assert [record["seq"] for record in records if record["type"] == "tick"] == list(range(151))
    assert all(json.loads(text.splitlines()[-1])["type"] == "tick" for text in texts)


def test_other_tools_read_it() -> None:
    if not shutil.which("zstdcat"):
        pytest.skip("needs zstdcat")
    content = written(watch(70))
    said = subprocess.run(["zstdcat"], input=content, capture_output=True, check=True).stdout
    assert said == b"".join(frames(content))


def test_a_big_batch_is_cut_into_frames_of_bounded_size() -> None:
    batch = at(1, *(closed_port(key_id) for key_id in range(20_000)), drops(*((n, 1) for n in range(20_000))))
    texts = frames(written([batch]))
    assert len(texts) > 5
    assert all(text.endswith(b"\n") for text in texts)
    # a frame may exceed the limit by the line that reached it
    longest = max(len(line) for text in texts for line in text.splitlines())
    assert max(map(len, texts)) < trace.FRAME_BYTES + longest + 1
    assert list(source(written([batch]))) == [batch]


def test_each_batch_is_in_the_file_when_write_returns() -> None:
    file = io.BytesIO()
    writer = TraceWriter(file)
    for count, batch in enumerate(watch(5), 1):
        writer.write(batch)
        assert len(list(source(file.getvalue()))) == count
        assert writer.bytes_written == len(file.getvalue())


# Files that were cut or damaged


def test_a_file_cut_anywhere_replays_up_to_its_last_whole_frame() -> None:
    batches = watch(12)
    content = written(batches)
    ends: list[int] = []
    rest = content
    while rest:
        decompressor = zstd.ZstdDecompressor()
        decompressor.decompress(rest)
        rest = decompressor.unused_data
        ends.append(len(content) - len(rest))
    assert ends[-1] == len(content)
    for length in range(len(content)):
        cut = source(content[:length])
        whole = sum(end <= length for end in ends)
        if not whole:
            with pytest.raises(TraceError, match="is not a k8sdiag trace"):
                list(cut)
            continue
        assert list(cut) == batches[:whole]
        assert bool(cut.warning) == (length not in ends)
        if cut.warning:
            assert f"byte {length}" in cut.warning


def test_facts_behind_the_last_tick_are_left_out() -> None:
    content = packed(HEADER, TICK, {"type": "reason", "number": 3, "name": "NO_SOCKET"})
    assert list(source(content)) == [Batch(5, ())]


def test_a_file_damaged_by_single_bits_is_a_trace_error_or_a_shorter_trace() -> None:
    """Never another exception, and never a number that was not measured."""
    content = written(watch(12))
    whole = list(source(content))
    rng = random.Random(3)
    refused = shorter = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        replayed: list[Batch] = []
        reader = source(bytes(damaged))
        try:
            replayed.extend(reader)
        except TraceError:
            refused += 1
        else:
            shorter += len(replayed) < len(whole)
    assert refused > 0
    assert shorter > 0


def test_a_file_damaged_by_single_bits_never_tells_other_numbers() -> None:
    content = written(watch(12))
    whole = list(source(content))
    rng = random.Random(3)
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        replayed: list[Batch] = []
        with suppress(TraceError):
            replayed.extend(source(bytes(damaged)))  # what came before an error counts
        assert replayed == whole[: len(replayed)]


def test_bits_flipped_inside_the_text_are_a_trace_error_or_skipped() -> None:
    text = b"".join(frames(written(watch(6))))
    rng = random.Random(5)
    for _ in range(400):
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        with suppress(TraceError):
            list(source(zstd.compress(bytes(damaged))))


@given(st.binary(max_size=300))
def test_what_is_no_trace_is_refused(content: bytes) -> None:
    for file in (content, zstd.compress(content), zstd.compress(content + b"\n")):
        with pytest.raises(TraceError, match="is not a k8sdiag trace"):
            list(source(file))


@pytest.mark.parametrize("content", [b"", b"\x28\xb5\x2f\xfd", b"\n", b"{}\n", b"PK\x03\x04"], ids=repr)
def test_an_empty_or_foreign_file_says_that_it_is_no_trace(content: bytes) -> None:
    with pytest.raises(TraceError, match=r"it\.k8sd is not a k8sdiag trace"):
        list(source(content))


def test_a_file_that_begins_with_a_fact_is_no_trace() -> None:
    with pytest.raises(TraceError, match="first line is no header"):
        list(source(packed({"type": "reason", "number": 3, "name": "NO_SOCKET"}, TICK)))


def test_a_missing_file_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        TraceSource.open(str(tmp_path / "none.k8sd"))
    with pytest.raises(TraceError, match="directory"):
        TraceSource.open(str(tmp_path))


def test_damage_says_at_which_byte() -> None:
    first = packed(HEADER, TICK)
    content = first + packed({"type": "reason", "number": "three", "name": "NO_SOCKET"})
    replayed = source(content)
    with pytest.raises(TraceError, match=f"damaged at byte {len(first)}"):
        list(replayed)


def test_garbage_after_whole_frames_is_a_warning() -> None:
    first = packed(HEADER, TICK)
    replayed = source(first + b"garbage that is no frame at all")
    assert list(replayed) == [Batch(5, ())]
    assert f"byte {len(first)}" in replayed.warning


NONSENSE: dict[str, list[dict[str, object]]] = {
    "key never stated": [{"type": "drops", "key": [99], "skbs": [5], "packets": [5], "bytes": [5]}],
    "columns of different length": [
        {"type": "drop_key", "id": 1, "reason": 3, "location": 9},
        {"type": "drops", "key": [1, 1], "skbs": [5], "packets": [5, 5], "bytes": [5, 5]},
    ],
    "odd addresses": [
        {"type": "drop_key", "id": 1, "reason": 3, "location": 9, "netns": 7, "family": 2, "src": "x", "dst": "y"},
        {"type": "drops", "key": [1], "skbs": [5], "packets": [5], "bytes": [5]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("records", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_that_decodes_well_is_a_trace_error_or_harmless(records: list[dict[str, object]]) -> None:
    engine = Engine()
    with suppress(TraceError):
        for batch in source(packed(HEADER, *records, TICK)):
            engine.fold(batch)
            engine.snapshot()


def test_a_line_nested_beyond_measure_is_a_trace_error() -> None:
    deep = b'{"type":"reason","number":3,"name":"X","new":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(TraceError):
        list(source(packed(HEADER, deep, TICK)))


# Other versions


@pytest.mark.parametrize("schema", ["k8sdiag/trace/v2", "k8sdiag/trace/v99", "", "something/else/v1"])
def test_a_schema_that_is_not_ours_is_refused_by_name(schema: str) -> None:
    with pytest.raises(TraceError) as caught:
        list(source(packed({**HEADER, "schema": schema}, TICK)))
    assert f"has schema {schema}" in str(caught.value)
    assert "k8sdiag/trace/v1" in str(caught.value)
    assert "Read it with" in str(caught.value)


def test_kinds_of_records_that_are_not_known_are_passed_over() -> None:
    reason = {"type": "reason", "number": 3, "name": "NO_SOCKET"}
    content = packed(HEADER, {"type": "weather", "rain": [1, 2]}, reason, {"type": "tick_tock"}, TICK)
    assert list(source(content)) == [Batch(5, (Reason(3, "NO_SOCKET"),))]


def test_fields_that_are_not_known_are_passed_over() -> None:
    reason = {"type": "reason", "number": 3, "name": "NO_SOCKET", "since": "6.1", "more": {"deep": []}}
    content = packed({**HEADER, "added": 1}, reason, {**TICK, "added": [None]})
    assert list(source(content)) == [Batch(5, (Reason(3, "NO_SOCKET"),))]


def test_fields_that_an_older_version_did_not_write_have_their_defaults() -> None:
    content = packed(HEADER, {"type": "netns_owner", "netns": 7, "kind": "pod", "name": "cart"}, TICK)
    (batch,) = source(content)
    assert batch.facts == (NetnsOwner(7, "pod", "cart"),)


def test_a_known_record_with_a_wrong_field_is_not_passed_over() -> None:
    with pytest.raises(TraceError, match="damaged"):
        list(source(packed(HEADER, {"type": "reason", "number": "three", "name": "X"}, TICK)))


# Files made to hurt


def measured(content: bytes, tmp_path: Path) -> tuple[str, float, int]:
    """(what replaying says, seconds, bytes of memory at most) in a process of its own, with an end to its memory."""
    path = tmp_path / "it.k8sd"
    path.write_bytes(content)
    script = (
        "import resource, sys, time\n"
        "from k8sdiag.errors import TraceError\n"
        "from k8sdiag.trace import TraceSource\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before, begin = rss(), time.monotonic()\n"
        "try:\n"
        "    said = sum(len(batch.facts) for batch in TraceSource.open(sys.argv[1]))\n"
        "except TraceError as error:\n"
        "    said = f'TraceError: {error}'\n"
        "print(f'{time.monotonic() - begin}\\n{rss() - before}\\n{said}')\n"
    )

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=bounded, env={**os.environ, "PYTHONPATH": str(Path(trace.__file__).parents[1])},
    )  # fmt: skip
    if done.returncode:
        return done.stderr.splitlines()[-1], 0, 0
    seconds, memory, said = done.stdout.split("\n", 2)
    return said, float(seconds), int(memory)


def test_a_small_file_that_unpacks_to_gigabytes_costs_little(tmp_path: Path) -> None:
    compressor = zstd.ZstdCompressor(level=1)
    bomb = bytearray(packed(HEADER, TICK))
    for _ in range(2 << 10):
        bomb += compressor.compress(b" " * (1 << 20))
    bomb += compressor.flush()
    assert len(bomb) < 1 << 20
    said, seconds, memory = measured(bytes(bomb), tmp_path)
    assert said.startswith("TraceError: ")
    assert seconds < 5
    assert memory < 100 << 20


def test_a_line_without_end_is_refused_and_costs_little(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(24 << 20).hex().encode()
    said, seconds, memory = measured(packed(HEADER, TICK) + zstd.compress(b'{"type":"' + noise), tmp_path)
    assert said.startswith("TraceError: ")
    assert seconds < 10
    assert memory < 150 << 20


def test_twenty_thousand_empty_frames_are_read_in_a_moment() -> None:
    begin_s = time.process_time()
    assert list(source(packed(HEADER, TICK) + zstd.compress(b"") * 20_000)) == [Batch(5, ())]
    assert time.process_time() - begin_s < 5


# Checkpoints


def entered(content: bytes, checkpoint: int) -> bytes:
    """The trace from its n-th checkpoint on, behind its header."""
    text = b"".join(frames(content)).splitlines(keepends=True)
    starts = [i for i, line in enumerate(text) if json.loads(line)["type"] == "checkpoint"]
    return zstd.compress(b"".join([text[0], *text[starts[checkpoint] :]]))


def test_checkpoints_come_once_a_minute() -> None:
    times = [record["t_ns"] / S for record in lines(written(watch(200))) if record["type"] == "checkpoint"]
    assert times == [160, 220, 280]


@pytest.mark.parametrize("checkpoint", [0, 1, 2])
def test_a_reader_that_begins_at_a_checkpoint_knows_all_there_is_to_know(checkpoint: int) -> None:
    content = written(watch(230))
    whole = snapshots(source(content), window_s=15)[-1]
    assert whole.skbs > 100
    assert sum(table.invalid for table in whole.conntrack) > 20
    assert any(table.holders for table in whole.conntrack)
    assert any(table.full_count for table in whole.conntrack)
    assert any(table.repairs for table in whole.conntrack)
    entry = snapshots(source(entered(content, checkpoint)), window_s=15)[-1]
    assert entry == whole


def test_owners_that_died_lately_are_said_again_and_others_are_not() -> None:
    gone = NetnsOwner(CART, "pod", "gone", 5, from_t_ns=100 * S, until_t_ns=110 * S)
    batches = [at(100, *BEGINNING), at(110, gone), *(at(t_s) for t_s in range(111, 1000))]
    restated: dict[int, set[str]] = {}
    now = 0
    for record in lines(written(batches)):
        if record["type"] == "checkpoint":
            restated[record["t_ns"]] = set()
            now = record["t_ns"]
        elif record["type"] == "netns_owner" and restated:
            restated[now].add(record["name"])
    for t_ns, names in restated.items():
        assert names == ({"cart", "shop", "gone"} if t_ns - 110 * S <= REMEMBERED_NS else {"cart", "shop"})
    assert len(restated) == 14


def test_who_held_a_table_is_said_again_as_long_as_its_namespace_is() -> None:
    gone = ConntrackStats(CART, 5, until_t_ns=110 * S)
    tables = ConntrackTable(CART, 101 * S, 5), ConntrackTable(HOST, 101 * S)
    start = ConntrackStats(CART, 5, 9), ConntrackStats(HOST, 0, 9)
    ticks = (at(t_s) for t_s in range(111, 1000))
    records = lines(written([at(100, *BEGINNING), at(101, *start, *tables), at(110, gone), *ticks]))
    restated: dict[int, set[int]] = {}
    for record in records:
        if record["type"] == "checkpoint":
            restated[record["t_ns"]] = set()
        elif record["type"] == "conntrack_table" and restated:
            restated[max(restated)].add(record["netns"])
    assert len(restated) == 14
    for t_ns, netns in restated.items():
        assert netns == ({CART, HOST} if t_ns - 110 * S <= REMEMBERED_NS else {HOST})


def test_a_key_is_said_again_when_it_is_next_used_after_a_checkpoint() -> None:
    key, unused = closed_port(1), closed_port(2, sport=5)
    batches = [at(0, *BEGINNING, key, unused, drops((1, 5))), at(30, drops((1, 6))), at(61), at(62, drops((1, 7)))]
    records = lines(written(batches))
    after = records[[record["type"] for record in records].index("checkpoint") :]
    assert [record["id"] for record in after if record["type"] == "drop_key"] == [1]
    kinds = [record["type"] for record in after]
    assert kinds.index("drop_key") > kinds.index("tick")  # not at the checkpoint, but when used
    replayed = list(source(entered(written(batches), 0)))
    assert replayed[-1].facts == (key, drops((1, 7)))


def test_a_key_is_said_again_when_a_sample_uses_it_after_a_checkpoint() -> None:
    batches = [at(0, *BEGINNING, closed_port(1), drops((1, 5))), at(61), at(62, Sample(1, 62 * S, 60))]
    replayed = list(source(entered(written(batches), 0)))
    assert closed_port(1) in replayed[-1].facts


def test_a_checkpoint_states_the_latest_word_only() -> None:
    batches = [at(0, *BEGINNING), at(1, Clock(7), Capability("drops", "inferred")), at(60)]
    records = lines(written(batches))
    after = records[[record["type"] for record in records].index("checkpoint") :]
    assert [record["boot_to_wall_ns"] for record in after if record["type"] == "clock"] == [7]
    assert [record["status"] for record in after if record["type"] == "capability"] == ["inferred"]
    assert len([record for record in after if record["type"] == "node"]) == 1


def test_checkpoint_lines_are_no_facts() -> None:
    assert all(not isinstance(fact, Checkpoint) for batch in source(written(watch(70))) for fact in batch.facts)


# The file itself


def test_a_new_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new.k8sd"
    before = os.umask(0)
    try:
        with trace.create(str(path)) as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_old_file_is_emptied_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "old.k8sd"
    path.write_bytes(b"older content")
    path.chmod(0o644)
    trace.create(str(path)).close()
    assert path.read_bytes() == b""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_written_under_sudo_belongs_to_the_calling_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "12345")
    monkeypatch.setenv("SUDO_GID", "23456")
    path = tmp_path / "theirs.k8sd"
    trace.create(str(path)).close()
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)
    monkeypatch.delenv("SUDO_GID")
    other = tmp_path / "other.k8sd"
    trace.create(str(other)).close()
    assert (other.stat().st_uid, other.stat().st_gid) == (12345, os.getegid())


def test_what_is_no_regular_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o644)
    path.chmod(0o644)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        trace.create(str(path)).close()
    finally:
        os.close(reader)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_full_disk_leaves_what_was_written_before() -> None:
    class Full(Kept):
        left = 3

        def write(self, content: Any) -> int:
            if self.left == 0:
                raise OSError(28, "No space left on device")
            self.left -= 1
            return super().write(content)

    file = Full()
    writer = TraceWriter(file)
    batches = watch(6)
    for batch in batches[:3]:
        writer.write(batch)
    with pytest.raises(OSError, match="No space left"):
        writer.write(batches[3])
    assert list(source(file.getvalue())) == batches[:3]
