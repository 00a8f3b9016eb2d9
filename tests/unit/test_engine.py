# Accounting: whatever the order and the number of facts, no drop is lost, doubled or moved.

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8sdiag import causes
from k8sdiag.engine import Engine
from k8sdiag.facts import (
    KEYS_IN_USE,
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
from k8sdiag.snapshot import DropRow, OwnerConntrack, Snapshot, Tuple
from k8sdiag.source import Batch

S = 10**9
HOST, CART, SHOP, OTHER, STRANGER = 4026531840, 4026532100, 4026532200, 4026532300, 4026532400
NODE = Node("node-1", "6.18.0", HOST)
REASONS = {
    2: "NOT_SPECIFIED",
    3: "NO_SOCKET",
    12: "NETFILTER_DROP",
    13: "OTHERHOST",
    16: "IP_RPFILTER",
    6: "SOCKET_RCVBUFF",
}
UDP_RCV, NFT, IP_RCV, SLOW = 0xFFFFFFFF81000010, 0xFFFFFFFF81000020, 0xFFFFFFFF81000030, 0xFFFFFFFF81000040
NAMES: tuple[AnyFact, ...] = (
    NODE,
    *(Reason(number, name) for number, name in REASONS.items()),
    Symbol(UDP_RCV, "__udp4_lib_rcv"), Symbol(NFT, "nft_do_chain"), Symbol(IP_RCV, "ip_rcv_finish_core"),
    Symbol(SLOW, "nf_hook_slow"),
)  # fmt: skip


def pod(netns: int, namespace: str, name: str, from_s: float = 0) -> NetnsOwner:
    return NetnsOwner(netns, "pod", name, 0, namespace, uid=f"uid-{name}", from_t_ns=round(from_s * S))


PODS = (
    pod(CART, "prod", "cart"), pod(SHOP, "prod", "shop"), pod(OTHER, "dev", "other"),
    Address(CART, "10.244.1.5"), Address(SHOP, "10.244.1.6"), Address(OTHER, "10.244.2.7"),
    Address(HOST, "192.0.2.10"), Link(HOST, 7, "cali01", 0, "veth", 2, CART),
)  # fmt: skip


def closed_port(number: int, netns: int = CART, sport: int = 40000, dport: int = 9) -> DropKey:
    return DropKey(number, 3, UDP_RCV, netns, family=2, protocol=17, src="10.244.1.6", dst="10.244.1.5",
                   sport=sport, dport=dport)  # fmt: skip


def drops(*counts: tuple[int, int]) -> Drops:
    """(key, packets) each; a packet is one buffer of 100 bytes."""
    keys, packets = zip(*counts, strict=True)
    return Drops(keys, packets, packets, tuple(100 * count for count in packets))


def folded(batches: Iterable[Batch], engine: Engine | None = None) -> Engine:
    engine = engine or Engine()
    for batch in batches:
        engine.fold(batch)
    return engine


def at(t_s: float, *facts: AnyFact) -> Batch:
    return Batch(round(t_s * S), facts)


# Made-up streams

keys = st.builds(
    DropKey,
    id=st.just(0),
    reason=st.sampled_from([0, 77, 0x20003, *REASONS]),
    location=st.sampled_from([UDP_RCV, NFT, IP_RCV, SLOW, 0xFFFFFFFF81000099]),
    netns=st.sampled_from([0, HOST, CART, SHOP, OTHER, STRANGER]),
    netns_cookie=st.sampled_from([0, 0, 5]),
    netns_from=st.sampled_from(["DEVICE", "SOCKET", "ROUTE", "CONNTRACK"]),
    ifindex=st.sampled_from([0, 2, 7]),
    iif=st.sampled_from([0, 7]),
    hook=st.sampled_from(["", "FORWARD", "LOCAL_IN", "UNKNOWN", "POST_ROUTING"]),
    conntrack=st.sampled_from(["", "NEW", "CONFIRMED"]),
    family=st.sampled_from([2, 2, 2, 10, 0]),
    protocol=st.sampled_from([17, 6, 1, 250]),
    src=st.sampled_from(["", "10.244.1.5", "10.244.1.6", "203.0.113.9"]),
    dst=st.sampled_from(["10.244.1.5", "10.244.2.7", "192.0.2.10", "224.0.0.251"]),
    sport=st.sampled_from([0, 40000, 40001, 40002]),
    dport=st.sampled_from([0, 9, 53]),
    folded=st.booleans(),
    verdict=st.sampled_from(["", "RULE", "REFUSED", "CLASH", "CHAIN_TOO_LONG", "INSERT_FAILED", "UNKNOWN"]),
    probed=st.booleans(),
    segment=st.sampled_from(["", "SYN", "RST", "OTHER"]),
    nat=st.sampled_from(["", "SRC", "DST", "BOTH"]),
    reply_src=st.sampled_from(["", "10.244.1.6", "203.0.113.9"]),
    reply_dst=st.sampled_from(["", "192.0.2.10"]),
    reply_sport=st.sampled_from([0, 53]),
    reply_dport=st.sampled_from([0, 40000, 1024]),
)
counts = st.tuples(st.integers(0, 9), st.integers(1, 1000), st.integers(1, 5000), st.integers(0, 10**6))
late = st.sampled_from([
    pod(STRANGER, "dev", "late"), pod(CART, "prod", "cart-renamed", 1), HostPod("uid-proxy", "kube-proxy"),
    Address(STRANGER, "203.0.113.9"), Lost(events=3), Capability("drops", "full"), Clock(5), Cost(0.5),
    Address(CART, "10.244.1.5", 0, 0, 2 * S),
    ConntrackStats(HOST, 0, 50, 60, drop=9, early_drop=2), ConntrackStats(CART, 0, 4, insert_failed=5, drop=5),
    ConntrackStats(HOST, 0, 60, 60, drop=19, insert_failed=3, early_drop=2, clash_resolved=7, invalid=3),
    ConntrackTable(HOST, S, 0, 5, (0,), ("10.244.1.5",), ("203.0.113.9",), (17,), ("",), (5,), (5,), (90,)),
])  # fmt: skip


class Stream:
    """Ten keys, and per batch (seconds since the last, facts before its counts, its counts)."""

    def __init__(
        self, ten: Sequence[DropKey], ticks: Sequence[tuple[float, list[AnyFact], list[tuple[int, int, int, int]]]]
    ) -> None:
        self.keys = [msgspec.structs.replace(key, id=number) for number, key in enumerate(ten)]
        self.batches = [at(1, *NAMES, *PODS, *self.keys)]
        self.counted: list[tuple[int, int, int, int]] = []
        """(t_ns, skbs, packets, bytes) of everything."""
        t_ns = S
        for apart_s, before, entries in ticks:
            t_ns += round(apart_s * S)
            columns = [tuple(column) for column in zip(*entries, strict=True)] or [()] * 4
            self.batches.append(Batch(t_ns, (*before, Drops(*columns))))
            self.counted += [(t_ns, skbs, packets, length) for _, skbs, packets, length in entries]

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.batches))

    def sums(self, after_ns: int = 0) -> tuple[int, int, int]:
        """What was counted after a time: buffers, packets, bytes."""
        within = [entry for entry in self.counted if entry[0] > after_ns]
        return sum(e[1] for e in within), sum(e[2] for e in within), sum(e[3] for e in within)


