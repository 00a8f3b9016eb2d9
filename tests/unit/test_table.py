# Messages as ctnetlink writes them, packed by hand; and what becomes of more lines than are kept.

from __future__ import annotations

import errno
import socket
import struct
import tracemalloc
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8sdiag.host.sensors import table
from k8sdiag.host.sensors.table import Line, Sum, Tally

TCP, UDP, ICMP, GRE, ICMPV6, SCTP = 6, 17, 1, 47, 58, 132
A, B, C = "10.1.0.2", "10.1.0.3", "10.2.0.9"
SEEN_REPLY = 0x2


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(0x8000 | kind, b"".join(parts))


def direction(kind: int, src: str, dst: str, protocol: int, rest: tuple[bytes, ...] = (), zone: int = 0) -> bytes:
    first = 1 if ip_address(src).version == 4 else 3
    addresses = nested(1, attribute(first, ip_address(src).packed), attribute(first + 1, ip_address(dst).packed))
    of_zone = [attribute(3, struct.pack("!H", zone))] if zone else []
    return nested(kind, addresses, nested(2, attribute(1, bytes([protocol])), *rest), *of_zone)


def ports(sport: int, dport: int) -> tuple[bytes, ...]:
    return attribute(2, struct.pack("!H", sport)), attribute(3, struct.pack("!H", dport))


def message(body: bytes, kind: int = 0x100, flags: int = 0x2) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 4242) + body


def parts(
    src: str, dst: str, protocol: int, *, status: int = SEEN_REPLY, left_s: int = 30, state: int = -1, sport: int = 1
) -> list[bytes]:
    """The attributes of an entry in the kernel's order."""
    found = [
        direction(1, src, dst, protocol, ports(sport, 443)),
        direction(2, dst, src, protocol, ports(443, sport)),
        attribute(3, struct.pack("!I", status)),
        attribute(7, struct.pack("!I", left_s)),
    ]
    if state >= 0:
        found.append(nested(4, nested(1, attribute(1, bytes([state])), attribute(2, b"\x07"), attribute(3, b"\x07"))))
    return [*found, attribute(12, struct.pack("!I", 0xDEADBEEF)), attribute(11, struct.pack("!I", 1))]


def entry(*attributes: bytes) -> bytes:
    return message(bytes((socket.AF_INET, 0, 0, 0)) + b"".join(attributes))


def line(src: str, dst: str, protocol: int, state: int = -1, zone: int = 0) -> Line:
    packed = [ip_address(address).packed if address else b"" for address in (src, dst)]
    return Line(zone, packed[0], packed[1], protocol, state)


def tally(*answers: bytes) -> dict[Line, tuple[int, int, int]]:
    """(entries, unreplied, timeout_s) by line."""
    whole = Tally()
    for answer in answers:
        whole.add(answer)
    return {one: (total.entries, total.unreplied, total.timeout_s) for one, total in whole.lines().items()}


def test_entries_of_one_kind_are_added_up_whatever_their_ports_and_ids() -> None:
    answer = b"".join(
        entry(*parts(A, C, TCP, state=3, left_s=100 + n, sport=1000 + n), attribute(8, struct.pack("!I", n)))
        for n in range(50)
    )
    assert tally(answer) == {line(A, C, TCP, 3): (50, 0, sum(range(100, 150)))}


def test_source_target_protocol_state_and_reply_tell_lines_apart() -> None:
    answer = b"".join(
        [
            entry(*parts(A, C, TCP, state=3)),
            entry(*parts(A, C, TCP, state=7, left_s=120)),
            entry(*parts(B, C, TCP, state=3)),
            entry(*parts(C, A, TCP, state=3)),
            entry(*parts(A, C, UDP, status=0, left_s=10)),
            entry(*parts(A, C, UDP, status=SEEN_REPLY | 0x4, left_s=20)),
            entry(*parts("fd00::1", "fd00::2", TCP, state=1, status=8)),
        ]
    )
    assert tally(answer) == {
        line(A, C, TCP, 3): (1, 0, 30),
        line(A, C, TCP, 7): (1, 0, 120),
        line(B, C, TCP, 3): (1, 0, 30),
        line(C, A, TCP, 3): (1, 0, 30),
        line(A, C, UDP): (2, 1, 30),
        line("fd00::1", "fd00::2", TCP, 1): (1, 1, 30),
    }


