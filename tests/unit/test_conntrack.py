# Connection tables: what is made of their statistics and readings (Tables), and how those are read on the node.

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from k8sdiag.conntrack import HOLDERS, Tables
from k8sdiag.facts import REMEMBERED_NS, Address, AnyFact, ConntrackStats, ConntrackTable, DropKey, NetnsOwner, Node
from k8sdiag.host.sensors import conntrack as sensor
from k8sdiag.host.sensors.conntrack import ConntrackStatistics, Limits, failures, read_limits
from k8sdiag.host.sensors.counters import Reading, Space, parse_conntrack
from k8sdiag.host.sensors.drops import ConntrackSeen
from k8sdiag.identity import Identity
from k8sdiag.snapshot import ConntrackRow, HolderRow, ProtocolRow, RepairRow

S = 10**9
HOST, CART, SHOP = 4026531840, 4026532100, 4026532200
CART_IP, SHOP_IP, GONE_IP, NODE_IP, OUTSIDE_IP = "10.244.1.5", "10.244.1.6", "10.244.1.7", "192.0.2.10", "203.0.113.9"
KNOWN: tuple[AnyFact, ...] = (
    Node("node-1", "6.18.0", HOST), Address(HOST, NODE_IP),
    NetnsOwner(CART, "pod", "cart", 0, "prod"), Address(CART, CART_IP),
    NetnsOwner(SHOP, "pod", "shop", 0, "prod"), Address(SHOP, SHOP_IP),
)  # fmt: skip


def tables(*more: AnyFact) -> Tables:
    identity = Identity()
    for fact in (*KNOWN, *more):
        identity.fold(fact)
    return Tables(identity)


def stats(count: int = 1, netns: int = HOST, **more: object) -> ConntrackStats:
    return ConntrackStats(netns, count=count, **more)  # type: ignore[arg-type]


def counted(of: Tables, *ticks: tuple[float, ConntrackStats], is_first: bool = False) -> Tables:
    for t_s, one in ticks:
        of.count(one, round(t_s * S), is_first=is_first)
    return of


def only_row(of: Tables, t_s: float = 10, seconds: float = 10) -> ConntrackRow:
    (row,) = of.rows(round(t_s * S), seconds)
    return row


# ----------------------------------------------------------------------------------------------------
# Counts of the window


def test_what_counts_is_what_was_added_since_the_window_began() -> None:
    of = tables()
    start = stats(100, max=1000, buckets=512, found=1, invalid=2, insert_failed=3, drop=5, early_drop=8,
                  clash_resolved=13, chain_too_long=21)  # fmt: skip
    end = stats(150, max=1000, buckets=512, found=35, invalid=57, insert_failed=92, drop=149, early_drop=241,
                clash_resolved=390, chain_too_long=631)  # fmt: skip
    row = only_row(counted(counted(of, (0, start), is_first=True), (10, end)))
    assert (row.netns, row.owner.label, row.inside) == (HOST, "node-1", "")
    assert (row.count, row.max, row.buckets, row.new) == (150, 1000, 512, None)
    assert (row.found, row.invalid, row.insert_failed, row.drop) == (34, 55, 89, 144)
    assert (row.early_drop, row.clash_resolved, row.chain_too_long) == (233, 377, 610)
    assert row.refused == 144  # chains that are too long raise insert_failed alone


def test_statistics_of_the_first_batch_are_what_was_counted_before_and_later_ones_are_not() -> None:
    seven = stats(5, invalid=7)
    assert only_row(counted(tables(), (0, seven), is_first=True)).invalid == 0
    assert only_row(counted(tables(), (0, seven))).invalid == 7
    of = counted(tables(), (0, seven), is_first=True)
    assert only_row(counted(of, (5, stats(5, invalid=9)))).invalid == 2
    # both in the first batch: a checkpoint, and the tick that was written right behind it
    of = counted(tables(), (0, seven), (0, stats(5, invalid=11)), is_first=True)
    assert only_row(of).invalid == 4


def test_a_kernel_that_does_not_count_something_says_so() -> None:
    row = only_row(counted(tables(), (0, stats(3)), (5, stats(4))))
    assert (row.clash_resolved, row.chain_too_long, row.max, row.buckets, row.full_in_s) == (None,) * 5
    row = only_row(counted(tables(), (0, stats(3, clash_resolved=0)), (5, stats(4, clash_resolved=2))))
    assert row.clash_resolved == 2


