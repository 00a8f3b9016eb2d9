"""What conntrack refuses, packet by packet, against the clients' own tallies, rule counters and statistics.

Here the verdicts are inferred from each CPU's statistics ("likely"); where kprobes are, tests/vm sees them proven.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

import pytest

from k8sdiag.host import bpf
from k8sdiag.host.lab import Lab, PodSpec
from k8sdiag.host.lab import conntrack as faults
from k8sdiag.host.lab.conntrack import OTHER, SERVED, SNAT_PORT, fill_table, refused, share_snat_port
from k8sdiag.host.lab.fault import settled
from k8sdiag.host.lab.netns import Netns
from k8sdiag.host.lab.topology import Pod
from k8sdiag.report import status
from k8sdiag.snapshot import ConntrackRow, DropRow, Finding, Snapshot, Tuple
from tests.live.watch import Watch, drops_of, watching

pytestmark = pytest.mark.live
NewLab = Callable[..., Lab]
Family = Literal[4, 6]
# The limit of the table is lowered for a second only: several ticks have to fall into it.
TICK_S = 0.1
RULED = 2222  # the port that rules drop
# A finding gathers a Kubernetes namespace, and other labs may be up: these are nobody else's.
PODS = [
    PodSpec(f"{namespace}-{os.getpid()}", name)
    for namespace, name in (
        ("shop", "cart-0"), ("shop", "web-0"), ("pay", "ledger-0"), ("ops", "batch-0"), ("db", "server-0")
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_inference() -> None:
    if Path("/sys/bus/event_source/devices/kprobe").exists():
        pytest.skip("kprobes are here: what they see is tested by tests/vm")


# ----------------------------------------------------------------------------------------------------
# What was seen


def dropped_in(lab: Lab, snapshot: Snapshot) -> list[DropRow]:
    """Drops in the lab's namespaces that mean something: other labs may be up."""
    here = {lab.node.inode, *(pod.inode for pod in lab.pods)}
    return [row for row in snapshot.drops if row.netns in here and not row.benign]


def by_owner(rows: Sequence[DropRow], cause: str) -> dict[str, int]:
    packets: Counter[str] = Counter()
    for row in rows:
        if row.cause == cause:
            packets[row.owner.label] += row.packets
    return dict(packets)


def findings_about(snapshot: Snapshot, *owners: str) -> list[Finding]:
    return [one for one in snapshot.findings if {owner.label for owner in one.victims} & set(owners)]


def table_of(snapshot: Snapshot, netns: Netns) -> ConntrackRow:
    (row,) = (row for row in snapshot.conntrack if row.netns == netns.inode)
    return row


def conntrack_of(snapshot: Snapshot, owner: str) -> tuple[int, int]:
    """(insert_failed, table_full) of the owner's row; nothing of both without one."""
    for row in snapshot.owners:
        if row.owner.label == owner and row.conntrack:
            return row.conntrack.insert_failed, row.conntrack.table_full
    return 0, 0


def evidence_of(finding: Finding) -> dict[str, float | str]:
    return {evidence.name: evidence.value for evidence in finding.evidence}


# ----------------------------------------------------------------------------------------------------
# Faults side by side

ALTERNATE = """
import json, select, socket, sys, time
to, port, other, count = json.loads(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
first, kept = [], []
for _ in range(count):
    for number, sockets in ((port, first), (other, kept)):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.connect((to, number))
        sender.send(b"x")
        sockets.append(sender)
answered, deadline = set(), time.monotonic() + 0.5
while (left := deadline - time.monotonic()) > 0:
    readable = select.select([one for one in first if one not in answered], [], [], left)[0]
    answered.update(readable)
print(len(first) - len(answered), flush=True)
"""