def test_the_target_is_who_answers_and_not_who_was_called() -> None:
    translated = entry(
        direction(1, A, "10.96.0.10", UDP, ports(5, 53)),
        direction(2, C, "192.0.2.1", UDP, ports(53, 40000)),
        *parts(A, C, UDP)[2:],
    )
    assert list(tally(translated)) == [line(A, C, UDP)]


def test_icmp_gre_and_sctp_have_no_ports_or_state_of_tcp() -> None:
    echo = attribute(4, b"\x12\x34"), attribute(5, b"\x08"), attribute(6, b"\x00")
    sctp_state = nested(4, nested(3, attribute(1, b"\x03"), attribute(2, bytes(4)), attribute(3, bytes(4))))
    answer = b"".join(
        [
            entry(direction(1, A, C, ICMP, echo), direction(2, C, A, ICMP, echo), *parts(A, C, ICMP)[2:]),
            entry(direction(1, A, C, GRE), direction(2, C, A, GRE), *parts(A, C, GRE)[2:]),
            entry(*parts(A, C, SCTP), sctp_state),
            entry(*parts("fd00::1", "fd00::2", ICMPV6)),
        ]
    )
    assert {one: n for one, (n, *_) in tally(answer).items()} == {
        line(A, C, ICMP): 1, line(A, C, GRE): 1, line(A, C, SCTP): 1, line("fd00::1", "fd00::2", ICMPV6): 1,
    }  # fmt: skip


def test_the_zone_is_that_of_both_directions_or_of_the_original_one() -> None:
    usual = parts(A, C, UDP)
    both = entry(*usual[:2], attribute(18, struct.pack("!H", 4711)), *usual[2:])
    original = entry(direction(1, A, C, UDP, ports(1, 443), zone=815), *usual[1:])
    reply = entry(usual[0], direction(2, C, A, UDP, ports(443, 1), zone=99), *usual[2:])
    assert {one.zone: n for one, (n, *_) in tally(both + original + reply + entry(*usual)).items()} == {
        4711: 1, 815: 1, 0: 2,
    }  # fmt: skip


def test_a_connection_in_a_flow_table_has_neither_time_nor_state() -> None:
    offloaded = [part for part in parts(A, C, TCP) if part[2:4] != struct.pack("=H", 7)]
    assert tally(entry(*offloaded)) == {line(A, C, TCP): (1, 0, 0)}


EXTRAS = [
    attribute(8, struct.pack("!I", 77)),  # mark
    nested(9, attribute(1, bytes(8)), attribute(2, bytes(8))),  # counters
    nested(5, attribute(1, b"ftp\0")),  # helper
    nested(15, attribute(1, bytes(4)), attribute(2, bytes(4)), attribute(3, bytes(4))),  # sequence adjustment
    nested(19, attribute(1, b"system_u:object_r:unlabeled_t:s0\0")),  # security context
    nested(20, attribute(1, bytes(8)), attribute(2, bytes(8))),  # timestamps
    attribute(22, bytes(16)),  # labels
    nested(14, nested(1, attribute(1, bytes([192, 0, 2, 99])), attribute(2, bytes([192, 0, 2, 98])))),  # master
]


@given(st.lists(st.tuples(st.permutations(EXTRAS), st.integers(0, len(EXTRAS)), st.randoms()), min_size=1, max_size=30))
def test_what_else_an_entry_carries_and_in_which_order_changes_nothing(
    cases: list[tuple[list[bytes], int, object]],
) -> None:
    whole = Tally()
    for number, (extras, taken, random) in enumerate(cases):
        attributes = parts(A, C, TCP, state=3 + number % 2, left_s=5, status=SEEN_REPLY * (number % 2)) + extras[:taken]
        random.shuffle(attributes)  # type: ignore[attr-defined]
        whole.add(entry(*attributes))
    odd = len(cases) // 2
    even = len(cases) - odd
    found = {one.state: (s.entries, s.unreplied, s.timeout_s) for one, s in whole.lines().items()}
    assert found == {3: (even, even, 5 * even)} | ({4: (odd, 0, 5 * odd)} if odd else {})
    assert {(one.source, one.target) for one in whole.lines()} == {(ip_address(A).packed, ip_address(C).packed)}