def test_a_window_lets_go_of_what_is_older() -> None:
    of = counted(tables(), (0, stats(1)))
    for second, invalid in enumerate((1, 3, 7, 15, 31), 1):
        counted(of, (second, stats(1, invalid=invalid)))
        of.expire((second - 2) * S)
        assert only_row(of, second, 2).invalid == (1, 3, 6, 12, 24)[second - 1]
    of.expire(100 * S)  # nothing was said for long: nothing changed
    assert only_row(of, 102, 2).invalid == 0


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=20), st.integers(1, 9))
def test_a_window_holds_exactly_what_was_counted_in_it(steps: list[tuple[int, int]], window_s: int) -> None:
    of = counted(tables(), (0, stats(1)), is_first=True)
    t_s = total = 0
    when: list[tuple[int, int]] = []
    for apart_s, more in steps:
        t_s += apart_s
        total += more
        when.append((t_s, more))
        if more:  # facts are told when something changed
            counted(of, (t_s, stats(1, drop=total)))
        of.expire((t_s - window_s) * S)
        assert only_row(of, t_s).drop == sum(number for at_s, number in when if at_s > t_s - window_s)


def test_without_a_window_everything_counts_and_what_lies_between_is_let_go() -> None:
    of = counted(tables(), (0, stats(1)), is_first=True)
    for second in range(1, 1000):
        counted(of, (second, stats(second, max=5000, drop=min(second, 400), invalid=second)))
        of.expire(None)
    row = only_row(of, 1000, 1000)
    assert (row.drop, row.invalid, row.growth_per_s) == (400, 999, (999 - 1) / 1000)
    assert (row.full_count, row.full_max) == (400, 5000)
    assert max(len(ticks) for ticks in of._ticks.values()) <= 3


def test_the_window_can_begin_anew() -> None:
    of = counted(tables(), (0, stats(1)), (1, stats(40, max=50, invalid=9, drop=9)))
    of.zero(2 * S)
    row = only_row(of, 2, 0)
    assert (row.count, row.invalid, row.drop, row.growth_per_s, row.full_count) == (40, 0, 0, 0.0, None)
    row = only_row(counted(of, (12, stats(60, invalid=11, drop=10))), 12)
    assert (row.invalid, row.drop, row.growth_per_s, row.full_count) == (2, 1, 2.0, 60)
    # a namespace that begins after that has counted nothing before
    counted(of, (13, stats(2, CART, invalid=3)))
    assert {row.netns: row.invalid for row in of.rows(13 * S, 11)} == {HOST: 2, CART: 3}


def test_tables_that_are_not_in_use_are_no_rows_unless_something_happened_there() -> None:
    of = counted(tables(), (0, stats(0)), (0, stats(0, CART)), (0, stats(0, SHOP)), is_first=True)
    assert of.rows(S, 1) == ()
    assert [row.netns for row in counted(of, (1, stats(0, CART, invalid=1))).rows(S, 1)] == [CART]
    for more in ({"drop": 1}, {"insert_failed": 1}, {"early_drop": 1}, {"clash_resolved": 1}, {"count": 1}):
        one = tables()
        counted(one, (0, stats(0)), is_first=True)
        assert len(counted(one, (1, stats(**{"count": 0, **more}))).rows(S, 1)) == 1


def test_the_fullest_table_comes_first() -> None:
    of = counted(tables(), (0, stats(5)), (0, stats(70, CART)), (0, stats(5, SHOP, drop=3)))
    assert [row.netns for row in of.rows(S, 1)] == [CART, SHOP, HOST]


def test_a_namespace_without_an_owner_has_its_inode_for_a_name() -> None:
    row = only_row(counted(tables(), (0, stats(5, 77))))
    assert (row.owner.kind, row.owner.name) == ("unknown", "netns:77")
    assert "77" in row.inside


# ----------------------------------------------------------------------------------------------------
# Growth