streams = st.builds(
    Stream,
    st.lists(keys, min_size=10, max_size=10),
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 1.0, 1.0, 3.0, 30.0]), st.lists(late, max_size=2), st.lists(counts, max_size=8)
        ),
        max_size=12,
    ),
)


def sums_of(rows: Iterable[DropRow]) -> tuple[int, int, int]:
    rows = list(rows)
    return sum(row.skbs for row in rows), sum(row.packets for row in rows), sum(row.bytes for row in rows)


def check_sums(snapshot: Snapshot, expected: tuple[int, int, int]) -> None:
    assert sums_of(snapshot.drops) == expected
    assert snapshot.skbs == expected[0]
    assert snapshot.total.packets + snapshot.total.benign_packets == expected[1]
    for table in (snapshot.owners, snapshot.namespaces):
        assert sum(row.drops.packets for row in table) == snapshot.total.packets
        assert sum(row.drops.benign_packets for row in table) == snapshot.total.benign_packets
        assert sum(count.packets for row in table for count in row.causes) == snapshot.total.packets
    assert sum(finding.packets for finding in snapshot.findings) == snapshot.total.packets


@given(streams, st.sampled_from([0, 1, 3, 500]))
def test_no_drop_is_lost_or_doubled_whatever_the_row_limit(stream: Stream, limit: int) -> None:
    check_sums(folded(stream.batches, Engine(row_limit=limit)).snapshot(), stream.sums())


@given(streams, st.sampled_from([0.05, 1, 2, 5, 31]), st.sampled_from([1, 500]))
def test_a_window_holds_exactly_what_was_counted_in_it(stream: Stream, window_s: float, limit: int) -> None:
    engine = Engine(window_s, limit)
    for batch in stream.batches:
        engine.fold(batch)
        engine.snapshot()
    counted_until = stream.batches[-1].t_ns
    check_sums(engine.snapshot(), stream.sums(counted_until - round(window_s * S)))


@given(streams, st.sampled_from([None, 2.0]))
def test_the_cut_of_batches_within_a_tick_is_of_no_account(stream: Stream, window_s: float | None) -> None:
    whole = folded(stream.batches, Engine(window_s))
    single = folded((Batch(b.t_ns, (fact,)) for b in stream.batches for fact in b.facts), Engine(window_s))
    last = Batch(stream.batches[-1].t_ns, ())  # a tick without any fact ends at its own time
    assert folded([last], single).snapshot() == folded([last], whole).snapshot()


@given(streams)
def test_two_engines_that_are_told_the_same_say_the_same(stream: Stream) -> None:
    one, two = Engine(10), Engine(10)
    for batch in stream.batches:
        one.fold(batch)
        two.fold(batch)
        two.snapshot()  # asking changes nothing
        assert one.snapshot() == two.snapshot()


@given(streams)
def test_keys_and_state_said_again_change_nothing(stream: Stream) -> None:
    once = folded(stream.batches)
    again = Engine()
    for batch in stream.batches:
        again.fold(Batch(batch.t_ns, (*NAMES, *stream.keys, *batch.facts)))
    assert once.snapshot() == again.snapshot()


