# Lines as the kernel adds them up, packed by hand.

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8sdiag.host.sensors import walk
from k8sdiag.host.sensors.table import Line
from k8sdiag.host.sensors.walk import _ask, _Totals

TCP, UDP, SCTP = 6, 17, 132
A, B, C = "10.1.0.2", "10.1.0.3", "10.2.0.9"
NO_STATE = 255


def key(source: str, target: str, protocol: int, state: int = NO_STATE, zone: int = 0) -> bytes:
    """struct line_key of probes/walk.c; an empty address is one that the line is not about."""
    packed = [ip_address(address).packed.ljust(16, b"\0") if address else bytes(16) for address in (source, target)]
    families = [10 if ":" in address else 2 for address in (source, target) if address]
    has = bool(source) | bool(target) << 1
    return struct.pack("<16s16sHBBBBH", *packed, zone, protocol, state, max(families, default=0), has, 0)


def sums(entries: int, unreplied: int = 0, timeout_s: int = 0) -> bytes:
    return struct.pack("<QIIII", timeout_s, entries, unreplied, 0, 0)


def line(source: str, target: str, protocol: int, state: int = -1, zone: int = 0) -> Line:
    packed = [ip_address(address).packed if address else b"" for address in (source, target)]
    return Line(zone, packed[0], packed[1], protocol, state)


def by_line(*chunks: tuple[bytes, bytes]) -> dict[Line, tuple[int, int, int]]:
    """(entries, unreplied, timeout_s) by line."""
    totals = _Totals()
    for keys, values in chunks:
        totals.add(keys, values)
    return {one: (total.entries, total.unreplied, total.timeout_s) for one, total in totals.by_line().items()}


def test_lines_of_several_drains_are_added_up() -> None:
    first = key(A, C, TCP, 3) + key(B, C, UDP), sums(5, 1, 600) + sums(2, 2, 40)
    second = key(A, C, TCP, 3) + key(A, C, TCP, 7), sums(3, 0, 300) + sums(1, 0, 90)
    assert by_line(first, second) == {
        line(A, C, TCP, 3): (8, 1, 900),
        line(A, C, TCP, 7): (1, 0, 90),
        line(B, C, UDP): (2, 2, 40),
    }


def test_addresses_have_the_length_of_their_family_and_are_left_out_where_the_line_is_not_about_them() -> None:
    keys = [
        key("fd00::1", "fd00::2", UDP, zone=4711),
        key("a01:2::", "fd00::2", UDP),  # begins with the bytes of A, and has nothing but zeroes behind
        key("0.0.0.0", "255.255.255.255", UDP),  # a DHCP client
        key(A, "", TCP, 1),
        key("", "fd00::2", TCP, 1),
        key("", "", SCTP),
    ]
    assert set(by_line((b"".join(keys), sums(1) * len(keys)))) == {
        line("fd00::1", "fd00::2", UDP, zone=4711),
        line("a01:2::", "fd00::2", UDP),
        line("0.0.0.0", "255.255.255.255", UDP),
        line(A, "", TCP, 1),
        line("", "fd00::2", TCP, 1),
        line("", "", SCTP),
    }


def test_a_line_that_nothing_was_folded_into_is_none() -> None:
    assert by_line((key(A, "", TCP, 1) + key(A, C, TCP, 1), sums(0) + sums(2))) == {line(A, C, TCP, 1): (2, 0, 0)}


def test_the_lines_and_sides_with_many_entries_are_those_that_others_are_folded_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walk, "PROMINENT", 10)
    scanned = [(key(A, f"10.3.0.{n}", UDP, zone=7), sums(1)) for n in range(12)]
    flooding = [(key(f"10.4.0.{n}", C, TCP, 1), sums(2)) for n in range(5)]
    totals = _Totals()
    for keys, values in [*scanned, *flooding, (key(B, C, TCP, 3), sums(9)), (key(B, "10.5.0.1", TCP, 3), sums(11))]:
        totals.add(keys, values)
    assert dict(totals.prominent()) == {
        key(A, "", UDP, zone=7): 12,
        key("", C, TCP, 1): 10,
        key(B, "", TCP, 3): 20,
        key("", "10.5.0.1", TCP, 3): 11,
        key(B, "10.5.0.1", TCP, 3): 11,
    }


ADDRESSES = st.sampled_from([A, B, C, "fd00::1", "fd00::2", ""])
LINES = st.tuples(ADDRESSES, ADDRESSES, st.sampled_from([TCP, UDP]), st.integers(0, 9), st.integers(0, 2))
SUMS = st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 10**12))


@given(st.lists(st.lists(st.tuples(LINES, SUMS), max_size=20), max_size=4))
def test_no_entry_is_lost_or_counted_twice(
    drains: list[list[tuple[tuple[str, str, int, int, int], tuple[int, int, int]]]],
) -> None:
    chunks = [
        (b"".join(key(*one) for one, _ in drain), b"".join(sums(*numbers) for _, numbers in drain)) for drain in drains
    ]
    found = by_line(*chunks).values()
    expected = [numbers for drain in drains for _, numbers in drain if numbers[0]]
    assert [sum(column) for column in zip(*found, strict=True)] == [
        sum(column) for column in zip(*expected, strict=True)
    ]


def test_a_refusal_of_ctnetlinks_is_an_error() -> None:
    asking, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with asking, kernel:
        kernel.send(struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -errno.ENOMEM) + bytes(16))
        with pytest.raises(OSError, match="nf_conntrack_hash") as refused:
            _ask(asking, 0x100, 1024)
        assert refused.value.errno == errno.ENOMEM
        kernel.send(struct.pack("=IHHIIi", 36, 2, 0, 1, 0, 0) + bytes(16))
        _ask(asking, 0x102, 1024)
