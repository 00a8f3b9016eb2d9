# The catalogue: which drop has which cause, how bad that is, and what is said about it.

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8sdiag import causes
from k8sdiag.causes import ALL, BENIGN, BY_SLUG, Drop, Severities, Window, benign, cause_of, decide, findings
from k8sdiag.host.btf import Btf
from k8sdiag.snapshot import DropRow, Finding, Owner

# The slugs of the catalogue: conntrack, policy, routing, tunnels, endpoints, devices.
CATALOGUE = (
    "ct-table-full", "ct-pressure-early-drop", "ct-insert-race-dns", "ct-snat-port-clash", "snat-port-exhaustion",
    "ct-invalid-rst",
    "ct-invalid-drop-asym", "ct-chain-too-long", "stale-udp-dnat", "nat-helper-seqadj",
    "networkpolicy-drop", "svc-no-endpoints", "tc-bpf-drop", "xdp-drop", "cgroup-bpf-drop", "lsm-drop",
    "bridge-nf-call",
    "stale-legacy-vs-nft",
    "rp-filter", "no-route", "ip-forward-off", "martian-localnet", "neigh-table-overflow", "neigh-failed",
    "mtu-blackhole-routed",
    "mtu-vxlan-overlay", "frag-reassembly",
    "vxlan-unknown-vni", "vxlan-no-fdb", "vxlan-port-mismatch", "vxlan-checksum-offload", "ipip-no-handler",
    "tunnel-recursion",
    "gro-cells-backlog",
    "listen-overflow", "syn-flood", "ephemeral-port-exhaustion", "udp-rcvbuf", "tcp-mem-pressure",
    "tcp-backlog-drop", "zero-window", "paws",
    "app-rst", "closed-port",
    "softnet-backlog", "time-squeeze", "cpu-steal", "qdisc-overlimit", "veth-peer-down", "veth-ring-full",
    "ipv6-disabled", "unhandled-proto",
    "l2-multicast", "skb-memory", "etcd-slow-disk", "slow-rule-programming",
)  # fmt: skip

TCP, UDP, ICMP = 6, 17, 1
PLAIN = Drop("NO_SOCKET", "__udp4_lib_rcv", "", "", 2, UDP, "10.244.1.6", "10.244.1.5", 40000, 9)


def drop(reason: str, location: str, **more: object) -> Drop:
    return PLAIN._replace(reason=reason, location=location, **more)  # type: ignore[arg-type]


def test_the_catalogue_has_56_slugs() -> None:
    assert len(CATALOGUE) == len(set(CATALOGUE)) == 56


def test_every_cause_has_a_slug_of_the_catalogue_and_only_one_entry() -> None:
    slugs = [cause.slug for cause in ALL]
    assert set(slugs) - {"unexplained"} <= set(CATALOGUE)
    assert len(slugs) == len(set(slugs)) == len(BY_SLUG)
    assert slugs[-1] == "unexplained"
    assert BENIGN not in slugs


def test_the_first_causes_are_there() -> None:
    first = {"closed-port", "networkpolicy-drop", "tc-bpf-drop", "rp-filter", "udp-rcvbuf", "no-route",
             "qdisc-overlimit", "softnet-backlog"}  # fmt: skip
    assert first <= BY_SLUG.keys()


@pytest.mark.parametrize("cause", ALL, ids=lambda cause: cause.slug)
def test_what_is_ruled_out_is_another_cause_of_the_catalogue(cause: causes.Cause) -> None:
    for other in cause.ruled_out + cause.ruled_out_by_verdict:
        assert other.cause in CATALOGUE
        assert other.cause != cause.slug
        assert other.because


