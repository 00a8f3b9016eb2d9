"""Causes 19 to 27: the packet's way does not exist, or it came by the wrong one."""

from __future__ import annotations

from k8sdiag.causes.cause import Case, Cause, Drop, Severities, devices_of, within
from k8sdiag.snapshot import Fix, RuledOut


def _rp_filter_fix(case: Case) -> tuple[Fix, ...]:
    # sysctl(8) takes a dot for a separator and a slash for the dot of a VLAN device.
    names = ["all", *(device.replace(".", "/") for device in devices_of(case))]
    settings = [f"net.ipv4.conf.{name}.rp_filter" for name in names]
    return (
        Fix(
            "make reverse-path filtering loose, or mend the routes so that replies leave where requests came in",
            within(case, "sysctl -w " + " ".join(f"{name}=2" for name in settings)),
            f"network namespace {case.netns}; note the values first, the greater of the two acts",
            "the route back to the source does not leave by the device the packet came in by",
            "loose mode accepts packets whose source is reachable by any device",
            within(case, "sysctl -w " + " ".join(f"{name}=1" for name in settings)),
        ),
    )


def _no_route_fix(case: Case) -> tuple[Fix, ...]:
    destination = next((row.dst for row in case.rows if row.dst), "ADDRESS")
    return (
        Fix(
            "see why there is no route, and let the CNI program it again",
            within(
                case,
                f"ip route get {destination}",
                "ip route show table all | grep -E '^(unreachable|blackhole|prohibit)'",
            ),
            f"network namespace {case.netns}",
            "the routing table has no usable entry for these destinations",
            "none: this only looks",
            "nothing to undo",
        ),
    )


def _is_rp_filter(drop: Drop) -> bool:
    if drop.reason == "IP_RPFILTER":
        return True
    return not drop.reason and drop.location in ("ip_rcv_finish_core", "ip_rcv_finish")


def is_no_route(drop: Drop) -> bool:
    if drop.reason in ("IP_INNOROUTES", "IP_OUTNOROUTES", "IP_INADDRERRORS"):
        return True
    return drop.reason in ("", "NOT_SPECIFIED") and drop.location in ("ip_error", "ip6_pkt_drop", "dst_discard")


CAUSES = (
    Cause(
        slug="rp-filter",
        title="reverse-path filtering drops packets",
        severities=Severities(0.1, 10.0, 3),
        claims=_is_rp_filter,
        feels="Traffic works one way, or only through one of several interfaces.",
        proof="Drop reason IP_RPFILTER; TcpExt IPReversePathFilter of that namespace counts the same packets.",
        ruled_out=(RuledOut("networkpolicy-drop", "dropped by the routing code before any filter hook"),),
        fix=_rp_filter_fix,
    ),
    Cause(
        slug="no-route",
        title="there is no route for these packets",
        severities=Severities(0.5, 20.0, 5),
        claims=is_no_route,
        feels="Connections fail with “network unreachable” or “no route to host”.",
        proof="Drop reason IP_INNOROUTES or IP_OUTNOROUTES, or the drop in ip_error.",
        ruled_out=(RuledOut("networkpolicy-drop", "no netfilter verdict: the routing code refused"),),
        fix=_no_route_fix,
    ),
)
