# What connection tracking did to a packet, and what only looks like it.

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from k8sdiag.causes import (
    BENIGN,
    BY_SLUG,
    UNDECIDED_PORT,
    Drop,
    Window,
    cause_of,
    confidence_of,
    decide,
    findings,
)
from k8sdiag.causes.conntrack import CAUSES, SLUGS
from k8sdiag.snapshot import ConntrackRow, DropRow, Finding, HolderRow, Owner, RuledOut, Tuple

TCP, UDP = 6, 17
NODE, POD = 4026531840, 4026532100
SYN = Drop("NETFILTER_DROP", "nf_hook_slow", "PRE_ROUTING", "", 2, TCP, "10.244.1.6", "10.96.0.1", 40000, 80,
           segment="SYN")  # fmt: skip
NEW = SYN._replace(hook="POST_ROUTING", conntrack="NEW", nat="SRC", reply_dport=40000)
QUERY = NEW._replace(protocol=UDP, dport=53, segment="", nat="DST")
LATE = Drop("NO_SOCKET", "tcp_v4_rcv", "", "", 2, TCP, "10.244.2.2", "10.244.1.6", 8080, 40000, segment="OTHER")
MIDDLE = SYN._replace(hook="FORWARD", segment="OTHER")
STALE = Drop("NEIGH_FAILED", "arp_error_report", "", "CONFIRMED", 2, UDP, "10.244.1.6", "10.96.0.10", 40000, 53,
             nat="DST", reply_dport=40000)  # fmt: skip

CART = Owner("pod", "cart", "prod", "Deployment/Cart", "u1", "veth", "proven")
SHOP = Owner("pod", "shop", "prod", None, "u2", "veth", "proven")
CRAWLER = Owner("pod", "crawler", "batch", None, "u3", "conntrack", "proven")
HOST = Owner("host", "worker-1", how="static", confidence="proven")
UNKNOWN = Owner("unknown", "4026531999")


def table(netns: int = NODE, owner: Owner = HOST, **more: object) -> ConntrackRow:
    fields: dict[str, object] = {
        "count": 100, "max": 262_144, "buckets": 262_144, "new": None, "insert_failed": 0, "drop": 0, "early_drop": 0,
        "clash_resolved": 0, "invalid": 0, "chain_too_long": 0, "found": 0, "growth_per_s": 0.0, "full_in_s": None,
        **more,
    }  # fmt: skip
    return ConntrackRow(netns=netns, owner=owner, **fields)  # type: ignore[arg-type]


QUIET = table()
REFUSING = table(drop=10, count=262_144)
CLASHING = table(drop=10, insert_failed=10, found=10)
MEETING_INVALID = table(invalid=7)


def cause(drop: Drop, here: ConntrackRow | None = QUIET, *elsewhere: ConntrackRow) -> str:
    """Of a drop in the namespace of the table `here`."""
    tables = [one for one in (here, *elsewhere) if one is not None]
    return decide(cause_of(drop), here, tables)


# ----------------------------------------------------------------------------------------------------
# Told by the packet's own verdict: statistics change nothing


