# Whose a drop is: made-up nodes, told to Identity fact by fact.

from __future__ import annotations

import itertools

import pytest
from msgspec.structs import replace

from k8sdiag.facts import (
    REMEMBERED_NS,
    Address,
    AnyFact,
    DropKey,
    HostPod,
    Link,
    NetnsOwner,
    Node,
    OwnerKind,
    Reason,
)
from k8sdiag.identity import Attribution, Identity

S = 10**9
HOST, CART, SHOP, STRANGER = 4026531840, 4026532100, 4026532200, 4026532300
COOKIES = {HOST: 1, CART: 4101, SHOP: 4102, STRANGER: 4103}
NODE = Node("node-1", "6.18.0", HOST)
CART_IP, SHOP_IP, NODE_IP, OUTSIDE_IP = "10.244.1.5", "10.244.1.6", "192.0.2.10", "203.0.113.9"
UPLINK, BRIDGE, TO_CART, TO_SHOP = 2, 3, 7, 9


def pod(
    netns: int, name: str, from_s: float = 0, until_s: float | None = None, cookie: int | None = None
) -> NetnsOwner:
    return NetnsOwner(
        netns, "pod", name, COOKIES[netns] if cookie is None else cookie, "prod", uid=f"uid-{name}", how="cgroup",
        from_t_ns=round(from_s * S), until_t_ns=None if until_s is None else round(until_s * S),
    )  # fmt: skip


def address(
    netns: int, text: str, from_s: float = 0, until_s: float | None = None, cookie: int | None = None
) -> Address:
    return Address(
        netns, text, COOKIES[netns] if cookie is None else cookie,
        round(from_s * S), None if until_s is None else round(until_s * S),
    )  # fmt: skip


def veth(netns: int, ifindex: int, name: str, peer: int, cookies: bool = True) -> Link:
    return Link(
        netns, ifindex, name, COOKIES[netns] if cookies else 0, "veth", 2, peer,
        COOKIES[peer] if cookies else 0, 1500,
    )  # fmt: skip


def knowing(*facts: AnyFact) -> Identity:
    identity = Identity()
    for fact in facts:
        identity.fold(fact)
    return identity


_ids = itertools.count(1)


def dropped(netns: int, src: str = "", dst: str = "", **more: object) -> DropKey:
    fields: dict[str, object] = {
        "netns_cookie": COOKIES.get(netns, 0), "netns_from": "DEVICE", "family": 10 if ":" in src else 2,
        "protocol": 17, "folded": not src, **more,
    }  # fmt: skip
    return DropKey(next(_ids), 3, 0xFFFFFFFF81000001, netns, src=src, dst=dst, **fields)  # type: ignore[arg-type]


def who(identity: Identity, key: DropKey, at_s: float = 10) -> Attribution:
    return identity.attribute(key, round(at_s * S))


def names(identity: Identity, at_s: float = 10) -> list[str]:
    return [row.owner.name for row in identity.residents(round(at_s * S))]


ROUTED = (
    NODE,
    pod(CART, "cart"), pod(SHOP, "shop"),
    address(HOST, NODE_IP), address(HOST, "169.254.1.1"), address(CART, CART_IP), address(SHOP, SHOP_IP),
    Link(HOST, UPLINK, "eth0", COOKIES[HOST]),
    veth(HOST, TO_CART, "cali01", CART), veth(HOST, TO_SHOP, "cali02", SHOP),
    veth(CART, 2, "eth0", HOST), veth(SHOP, 2, "eth0", HOST),
)  # fmt: skip
"""Pods behind veths that the node routes between (Calico, most cloud CNIs)."""


# Namespaces


def test_a_pod_beats_a_container_beats_a_name() -> None:
    def owner(kind: OwnerKind, name: str) -> NetnsOwner:
        return NetnsOwner(CART, kind, name, 4101)

    claims = [owner("process", "sleep"), owner("netns", "cni-1"), owner("container", "3e8b"), owner("pod", "cart")]
    expected = ["process", "netns", "container", "pod"]
    for order in itertools.permutations(claims):
        identity = Identity()
        for fact in order:
            identity.fold(fact)
        found = identity.netns_owner(CART, 4101, S)
        assert found is not None
        assert found.kind == "pod"
    for count, kind in enumerate(expected, 1):
        found = knowing(*claims[:count]).netns_owner(CART, 4101, S)
        assert found is not None
        assert found.kind == kind


