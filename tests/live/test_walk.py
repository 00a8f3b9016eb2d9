"""What the kernel adds up of a connection table, against what ctnetlink lists of it, and what it costs."""

from __future__ import annotations

import errno
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import NamedTuple

import pytest

from k8sdiag.errors import ProbeRefused
from k8sdiag.facts import ConntrackTable
from k8sdiag.host.inventory.netns import inside
from k8sdiag.host.lab import Lab, PodSpec
from k8sdiag.host.lab.netns import Netns
from k8sdiag.host.sensors import walk as walk_module
from k8sdiag.host.sensors.table import TableReader, read_table, walk_table
from k8sdiag.host.sensors.walk import BUCKETS, LINES, Walk
from tests.live.test_table import MAX, _attribute, _nested, filled, held, in_use, peer_cpu_s

pytestmark = pytest.mark.live
NewLab = Callable[..., Lab]
TCP, UDP, ICMP, SCTP = 6, 17, 1, 132
BUCKETS_SYSCTL = "net.netfilter.nf_conntrack_buckets"


@pytest.fixture(scope="module")
def walk() -> Iterator[Walk]:
    loaded = Walk()
    yield loaded
    loaded.close()


class Entry(NamedTuple):
    source: str
    target: str
    protocol: int
    number: int
    """Tells connections with the same addresses apart: source port, or identifier."""
    status: int = 0xA  # IPS_CONFIRMED, IPS_SEEN_REPLY
    left_s: int = 600
    state: int = 3
    """Of TCP."""
    zone: int = 0
    zone_of: str = "both"
    """Or original, reply."""

    def message(self) -> bytes:
        """IPCTNL_MSG_CT_NEW."""
        version = ip_address(self.source).version
        reply_zone, original_zone = self.zone_of == "reply", self.zone_of == "original"
        parts = [
            bytes((socket.AF_INET if version == 4 else socket.AF_INET6, 0, 0, 0)),
            self._tuple(1, self.source, self.target, self.number, 443, zoned=original_zone),
            self._tuple(2, self.target, self.source, 443, self.number, zoned=reply_zone),
            _attribute(3, struct.pack("!I", self.status)),
            _attribute(7, struct.pack("!I", self.left_s)),
        ]
        if self.protocol == TCP:
            parts.append(_nested(4, _nested(1, _attribute(1, bytes([self.state])))))
        if self.zone and self.zone_of == "both":
            parts.append(_attribute(18, struct.pack("!H", self.zone)))
        body = b"".join(parts)
        return struct.pack("=IHHII", 16 + len(body), 0x100, 0x1 | 0x400 | 0x200, self.number, 0) + body

    def _tuple(self, kind: int, source: str, target: str, sport: int, dport: int, *, zoned: bool) -> bytes:
        first = 1 if ip_address(source).version == 4 else 3
        addresses = (_attribute(first + n, ip_address(one).packed) for n, one in enumerate((source, target)))
        if self.protocol == ICMP:
            echo = 8 if kind == 1 else 0
            ports = [_attribute(4, struct.pack("!H", self.number)), _attribute(5, bytes([echo])), _attribute(6, b"\0")]
        else:
            ports = [_attribute(2, struct.pack("!H", sport)), _attribute(3, struct.pack("!H", dport))]
        zone = [_attribute(3, struct.pack("!H", self.zone))] if zoned else []
        return _nested(kind, _nested(1, *addresses), _nested(2, _attribute(1, bytes([self.protocol])), *ports), *zone)


def insert(lab: Lab, netns: Netns, entries: list[Entry]) -> None:
    with lab.host_sysctl("net.netfilter.nf_conntrack_max", max(4 * len(entries), int(MAX.read_text()))):
        with inside(netns.path):
            asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        with asking:
            for first in range(0, len(entries), 128):
                asking.send(b"".join(entry.message() for entry in entries[first : first + 128]))


def mixed(count: int) -> list[Entry]:
    """Of every kind: families, protocols, states of TCP, zones, with and without a reply."""
    entries = []
    for n in range(count):
        protocol = (TCP, UDP, TCP, SCTP, ICMP)[n % 5]
        v6 = n % 3 == 0 and protocol != ICMP
        a, b = n % 3, n % 7
        entries.append(
            Entry(
                f"fd00::1:{a}" if v6 else f"10.0.0.{a}",
                f"fd00::2:{b}" if v6 else f"10.0.1.{b}",
                protocol,
                1024 + n,
                status=0xA if n % 4 else 0x8,
                left_s=100 + n % 1000,
                state=n // 5 % 10,
                zone=(0, 4711, 815, 99)[n % 4],
                zone_of=("both", "both", "original", "reply")[n % 4],
            )
        )
    return entries


def lines_of(table: ConntrackTable) -> dict[tuple[object, ...], tuple[int, int, int]]:
    """(entries, unreplied, timeout_s) by line."""
    columns = table.zone, table.source, table.target, table.protocol, table.state
    sums = zip(table.entries, table.unreplied, table.timeout_s, strict=True)
    return dict(zip(zip(*columns, strict=True), sums, strict=True))