@pytest.mark.parametrize(
    ("first", "last", "limit", "growth", "full_in_s"),
    [
        (100, 150, 1000, 5.0, 170.0),
        (150, 100, 1000, -5.0, None),
        (100, 100, 1000, 0.0, None),
        (100, 150, None, 5.0, None),
        (100, 150, 150, 5.0, 0.0),
        (100, 150, 120, 5.0, 0.0),  # the limit was lowered below what is in use
    ],
)
def test_the_growth_of_the_window_tells_when_a_table_is_full(
    first: int, last: int, limit: int | None, growth: float, full_in_s: float | None
) -> None:
    row = only_row(counted(tables(), (0, stats(first, max=limit)), (10, stats(last, max=limit))))
    assert (row.growth_per_s, row.full_in_s) == (growth, full_in_s)


def test_a_window_of_no_time_has_no_growth() -> None:
    row = only_row(counted(tables(), (0, stats(5, max=9)), (0, stats(7, max=9))), 0, 0)
    assert (row.growth_per_s, row.full_in_s) == (0.0, None)


# ----------------------------------------------------------------------------------------------------
# When it was full


@pytest.mark.parametrize("window", [True, False])
def test_count_and_limit_are_those_of_the_last_refusal_although_the_limit_was_raised_since(window: bool) -> None:
    of = counted(tables(), (0, stats(10, max=262_144)), is_first=True)
    for second, one in enumerate((
        stats(28, max=30), stats(30, max=30, drop=4), stats(29, max=30, drop=9),
        stats(29, max=30, drop=12, insert_failed=3),  # clashes, no refusals
        stats(3, max=262_144, drop=12, insert_failed=3),
    ), 1):  # fmt: skip
        counted(of, (second, one))
        of.expire(-S if window else None)
    row = only_row(of, 6)
    assert (row.count, row.max, row.full_count, row.full_max) == (3, 262_144, 29, 30)
    assert row.refused == 9


def test_a_table_that_refused_nothing_was_not_full() -> None:
    clashes = counted(tables(), (0, stats(10, max=30)), (5, stats(30, max=30, drop=7, insert_failed=7)))
    assert (only_row(clashes).full_count, only_row(clashes).full_max) == (None, None)
    early = counted(tables(), (0, stats(10, max=30)), (5, stats(30, max=30, early_drop=7)))
    assert only_row(early).full_count is None


def test_a_refusal_that_left_the_window_is_forgotten() -> None:
    of = counted(tables(), (0, stats(9)), (1, stats(30, max=30, drop=5)), (2, stats(8, max=30, drop=5)))
    of.expire(0)
    assert only_row(of).full_count == 30
    of.expire(S)
    assert (only_row(of).full_count, only_row(of).drop) == (None, 0)


# ----------------------------------------------------------------------------------------------------
# Namespaces that end


def test_the_table_of_a_namespace_that_ended_is_known_as_long_as_its_owner() -> None:
    of = counted(tables(), (0, stats(1)), (1, stats(9, CART)), (2, stats(0, CART, invalid=4, until_t_ns=2 * S)))
    of.read(ConntrackTable(CART, S))
    of.expire(-S)
    assert {row.netns: (row.count, row.invalid) for row in of.rows(3 * S, 3)} == {HOST: (1, 0), CART: (0, 4)}
    of.expire(2 * S)
    assert [row.netns for row in of.rows(12 * S, 10)] == [HOST]  # nothing in this window
    of.expire(2 * S + REMEMBERED_NS)
    assert (CART, 0) in of._ticks
    of.expire(2 * S + REMEMBERED_NS + 1)
    assert set(of._ticks) == {(HOST, 0)}
    assert of._readings == {}


def test_two_holders_of_one_inode_have_a_table_each() -> None:
    of = tables(NetnsOwner(77, "pod", "old", 81, "prod"), NetnsOwner(77, "pod", "new", 82, "prod"))
    counted(of, (0, stats(3, 77, netns_cookie=81, invalid=1)), (1, stats(4, 77, netns_cookie=82, invalid=2)))
    assert {row.owner.name: (row.count, row.invalid) for row in of.rows(S, 1)} == {"old": (3, 1), "new": (4, 2)}


# ----------------------------------------------------------------------------------------------------
# Who holds it


def reading(*lines: tuple[int, str, str, int, str, int, int, int], t_ns: int = 9 * S) -> ConntrackTable:
    """(zone, source, target, protocol, state, entries, unreplied, timeout_s) each."""
    columns = [tuple(column) for column in zip(*lines, strict=True)] or [()] * 8
    return ConntrackTable(HOST, t_ns, 0, sum(line[5] for line in lines), *columns)