def test_the_nodes_own_namespace_is_the_host() -> None:
    owner = knowing(NODE).netns_owner(HOST, 1, S)
    assert owner is not None
    assert (owner.kind, owner.name, owner.confidence) == ("host", "node-1", "proven")


def test_a_namespace_that_nobody_named_is_unknown_and_says_its_inode() -> None:
    owner = who(knowing(NODE), dropped(STRANGER, CART_IP, SHOP_IP)).owner
    assert (owner.kind, owner.how) == ("unknown", "none")
    assert str(STRANGER) in owner.name


def test_a_drop_without_a_namespace_is_nobodys() -> None:
    found = who(knowing(*ROUTED), dropped(0, CART_IP, SHOP_IP))
    assert found.owner.kind == "unknown"
    assert (found.peer, found.device) == (None, None)


def test_a_cookie_tells_two_holders_of_one_inode_apart() -> None:
    identity = knowing(NODE, pod(CART, "old", 1, 5, cookie=71), pod(CART, "new", 5, cookie=72))
    for cookie, name in ((71, "old"), (72, "new")):
        for at_s in (2, 5, 6, 300):
            key = dropped(CART, CART_IP, SHOP_IP, netns_cookie=cookie)
            assert who(identity, key, at_s).owner.name == name
    stranger = dropped(CART, CART_IP, SHOP_IP, netns_cookie=73)
    assert who(identity, stranger).owner.kind == "unknown"


def test_without_cookies_the_time_tells_two_holders_of_one_inode_apart() -> None:
    identity = knowing(NODE, pod(CART, "old", 1, 5, cookie=0), pod(CART, "new", 7, cookie=0))
    key = dropped(CART, CART_IP, SHOP_IP, netns_cookie=0)
    assert [who(identity, key, at_s).owner.name for at_s in (1, 4.9, 6, 7, 8)] == ["old", "old", "old", "new", "new"]


def test_a_kernel_that_has_cookies_where_inventory_has_none_goes_by_time() -> None:
    # struct net has a cookie from 5.12, SO_NETNS_COOKIE came with 5.14
    identity = knowing(NODE, pod(CART, "cart", 1, cookie=0), address(CART, CART_IP, 1, cookie=0))
    found = who(identity, dropped(CART, OUTSIDE_IP, CART_IP, netns_cookie=999))
    assert (found.owner.name, found.direction) == ("cart", "in")


def test_a_dead_owner_is_known_for_ten_minutes() -> None:
    identity = knowing(NODE, pod(CART, "cart", 1, 5), address(CART, CART_IP, 1, 5))
    key = dropped(CART, OUTSIDE_IP, CART_IP)
    end_ns = 5 * S
    for t_ns in (end_ns, end_ns + S, end_ns + REMEMBERED_NS):
        identity.forget(t_ns)
        assert identity.attribute(key, t_ns).owner.name == "cart"
    t_ns = end_ns + REMEMBERED_NS + 1
    identity.forget(t_ns)
    assert identity.attribute(key, t_ns).owner.kind == "unknown"
    assert REMEMBERED_NS == 600 * S


def test_forgetting_leaves_the_living_alone() -> None:
    identity = knowing(*ROUTED, pod(STRANGER, "gone", 1, 2))
    before = who(identity, dropped(CART, OUTSIDE_IP, CART_IP))
    identity.forget(10**6 * S)
    assert who(identity, dropped(CART, OUTSIDE_IP, CART_IP), 10**6) == before
    assert names(identity, 10**6) == ["cart", "shop", "node-1"]


def test_forgetting_is_a_new_version() -> None:
    identity = knowing(NODE, pod(CART, "cart", 1, 5))
    version = identity.version
    identity.forget(5 * S + REMEMBERED_NS + 1)
    assert identity.version != version


