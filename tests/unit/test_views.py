from __future__ import annotations

import re

import pytest

from k8sdiag import views
from k8sdiag.errors import UsageError
from k8sdiag.facts import Capability, Cost, Lost
from k8sdiag.identity import Resident
from k8sdiag.layout import cells, clean, command_lines, cut, plain, wrap
from k8sdiag.snapshot import Owner, Snapshot
from k8sdiag.views import DropGroup, OwnerGroup, ViewState
from tests.unit.snapshots import drop, pod, snapshot

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
    assert views.rate(pps) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (0, "0 s"), (12.4, "12 s"), (59.9, "1 min"), (200, "3 min 20 s"), (3600, "1 h 00 min"),
     (18_240, "5 h 04 min")],
)  # fmt: skip
def test_a_duration_reads_as_one_says_it(seconds: float, text: str) -> None:
    assert views.duration(seconds) == text


def test_sizes_are_in_binary_units() -> None:
    assert [views.size(count) for count in (0, 1023, 1024, 45 << 20, 3 << 30, None)] == [
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
    ]  # fmt: skip
    full = snapshot(rows, lost=Lost(1, 2, 3, 4), cost=Cost(1.0, 1 << 30, 1 << 20, 100, 30_000))
    lines = [*views.once(full, width, all_drops=True)]
    for state in (ViewState(), ViewState(grouping="pod", all_drops=True), ViewState(grouping="workload")):
        for page in (views.finding_page, views.owner_page, views.drop_page):
            shown = page(full, state, width)
            lines += [plain(shown.heading), *(plain(line) for row in shown.rows for line in row.lines)]
            for row in shown.rows:
                lines += [plain(line) for line in views.about(row.subject, width)]
                lines += [plain(line) for line in views.detail(full, row.subject, width)]
    lines += [plain(line) for line in views.node_lines(full, width)]
    lines += [plain(line) for line in views.head_lines(full, "replay " + "f" * 200, [], width)]
    # A quoted word of a command is the one thing that may stick out: cut, it would be another command.
    assert [line for line in lines if cells(line) > width and "grep" not in line] == []


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
    text = "\n".join(plain(line) for line in views.detail(flows, page.rows[0].subject, 100))
    assert all(f"192.0.2.1:{port}" in text for port in (53, 54, 55))
    assert "2.0 KiB" in text


def test_the_details_of_a_finding_carry_the_fix_with_its_scope_risk_and_undo() -> None:
    shown = trouble()
    text = "\n".join(plain(line) for line in views.detail(shown, shown.findings[0], 80))
    assert "sysctl -w net.ipv4.conf.all.rp_filter=2" in text
    for word in ("where: ", "why: ", "risk: ", "undo: ", "Evidence", "Ruled out", "skb:kfree_skb"):
        assert word in text


def test_a_row_is_copied_as_its_fix_or_in_words() -> None:
    shown = trouble()
    assert views.copyable(shown.findings[0]).startswith("sysctl -w ")
    row = views.drop_page(shown, ViewState(), 80).rows[0]
    assert views.copyable(row.subject).startswith("shop/cart-7d9f8b6c5-x2x4z <- 192.0.2.7: 1,301 packets")
    assert views.topic(row.subject) == "networkpolicy-drop"


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
