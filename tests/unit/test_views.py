from __future__ import annotations

import re

import msgspec
import pytest

from k8sdiag import details, report, tracking, views, words
from k8sdiag.errors import UsageError
from k8sdiag.facts import Capability, Cost, Lost
from k8sdiag.identity import Resident
from k8sdiag.layout import cells, clean, command_lines, cut, plain, wrap
from k8sdiag.snapshot import DropRow, Evidence, Finding, Fix, Owner, OwnerConntrack, RuledOut, Snapshot
from k8sdiag.views import DropGroup, OwnerGroup, ViewState
from tests.unit.snapshots import NODE_NETNS, TRACKING, connections, drop, pod, snapshot, translated

CART = pod("shop", "cart-7d9f8b6c5-x2x4z", "Deployment/cart")
CART_2 = pod("shop", "cart-7d9f8b6c5-aaaaa", "Deployment/cart")
API = pod("payments", "api-0", "StatefulSet/api")
HOST = Owner("host", "worker-1")


def trouble() -> Snapshot:
    return snapshot(
        [
            drop(CART, 23), drop(CART_2, 29), drop(CART, 1301, "networkpolicy-drop"), drop(API, 299, "rp-filter"),
            drop(Owner("netns", "lab-web"), 7, "udp-rcvbuf", rate_pps=0.0), drop(HOST, 4001, "benign"),
        ],
        cost=Cost(1.25, 45 << 20, 9 << 20),
    )  # fmt: skip


def table_full(victims: tuple[Owner, ...], culprits: tuple[Owner, ...], packets: int = 1301) -> Finding:
    return Finding(
        "ct-table-full", "critical", "likely", False, "the connection table is full", victims, culprits, packets, None,
        (Evidence("count", 262_138, "entries", "/proc/net/stat/nf_conntrack"),),
        (Fix("raise it", "sysctl -w net.nf_conntrack_max=524288", "the node", "room", "memory", "undo"),),
        (RuledOut("networkpolicy-drop", "conntrack counted these drops"),),
    )  # fmt: skip


def lines_of(snapshot_: Snapshot, subject: views.Subject, width: int = 100) -> str:
    return "\n".join(plain(line) for line in details.detail(snapshot_, subject, width))


def names(page: views.Page) -> list[str]:
    return [re.split(r"\s{2,}", plain(row.lines[0]))[0] for row in page.rows]


def column(page: views.Page, name: str) -> list[str]:
    heading = next(heading for heading in page.headings if heading.name == name)
    return [plain(row.lines[0]).ljust(heading.end)[heading.begin : heading.end].strip() for row in page.rows]