def test_two_layouts_of_one_length_are_not_taken_for_each_other() -> None:
    usual = parts(A, C, UDP, left_s=7)
    turned = [*usual[:2], usual[3], usual[2], *usual[4:]]  # timeout before status
    assert len(entry(*usual)) == len(entry(*turned))
    answer = (entry(*usual) + entry(*turned)) * 10
    assert tally(answer) == {line(A, C, UDP): (20, 0, 140)}


def test_a_dump_ends_with_done_and_an_error_is_raised() -> None:
    whole = Tally()
    whole.add(entry(*parts(A, C, UDP)))
    before = whole.done
    whole.add(entry(*parts(A, C, UDP)) + message(bytes(4), kind=3))
    assert (before, whole.done) == (False, True)
    with pytest.raises(OSError) as refused:
        Tally().add(message(struct.pack("=i", -errno.EPERM) + bytes(20), kind=2))
    assert refused.value.errno == errno.EPERM
    with pytest.raises(OSError) as broken_off:
        Tally().add(message(struct.pack("=i", -errno.ENOMEM), kind=3))
    assert broken_off.value.errno == errno.ENOMEM


def test_the_end_is_not_taken_for_an_entry_of_its_length() -> None:
    whole = Tally()
    whole.add(entry() + message(bytes(4), kind=3))
    assert whole.done
    assert [(one, total.entries) for one, total in whole.lines().items()] == [(line("", "", 0), 1)]


def test_messages_begin_at_multiples_of_four_bytes() -> None:
    odd = entry(*parts(A, C, UDP))[:-2]
    odd = struct.pack("=I", len(odd)) + odd[4:] + bytes(2)
    assert tally(odd + entry(*parts(B, C, UDP))) == {line(A, C, UDP): (1, 0, 30), line(B, C, UDP): (1, 0, 30)}


@pytest.mark.parametrize("data", [entry(*parts(A, C, UDP))[:-4], bytes(32)])
def test_what_is_no_message_is_an_error(data: bytes) -> None:
    with pytest.raises(OSError) as failure:
        Tally().add(data)
    assert failure.value.errno == errno.EBADMSG


@pytest.mark.parametrize("cut", range(20, len(entry(*parts(A, C, TCP, state=3)))))
def test_a_message_that_ends_within_an_attribute_is_still_one_entry(cut: int) -> None:
    whole = entry(*parts(A, C, TCP, state=3))
    short = struct.pack("=I", cut) + whole[4:cut]
    assert sum(entries for entries, *_ in tally(short, short).values()) == 2


# ----------------------------------------------------------------------------------------------------
# More than is kept


def address(number: int) -> str:
    return str(ip_address(0x0B000000 + number))


def test_of_many_targets_of_one_source_the_largest_are_kept_and_the_source_of_the_others() -> None:
    answers = [entry(*parts(A, address(n), UDP, status=0, left_s=2)) for n in range(table.LINES + 3000)]
    answers += [entry(*parts(B, C, UDP, left_s=1))] * 5
    found = tally(*answers)
    assert found[line(B, C, UDP)] == (5, 0, 5)
    assert found[line(A, "", UDP)] == (3001, 3001, 6002)
    assert len(found) == table.LINES + 1
    assert [sum(column) for column in zip(*found.values(), strict=True)] == [
        len(answers), table.LINES + 3000, 2 * (table.LINES + 3000) + 5,
    ]  # fmt: skip


def test_a_flood_is_folded_by_its_target_and_beyond_the_bound_too() -> None:
    flood = [entry(*parts(address(n), C, TCP, state=1, status=0)) for n in range(table.KEYS + 5000)]
    found = tally(*flood)
    assert found[line("", C, TCP, 1)][0] == len(flood) - (table.LINES - 1)  # itself one of the largest
    assert sum(n for n, *_ in found.values()) == len(flood)


def test_beyond_the_bound_a_scanner_keeps_its_name_and_what_was_known_goes_on_being_counted() -> None:
    known = entry(*parts(B, C, TCP, state=3))
    first = [entry(*parts(A, address(n), TCP, state=1, status=0)) for n in range(table.KEYS - 1)]
    later = [entry(*parts(A, address(n), TCP, state=1, status=0)) for n in range(table.KEYS, table.KEYS + 4000)]
    found = tally(known, *first, *later, known * 7)
    assert found[line(B, C, TCP, 3)] == (8, 0, 240)
    assert sum(n for one, (n, *_) in found.items() if one.source == ip_address(A).packed) == len(first) + len(later)