@given(streams)
def test_rows_beyond_the_limit_become_one_row_for_each_owner_and_cause(stream: Stream) -> None:
    every = folded(stream.batches, Engine(row_limit=10**6)).snapshot()
    few = folded(stream.batches, Engine(row_limit=2)).snapshot()
    shown, rest = few.drops[:2], few.drops[2:]
    assert shown == every.drops[:2]
    for counter in ("skbs", "packets", "bytes"):
        expected: Counter[tuple[object, str, bool]] = Counter()
        for row in every.drops[2:]:
            expected[row.owner.identity, row.cause, row.benign] += getattr(row, counter)
        assert {(row.owner.identity, row.cause, row.benign): getattr(row, counter) for row in rest} == dict(expected)
    if len(every.drops) > 2:
        assert {(row.reason, row.location) for row in rest} == {("__other__", "__other__")}
        assert all(row.flows is None and row.src is None and row.sport is None for row in rest)
    assert (few.owners, few.namespaces, few.findings, few.total) == (
        every.owners, every.namespaces, every.findings, every.total,
    )  # fmt: skip


# What a row says


def test_one_tick_of_one_pod_is_one_row() -> None:
    snapshot = folded([at(1, *NAMES, *PODS), at(2, closed_port(1), drops((1, 23)))]).snapshot()
    (row,) = snapshot.drops
    assert (row.reason, row.location, row.cause, row.benign) == ("NO_SOCKET", "__udp4_lib_rcv", "closed-port", False)
    assert (row.owner.label, row.owner.how, row.direction) == ("prod/cart", "netns", "in")
    assert row.peer is not None
    assert row.peer.label == "prod/shop"
    assert (row.family, row.protocol, row.src, row.dst, row.sport, row.dport) == (
        "ipv4", "udp", "10.244.1.6", "10.244.1.5", 40000, 9,
    )  # fmt: skip
    assert (row.skbs, row.packets, row.bytes, row.flows, row.netns) == (23, 23, 2300, 1, CART)
    assert (row.hook, row.conntrack, row.device, row.reply, row.service) == (None,) * 5
    assert (snapshot.window_s, snapshot.t_ns, snapshot.node) == (1.0, 2 * S, NODE)
    assert [owner.owner.label for owner in snapshot.owners] == ["prod/cart"]
    assert snapshot.owners[0].causes[0].connections == 1


def test_buffers_and_wire_packets_are_counted_apart() -> None:
    batch = at(2, closed_port(1), Drops((1,), (35,), (80,), (56000,)))
    (row,) = folded([at(1, *NAMES, *PODS), batch]).snapshot().drops
    assert (row.skbs, row.packets, row.bytes) == (35, 80, 56000)


def test_flows_that_differ_in_their_source_port_only_are_one_row() -> None:
    keys = [closed_port(number, sport=40000 + number) for number in range(1, 6)]
    snapshot = folded([at(1, *NAMES, *PODS), at(2, *keys, drops(*((n, n) for n in range(1, 6))))]).snapshot()
    (row,) = snapshot.drops
    assert (row.packets, row.flows, row.sport, row.dport) == (15, 5, None, 9)
    assert snapshot.findings[0].connections == 5


def test_a_folded_row_says_that_its_flows_are_not_known() -> None:
    whole, rest = closed_port(1), DropKey(2, 3, UDP_RCV, CART, family=2, protocol=17, folded=True)
    snapshot = folded([at(1, *NAMES, *PODS), at(2, whole, rest, drops((1, 30), (2, 10)))]).snapshot()
    assert [row.flows for row in snapshot.drops] == [1, None]
    assert snapshot.owners[0].causes[0].connections is None
    assert snapshot.findings[0].connections is None
    assert snapshot.findings[0].packets == 40


def test_what_the_kernel_does_not_name_is_shown_by_its_number() -> None:
    unnamed = DropKey(1, 77, 0xFFFFFFFF81000099, CART, family=2, protocol=250, src="10.244.1.6", dst="10.244.1.5")
    module = DropKey(2, 2 << 16 | 9, UDP_RCV, CART, family=2, protocol=17, src="10.244.1.6", dst="10.244.1.5")
    none = DropKey(3, 0, UDP_RCV, CART, family=0)
    facts = unnamed, module, none, drops((1, 30), (2, 20), (3, 10))
    rows = folded([at(1, *NAMES, *PODS), at(2, *facts)]).snapshot().drops
    assert [(row.reason, row.location) for row in sorted(rows, key=lambda row: -row.packets)] == [
        ("77", "0xffffffff81000099"), ("subsys:2/code:9", "__udp4_lib_rcv"), ("", "__udp4_lib_rcv"),
    ]  # fmt: skip
    assert [row.protocol for row in sorted(rows, key=lambda row: -row.packets)] == ["250", "udp", None]


def test_names_that_come_after_the_counts_are_used() -> None:
    engine = folded([at(1, *PODS), at(2, closed_port(1), drops((1, 5)))])
    assert engine.snapshot().drops[0].reason == "3"
    engine.fold(at(3, *NAMES))
    assert (engine.snapshot().drops[0].reason, engine.snapshot().drops[0].location) == ("NO_SOCKET", "__udp4_lib_rcv")