@pytest.mark.parametrize(
    ("pps", "text"),
    [(0, "0/s"), (0.01, "<0.1/s"), (12.34, "12.3/s"), (999.94, "999.9/s"), (999.99, "1.0k/s"), (1234, "1.2k/s"),
     (3_400_000, "3.4M/s"), (None, "n/a")],
)  # fmt: skip
def test_a_rate_says_its_unit_and_never_rounds_something_to_nothing(pps: float | None, text: str) -> None:
    assert words.rate(pps) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (0, "0 s"), (12.4, "12 s"), (59.9, "1 min"), (200, "3 min 20 s"), (3600, "1 h 00 min"),
     (18_240, "5 h 04 min")],
)  # fmt: skip
def test_a_duration_reads_as_one_says_it(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_sizes_are_in_binary_units() -> None:
    assert [words.size(count) for count in (0, 1023, 1024, 45 << 20, 3 << 30, None)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "45.0 MiB", "3.0 GiB", "n/a",
    ]  # fmt: skip


def test_the_verdict_is_in_the_first_three_lines_of_eighty_columns() -> None:
    lines = views.once(snapshot([drop(CART, 23), drop(CART_2, 6)]), 80)
    head = "\n".join(lines[:3])
    assert lines[0].startswith("WARNING shop: nothing listens on the port these packets go to")
    assert "29 packets" in head
    assert "2.9/s" in head
    assert "proven" in head
    assert "Fix: ss -lntup" in head


def test_the_worst_finding_comes_first() -> None:
    firsts = [line for line in views.once(trouble(), 80) if re.match(r"(CRITICAL|WARNING|INFO) ", line)]
    assert firsts[0].startswith("CRITICAL payments: reverse-path filtering")
    ranks = [("CRITICAL", "WARNING", "INFO").index(line.split()[0]) for line in firsts]
    assert len(ranks) == 4
    assert ranks == sorted(ranks)


def test_the_namespaces_table_holds_the_sums_per_cause() -> None:
    primes = {("a", "closed-port"): (11, 13), ("b", "rp-filter"): (17, 19), ("c", "closed-port"): (23, 29)}
    rows = [
        drop(pod(namespace, f"p{i}"), packets, cause)
        for (namespace, cause), counts in primes.items()
        for i, packets in enumerate(counts)
    ]
    lines = views.once(snapshot(rows), 80)
    begin = lines.index("Namespaces, by cause") + 2
    found = [line.split()[:3] for line in lines[begin : begin + 3]]
    assert found == [["c", "closed-port", "52"], ["b", "rp-filter", "36"], ["a", "closed-port", "24"]]


def test_a_healthy_node_says_what_was_watched_and_what_cannot_be_seen() -> None:
    limited = [Capability("drops", "full"), Capability("symbols", "missing", "", "kptr_restrict hides addresses")]
    text = "\n".join(views.once(snapshot([drop(HOST, 4001, "benign")], capabilities=limited), 80))
    assert text.startswith("OK: ")
    assert "worker-1" in text
    assert "4,001 benign" in text
    assert "kptr_restrict" in text
    assert "Cannot see" in text


def test_what_is_missing_is_never_shown_as_zero() -> None:
    blind = snapshot([], capabilities=[Capability("drops", "missing", "", "lockdown=confidentiality")])
    lines = views.once(blind, 80)
    assert lines[0].startswith("UNKNOWN")
    assert "Dropped: n/a" in lines
    assert "Cost of watching: n/a" in lines
    assert not any(re.search(r"(?<![\w.,-])0(/s| drop| packet| benign)", line) for line in lines)
    assert plain(views.head_lines(blind, "live", [], 80)[1]).startswith("drops n/a  lost n/a")


def test_losses_are_said_in_words_beside_the_verdict_and_in_the_status() -> None:
    lost = snapshot([drop(CART, 23)], lost=Lost(events=3, keys=2))
    lines = views.once(lost, 80)
    assert sum("LOST 3 drops" in line for line in lines) == 2
    assert sum("LOST 2 drops" in line for line in lines) == 2
    for width in (30, 60, 80, 200):
        assert "LOST 5" in plain(views.head_lines(lost, "live", [], width)[1])


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    rows = [
        drop(pod("n" * 63, "p" * 253, "Deployment/" + "w" * 60), 123_456_789, "networkpolicy-drop", device="d" * 15,
             src="2001:db8:1111:2222:3333:4444:5555:6666", dst="2001:db8::1", peer=pod("m" * 63, "q" * 253)),
        drop(pod("小売", "カート-1"), 23, "rp-filter"), drop(HOST, 3, "benign"),
        translated(pod("n" * 63, "p" * 253), 23, src="2001:db8:1111:2222:3333:4444:5555:6666"),
    ]  # fmt: skip
    greedy = pod("n" * 63, "c" * 253)
    held = connections(
        [(greedy, 123_456_789), (CART, 1)], insert_failed=123_456_789, drop=987_654_321, growth_per_s=1234.5,
        zones={"0": 5, "65535": 7}, full_count=123_456_790, full_max=123_456_790,
    )  # fmt: skip
    full = snapshot(
        rows, lost=Lost(1, 2, 3, 4), cost=Cost(1.0, 1 << 30, 1 << 20, 100, 30_000),
        tables=[held, connections([(CART, 1)], owner=pod("n" * 63, "t" * 253), netns=7, max=1000, full_in_s=5e6)],
        findings=[table_full((API,), (greedy, CART)), *snapshot(rows[:3]).findings],
    )  # fmt: skip
    lines = [*views.once(full, width, all_drops=True)]
    for state in (ViewState(), ViewState(grouping="pod", all_drops=True), ViewState(grouping="workload")):
        for page in (views.finding_page, views.owner_page, views.drop_page, views.conntrack_page):
            shown = page(full, state, width)
            lines += [plain(shown.heading), *(plain(line) for row in shown.rows for line in row.lines)]
            for row in shown.rows:
                lines += [plain(line) for line in details.about(row.subject, width)]
                lines += [plain(line) for line in details.detail(full, row.subject, width)]
    lines += [plain(line) for line in views.node_lines(full, width)]
    lines += [plain(line) for line in views.head_lines(full, "replay " + "f" * 200, [], width)]
    # A quoted word of a command is the one thing that may stick out: cut, it would be another command.
    wide = [line for line in lines if cells(line) > width and "grep" not in line]
    assert wide == []


def test_more_room_shows_more_columns_and_numbers_are_never_cut() -> None:
    big = snapshot([drop(CART, 123_456_789, "networkpolicy-drop")])
    narrow, wide = (views.drop_page(big, ViewState(), width) for width in (57, 197))
    assert {heading.name for heading in narrow.headings} < {heading.name for heading in wide.headings}
    assert column(narrow, "packets") == column(wide, "packets") == ["123,456,789"]
    assert column(wide, "hook") == ["FORWARD"]


def test_a_command_is_never_cut_and_a_shell_joins_its_lines_again() -> None:
    command = "iptables-save -c | grep -E 'DROP on  eth0|REJECT'; nft -a list ruleset | grep -nE \"drop|reject\""
    lines = command_lines("Fix: " + command, 40, "     ")
    assert len(lines) > 2
    assert " ".join(line.strip().removesuffix("\\").strip() for line in lines) == "Fix: " + command
    assert all(line.endswith(" \\") for line in lines[:-1])


def test_names_cannot_act_on_the_terminal() -> None:
    evil = pod("shop\x1b[2J", "a\x1b]52;c;AAAA\x07b\u202e")
    text = "\n".join(views.once(snapshot([drop(evil, 23, device="\x1b[31m")]), 80))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert clean("plain") == "plain"


def test_markup_in_a_name_is_only_a_name() -> None:
    text = "\n".join(views.once(snapshot([drop(pod("[red]", "x[/]y"), 23)]), 80))
    assert "[red]: nothing listens" in text
    assert "x[/]y" in text


def test_colour_only_where_it_was_asked_for() -> None:
    coloured = views.once(trouble(), 80, color=True)
    assert "\x1b[31;1mCRITICAL\x1b[0m" in coloured[0]
    assert [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in coloured] == views.once(trouble(), 80)


def test_benign_drops_are_hidden_and_their_sum_is_shown() -> None:
    quiet = "\n".join(views.once(trouble(), 80))
    assert "OTHERHOST" not in quiet
    assert "Benign drops not listed: 4,001 packets" in quiet
    assert "OTHERHOST" in "\n".join(views.once(trouble(), 80, all_drops=True))
    page = views.drop_page(trouble(), ViewState(all_drops=True), 120)
    assert names(page)[-1] == "worker-1"


@pytest.mark.parametrize("grouping", views.GROUPINGS)
def test_the_pods_tab_is_for_those_who_lose_and_not_for_all_who_hold_connections(grouping: views.Grouping) -> None:
    crawler = pod("batch", "crawler-0")
    shown = snapshot([drop(API, 9), drop(HOST, 4, "benign")], tables=[connections([(crawler, 400), (API, 100)])])
    assert {row.owner.label for row in shown.owners} == {"batch/crawler-0", API.label, "worker-1"}
    api = API.namespace if grouping == "namespace" else API.label
    if grouping == "workload":
        api = f"{API.namespace}/{API.workload}"
    assert names(views.owner_page(shown, ViewState(grouping=grouping), 150)) == [api]
    page = views.owner_page(shown, ViewState(grouping=grouping, all_drops=True), 150)
    assert names(page) == [api, "worker-1"]
    assert column(page, "entries") == ["100", "0"]


def test_owners_are_grouped_by_namespace_then_workload_then_pod() -> None:
    by = {grouping: views.owner_page(trouble(), ViewState(grouping=grouping), 150) for grouping in views.GROUPINGS}
    assert names(by["namespace"]) == ["shop", "payments", "lab-web"]
    assert column(by["namespace"], "packets") == ["1,353", "299", "7"]
    assert names(by["workload"]) == ["shop/Deployment/cart", "payments/StatefulSet/api", "lab-web"]
    assert column(by["pod"], "packets") == ["1,324", "299", "29", "7"]


def test_a_named_namespace_is_not_mixed_up_with_a_kubernetes_namespace_of_its_name() -> None:
    page = views.owner_page(snapshot([drop(CART, 23), drop(Owner("netns", "shop"), 29)]), ViewState(), 100)
    assert column(page, "packets") == ["29", "23"]
    assert len({row.key for row in page.rows}) == 2


def test_sorting_by_a_column_and_back() -> None:
    by_name = ViewState(sort="owner", grouping="pod")
    assert names(views.owner_page(trouble(), by_name, 100)) == sorted(names(views.owner_page(trouble(), by_name, 100)))
    rising = views.owner_page(trouble(), ViewState(sort="packets", reverse=True, grouping="pod"), 100)
    assert column(rising, "packets") == ["7", "29", "299", "1,324"]
    assert "▲" in plain(rising.heading)
    assert "▼" in plain(views.owner_page(trouble(), ViewState(sort="rate"), 100).heading)


@pytest.mark.parametrize(
    ("text", "packets"),
    [
        ("", 1659), ("payments", 299), ("!payments", 1360), ("reason=netfilter*", 1301), ("FORWARD", 1301),
        ("ns=shop cause!=closed-port", 1301), ("cart listens", 52), ("dport=5353 kind=netns", 7), ("nosuchthing", 0),
        ("workload=*/cart", 1353),
    ],
)  # fmt: skip
def test_the_filter_narrows_all_tabs_alike(text: str, packets: int) -> None:
    state = ViewState(filter=text, grouping="pod")
    owners = [row.subject for row in views.owner_page(trouble(), state, 100).rows]
    drops = [row.subject for row in views.drop_page(trouble(), state, 100).rows]
    assert sum(group.drops.packets for group in owners if isinstance(group, OwnerGroup)) == packets
    assert sum(group.packets for group in drops if isinstance(group, DropGroup)) == packets
    assert bool(views.finding_page(trouble(), state, 100).rows) == bool(packets)


def test_a_filter_on_a_field_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"no field 'color'.*reason"):
        views.matcher("color=red")


