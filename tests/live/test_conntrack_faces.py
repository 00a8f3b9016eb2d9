"""What check and top say of connection tracking: the verdict with its culprits, the JSON, the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from k8sdiag.host.instances import living
from k8sdiag.host.lab import Lab, PodSpec
from k8sdiag.host.lab.conntrack import fill_table
from k8sdiag.report import NAGIOS
from tests.live.test_conntrack import await_small_tables, hold_limit

pytestmark = pytest.mark.live
NewLab = Callable[..., Lab]
NAMES = {name: f"{name}-{os.getpid()}" for name in ("shop", "pay", "ops", "db")}
PODS = [
    PodSpec(NAMES["shop"], "cart-0"), PodSpec(NAMES["pay"], "ledger-0"), PodSpec(NAMES["ops"], "batch-0"),
    PodSpec(NAMES["db"], "server-0"),
]  # fmt: skip
# Narrowed to the lab's namespaces: what else the machine loses meanwhile is not this test's business.
NARROW = [word for name in NAMES.values() for word in ("-n", name)]
WATCH = "7s"
CHECK, TOP = ("check", "--duration"), ("top", "--once", "--duration")
CONTRACT = {
    "netns", "owner", "count", "max", "buckets", "new", "insert_failed", "drop", "early_drop", "clash_resolved",
    "invalid", "chain_too_long",
}  # fmt: skip
OF_OWNERS = {"entries", "insert_failed", "table_full", "early_drop", "clash_resolved", "invalid"}


@contextmanager
def started(*verbs: Sequence[str], narrow: Sequence[str] = NARROW) -> Iterator[list[subprocess.Popen[str]]]:
    """k8sdiag, several at once, each watching already."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "k8sdiag", *verb, *narrow],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        for verb in verbs
    ]
    try:
        deadline = time.monotonic() + 30
        while not {process.pid for process in processes} <= {other.pid for other in living()}:
            assert time.monotonic() < deadline, "not watching after 30 s"
            time.sleep(0.02)
        time.sleep(1.5)  # from being announced to knowing what was counted before
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def outputs(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=60)[0] for process in processes]


def label(owner: Mapping[str, Any]) -> str:
    return f"{owner['namespace']}/{owner['name']}" if owner["namespace"] else str(owner["name"])


@pytest.mark.parametrize(("attempts", "severity"), [(9, "warning"), (80, "critical")])
def test_a_full_table_in_the_json_and_by_the_exit_code(new_lab: NewLab, attempts: int, severity: str) -> None:
    lab = new_lab(pods=PODS)
    victim, _, culprit, server = lab.pods
    await_small_tables()
    with started((*CHECK, WATCH, "-o", "json", "--interval", "200ms")) as (check,):
        begin_s = time.monotonic()
        hold_limit(lab, lambda: time.monotonic() - begin_s > 3)  # until it has surely been read
        done = fill_table(lab, {victim: attempts}, server, culprit)
        (output,) = outputs([check])
    assert done.lost[victim.owner] == done.counter == attempts
    result = json.loads(output)
    (finding,) = result["findings"]
    assert (finding["cause"], finding["packets"], finding["severity"]) == ("ct-table-full", attempts, severity)
    assert finding["confidence"] == "likely"
    assert [label(owner) for owner in finding["victims"]] == [victim.owner]
    assert [label(owner) for owner in finding["culprits"]] == [culprit.owner]
    evidence = {one["name"]: one["value"] for one in finding["evidence"]}
    assert (evidence["count"], evidence["max"], evidence["refused"]) == (done.limit, done.limit, attempts)
    if result["lost"]["events"] == 0:  # of whatever else this machine drops
        assert result["status"] == severity
    assert check.returncode == NAGIOS[result["status"]]
    (table,) = (table for table in result["conntrack"] if table["netns"] == lab.node.inode)
    assert table.keys() >= CONTRACT
    assert (table["drop"], table["insert_failed"], table["early_drop"], table["new"]) == (attempts, 0, 0, None)
    own_max = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    assert (table["count"], table["max"]) == (lab.node.conntrack()["entries"], own_max)
    owners = {label(row["owner"]): row["conntrack"] for row in result["owners"]}
    assert set(owners[victim.owner]) == OF_OWNERS
    assert (owners[victim.owner]["table_full"], owners[victim.owner]["insert_failed"]) == (attempts, 0)
    assert (owners[culprit.owner]["table_full"], owners[culprit.owner]["entries"]) == (0, done.limit)


def test_check_and_top_say_who_fills_the_table_of_whom(new_lab: NewLab) -> None:
    lab = new_lab(pods=PODS)
    victim, _, culprit, server = lab.pods
    await_small_tables()
    with started((*CHECK, WATCH), (*TOP, WATCH)) as processes:
        done = fill_table(lab, {victim: 80}, server, culprit)
        texts = outputs(processes)
    assert done.lost[victim.owner] == 80
    for text in texts:
        words = " ".join(text.split())
        verdict = words[: words.index(culprit.owner) + 200]
        assert NAMES["shop"] in verdict
        assert "the connection tracking table is full" in verdict
        assert f"because {culprit.owner} holds 100 % of the table" in verdict
    assert [process.returncode for process in processes] == [NAGIOS["critical"], 0]


def test_a_race_that_the_kernel_repaired_is_ok(new_lab: NewLab) -> None:
    lab = new_lab(pods=PODS)
    verb = (*CHECK, WATCH, "-o", "json")
    with started(verb) as (check,), started(verb, narrow=()) as (whole,):
        race = lab.inject("insert-race", 3)
        result, everything = map(json.loads, outputs([check, whole]))
    # The race is the node's: nobody that the other one is narrowed to has a part in it.
    (told,) = (
        finding for finding in everything["findings"]
        if finding["cause"] == race.cause and lab.node.name in map(label, finding["victims"])
    )  # fmt: skip
    assert (told["severity"], told["confidence"], told["packets"]) == ("info", "likely", 0)
    assert ("clash_resolved", race.counter) in {(one["name"], one["value"]) for one in told["evidence"]}
    (table,) = (table for table in result["conntrack"] if table["netns"] == lab.node.inode)
    assert (table["clash_resolved"], table["insert_failed"]) == (race.counter, 0)
    assert {finding["severity"] for finding in result["findings"]} <= {"info"}
    if result["lost"]["events"] == 0:  # of whatever else this machine drops
        assert (check.returncode, result["status"]) == (0, "ok")