def test_the_living_are_listed_with_their_addresses() -> None:
    identity = knowing(*ROUTED, address(CART, "127.0.0.1"), address(CART, "::1"), address(CART, "fd00::5"),
                       address(CART, "10.9.9.9", 1, 2), pod(STRANGER, "gone", 1, 2),
                       HostPod("uid-proxy", "kube-proxy", "kube-system"),
                       HostPod("uid-old", "old", until_t_ns=3 * S))  # fmt: skip
    rows = {row.owner.label: row for row in identity.residents(10 * S)}
    assert list(rows) == ["kube-system/kube-proxy", "prod/cart", "prod/shop", "node-1"]
    assert rows["prod/cart"].addresses == (CART_IP, "fd00::5")
    assert rows["node-1"].addresses == ("169.254.1.1", NODE_IP)
    assert [row.netns for row in rows.values()] == [HOST, CART, SHOP, HOST]


def test_of_two_names_for_one_namespace_the_better_is_listed() -> None:
    named = NetnsOwner(CART, "netns", "cni-1", COOKIES[CART], source="/run/netns/cni-1")
    assert names(knowing(NODE, named, pod(CART, "cart"))) == ["cart", "node-1"]


# Restating


FACTS = (
    *ROUTED,
    HostPod("uid-proxy", "kube-proxy", "kube-system"),
    pod(STRANGER, "gone", 1, 2), address(STRANGER, "10.244.1.7", 1, 2),
)  # fmt: skip


@pytest.mark.parametrize("fact", [fact for fact in FACTS if not isinstance(fact, HostPod)], ids=repr)
def test_saying_a_fact_again_changes_nothing(fact: AnyFact) -> None:
    identity = knowing(*FACTS)
    version = identity.version
    identity.fold(fact)
    assert identity.version == version


def test_saying_again_that_a_pod_uses_the_nodes_namespace_changes_nothing() -> None:
    identity = knowing(*FACTS)
    version = identity.version
    identity.fold(HostPod("uid-proxy", "kube-proxy", "kube-system"))
    assert identity.version == version


def test_saying_everything_again_gives_the_same_answers() -> None:
    once, twice = knowing(*FACTS), knowing(*FACTS, *FACTS)
    for key in (
        dropped(CART, OUTSIDE_IP, CART_IP),
        dropped(HOST, CART_IP, SHOP_IP, ifindex=TO_CART, hook="FORWARD"),
        dropped(STRANGER, "10.244.1.7", SHOP_IP),
    ):
        assert who(once, key) == who(twice, key)
    assert once.residents(10 * S) == twice.residents(10 * S)


def test_each_change_is_a_new_version() -> None:
    identity = knowing(*ROUTED)
    for fact in (
        pod(STRANGER, "new"), pod(STRANGER, "new", 0, 9), address(CART, "fd00::5"), address(CART, CART_IP, 0, 9),
        veth(HOST, 11, "cali03", STRANGER), HostPod("uid-proxy", "kube-proxy"),
    ):  # fmt: skip
        version = identity.version
        identity.fold(fact)
        assert identity.version > version


def test_facts_that_are_no_business_of_identity_change_nothing() -> None:
    identity = knowing(*ROUTED)
    version = identity.version
    identity.fold(Reason(3, "NO_SOCKET"))
    identity.fold(dropped(CART, CART_IP, SHOP_IP))
    assert identity.version == version


# Endpoints


def test_a_packet_for_the_pod_is_the_pods_and_its_peer_is_the_sender() -> None:
    found = who(knowing(*ROUTED), dropped(CART, SHOP_IP, CART_IP, ifindex=2))
    assert (found.owner.label, found.owner.how, found.owner.confidence) == ("prod/cart", "netns", "proven")
    assert (found.direction, found.device) == ("in", "eth0")
    assert found.peer is not None
    assert (found.peer.label, found.peer.how) == ("prod/shop", "ip")


def test_a_packet_from_the_pod_is_the_pods_and_its_peer_is_the_destination() -> None:
    found = who(knowing(*ROUTED), dropped(CART, CART_IP, OUTSIDE_IP, netns_from="SOCKET"))
    assert (found.owner.label, found.owner.how, found.direction) == ("prod/cart", "socket", "out")
    assert found.device is None
    assert found.peer is not None
    assert (found.peer.kind, found.peer.name) == ("external", OUTSIDE_IP)