def test_only_the_chosen_namespaces_are_shown() -> None:
    assert views.namespaces(trouble()) == ["payments", "shop", ""]
    state = ViewState(namespaces=("payments",))
    assert names(views.owner_page(trouble(), state, 100)) == ["payments"]
    assert len(views.finding_page(trouble(), state, 100).rows) == 1
    assert names(views.owner_page(trouble(), ViewState(namespaces=("",)), 100)) == ["lab-web"]


def test_rows_beyond_the_limit_are_announced() -> None:
    many = snapshot([drop(pod("shop", f"p{i}"), i + 1) for i in range(500)])
    page = views.drop_page(many, ViewState(limit=200), 100)
    assert len(page.rows) == 200
    assert page.hidden == 300
    assert column(page, "packets")[0] == "500"


def test_flows_of_one_kind_are_one_line_and_its_details_list_them() -> None:
    flows = snapshot([drop(CART, 23, src="192.0.2.7", dport=port, bytes=2048) for port in (53, 54, 55)])
    page = views.drop_page(flows, ViewState(), 100)
    assert column(page, "packets") == ["69"]
    text = "\n".join(plain(line) for line in details.detail(flows, page.rows[0].subject, 100))
    assert all(f"192.0.2.1:{port}" in text for port in (53, 54, 55))
    assert "2.0 KiB" in text


