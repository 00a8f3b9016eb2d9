# Hand-made drops, and the Snapshots the engine's own accounting makes of them.

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from k8sdiag import causes
from k8sdiag.causes.cause import all_flows
from k8sdiag.engine import _drop_count, _namespaces, _owners
from k8sdiag.facts import Capability, Cost, Lost, Node
from k8sdiag.snapshot import ConntrackRow, DropRow, Finding, HolderRow, Owner, ProtocolRow, Snapshot, Tuple

FULL = (
    Capability("drops", "full", "raw_tracepoint kfree_skb"),
    Capability("symbols", "full", "/proc/kallsyms"),
)
TRACKING = (*FULL, Capability("conntrack", "inferred", "statistics read by the drop probe"))
NODE_NETNS = 4026531840


def pod(namespace: str, name: str, workload: str | None = None) -> Owner:
    return Owner("pod", name, namespace, workload, f"uid-{namespace}-{name}", "netns", "proven")


def drop(owner: Owner, packets: int, cause: str = "closed-port", **changes: object) -> DropRow:
    looks = {
        "closed-port": ("NO_SOCKET", "__udp4_lib_rcv", None),
        "networkpolicy-drop": ("NETFILTER_DROP", "nft_do_chain", "FORWARD"),
        "rp-filter": ("IP_RPFILTER", "ip_rcv_finish_core", None),
        "ct-table-full": ("NETFILTER_DROP", "nf_hook_slow", "PRE_ROUTING"),
        "ct-snat-port-clash": ("NETFILTER_DROP", "nf_hook_slow", "POST_ROUTING"),
        "ct-invalid-rst": ("NO_SOCKET", "tcp_v4_rcv", None),
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


def translated(owner: Owner, packets: int, **changes: object) -> DropRow:
    """A lookup of a pod, sent to a service address, whose translation met a port in use."""
    looks: dict[str, object] = {
        "direction": "out", "src": "10.244.1.9", "sport": 41234, "dst": "10.96.0.10", "dport": 53,
        "service": "10.96.0.10:53", "reply": Tuple("10.244.2.7", "10.244.2.1", 53, 40000), "nat": "both",
        "conntrack": "new", "verdict": "clash", "confidence": "likely", "netns": NODE_NETNS,
    }  # fmt: skip
    return drop(owner, packets, "ct-snat-port-clash", **looks | changes)


def connections(
    holders: Sequence[tuple[Owner, int]] = (), *, owner: Owner | None = None, **changes: object
) -> ConntrackRow:
    """The node's table, full of what `holders` opened; a fourth of that without a reply. Nothing counted."""
    opened = sum(entries for _, entries in holders)
    row = ConntrackRow(
        netns=NODE_NETNS, owner=owner or Owner("host", "worker-1"), count=opened, max=opened, buckets=65_536, new=None,
        insert_failed=0, drop=0, early_drop=0, clash_resolved=None, invalid=0, chain_too_long=0, found=0,
        growth_per_s=0.0, full_in_s=None, table_t_ns=57 * 10**9, entries=opened, unreplied=opened // 4, stale=12,
        zones={"0": opened}, holders=tuple(HolderRow(each, n, n // 5, n // 4) for each, n in holders),
        protocols=(
            ProtocolRow("tcp", "ESTABLISHED", opened - opened // 4, 0, 86_400.0),
            ProtocolRow("udp", None, opened // 4, opened // 4, 29.0),
        ),
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def snapshot(
    drops: Sequence[DropRow], *, t_ns: int = 60 * 10**9, window_s: float = 10.0, lost: Lost | None = None,
    capabilities: Sequence[Capability] | None = None, cost: Cost | None = None,
    tables: Sequence[ConntrackRow] = (), findings: Sequence[Finding] | None = None,
) -> Snapshot:  # fmt: skip
    rows = sorted(drops, key=lambda row: (row.benign, -row.packets))
    if findings is None:
        findings = causes.findings(causes.Window(window_s, rows, all_flows, tables))
    if capabilities is None:
        capabilities = TRACKING if tables else FULL
    return Snapshot(
        t_ns=t_ns, window_s=window_s, boot_to_wall_ns=1_790_000_000 * 10**9,
        node=Node("worker-1", "6.18.5", NODE_NETNS, architecture="x86_64"),
        findings=tuple(findings),
        namespaces=_namespaces(rows, all_flows), owners=_owners(rows, all_flows, tables), drops=tuple(rows),
        total=_drop_count(rows),
        skbs=sum(row.skbs for row in rows), rate_pps=sum(row.rate_pps for row in rows if not row.benign),
        lost=lost or Lost(), cost=cost, capabilities=tuple(capabilities),
        conntrack=tuple(tables),
    )  # fmt: skip
