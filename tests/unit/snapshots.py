# Hand-made drops, and the Snapshots the engine's own accounting makes of them.

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from k8sdiag import causes
from k8sdiag.causes.cause import all_flows
from k8sdiag.engine import _drop_count, _namespaces, _owners
from k8sdiag.facts import Capability, Cost, Lost, Node
from k8sdiag.snapshot import DropRow, Owner, Snapshot

FULL = (
    Capability("drops", "full", "raw_tracepoint kfree_skb"),
    Capability("symbols", "full", "/proc/kallsyms"),
)


def pod(namespace: str, name: str, workload: str | None = None) -> Owner:
    return Owner("pod", name, namespace, workload, f"uid-{namespace}-{name}", "netns", "proven")


def drop(owner: Owner, packets: int, cause: str = "closed-port", **changes: object) -> DropRow:
    looks = {
        "closed-port": ("NO_SOCKET", "__udp4_lib_rcv", None),
        "networkpolicy-drop": ("NETFILTER_DROP", "nft_do_chain", "FORWARD"),
        "rp-filter": ("IP_RPFILTER", "ip_rcv_finish_core", None),
        "udp-rcvbuf": ("SOCKET_RCVBUFF", "__udp_enqueue_schedule_skb", None),
        "benign": ("OTHERHOST", "ip_rcv_core", None),
    }
    reason, location, hook = looks[cause]
    row = DropRow(
        reason=reason, location=location, hook=hook, cause=cause, benign=cause == causes.BENIGN, owner=owner,
        peer=Owner("external", "192.0.2.7", how="ip", confidence="proven"), service=None, direction="in",
        family="ipv4", protocol="udp", src="192.0.2.7", dst="192.0.2.1", sport=None, dport=5353, reply=None,
        conntrack=None, device="eth0", netns=4026532187, skbs=packets, packets=packets, bytes=packets * 64,
        flows=1, rate_pps=packets / 10,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def snapshot(
    drops: Sequence[DropRow], *, t_ns: int = 60 * 10**9, window_s: float = 10.0, lost: Lost | None = None,
    capabilities: Sequence[Capability] = FULL, cost: Cost | None = None,
) -> Snapshot:  # fmt: skip
    rows = sorted(drops, key=lambda row: (row.benign, -row.packets))
    return Snapshot(
        t_ns=t_ns, window_s=window_s, boot_to_wall_ns=1_790_000_000 * 10**9,
        node=Node("worker-1", "6.18.5", 4026531840, architecture="x86_64"),
        findings=tuple(causes.findings(causes.Window(window_s, rows))),
        namespaces=_namespaces(rows, all_flows), owners=_owners(rows, all_flows), drops=tuple(rows),
        total=_drop_count(rows),
        skbs=sum(row.skbs for row in rows), rate_pps=sum(row.rate_pps for row in rows if not row.benign),
        lost=lost or Lost(), cost=cost, capabilities=tuple(capabilities),
    )  # fmt: skip
