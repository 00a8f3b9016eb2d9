# Every word the tool prints can be asked about, and the answer comes from where the thing itself is defined.

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from k8sdiag import causes, explain, report
from k8sdiag.causes import ALL, BENIGN, Case, benign, cause_of, node
from k8sdiag.causes.cause import Drop, Severities
from k8sdiag.engine import Engine
from k8sdiag.errors import UsageError
from k8sdiag.facts import Capability, Clock, Cost, DropKey, Drops, Lost, NetnsOwner, Node, Reason, Symbol
from k8sdiag.source import Batch

CHECKOUT = Path(__file__).resolve().parents[2]
COMMANDS = ("      ", "    undo: ")
"""Lines that begin so are not broken: they are there to be copied."""


def check_json() -> dict[str, Any]:
    """What `check -o json` prints of a namespace that lost 40 datagrams at a closed port and knows its sender."""
    key = DropKey(
        1, 3, 0xFFFF0001, netns=77, ifindex=2, family=2, protocol=17, src="10.0.0.1", dst="10.0.0.2", sport=9, dport=5
    )
    first = Batch(
        0,
        (
            Node("n1", "6.18.0", 1),
            Clock(0),
            Reason(3, "NO_SOCKET"),
            Symbol(0xFFFF0001, "__udp4_lib_rcv"),
            Capability("drops", "full"),
            NetnsOwner(77, "pod", "web-1", namespace="shop", how="cgroup"),
        ),
    )
    then = Batch(10**9, (key, Drops((1,), (40,), (40,), (4000,)), Lost(), Cost(0.1, 1000)))
    engine = Engine(None)
    for batch in (first, then):
        engine.fold(batch)
    read: dict[str, Any] = msgspec.json.decode(report.as_json(report.check(engine.snapshot(), filtered=False)))
    return read


def paths(value: object, above: str = "") -> set[str]:
    """Dotted paths of all keys in a JSON value; the items of a list share one path."""
    if isinstance(value, list):
        return set().union(*(paths(item, above) for item in value))
    found = set()
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= {above + key} | paths(inner, f"{above}{key}.")
    return found


def listed_fields() -> set[str]:
    return {line.split()[0] for line in explain.fields().splitlines()}


def test_every_field_of_the_json_is_listed_and_can_be_explained() -> None:
    present = check_json()
    used = paths(present)
    assert "findings.evidence.value" in used
    assert used <= listed_fields()
    assert {path.split(".")[0] for path in listed_fields()} == set(present)
    for path in listed_fields():
        assert explain.text(path, 80).startswith(f"{path}: ")


def test_a_field_is_explained_by_the_words_beneath_it_in_the_source() -> None:
    assert "UdpNoPorts" not in explain.text("drops.flows", 80)
    assert explain.text("drops.flows", 200).splitlines() == [
        "drops.flows: integer|null",
        "Distinct 5-tuples; null where they were folded for want of room.",
    ]
    measured = (CHECKOUT / "k8sdiag" / "facts.py").read_text()
    words = explain.text("self.rss_bytes", 200).splitlines()[1]
    assert words == "Resident memory. /proc/self/statm."
    assert words in measured
    assert "always null" in explain.text("tunnels", 80)
    assert "Holds: cause, packets, connections" in explain.text("namespaces.causes", 80)


def test_words_about_the_whole_object_belong_to_fields_that_exist() -> None:
    for path, words in explain._SECTIONS.items():
        found = [field for field in listed_fields() if f".{field}".endswith(f".{path}")]
        assert found, path
        assert any(words in explain.text(field, 200) for field in found)


@pytest.mark.parametrize("cause", ALL, ids=[cause.slug for cause in ALL])
def test_a_cause_is_explained_with_all_that_it_says_of_itself(cause: causes.Cause) -> None:
    for width in (40, 80, 120):
        lines = explain.text(cause.slug, width).splitlines()
        assert lines[0] == cause.slug
        assert [line for line in lines if len(line) > width and not line.startswith(COMMANDS)] == []
    said = " ".join(explain.text(cause.slug, 100).split())
    others = [other.cause for other in cause.ruled_out + cause.ruled_out_by_verdict]
    for words in (cause.title[1:], cause.feels, cause.proof, f"Confidence: {cause.confidence} at best", *others):
        assert words in said
    for fix in cause.fix(Case([explain._nobodys_drop(cause.slug, "")])):
        assert fix.command in said
        assert fix.undo in said
    assert str(explain._NETNS) not in said


def test_the_severities_are_those_that_judge() -> None:
    rows = {line.split()[0]: line.split()[1:] for line in explain.severities().splitlines()[1 : len(ALL) + 1]}
    assert list(rows) == [cause.slug for cause in ALL]
    for cause in ALL:
        warning, critical, at_least = rows[cause.slug]
        for shown, severity in ((warning, "warning"), (critical, "critical")):
            if shown == "never":
                assert cause.severities.judge(10**9, 1) != severity
                continue
            pps = float(shown.removesuffix("/s"))
            seconds = 10 * int(at_least) / pps
            assert cause.severities.judge(round(pps * seconds), seconds) == severity
            assert cause.severities.judge(round(pps * seconds * 0.9), seconds) != severity
        assert cause.severities.judge(int(at_least) - 1, 1e-6) == "info"