def test_the_details_of_a_finding_carry_the_fix_with_its_scope_risk_and_undo() -> None:
    shown = trouble()
    text = "\n".join(plain(line) for line in details.detail(shown, shown.findings[0], 80))
    assert "sysctl -w net.ipv4.conf.all.rp_filter=2" in text
    for word in ("where: ", "why: ", "risk: ", "undo: ", "Evidence", "Ruled out", "skb:kfree_skb"):
        assert word in text


def test_a_row_is_copied_as_its_fix_or_in_words() -> None:
    shown = trouble()
    assert details.copyable(shown.findings[0]).startswith("sysctl -w ")
    row = views.drop_page(shown, ViewState(), 80).rows[0]
    assert details.copyable(row.subject).startswith("shop/cart-7d9f8b6c5-x2x4z <- 192.0.2.7: 1,301 packets")
    assert details.topic(row.subject) == "networkpolicy-drop"


def test_pods_lists_every_namespace_and_how_it_is_known() -> None:
    residents = [
        Resident(CART, 4026532187, ("192.0.2.1", "2001:db8::1"), "/proc/42/cgroup"),
        Resident(Owner("host", "worker-1", how="netns", confidence="proven"), 4026531840, (), "the node itself"),
    ]
    wide, narrow = views.pods(residents, 200), views.pods(residents, 80)
    assert "192.0.2.1, 2001:db8::1" in wide[1]
    assert "netns, proven" in wide[1]
    assert all(cells(line) <= 80 for line in narrow)
    assert "4026532187" in narrow[1]


def test_text_is_cut_and_wrapped_by_cells() -> None:
    assert cut("カート", 5) == "カー…"
    assert cut("cart-7d9f8b6c5-x2x4z", 11, middle=True) == "cart-…x2x4z"
    assert wrap("  one two three", 9, "    ") == ["  one two", "    three"]
    assert "".join(wrap("a" * 50, 20)) == "a" * 50


# Connection tables

GREEDY = pod("shop", "crawler-0", "StatefulSet/crawler")


def saturated() -> Snapshot:
    """The crawler fills the node's table; the API loses by it, the cart to a port in use, and bank/web to a rule."""
    rows = [
        drop(API, 1301, "ct-table-full", netns=NODE_NETNS, verdict="refused", confidence="likely"),
        translated(CART, 23),
        drop(pod("bank", "web-0"), 401, "networkpolicy-drop", netns=NODE_NETNS, verdict="rule"),
    ]
    table = connections(
        [(GREEDY, 81_000), (CART, 12_000), (API, 7_000)], insert_failed=23, drop=1324, invalid=4, found=211
    )
    return snapshot(rows, tables=[table], findings=[table_full((API,), (GREEDY,))])