def alternate(clients: Mapping[Pod, int], to: str, port: int, other: int) -> int:
    """All at once: datagrams to the two ports in turn, each from a new socket. How many to `port` got no answer."""
    running = [
        client.start([sys.executable, "-IS", "-c", ALTERNATE, json.dumps([to, port, other, count])])
        for client, count in clients.items()
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(int(process.communicate(timeout=30)[0]) for process in running)
    finally:
        for process in running:
            process.kill()
            process.communicate()


def await_small_tables() -> None:
    """Until the limit may be lowered: another test's lab may hold a big table for a moment."""
    deadline = time.monotonic() + 60
    while faults.HELD_MIN + faults._fullest_table() > faults.HELD_MAX and time.monotonic() < deadline:
        time.sleep(0.2)


def hold_limit(lab: Lab, is_seen: Callable[[], bool]) -> None:
    """From now on the lab gives a lowered limit back only once that was seen, on a slow machine too; 3 s at most."""
    lower = lab.host_sysctl

    @contextmanager
    def longer(name: str, value: int) -> Iterator[None]:
        with lower(name, value):
            yield
            settled(lambda: int(is_seen()), 1)

    lab.host_sysctl = longer  # type: ignore[method-assign]


def all_refusals_read(lab: Lab, watch: Watch) -> Callable[[], bool]:
    """Whether the watch has read the node's statistics since the last refusal."""
    start = refused(lab.node.conntrack())

    def is_read() -> bool:
        rows = [row for row in watch.snapshots[-1].conntrack if row.netns == lab.node.inode]
        return bool(rows) and rows[0].refused == refused(lab.node.conntrack()) - start

    return is_read


@contextmanager
def full_table(lab: Lab, server: Pod, culprit: Pod) -> Iterator[int]:
    """The node's table is full of the culprit's connections; yields the limit. Host-wide, as faults.fill_table."""
    await_small_tables()
    lab.node.flush_conntrack()
    held = faults.HELD_MIN + faults._fullest_table()
    with server.tcp_server(SERVED), culprit.tcp_held(server.ipv4, SERVED, held), lab.host_sysctl(faults.MAX, held):
        assert lab.node.conntrack()["entries"] == held
        yield held


@contextmanager
def legacy_drop(netns: Netns, table: str, chain: str, *match: str) -> Iterator[Callable[[int], int]]:
    """An iptables-legacy rule that drops datagrams to RULED; yields what reads its counter, until it says so much."""
    binary, rule = "iptables-legacy", [chain, "-p", "udp", "--dport", str(RULED), *match, "-j", "DROP"]
    netns.tool([binary, "-w", "-t", table, "-I", *rule])
    try:
        yield lambda wanted: settled(lambda: netns.iptables_counter(binary, table, chain, RULED), wanted)
    finally:
        netns.tool([binary, "-w", "-t", table, "-D", *rule])


@contextmanager
def talking(client: Pod, to: str, port: int) -> Iterator[list[tuple[int, int]]]:
    """A pod that goes on sending from one socket; yields (sent, answered) of each go, complete at the end."""
    turns: list[tuple[int, int]] = []
    over = threading.Event()
    with client.child("talk", dst=to, port=port) as child:

        def talk() -> None:
            while not over.is_set():
                turns.append((200, int(child.ask("200"))))

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            yield turns
        finally:
            over.set()
            thread.join()


# ----------------------------------------------------------------------------------------------------
# One translated port


@pytest.mark.parametrize("bridge", [False, True], ids=["routed", "bridge"])
@pytest.mark.parametrize("family", [4, 6])
def test_of_23_clients_translated_to_one_port_22_fail_to_be_inserted(
    new_lab: NewLab, family: Family, *, bridge: bool
) -> None:
    lab = new_lab(pods=PODS, bridge=bridge)
    with watching() as watch:
        expected = lab.inject("snat-clash" if family == 4 else "snat-clash-v6", 22)
        snapshot = watch.end()
    assert (expected.count, expected.counter) == (22, 22)
    client, server = lab.pods[0], lab.pods[2]
    ours, theirs, gateway = (
        (client.ipv4, server.ipv4, server.gateway_ipv4)
        if family == 4
        else (client.ipv6, server.ipv6, server.gateway_ipv6)
    )
    (row,) = dropped_in(lab, snapshot)
    assert (row.packets, row.cause, row.verdict, row.confidence) == (22, "ct-snat-port-clash", "clash", "likely")
    assert (row.hook, row.conntrack, row.nat, row.service) == ("POST_ROUTING", "new", "src", None)
    ours, theirs, gateway = (str(ip_address(address)) for address in (ours, theirs, gateway))
    assert (row.src, row.dst, row.dport) == (ours, theirs, SERVED)
    assert row.reply == Tuple(theirs, gateway, SERVED, SNAT_PORT)
    assert row.peer is not None
    assert (row.owner.label, row.peer.label) == (client.owner, server.owner)
    (finding,) = findings_about(snapshot, client.owner)
    assert (finding.cause, finding.packets, finding.confidence) == ("ct-snat-port-clash", 22, "likely")
    assert [owner.label for owner in finding.victims] == [client.owner]
    assert {"ct-table-full", "networkpolicy-drop"} <= {ruled.cause for ruled in finding.ruled_out}
    evidence = evidence_of(finding)
    assert (evidence["insert_failed"], evidence["drop"]) == (22, 22)
    table = table_of(snapshot, lab.node)
    assert (table.insert_failed, table.drop, table.refused) == (22, 22, 0)
    assert conntrack_of(snapshot, client.owner) == (22, 0)


@pytest.mark.parametrize(
    ("family", "bridge"), [(4, False), (4, True), (6, False)], ids=["v4-routed", "v4-bridge", "v6-routed"]
)
def test_three_pods_at_one_port_lose_what_each_client_missed_and_the_busiest_pod_nothing(
    new_lab: NewLab, family: Family, *, bridge: bool
) -> None:
    lab = new_lab(pods=PODS, bridge=bridge)
    *clients, busiest, server = lab.pods
    attempts = dict(zip(clients, (8, 14, 24), strict=True))
    with watching() as watch:
        done = share_snat_port(lab, attempts, server, family=family, bystander=busiest)
        snapshot = watch.end()
    assert [done.tallies[client.owner].sent for client in clients] == [8, 14, 24]
    assert done.bystander.connected == done.bystander.sent == 5_000
    assert sum(done.lost.values()) == done.counter == 45
    lost = {owner: packets for owner, packets in done.lost.items() if packets}
    rows = dropped_in(lab, snapshot)
    assert by_owner(rows, "ct-snat-port-clash") == lost
    assert {(row.cause, row.verdict, row.confidence) for row in rows} == {("ct-snat-port-clash", "clash", "likely")}
    assert {client.owner: conntrack_of(snapshot, client.owner) for client in (*clients, busiest)} == {
        owner: (packets, 0) for owner, packets in {**done.lost, busiest.owner: 0}.items()
    }
    assert table_of(snapshot, lab.node).insert_failed == 45
    found = findings_about(snapshot, *(pod.owner for pod in lab.pods))
    assert {one.cause for one in found} == {"ct-snat-port-clash"}
    assert sum(one.packets for one in found) == 45
    assert {owner.label for one in found for owner in one.victims} == set(lost)


@pytest.mark.parametrize("family", [4, 6])
def test_a_port_clash_behind_a_service_names_service_backend_and_reply(new_lab: NewLab, family: Family) -> None:
    """Translated both ways: sent to a service, from 23 ports to one."""
    lab = new_lab(pods=PODS)
    client, server, node = lab.pods[0], lab.pods[-1], lab.node
    backend, gateway, service, ip = (
        (server.ipv4, server.gateway_ipv4, "10.96.7.10", "ip")
        if family == 4
        else (server.ipv6, server.gateway_ipv6, "fd00:96::10", "ip6")
    )
    to, behind = (f"[{address}]" if family == 6 else address for address in (backend, gateway))
    node.add_nft_rule(
        ip, "d", "type nat hook prerouting priority -100;", f"{ip} daddr {service} udp dport 53 dnat to {to}:{SERVED}"
    )
    node.add_nft_rule(
        ip,
        "s",
        "type nat hook postrouting priority 100;",
        f"{ip} daddr {backend} meta l4proto udp snat to {behind}:{SNAT_PORT}",
    )
    before = node.conntrack()
    with server.sink(SERVED, echo=True), watching() as watch:
        tally = client.send_by("attempts", dst=service, port=53, count=18, timeout_s=0.5, udp=True, wait=False)
        snapshot = watch.end()
    assert (tally.sent, tally.connected) == (18, 1)
    assert node.conntrack()["insert_failed"] - before["insert_failed"] == 17
    (row,) = dropped_in(lab, snapshot)
    # To port 53, and yet no race of two queries: another socket has the port.
    assert (row.packets, row.cause, row.confidence, row.nat) == (17, "ct-snat-port-clash", "likely", "both")
    assert (row.src, row.dst, row.dport) == (client.ipv4 if family == 4 else client.ipv6, service, 53)
    assert row.service == (f"[{service}]:53" if family == 6 else f"{service}:53")
    assert row.reply == Tuple(backend, gateway, SERVED, SNAT_PORT)
    assert row.peer is not None
    assert (row.owner.label, row.peer.label) == (client.owner, server.owner)


@pytest.mark.parametrize("family", [4, 6])
def test_a_rules_drop_of_a_translated_packet_names_the_service_and_the_backends_owner(
    new_lab: NewLab, family: Family
) -> None:
    lab = new_lab(pods=PODS)
    client, server, node = lab.pods[0], lab.pods[-1], lab.node
    ours, backend, service, ip = (
        (client.ipv4, server.ipv4, "10.96.7.11", "ip")
        if family == 4
        else (client.ipv6, server.ipv6, "fd00:96::11", "ip6")
    )
    to = f"[{backend}]:{SERVED}" if family == 6 else f"{backend}:{SERVED}"
    node.add_nft_rule(
        ip, "d", "type nat hook prerouting priority -100;", f"{ip} daddr {service} udp dport 80 dnat to {to}"
    )
    node.add_nft_rule(ip, "f", "type filter hook forward priority 0;", f"udp dport {SERVED} counter drop")
    with watching() as watch:
        for sport in range(6000, 6007):
            client.udp(service, 80, 3, sport=sport)
        snapshot = watch.end()
    assert node.nft_counter(ip, "f") == 21
    (row,) = dropped_in(lab, snapshot)
    assert (row.packets, row.flows, row.cause, row.verdict) == (21, 7, "networkpolicy-drop", "rule")
    assert (row.src, row.dst, row.dport, row.nat) == (ours, service, 80, "dst")
    assert row.service == (f"[{service}]:80" if family == 6 else f"{service}:80")
    assert row.reply == Tuple(backend, ours, SERVED, 0)  # of seven source ports none is named
    assert row.peer is not None
    assert (row.owner.label, row.peer.label, row.direction) == (client.owner, server.owner, "forward")


# ----------------------------------------------------------------------------------------------------
# A full table


@pytest.mark.parametrize("family", [4, 6])
def test_two_victims_of_a_full_table_lose_what_each_client_missed(new_lab: NewLab, family: Family) -> None:
    lab = new_lab(pods=PODS)
    one, busiest, other, culprit, server = lab.pods
    await_small_tables()
    own_max = Path("/proc/sys", *faults.MAX.split(".")).read_text()
    with watching(TICK_S) as watch:
        hold_limit(lab, all_refusals_read(lab, watch))
        to = server.ipv4 if family == 4 else server.ipv6
        with server.sink(OTHER, echo=True), talking(busiest, to, OTHER) as turns:
            done = fill_table(lab, {one: 9, other: 17}, server, culprit, family=family)
        snapshot = watch.end()
    assert Path("/proc/sys", *faults.MAX.split(".")).read_text() == own_max
    assert done.lost == {one.owner: 9, other.owner: 17}
    assert done.counter == 26
    sent, answered = map(sum, zip(*turns, strict=True))
    assert sent == answered > 26
    rows = dropped_in(lab, snapshot)
    assert by_owner(rows, "ct-table-full") == done.lost
    assert {(row.cause, row.verdict, row.confidence) for row in rows} == {("ct-table-full", "refused", "likely")}
    assert {(row.hook, row.segment, row.conntrack) for row in rows} == {("PRE_ROUTING", "syn", None)}
    assert {pod.owner: conntrack_of(snapshot, pod.owner) for pod in (one, busiest, other, culprit)} == {
        one.owner: (0, 9), busiest.owner: (0, 0), other.owner: (0, 17), culprit.owner: (0, 0)
    }  # fmt: skip
    found = {one.victims[0].label: one for one in findings_about(snapshot, *(pod.owner for pod in lab.pods))}
    assert {owner: (finding.cause, finding.packets) for owner, finding in found.items()} == {
        one.owner: ("ct-table-full", 9), other.owner: ("ct-table-full", 17)
    }  # fmt: skip
    table = table_of(snapshot, lab.node)
    assert (table.drop, table.insert_failed, table.refused) == (26, 0, 26)
    assert table.full_max == done.limit
    for finding in found.values():
        assert [owner.label for owner in finding.victims] in ([one.owner], [other.owner])
        assert [owner.label for owner in finding.culprits] == [culprit.owner]
        assert finding.confidence == "likely"
        evidence = evidence_of(finding)
        assert evidence["max"] == done.limit
        # The busiest pod's flow has an entry too.
        assert evidence["count"] in (done.limit, done.limit + 1)
        assert evidence["refused"] == 26
        assert "networkpolicy-drop" in {ruled.cause for ruled in finding.ruled_out}


@pytest.mark.parametrize("fault", ["table-full", "table-full-v6"])
def test_every_connection_that_a_full_table_refused_is_counted(new_lab: NewLab, fault: str) -> None:
    lab = new_lab(pods=PODS, bridge=fault == "table-full")
    await_small_tables()
    with watching(TICK_S) as watch:
        hold_limit(lab, all_refusals_read(lab, watch))
        expected = lab.inject(fault, 31)
        snapshot = watch.end()
    assert (expected.count, expected.counter) == (31, 31)
    rows = dropped_in(lab, snapshot)
    assert by_owner(rows, "ct-table-full") == {expected.owner: 31}
    assert sum(row.packets for row in rows) == 31  # and nothing else, such as a policy
    (finding,) = findings_about(snapshot, expected.owner)
    assert [owner.label for owner in finding.culprits] == [expected.culprit]
    assert (finding.cause, finding.confidence, finding.packets) == ("ct-table-full", "likely", 31)
    evidence = evidence_of(finding)
    assert evidence["count"] == evidence["max"] == table_of(snapshot, lab.node).full_max
    assert evidence["max"] != table_of(snapshot, lab.node).max  # restored by now


def test_a_policys_victim_and_a_full_tables_victim_are_two_findings(new_lab: NewLab) -> None:
    lab = new_lab(pods=PODS)
    ruled, _, hurt, culprit, server = lab.pods
    await_small_tables()
    with watching(TICK_S) as watch:
        hold_limit(lab, all_refusals_read(lab, watch))
        policy = [lab.inject("nft-forward", 11, ruled)]
        done = fill_table(lab, {hurt: 19}, server, culprit)
        policy.append(lab.inject("nft-forward", 5, ruled))
        snapshot = watch.end()
    assert (sum(one.counter for one in policy), done.counter, done.lost[hurt.owner]) == (16, 19, 19)
    found = findings_about(snapshot, *(pod.owner for pod in lab.pods))
    assert sorted(
        (one.cause, [owner.label for owner in one.victims], [owner.label for owner in one.culprits], one.packets)
        for one in found
    ) == [
        ("ct-table-full", [hurt.owner], [culprit.owner], 19),
        ("networkpolicy-drop", [ruled.owner], [], 16),
    ]
    assert {(row.cause, row.verdict) for row in dropped_in(lab, snapshot)} == {
        ("ct-table-full", "refused"), ("networkpolicy-drop", "rule")
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Look-alikes at once


def test_an_input_rule_and_insert_failures_in_the_same_pod_are_told_apart_packet_by_packet(new_lab: NewLab) -> None:
    """Both die in nf_hook_slow at LOCAL_IN, with an entry that is not confirmed yet."""
    lab = new_lab(pods=PODS)
    pod, one, other, *_ = lab.pods
    snat = f"udp dport {SERVED} snat to {one.ipv4}:{SNAT_PORT}"
    pod.add_nft_rule("ip", "s", "type nat hook input priority 100;", snat)
    before = pod.conntrack()
    with (
        pod.sink(SERVED, echo=True),
        legacy_drop(pod, "filter", "INPUT", "-m", "conntrack", "--ctstate", "NEW") as counter,
        watching() as watch,
    ):
        missed = alternate({one: 90, other: 60}, pod.ipv4, SERVED, RULED)
        by_rule = counter(150)
        snapshot = watch.end()
        after = pod.conntrack()
    assert after["insert_failed"] - before["insert_failed"] == missed == 149
    assert by_rule == 150
    rows = dropped_in(lab, snapshot)
    assert by_owner(rows, "networkpolicy-drop") == {pod.owner: by_rule}
    assert by_owner(rows, "ct-snat-port-clash") == {pod.owner: missed}
    assert {(row.hook, row.location, row.conntrack) for row in rows} == {("LOCAL_IN", "nf_hook_slow", "new")}
    assert {(row.cause, row.verdict, row.dport) for row in rows} == {
        ("networkpolicy-drop", "rule", RULED), ("ct-snat-port-clash", "clash", SERVED)
    }  # fmt: skip
    found = findings_about(snapshot, pod.owner)
    assert {(one.cause, one.packets) for one in found} == {("networkpolicy-drop", 150), ("ct-snat-port-clash", 149)}
    assert "possible" not in {*(one.confidence for one in found), *(row.confidence for row in rows)}


def test_a_raw_rule_and_a_full_table_are_told_apart_packet_by_packet(new_lab: NewLab) -> None:
    """Both die in nf_hook_slow at PRE_ROUTING, without an entry."""
    lab = new_lab(pods=PODS)
    one, _, other, culprit, server = lab.pods
    node = lab.node
    with server.sink(OTHER, echo=True), legacy_drop(node, "raw", "PREROUTING") as counter, watching(TICK_S) as watch:
        hold_limit(lab, all_refusals_read(lab, watch))
        with full_table(lab, server, culprit) as limit:
            before = refused(node.conntrack())
            missed = alternate({one: 70, other: 50}, server.ipv4, OTHER, RULED)
            by_rule = counter(120)
            by_table = refused(node.conntrack()) - before
        snapshot = watch.end()
    assert (missed, by_table, by_rule) == (120, 120, 120)
    rows = dropped_in(lab, snapshot)
    per_pod = {one.owner: 70, other.owner: 50}
    assert by_owner(rows, "ct-table-full") == by_owner(rows, "networkpolicy-drop") == per_pod
    assert {(row.hook, row.location, row.conntrack) for row in rows} == {("PRE_ROUTING", "nf_hook_slow", None)}
    assert {(row.cause, row.verdict, row.dport) for row in rows} == {
        ("networkpolicy-drop", "rule", RULED), ("ct-table-full", "refused", OTHER)
    }  # fmt: skip
    found = findings_about(snapshot, one.owner, other.owner)
    assert sorted((one.cause, one.victims[0].label, one.packets) for one in found) == sorted(
        (cause, owner, packets) for cause in ("ct-table-full", "networkpolicy-drop")
        for owner, packets in per_pod.items()
    )  # fmt: skip
    assert "possible" not in {*(one.confidence for one in found), *(row.confidence for row in rows)}
    assert table_of(snapshot, node).full_max == limit


# ----------------------------------------------------------------------------------------------------
# The other faults


@pytest.mark.parametrize(
    ("fault", "cause", "confidence", "counter"),
    [
        ("snat-exhausted", "snat-port-exhaustion", "likely", "insert_failed"),
        ("invalid-rst", "ct-invalid-rst", "possible", "invalid"),
        ("invalid-drop", "ct-invalid-drop-asym", "possible", "invalid"),
        ("stale-dnat", "stale-udp-dnat", "likely", ""),
    ],
)
def test_a_fault_is_named_with_the_statistics_beside_it(
    new_lab: NewLab, fault: str, cause: str, confidence: str, counter: str
) -> None:
    lab = new_lab(pods=PODS)
    before = lab.node.conntrack()
    with watching() as watch:
        expected = lab.inject(fault, 17)
        snapshot = watch.end()
    assert (expected.count, expected.counter) == (17, 17)
    rows = dropped_in(lab, snapshot)
    assert by_owner(rows, cause) == {expected.owner: 17}
    assert sum(row.packets for row in rows) == 17
    (finding,) = findings_about(snapshot, expected.owner)
    assert (finding.cause, finding.confidence, finding.packets) == (cause, confidence, 17)
    if counter:
        risen = lab.node.conntrack()[counter] - before[counter]
        assert risen >= 17
        assert evidence_of(finding)[counter] == getattr(table_of(snapshot, lab.node), counter) == risen


def test_a_stale_translation_names_the_service_and_the_backend_that_is_gone(new_lab: NewLab) -> None:
    lab = new_lab(pods=PODS)
    with watching() as watch:
        lab.inject("stale-dnat", 6)
        snapshot = watch.end()
    (row,) = dropped_in(lab, snapshot)
    service, gone = f"10.96.{lab.subnet}.10", f"10.97.{lab.subnet}.{lab.pods[2].number}"
    assert (row.packets, row.service, row.dst, row.nat) == (6, f"{service}:53", service, "dst")
    assert row.reply is not None
    assert (row.reply.src, row.reply.sport, row.reply.dst) == (gone, 53, lab.pods[0].ipv4)


def test_a_race_that_the_kernel_repaired_is_an_information_and_no_alarm(new_lab: NewLab) -> None:
    lab = new_lab(pods=PODS)
    with watching() as watch:
        expected = lab.inject("insert-race", 3)
        snapshot = watch.end()
    assert expected.count == 0 < expected.counter
    assert dropped_in(lab, snapshot) == []
    assert table_of(snapshot, lab.node).clash_resolved == expected.counter
    (finding,) = findings_about(snapshot, lab.node.owner)
    assert (finding.cause, finding.severity, finding.packets) == ("ct-insert-race-dns", "info", 0)
    assert evidence_of(finding)["clash_resolved"] == expected.counter
    assert {one.severity for one in findings_about(snapshot, *(pod.owner for pod in lab.pods))} == set()
    if snapshot.findings == (finding,):  # else another lab of this machine has an alarm of its own
        assert status(snapshot) == "ok"


def test_the_same_tuple_in_two_zones_is_two_entries_of_the_table(new_lab: NewLab) -> None:
    lab = new_lab(pods=PODS)
    one, other, *_, server = lab.pods
    # Each pod is a zone: both use the address of the first, and the same ports.
    other.ip(f"addr add {one.ipv4}/32 dev lo")
    zones = f'iifname "{one.veth}" ct zone set 41\niifname "{other.veth}" ct zone set 42'
    lab.node.add_nft_rule("inet", "z", "type filter hook prerouting priority -300;", zones)
    with server.sink(OTHER) as sink, watching() as watch:
        for sport in range(6000, 6007):
            one.udp(server.ipv4, OTHER, 1, sport=sport, source=one.ipv4)
        for sport in range(6000, 6003):
            other.udp(server.ipv4, OTHER, 1, sport=sport, source=one.ipv4)
        assert settled(sink.received, 10) == 10
        snapshot = watch.end()
    table = table_of(snapshot, lab.node)
    assert {zone: entries for zone, entries in table.zones.items() if zone != "0"} == {"41": 7, "42": 3}
    assert sum(table.zones.values()) == table.entries == lab.node.conntrack()["entries"]


# ----------------------------------------------------------------------------------------------------
# Since when is counted


def test_failures_from_before_the_watch_are_not_the_first_packets_verdict(new_lab: NewLab) -> None:
    lab = new_lab(pods=PODS)
    assert lab.inject("snat-clash", 12).counter == 12
    with watching() as watch:
        rule = lab.inject("iptables-input", 1)
        expected = lab.inject("snat-clash", 9)
        snapshot = watch.end()
    assert (expected.count, expected.counter, rule.counter) == (9, 9, 1)
    rows = dropped_in(lab, snapshot)
    assert {(row.cause, row.verdict, row.packets) for row in rows} == {
        ("ct-snat-port-clash", "clash", 9), ("networkpolicy-drop", "rule", 1)
    }  # fmt: skip
    assert table_of(snapshot, lab.node).insert_failed == 9


def test_a_rules_drop_after_failures_from_before_the_watch_is_the_rules(new_lab: NewLab) -> None:
    lab = new_lab(pods=PODS)
    one, *_, server = lab.pods
    assert lab.inject("snat-clash", 12).counter == 12
    with legacy_drop(lab.node, "raw", "PREROUTING") as counter, watching() as watch:
        one.udp(server.ipv4, RULED, 5)
        assert counter(5) == 5
        snapshot = watch.end()
    (row,) = dropped_in(lab, snapshot)
    assert (row.cause, row.verdict, row.packets) == ("networkpolicy-drop", "rule", 5)


def test_namespaces_made_during_the_watch_have_exact_verdicts(new_lab: NewLab) -> None:
    """Also those that are given the inode of one that is gone, whose statistics had stood elsewhere."""
    own_cpus = os.sched_getaffinity(0)
    inodes: list[int] = []
    with watching() as watch:
        # One CPU, so that the namespaces' statistics are the same CPU's; their verdicts may not be each other's.
        os.sched_setaffinity(0, {min(own_cpus)})
        try:
            while len(inodes) < 3 or (len(inodes) < 8 and len(set(inodes)) == len(inodes)):
                lab = new_lab(pods=PODS[-2:])
                expected = lab.inject("snat-clash", 1)
                assert (expected.count, expected.counter) == (1, 1)
                inodes.append(lab.node.inode)
                lab.down()
        finally:
            os.sched_setaffinity(0, own_cpus)
        snapshot = watch.end()
    rows = drops_of(snapshot, expected.owner)
    assert {(row.cause, row.verdict, row.confidence) for row in rows} == {("ct-snat-port-clash", "clash", "likely")}
    assert sum(row.packets for row in rows) == len(inodes)


# ----------------------------------------------------------------------------------------------------
# Where less can be seen


def test_without_statistics_at_the_packet_those_of_the_window_decide_and_say_so(
    new_lab: NewLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a kernel that does not tell where its conntrack statistics stand."""
    package = Path(bpf.__file__).parents[1]
    shutil.copytree(package, tmp_path / "k8sdiag", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "probes").symlink_to(bpf.probes_directory())
    with (tmp_path / "k8sdiag/host/loader.py").open("a") as loader:
        loader.write('\nCONNTRACK_GROUPS = tuple(group for group in CONNTRACK_GROUPS if group[0] != "statistics")\n')
    monkeypatch.setattr(bpf, "_PACKAGE", tmp_path / "k8sdiag")  # the probe is compiled by that copy
    lab = new_lab(pods=PODS)
    with watching() as watch:
        expected = lab.inject("snat-clash", 15)
        snapshot = watch.end()
    assert {one.status for one in snapshot.capabilities if one.signal == "conntrack"} == {"counters"}
    assert expected.counter == 15
    (row,) = dropped_in(lab, snapshot)
    assert (row.cause, row.packets, row.confidence) == ("ct-snat-port-clash", 15, "possible")
    assert row.verdict in (None, "unknown")
    (finding,) = findings_about(snapshot, expected.owner)
    assert finding.confidence == "possible"
    assert "undecided between ct-snat-port-clash and networkpolicy-drop" in evidence_of(finding)