@pytest.mark.parametrize(
    "other", [{"hook": "FORWARD"}, {"conntrack": "NEW"}, {"protocol": 6}, {"folded": True}], ids=str
)
def test_the_order_of_rows_does_not_depend_on_which_was_counted_first(other: dict[str, object]) -> None:
    """Otherwise a reader that begins at a checkpoint shows another order than one that began earlier."""
    one, two = (
        DropKey(number, 12, NFT, **{"netns": OTHER + 50, "family": 2, "protocol": 17, "src": "203.0.113.9",
                "dst": "203.0.113.8", **more})  # type: ignore[arg-type]
        for number, more in ((1, {}), (2, other))
    )  # fmt: skip
    begin = at(0, NODE, *NAMES, one, two)
    forth = folded([begin, at(1, drops((1, 7))), at(2, drops((2, 7)))]).snapshot()
    back = folded([begin, at(1, drops((2, 7))), at(2, drops((1, 7)))]).snapshot()
    assert len(forth.drops) == 2
    assert forth.drops == back.drops


# Owners that change


def test_each_drop_belongs_to_who_was_there_when_it_was_counted() -> None:
    engine = folded([
        at(1, *NAMES), at(2, closed_port(1, STRANGER), drops((1, 7))),
        at(3, pod(STRANGER, "dev", "late", 2.5), drops((1, 11))), at(4, drops((1, 13))),
    ])  # fmt: skip
    by_owner = {row.owner.kind: row.drops.packets for row in engine.snapshot().owners}
    assert by_owner == {"unknown": 7, "pod": 24}


def test_a_recycled_inode_keeps_the_drops_of_both_apart() -> None:
    def owner(name: str, cookie: int, from_s: int, until_s: int | None = None) -> NetnsOwner:
        until_ns = None if until_s is None else until_s * S
        return NetnsOwner(STRANGER, "pod", name, cookie, "prod", from_t_ns=from_s * S, until_t_ns=until_ns)

    old = msgspec.structs.replace(closed_port(1, STRANGER), netns_cookie=81)
    new = msgspec.structs.replace(closed_port(2, STRANGER), netns_cookie=82)
    engine = folded([
        at(1, *NAMES, owner("old", 81, 1)),
        at(2, old, drops((1, 5))),
        # ended and begun between two ticks, with drops of both
        at(3, owner("old", 81, 1, 3), owner("new", 82, 3), new, drops((1, 7), (2, 11))),
        at(4, drops((2, 13))),
    ])  # fmt: skip
    assert {row.owner.name: row.drops.packets for row in engine.snapshot().owners} == {"old": 12, "new": 24}


def test_after_ten_minutes_a_dead_owner_gets_no_more_drops() -> None:
    ended = msgspec.structs.replace(pod(STRANGER, "dev", "gone"), until_t_ns=3 * S)
    key = closed_port(1, STRANGER)
    engine = folded([at(1, *NAMES, pod(STRANGER, "dev", "gone")), at(3, ended, key, drops((1, 5)))])
    assert engine.snapshot().owners[0].owner.name == "gone"
    later_s = 4 + REMEMBERED_NS / S
    engine = folded([at(later_s, *NAMES), at(later_s + 1, drops((1, 7)))], engine)
    assert {row.owner.kind: row.drops.packets for row in engine.snapshot().owners} == {"pod": 5, "unknown": 7}


def test_a_number_that_is_given_to_another_key_does_not_bring_the_old_owner_along() -> None:
    # a source forgets its keys and begins anew, or two traces were joined
    engine = folded([
        at(1, *NAMES, *PODS), at(2, closed_port(1, CART), drops((1, 5))),
        at(3, msgspec.structs.replace(closed_port(1, OTHER), dst="10.244.2.7"), drops((1, 7))),
    ])  # fmt: skip
    assert {row.owner.name: row.drops.packets for row in engine.snapshot().owners} == {"cart": 5, "other": 7}


def test_keys_that_are_still_in_use_are_kept_and_others_let_go() -> None:
    engine = folded([at(1, *NAMES, *PODS)])
    first = 2 * KEYS_IN_USE - 50
    engine.fold(at(2, *(closed_port(number) for number in range(2 * KEYS_IN_USE + 2))))
    engine.fold(at(3, drops((first, 5))))
    assert engine.snapshot().skbs == 5
    assert len(engine._keys) <= KEYS_IN_USE + 1


# Windows and rates


def test_what_is_older_than_the_window_leaves_it() -> None:
    engine = folded([at(0, *NAMES, *PODS, closed_port(1))], Engine(3))
    seen = []
    for second, packets in enumerate((1, 2, 4, 8, 16, 32), 1):
        engine.fold(at(second, drops((1, packets))))
        seen.append((engine.snapshot().skbs, engine.snapshot().window_s))
    assert seen == [(1, 1), (3, 2), (7, 3), (14, 3), (28, 3), (56, 3)]
    engine.fold(at(100))
    assert (engine.snapshot().skbs, engine.snapshot().drops, engine.snapshot().owners) == (0, (), ())


def test_without_a_window_everything_stays() -> None:
    engine = folded([at(0, *NAMES, *PODS, closed_port(1))])
    for second in range(1, 200):
        engine.fold(at(second, drops((1, 3))))
    assert (engine.snapshot().skbs, engine.snapshot().window_s) == (597, 199)


def test_a_rate_is_that_of_the_last_five_seconds() -> None:
    engine = folded([at(0, *NAMES, *PODS, closed_port(1))])
    for second in range(1, 11):
        engine.fold(at(second, drops((1, 100 if second <= 5 else 10))))
    assert engine.snapshot().rate_pps == pytest.approx(10)
    assert engine.snapshot().drops[0].rate_pps == pytest.approx(10)
    assert engine.snapshot().owners[0].rate_pps == pytest.approx(10)
    engine.fold(at(20))
    assert engine.snapshot().rate_pps == 0
    assert engine.snapshot().skbs == 550