def test_beyond_the_bound_neither_address_of_a_newcomer_is_kept_but_zone_protocol_and_state_are() -> None:
    first = [entry(*parts(A, address(n), UDP, status=0)) for n in range(table.KEYS)]
    zoned = parts(B, "0.0.0.0", TCP, state=7, left_s=9)
    zoned.insert(2, attribute(18, struct.pack("!H", 5)))
    found = tally(*first, entry(*zoned) * 3, entry(*parts("fd00::1", "fd00::2", UDP, left_s=4)))
    assert found[line("", "", TCP, 7, zone=5)] == (3, 0, 27)
    assert found[line("", "", UDP)] == (1, 0, 4)


def test_an_address_of_zeros_is_an_address() -> None:
    assert list(tally(entry(*parts("0.0.0.0", "255.255.255.255", UDP)))) == [line("0.0.0.0", "255.255.255.255", UDP)]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from([TCP, UDP])), max_size=400))
def test_folding_loses_nothing(entries: list[tuple[int, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as small:
        small.setattr(table, "LINES", 10)
        small.setattr(table, "SIDES", 5)
        small.setattr(table, "KEYS", 60)
        found = tally(*(entry(*parts(address(s), address(99 + t), p, left_s=s)) for s, t, p in entries))
    for protocol in (TCP, UDP):
        mine = [s for s, _, p in entries if p == protocol]
        assert sum(n for one, (n, *_) in found.items() if one.protocol == protocol) == len(mine)
        assert sum(left for one, (_, _, left) in found.items() if one.protocol == protocol) == sum(mine)
    assert len(found) <= 10 + 5 + 2
    by_source: dict[bytes, int] = {}
    for s, *_ in entries:
        packed = ip_address(address(s)).packed
        by_source[packed] = by_source.get(packed, 0) + 1
    for one, (n, *_) in found.items():
        assert not one.source or n <= by_source[one.source]


def test_memory_stays_bounded_with_as_many_sources_as_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KEYS", 4000)
    whole = Tally()
    tracemalloc.start()
    try:
        for n in range(12_000):
            whole.add(entry(*parts(address(n), C, TCP, state=1)))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(whole._cells) == 4001
    assert peak_bytes < 4 << 20


def test_lines_folded_while_reading_are_kept_apart_when_the_rest_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LINES", 2)
    lines: dict[Line, Sum] = {}
    for src, dst, entries in ((A, B, 10), (B, A, 9), (A, "", 3), ("", C, 2), (B, "", 1), (B, C, 1)):
        lines[line(src, dst, UDP)] = total = Sum()
        total.entries = entries
    found = {one: total.entries for one, total in table._largest(lines).items()}
    assert found == {
        line(A, B, UDP): 10, line(B, A, UDP): 9, line(A, "", UDP): 3, line("", C, UDP): 3, line(B, "", UDP): 1,
    }  # fmt: skip


def test_the_fact_has_columns_of_one_length_largest_first_and_names_states_as_conntrack_does() -> None:
    lines: dict[Line, Sum] = {}
    for number, (src, dst, state) in enumerate([(A, C, 3), ("fd00::1", "fd00::2", 9), ("", C, -1), (A, B, 200)], 1):
        total = lines[line(src, dst, TCP, state)] = Sum()
        total.entries, total.unreplied, total.timeout_s = number, number - 1, 10 * number
    fact = table._fact(lines, 4026, 7, 99)
    assert (fact.netns, fact.netns_cookie, fact.t_ns, fact.entries_total) == (4026, 7, 99, 10)
    assert fact.source == (A, "", "fd00::1", A)
    assert fact.target == (B, C, "fd00::2", C)
    assert fact.state == ("200", "", "SYN_SENT2", "ESTABLISHED")
    assert (fact.entries, fact.unreplied, fact.timeout_s) == ((4, 3, 2, 1), (3, 2, 1, 0), (40, 30, 20, 10))
    assert fact.zone == (0, 0, 0, 0)
    assert fact.protocol == (TCP,) * 4
