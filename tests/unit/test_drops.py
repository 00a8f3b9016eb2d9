# What the drop probe counted becomes facts: records as the kernel writes them, packed field by field.

from __future__ import annotations

import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import asdict

from k8sdiag.facts import Capability, ClashesResolved, DropKey, Drops, Sample, Symbol
from k8sdiag.host import wire
from k8sdiag.host.bpf import Compilation
from k8sdiag.host.sensors import drops
from k8sdiag.host.sensors.drops import ConntrackSeen, DropSensor, _drop_key

NETNS, COOKIE = 4026532100, 0x1122334455667788
V4 = bytes(10) + b"\xff\xff"
FLOW: dict[str, int | bytes] = {
    "net": COOKIE, "location": 0xFFFFFFFF81000040, "ifindex": 7, "reason": 12, "hook": wire.Hook.POST_ROUTING,
    "verdict": wire.Verdict.CLASH, "conntrack": wire.Conntrack.NEW, "nat": wire.Nat.BOTH,
    "netns_from": wire.NetnsFrom.DEVICE, "family": wire.Family.IPV4, "protocol": 6, "segment": wire.Segment.SYN,
    "reply_src": V4 + bytes((10, 244, 1, 6)), "reply_dst": V4 + bytes((192, 0, 2, 10)), "reply_sport": 8443,
    "reply_dport": 1024, "iif": 9, "src": V4 + bytes((10, 244, 1, 5)), "dst": V4 + bytes((10, 96, 0, 1)),
    "sport": 40000, "dport": 443, "flow_pad": 0,
}  # fmt: skip
FACT = DropKey(
    3, 12, 0xFFFFFFFF81000040, NETNS, COOKIE, "DEVICE", 7, 9, "POST_ROUTING", "NEW", 2, 6, "10.244.1.5", "10.96.0.1",
    40000, 443, False, "CLASH", False, "SYN", "BOTH", "10.244.1.6", "192.0.2.10", 8443, 1024,
)  # fmt: skip
"""What FLOW stands for."""


def packed(record: wire.Layout, **values: int | bytes) -> bytes:
    return record.codec.pack(*(values[field.name] for field in record.fields))


def flow(**more: int | bytes) -> bytes:
    assert more.keys() <= FLOW.keys()
    return packed(wire.FLOW_KEY, **{**FLOW, **more})


def fact_of(**more: int | bytes) -> DropKey:
    return _drop_key(3, flow(**more) + struct.pack("<I", NETNS))


# ----------------------------------------------------------------------------------------------------
# Keys


def test_every_field_of_a_flow_reaches_its_fact() -> None:
    assert fact_of() == FACT
    lasting = {"id", "folded", "probed", "is_reply"}  # not fields of the record
    plain = asdict(DropKey(0, 0, 0))
    assert {name for name, value in asdict(FACT).items() if value == plain[name]} == lasting - {"id"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"location": 1}, {"location": 1}), ({"ifindex": 1}, {"ifindex": 1}), ({"reason": 1}, {"reason": 1}),
        ({"iif": 1}, {"iif": 1}), ({"sport": 1}, {"sport": 1}), ({"dport": 1}, {"dport": 1}),
        ({"protocol": 1}, {"protocol": 1}), ({"net": 1}, {"netns_cookie": 1}),
        ({"reply_sport": 1}, {"reply_sport": 1}), ({"reply_dport": 1}, {"reply_dport": 1}),
        ({"src": V4 + bytes(4)}, {"src": "0.0.0.0"}), ({"dst": V4 + b"\x01\x02\x03\x04"}, {"dst": "1.2.3.4"}),
        ({"reply_src": V4 + b"\x01\x02\x03\x04"}, {"reply_src": "1.2.3.4"}),
        ({"reply_dst": V4 + b"\x01\x02\x03\x04"}, {"reply_dst": "1.2.3.4"}),
        ({"hook": 0}, {"hook": ""}), ({"conntrack": 0}, {"conntrack": ""}), ({"netns_from": 0}, {"netns_from": ""}),
        ({"verdict": 0}, {"verdict": ""}), ({"segment": 0}, {"segment": ""}),
        ({"verdict": wire.Verdict.CLASH | wire.PROBED}, {"probed": True}),
        ({"verdict": wire.Verdict.CLASH_RESOLVED | wire.PROBED}, {"verdict": "CLASH_RESOLVED", "probed": True}),
        ({"nat": wire.Nat.BOTH | wire.Nat.REPLY}, {"is_reply": True}),
        # what is not translated has no reply of its own
        ({"nat": 0}, {"nat": "", "reply_src": "", "reply_dst": ""}),
        # what is not IP has no addresses
        ({"family": 0}, {"family": 0, "src": "", "dst": "", "reply_src": "", "reply_dst": ""}),
    ],
    ids=lambda value: next(iter(value)),
)  # fmt: skip
def test_a_field_that_differs_is_the_only_one_that_does(
    more: dict[str, int | bytes], expected: dict[str, object]
) -> None:
    found, plain = asdict(fact_of(**more)), asdict(FACT)
    assert {name: value for name, value in found.items() if value != plain[name]} == expected