def test_a_rate_before_five_seconds_have_passed_is_that_of_the_time_there_was() -> None:
    engine = folded([at(0, *NAMES, *PODS, closed_port(1)), at(2, drops((1, 30)))])
    assert engine.snapshot().rate_pps == pytest.approx(15)


def test_benign_drops_are_rows_without_a_rate_of_trouble() -> None:
    other = DropKey(1, 13, IP_RCV, CART, family=2, protocol=6, src="10.244.1.6", dst="10.244.1.99")
    snapshot = folded([at(0, *NAMES, *PODS), at(1, other, drops((1, 1000)))]).snapshot()
    assert (snapshot.drops[0].cause, snapshot.drops[0].benign) == (causes.BENIGN, True)
    assert (snapshot.rate_pps, snapshot.total.packets, snapshot.total.benign_packets) == (0, 0, 1000)
    assert snapshot.findings == ()
    assert snapshot.namespaces[0].causes == ()


def test_the_first_batch_alone_gives_a_snapshot_of_no_time() -> None:
    snapshot = folded([at(5, *NAMES, closed_port(1), drops((1, 4)))]).snapshot()
    assert (snapshot.window_s, snapshot.skbs) == (0, 4)
    assert Engine().snapshot().skbs == 0


def test_a_count_of_nothing_is_harmless_when_it_leaves_the_window() -> None:
    engine = folded([at(0, *NAMES, *PODS, closed_port(1))], Engine(2))
    for second in range(1, 9):
        engine.fold(at(second, Drops((1, 1), (0, 0), (0, 0), (0, 0))))
    assert engine.snapshot().skbs == 0


# Namespaces


def test_the_rows_of_namespaces_are_the_sums_of_their_pods_by_cause() -> None:
    """Two pods in each of three namespaces, two causes, every number another prime."""
    primes = iter((2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37))
    netns = iter(range(4026533000, 4026533010))
    owners: list[AnyFact] = []
    keys: list[DropKey] = []
    counted: list[tuple[int, int]] = []
    expected: dict[tuple[str, str], int] = {}
    for namespace in ("dev", "prod", "shop"):
        for name in ("one", "two"):
            inode = next(netns)
            owners += [pod(inode, namespace, f"{namespace}-{name}"), Address(inode, f"10.9.0.{inode % 100}")]
            for reason, location, cause in ((3, UDP_RCV, "closed-port"), (12, NFT, "networkpolicy-drop")):
                prime = next(primes)
                hook = "LOCAL_IN" if reason == 12 else ""
                key = DropKey(len(keys), reason, location, inode, hook=hook, family=2, protocol=17,
                              src="203.0.113.9", dst=f"10.9.0.{inode % 100}", dport=9)  # fmt: skip
                keys.append(key)
                counted.append((key.id, prime))
                expected[namespace, cause] = expected.get((namespace, cause), 0) + prime
    snapshot = folded([at(0, *NAMES, *owners), at(1, *keys, drops(*counted))]).snapshot()
    found = {(row.namespace, count.cause): count.packets for row in snapshot.namespaces for count in row.causes}
    assert found == expected
    assert sum(found.values()) == 197
    assert len(snapshot.owners) == 6
    assert {(finding.victims[0].namespace, finding.cause): finding.packets for finding in snapshot.findings} == expected
    assert all(len(finding.victims) == 2 for finding in snapshot.findings)


def test_owners_outside_kubernetes_are_one_namespace_row_and_findings_of_their_own() -> None:
    named = [NetnsOwner(CART, "netns", "lab-a"), NetnsOwner(SHOP, "netns", "lab-b")]
    facts = closed_port(1, CART), closed_port(2, SHOP), drops((1, 40), (2, 30))
    snapshot = folded([at(0, *NAMES, *named), at(1, *facts)]).snapshot()
    assert [(row.namespace, row.drops.packets) for row in snapshot.namespaces] == [(None, 70)]
    assert [finding.victims[0].label for finding in snapshot.findings] == ["lab-a", "lab-b"]


# The rest of a snapshot


def test_the_last_word_on_loss_cost_and_capabilities_stands() -> None:
    engine = folded([
        at(0, Lost(events=1), Cost(0.1), Capability("drops", "full"), Capability("symbols", "missing", why="hidden")),
        at(1, Lost(events=2, keys=3), Cost(0.2, 5), Capability("symbols", "full"), Clock(1234)),
    ])  # fmt: skip
    snapshot = engine.snapshot()
    assert (snapshot.lost, snapshot.cost, snapshot.boot_to_wall_ns) == (Lost(2, 3), Cost(0.2, 5), 1234)
    assert [(one.signal, one.status) for one in snapshot.capabilities] == [("drops", "full"), ("symbols", "full")]


def test_samples_are_kept_up_to_a_limit_newest_first_to_stay() -> None:
    engine = folded([at(1, *(Sample(1, t_ns, 60) for t_ns in range(1500)))])
    assert len(engine.samples) == 1000
    assert (engine.samples[0].t_ns, engine.samples[-1].t_ns) == (500, 1499)