def block(lines: list[str], title: str) -> list[list[str]]:
    """Cells of a table within some text, from its title to an empty line."""
    begin = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
    end = next((i for i in range(begin, len(lines)) if not lines[i]), len(lines))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[begin:end]]


def test_a_table_shows_what_it_refused_apart_from_what_it_could_not_insert() -> None:
    page = views.conntrack_page(saturated(), ViewState(), 197)
    assert names(page) == ["node worker-1"]
    assert [column(page, name) for name in ("count", "max", "used", "refused", "insert_failed", "invalid")] == [
        ["100,000"], ["100,000"], ["100 %"], ["1,301"], ["23"], ["4"],
    ]  # fmt: skip
    assert column(page, "full_in") == ["full"]
    assert column(page, "clash_resolved") == ["n/a"]
    assert column(page, "chain_too_long") == ["0"]


def test_the_fullest_table_stands_first_and_another_column_can_be_sorted_by() -> None:
    full, filling = connections([(CART, 90)], max=100), connections([(API, 500)], netns=7, max=1000, full_in_s=12.0)
    endless = connections([(API, 9)], netns=8, max=0)
    unread = connections([(API, 9)], netns=9, max=None)
    page = views.conntrack_page(snapshot([], tables=[full, filling, endless, unread]), ViewState(), 197)
    assert column(page, "used") == ["90 %", "50 %", "n/a", "n/a"]
    assert column(page, "max") == ["100", "1,000", "no limit", "n/a"]
    assert column(page, "full_in") == ["-", "12 s", "-", "-"]
    assert page.sort == "used"
    by_count = views.conntrack_page(snapshot([], tables=[full, filling]), ViewState(sort="count"), 197)
    assert column(by_count, "count") == ["500", "90"]
    soon = connections([(API, 9)], netns=10, max=10, full_in_s=3.0)
    by_time = views.conntrack_page(snapshot([], tables=[full, filling, soon]), ViewState(sort="full_in"), 197)
    assert column(by_time, "full_in") == ["3 s", "12 s", "-"]


@pytest.mark.parametrize("width", [76, 197])
def test_victims_and_culprits_are_on_one_screen(width: int) -> None:
    shown = saturated()
    lines = [plain(line) for line in tracking.page_lines(shown, shown.conntrack[0], width, 16)]
    assert "bank/web-0" not in "\n".join(lines)
    victims = [
        ["payments/api-0", "1,301", "130.1/s", "ct-table-full"],
        ["shop/cart-7d9f8b6c5-x2x4z", "23", "2.3/s", "ct-snat-port-clash"],
    ]
    culprits = [
        ["shop/crawler-0", "81,000", "81 %", "16,200", "25 %"],
        ["shop/cart-7d9f8b6c5-x2x4z", "12,000", "12 %", "2,400", "25 %"],
        ["payments/api-0", "7,000", "7 %", "1,400", "25 %"],
    ]
    if width < tracking.BESIDE_CELLS:
        assert (block(lines, "VICTIMS"), block(lines, "CULPRITS")) == (victims, culprits)
        assert next(i for i, line in enumerate(lines) if line.startswith("CULPRITS")) + len(culprits) < 16
    else:
        assert "CULPRITS" in next(line for line in lines if line.startswith("VICTIMS"))
        assert block(lines, "VICTIMS") == [a + b for a, b in zip([*victims, []], culprits, strict=True)]


def test_a_table_of_another_namespace_is_not_blamed() -> None:
    other = connections([(CART, 5)], owner=Owner("netns", "lab"), netns=7, max=1000)
    shown = snapshot(saturated().drops, tables=[saturated().conntrack[0], other], findings=[])
    assert [victim.owner for victim in tracking.victims(shown, shown.conntrack[0])] == [API, CART]
    assert tracking.victims(shown, other) == []
    assert "Nobody lost a packet by it." in lines_of(shown, other)


def test_a_reset_inside_a_pod_is_laid_to_the_table_that_found_its_packets_invalid() -> None:
    node, lab = saturated().conntrack[0], connections([(CART, 5)], netns=7, max=1000)
    reset = drop(API, 5, "ct-invalid-rst", netns=4026532999)
    shown = snapshot([reset], tables=[node, lab], findings=[])
    assert [victim.owner for victim in tracking.victims(shown, node)] == [API]
    assert tracking.victims(shown, lab) == []


