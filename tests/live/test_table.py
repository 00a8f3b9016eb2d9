"""Readings of real connection tables, against what the traffic's sender and the kernel's own gauge say."""

from __future__ import annotations

import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k8sdiag.facts import ConntrackTable
from k8sdiag.host.inventory.netns import inside
from k8sdiag.host.lab import Lab, PodSpec
from k8sdiag.host.lab.netns import Netns
from k8sdiag.host.sensors.table import TableReader, read_table

pytestmark = pytest.mark.live
NewLab = Callable[..., Lab]
TCP, UDP, ICMP = 6, 17, 1
MAX = Path("/proc/sys/net/netfilter/nf_conntrack_max")


def read(netns: Netns) -> ConntrackTable:
    return read_table(netns.path, netns.inode, netns.cookie, time.monotonic_ns)


def in_use(netns_path: str) -> int:
    """The first column of the kernel's statistics; the same on the row of each CPU."""
    with inside(netns_path):
        rows = Path("/proc/thread-self/net/stat/nf_conntrack").read_text().splitlines()[1:]
    return int(rows[0].split()[0], 16)


def held(table: ConntrackTable, **wanted: object) -> tuple[int, int]:
    """(entries, of them unreplied) of the lines whose columns say that."""
    rows = [i for i in range(len(table.entries)) if all(getattr(table, name)[i] == v for name, v in wanted.items())]
    return sum(table.entries[i] for i in rows), sum(table.unreplied[i] for i in rows)


# ----------------------------------------------------------------------------------------------------
# A big table, written by ctnetlink (scripts/bench uses it too)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nested(kind: int, *parts: bytes) -> bytes:
    return _attribute(kind | 0x8000, b"".join(parts))


def _tuple(kind: int, src: int, dst: int, protocol: int, sport: int, dport: int) -> bytes:
    addresses = _nested(1, _attribute(1, struct.pack("!I", src)), _attribute(2, struct.pack("!I", dst)))
    ports = _attribute(2, struct.pack("!H", sport)), _attribute(3, struct.pack("!H", dport))
    return _nested(kind, addresses, _nested(2, _attribute(1, bytes([protocol])), *ports))


def _new_entry(number: int, source: int, target: int) -> bytes:
    """IPCTNL_MSG_CT_NEW: an established TCP connection, replied to, or (each fourth) UDP without a reply."""
    udp = number % 4 == 0
    protocol, sport = (UDP if udp else TCP), 1024 + number % 59_999
    body = (
        bytes((socket.AF_INET, 0, 0, 0))
        + _tuple(1, source, target, protocol, sport, 443)
        + _tuple(2, target, source, protocol, 443, sport)
        + _attribute(3, struct.pack("!I", 0x8 if udp else 0xE))  # CONFIRMED; SEEN_REPLY and ASSURED
        + _attribute(7, struct.pack("!I", 600))
        + (b"" if udp else _nested(4, _nested(1, _attribute(1, bytes([3])))))
    )
    return struct.pack("=IHHII", 16 + len(body), 0x100, 0x1 | 0x400 | 0x200, number, 0) + body


@contextmanager
def filled(lab: Lab, count: int, sources: int) -> Iterator[Netns]:
    """The lab's node with so many entries more, from so many addresses to 50 targets; gone afterwards."""
    node = lab.node
    # From 95 % on the kernel throws out entries without a reply.
    with lab.host_sysctl("net.netfilter.nf_conntrack_max", max(2 * count, int(MAX.read_text()))):
        with inside(node.path):
            asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        try:
            with asking:
                for first in range(0, count, 256):
                    numbers = range(first, min(first + 256, count))
                    asking.send(b"".join(_new_entry(n, 0x0A000000 + n % sources, 0x0A800000 + n % 50) for n in numbers))
            yield node
        finally:
            node.tool(["conntrack", "-F"])


def cpu_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