def test_what_is_kept_narrows_rows_findings_and_sums_alike() -> None:
    other = msgspec.structs.replace(closed_port(2, OTHER), dst="10.244.2.7")
    facts = closed_port(1), other, drops((1, 40), (2, 30))
    engine = Engine(keep=lambda owner: owner.namespace == "dev")
    snapshot = folded([at(0, *NAMES, *PODS), at(1, *facts)], engine).snapshot()
    check_sums(snapshot, (30, 30, 3000))
    assert [row.namespace for row in snapshot.namespaces] == ["dev"]


# Connection tracking

SERVICE, OUTSIDE = "10.96.0.10", "203.0.113.9"


def clash(number: int, **more: object) -> DropKey:
    """A SYN of the cart to a service, with a source port that was taken when the node had translated it."""
    fields: dict[str, object] = {
        "hook": "POST_ROUTING", "conntrack": "NEW", "family": 2, "protocol": 6, "src": "10.244.1.5", "dst": SERVICE,
        "sport": 40000, "dport": 443, "verdict": "CLASH", "segment": "SYN", "nat": "BOTH", "iif": 7,
        "reply_src": "10.244.1.6", "reply_dst": "192.0.2.10", "reply_sport": 8443, "reply_dport": 40000, **more,
    }  # fmt: skip
    return DropKey(number, 12, SLOW, HOST, **fields)  # type: ignore[arg-type]


def refused(number: int, src: str = "10.244.1.5", iif: int = 7, **more: object) -> DropKey:
    """A SYN for which no entry was allocated."""
    fields: dict[str, object] = {
        "hook": "PRE_ROUTING", "family": 2, "protocol": 6, "src": src, "dst": OUTSIDE, "sport": 40000, "dport": 443,
        "verdict": "REFUSED", "segment": "SYN", "ifindex": iif, "iif": iif, **more,
    }  # fmt: skip
    return DropKey(number, 12, SLOW, HOST, **fields)  # type: ignore[arg-type]


def seen(*facts: AnyFact, engine: Engine | None = None) -> Snapshot:
    return folded([at(0, *NAMES, *PODS), at(10, *facts)], engine).snapshot()


def test_a_translated_packet_shows_how_it_was_sent_and_how_its_reply_would_travel() -> None:
    (row,) = seen(clash(1), drops((1, 4))).drops
    assert (row.owner.label, row.direction) == ("prod/cart", "forward")
    assert row.peer is not None
    assert row.peer.label == "prod/shop"
    assert (row.src, row.sport, row.dst, row.dport) == ("10.244.1.5", 40000, SERVICE, 443)
    assert row.reply == Tuple("10.244.1.6", "192.0.2.10", 8443, 40000)
    assert (row.service, row.nat, row.segment, row.verdict) == (f"{SERVICE}:443", "both", "syn", "clash")
    assert (row.cause, row.confidence) == ("ct-snat-port-clash", "likely")
    assert (row.conntrack, row.hook) == ("new", "POST_ROUTING")


@pytest.mark.parametrize(
    ("nat", "dst", "service"),
    [
        ("DST", SERVICE, f"{SERVICE}:443"),
        ("BOTH", "fd00::a", "[fd00::a]:443"),
        ("SRC", SERVICE, None),
        ("", SERVICE, None),
    ],
)
def test_only_an_address_that_leads_elsewhere_is_a_service(nat: str, dst: str, service: str | None) -> None:
    (row,) = seen(clash(1, nat=nat, dst=dst), drops((1, 4))).drops
    assert (row.service, row.nat) == (service, nat.lower() or None)


def test_a_packet_that_is_not_translated_has_no_reply_of_its_own() -> None:
    plain = {"nat": "", "reply_src": "", "reply_dst": "", "reply_sport": 0, "reply_dport": 0}
    (row,) = seen(clash(1, **plain, verdict="RULE", segment=""), drops((1, 4))).drops
    assert (row.reply, row.service, row.nat, row.segment, row.verdict) == (None, None, None, None, "rule")


@pytest.mark.parametrize(
    ("verdict", "probed", "cause", "confidence"),
    [
        ("CLASH", False, "ct-snat-port-clash", "likely"), ("CLASH", True, "ct-snat-port-clash", "proven"),
        ("CHAIN_TOO_LONG", True, "ct-chain-too-long", "proven"),
        ("INSERT_FAILED", False, "ct-snat-port-clash", "possible"), ("RULE", False, "networkpolicy-drop", "likely"),
    ],
)  # fmt: skip
def test_a_row_says_how_sure_its_cause_is(verdict: str, probed: bool, cause: str, confidence: str) -> None:
    (row,) = seen(clash(1, verdict=verdict, probed=probed), drops((1, 4))).drops
    assert (row.cause, row.confidence) == (cause, confidence)


def test_drops_that_were_told_in_different_ways_are_different_rows() -> None:
    differ: list[dict[str, object]] = [
        {}, {"verdict": "UNKNOWN"}, {"probed": True}, {"segment": "OTHER"}, {"nat": "SRC"}, {"reply_src": "10.244.2.7"},
        {"reply_dst": "192.0.2.11"}, {"reply_sport": 8444},
    ]  # fmt: skip
    keys = [clash(number, **more) for number, more in enumerate(differ)]
    rows = seen(*keys, drops(*((key.id, 1) for key in keys))).drops
    assert len(rows) == len(differ)