def read_both(walk: Walk, netns: Netns) -> tuple[ConntrackTable, ConntrackTable]:
    of_kernel = walk_table(walk, netns.path, netns.inode, 0, time.monotonic_ns)
    return of_kernel, read_table(netns.path, netns.inode, 0, time.monotonic_ns)


def assert_same(of_kernel: ConntrackTable, listed: ConntrackTable) -> None:
    """Each line; the seconds that are left pass meanwhile."""
    ours, theirs = lines_of(of_kernel), lines_of(listed)
    assert {line: sums[:2] for line, sums in ours.items()} == {line: sums[:2] for line, sums in theirs.items()}
    passed_s = (listed.t_ns - of_kernel.t_ns) / 1e9 + 1.5  # either may round an entry's down
    for line, (entries, _, left_s) in ours.items():
        assert -entries <= left_s - theirs[line][2] <= passed_s * entries, line


def test_every_kind_of_entry_is_counted_as_ctnetlink_lists_it(new_lab: NewLab, walk: Walk) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")])
    other = lab.pods[0]
    lab.node.tool(["conntrack", "-F"])
    entries = mixed(6000)
    insert(lab, lab.node, entries)
    insert(lab, other, entries[:500])  # the hash table is that of all namespaces
    of_kernel, listed = read_both(walk, lab.node)
    assert of_kernel.entries_total == listed.entries_total == in_use(lab.node.path) == len(entries)
    assert 300 < len(listed.entries) < 1000  # lines to be compared, and none folded
    assert_same(of_kernel, listed)
    assert set(of_kernel.zone) == {0, 4711, 815}  # a zone of the reply only is not the line's
    assert set(of_kernel.state) >= {"", "SYN_SENT", "ESTABLISHED", "TIME_WAIT"}
    assert {ip_address(source).version for source in of_kernel.source} == {4, 6}
    of_kernel, listed = read_both(walk, other)
    assert of_kernel.entries_total == 500
    assert_same(of_kernel, listed)


def test_entries_whose_time_is_over_are_not_counted(new_lab: NewLab, walk: Walk) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")], conntrack=False)
    brief = [Entry("10.0.0.1", "10.0.0.2", UDP, 1024 + n, left_s=1) for n in range(300)]
    insert(lab, lab.node, [*brief, *(Entry("10.0.0.1", "10.0.0.3", UDP, 1024 + n) for n in range(40))])
    before, _ = read_both(walk, lab.node)
    time.sleep(1.3)
    of_kernel, listed = read_both(walk, lab.node)
    assert held(before, target="10.0.0.3")[0] == 40
    assert lines_of(of_kernel).keys() == {(0, "10.0.0.1", "10.0.0.3", UDP, "")}
    assert_same(of_kernel, listed)