@pytest.mark.parametrize(("src", "dst"), [("127.0.0.1", "127.0.0.53"), ("::1", "::1"), (CART_IP, CART_IP)])
def test_what_a_pod_sends_to_itself_is_local_and_has_no_peer(src: str, dst: str) -> None:
    found = who(knowing(*ROUTED), dropped(CART, src, dst, ifindex=1))
    assert (found.owner.label, found.direction, found.peer) == ("prod/cart", "local", None)


def test_a_packet_for_the_node_is_the_nodes_even_when_it_came_over_a_pods_veth() -> None:
    found = who(knowing(*ROUTED), dropped(HOST, CART_IP, NODE_IP, ifindex=TO_CART, hook="LOCAL_IN"))
    assert (found.owner.kind, found.direction, found.device) == ("host", "in", "cali01")
    assert found.peer is not None
    assert found.peer.label == "prod/cart"


def test_a_packet_from_the_node_is_the_nodes() -> None:
    found = who(knowing(*ROUTED), dropped(HOST, NODE_IP, CART_IP, ifindex=TO_CART))
    assert (found.owner.kind, found.direction) == ("host", "out")


@pytest.mark.parametrize("group", ["224.0.0.251", "ff02::fb", "255.255.255.255"])
def test_a_packet_for_everybody_belongs_to_the_namespace_that_got_it(group: str) -> None:
    src = "fe80::1" if ":" in group else SHOP_IP
    found = who(knowing(*ROUTED), dropped(CART, src, group, ifindex=2))
    assert (found.owner.label, found.direction) == ("prod/cart", "in")
    sent = who(knowing(*ROUTED), dropped(CART, CART_IP, group, ifindex=2))
    assert (sent.owner.label, sent.direction, sent.peer) == ("prod/cart", "out", None)


def test_ipv6_is_told_like_ipv4() -> None:
    identity = knowing(*ROUTED, address(CART, "fd00::5"), address(SHOP, "fd00::6"), address(HOST, "fd00::1"),
                       *(address(netns, "fe80::1") for netns in (HOST, CART, SHOP)))  # fmt: skip
    here = who(identity, dropped(CART, "fd00::6", "fd00::5", ifindex=2))
    assert (here.owner.label, here.direction) == ("prod/cart", "in")
    assert here.peer is not None
    assert here.peer.label == "prod/shop"
    transit = who(identity, dropped(HOST, "fd00::5", "fd00::6", ifindex=TO_CART, hook="FORWARD"))
    assert (transit.owner.label, transit.direction, transit.owner.how) == ("prod/cart", "forward", "veth")
    # every namespace has this link-local address: it is local wherever the packet is
    link_local = who(identity, dropped(SHOP, "fe80::99", "fe80::1", ifindex=2))
    assert (link_local.owner.label, link_local.direction) == ("prod/shop", "in")


def test_before_any_address_is_known_the_namespace_still_has_its_owner() -> None:
    found = who(knowing(NODE, pod(CART, "cart")), dropped(CART, SHOP_IP, CART_IP, ifindex=2))
    assert (found.owner.label, found.direction, found.device) == ("prod/cart", "", "if2")


# Transit


def test_on_a_routed_veth_the_owner_is_the_pod_behind_it() -> None:
    found = who(knowing(*ROUTED), dropped(HOST, CART_IP, SHOP_IP, ifindex=TO_CART, iif=TO_CART, hook="FORWARD"))
    assert (found.owner.label, found.owner.how, found.direction) == ("prod/cart", "veth", "forward")
    assert found.device == "cali01"
    assert found.peer is not None
    assert found.peer.label == "prod/shop"


def test_a_spoofed_source_does_not_move_the_blame_from_the_veth_it_came_by() -> None:
    found = who(knowing(*ROUTED), dropped(HOST, SHOP_IP, NODE_IP, ifindex=TO_CART, iif=TO_CART, hook="FORWARD"))
    assert found.owner.label == "prod/cart"
    found = who(knowing(*ROUTED), dropped(HOST, "172.31.9.9", SHOP_IP, ifindex=TO_CART, iif=TO_CART))
    assert found.owner.label == "prod/cart"
    assert found.peer is not None
    assert found.peer.label == "prod/shop"