@pytest.mark.parametrize("here", [None, QUIET, REFUSING, CLASHING, MEETING_INVALID])
@pytest.mark.parametrize(
    ("drop", "slug"),
    [
        # 1: no entry could be allocated
        (SYN._replace(verdict="REFUSED"), "ct-table-full"),
        (SYN._replace(verdict="REFUSED", hook="LOCAL_OUT"), "ct-table-full"),
        (SYN._replace(verdict="REFUSED", hook="UNKNOWN"), "ct-table-full"),
        (SYN._replace(verdict="REFUSED", family=10, src="fd00::6", dst="fd00::1"), "ct-table-full"),
        (SYN._replace(verdict="REFUSED", reason=""), "ct-table-full"),  # before 5.17
        (SYN._replace(verdict="REFUSED", reason="", dst="224.0.0.251"), "ct-table-full"),
        (SYN._replace(verdict="RULE"), "networkpolicy-drop"),  # raw table
        (SYN._replace(verdict="RULE", hook="LOCAL_OUT"), "networkpolicy-drop"),
        (SYN._replace(verdict="REFUSED", location="nft_do_chain"), "networkpolicy-drop"),
        (SYN._replace(verdict="UNKNOWN", location="nft_do_chain"), "networkpolicy-drop"),
        # 3, 4, 5: an entry was refused
        (NEW._replace(verdict="CLASH"), "ct-snat-port-clash"),
        (NEW._replace(verdict="CLASH", hook="LOCAL_IN"), "ct-snat-port-clash"),
        (NEW._replace(verdict="CLASH", hook="UNKNOWN"), "ct-snat-port-clash"),
        (NEW._replace(verdict="CLASH", reason=""), "ct-snat-port-clash"),
        (NEW._replace(verdict="INSERT_FAILED"), "ct-snat-port-clash"),
        (NEW._replace(verdict="RULE"), "networkpolicy-drop"),
        (NEW._replace(verdict="RULE", hook="LOCAL_IN"), "networkpolicy-drop"),
        (NEW._replace(verdict="CLASH", location="nft_do_chain"), "networkpolicy-drop"),
        (QUERY._replace(verdict="CLASH"), "ct-insert-race-dns"),
        (QUERY._replace(verdict="CLASH", nat="BOTH"), "ct-insert-race-dns"),  # the port was kept
        (QUERY._replace(verdict="CLASH", nat="BOTH", reply_dport=1024), "ct-snat-port-clash"),
        (QUERY._replace(verdict="CLASH", dport=5353), "ct-insert-race-dns"),  # no source port is translated: a race
        (QUERY._replace(verdict="CLASH", dport=5353, nat="DST"), "ct-insert-race-dns"),
        (QUERY._replace(verdict="CLASH", dport=5353, nat="SRC", reply_dport=QUERY.sport), "ct-snat-port-clash"),
        (QUERY._replace(verdict="CLASH", protocol=TCP), "ct-snat-port-clash"),
        (QUERY._replace(verdict="RULE"), "networkpolicy-drop"),
        # 8
        (NEW._replace(verdict="CHAIN_TOO_LONG"), "ct-chain-too-long"),
        (QUERY._replace(verdict="CHAIN_TOO_LONG"), "ct-chain-too-long"),
        # 10: the packet had its entry
        (NEW._replace(verdict="REFUSED", conntrack="CONFIRMED"), "nat-helper-seqadj"),
        (NEW._replace(verdict="REFUSED"), "nat-helper-seqadj"),
        (NEW._replace(verdict="RULE", conntrack="CONFIRMED"), "networkpolicy-drop"),
        # neither hook nor state leave conntrack a part in it
        (SYN._replace(hook="FORWARD", conntrack="NEW"), "networkpolicy-drop"),
        (SYN._replace(hook="LOCAL_OUT", conntrack="NEW"), "networkpolicy-drop"),
        (SYN._replace(hook="FORWARD", conntrack="CONFIRMED"), "networkpolicy-drop"),
        (SYN._replace(hook="FORWARD", conntrack="UNTRACKED"), "networkpolicy-drop"),
        (SYN._replace(hook="FORWARD"), "networkpolicy-drop"),  # a SYN is not INVALID
        (SYN._replace(reason="SECURITY_HOOK", hook=""), "unexplained"),
        # 9: translated to what cannot be reached
        (STALE, "stale-udp-dnat"),
        (STALE._replace(nat="BOTH", reason="IP_INNOROUTES", location="ip_error"), "stale-udp-dnat"),
        (STALE._replace(reason="NOT_SPECIFIED", location="ip_error"), "stale-udp-dnat"),
        (STALE._replace(reason="", location="ndisc_error_report"), "stale-udp-dnat"),
        (STALE._replace(nat="", reason="IP_INNOROUTES", location="ip_error"), "no-route"),
        (STALE._replace(nat="SRC", reason="IP_INNOROUTES", location="ip_error"), "no-route"),
        (STALE._replace(conntrack="NEW", reason="IP_INNOROUTES", location="ip_error"), "no-route"),
        (STALE._replace(protocol=TCP, reason="IP_INNOROUTES", location="ip_error"), "no-route"),
        (STALE._replace(nat=""), "unexplained"),
        (STALE._replace(reason="PKT_TOO_BIG", location="ip_forward"), "unexplained"),
    ],
)
def test_a_packet_with_a_verdict_has_its_cause_whatever_else_happened(
    drop: Drop, slug: str, here: ConntrackRow | None
) -> None:
    assert cause(drop, here) == slug


# ----------------------------------------------------------------------------------------------------
# Decided by the statistics of the window


@pytest.mark.parametrize("verdict", ["", "UNKNOWN"])
@pytest.mark.parametrize("reason", ["NETFILTER_DROP", ""])
@pytest.mark.parametrize("hook", ["PRE_ROUTING", "LOCAL_OUT", "UNKNOWN"])
def test_without_a_verdict_a_full_table_is_one_that_refused(hook: str, reason: str, verdict: str) -> None:
    drop = SYN._replace(hook=hook, reason=reason, verdict=verdict)
    assert cause(drop, REFUSING) == "ct-table-full"
    assert cause(drop, CLASHING) == "networkpolicy-drop"  # each clash raises `drop` too
    assert cause(drop, QUIET, replace(REFUSING, netns=POD)) == "networkpolicy-drop"  # another namespace's table
    assert cause(drop, None) == "networkpolicy-drop"