@pytest.mark.parametrize(
    ("field", "name", "enum"),
    [
        ("hook", "hook", wire.Hook), ("verdict", "verdict", wire.Verdict), ("conntrack", "conntrack", wire.Conntrack),
        ("nat", "nat", wire.Nat), ("segment", "segment", wire.Segment), ("netns_from", "netns_from", wire.NetnsFrom),
    ],
)  # fmt: skip
def test_every_number_has_its_name(field: str, name: str, enum: type[wire.Hook]) -> None:
    for member in set(enum) - {wire.Nat.REPLY}:
        assert getattr(fact_of(**{field: member}), name) == (member.name if member else "")
    assert {fact_of(verdict=one | wire.PROBED).verdict for one in wire.Verdict if one} == {
        one.name for one in wire.Verdict if one
    }


def test_ipv6_addresses_are_compressed() -> None:
    six = bytes.fromhex("fd00" + "00" * 13 + "05")
    found = fact_of(family=wire.Family.IPV6, src=six, dst=six, reply_src=six, reply_dst=six)
    assert {found.src, found.dst, found.reply_src, found.reply_dst} == {"fd00::5"}


def test_what_is_beyond_the_limit_keeps_what_explains_it() -> None:
    beginning = flow(verdict=wire.Verdict.REFUSED | wire.PROBED)[: wire.DROP_KEY.size]
    found = _drop_key(3, beginning + struct.pack("<I", NETNS))
    expected = {
        "verdict": "REFUSED", "probed": True, "folded": True, "iif": 0, "src": "", "dst": "", "sport": 0, "dport": 0,
        "reply_src": "", "reply_dst": "", "reply_sport": 0, "reply_dport": 0,
    }  # fmt: skip
    assert asdict(found) == {**asdict(FACT), **expected}


# ----------------------------------------------------------------------------------------------------
# The sensor, on maps that are dicts

CPUS = 3


class Map:
    """Stands for a BPF map: what was put there, and what a drain finds."""

    def __init__(self, *_: object) -> None:
        self.put: dict[bytes, bytes] = {}

    def update(self, key: bytes, value: bytes) -> None:
        self.put[key] = value

    def drain(self) -> Iterator[tuple[bytes, bytes]]:
        if self.put:
            yield b"".join(self.put), b"".join(self.put.values())
        self.put = {}


def tallies(*skbs: int, packets: int = 0) -> bytes:
    """A value of all CPUs; the first one inserted the key."""
    rows = [(number, packets or number, 60 * number) for number in skbs]
    return b"".join(
        wire.TALLY.codec.pack(*row, COOKIE * (not cpu), NETNS * (not cpu), 0) for cpu, row in enumerate(rows)
    )


@pytest.fixture
def sensor(monkeypatch: pytest.MonkeyPatch) -> DropSensor:
    made: dict[int, Map] = {}
    monkeypatch.setattr(drops, "BpfMap", lambda fd, *_: made.setdefault(fd, Map()))
    monkeypatch.setattr(drops, "possible_cpus", lambda: CPUS)
    symbols = SimpleNamespace(name=lambda _: "nf_hook_slow", hidden=False)
    found = DropSensor(cast("Compilation", SimpleNamespace(symbols=symbols)))
    found._maps = {f"{name}_{side}": Map() for name in ("flows", "drops", "repairs") for side in (0, 1)}  # type: ignore[misc]
    found._control = Map()  # type: ignore[assignment]
    found._ring = SimpleNamespace(read=list)  # type: ignore[assignment]
    found._grace = SimpleNamespace(wait=lambda: None)  # type: ignore[assignment]
    found._probe = cast("Any", SimpleNamespace(map_fds={"seen": 5}, about={"conntrack": ["statistics"]}, made=made))
    found._switch()
    return found


def control(sensor: DropSensor) -> dict[str, int]:
    (value,) = cast("Map", sensor._control).put.values()
    return dict(zip((field.name for field in wire.CONTROL.fields), wire.CONTROL.codec.unpack(value), strict=True))


def idle(sensor: DropSensor, name: str) -> Map:
    """The map that the next read drains: the one the program writes to until then."""
    return cast("Map", sensor._maps[f"{name}_{control(sensor)['side']}"])


def test_drops_are_summed_over_cpus_under_a_namespaces_number_and_not_its_address(sensor: DropSensor) -> None:
    for address, counted in ((0xFFFF888000000000, tallies(1, 2, 4, packets=9)), (0xFFFF888000009999, tallies(1, 0, 0))):
        idle(sensor, "flows").update(flow(net=address), counted)
    found = [fact for fact in sensor.read() if isinstance(fact, Drops)]
    assert found == [Drops((1,), (8,), (28,), (480,))]


