"""Causes 11 to 18: somebody decided that the packet shall not pass."""

from __future__ import annotations

from k8sdiag.causes.cause import Case, Cause, Drop, Severities, devices_of, within
from k8sdiag.snapshot import Fix, RuledOut

# Where kernels without reasons (before 5.17) drop for a classifier; a protocol nobody handles, which ends in the
# first of these too, is no IP and benign.
_TC_LOCATIONS = frozenset(("__netif_receive_skb_core", "sch_handle_ingress", "sch_handle_egress"))
_NETFILTER_LOCATIONS = frozenset(("nf_hook_slow", "nf_hook_slow_list", "nft_do_chain"))


def is_netfilter(drop: Drop) -> bool:
    """Whether a netfilter hook refused the packet, be it a rule or connection tracking."""
    if drop.reason == "NETFILTER_DROP" or drop.hook:
        return True
    return not drop.reason and drop.location in _NETFILTER_LOCATIONS


def _is_tc(drop: Drop) -> bool:
    return drop.reason in ("TC_INGRESS", "TC_EGRESS") or (not drop.reason and drop.location in _TC_LOCATIONS)


def _netfilter_fix(case: Case) -> tuple[Fix, ...]:
    where = f"network namespace {case.netns}"
    native = "nft -a list ruleset | grep -n -B3 -A3 -E 'drop|reject'"
    legacy = "iptables-legacy-save -c | grep -E 'DROP|REJECT'"
    is_native = any(row.location == "nft_do_chain" for row in case.rows)
    command = within(case, native) if is_native else within(case, legacy, native)
    return (
        Fix(
            "find the rule, then allow the flow or accept that it is refused",
            command,
            where,
            "a filter rule or a chain's policy dropped these packets",
            "none: this only lists rules",
            "nothing to undo",
        ),
    )


def _tc_fix(case: Case) -> tuple[Fix, ...]:
    devices = devices_of(case)
    shows = [f"tc filter show dev {device} {way}" for device in devices for way in ("ingress", "egress")]
    return (
        Fix(
            "look at the classifier that drops; with Cilium, ask its own monitor",
            within(case, *shows) + "; cilium-dbg monitor --type drop",
            f"network namespace {case.netns}",
            "a tc or BPF program returned TC_ACT_SHOT",
            "none: this only lists filters",
            "nothing to undo",
        ),
    )


CAUSES = (
    Cause(
        slug="networkpolicy-drop",
        title="a firewall rule or NetworkPolicy drops packets",
        severities=Severities(5.0, None, 20),
        claims=is_netfilter,
        feels="Connections time out (DROP) or are refused at once (REJECT), always and only for what the rule names.",
        proof="The netfilter verdict was DROP, and no counter of conntrack rose with it where that can be told; "
        "nft_do_chain as the place proves a rule, the hook tells which chains.",
        ruled_out=(RuledOut("tc-bpf-drop", "the kernel's reason is netfilter, not tc"),),
        fix=_netfilter_fix,
        confidence="likely",
        ruled_out_by_verdict=(
            RuledOut("ct-table-full", "conntrack counted nothing at these drops"),
            RuledOut("ct-snat-port-clash", "conntrack counted nothing at these drops"),
        ),
    ),
    Cause(
        slug="tc-bpf-drop",
        title="a tc or BPF classifier drops packets",
        severities=Severities(5.0, None, 20),
        claims=_is_tc,
        feels="As with a firewall rule: what it does not like times out.",
        proof="Drop reason TC_INGRESS or TC_EGRESS on the named device.",
        ruled_out=(RuledOut("networkpolicy-drop", "no netfilter hook was reached"),),
        fix=_tc_fix,
    ),
)