def test_on_the_way_out_of_the_node_the_owner_is_the_pod_it_came_from() -> None:
    found = who(knowing(*ROUTED), dropped(HOST, CART_IP, OUTSIDE_IP, ifindex=UPLINK, iif=TO_CART))
    assert (found.owner.label, found.direction, found.device) == ("prod/cart", "forward", "eth0")
    assert found.peer is not None
    assert (found.peer.kind, found.peer.name) == ("external", OUTSIDE_IP)


def test_on_the_way_in_from_outside_the_owner_is_the_pod_it_goes_to() -> None:
    found = who(knowing(*ROUTED), dropped(HOST, OUTSIDE_IP, CART_IP, ifindex=UPLINK, iif=UPLINK, hook="FORWARD"))
    assert (found.owner.label, found.owner.how, found.owner.confidence) == ("prod/cart", "ip", "likely")
    assert found.peer is not None
    assert (found.peer.kind, found.peer.name) == ("external", OUTSIDE_IP)


def test_at_the_veth_of_the_receiver_the_peer_is_the_sending_pod() -> None:
    found = who(knowing(*ROUTED), dropped(HOST, CART_IP, SHOP_IP, ifindex=TO_SHOP, iif=TO_CART))
    assert (found.owner.label, found.owner.how) == ("prod/shop", "veth")
    assert found.peer is not None
    assert found.peer.label == "prod/cart"


def test_at_the_veth_of_the_receiver_the_peer_is_the_sender_outside() -> None:
    # a bandwidth limit on the node's end of the veth
    found = who(knowing(*ROUTED), dropped(HOST, OUTSIDE_IP, SHOP_IP, ifindex=TO_SHOP, iif=UPLINK))
    assert found.owner.label == "prod/shop"
    assert found.peer is not None
    assert (found.peer.kind, found.peer.name) == ("external", OUTSIDE_IP)


# Translated packets: src … dport are as sent, the reply's tells who was to answer

SERVICE_IP, EVERYWHERE = "10.96.0.10", "172.31.9.9"


@pytest.mark.parametrize(
    ("hook", "owner", "peer"),
    [("POST_ROUTING", "prod/cart", "prod/shop"), ("FORWARD", "prod/shop", "prod/cart"), ("", "prod/shop", "prod/cart")],
)
def test_what_leaves_is_held_back_from_its_sender_although_it_is_on_the_receivers_device(
    hook: str, owner: str, peer: str
) -> None:
    found = who(knowing(*ROUTED), dropped(HOST, CART_IP, SHOP_IP, ifindex=TO_SHOP, iif=TO_CART, hook=hook))
    assert (found.owner.label, found.owner.how, found.direction) == (owner, "veth", "forward")
    assert found.peer is not None
    assert found.peer.label == peer


def test_what_came_from_outside_is_the_receivers_at_post_routing_too() -> None:
    key = dropped(HOST, OUTSIDE_IP, SHOP_IP, ifindex=TO_SHOP, iif=UPLINK, hook="POST_ROUTING")
    found = who(knowing(*ROUTED), key)
    assert (found.owner.label, found.owner.how) == ("prod/shop", "veth")
    assert found.peer is not None
    assert found.peer.name == OUTSIDE_IP


def test_the_peer_of_what_was_sent_to_a_service_is_the_pod_behind_it() -> None:
    key = dropped(HOST, CART_IP, SERVICE_IP, ifindex=TO_SHOP, iif=TO_CART, hook="POST_ROUTING",
                  nat="DST", reply_src=SHOP_IP, reply_dst=CART_IP)  # fmt: skip
    found = who(knowing(*ROUTED), key)
    assert (found.owner.label, found.direction) == ("prod/cart", "forward")
    assert found.peer is not None
    assert found.peer.label == "prod/shop"
    untranslated = who(knowing(*ROUTED), replace(key, nat="", reply_src="", reply_dst=""))
    assert untranslated.peer is not None
    assert (untranslated.peer.kind, untranslated.peer.name) == ("external", SERVICE_IP)


def test_the_peer_of_what_a_pod_sends_itself_to_a_service_is_the_pod_behind_it() -> None:
    key = dropped(CART, CART_IP, SERVICE_IP, hook="LOCAL_OUT", nat="DST", reply_src=SHOP_IP, reply_dst=CART_IP)
    found = who(knowing(*ROUTED), key)
    assert (found.owner.label, found.direction) == ("prod/cart", "out")
    assert found.peer is not None
    assert found.peer.label == "prod/shop"