COUNT_BY_SOURCE = r"""conntrack -L 2>/dev/null | awk '{
    for (i = 1; i <= NF; i++) if ($i ~ /^src=/) { n[$i]++; break }
} END { for (a in n) print n[a] }'"""
"""What one would type instead."""


def peer_cpu_s(node: Netns, entries: int) -> float:
    """CPU seconds of counting by source with conntrack(8) and awk."""
    before_s = cpu_s(resource.RUSAGE_CHILDREN)
    counts = node.tool(["sh", "-c", COUNT_BY_SOURCE]).split()
    took_s = cpu_s(resource.RUSAGE_CHILDREN) - before_s
    assert sum(map(int, counts)) == entries
    return took_s


# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_the_connections_of_two_pods_are_counted_by_source_target_state_and_reply(new_lab: NewLab, family: int) -> None:
    lab = new_lab(pods=[PodSpec("shop", "a"), PodSpec("shop", "b"), PodSpec("shop", "server")])
    a, b, server = (pod.ipv4 if family == 4 else pod.ipv6 for pod in lab.pods)
    first, second, serving = lab.pods
    lab.node.tool(["conntrack", "-F"])
    with serving.child("server", port=5300) as listening, serving.sink(5301):
        listening.answer()
        with first.child("hold", dst=server, port=5300, count=31) as one:
            one.answer()
            with second.child("hold", dst=server, port=5300, count=17) as other:
                other.answer()
                for port in range(6000, 6013):
                    first.udp(server, 5301, 1, sport=port)
                table = read(lab.node)
                count = in_use(lab.node.path)
    tcp = {"protocol": TCP, "state": "ESTABLISHED", "target": server, "zone": 0}
    assert held(table, source=a, **tcp) == (31, 0)
    assert held(table, source=b, **tcp) == (17, 0)
    assert held(table, source=a, protocol=UDP, target=server, state="") == (13, 13)
    assert held(table, protocol=UDP)[0] == 13
    assert held(table, protocol=TCP)[0] == 48
    assert table.entries_total == sum(table.entries) == count
    assert (table.netns, table.netns_cookie) == (lab.node.inode, lab.node.cookie)
    established = [s for s, n in zip(table.state, table.entries, strict=True) for _ in range(n) if s]
    assert established == ["ESTABLISHED"] * 48
    udp_s = sum(s for s, p in zip(table.timeout_s, table.protocol, strict=True) if p == UDP)
    assert 13 * 20 <= udp_s <= 13 * 30  # nf_conntrack_udp_timeout is 30


def test_the_backend_behind_a_service_address_is_the_target(new_lab: NewLab) -> None:
    lab = new_lab(pods=[PodSpec("shop", "a"), PodSpec("shop", "server")], ipv6=False)
    client, serving = lab.pods
    rule = f"udp dport 53 ip daddr 10.255.0.10 dnat to {serving.ipv4}:5301"
    lab.node.add_nft_rule("ip", "n", "type nat hook prerouting priority -100;", rule)
    with serving.sink(5301):
        for port in range(6000, 6007):
            client.udp("10.255.0.10", 53, 1, sport=port)
        table = read(lab.node)
    assert held(table, source=client.ipv4, target=serving.ipv4, protocol=UDP) == (7, 7)
    assert held(table, target="10.255.0.10") == (0, 0)


def test_the_same_addresses_in_two_zones_are_two_lines(new_lab: NewLab) -> None:
    lab = new_lab(pods=[PodSpec("shop", "a"), PodSpec("shop", "server")], ipv6=False)
    client, serving = lab.pods
    rules = "udp dport 5301 ct zone set 4711\nudp dport 5302 ct original zone set 815"
    lab.node.add_nft_rule("ip", "z", "type filter hook prerouting priority -300;", rules)
    with serving.sink(5301), serving.sink(5302), serving.sink(5303):
        for port, flows in ((5301, 5), (5302, 3), (5303, 2)):
            for number in range(flows):
                client.udp(serving.ipv4, port, 1, sport=6000 + number)
        table = read(lab.node)
    pair = {"source": client.ipv4, "target": serving.ipv4, "protocol": UDP}
    assert [held(table, zone=zone, **pair)[0] for zone in (4711, 815, 0)] == [5, 3, 2]


