from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from k8sdiag import report
from k8sdiag.cli import duration_s, main
from k8sdiag.engine import Engine
from k8sdiag.facts import (
    Address,
    AnyFact,
    Capability,
    Clock,
    ConntrackStats,
    ConntrackTable,
    DropKey,
    Drops,
    Lost,
    NetnsOwner,
    Node,
    Reason,
    Symbol,
)
from k8sdiag.source import Batch
from k8sdiag.trace import TraceWriter

NETNS = 4026532100
WATCHING: tuple[AnyFact, ...] = (
    Node("worker-1", "6.18.1", 4026531840),
    Clock(1_790_000_000 * 10**9),
    Capability("drops", "full", "raw_tracepoint:kfree_skb"),
    Reason(3, "NO_SOCKET"),
    Symbol(9, "__udp4_lib_rcv"),
    NetnsOwner(NETNS, "pod", "cart-1", namespace="shop", workload="Deployment/cart", uid="u1"),
    DropKey(1, 3, 9, NETNS, family=2, protocol=17, src="10.0.0.9", dst="10.0.0.1", sport=5000, dport=53),
)
# What every reader of `check -o json` may rely on.
KEYS = [
    "schema",
    "status",
    "window",
    "node",
    "filtered",
    "findings",
    "namespaces",
    "owners",
    "drops",
    "connections",
    "conntrack",
    "tunnels",
    "listeners",
    "dns",
    "machine",
    "storage",
    "rulesets",
    "sysctls",
    "policies",
    "egress",
    "lost",
    "capabilities",
    "self",
]
FINDING = [
    "cause",
    "severity",
    "confidence",
    "ignored",
    "title",
    "victims",
    "culprits",
    "packets",
    "connections",
    "evidence",
    "fix",
    "ruled_out",
]
DROP = [
    "reason",
    "location",
    "hook",
    "cause",
    "benign",
    "owner",
    "peer",
    "service",
    "direction",
    "family",
    "protocol",
    "src",
    "dst",
    "sport",
    "dport",
    "reply",
    "device",
    "netns",
    "skbs",
    "packets",
    "bytes",
]
OWNER = ["kind", "namespace", "name", "workload", "uid", "how", "confidence"]