def test_ports_in_use_outside_are_one_row_and_the_reply_tells_the_port_where_it_is_one() -> None:
    same = [clash(number, sport=40000 + number, reply_dport=40000 + number) for number in range(3)]
    (row,) = seen(*same, drops((0, 1), (1, 1), (2, 1))).drops
    assert (row.flows, row.sport, row.cause) == (3, None, "ct-snat-port-clash")
    assert row.reply == Tuple("10.244.1.6", "192.0.2.10", 8443, 0)


def test_clashes_at_several_changed_ports_towards_one_socket_are_exhaustion() -> None:
    def causes_of(*keys: DropKey) -> list[str]:
        counted = [msgspec.structs.replace(key, id=number) for number, key in enumerate(keys)]
        return sorted(row.cause for row in seen(*counted, drops(*((key.id, 1) for key in counted))).drops)

    one, two = clash(1, reply_dport=1024), clash(2, sport=40001, reply_dport=1025)
    assert causes_of(one, two) == ["snat-port-exhaustion"]
    assert causes_of(one, msgspec.structs.replace(two, reply_dport=1024)) == ["ct-snat-port-clash"]
    # of another pod, towards the same socket
    shop = msgspec.structs.replace(two, src="10.244.2.7", iif=0)
    assert causes_of(one, shop) == ["snat-port-exhaustion"] * 2
    # one port each towards two sockets, from two addresses, in two namespaces, of two protocols
    for other in ({"reply_src": OUTSIDE}, {"reply_sport": 80}, {"reply_dst": "192.0.2.11"}, {"netns": OTHER},
                  {"protocol": 17}):  # fmt: skip
        assert causes_of(one, msgspec.structs.replace(two, **other)) == ["ct-snat-port-clash"] * 2
    # a port that was kept is no search that ended at a taken one
    assert causes_of(one, clash(2, sport=40001, reply_dport=40001)) == ["ct-snat-port-clash"] * 2
    rows = seen(one, two, drops((1, 1), (2, 1))).drops
    assert [row.confidence for row in rows] == ["likely"]


def test_what_only_the_statistics_can_tell_is_decided_anew_in_each_snapshot() -> None:
    unknown = refused(1, verdict="UNKNOWN")
    engine = Engine(10)
    folded([at(0, *NAMES, *PODS, unknown), at(1, ConntrackStats(HOST, 0, 9, drop=50))], engine)

    def causes_of() -> list[tuple[str, str]]:
        return [(row.cause, row.confidence) for row in engine.snapshot().drops]

    engine.fold(at(12, drops((1, 7))))  # the refusals have left the window
    assert causes_of() == [("networkpolicy-drop", "likely")]
    engine.fold(at(13, ConntrackStats(HOST, 0, 9, drop=57)))
    assert causes_of() == [("ct-table-full", "possible")]
    assert [finding.cause for finding in engine.snapshot().findings] == ["ct-table-full"]
    # those of another namespace do not count
    engine.zero()
    engine.fold(at(14, drops((1, 7)), ConntrackStats(CART, 0, 9, drop=57)))
    assert causes_of() == [("networkpolicy-drop", "likely")]


TABLE = ConntrackTable(
    HOST, 9 * S, 0, 111, (0, 0, 0, 0), ("10.244.2.7", "10.244.1.5", OUTSIDE, ""),
    ("10.244.1.6", "10.244.1.6", "192.0.2.10", ""), (6, 6, 6, 17), ("ESTABLISHED", "SYN_SENT", "ESTABLISHED", ""),
    (100, 8, 2, 1), (0, 8, 0, 1), (9, 9, 9, 9),
)  # fmt: skip
FULL = ConntrackStats(HOST, 0, 111, 111, drop=10, insert_failed=6, early_drop=3)


def conntrack_of(snapshot: Snapshot) -> dict[str, OwnerConntrack | None]:
    return {row.owner.label: row.conntrack for row in snapshot.owners}


def test_one_counted_failure_does_not_explain_a_hundred_drops() -> None:
    for packets, cause in ((12, "ct-snat-port-clash"), (13, "networkpolicy-drop")):
        (row,) = seen(FULL, clash(1, verdict="UNKNOWN"), drops((1, packets))).drops  # insert_failed rose by 6
        assert (row.cause, row.packets) == (cause, packets)


def test_an_answer_is_no_stale_translation_and_its_service_is_what_was_asked() -> None:
    answer = msgspec.structs.replace(
        clash(1, protocol=17, verdict="", hook="", conntrack="CONFIRMED", nat="DST", segment=""),
        reason=57, is_reply=True, reply_dst="10.96.0.10", reply_dport=53,
    )  # fmt: skip
    (row,) = seen(Reason(57, "NEIGH_FAILED"), answer, drops((1, 3))).drops
    assert (row.cause, row.service) == ("unexplained", "10.96.0.10:53")