def test_a_node_port_that_leads_to_a_pod_is_forwarded_and_not_the_nodes_own() -> None:
    key = dropped(HOST, OUTSIDE_IP, NODE_IP, ifindex=UPLINK, iif=UPLINK, hook="PRE_ROUTING",
                  nat="BOTH", reply_src=SHOP_IP, reply_dst=NODE_IP)  # fmt: skip
    for hook in ("PRE_ROUTING", "FORWARD", "POST_ROUTING"):
        found = who(knowing(*ROUTED), replace(key, hook=hook))
        assert (found.owner.label, found.direction) == ("prod/shop", "forward")
        assert found.peer is not None
        assert (found.peer.kind, found.peer.name) == ("external", OUTSIDE_IP)
    # of the same packet untranslated the node is the receiver, as of one for a hostPort of its own
    for plain in (replace(key, nat="", reply_src="", reply_dst=""), replace(key, reply_src=NODE_IP)):
        found = who(knowing(*ROUTED), plain)
        assert (found.owner.label, found.direction) == ("node-1", "in")


def test_a_masqueraded_packet_stays_its_senders() -> None:
    key = dropped(HOST, CART_IP, OUTSIDE_IP, ifindex=UPLINK, iif=TO_CART, hook="POST_ROUTING",
                  nat="SRC", reply_src=OUTSIDE_IP, reply_dst=NODE_IP)  # fmt: skip
    found = who(knowing(*ROUTED), key)
    assert (found.owner.label, found.direction, found.device) == ("prod/cart", "forward", "eth0")
    assert found.peer is not None
    assert (found.peer.kind, found.peer.name) == ("external", OUTSIDE_IP)


# Whose an address is, for the lines of a connection table


def owner_at(identity: Identity, text: str, netns: int = HOST, at_s: float = 10) -> str:
    owner = identity.owner_at(text, netns, COOKIES.get(netns, 0), round(at_s * S))
    return f"{owner.kind} {owner.label}"


def test_an_address_in_a_table_is_that_of_a_pod_of_the_node_or_of_nobody_here() -> None:
    identity = knowing(*ROUTED)
    assert owner_at(identity, CART_IP) == "pod prod/cart"
    assert owner_at(identity, NODE_IP) == "host node-1"
    assert owner_at(identity, OUTSIDE_IP) == f"external {OUTSIDE_IP}"
    assert owner_at(identity, "") == "unknown unknown:others"
    assert owner_at(identity, "224.0.0.251") == "unknown unknown:224.0.0.251"


@pytest.mark.parametrize("loopback", ["127.0.0.1", "::1"])
def test_loopback_is_whoever_has_the_table(loopback: str) -> None:
    identity = knowing(*ROUTED)
    assert owner_at(identity, loopback) == "host node-1"
    assert owner_at(identity, loopback, CART) == "pod prod/cart"
    assert owner_at(identity, loopback, STRANGER) == f"unknown unknown:netns:{STRANGER}"


def test_the_address_that_every_namespace_has_is_that_of_the_one_with_the_table() -> None:
    same = [address(CART, EVERYWHERE), address(SHOP, EVERYWHERE)]
    identity = knowing(*ROUTED, *same)
    assert owner_at(identity, EVERYWHERE, CART) == "pod prod/cart"
    assert owner_at(identity, EVERYWHERE, SHOP) == "pod prod/shop"
    assert owner_at(identity, EVERYWHERE, HOST) == f"unknown unknown:{EVERYWHERE}"


def test_without_cookies_an_address_of_another_namespace_is_not_taken_for_ones_own() -> None:
    identity = knowing(NODE, pod(CART, "cart", cookie=0), address(CART, CART_IP, cookie=0))
    assert identity.owner_at(CART_IP, HOST, 0, 10 * S).label == "prod/cart"
    assert identity.owner_at(CART_IP, CART, 0, 10 * S).label == "prod/cart"


