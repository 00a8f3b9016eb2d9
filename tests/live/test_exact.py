"""Counts that must be exact, each against a counter of the kernel's that knows nothing of k8sdiag."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from k8sdiag.host.lab import FAULTS, Lab, PodSpec
from tests.live.watch import drops_of, watching

pytestmark = pytest.mark.live
NewLab = Callable[..., Lab]
NETNS = PodSpec(kind="netns", name="plain")
POD = PodSpec("shop", "cart-7d9f8c6b5-x2x4q")


@pytest.mark.parametrize("family", [4, 6])
def test_datagrams_to_a_closed_port_in_a_named_namespace_are_one_row(new_lab: NewLab, family: int) -> None:
    lab = new_lab(pods=[NETNS, POD])
    target, sender = lab.pods
    address = target.ipv4 if family == 4 else target.ipv6
    before = target.udp_no_ports(family)
    with watching() as watch:
        sender.udp(address, 4711, 23)
        snapshot = watch.end()
    assert target.udp_no_ports(family) - before == 23
    (row,) = drops_of(snapshot, target.owner)
    assert (row.packets, row.skbs, row.reason, row.location) == (
        23,
        23,
        "NO_SOCKET",
        "__udp4_lib_rcv" if family == 4 else "__udp6_lib_rcv",
    )
    assert (row.cause, row.owner.kind, row.owner.how, row.owner.confidence) == (
        "closed-port",
        "netns",
        "netns",
        "proven",
    )
    assert (row.dport, row.dst, row.protocol, row.netns) == (4711, address, "udp", target.inode)
    assert row.peer is not None
    assert row.peer.label == sender.owner


@pytest.mark.parametrize("driver", ["cgroupfs", "systemd"])
@pytest.mark.parametrize("named", [True, False])
def test_a_pod_is_named_by_its_cgroup_path(new_lab: NewLab, driver: str, *, named: bool) -> None:
    lab = new_lab(pods=[PodSpec("shop", "cart-7d9f8c6b5-x2x4q", driver=driver, named=named), NETNS])  # type: ignore[arg-type]
    pod, sender = lab.pods
    with watching() as watch:
        sender.udp(pod.ipv4, 4711, 29)
        snapshot = watch.end()
    (row,) = drops_of(snapshot, "shop/cart-7d9f8c6b5-x2x4q")
    assert (row.packets, row.owner.kind, row.owner.namespace) == (29, "pod", "shop")


def test_a_million_drops_as_fast_as_two_cores_make_them_are_all_counted(new_lab: NewLab) -> None:
    lab = new_lab(pods=[NETNS], ipv6=False)
    (target,) = lab.pods
    before = target.udp_no_ports()
    with watching() as watch:
        target.flood_udp(target.ipv4, 4711, 1_000_000)
        snapshot = watch.end()
    kernel = target.udp_no_ports() - before
    assert kernel == 1_000_000
    counted = sum(row.skbs for row in drops_of(snapshot, target.owner) if row.reason == "NO_SOCKET")
    assert (counted, snapshot.lost.events, snapshot.lost.keys) == (kernel, 0, 0)


def test_a_million_drops_by_a_rule_are_all_counted(new_lab: NewLab) -> None:
    lab = new_lab(pods=[POD, NETNS], ipv6=False, conntrack=False)
    sender, receiver = lab.pods
    lab.node.tool(
        ["nft", "table ip t { chain f { type filter hook forward priority 0; udp dport 4711 counter drop; }; }"]
    )
    with watching() as watch:
        sender.flood_udp(receiver.ipv4, 4711, 1_000_000)
        snapshot = watch.end()
    kernel = lab.node.nft_counter("ip", "t")
    assert kernel == 1_000_000
    rows = drops_of(snapshot, sender.owner)
    assert {(row.reason, row.hook, row.cause) for row in rows} == {("NETFILTER_DROP", "FORWARD", "networkpolicy-drop")}
    assert (sum(row.skbs for row in rows), snapshot.lost.events, snapshot.lost.keys) == (kernel, 0, 0)


def test_a_segmentation_offload_buffer_is_one_buffer_and_its_segments_are_packets(new_lab: NewLab) -> None:
    lab = new_lab(pods=[POD, NETNS], ipv6=False, conntrack=False)
    sender, receiver = lab.pods
    lab.node.tool(
        ["nft", "table ip t { chain f { type filter hook forward priority 0; udp dport 4711 counter drop; }; }"]
    )
    bursts = [2, 3, 5, 7, 11, 13]
    with watching() as watch:
        sender.udp_bursts(receiver.ipv4, 4711, bursts)
        snapshot = watch.end()
    rows = drops_of(snapshot, sender.owner)
    assert sum(row.skbs for row in rows) == lab.node.nft_counter("ip", "t") == len(bursts)
    assert sum(row.packets for row in rows) == sum(bursts)


def test_a_flood_from_random_addresses_costs_detail_but_never_totals(new_lab: NewLab) -> None:
    lab = new_lab(pods=[NETNS], ipv6=False, conntrack=False)
    (target,) = lab.pods
    before = target.udp_no_ports()
    with watching() as watch:
        target.flood_udp(target.ipv4, 4711, 1_000_000, random_source=True)
        snapshot = watch.end()
    kernel = target.udp_no_ports() - before
    assert kernel == 1_000_000
    (cause,) = [cause for row in snapshot.owners if row.owner.label == target.owner for cause in row.causes]
    assert (cause.cause, cause.packets, cause.connections) == ("closed-port", kernel, None)
    assert (snapshot.lost.events, snapshot.lost.keys) == (0, 0)


@pytest.mark.parametrize("ports", [1, 50])
def test_reading_as_fast_as_possible_during_a_flood_loses_nothing(new_lab: NewLab, ports: int) -> None:
    """What lookup-and-delete under a running program loses; see CONTRIBUTING, "How drops are counted"."""
    lab = new_lab(pods=[NETNS], ipv6=False)
    (target,) = lab.pods
    before = target.udp_no_ports()
    with watching(interval_s=0.0001) as watch:
        floods = [
            threading.Thread(
                target=target.flood_udp, args=(target.ipv4, 4000 + port, 300_000 // ports), kwargs={"processes": 1}
            )
            for port in range(ports)
        ]
        for flood in floods:
            flood.start()
        for flood in floods:
            flood.join()
        snapshot = watch.end()
    kernel = target.udp_no_ports() - before
    rows = [row for row in drops_of(snapshot, target.owner) if row.reason == "NO_SOCKET"]
    assert kernel == 300_000 // ports * ports
    assert sum(row.skbs for row in rows) == kernel
    assert len(watch.snapshots) > 10
    assert {row.dport: row.skbs for row in rows} == {4000 + port: 300_000 // ports for port in range(ports)}


COUNTED = [
    name
    for name, fault in FAULTS.items()
    if name != "benign-noise" and not fault.host_wide and not fault.lossless and not fault.vm_only
]


@pytest.mark.parametrize("bridge", [False, True], ids=["routed", "bridge"])
@pytest.mark.parametrize("fault", COUNTED)
def test_each_fault_has_the_right_owner_cause_and_count(new_lab: NewLab, fault: str, *, bridge: bool) -> None:
    lab = new_lab(bridge=bridge)
    with watching() as watch:
        expected = lab.inject(fault, 13)
        snapshot = watch.end()
    assert expected.count == expected.counter
    rows = [row for row in drops_of(snapshot, expected.owner) if row.cause == expected.cause]
    assert sum(row.skbs for row in rows) == expected.counter
    others = [row for row in snapshot.drops if not row.benign and row not in rows and row.netns in _inodes(lab)]
    assert others == []
    if expected.hook:
        assert {row.hook for row in rows} == {expected.hook}
    (finding,) = [
        finding for finding in snapshot.findings if expected.owner in {owner.label for owner in finding.victims}
    ]
    assert (finding.cause, finding.packets) == (expected.cause, expected.count)


def _inodes(lab: Lab) -> set[int]:
    return {lab.node.inode, *(pod.inode for pod in lab.pods)}


def test_a_full_input_queue_is_counted_as_softnet_counts_it(new_lab: NewLab) -> None:
    lab = new_lab()
    with watching() as watch:
        expected = lab.inject("softnet-backlog", 13)
        snapshot = watch.end()
    rows = [row for row in snapshot.drops if row.cause == "softnet-backlog"]
    assert sum(row.skbs for row in rows) + snapshot.lost.events == expected.counter
    assert expected.owner in {row.owner.label for row in rows}


def test_seven_drops_stand_out_of_benign_noise(new_lab: NewLab) -> None:
    lab = new_lab()
    with watching() as watch:
        lab.inject("benign-noise", 23)
        snapshot = watch.end()
    ours = [row for row in snapshot.drops if row.netns in _inodes(lab)]
    assert sum(row.packets for row in ours) > 23
    assert [row for row in ours if not row.benign] == []
    with watching() as watch:
        lab.inject("benign-noise", 23)
        lab.inject("closed-port", 7, lab.pods[0])
        snapshot = watch.end()
    real = [row for row in snapshot.drops if row.netns in _inodes(lab) and not row.benign]
    assert [(row.owner.label, row.cause, row.packets) for row in real] == [(lab.pods[0].owner, "closed-port", 7)]