@pytest.mark.parametrize("verdict", ["", "UNKNOWN"])
@pytest.mark.parametrize("hook", ["POST_ROUTING", "LOCAL_IN"])
def test_without_a_verdict_a_clash_is_an_insert_that_failed(hook: str, verdict: str) -> None:
    clash, query = (drop._replace(hook=hook, verdict=verdict) for drop in (NEW, QUERY))
    assert cause(clash, CLASHING) == "ct-snat-port-clash"
    assert cause(query, CLASHING) == "ct-insert-race-dns"
    for drop in (clash, query):
        assert cause(drop, REFUSING) == "networkpolicy-drop"
        assert cause(drop, QUIET, replace(CLASHING, netns=POD)) == "networkpolicy-drop"
        assert cause(drop, None) == "networkpolicy-drop"
        assert cause(drop._replace(conntrack="CONFIRMED"), CLASHING) == "networkpolicy-drop"
        assert cause(drop._replace(hook="FORWARD"), CLASHING) == "networkpolicy-drop"


def test_without_a_verdict_long_chains_are_inserts_that_failed_without_a_clash() -> None:
    chains = table(insert_failed=10, chain_too_long=10)
    assert cause(NEW, chains) == "ct-chain-too-long"
    assert cause(NEW, replace(chains, drop=3)) == "ct-snat-port-clash"
    assert cause(NEW, replace(chains, chain_too_long=9)) == "ct-snat-port-clash"
    assert cause(NEW, replace(chains, chain_too_long=None)) == "ct-snat-port-clash"
    assert cause(NEW, replace(chains, insert_failed=0)) == "networkpolicy-drop"
    assert cause(SYN, chains) == "networkpolicy-drop"


@pytest.mark.parametrize("segment", ["OTHER", "FIN", "SYN_ACK"])
def test_a_segment_without_a_socket_is_a_conntrack_matter_if_some_table_met_invalid(segment: str) -> None:
    drop = LATE._replace(segment=segment)
    assert cause(drop, replace(QUIET, netns=POD), MEETING_INVALID) == "ct-invalid-rst"
    assert cause(drop, None, MEETING_INVALID) == "ct-invalid-rst"
    assert cause(drop, QUIET) == BENIGN
    assert cause(drop, None) == BENIGN


@pytest.mark.parametrize(("segment", "slug"), [("SYN", "closed-port"), ("", "closed-port"), ("RST", BENIGN)])
def test_a_syn_without_a_socket_met_a_closed_port_and_a_reset_nothing_at_all(segment: str, slug: str) -> None:
    assert cause(LATE._replace(segment=segment), MEETING_INVALID) == slug


@pytest.mark.parametrize("verdict", ["RULE", "", "UNKNOWN"])
@pytest.mark.parametrize("location", ["nft_do_chain", "nf_hook_slow"])
@pytest.mark.parametrize("hook", ["FORWARD", "LOCAL_IN"])
def test_a_rule_that_drops_what_has_no_entry_drops_invalid_if_there_was_some(
    hook: str, location: str, verdict: str
) -> None:
    drop = MIDDLE._replace(hook=hook, location=location, verdict=verdict)
    assert cause(drop, MEETING_INVALID) == "ct-invalid-drop-asym"
    assert cause(drop._replace(protocol=UDP, segment=""), MEETING_INVALID) == "ct-invalid-drop-asym"
    for end in ("FIN", "RST"):
        assert cause(drop._replace(segment=end), MEETING_INVALID) == BENIGN
        assert cause(drop._replace(segment=end), QUIET) == "networkpolicy-drop"
    assert cause(drop, QUIET, replace(MEETING_INVALID, netns=POD)) == "networkpolicy-drop"
    assert cause(drop, REFUSING) == "networkpolicy-drop"
    assert cause(drop, None) == "networkpolicy-drop"
    for state in ("NEW", "CONFIRMED", "UNTRACKED", "UNKNOWN"):
        assert cause(drop._replace(conntrack=state), MEETING_INVALID) == "networkpolicy-drop"


# Of a clash at a port that translation had chosen, the other clashes tell whether there was a free one.

CHANGED = NEW._replace(verdict="CLASH", reply_dport=1024)


@pytest.mark.parametrize(
    "drop",
    [
        CHANGED,
        CHANGED._replace(nat="BOTH"),
        CHANGED._replace(hook="LOCAL_IN"),
        CHANGED._replace(reason=""),
        CHANGED._replace(probed=True),
        CHANGED._replace(protocol=UDP, segment="", dport=53),
        CHANGED._replace(family=10, src="fd00::6", dst="fd00::1"),
    ],
)
@pytest.mark.parametrize("here", [None, QUIET, REFUSING, CLASHING])
def test_clashes_at_one_changed_port_are_a_clash_and_at_several_are_exhaustion(
    drop: Drop, here: ConntrackRow | None
) -> None:
    first = cause_of(drop)
    assert first == UNDECIDED_PORT
    tables = [here] if here else []
    assert decide(first, here, tables) == "ct-snat-port-clash"
    assert decide(first, here, tables, ports=1) == "ct-snat-port-clash"
    for ports in (2, 64_512):
        assert decide(first, here, tables, ports=ports) == "snat-port-exhaustion"