LINES = (
    (0, CART_IP, SHOP_IP, 6, "ESTABLISHED", 100, 0, 43_200_000),
    (0, CART_IP, OUTSIDE_IP, 17, "", 30, 20, 900),
    (7, SHOP_IP, OUTSIDE_IP, 6, "SYN_SENT", 11, 11, 550),
    (7, OUTSIDE_IP, NODE_IP, 6, "ESTABLISHED", 5, 0, 500),
    (0, NODE_IP, GONE_IP, 17, "", 3, 3, 90),
    (0, "127.0.0.1", "127.0.0.1", 6, "TIME_WAIT", 2, 0, 100),
    (0, "", "", 58, "", 1, 1, 30),
)
GONE = Address(SHOP, GONE_IP, 0, S, 2 * S)


def held(*lines: tuple[int, str, str, int, str, int, int, int], more: tuple[AnyFact, ...] = (GONE,)) -> ConntrackRow:
    of = counted(tables(*more), (0, stats(1)))
    of.read(reading(*lines))
    return only_row(of)


def test_entries_are_those_of_who_opened_them_and_of_who_answers() -> None:
    row = held(*LINES)
    found = {one.owner.label: (one.entries, one.as_target, one.unreplied) for one in row.holders}
    assert found == {
        "prod/cart": (130, 0, 20),
        "prod/shop": (11, 103, 11),  # it had the address that is gone
        "node-1": (5, 7, 3),  # 3 of its own and 2 over loopback
        OUTSIDE_IP: (5, 41, 0),
        "unknown:others": (1, 1, 1),
    }
    assert sum(one.entries for one in row.holders) == sum(one.as_target for one in row.holders) == row.entries == 152
    assert row.table_t_ns == 9 * S
    assert [one.entries for one in row.holders] == sorted((one.entries for one in row.holders), reverse=True)


def test_unanswered_and_stale_entries_are_counted() -> None:
    row = held(*LINES)
    assert (row.unreplied, row.stale) == (20 + 11 + 3 + 1, 3)
    assert held(*LINES, more=()).stale == 0
    taken = Address(CART, GONE_IP, 0, 5 * S)
    assert held(*LINES, more=(GONE, taken)).stale == 0


def test_zones_protocols_and_states_are_told_apart() -> None:
    row = held(*LINES, (0, CART_IP, SHOP_IP, 6, "ESTABLISHED", 0, 0, 0), (0, CART_IP, SHOP_IP, 250, "", 4, 0, 10))
    assert row.zones == {"0": 140, "7": 16}
    assert row.protocols == (
        ProtocolRow("tcp", "ESTABLISHED", 105, 0, (43_200_000 + 500) / 105),
        ProtocolRow("udp", None, 33, 23, 30.0),
        ProtocolRow("tcp", "SYN_SENT", 11, 11, 50.0),
        ProtocolRow("250", None, 4, 0, 2.5),
        ProtocolRow("tcp", "TIME_WAIT", 2, 0, 50.0),
        ProtocolRow("icmpv6", None, 1, 1, 30.0),
    )


def test_a_table_that_was_not_read_has_nothing_to_say_of_its_holders() -> None:
    row = only_row(counted(tables(), (0, stats(5))))
    assert (row.table_t_ns, row.entries, row.unreplied, row.stale) == (None,) * 4
    assert (row.zones, row.holders, row.protocols) == ({}, (), ())
    row = held()
    assert (row.table_t_ns, row.entries, row.unreplied, row.stale, row.holders) == (9 * S, 0, 0, 0, ())


def test_the_latest_reading_stands_and_it_is_that_of_the_namespace() -> None:
    of = counted(tables(), (0, stats(1)), (0, stats(2, CART)))
    of.read(reading(*LINES))
    of.read(reading((0, SHOP_IP, OUTSIDE_IP, 6, "ESTABLISHED", 9, 0, 9), t_ns=12 * S))
    of.read(replace(reading((0, CART_IP, OUTSIDE_IP, 6, "ESTABLISHED", 4, 0, 9)), netns=CART))
    by_netns = {row.netns: row for row in of.rows(12 * S, 12)}
    assert [one.owner.name for one in by_netns[HOST].holders] == ["shop", OUTSIDE_IP]
    assert by_netns[HOST].table_t_ns == 12 * S
    assert [(one.owner.name, one.entries) for one in by_netns[CART].holders] == [("cart", 4), (OUTSIDE_IP, 0)]