def test_a_table_that_was_replaced_is_found_again(new_lab: NewLab, walk: Walk) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")])
    lab.node.tool(["conntrack", "-F"])
    insert(lab, lab.node, mixed(1000))
    first, _ = read_both(walk, lab.node)
    buckets, base = int(BUCKETS.read_text()), walk.base
    with lab.host_sysctl(BUCKETS_SYSCTL, buckets // 2):
        smaller, listed = read_both(walk, lab.node)
        assert walk.base != base
        base = walk.base
    assert_same(smaller, listed)
    again, listed = read_both(walk, lab.node)  # as many buckets as at first, and yet another table
    assert walk.base != base
    assert_same(again, listed)
    assert first.entries_total == smaller.entries_total == again.entries_total == 1000


def test_what_has_no_line_of_its_own_is_in_the_sums(
    new_lab: NewLab, walk: Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scanner, a flood, and a connection beside them that is worth a line."""
    monkeypatch.setattr(walk_module, "LINES", 300)
    lab = new_lab(pods=[PodSpec(kind="netns")], conntrack=False)
    scan = [Entry("10.9.9.9", f"10.{n >> 8}.{n & 255}.1", UDP, 2048, status=0x8) for n in range(3000)]
    flood = [Entry(f"11.{n >> 8}.{n & 255}.1", "10.8.8.8", TCP, 2048, state=1) for n in range(3000)]
    steady = [Entry("fd00::1", "fd00::2", UDP, 1024 + n) for n in range(3000)]
    strays = [Entry(f"12.{n >> 8}.{n & 255}.1", f"13.{n >> 8}.{n & 255}.1", SCTP, 2048) for n in range(500)]
    insert(lab, lab.node, [*scan, *flood, *steady, *strays])
    table = walk_table(walk, lab.node.path, lab.node.inode, 0, time.monotonic_ns)
    assert table.entries_total == sum(table.entries) == 9500
    assert held(table, source="10.9.9.9") == (3000, 3000)
    assert held(table, target="10.8.8.8", state="SYN_SENT") == (3000, 0)
    assert held(table, source="fd00::1", target="fd00::2", protocol=UDP) == (3000, 0)
    assert held(table, protocol=SCTP, state="") == (500, 0)
    assert held(table, source="10.9.9.9", target="")[0] > 1000  # that is, it was folded
    assert held(table, source="", target="10.8.8.8")[0] > 1000


def test_the_side_that_had_more_entries_is_kept(new_lab: NewLab, walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everyone talks to everyone: of 25 sources and 10 targets, a target has more of the table."""
    monkeypatch.setattr(walk_module, "LINES", 100)
    monkeypatch.setattr(walk_module, "PROMINENT", 3)
    lab = new_lab(pods=[PodSpec(kind="netns")], conntrack=False)
    insert(lab, lab.node, [Entry(f"10.0.0.{n % 25}", f"10.0.1.{n // 25 % 10}", UDP, 1024 + n) for n in range(2000)])
    table = walk_table(walk, lab.node.path, lab.node.inode, 0, time.monotonic_ns)
    assert table.entries_total == 2000
    assert held(table, source="")[0] > 10 * held(table, target="")[0]


def test_chains_that_are_too_long_are_left_to_ctnetlink(new_lab: NewLab, walk: Walk) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")], conntrack=False)
    space = lab.node.path, lab.node.inode, 0, 80_000
    entries = [Entry("10.0.0.1", f"10.0.{n // 50_000}.{n % 250}", TCP, 1024 + n % 50_000) for n in range(80_000)]
    insert(lab, lab.node, entries)
    reader = TableReader(time.monotonic_ns)
    try:
        with lab.host_sysctl(BUCKETS_SYSCTL, 512):
            with pytest.raises(OSError, match="nf_conntrack_hash") as refused:
                walk.read(lab.node.inode)
            reader.begin([space])
            assert reader.wait(30)
        (listed,) = reader.collect()
        assert (reader.walks, reader.walk_refused) == (False, str(refused.value))
        reader.begin([space], everything=True)
        assert reader.wait(30)
        (walked,) = reader.collect()
        assert (reader.walks, reader.walk_refused) == (True, "")
    finally:
        reader.close()
    assert refused.value.errno in {errno.ENOSPC, errno.EOVERFLOW}
    assert listed.entries_total == walked.entries_total == 80_000


def test_a_kernel_that_refuses_is_asked_once(new_lab: NewLab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(_walk: Walk) -> None:
        asked.append(1)
        raise ProbeRefused("not today")

    monkeypatch.setattr(Walk, "__init__", refuse)
    lab = new_lab(pods=[PodSpec(kind="netns")], conntrack=False)
    insert(lab, lab.node, mixed(100))
    reader = TableReader(time.monotonic_ns)
    try:
        for _ in range(2):
            reader.begin([(lab.node.path, lab.node.inode, 0, 20_000)], everything=True)
            assert reader.wait(30)
            assert [table.entries_total for table in reader.collect()] == [100]
    finally:
        reader.close()
    assert (len(asked), reader.walks) == (1, False)
    assert "not today" in reader.walk_refused


def test_a_small_table_is_read_without_loading_anything(new_lab: NewLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "__init__", lambda _: pytest.fail("was loaded"))
    lab = new_lab(pods=[PodSpec(kind="netns")], conntrack=False)
    insert(lab, lab.node, mixed(100))
    reader = TableReader(time.monotonic_ns)
    try:
        reader.begin([(lab.node.path, lab.node.inode, 0, 19_999)])
        assert reader.wait(30)
        assert [table.entries_total for table in reader.collect()] == [100]
    finally:
        reader.close()
    assert not reader.walks


@pytest.mark.slow
def test_a_full_table_costs_a_fifth_of_conntrack_and_awk_and_grows_linearly(new_lab: NewLab, walk: Walk) -> None:
    lab = new_lab(pods=[PodSpec(kind="netns")], ipv6=False)
    costs_s: dict[tuple[int, int], float] = {}
    for entries, sources in ((65_536, 500), (262_144, 500), (262_144, 262_144)):
        with filled(lab, entries, sources) as node:
            assert in_use(node.path) == entries
            ours_s, theirs_s = [], []
            for _ in range(5):
                before_s = time.thread_time()
                table = walk_table(walk, node.path, node.inode, 0, time.monotonic_ns)
                ours_s.append(time.thread_time() - before_s)
                theirs_s.append(peer_cpu_s(node, entries))
        assert table.entries_total == entries
        assert held(table, protocol=UDP) == (entries // 4, entries // 4)
        assert held(table, protocol=TCP, state="ESTABLISHED") == (entries - entries // 4, 0)
        costs_s[entries, sources] = statistics.median(ours_s)
        assert statistics.median(theirs_s) >= 5 * costs_s[entries, sources], (entries, sources)
    assert len(table.entries) < LINES
    assert costs_s[262_144, 500] < 6 * costs_s[65_536, 500]