@pytest.mark.parametrize(
    ("drop", "slug"),
    [
        (CHANGED._replace(reply_dport=40000), "ct-snat-port-clash"),  # the port it was sent with
        (CHANGED._replace(nat=""), "ct-snat-port-clash"),
        (CHANGED._replace(nat="DST"), "ct-snat-port-clash"),
        (CHANGED._replace(verdict="INSERT_FAILED"), "ct-snat-port-clash"),
        (CHANGED._replace(verdict="CHAIN_TOO_LONG"), "ct-chain-too-long"),
        (CHANGED._replace(verdict="REFUSED", conntrack=""), "ct-table-full"),
        (CHANGED._replace(verdict="RULE"), "networkpolicy-drop"),
        (CHANGED._replace(location="nft_do_chain"), "networkpolicy-drop"),
        (QUERY._replace(verdict="CLASH", nat="BOTH"), "ct-insert-race-dns"),
    ],
)
def test_without_a_clash_at_a_changed_port_it_does_not_matter_how_many_there_were(drop: Drop, slug: str) -> None:
    assert cause_of(drop) != UNDECIDED_PORT
    assert decide(cause_of(drop), CLASHING, [CLASHING], ports=9) == slug


@pytest.mark.parametrize("ports", [1, 2])
@pytest.mark.parametrize(("probed", "confidence"), [(False, "likely"), (True, "proven")])
def test_a_clash_at_a_changed_port_is_as_sure_as_its_verdict(ports: int, probed: bool, confidence: str) -> None:
    first = cause_of(CHANGED)
    slug = decide(first, QUIET, [QUIET], ports=ports)
    assert confidence_of(slug, first, CHANGED.verdict, probed=probed, reason=CHANGED.reason) == confidence


@pytest.mark.parametrize("slug", [BENIGN, *BY_SLUG])
def test_what_is_decided_stays_as_it_is(slug: str) -> None:
    for here in (None, QUIET, REFUSING, CLASHING, MEETING_INVALID):
        for ports in (1, 2):
            assert decide(slug, here, [REFUSING, CLASHING, MEETING_INVALID], ports=ports) == slug


# ----------------------------------------------------------------------------------------------------
# Confidence


@pytest.mark.parametrize(
    ("drop", "here", "confidence"),
    [
        (SYN._replace(verdict="REFUSED", probed=True), QUIET, "proven"),
        (SYN._replace(verdict="REFUSED"), QUIET, "likely"),
        (SYN, REFUSING, "possible"),
        (NEW._replace(verdict="CLASH", probed=True), QUIET, "proven"),
        (NEW._replace(verdict="CLASH"), QUIET, "likely"),
        (NEW._replace(verdict="UNKNOWN"), CLASHING, "possible"),
        (NEW._replace(verdict="INSERT_FAILED"), QUIET, "possible"),
        (NEW._replace(verdict="INSERT_FAILED", probed=True), QUIET, "likely"),
        (SYN._replace(verdict="RULE"), QUIET, "likely"),
        (SYN, QUIET, "likely"),  # nothing was refused there: a rule
        (MIDDLE._replace(verdict="RULE"), MEETING_INVALID, "possible"),
        (LATE, MEETING_INVALID, "possible"),
        (LATE._replace(segment="SYN"), QUIET, "proven"),
        (STALE, QUIET, "likely"),
        (STALE._replace(nat="", reason="IP_RPFILTER"), QUIET, "proven"),
        (STALE._replace(nat="", reason="", location="ip_error"), QUIET, "likely"),  # the kernel gives no reason
        (STALE._replace(nat=""), QUIET, "possible"),  # unexplained
        (LATE, QUIET, "proven"),  # benign
    ],
)
def test_the_confidence_follows_how_it_was_told(drop: Drop, here: ConntrackRow, confidence: str) -> None:
    slug = cause(drop, here)
    assert confidence_of(slug, cause_of(drop), drop.verdict, probed=drop.probed, reason=drop.reason) == confidence


# ----------------------------------------------------------------------------------------------------
# Findings


def row(slug: str, owner: Owner, packets: int, **more: object) -> DropRow:
    fields: dict[str, object] = {
        "reason": "NETFILTER_DROP", "location": "nf_hook_slow", "hook": "PRE_ROUTING", "cause": slug, "benign": False,
        "owner": owner, "peer": None, "service": None, "direction": "in", "family": "ipv4", "protocol": "tcp",
        "src": "10.244.1.6", "dst": "10.96.0.1", "sport": None, "dport": 80, "reply": None, "conntrack": None,
        "device": "eth0", "netns": NODE, "skbs": packets, "packets": packets, "bytes": 60 * packets, "flows": 1,
        "rate_pps": 0.0, "verdict": "refused", "confidence": "likely", **more,
    }  # fmt: skip
    return DropRow(**fields)  # type: ignore[arg-type]