def test_the_largest_holders_are_named_and_the_sums_are_of_all() -> None:
    lines = [(0, f"203.0.113.{n}", SHOP_IP, 17, "", n, 1, n) for n in range(1, 201)]
    random.Random(3).shuffle(lines)
    row = held(*lines)
    strangers = [one.entries for one in row.holders if one.owner.kind == "external"]
    assert strangers == list(range(200, 200 - HOLDERS, -1))
    # whoever lives here is among them, whatever others hold
    assert [one.as_target for one in row.holders if one.owner.name == "shop"] == [20_100]
    assert (row.entries, row.unreplied, row.zones) == (20_100, 200, {"0": 20_100})


def test_an_owner_of_several_addresses_is_one_holder() -> None:
    more = (Address(CART, "fd00::5"), Address(CART, "10.9.9.9"))
    row = held(*((0, source, OUTSIDE_IP, 17, "", 10, 1, 0) for source in (CART_IP, "fd00::5", "10.9.9.9")), more=more)
    (cart,) = (one for one in row.holders if one.owner.name == "cart")
    assert cart == HolderRow(cart.owner, 30, 0, 3)


# ----------------------------------------------------------------------------------------------------
# Clashes that were resolved, where a probe sees them


def query(netns: int = HOST) -> DropKey:
    return DropKey(1, 0, 0, netns, family=2, protocol=17, src=CART_IP, dst=SHOP_IP, hook="POST_ROUTING")


def test_repairs_are_their_owners_and_leave_with_the_window() -> None:
    of = counted(tables(), (0, stats(1)))
    for t_s, key, packets in ((1, query(), 3), (2, query(SHOP), 5), (2, query(), 4)):
        of.repair(key, packets, t_s * S)
    counted(of, (2, stats(1, SHOP)))
    rows = {row.netns: row for row in of.rows(3 * S, 3)}
    (cart,) = rows[HOST].repairs
    assert (cart.owner.label, cart.packets) == ("prod/cart", 7)
    assert [(one.owner.label, one.packets) for one in rows[SHOP].repairs] == [("prod/shop", 5)]
    of.expire(S)
    assert [row.repairs for row in of.rows(3 * S, 3) if row.netns == HOST] == [(RepairRow(cart.owner, 4),)]
    of.zero(3 * S)
    assert all(row.repairs == () for row in of.rows(3 * S, 3))


# ----------------------------------------------------------------------------------------------------
# The kernel's file

STATISTICS = (
    "entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop icmp_error  "
    "expect_new expect_create expect_delete search_restart\n"
    "0000001f  0000000a 00000016 00000000 ffffffff 00000000 00000000 00000003 00000000 0000000c 0000000d 00000001 "
    "00000000  00000000 00000000 00000000 00000000\n"
    "0000001f  00000000 00000001 00000000 00000002 00000000 00000000 00000000 00000000 00000000 00000000 00000000 "
    "00000000  00000000 00000000 00000000 00000007\n"
)


def test_the_columns_are_hexadecimal_and_named_by_the_header() -> None:
    one, two = parse_conntrack(STATISTICS)
    assert (one["entries"], one["clashres"], one["found"], one["invalid"]) == (31, 10, 22, 0xFFFFFFFF)
    assert (one["chainlength"], one["insert_failed"], one["drop"], one["early_drop"]) == (3, 12, 13, 1)
    assert (two["entries"], two["found"], two["invalid"], two["search_restart"]) == (31, 1, 2, 7)
    assert len(one) == len(two) == 17
    old = parse_conntrack("entries searched found\n00000002 00000001 00000003\n")
    assert old == ({"entries": 2, "searched": 1, "found": 3},)
    assert parse_conntrack("entries found\n") == ()


def test_the_running_kernels_columns_have_the_names_that_are_looked_for() -> None:
    path = Path("/proc/net/stat/nf_conntrack")
    if not path.exists():
        pytest.skip("no conntrack here")
    for row in parse_conntrack(path.read_text()):
        assert {"entries", "chainlength", *sensor._COLUMNS.values()} <= row.keys()