def test_connections_that_gave_way_are_told_where_that_is_known() -> None:
    table = connections([(GREEDY, 10)], early_drop=5)
    base = snapshot([drop(CART, 3, "closed-port")], tables=[table])
    evicted = OwnerConntrack(1, 0, 0, 5, None, None)
    owners = tuple(
        msgspec.structs.replace(row, conntrack=evicted if row.owner == CART else None) for row in base.owners
    )
    known = msgspec.structs.replace(base, owners=owners)
    assert block(lines_of(known, table).splitlines(), "VICTIMS") == [[CART.label, "0", "0/s", "5 evicted"]]
    assert tracking.victims(base, table) == []


def test_lost_packets_without_a_drop_that_was_seen_are_not_nobodys() -> None:
    table = connections([(GREEDY, 10)], drop=5)
    assert "Nobody" not in lines_of(snapshot([], tables=[table], findings=[]), table)
    assert "n/a: it lost packets" in lines_of(snapshot([], tables=[table], findings=[]), table)
    blind = snapshot([], tables=[table], findings=[], capabilities=[Capability("conntrack", "counters")])
    assert "n/a: drops are not watched here" in lines_of(blind, table)


def test_the_age_of_the_reading_is_said_and_a_table_not_read_has_no_culprits() -> None:
    zones = connections([(GREEDY, 1000)], zones={"0": 977, "5": 23}, stale=None)
    text = lines_of(snapshot([], tables=[zones]), zones)
    assert "Read 3 s ago: 1,000 entries, 25 % unreplied, n/a stale; zones 0: 977, 5: 23" in text
    assert "zones" not in lines_of(saturated(), saturated().conntrack[0])
    assert block(text.splitlines(), "PROTOCOL") == [
        ["tcp", "ESTABLISHED", "750", "75 %", "0 %", "24 h 00 min"], ["udp", "-", "250", "25 %", "100 %", "29 s"],
    ]  # fmt: skip
    unread = msgspec.structs.replace(
        zones, table_t_ns=None, entries=None, unreplied=None, stale=None, holders=(), protocols=(), zones={}
    )
    text = lines_of(snapshot([], tables=[unread]), unread)
    assert "who holds it is n/a" in text
    assert "CULPRITS\nn/a: the table was not read yet." in text
    assert "PROTOCOL" not in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max": 1000, "growth_per_s": 20.0, "full_in_s": 30.0},
         "[########............] 40 %, 400 of 1,000 entries, growing 20.0/s, full in 30 s"),
        ({"max": 400}, "[####################] 100 %, 400 of 400 entries: FULL"),
        ({"max": 401}, "[###################.] 99 %, 400 of 401 entries"),
        ({"max": 50_000, "growth_per_s": -3.0}, "[....................] <1 %, 400 of 50,000 entries, shrinking 3.0/s"),
        ({"max": 0}, "400 entries, no limit"),
        ({"max": None}, "400 entries, limit n/a"),
    ],
)  # fmt: skip
def test_how_full_a_table_is_reads_without_colours(changes: dict[str, object], text: str) -> None:
    assert tracking.gauge(msgspec.structs.replace(connections([(CART, 400)]), **changes)) == text


def test_when_it_refused_is_told_of_a_table_that_has_room_again() -> None:
    emptied = connections([(CART, 400)], max=1000, drop=7, full_count=1000, full_max=1000)
    assert "refused 7 at 1,000 of 1,000 entries" in tracking.counters(emptied)


def test_the_verdict_names_who_holds_the_table() -> None:
    lines = views.once(saturated(), 80)
    assert lines[0] == "CRITICAL payments: the connection table is full"
    assert "  because shop/crawler-0 holds 81 % of the table" in lines[:4]
    several = snapshot(
        saturated().drops, tables=saturated().conntrack, findings=[table_full((API,), (GREEDY, CART, HOST))]
    )
    assert "because shop/crawler-0 holds 81 % of the table, shop/cart-7d9f8b6c5-x2x4z 12 %, node worker-1" in " ".join(
        line.strip() for line in views.once(several, 80)[:5]
    )
    nobody = snapshot(saturated().drops, tables=saturated().conntrack, findings=[table_full((API,), ())])
    assert "because" not in "\n".join(views.once(nobody, 80))


def test_a_full_table_that_the_catalogue_explains_names_the_pod_that_fills_it() -> None:
    shown = snapshot(saturated().drops, tables=saturated().conntrack)
    lines = views.once(shown, 80)
    assert lines[0].startswith("CRITICAL payments: ")
    assert "1,301 packets dropped" in lines[1]
    assert lines[2].startswith("  because shop/crawler-0 holds 81 % of the table")
    full = next(finding for finding in shown.findings if finding.cause == "ct-table-full")
    assert "networkpolicy-drop: " in lines_of(shown, full).partition("Ruled out")[2]