def found(*rows: DropRow, tables: tuple[ConntrackRow, ...] = (), seconds: float = 10) -> list[Finding]:
    return findings(Window(seconds, rows, tables=tables))


def said(finding: Finding) -> dict[str, tuple[object, str]]:
    assert all(one.source for one in finding.evidence)
    names = [one.name for one in finding.evidence]
    assert len(names) == len(set(names))
    return {one.name: (one.value, one.unit) for one in finding.evidence}


def holder(owner: Owner, entries: int) -> HolderRow:
    return HolderRow(owner, entries, 0, 0)


FULL = table(
    count=262_100, drop=33, insert_failed=3, early_drop=4, growth_per_s=12.5, full_in_s=3.52, entries=260_000,
    holders=(holder(UNKNOWN, 99_000), holder(CRAWLER, 80_000), holder(HOST, 26_000), holder(CART, 25_999)),
)  # fmt: skip


def test_a_full_table_names_those_who_fill_it_and_those_who_lose() -> None:
    (one,) = found(row("ct-table-full", CART, 20), row("ct-table-full", SHOP, 10), tables=(FULL,))
    assert [owner.name for owner in one.victims] == ["cart", "shop"]
    assert [owner.name for owner in one.culprits] == ["crawler", "worker-1"]  # a tenth is enough, less is not
    assert (one.packets, one.severity, one.confidence) == (30, "warning", "likely")
    known = said(one)
    assert known["count"] == (262_100, "entries")
    assert known["max"] == (262_144, "entries")
    assert known["count/max"] == (100.0, "%")
    assert known["buckets"] == (262_144, "buckets")
    assert known["refused"] == (30, "packets")
    assert known["early_drop"] == (4, "entries")
    assert known["growth"] == (12.5, "entries/s")
    assert known["time until full"] == (3.5, "s")
    assert known["rate"] == (3.0, "packets/s")
    assert {other.cause for other in one.ruled_out} == {"networkpolicy-drop", "ct-snat-port-clash"}
    assert not any("undecided" in name or "far below" in name for name in known)


def test_three_culprits_are_named_at_most_and_the_largest_first() -> None:
    four = tuple(holder(Owner("external", f"198.51.100.{n}"), 1000 + n) for n in range(4))
    (one,) = found(row("ct-table-full", CART, 9), tables=(replace(FULL, entries=5000, holders=four),))
    assert [owner.name for owner in one.culprits] == ["198.51.100.3", "198.51.100.2", "198.51.100.1"]


def test_without_a_reading_of_the_table_nobody_is_blamed() -> None:
    (one,) = found(row("ct-table-full", CART, 9), tables=(REFUSING,))
    assert one.culprits == ()
    (one,) = found(row("ct-table-full", CART, 9))
    assert one.culprits == ()
    assert "count" not in said(one)


def test_the_table_is_that_of_the_namespace_in_which_the_packets_died() -> None:
    other = replace(FULL, netns=POD, owner=CART, count=7, full_count=None, holders=(holder(SHOP, 260_000),))
    (one,) = found(row("ct-table-full", CART, 9), tables=(other, FULL))
    assert said(one)["count"] == (262_100, "entries")
    assert [owner.name for owner in one.culprits] == ["crawler", "worker-1"]
    (one,) = found(row("ct-table-full", CART, 9), row("ct-table-full", SHOP, 8, netns=POD), tables=(other, FULL))
    assert said(one)[f"count in network namespace {NODE}"] == (262_100, "entries")
    assert said(one)[f"count in network namespace {POD}"] == (7, "entries")
    assert str(NODE) in one.fix[-1].scope  # where most packets died
    assert [owner.name for owner in one.culprits] == ["shop", "crawler", "worker-1"]


def test_what_was_read_at_the_moment_of_the_refusal_stands_for_the_table() -> None:
    emptied = replace(FULL, count=3, full_count=30, full_max=30)
    (one,) = found(row("ct-table-full", CART, 9), tables=(emptied,))
    assert (said(one)["count"][0], said(one)["max"][0], said(one)["count/max"][0]) == (30, 30, 100.0)
    assert one.confidence == "likely"