# ----------------------------------------------------------------------------------------------------
# From readings to facts

ROW = dict.fromkeys(
    ("found", "invalid", "insert_failed", "drop", "early_drop", "clashres", "chainlength", "new", "insert"), 0
)


def cpus(entries: int, *rows: dict[str, int]) -> Reading:
    """A namespace's statistics; what a row does not name is 0."""
    return Reading({}, tuple({**ROW, "entries": entries, **row} for row in rows))


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[Limits]:
    """What the next reading finds in /proc/sys: its last entry."""
    found = [Limits(1000, 512)]
    monkeypatch.setattr(sensor, "read_limits", lambda: found[-1])
    return found


def facts(of: ConntrackStatistics, **spaces: Reading) -> dict[int, ConntrackStats]:
    named = {"host": HOST, "cart": CART, "shop": SHOP}
    found = list(of.facts({(named[name], 5): one for name, one in spaces.items()}))
    assert len({fact.netns for fact in found}) == len(found)
    assert all(fact.netns_cookie == 5 for fact in found)
    return {fact.netns: fact for fact in found}


@pytest.mark.usefixtures("limits")
def test_what_was_counted_before_the_watch_does_not_count() -> None:
    of = ConntrackStatistics(has_chains=True)
    before = {"found": 9, "invalid": 8, "insert_failed": 7, "drop": 6, "early_drop": 5, "clashres": 4, "chainlength": 3}
    assert facts(of, host=cpus(31, before, before)) == {
        HOST: ConntrackStats(HOST, 5, 31, 1000, 512, clash_resolved=0, chain_too_long=0)
    }
    after = {name: number + at for at, (name, number) in enumerate(before.items(), 1)}
    assert facts(of, host=cpus(33, after, before))[HOST] == ConntrackStats(
        HOST, 5, 33, 1000, 512, found=1, invalid=2, insert_failed=3, drop=4, early_drop=5, clash_resolved=6,
        chain_too_long=7,
    )  # fmt: skip
    again = {name: number + 10 for name, number in before.items()}
    assert facts(of, host=cpus(33, after, again))[HOST].chain_too_long == 17