def test_a_table_that_is_nearly_full_is_told_although_nobody_loses_a_packet() -> None:
    for count, told in ((899, False), (900, True)):
        filling = connections([(GREEDY, count)], max=1000, growth_per_s=2.0, full_in_s=50.0)
        shown = snapshot([], tables=[filling, connections([(CART, 3)], netns=7, max=1000)])
        lines = views.once(shown, 120)
        assert lines[0].startswith("OK: ")
        assert any("Nearly full: the connection table of node worker-1" in line for line in lines) == told
        assert any("growing 2.0/s, full in 50 s" in line for line in lines)
        assert ("table 90 % full" in plain(views.head_lines(shown, "live", [], 80)[1])) == told


def test_pressure_without_a_loss_is_not_called_a_drop() -> None:
    pressure = table_full((HOST,), (GREEDY,), packets=0)
    shown = snapshot([], tables=[connections([(GREEDY, 90)], early_drop=3)], findings=[pressure])
    text = "\n".join(views.once(shown, 80)[:4])
    assert "no packet lost" in text
    assert "0 packets" not in text
    assert "because shop/crawler-0 holds 100 % of the table" in text
    for state, left in ((ViewState(filter="crawler"), 0), (ViewState(filter="cause=ct-table-full"), 1),
                        (ViewState(namespaces=("shop",)), 0), (ViewState(namespaces=("",)), 1)):  # fmt: skip
        assert len(views.findings(shown, state)) == left


def test_the_details_of_a_finding_name_victims_culprits_and_what_it_is_not() -> None:
    shown = saturated()
    text = lines_of(shown, shown.findings[0])
    parts = [text.index(words) for words in (
        "Who is hurt", "payments/api-0", "Who causes it", "shop/crawler-0, of StatefulSet/crawler",
        "Because shop/crawler-0 holds 81 % of the table.", "sysctl -w", "count: 262,138 entries", "Ruled out",
        "networkpolicy-drop: conntrack counted these drops",
    )]  # fmt: skip
    assert parts == sorted(parts)
    unnamed = lines_of(shown, table_full((API,), ()))
    assert "Who causes it\n  n/a" in unnamed
    assert "Who causes it" not in lines_of(trouble(), trouble().findings[0])


def test_a_translated_connection_is_shown_both_ways() -> None:
    shown = saturated()
    group = next(group for group in views.drop_groups(shown, ViewState()) if group.rows[0].owner == CART)
    text = lines_of(shown, group)
    assert "connection: cart-7d9f8b6c5-x2x4z:41234 → 10.96.0.10:53 ⇄ 10.244.2.7:53 → 10.244.2.1:40000" in text
    assert "udp 10.244.1.9:41234 → 10.96.0.10:53 ⇄ 10.244.2.7:53" in text
    assert "translated: source and destination" in text
    assert "10.96.0.10:53 <-> 10.244.2.7:53" in "\n".join(views.once(shown, 200))
    untouched = next(group for group in views.drop_groups(shown, ViewState()) if group.rows[0].owner == API)
    assert "⇄" not in lines_of(shown, untouched)
    assert "translated" not in lines_of(shown, untouched)


@pytest.mark.parametrize(
    ("row", "words_"),
    [
        (translated(CART, 23), "met one that was there already, and could not be inserted (likely: told from"),
        (translated(CART, 23, confidence="proven"), "could not be inserted (proven: seen in the function"),
        (drop(CART, 2, "ct-table-full", verdict="unknown", confidence="possible"), "and statistics decided"),
        (drop(CART, 2, "networkpolicy-drop", verdict="rule"), "a rule dropped it; conntrack counted nothing"),
    ],
)
def test_what_conntrack_had_to_do_with_a_drop_is_said_in_words(row: DropRow, words_: str) -> None:
    shown = snapshot([row], findings=[])
    text = " ".join(lines_of(shown, views.drop_groups(shown, ViewState())[0]).split())
    assert "conntrack's part: " in text
    assert words_ in text
    plain_drop = snapshot([drop(CART, 23)])
    assert "conntrack's part" not in lines_of(plain_drop, views.drop_groups(plain_drop, ViewState())[0])


def test_the_filter_asks_for_the_verdict_and_the_backend() -> None:
    for text in ("verdict=clash", "10.244.2.7", "service=10.96.0.10:53", "nat=both reply=*:40000"):
        groups = views.drop_groups(saturated(), ViewState(filter=text))
        assert [group.rows[0].owner for group in groups] == [CART]