def test_an_address_is_gone_when_all_who_had_it_are() -> None:
    had = address(CART, "10.244.1.77", 1, 5)
    identity = knowing(NODE, had)
    assert [identity.is_gone("10.244.1.77", round(at_s * S)) for at_s in (4, 5, 5.1, 60)] == [False, False, True, True]
    assert not identity.is_gone(CART_IP, 60 * S)  # never seen here: nobody's that could be gone
    assert not knowing(NODE, had, address(SHOP, "10.244.1.77", 30)).is_gone("10.244.1.77", 60 * S)
    assert knowing(NODE, had, address(SHOP, "10.244.1.77", 30, 40)).is_gone("10.244.1.77", 60 * S)


BRIDGED = (
    NODE,
    pod(CART, "cart"), pod(SHOP, "shop"),
    address(HOST, NODE_IP), address(HOST, "10.244.1.1"), address(CART, CART_IP), address(SHOP, SHOP_IP),
    Link(HOST, UPLINK, "eth0", 1), Link(HOST, BRIDGE, "cni0", 1, "bridge"),
    veth(HOST, TO_CART, "veth01", CART), veth(HOST, TO_SHOP, "veth02", SHOP),
)  # fmt: skip


def test_on_a_bridge_the_owner_is_the_sender_else_the_receiver() -> None:
    identity = knowing(*BRIDGED)
    for src, dst, owner, peer in (
        (CART_IP, SHOP_IP, "prod/cart", "prod/shop"),
        (CART_IP, OUTSIDE_IP, "prod/cart", OUTSIDE_IP),
        (OUTSIDE_IP, SHOP_IP, "prod/shop", OUTSIDE_IP),
    ):
        found = who(identity, dropped(HOST, src, dst, ifindex=BRIDGE, iif=BRIDGE, hook="FORWARD"))
        assert (found.owner.label, found.owner.how, found.direction) == (owner, "ip", "forward")
        assert found.peer is not None
        assert found.peer.label == peer


def test_transit_between_strangers_is_the_routers() -> None:
    found = who(knowing(*BRIDGED), dropped(HOST, OUTSIDE_IP, "198.51.100.7", ifindex=UPLINK, hook="FORWARD"))
    assert (found.owner.kind, found.direction) == ("host", "forward")


def test_the_same_holds_in_a_node_that_is_itself_a_named_namespace() -> None:
    router = NetnsOwner(STRANGER, "netns", "lab-node", COOKIES[STRANGER], how="netns")
    identity = knowing(
        NODE, router, pod(CART, "cart"), address(STRANGER, "10.9.0.1"), address(CART, CART_IP),
        veth(STRANGER, 5, "v5", CART),
    )  # fmt: skip
    found = who(identity, dropped(STRANGER, CART_IP, OUTSIDE_IP, ifindex=5, hook="FORWARD"))
    assert (found.owner.label, found.direction) == ("prod/cart", "forward")
    found = who(identity, dropped(STRANGER, CART_IP, "10.9.0.1", ifindex=5))
    assert (found.owner.label, found.direction) == ("lab-node", "in")


def test_a_folded_row_belongs_to_the_pod_behind_its_device() -> None:
    identity = knowing(*ROUTED)
    found = who(identity, dropped(HOST, ifindex=TO_CART, hook="FORWARD"))
    assert (found.owner.label, found.direction, found.peer) == ("prod/cart", "forward", None)
    assert who(identity, dropped(HOST, ifindex=TO_CART)).owner.label == "prod/cart"


def test_a_folded_row_without_a_veth_belongs_to_its_namespace() -> None:
    identity = knowing(*ROUTED)
    for netns, ifindex, hook, label in (
        (HOST, UPLINK, "", "node-1"),
        (HOST, TO_CART, "LOCAL_IN", "node-1"),
        (CART, 2, "", "prod/cart"),
        (CART, 0, "", "prod/cart"),
    ):
        found = who(identity, dropped(netns, ifindex=ifindex, hook=hook))
        assert (found.owner.label, found.direction) == (label, "")


@pytest.mark.parametrize("dst", ["10.244.1.255", "10.244.77.77"])
def test_what_a_pod_gets_but_was_not_meant_for_it_is_not_the_nodes(dst: str) -> None:
    # a directed broadcast, or a packet flooded by a bridge
    found = who(knowing(*ROUTED), dropped(CART, SHOP_IP, dst, ifindex=2, iif=2))
    assert found.owner.label == "prod/cart"


# Addresses that are given out again, or are claimed by several


