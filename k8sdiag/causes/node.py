"""Causes 45 to 54: devices, queues and CPUs of the node."""

from __future__ import annotations

from k8sdiag.causes.cause import Case, Cause, Drop, Severities, devices_of, within
from k8sdiag.snapshot import Fix, RuledOut

_QDISC_REASONS = frozenset(
    ["QDISC_DROP", "QDISC_OVERLIMIT", "QDISC_BURST_DROP", "FQ_FLOW_LIMIT", "FQ_BAND_LIMIT", "FQ_HORIZON_LIMIT"]
)


def _is_qdisc(drop: Drop) -> bool:
    if drop.reason in _QDISC_REASONS:
        return True
    return not drop.reason and drop.location in ("__dev_queue_xmit", "kfree_skb_list")


def _is_backlog(drop: Drop) -> bool:
    if drop.reason == "CPU_BACKLOG":
        return True
    return drop.reason in ("", "NOT_SPECIFIED") and drop.location in (
        "enqueue_to_backlog",
        "netif_rx_internal",
        "gro_cells_receive",
    )


def _qdisc_fix(case: Case) -> tuple[Fix, ...]:
    device = devices_of(case)[0]
    return (
        Fix(
            "raise the bandwidth limit (annotation kubernetes.io/ingress-bandwidth or egress-bandwidth), or send less",
            within(case, f"tc -s qdisc show dev {device}"),
            f"network namespace {case.netns}, device {device}",
            "the device's queue was full: it is fed faster than its limit lets it send",
            "none: this only shows the queue",
            "nothing to undo",
        ),
    )


def _backlog_fix(_case: Case) -> tuple[Fix, ...]:
    return (
        Fix(
            "give softirq work more CPU, or let a burst wait in a longer queue",
            "sysctl -w net.core.netdev_max_backlog=$((4 * $(sysctl -n net.core.netdev_max_backlog)))",
            "the whole node",
            "a CPU's input queue was full (column 2 of /proc/net/softnet_stat)",
            "a longer queue means more delay under load",
            "sysctl -w net.core.netdev_max_backlog=$(($(sysctl -n net.core.netdev_max_backlog) / 4))",
        ),
    )


CAUSES = (
    Cause(
        slug="qdisc-overlimit",
        title="a bandwidth limit or full queue drops packets",
        severities=Severities(1.0, 100.0, 10),
        claims=_is_qdisc,
        feels="Transfers are slower than the network; bursts lose packets.",
        proof="Drop reason of the queueing discipline; `tc -s qdisc` counts the same on that device.",
        ruled_out=(RuledOut("softnet-backlog", "dropped on sending, by the queueing discipline"),),
        fix=_qdisc_fix,
    ),
    Cause(
        slug="softnet-backlog",
        title="a CPU's input queue overflowed",
        severities=Severities(0.1, 10.0, 3),
        claims=_is_backlog,
        feels="Bursts lose packets on all pods of the node, worst when a CPU is busy.",
        proof="Drop reason CPU_BACKLOG; /proc/net/softnet_stat counts the same per CPU.",
        ruled_out=(RuledOut("qdisc-overlimit", "dropped on receiving, before any protocol"),),
        fix=_backlog_fix,
    ),
)