CAUSES = [
    # this kernel's reasons
    (drop("NO_SOCKET", "__udp4_lib_rcv"), "closed-port"),
    (drop("NO_SOCKET", "__udp6_lib_rcv", family=10, src="fd00::6", dst="fd00::5"), "closed-port"),
    (drop("NO_SOCKET", "tcp_v4_rcv", protocol=TCP), "closed-port"),
    (drop("NO_SOCKET", "tcp_v4_rcv", protocol=TCP, segment="SYN"), "closed-port"),
    (drop("NETFILTER_DROP", "nft_do_chain", hook="FORWARD", conntrack="NEW"), "networkpolicy-drop"),
    (drop("NETFILTER_DROP", "nf_hook_slow", hook="LOCAL_IN", conntrack="CONFIRMED"), "networkpolicy-drop"),
    (drop("NETFILTER_DROP", "nf_hook_slow", hook="UNKNOWN"), "networkpolicy-drop"),
    (drop("NETFILTER_DROP", "nft_do_chain", dst="224.0.0.251"), "networkpolicy-drop"),
    (drop("NETFILTER_DROP", "nft_do_chain", family=0, protocol=0, src="", dst=""), "networkpolicy-drop"),
    (drop("TC_INGRESS", "__netif_receive_skb_core"), "tc-bpf-drop"),
    (drop("TC_EGRESS", "__dev_queue_xmit"), "tc-bpf-drop"),
    (drop("TC_INGRESS", "__netif_receive_skb_core", family=0, protocol=0, src="", dst=""), "tc-bpf-drop"),
    (drop("IP_RPFILTER", "ip_rcv_finish_core"), "rp-filter"),
    (drop("IP_INNOROUTES", "ip_error"), "no-route"),
    (drop("IP_OUTNOROUTES", "ip6_pkt_drop", family=10, src="fd00::6", dst="fd01::1"), "no-route"),
    (drop("NOT_SPECIFIED", "ip_error"), "no-route"),  # an `unreachable` or `blackhole` route
    (drop("SOCKET_RCVBUFF", "udp_queue_rcv_one_skb"), "udp-rcvbuf"),
    (drop("QDISC_DROP", "__dev_queue_xmit"), "qdisc-overlimit"),
    (drop("QDISC_OVERLIMIT", "__dev_queue_xmit"), "qdisc-overlimit"),
    (drop("QDISC_OVERLIMIT", "__dev_queue_xmit", family=0, protocol=0, src="", dst=""), "qdisc-overlimit"),
    (drop("CPU_BACKLOG", "enqueue_to_backlog"), "softnet-backlog"),
    (drop("CPU_BACKLOG", "enqueue_to_backlog", dst="255.255.255.255"), "softnet-backlog"),
    # 5.10 gives no reasons: told by the function
    (drop("", "__udp4_lib_rcv"), "closed-port"),
    (drop("", "__udp6_lib_rcv", family=10, src="fd00::6", dst="fd00::5"), "closed-port"),
    (drop("", "nf_hook_slow", hook="FORWARD"), "networkpolicy-drop"),
    (drop("", "nft_do_chain", hook="FORWARD"), "networkpolicy-drop"),
    (drop("", "udp_queue_rcv_one_skb"), "udp-rcvbuf"),
    (drop("", "ip_error"), "no-route"),
    (drop("", "sch_handle_egress"), "tc-bpf-drop"),
    (drop("", "enqueue_to_backlog"), "softnet-backlog"),
    (drop("", "__dev_queue_xmit"), "qdisc-overlimit"),
    # look-alikes: the function of a known cause, with another reason
    (drop("SECURITY_HOOK", "nf_hook_slow"), "unexplained"),
    (drop("UDP_CSUM", "__udp4_lib_rcv"), "unexplained"),
    (drop("XFRM_POLICY", "udp_queue_rcv_one_skb"), "unexplained"),
    (drop("PROTO_MEM", "udp_queue_rcv_one_skb"), "unexplained"),
    (drop("XDP", "__netif_receive_skb_core"), "unexplained"),
    (drop("NEIGH_FAILED", "neigh_invalidate"), "unexplained"),
    (drop("PKT_TOO_BIG", "ip_forward"), "unexplained"),
    (drop("NO_SOCKET", "raw_local_deliver", protocol=47), "unexplained"),
    (drop("NOT_SPECIFIED", "veth_xmit"), "unexplained"),
    (drop("", "veth_xmit"), "unexplained"),
    (drop("77", "0xffffffff81000000"), "unexplained"),
    (drop("VXLAN_VNI_NOT_FOUND", "vxlan_rcv"), "unexplained"),
    (drop("TCP_LISTEN_OVERFLOW", "tcp_conn_request", protocol=TCP), "unexplained"),
    (drop("NO_SOCKET", "__udp4_lib_rcv", dport=53), "closed-port"),  # asked a resolver that is not there
    # what a healthy machine does all day
    (drop("NO_SOCKET", "__udp4_lib_rcv", sport=53), BENIGN),  # the answer came too late
    (drop("NO_SOCKET", "tcp_v4_rcv", protocol=TCP, segment="RST"), BENIGN),
    (drop("NO_SOCKET", "tcp_v4_rcv", protocol=TCP, segment="OTHER"), BENIGN),  # came late; nothing else is wrong
    (drop("OTHERHOST", "ip_rcv_core"), BENIGN),
    (drop("CONSUMED", "skb_release_data"), BENIGN),
    (drop("SKB_CONSUMED", "skb_release_data"), BENIGN),
    (drop("UNHANDLED_PROTO", "__netif_receive_skb_core", family=0, protocol=0, src="", dst=""), BENIGN),
    (drop("NOT_SPECIFIED", "unix_dgram_sendmsg", family=0, protocol=0, src="", dst=""), BENIGN),
    (drop("SOCKET_CLOSE", "unix_release_sock", family=0, protocol=0, src="", dst=""), BENIGN),
    (drop("NOT_SPECIFIED", "netlink_broadcast_filtered", family=0, protocol=0, src="", dst=""), BENIGN),
    (drop("QUEUE_PURGE", "skb_queue_purge_reason"), BENIGN),
    (drop("", "skb_queue_purge"), BENIGN),
    (drop("PACKET_SOCK_ERROR", "packet_rcv"), BENIGN),
    (drop("IPV6_NDISC_NS_OTHERHOST", "ndisc_recv_ns", family=10, protocol=58, src="fe80::1", dst="fe80::2"), BENIGN),
    (drop("IPV6DISABLED", "ip6_rcv_core", family=10, protocol=58, src="fe80::1", dst="ff02::1"), BENIGN),
    (drop("TCP_OLD_DATA", "tcp_data_queue", protocol=TCP), BENIGN),
    (drop("TCP_RESET", "tcp_rcv_state_process", protocol=TCP), BENIGN),
    (drop("NOT_SPECIFIED", "tcp_v4_rcv", protocol=TCP), BENIGN),
    (drop("", "tcp_rcv_state_process", protocol=TCP), BENIGN),
    (drop("IP_RPFILTER", "ip_rcv_finish_core", src="0.0.0.0", dst="255.255.255.255"), BENIGN),
    (drop("IP_RPFILTER", "ip_rcv_finish_core", src="0.0.0.0", dst="10.0.0.1"), BENIGN),
    (drop("NO_SOCKET", "__udp4_lib_rcv", dst="224.0.0.251", dport=5353), BENIGN),
    (drop("NO_SOCKET", "__udp6_lib_rcv", family=10, src="fe80::1", dst="ff02::fb", dport=5353), BENIGN),
    (drop("SOCKET_FILTER", "sk_filter_trim_cap", protocol=ICMP), BENIGN),
    (drop("QDISC_CONGESTED", "__dev_queue_xmit"), BENIGN),
    (drop("PSP_INPUT", "tcp_v4_rcv", protocol=TCP), BENIGN),
]  # fmt: skip