def test_owners_show_their_entries_and_what_conntrack_did_to_them() -> None:
    shown = saturated()
    for state in (ViewState(grouping="pod"), ViewState(grouping="pod", filter="netfilter_drop")):
        page = views.owner_page(shown, state, 197)
        entries = dict(zip(names(page), column(page, "entries"), strict=True))
        assert (entries[API.label], entries[CART.label]) == ("7,000", "12,000")
        text = lines_of(shown, page.rows[0].subject)
        assert "7,000 entries opened by it stand in a table" in text
        assert "refused by a full table 1,301, insert failed 0, evicted early n/a" in text
    page = views.owner_page(trouble(), ViewState(), 197)
    assert set(column(page, "entries")) == {"n/a"}
    assert "Conntrack\n  n/a" in lines_of(trouble(), page.rows[0].subject)


def test_without_conntrack_the_tab_says_why_and_without_tables_that_none_tracks() -> None:
    missing = Capability("conntrack", "missing", "", "no CAP_NET_ADMIN")
    for capabilities, words_ in (
        ([missing], "n/a: conntrack is not watched here (no CAP_NET_ADMIN)"), ([], "n/a: conntrack is not watched"),
        (TRACKING, "No network namespace tracks connections."),
    ):  # fmt: skip
        shown = snapshot([], capabilities=capabilities)
        page = views.conntrack_page(shown, ViewState(), 80)
        assert not page.rows
        assert words_ in plain(page.note)
        once = "\n".join(views.once(shown, 100))
        assert ("Connection tables" in once) == bool(capabilities)
        assert ("conntrack, TCP and tunnel counters" in once) == (not capabilities)


def test_once_tells_each_table_and_who_holds_those_in_trouble() -> None:
    quiet = connections([(CART, 5)], owner=Owner("netns", "lab"), netns=7, max=1000)
    shown = snapshot(saturated().drops, tables=[saturated().conntrack[0], quiet], findings=[])
    lines = views.once(shown, 80)
    tables = lines[lines.index("Connection tables") : lines.index("Status")]
    assert f"node worker-1, network namespace {NODE_NETNS}" in tables
    assert block(tables, "CULPRITS")[0] == ["shop/crawler-0", "81,000", "81 %", "16,200", "25 %"]
    assert sum("VICTIMS" in line for line in tables) == 1
    assert "netns lab: [....................] <1 %, 5 of 1,000 entries" in "\n".join(tables)


def test_a_table_is_copied_and_explained_by_what_ails_it() -> None:
    table = saturated().conntrack[0]
    assert details.copyable(table).startswith("node worker-1: [####################] 100 %")
    assert "held by shop/crawler-0 (81 %)" in details.copyable(table)
    assert "held by shop/crawler-0 (81 %)" in " ".join(plain(line) for line in details.about(table, 197))
    calm = connections([(CART, 5)], max=1000)
    causes_ = [details.topic(each) for each in (
        table, connections(early_drop=1), connections(chain_too_long=1), calm,
    )]  # fmt: skip
    assert causes_ == ["ct-table-full", "ct-pressure-early-drop", "ct-chain-too-long", "conntrack"]


CONTRACT = (
    "netns", "owner", "count", "max", "buckets", "new", "insert_failed", "drop", "early_drop", "clash_resolved",
    "invalid", "chain_too_long",
)  # fmt: skip


def test_the_report_has_every_table_and_null_where_conntrack_was_not_measured() -> None:
    zoned = connections([(GREEDY, 1000)], zones={"0": 977, "5": 23})
    rows = msgspec.json.decode(report.as_json(report.check(snapshot([], tables=[zoned]), filtered=False)))["conntrack"]
    (row,) = rows
    assert set(CONTRACT) <= set(row)
    assert (row["count"], row["max"], row["new"], row["clash_resolved"]) == (1000, 1000, None, None)
    assert row["zones"] == {"0": 977, "5": 23}
    assert (row["holders"][0]["owner"]["name"], row["holders"][0]["entries"]) == ("crawler-0", 1000)
    for capabilities, expected in (
        ([], None), ([Capability("conntrack", "missing")], None), (TRACKING, []),
        ([Capability("conntrack", "counters")], []),
    ):  # fmt: skip
        empty = report.as_json(report.check(snapshot([], capabilities=capabilities), filtered=False))
        assert msgspec.json.decode(empty)["conntrack"] == expected


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 7, "0 %"), (1, 1000, "<1 %"), (10, 1000, "1 %"), (999, 1000, "99 %"), (1000, 1000, "100 %"),
     (1010, 1000, "101 %"), (3, 0, "n/a"), (None, 7, "n/a"), (3, None, "n/a")],
)  # fmt: skip
def test_a_share_is_rounded_neither_to_nothing_nor_to_all(part: int | None, whole: int | None, text: str) -> None:
    assert words.percent(part, whole) == text