def test_repaired_races_are_a_fact_of_their_own_and_no_drops(sensor: DropSensor) -> None:
    repaired = flow(net=0xFFFF888000000000, verdict=wire.Verdict.CLASH_RESOLVED | wire.PROBED)
    idle(sensor, "repairs").update(repaired, tallies(3, 0, 5))
    idle(sensor, "flows").update(flow(net=0xFFFF888000000000), tallies(1, 1, 0))
    facts = sensor.read()
    assert [type(fact) for fact in facts] == [DropKey, Symbol, Drops, DropKey, ClashesResolved]
    (dropped, resolved) = (fact for fact in facts if isinstance(fact, DropKey))
    assert (dropped.verdict, dropped.netns, dropped.netns_cookie) == ("CLASH", NETNS, COOKIE)
    assert (resolved.verdict, resolved.probed, resolved.netns) == ("CLASH_RESOLVED", True, NETNS)
    assert facts[2] == Drops((dropped.id,), (2,), (2,), (120,))
    assert facts[4] == ClashesResolved((resolved.id,), (8,))
    assert not [fact for fact in sensor.read() if isinstance(fact, (Drops, ClashesResolved, Sample))]


def test_a_namespace_where_netfilter_dropped_is_looked_at(sensor: DropSensor) -> None:
    idle(sensor, "flows").update(flow(hook=0), tallies(1, 0, 0))
    sensor.read()
    assert sensor.filtered == set()
    idle(sensor, "flows").update(flow(), tallies(1, 0, 0))
    sensor.read()
    assert sensor.filtered == {NETNS}
    idle(sensor, "drops").update(flow()[: wire.DROP_KEY.size], tallies(1, 0, 0))
    sensor.read()
    assert sensor.filtered == {NETNS}
    sensor.read()
    assert sensor.filtered == set()


def test_the_probe_is_told_what_each_cpu_had_counted(sensor: DropSensor) -> None:
    assert control(sensor)["baselined"] == 0
    rows = [ConntrackSeen(1, 2, 3), ConntrackSeen(4, 5, 6), ConntrackSeen(0xFFFFFFFF, 0, 7)]
    # of one not every CPU is known: it stays unsaid; one has no cookie, and goes by its inode
    sensor.baseline({(NETNS, COOKIE): rows, (NETNS + 1, 7): rows[:2], (NETNS + 2, 0): rows})
    seen = cast("Any", sensor._probe).made[5].put
    assert seen.keys() == {struct.pack("<Q", COOKIE), struct.pack("<Q", NETNS + 2)}
    (value,) = set(seen.values())
    assert len(value) == CPUS * wire.CONNTRACK_SEEN.size
    names = [field.name for field in wire.CONNTRACK_SEEN.fields]
    told = [dict(zip(names, one, strict=True)) for one in wire.CONNTRACK_SEEN.codec.iter_unpack(value)]
    assert told == [
        {"insert_failed": 1, "drop": 2, "chain_too_long": 3, "seen_pad": 0},
        {"insert_failed": 4, "drop": 5, "chain_too_long": 6, "seen_pad": 0},
        {"insert_failed": 0xFFFFFFFF, "drop": 0, "chain_too_long": 7, "seen_pad": 0},
    ]
    assert control(sensor)["baselined"] == 1


def test_that_the_probe_was_told_stays_so_and_the_side_is_still_the_same(sensor: DropSensor) -> None:
    before = control(sensor)
    sensor.baseline({})
    assert control(sensor) == {**before, "baselined": 1}
    sensor.read()
    assert control(sensor) == {**control(sensor), "baselined": 1, "side": 1 - before["side"]}


def test_a_kernel_that_lets_the_probe_see_nothing_of_conntrack_is_told_nothing(sensor: DropSensor) -> None:
    cast("Any", sensor._probe).map_fds.clear()
    sensor.baseline({(NETNS, COOKIE): [ConntrackSeen(1, 2, 3)] * CPUS})
    assert cast("Any", sensor._probe).made == {}
    assert control(sensor)["baselined"] == 1


@pytest.mark.parametrize(
    ("known", "why_not", "status", "said"),
    [
        (["state", "statistics"], "", "full", ""),
        (["state", "statistics"], "no kprobes", "inferred", "no kprobes"),
        (["state"], "no kprobes", "counters", "no type information"),
    ],
)
def test_how_well_conntrack_is_seen_is_said(
    sensor: DropSensor, known: list[str], why_not: str, status: str, said: str
) -> None:
    cast("Any", sensor._probe).about = {"conntrack": known, "arguments": 3}
    found: dict[str, Capability] = {one.signal: one for one in sensor._capabilities(why_not)}
    assert found["conntrack"].status == status
    assert said in found["conntrack"].why
    assert bool(found["conntrack"].why) == (status != "full")


def test_a_kernel_that_counts_long_chains_says_so(sensor: DropSensor) -> None:
    assert not sensor.counts_chains
    cast("Any", sensor._probe).about["conntrack"].append("chains")
    assert sensor.counts_chains