@pytest.mark.parametrize(("one", "slug"), CAUSES, ids=[f"{d.reason or 'none'}@{d.location}-{s}" for d, s in CAUSES])
def test_a_drop_has_its_cause(one: Drop, slug: str) -> None:
    """Where nothing is tracked: what only statistics could decide is then a rule's, or benign."""
    assert decide(cause_of(one), None, ()) == slug


names = st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz0123456789", max_size=12)


@given(
    st.builds(
        Drop,
        names,
        names,
        names,
        names,
        st.sampled_from([0, 2, 10]),
        st.integers(0, 255),
        st.ip_addresses().map(str),
        st.ip_addresses().map(str),
        st.integers(0, 65535),
        st.integers(0, 65535),
        st.sampled_from(["", "RULE", "REFUSED", "CLASH", "CHAIN_TOO_LONG", "INSERT_FAILED", "UNKNOWN"]),
        st.booleans(),
        st.sampled_from(["", "SYN", "SYN_ACK", "FIN", "RST", "OTHER"]),
        st.sampled_from(["", "SRC", "DST", "BOTH"]),
        st.integers(0, 65535),
    )
)
def test_every_drop_has_one_cause(one: Drop) -> None:
    slug = decide(cause_of(one), None, ())
    assert slug == BENIGN or slug in BY_SLUG


def test_every_cause_has_a_drop_above_that_shows_it() -> None:
    """Those of conntrack have a file of their own."""
    assert BY_SLUG.keys() - causes.conntrack.SLUGS <= {slug for _, slug in CAUSES}