def test_a_refusal_far_from_full_is_possible_only_and_says_so() -> None:
    roomy = replace(FULL, count=131_071)
    (one,) = found(row("ct-table-full", CART, 9, confidence="likely"), tables=(roomy,))
    assert one.confidence == "possible"
    assert any("far below max" in name for name in said(one))
    (one,) = found(row("ct-table-full", CART, 9, confidence="likely"), tables=(replace(roomy, count=131_072),))
    assert one.confidence == "likely"
    # where a probe saw the packet refused, the table was full and read too late
    (one,) = found(row("ct-table-full", CART, 9, confidence="proven"), tables=(roomy,))
    assert one.confidence == "proven"
    # no limit (0, up to 6.12), or none that could be read: nothing speaks against it
    for limit in (0, None):
        (one,) = found(row("ct-table-full", CART, 9), tables=(replace(roomy, max=limit),))
        assert one.confidence == "likely"
        assert "count/max" not in said(one)


def test_the_confidence_is_that_of_most_packets() -> None:
    def confidence(**packets: int) -> str:
        rows = [row("ct-table-full", CART, number, confidence=name) for name, number in packets.items()]
        (one,) = found(*rows, tables=(FULL,))
        return one.confidence

    assert confidence(proven=5, likely=4, possible=4) == "proven"
    assert confidence(proven=4, likely=5, possible=4) == "likely"
    assert confidence(proven=4, likely=4, possible=5) == "possible"
    assert confidence(proven=5, likely=5) == "likely"


def test_a_cause_sets_a_limit_to_its_confidence() -> None:
    (one,) = found(row("networkpolicy-drop", CART, 9, confidence="proven"))
    assert one.confidence == "likely"


@pytest.mark.parametrize(
    ("slug", "verdict", "other"),
    [
        ("ct-table-full", None, "networkpolicy-drop"),
        ("ct-insert-race-dns", "unknown", "networkpolicy-drop"),
        ("ct-snat-port-clash", "unknown", "networkpolicy-drop"),
        ("ct-chain-too-long", None, "networkpolicy-drop"),
        ("ct-invalid-drop-asym", "rule", "networkpolicy-drop"),
        ("ct-invalid-rst", None, "benign"),
    ],
)
def test_packets_that_stay_ambiguous_are_counted_and_nothing_is_ruled_out_for_them(
    slug: str, verdict: str | None, other: str
) -> None:
    unsure = row(slug, SHOP, 7, verdict=verdict, confidence="possible")
    (one,) = found(unsure, row(slug, CART, 20))
    assert said(one)[f"undecided between {slug} and {other}"] == (7, "packets")
    (one,) = found(unsure)
    assert one.confidence == "possible"
    if verdict != "rule":
        assert one.ruled_out == BY_SLUG[slug].ruled_out
        assert other not in {ruled_out.cause for ruled_out in one.ruled_out}


def test_a_rule_with_a_verdict_rules_conntrack_out() -> None:
    (one,) = found(row("networkpolicy-drop", CART, 9, verdict="rule"))
    because = "conntrack counted nothing at these drops"
    assert RuledOut("ct-table-full", because) in one.ruled_out
    assert RuledOut("ct-snat-port-clash", because) in one.ruled_out
    for verdict in (None, "unknown"):
        (one,) = found(
            row("networkpolicy-drop", CART, 9, verdict="rule"), row("networkpolicy-drop", CART, 1, verdict=verdict)
        )
        assert {other.cause for other in one.ruled_out} == {"tc-bpf-drop"}


def test_a_policy_and_a_full_table_in_one_window_are_two_findings_with_their_own_victims() -> None:
    both = found(row("ct-table-full", CRAWLER, 30), row("networkpolicy-drop", CART, 40, verdict="rule"), tables=(FULL,))
    assert {one.cause: [owner.name for owner in one.victims] for one in both} == {
        "ct-table-full": ["crawler"], "networkpolicy-drop": ["cart"],
    }  # fmt: skip
    assert {one.cause: one.packets for one in both} == {"ct-table-full": 30, "networkpolicy-drop": 40}
    assert [one.culprits for one in both if one.cause == "networkpolicy-drop"] == [()]


def test_a_clash_shows_the_address_and_port_that_were_fought_for() -> None:
    reply = Tuple("192.0.2.7", "203.0.113.1", 443, 40000)
    rows = [
        row("ct-snat-port-clash", CART, 20, hook="POST_ROUTING", verdict="clash", nat="src", reply=reply),
        row("ct-snat-port-clash", CART, 2, hook="POST_ROUTING", verdict="insert_failed", confidence="possible"),
    ]
    (one,) = found(*rows, tables=(table(insert_failed=22, drop=20, found=44),))
    known = said(one)
    assert known["translated to 203.0.113.1:40000 towards 192.0.2.7:443"] == (20, "packets")
    assert known["insert_failed"] == (22, "packets")
    assert known["ports found taken"] == (44, "ports")
    assert [value for name, value in known.items() if "being deleted" in name] == [(2, "packets")]
    assert not any("undecided" in name for name in known)
    assert not any("nf_conntrack_max=" in fix.command for fix in one.fix)
    (one,) = found(*rows, tables=(table(insert_failed=22, drop=20, found=0),))
    assert "ports found taken" not in said(one)  # later kernels do not count the last ports that are tried
    six = Tuple("2001:db8::7", "2001:db8::1", 443, 0)
    (one,) = found(row("snat-port-exhaustion", CART, 20, verdict="clash", nat="both", reply=six, family="ipv6"))
    assert said(one)["translated to 2001:db8::1 towards [2001:db8::7]:443"] == (20, "packets")
    (one,) = found(row("ct-snat-port-clash", CART, 20, verdict="clash", nat="dst", reply=reply))
    assert not any("translated to" in name for name in said(one))