def trace(path: Path, packets_per_s: list[int], *, lost_at_s: int | None = None) -> str:
    """A trace with so many drops in each second."""
    file = io.BytesIO()
    writer = TraceWriter(file)
    writer.write(Batch(0, WATCHING))
    for second, packets in enumerate(packets_per_s, 1):
        facts: list[AnyFact] = [Drops((1,), (packets,), (packets,), (packets * 60,))] if packets else []
        if lost_at_s is not None:
            facts.append(Lost(events=int(second >= lost_at_s)))
        writer.write(Batch(second * 10**9, tuple(facts)))
    path.write_bytes(file.getvalue())
    return str(path)


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, object]]:
    code = main(["check", *words, "-o", "json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_json_has_the_keys_that_programs_rely_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = check(capsys, trace(tmp_path / "a.k8sd", [10] * 12))
    assert (code, result["status"], result["schema"]) == (1, "warning", "k8sdiag/check/v1")
    assert set(KEYS) == set(result)
    text = json.dumps(result)
    assert set(FINDING) == set(result["findings"][0])  # type: ignore[index]
    assert set(DROP) <= set(result["drops"][0])  # type: ignore[index]
    assert set(OWNER) == set(result["drops"][0]["owner"])  # type: ignore[index]
    assert result["connections"] is None
    assert '"self": null' in text
    assert result["lost"] == {"events": 0, "keys": 0, "samples": 0, "hooks": 0}


def test_the_worst_whole_window_of_a_trace_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 600 packets in one second are critical for that second, and a warning for any ten seconds
    for at in (0, 9):
        packets = [0] * 20
        packets[at] = 400
        code, result = check(capsys, trace(tmp_path / "a.k8sd", packets))
        assert (code, result["window"]["duration_s"]) == (1, 10.0)  # type: ignore[index]
    code, result = check(capsys, trace(tmp_path / "a.k8sd", [60] * 3))
    assert (code, result["window"]["duration_s"]) == (2, 3.0)  # type: ignore[index]
    code, result = check(capsys, trace(tmp_path / "a.k8sd", [0] * 10 + [60] * 10 + [0] * 80), "--whole")
    assert (code, result["findings"][0]["packets"]) == (1, 600)  # type: ignore[index]


def test_a_loss_counts_in_the_window_in_which_it_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = trace(tmp_path / "a.k8sd", [0] * 20, lost_at_s=1)
    code, result = check(capsys, quiet, "--duration", "5s")
    assert (code, result["status"]) == (3, "unknown")  # the worst window is the one with the loss
    late = trace(tmp_path / "b.k8sd", [0] * 19 + [100], lost_at_s=1)
    engine = Engine(5.0)
    from k8sdiag.trace import TraceSource

    for batch in TraceSource.open(late):
        engine.fold(batch)
    assert engine.snapshot().lost == Lost()
    assert report.status(engine.snapshot()) == "warning"


@pytest.mark.parametrize(
    ("packets", "lost", "drops", "expected"),
    [
        (0, 0, "full", "ok"), (100, 0, "full", "warning"), (1000, 0, "full", "critical"), (0, 1, "full", "unknown"),
        (100, 1, "full", "unknown"), (1000, 1, "full", "critical"), (0, 0, "missing", "unknown"),
        (0, 0, "counters", "unknown"), (0, 0, "inferred", "ok"), (1000, 0, "counters", "critical"),
    ],
)  # fmt: skip
def test_critical_beats_unknown_beats_warning_beats_ok(packets: int, lost: int, drops: str, expected: str) -> None:
    engine = Engine()
    engine.fold(Batch(0, (*WATCHING, Capability("drops", drops))))  # type: ignore[arg-type]
    counted: list[AnyFact] = [Drops((1,), (packets,), (packets,), (0,))] if packets else []
    engine.fold(Batch(10 * 10**9, (*counted, Lost(events=lost))))
    assert report.status(engine.snapshot()) == expected


@pytest.mark.parametrize(("packets", "nagios", "simple"), [(0, 0, 0), (100, 1, 0), (1000, 2, 1)])
def test_exit_codes_by_style(tmp_path: Path, packets: int, nagios: int, simple: int) -> None:
    path = trace(tmp_path / "a.k8sd", [packets // 10] * 10)
    assert main(["check", path]) == nagios
    assert main(["check", path, "--for", "simple"]) == simple


@pytest.mark.parametrize(
    ("expression", "code"),
    [("closed-port", 0), ("closed-port@shop", 0), ("closed-port@shop/cart", 0), ("closed-port@other", 1),
     ("closed-port@shop/web", 1), ("rp-filter", 1)],
)  # fmt: skip
def test_what_is_ignored_does_not_change_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expression: str, code: int
) -> None:
    found, result = check(capsys, trace(tmp_path / "a.k8sd", [10] * 10), "--ignore", expression)
    assert found == code
    assert result["findings"][0]["ignored"] is (code == 0)  # type: ignore[index]


@pytest.mark.parametrize(
    "words",
    [
        ["check", "--ignore", "nonsense"],
        ["check", "--bogus"],
        ["check", "/nonexistent"],
        ["check", "-v", "/nonexistent"],
        ["check", "--duration", "soon"],
        ["-v", "check"],
    ],
)
def test_what_is_no_verdict_of_check_exits_with_three(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 3
    assert "k8sdiag" in capsys.readouterr().err


def test_narrowing_keeps_drops_with_either_end_there_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace(tmp_path / "a.k8sd", [10] * 10)
    for words, packets in (
        (["-n", "shop"], 100),
        (["-n", "other"], 0),
        (["--pod", "cart-*"], 100),
        (["--pod", "x*"], 0),
    ):
        _, result = check(capsys, path, *words)
        assert result["filtered"] is True
        assert sum(row["packets"] for row in result["drops"]) == packets  # type: ignore[attr-defined]
    assert main(["check", path, "-n", "other"]) == 0
    said = capsys.readouterr().out
    assert "nothing of namespace other loses packets" in said
    assert "what others lose is not shown" in said


def test_narrowing_leaves_out_what_statistics_tell_of_a_table_that_others_fill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ConntrackTable(4026531840, 9, 0, 90, (0,), ("10.0.0.1",), ("10.0.0.2",), (6,), ("",), (90,), (0,), (9,))
    path = tmp_path / "a.k8sd"
    writer = TraceWriter(path.open("wb"))
    writer.write(Batch(0, (*WATCHING, Capability("conntrack", "full"), Address(NETNS, "10.0.0.1"))))
    writer.write(Batch(10 * 10**9, (ConntrackStats(4026531840, 0, 90, 100, early_drop=500), table)))
    writer.close()
    for words, owners in (
        ([], ["cart-1"]), (["-n", "shop"], ["cart-1"]), (["--pod", "cart-*"], ["cart-1"]),
        (["-n", "other"], []), (["-n", "shop", "--pod", "x*"], []),
    ):  # fmt: skip
        code, result = check(capsys, str(path), *words)
        assert code == (1 if owners else 0)
        found: list[str] = [finding["cause"] for finding in result["findings"]]  # type: ignore[attr-defined]
        assert found == (["ct-pressure-early-drop"] if owners else [])
        assert [row["owner"]["name"] for row in result["owners"]] == owners  # type: ignore[attr-defined]
        assert [row["early_drop"] for row in result["conntrack"]] == [500]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("10s", 10), ("5m", 300), ("1h", 3600), ("2", 2), ("1.5s", 1.5)]
)
def test_durations_take_units(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


def test_a_replay_says_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trace(tmp_path / "a.k8sd", [10] * 10)
    assert main(["replay", path, "--once"]) == 0
    assert "shop: nothing listens on the port these packets go to" in capsys.readouterr().out
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-5])
    assert main(["replay", path, "--once"]) == 0
    assert f"was cut at byte {len(whole) - 5}" in capsys.readouterr().err