def test_reasons_written_down_here_are_names_that_this_kernel_uses() -> None:
    """A misspelt reason would silently never match. Those of other releases are listed with where they are."""
    if not Path("/sys/kernel/btf/vmlinux").exists():
        pytest.skip("this kernel was built without BTF")
    enum = Btf.vmlinux().enum("skb_drop_reason")
    if "SKB_DROP_REASON_QDISC_OVERLIMIT" not in enum:
        pytest.skip("needs the reasons of 6.18")
    here = {name.removeprefix("SKB_DROP_REASON_").removeprefix("SKB_") for name in enum}
    elsewhere = {
        "",  # before 5.17
        "SKB_CONSUMED",  # as include/net/dropreason-core.h spells it
        "77",  # made up
    }  # fmt: skip
    written = {one.reason for one, _ in CAUSES} | benign._REASONS | benign._DELIBERATE
    assert written - elsewhere <= here
    assert all(any(name.startswith(beginning) for name in here) for beginning in benign._REASON_BEGINNINGS)


# Severity


@pytest.mark.parametrize(
    ("packets", "seconds", "severity"),
    [
        (9, 1, "info"),  # one less than at_least
        (10, 1, "warning"),  # at_least, and 10 a second
        (10, 10, "warning"),  # exactly 1 a second
        (10, 10.001, "info"),  # just below
        (99, 1, "warning"),
        (100, 1, "critical"),  # exactly 100 a second
        (1000, 10, "critical"),
        (999, 10, "warning"),
        (9, 0.001, "info"),  # a high rate of too few
        (0, 10, "info"),
        (10, 0, "critical"),  # no time has passed yet
    ],
)
def test_severity_goes_by_rate_and_a_minimum(packets: int, seconds: float, severity: str) -> None:
    assert Severities(1.0, 100.0, 10).judge(packets, seconds) == severity


def test_what_is_never_critical_or_never_a_warning_is_not() -> None:
    assert Severities(5.0, None, 20).judge(10**9, 1) == "warning"
    assert Severities(None, None, 0).judge(10**9, 1) == "info"


@pytest.mark.parametrize("cause", ALL, ids=lambda cause: cause.slug)
def test_the_thresholds_of_a_cause_hold_just_below_and_just_above(cause: causes.Cause) -> None:
    table = cause.severities
    for level, pps in (("warning", table.warning_pps), ("critical", table.critical_pps)):
        if pps is None:
            continue
        packets = max(table.at_least, 1000)
        exactly_s = packets / pps
        assert table.judge(packets, exactly_s * 0.999999) == level
        assert table.judge(packets, exactly_s * 1.001) != level
    assert table.judge(table.at_least - 1, 0.001) == "info"
    assert table.at_least >= 1
    if table.warning_pps is not None and table.critical_pps is not None:
        assert table.warning_pps < table.critical_pps


def test_what_a_policy_intends_is_never_critical() -> None:
    for slug in ("networkpolicy-drop", "tc-bpf-drop"):
        assert BY_SLUG[slug].severities.critical_pps is None


# Findings

CART = Owner("pod", "cart", "prod", uid="u1", how="netns", confidence="proven")
SHOP = Owner("pod", "shop", "prod", uid="u2", how="veth", confidence="proven")
LAB = Owner("netns", "lab", how="netns", confidence="proven")


def row(cause: str, owner: Owner, packets: int, *, flows: int | None = 1, **more: object) -> DropRow:
    fields: dict[str, object] = {
        "reason": "NO_SOCKET", "location": "__udp4_lib_rcv", "hook": None, "cause": cause, "benign": cause == BENIGN,
        "owner": owner, "peer": None, "service": None, "direction": "in", "family": "ipv4", "protocol": "udp",
        "src": "10.0.0.1", "dst": "10.0.0.2", "sport": None, "dport": 9, "reply": None, "conntrack": None,
        "device": "eth0", "netns": 4026532100, "skbs": packets, "packets": packets, "bytes": 100 * packets,
        "flows": flows, "rate_pps": 0.0, **more,
    }  # fmt: skip
    return DropRow(**fields)  # type: ignore[arg-type]


def found(*rows: DropRow, seconds: float = 10, **more: object) -> list[Finding]:
    return findings(Window(seconds, rows), **more)  # type: ignore[arg-type]


def test_a_finding_gathers_one_cause_in_one_namespace() -> None:
    (one,) = found(row("closed-port", CART, 23, flows=2), row("closed-port", SHOP, 70), row(BENIGN, CART, 999))
    assert (one.cause, one.packets, one.connections, one.severity) == ("closed-port", 93, 3, "warning")
    assert [owner.name for owner in one.victims] == ["shop", "cart"]
    assert one.title == BY_SLUG["closed-port"].title


def test_benign_drops_are_no_finding() -> None:
    assert found(row(BENIGN, CART, 10**6)) == []
    assert found() == []