def test_an_address_given_out_again_belongs_to_whoever_has_it_then() -> None:
    identity = knowing(
        *BRIDGED, pod(STRANGER, "older", 1, 5), address(STRANGER, "10.244.1.9", 1, 5),
        address(SHOP, "10.244.1.9", 6),
    )  # fmt: skip
    key = dropped(HOST, OUTSIDE_IP, "10.244.1.9", ifindex=UPLINK, hook="FORWARD")
    assert [who(identity, key, at_s).owner.name for at_s in (2, 5, 5.5, 6, 60)] == ["older"] * 3 + ["shop"] * 2


def test_the_last_packets_of_a_pod_stay_its_own_when_its_address_was_given_out_again() -> None:
    identity = knowing(
        *ROUTED, pod(STRANGER, "older", 1, 5), veth(STRANGER, 2, "eth0", HOST),
        address(STRANGER, "10.244.1.9", 1, 5), address(SHOP, "10.244.1.9", 5.5),
    )  # fmt: skip
    found = who(identity, dropped(STRANGER, OUTSIDE_IP, "10.244.1.9", ifindex=2), 6)
    assert (found.owner.name, found.direction) == ("older", "in")


def test_an_address_that_two_claim_is_nobodys() -> None:
    """A pod may give itself any address: it must not collect the drops of others, nor hand its own to them."""
    identity = knowing(*BRIDGED, address(SHOP, CART_IP))
    transit = who(identity, dropped(HOST, CART_IP, OUTSIDE_IP, ifindex=BRIDGE, hook="FORWARD"))
    assert transit.owner.kind == "host"
    coming = who(identity, dropped(HOST, OUTSIDE_IP, CART_IP, ifindex=UPLINK, hook="FORWARD"))
    assert coming.owner.kind == "host"
    peer = who(identity, dropped(HOST, CART_IP, NODE_IP, ifindex=BRIDGE)).peer
    assert peer is None or peer.kind not in ("pod", "container")
    # where the packet is inside the pod, or on its own veth, there is nothing to guess
    assert who(identity, dropped(CART, OUTSIDE_IP, CART_IP)).owner.label == "prod/cart"
    behind = dropped(HOST, CART_IP, OUTSIDE_IP, ifindex=TO_CART, hook="FORWARD")
    assert who(identity, behind).owner.label == "prod/cart"


def test_an_address_that_two_claim_is_not_called_external() -> None:
    identity = knowing(*BRIDGED, address(SHOP, CART_IP))
    peer = who(identity, dropped(HOST, CART_IP, NODE_IP, ifindex=BRIDGE)).peer
    assert peer is None or peer.kind == "unknown"


def test_of_two_that_claim_an_address_the_one_on_this_node_is_meant() -> None:
    # two labs on one machine use the same range; only one has a veth into this router
    elsewhere = 4026532900
    identity = knowing(
        *BRIDGED, NetnsOwner(elsewhere, "netns", "other-lab", 4900), Address(elsewhere, CART_IP, 4900),
    )  # fmt: skip
    found = who(identity, dropped(HOST, CART_IP, OUTSIDE_IP, ifindex=BRIDGE, hook="FORWARD"))
    assert found.owner.label == "prod/cart"


def test_a_pod_that_takes_the_nodes_address_gets_none_of_the_nodes_drops() -> None:
    identity = knowing(*ROUTED, address(SHOP, NODE_IP))
    arriving = who(identity, dropped(HOST, OUTSIDE_IP, NODE_IP, ifindex=UPLINK))
    assert (arriving.owner.kind, arriving.direction) == ("host", "in")
    leaving = who(identity, dropped(HOST, NODE_IP, OUTSIDE_IP))
    assert (leaving.owner.kind, leaving.direction) == ("host", "out")
    probe = who(identity, dropped(CART, NODE_IP, CART_IP, ifindex=2))
    assert probe.owner.label == "prod/cart"
    assert probe.peer is not None
    assert probe.peer.kind == "host"


def test_a_peer_whose_owner_was_never_named_is_its_address() -> None:
    identity = knowing(*ROUTED, address(STRANGER, "10.244.1.77"))
    peer = who(identity, dropped(CART, "10.244.1.77", CART_IP)).peer
    assert peer is not None
    assert (peer.kind, peer.name) == ("external", "10.244.1.77")