def test_an_owners_failures_are_those_of_its_own_packets_and_its_entries_those_it_opened() -> None:
    snapshot = seen(
        FULL, TABLE, clash(1), clash(2, verdict="CHAIN_TOO_LONG"), clash(3, verdict="INSERT_FAILED"),
        clash(4, protocol=17, dport=53, segment=""), clash(5, verdict="UNKNOWN"), refused(6),
        clash(7, reply_dport=1024, sport=5), clash(8, reply_dport=1025, sport=6), refused(9, verdict="RULE"),
        clash(10, verdict="UNKNOWN", protocol=17, dport=53, segment=""),
        drops((1, 2), (2, 3), (3, 5), (4, 7), (5, 11), (6, 13), (7, 17), (8, 19), (9, 23), (10, 29)),
    )  # fmt: skip
    assert conntrack_of(snapshot) == {
        "prod/cart": OwnerConntrack(8, 2 + 3 + 5 + 7 + 11 + 17 + 19, 13, None, None, None),
        "dev/other": OwnerConntrack(100, 0, 0, None, None, None),
        # the target of all that opened nothing itself, and the node
        "prod/shop": OwnerConntrack(0, 0, 0, None, None, None),
        "node-1": OwnerConntrack(0, 0, 0, None, None, None),
    }
    assert [row.drops.packets for row in snapshot.owners] == [129, 0, 0, 0]


def test_what_a_rule_dropped_is_no_failure_of_conntrack_whatever_was_counted_meanwhile() -> None:
    behind_a_rule = msgspec.structs.replace(clash(1), location=NFT)
    snapshot = seen(ConntrackStats(HOST, 0, 9), behind_a_rule, drops((1, 5)))
    assert [row.cause for row in snapshot.drops] == ["networkpolicy-drop"]
    assert conntrack_of(snapshot) == {"prod/cart": OwnerConntrack(None, 0, 0, None, None, None)}


def test_without_statistics_nothing_is_said_of_an_owners_connections() -> None:
    assert conntrack_of(seen(clash(1), drops((1, 5)))) == {"prod/cart": None}
    assert conntrack_of(seen(clash(1), drops((1, 5)), ConntrackStats(HOST, 0, 9))) == {
        "prod/cart": OwnerConntrack(None, 5, 0, None, None, None)
    }


def test_repaired_races_are_their_owners_and_no_drops() -> None:
    race = clash(1, verdict="CLASH_RESOLVED", probed=True, protocol=17, dport=53)
    stats = ConntrackStats(HOST, 0, 9, clash_resolved=6)
    snapshot = folded(
        [at(0, *NAMES, *PODS), at(5, race, ClashesResolved((1,), (4,)), stats), at(6, ClashesResolved((1,), (2,)))]
    ).snapshot()
    assert (snapshot.drops, snapshot.total.packets) == ((), 0)
    (table,) = snapshot.conntrack
    assert [(row.owner.label, row.packets) for row in table.repairs] == [("prod/cart", 6)]
    (owner,) = snapshot.owners
    assert owner.conntrack is not None
    assert (owner.owner.label, owner.conntrack.clash_resolved) == ("prod/cart", 6)


def test_a_full_table_has_victims_and_culprits_on_one_finding() -> None:
    (finding,) = [one for one in seen(FULL, TABLE, refused(1), drops((1, 4))).findings if one.packets]
    assert finding.cause == "ct-table-full"
    assert [owner.label for owner in finding.victims] == ["prod/cart"]
    assert [owner.label for owner in finding.culprits] == ["dev/other"]


# Narrowing


def narrowed(namespace: str, *facts: AnyFact) -> Snapshot:
    engine = Engine(keep=lambda owner: owner.namespace == namespace, narrowed=f"namespace {namespace}")
    return seen(*facts, engine=engine)


PRESSED = ConntrackStats(HOST, 0, 111, 111, early_drop=50, clash_resolved=9)


def test_what_statistics_tell_of_the_nodes_table_is_not_a_narrowed_namespaces_business() -> None:
    assert {one.cause for one in seen(PRESSED, TABLE).findings} == {"ct-pressure-early-drop", "ct-insert-race-dns"}
    assert narrowed("prod", PRESSED, TABLE).findings == ()
    # unless somebody of it fills the table
    (finding,) = narrowed("dev", PRESSED, TABLE).findings
    assert finding.cause == "ct-pressure-early-drop"
    assert [owner.label for owner in finding.culprits] == ["dev/other"]


def test_what_statistics_tell_of_a_pods_own_table_is_that_of_its_namespace() -> None:
    own = msgspec.structs.replace(PRESSED, netns=CART)
    assert {one.cause for one in narrowed("prod", own).findings} == {"ct-pressure-early-drop", "ct-insert-race-dns"}
    assert narrowed("dev", own).findings == ()


def test_drops_are_kept_with_their_findings_for_either_end() -> None:
    for namespace in ("prod", "dev"):  # the shop's and the other's
        key = msgspec.structs.replace(closed_port(1, SHOP), src="10.244.2.7", dst="10.244.1.6")
        snapshot = narrowed(namespace, key, drops((1, 4)))
        assert [finding.victims[0].label for finding in snapshot.findings] == ["prod/shop"]
        check_sums(snapshot, (4, 4, 400))
    assert narrowed("shop", key, drops((1, 4))).drops == ()


def test_who_holds_entries_is_an_owner_only_where_it_is_wanted_but_the_table_stays_whole() -> None:
    everybody = seen(FULL, TABLE)
    assert set(conntrack_of(everybody)) == {"dev/other", "prod/cart", "prod/shop", "node-1"}
    prod = narrowed("prod", FULL, TABLE)
    assert set(conntrack_of(prod)) == {"prod/cart", "prod/shop"}
    assert prod.conntrack == everybody.conntrack
    assert prod.namespaces == ()