# ----------------------------------------------------------------------------------------------------
# Findings of statistics alone


@pytest.mark.parametrize(("evicted", "severity"), [(1, "info"), (9, "info"), (10, "warning"), (10**6, "warning")])
def test_evicted_entries_are_a_finding_without_lost_packets(evicted: int, severity: str) -> None:
    pressed = table(early_drop=evicted, count=262_140, entries=262_140, holders=(holder(CRAWLER, 200_000),))
    (one,) = found(tables=(QUIET, pressed))
    assert (one.cause, one.severity, one.packets, one.connections) == ("ct-pressure-early-drop", severity, 0, None)
    assert (one.victims, one.culprits) == ((HOST,), (CRAWLER,))
    assert said(one)["early_drop"] == (evicted, "entries")
    assert said(one)["early_drop rate"] == (round(evicted / 10, 2), "entries/s")
    assert said(one)["count/max"] == (100.0, "%")
    assert one.fix
    assert found(tables=(replace(pressed, early_drop=0),)) == []


def test_evictions_beside_refusals_are_evidence_and_no_finding_of_their_own() -> None:
    assert found(tables=(FULL,)) == []
    (one,) = found(row("ct-table-full", CART, 30), tables=(FULL,))
    assert said(one)["early_drop"] == (4, "entries")
    # what clashed was not refused
    (one,) = found(tables=(table(early_drop=4, drop=3, insert_failed=3),))
    assert one.cause == "ct-pressure-early-drop"


def test_a_race_that_the_kernel_repaired_is_an_information() -> None:
    (one,) = found(tables=(table(clash_resolved=70_000), table(POD, CART, clash_resolved=None)))
    assert (one.cause, one.severity, one.packets, one.victims) == ("ct-insert-race-dns", "info", 0, (HOST,))
    assert "no loss" in one.title
    assert one.title != BY_SLUG["ct-insert-race-dns"].title
    assert said(one)["clash_resolved"] == (70_000, "packets")
    assert one.fix == ()


def test_statistics_of_one_group_are_one_finding_and_drops_take_them_in() -> None:
    tables = (
        table(clash_resolved=1),
        table(POD, CART, clash_resolved=2),
        table(POD + 1, SHOP, clash_resolved=3),
    )
    groups = [[owner.name for owner in one.victims] for one in found(tables=tables)]
    assert sorted(groups) == [["cart", "shop"], ["worker-1"]]
    with_loss = found(row("ct-insert-race-dns", CART, 50, netns=POD, verdict="clash"), tables=tables)
    assert [(one.packets, one.title) for one in with_loss if one.victims == (CART,)] == [
        (50, BY_SLUG["ct-insert-race-dns"].title)
    ]
    assert len(with_loss) == 2
    keys = [(one.cause, one.victims[0].group) for one in with_loss]
    assert len(keys) == len(set(keys))


def test_findings_of_statistics_can_be_ignored() -> None:
    (one,) = findings(Window(10, (), tables=(table(early_drop=50),)), lambda slug, owner: owner == HOST)
    assert one.ignored


# ----------------------------------------------------------------------------------------------------
# What to do


def fixes(slug: str, *tables: ConntrackRow, **more: object) -> dict[str, tuple[str, str, str]]:
    """Command, undo and risk by action."""
    (one,) = [one for one in found(row(slug, CART, 10, **more), tables=tables) if one.packets]
    return {fix.action: (fix.command, fix.undo, fix.risk) for fix in one.fix}


def test_the_limit_is_raised_from_its_present_value_and_back() -> None:
    (command, undo, risk), *_ = [
        fix for action, fix in fixes("ct-table-full", FULL).items() if action.endswith("nf_conntrack_max")
    ]
    assert command == "sysctl -w net.netfilter.nf_conntrack_max=524288"
    assert undo == "sysctl -w net.netfilter.nf_conntrack_max=262144"
    assert "up to 100.0 MiB more" in risk  # 262,144 entries of 400 bytes
    assert "200.0 MiB in all" in risk
    assert "kube-proxy" in risk