def test_a_namespace_that_tracks_nothing_has_an_empty_table(new_lab: NewLab) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")], conntrack=False)
    table = read(lab.node)
    assert (table.entries_total, table.entries) == (0, ())


def test_another_namespace_at_the_path_is_an_error(new_lab: NewLab) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")])
    with pytest.raises(OSError, match="Stale"):
        read_table(lab.node.path, lab.pods[0].inode, 0, time.monotonic_ns)


def test_a_reader_reads_at_once_then_pauses_and_says_once_that_a_table_is_empty(new_lab: NewLab) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns"), PodSpec(kind="netns")])
    node, gone = lab.node, ("/run/netns/none", 1, 2, 9)
    lab.node.tool(["conntrack", "-F"])
    lab.pods[0].udp(lab.pods[1].ipv4, 4711, 3, sport=6000)
    space = (node.path, node.inode, node.cookie)
    reader = TableReader(time.monotonic_ns)
    try:
        reader.begin([(*space, 1), gone])
        assert reader.wait(10)
        (table,) = reader.collect()
        assert held(table, source=lab.pods[0].ipv4, protocol=UDP) == (1, 1)
        assert [type(error) for error in reader.failures().values()] == [FileNotFoundError]
        assert reader.collect() == []
        reader.begin([(*space, 1), gone])
        assert reader.wait(10)
        assert reader.collect() == []  # its pause is not over
        # Where something is refused the pause is what reading costs, and no more: 50 times that, not 5 s.
        again: list[ConntrackTable] = []
        end_s = time.monotonic() + 4
        while not again and time.monotonic() < end_s:
            reader.begin([(*space, 1)], pressed={(node.inode, node.cookie)})
            assert reader.wait(10)
            again = reader.collect()
            time.sleep(0.05)
        assert [table.entries_total for table in again] == [1]
        reader.begin([(*space, 1)], everything=True)
        assert reader.wait(10)
        assert [table.entries_total for table in reader.collect()] == [1]
        assert reader.failures() == {}  # that namespace is no longer there to be read
        reader.begin([(*space, 0)])
        assert [table.entries_total for table in reader.collect()] == [0]
        reader.begin([(*space, 0)])
        assert reader.collect() == []
    finally:
        reader.close()


@pytest.mark.slow
def test_a_big_table_costs_less_than_conntrack_and_awk_and_grows_linearly(new_lab: NewLab) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")], ipv6=False)
    costs_s: dict[int, float] = {}
    for entries in (16_384, 65_536):
        with filled(lab, entries, sources=500) as node:
            assert in_use(node.path) == entries
            ours_s, theirs_s = [], []
            for _ in range(5):
                before_s = time.thread_time()
                table = read(node)
                ours_s.append(time.thread_time() - before_s)
                theirs_s.append(peer_cpu_s(node, entries))
        assert table.entries_total == entries
        assert held(table, protocol=UDP) == (entries // 4, entries // 4)
        assert held(table, protocol=TCP, state="ESTABLISHED") == (entries - entries // 4, 0)
        costs_s[entries] = min(ours_s)
        assert min(ours_s) < min(theirs_s)
    assert costs_s[65_536] < 6 * costs_s[16_384]


@pytest.mark.slow
def test_a_flood_from_as_many_sources_as_entries_shows_its_targets(new_lab: NewLab) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")], ipv6=False)
    with filled(lab, 65_536, sources=65_536) as node:
        table = read(node)
    assert table.entries_total == sum(table.entries) == 65_536
    assert len(table.entries) < 2000
    assert held(table, protocol=UDP) == (16_384, 16_384)
    for number in range(50):
        target = socket.inet_ntoa((0x0A800000 + number).to_bytes(4, "big"))
        assert held(table, target=target)[0] in {1310, 1311}