def test_owners_outside_kubernetes_have_findings_of_their_own() -> None:
    other = Owner("netns", "lab-2", how="netns", confidence="proven")
    both = found(row("closed-port", LAB, 30), row("closed-port", other, 40))
    assert [finding.victims[0].name for finding in both] == ["lab-2", "lab"]


def test_the_worst_comes_first() -> None:
    order = found(
        row("closed-port", LAB, 3),
        row("udp-rcvbuf", CART, 50),
        row("closed-port", SHOP, 1000),
        row("rp-filter", CART, 60),
    )
    assert [(finding.severity, finding.cause) for finding in order] == [
        ("critical", "closed-port"), ("warning", "rp-filter"), ("warning", "udp-rcvbuf"), ("info", "closed-port"),
    ]  # fmt: skip


def test_an_ignored_finding_stays_and_comes_last() -> None:
    order = found(
        row("closed-port", SHOP, 10**6), row("rp-filter", CART, 1),
        ignored=lambda slug, owner: slug == "closed-port" and owner.namespace == "prod",
    )  # fmt: skip
    assert [(finding.cause, finding.ignored) for finding in order] == [("rp-filter", False), ("closed-port", True)]
    assert order[1].packets == 10**6


def test_a_finding_is_ignored_only_if_every_victim_is() -> None:
    rows = row("closed-port", SHOP, 50), row("closed-port", CART, 60)
    (one,) = found(*rows, ignored=lambda _, owner: owner.name == "shop")
    assert not one.ignored
    (one,) = found(*rows, ignored=lambda _, owner: owner.name in ("shop", "cart"))
    assert one.ignored


def test_connections_are_not_known_where_flows_were_folded() -> None:
    (one,) = found(row("closed-port", CART, 23), row("closed-port", CART, 5, flows=None))
    assert (one.packets, one.connections) == (28, None)


def test_the_evidence_names_the_place_the_rate_and_the_victims() -> None:
    (one,) = found(
        row("networkpolicy-drop", CART, 40, reason="NETFILTER_DROP", location="nft_do_chain", hook="FORWARD"),
        row("networkpolicy-drop", SHOP, 60, reason="NETFILTER_DROP", location="nf_hook_slow", hook="LOCAL_IN"),
    )
    said: dict[str, tuple[object, str]] = {evidence.name: (evidence.value, evidence.unit) for evidence in one.evidence}
    assert said["NETFILTER_DROP at nf_hook_slow (LOCAL_IN)"] == (60, "packets")
    assert said["NETFILTER_DROP at nft_do_chain (FORWARD)"] == (40, "packets")
    assert said["rate"] == (10.0, "packets/s")
    assert said["dropped for prod/cart"] == (40, "packets")
    assert all(evidence.source for evidence in one.evidence)


@pytest.mark.parametrize("cause", ALL[:-1], ids=lambda cause: cause.slug)
def test_every_cause_says_what_to_do_where_and_how_to_undo_it(cause: causes.Cause) -> None:
    (one,) = found(row(cause.slug, CART, 10**6, device="eth7"))
    assert one.fix
    for fix in one.fix:
        assert all([fix.action, fix.command, fix.scope, fix.why, fix.risk, fix.undo])
        assert "node" in fix.scope or "4026532100" in fix.scope
        if "sysctl -w" in fix.command:
            assert fix.undo.startswith("sysctl -w")
    assert cause.feels
    assert cause.proof


def test_fixes_without_a_device_or_an_address_still_can_be_read() -> None:
    for cause in ALL[:-1]:
        (one,) = found(row(cause.slug, CART, 10**6, device=None, dst=None, dport=None, protocol=None))
        assert not any("None" in field for fix in one.fix for field in (fix.action, fix.command, fix.scope, fix.undo))


@pytest.mark.parametrize("slug", ["rp-filter", "tc-bpf-drop", "qdisc-overlimit"])
def test_a_device_name_cannot_become_a_command_of_its_own(slug: str) -> None:
    # the kernel refuses only '/', ':' and white space in names (dev_valid_name())
    (one,) = found(row(slug, CART, 10**6, device="v;reboot"))
    for command in (one.fix[0].command, one.fix[0].undo):
        words = list(shlex.shlex(command, posix=True, punctuation_chars=True))
        assert command == "nothing to undo" or any("v;reboot" in word for word in words)


def test_the_sysctl_of_a_vlan_device_is_spelt_so_that_sysctl_finds_it() -> None:
    (one,) = found(row("rp-filter", CART, 10**6, device="eth0.100"))
    assert "eth0/100" in one.fix[0].command or "/eth0.100/" in one.fix[0].command