@pytest.mark.parametrize(("limit", "proposed"), [(30, 60), (10_239, 20_478), (10_240, 20_480), (100_000, 200_704)])
def test_a_proposed_limit_is_twice_the_present_one_and_round(limit: int, proposed: int) -> None:
    commands = [command for command, _, _ in fixes("ct-table-full", replace(FULL, max=limit)).values()]
    assert f"sysctl -w net.netfilter.nf_conntrack_max={proposed}" in commands


def test_buckets_are_raised_with_the_limit_only_where_there_are_too_few() -> None:
    def buckets(present: int | None) -> list[tuple[str, str]]:
        known = fixes("ct-table-full", replace(FULL, buckets=present)).values()
        return [(command, undo) for command, undo, _ in known if "nf_conntrack_buckets=" in command]

    assert buckets(131_072) == []
    assert buckets(65_536) == [
        ("sysctl -w net.netfilter.nf_conntrack_buckets=131072", "sysctl -w net.netfilter.nf_conntrack_buckets=65536")
    ]
    assert len(buckets(None)) == 1


def test_long_chains_are_mended_by_buckets_alone() -> None:
    crowded = table(count=20_000, buckets=512, chain_too_long=9, insert_failed=9)
    ((command, undo, _),) = fixes("ct-chain-too-long", crowded, verdict="chain_too_long").values()
    assert command == "sysctl -w net.netfilter.nf_conntrack_buckets=131072"
    assert undo == "sysctl -w net.netfilter.nf_conntrack_buckets=512"
    (one,) = found(row("ct-chain-too-long", CART, 10, verdict="chain_too_long"), tables=(crowded,))
    assert said(one)["entries per bucket"] == (39.06, "")


def test_settings_of_a_namespace_are_set_in_it_and_those_of_the_node_outside() -> None:
    inside = "ip netns exec cart"
    mine = replace(FULL, netns=POD, owner=CART, inside=inside)
    for command, undo, _ in fixes("ct-table-full", mine, netns=POD, inside=inside).values():
        if "timeout" in command:
            assert all(part.startswith(f"{inside} sysctl ") for part in command.split("; "))
            assert undo.startswith(f"{inside} sysctl -w ")
        elif "sysctl" in command:
            assert command.startswith("sysctl -w ")
    # a reset is answered in the pod, but the segment was called INVALID on the node
    node = replace(MEETING_INVALID, inside="")
    commands = fixes("ct-invalid-rst", node, netns=POD, inside=inside, verdict=None).values()
    assert "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1" in [command for command, _, _ in commands]
    (one,) = found(row("ct-invalid-rst", CART, 10, netns=POD, inside=inside, verdict=None), tables=(node,))
    assert str(NODE) in one.fix[1].scope
    assert said(one)["invalid"] == (7, "packets")


def test_stale_translation_names_the_entries_to_delete() -> None:
    reply = Tuple("10.244.2.2", "10.244.1.6", 53, 40000)
    more = {"protocol": "udp", "dport": 53, "dst": "10.96.0.10", "nat": "dst", "reply": reply, "verdict": None}
    commands = fixes("stale-udp-dnat", **more)
    assert any(command == "conntrack -D -p udp --orig-dst 10.96.0.10 --dport 53" for command, _, _ in commands.values())
    six = fixes("stale-udp-dnat", **{**more, "family": "ipv6", "dst": "fd00::a"})
    assert any("-D -f ipv6 -p udp --orig-dst fd00::a" in command for command, _, _ in six.values())
    (one,) = found(row("stale-udp-dnat", CART, 10, **more), tables=(table(stale=3),))
    assert said(one)["10.96.0.10:53 translated to 10.244.2.2:53"] == (10, "packets")
    assert said(one)["entries to pods that are gone"] == (3, "entries")


def test_the_resolver_option_is_set_for_the_workload_that_lost_queries() -> None:
    commands = [fix for _, fix in fixes("ct-insert-race-dns", verdict="clash").items() if "patch" in fix[0]]
    ((command, undo, _),) = commands
    assert command.startswith("kubectl -n prod patch deployment/cart ")
    assert "single-request-reopen" in command
    assert undo == "kubectl -n prod rollout undo deployment/cart"


@pytest.mark.parametrize("one", CAUSES, ids=lambda cause: cause.slug)
def test_findings_go_into_json_and_come_back(one: object) -> None:
    slug = getattr(one, "slug", "")
    reply = Tuple("10.244.2.2", "10.244.1.6", 53, 40000)
    rows = [row(slug, CART, 9, nat="both", reply=reply), row(slug, SHOP, 1, confidence="possible", verdict=None)]
    made = found(*rows, tables=(FULL, table(POD, CART, early_drop=5, clash_resolved=5, invalid=5)))
    assert slug in {finding.cause for finding in made}
    assert msgspec.json.decode(msgspec.json.encode(made), type=list[Finding]) == made


def test_each_of_the_ten_is_there() -> None:
    assert len(SLUGS) == len(CAUSES) == 10