def test_a_cause_that_is_never_more_than_an_information_says_so() -> None:
    assert explain._severities(Severities(None, None, 1)) == "Never more than an information."
    assert explain._severities(Severities(2.5, None, 7)) == (
        "Warning from 2.5 packets/s on, and from 7 packets on; below that an information."
    )


def test_every_reason_that_the_classification_knows_has_a_sentence() -> None:
    known = benign._REASONS | benign._DELIBERATE | node._QDISC_REASONS
    assert len(known) > 40
    assert known - explain.REASONS.keys() == set()
    assert set(benign._REASON_BEGINNINGS) == set(explain.REASON_BEGINNINGS)
    for reason in explain.REASONS:
        assert explain.REASONS[reason] in " ".join(explain.text(reason, 80).split())


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("NETFILTER_DROP", "networkpolicy-drop"),
        ("NO_SOCKET", "closed-port"),
        ("SOCKET_RCVBUFF", "udp-rcvbuf"),
        ("IP_RPFILTER", "rp-filter"),
        ("CPU_BACKLOG", "softnet-backlog"),
        ("FQ_FLOW_LIMIT", "qdisc-overlimit"),
        ("TC_EGRESS", "tc-bpf-drop"),
        ("IP_OUTNOROUTES", "no-route"),
        ("TCP_CSUM", "unexplained"),
    ],
)
def test_a_reason_names_the_cause_it_leads_to(reason: str, cause: str) -> None:
    assert cause_of(Drop(reason, "", "", "", 2, 6, "192.0.2.1", "192.0.2.2", 40000, 8080)) == cause
    for spelled in (reason, reason.lower(), f"SKB_DROP_REASON_{reason}"):
        said = explain.text(spelled, 80)
        assert said.startswith(f"{reason}\n")
        assert f"It leads to the cause {cause}:" in said
        assert said.endswith(f"More: k8sdiag explain {cause}")


@pytest.mark.parametrize(
    ("reason", "others"),
    [
        ("NETFILTER_DROP", {"ct-table-full", "ct-insert-race-dns", "ct-snat-port-clash", "snat-port-exhaustion",
                            "ct-invalid-drop-asym", "ct-chain-too-long", "nat-helper-seqadj"}),
        ("NO_SOCKET", {"ct-invalid-rst"}),
        ("NEIGH_FAILED", {"stale-udp-dnat"}),
        ("TCP_CSUM", set()),
    ],
)  # fmt: skip
def test_a_reason_names_what_else_it_may_mean_and_is_named_there(reason: str, others: set[str]) -> None:
    said = " ".join(explain.text(reason, 80).split())
    named = said.partition("more than the reason: ")[2].partition(". ")[0]
    assert set(filter(None, named.split(", "))) == others
    for slug in others:
        assert reason in explain.text(slug, 80).partition("Drop reasons that lead here")[2].partition("What to do")[0]


@pytest.mark.parametrize("reason", ["OTHERHOST", "TCP_OLD_ACK", "IPV6_NDISC_NS_OTHERHOST", "PSP_INPUT"])
def test_a_benign_reason_is_called_benign(reason: str) -> None:
    said = explain.text(reason, 80)
    assert "It is benign" in said
    assert "leads to" not in said
    assert reason in explain.text(BENIGN, 80) or reason.startswith(tuple(explain.REASON_BEGINNINGS))


def test_a_reason_of_a_newer_kernel_gets_a_general_answer() -> None:
    said = explain.text("WORMHOLE_COLLAPSED", 80)
    assert said.startswith("WORMHOLE_COLLAPSED\n")
    assert "It leads to the cause unexplained" in said


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("netwrk-policy-drop", "networkpolicy-drop"), ("NETFILTER_DORP", "NETFILTER_DROP"), ("drop.flows", "drops.flows")],
)
def test_an_unknown_topic_names_what_may_have_been_meant(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain.text(typed, 80)
    assert repr(typed) in str(caught.value)
    assert "Did you mean" in str(caught.value)
    assert meant in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_topic_like_nothing_points_to_the_lists() -> None:
    with pytest.raises(UsageError, match="--list` and --fields"):
        explain.text("qqqqqqqq", 80)


def test_the_listing_has_every_cause_and_its_title() -> None:
    lines = explain.listing().splitlines()
    assert [line.split(maxsplit=1) for line in lines[:-1]] == [[cause.slug, cause.title] for cause in ALL]
    assert lines[-1].startswith("benign ")
    assert all(len(line) <= 80 for line in lines)


def test_explaining_needs_nothing_of_the_machine() -> None:
    unwanted = ("bcc", "pyroute2", "psutil", "textual", "k8sdiag.host")
    code = f"import sys, k8sdiag.explain as e; e.fields(); print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