@pytest.mark.usefixtures("limits")
@given(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_counters_wrap_at_32_bits_on_each_cpu(steps: list[tuple[int, int, int]], start: int) -> None:
    of = ConntrackStatistics(has_chains=True)
    values = [start] * 3
    facts(of, host=cpus(1, *({"drop": value} for value in values)))
    total = 0
    for step in steps:
        values = [(value + more) % 2**32 for value, more in zip(values, step, strict=True)]
        total += sum(step)
        found = facts(of, host=cpus(1, *({"drop": value} for value in values)))
        assert (found[HOST].drop if sum(step) else total) == total


@pytest.mark.usefixtures("limits")
def test_another_namespace_with_the_same_inode_begins_at_zero() -> None:
    of = ConntrackStatistics(has_chains=True)
    facts(of, host=cpus(1, {"drop": 100}, {"drop": 7}))
    assert facts(of, host=cpus(1, {"drop": 103}, {"drop": 7}))[HOST].drop == 3
    assert facts(of, host=cpus(1, {"drop": 2}, {"drop": 0}))[HOST].drop == 5


@pytest.mark.usefixtures("limits")
def test_a_namespace_that_comes_later_had_counted_nothing_before() -> None:
    of = ConntrackStatistics(has_chains=True)
    facts(of, host=cpus(1, {"invalid": 5}))
    assert facts(of, cart=cpus(2, {"invalid": 3}, {"invalid": 4}))[CART].invalid == 7
    assert facts(of, cart=cpus(2, {"invalid": 3}, {"invalid": 9}))[CART].invalid == 12


@pytest.mark.usefixtures("limits")
def test_a_cpu_that_is_added_counts_from_zero() -> None:
    of = ConntrackStatistics(has_chains=True)
    facts(of, host=cpus(1, {"invalid": 5}))
    assert facts(of, host=cpus(1, {"invalid": 6}, {"invalid": 2}))[HOST].invalid == 3


def test_a_namespace_is_told_of_when_something_changed(limits: list[Limits]) -> None:
    of = ConntrackStatistics(has_chains=True)
    assert facts(of, host=cpus(0, {}), cart=cpus(0, {"invalid": 9}), shop=Reading({}, ())) == {}
    assert facts(of, host=cpus(0, {"new": 5, "insert": 7, "expect_new": 3})) == {}  # columns that are not looked at
    assert set(facts(of, host=cpus(3, {}), cart=cpus(0, {"invalid": 9}))) == {HOST}
    assert facts(of, host=cpus(3, {})) == {}
    assert facts(of, host=cpus(0, {}))[HOST].count == 0
    assert facts(of, host=cpus(0, {})) == {}
    assert facts(of, host=cpus(0, {"drop": 1}))[HOST].drop == 1
    limits.append(Limits(2000, 512))
    assert facts(of, host=cpus(0, {"drop": 1}))[HOST].max == 2000
    assert of.counts == {(HOST, 5): 0}


@pytest.mark.usefixtures("limits")
def test_long_chains_are_counted_only_where_the_kernel_does() -> None:
    # before 5.15 the column of that name is another's
    for has_chains, expected in ((True, 4), (False, None)):
        of = ConntrackStatistics(has_chains)
        facts(of, host=cpus(1, {"chainlength": 3}))
        assert facts(of, host=cpus(2, {"chainlength": 7}))[HOST].chain_too_long == expected


@pytest.mark.usefixtures("limits")
def test_a_namespace_that_ended_is_told_of_once_and_its_inode_begins_anew() -> None:
    of = ConntrackStatistics(has_chains=True)
    facts(of, host=cpus(4, {}), cart=cpus(7, {"drop": 3}), shop=cpus(0, {}))
    facts(of, cart=cpus(9, {"drop": 5}))
    assert list(of.ended([HOST, CART, SHOP], 90)) == []
    assert [(one.netns, one.count, one.drop, one.until_t_ns) for one in of.ended([HOST], 99)] == [(CART, 0, 2, 99)]
    assert list(of.ended([HOST], 100)) == []
    assert of.counts == {(HOST, 5): 4}
    assert facts(of, cart=cpus(1, {"drop": 6}))[CART].drop == 6


@pytest.mark.usefixtures("limits")
def test_a_namespace_whose_inode_was_given_out_again_has_ended() -> None:
    of = ConntrackStatistics(has_chains=True)
    list(of.facts({(HOST, 1): cpus(4, {}), (CART, 81): cpus(7, {})}))
    list(of.facts({(HOST, 1): cpus(5, {}), (CART, 82): cpus(2, {})}))
    ended = [(one.netns, one.netns_cookie, one.count, one.until_t_ns) for one in of.ended([HOST, CART], 99)]
    assert ended == [(CART, 81, 0, 99)]
    assert of.counts == {(HOST, 1): 5, (CART, 82): 2}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"nf_conntrack_max": "262144\n", "nf_conntrack_buckets": "65536\n"}, Limits(262_144, 65_536)),
        ({"nf_conntrack_max": "0\n", "nf_conntrack_buckets": "65536\n"}, Limits(None, 65_536)),
        ({"nf_conntrack_max": "what\n"}, Limits(None, None)),
        ({}, Limits(None, None)),
    ],
)
def test_no_limit_is_none(tmp_path: Path, files: dict[str, str], expected: Limits) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_limits(tmp_path) == expected


def test_failures_are_those_of_each_cpu_where_any_had_one() -> None:
    quiet: Space = (SHOP, 5)
    found = failures({
        (HOST, 5): cpus(1, {"insert_failed": 1, "drop": 2, "chainlength": 3}, {}),
        (CART, 5): cpus(1, {}, {"drop": 0xFFFFFFFF}),
        quiet: cpus(1, {"invalid": 9, "early_drop": 9, "found": 9, "clashres": 9}, {}),
        (77, 5): Reading({}, ()),
        (78, 5): Reading({}, ({"entries": 1, "insert_failed": 4, "drop": 5},)),  # a kernel without chainlength
    })  # fmt: skip
    assert found == {
        (HOST, 5): [ConntrackSeen(1, 2, 3), ConntrackSeen(0, 0, 0)],
        (CART, 5): [ConntrackSeen(0, 0, 0), ConntrackSeen(0, 0xFFFFFFFF, 0)],
        (78, 5): [ConntrackSeen(4, 5, 0)],
    }
