"""The faces over real drops: check and top --once say the same exact sums, and a replay says what live said."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from k8sdiag.engine import Engine
from k8sdiag.host.lab import Lab, PodSpec
from k8sdiag.snapshot import Snapshot
from k8sdiag.trace import TraceSource, TraceWriter
from tests.live.watch import watching

pytestmark = pytest.mark.live
NewLab = Callable[..., Lab]
K8SDIAG = [sys.executable, "-m", "k8sdiag"]
PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


def six_pods() -> list[PodSpec]:
    deployments = (("shop", "cart"), ("billing", "db"), ("ops", "agent"))
    return [PodSpec(namespace, f"{name}-{i}") for namespace, name in deployments for i in range(2)]


def inject(lab: Lab) -> dict[str, dict[str, int]]:
    """A prime number of drops for each pod, of one of two causes. Sums by namespace and cause."""
    sums: dict[str, dict[str, int]] = {}
    primes = random.sample(PRIMES, 6)
    for i, (pod, count) in enumerate(zip(lab.pods, primes, strict=True)):
        fault, cause = (("closed-port", "closed-port"), ("nft-forward", "networkpolicy-drop"))[i % 2]
        expected = lab.inject(fault, count, pod)
        assert expected.counter == count
        per_cause = sums.setdefault(pod.spec.namespace, {})
        per_cause[cause] = per_cause.get(cause, 0) + count
    return sums


def test_namespaces_of_the_json_are_the_sums_per_cause(new_lab: NewLab) -> None:
    lab = new_lab(pods=six_pods())
    check = subprocess.Popen([*K8SDIAG, "check", "--duration", "8s", "-o", "json"], stdout=subprocess.PIPE, text=True)
    time.sleep(2)  # the probe counts long before
    sums = inject(lab)
    output, _ = check.communicate(timeout=60)
    result = json.loads(output)
    found = {
        row["namespace"]: {cause["cause"]: cause["packets"] for cause in row["causes"]}
        for row in result["namespaces"]
        if row["namespace"] in sums
    }
    assert found == sums
    assert {row["namespace"]: row["drops"]["packets"] for row in result["namespaces"] if row["namespace"] in sums} == {
        namespace: sum(causes.values()) for namespace, causes in sums.items()
    }
    assert check.returncode == {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}[result["status"]]
    owners = {
        f"{row['owner']['namespace']}/{row['owner']['name']}": row["drops"]["packets"] for row in result["owners"]
    }
    assert sum(count for owner, count in owners.items() if owner.split("/")[0] in sums) == sum(
        sum(causes.values()) for causes in sums.values()
    )


def test_top_once_shows_the_same_sums(new_lab: NewLab) -> None:
    lab = new_lab(pods=six_pods())
    top = subprocess.Popen(
        [*K8SDIAG, "top", "--once", "--duration", "8s"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    time.sleep(2)
    sums = inject(lab)
    output, _ = top.communicate(timeout=60)
    table = output.split("Namespaces", 1)[1].split("\n\n", 1)[0]
    found: dict[str, dict[str, int]] = {}
    for namespace, cause, packets, _ in (line.split() for line in table.splitlines()[2:]):
        found.setdefault(namespace, {})[cause] = int(packets)
    assert {namespace: found[namespace] for namespace in sums} == sums


def test_a_replay_gives_the_snapshots_that_live_gave(new_lab: NewLab, tmp_path: Path) -> None:
    lab = new_lab(pods=six_pods())
    path = tmp_path / "live.k8sd"
    with path.open("wb") as file:
        writer = TraceWriter(file)
        with watching(interval_s=0.5, write=writer.write) as watch:
            inject(lab)
            lab.inject("benign-noise", 5)
            watch.end()
        writer.close()
    assert watch.snapshots[-1].total.packets > 0
    replayed: list[Snapshot] = []
    engine = Engine()
    for batch in TraceSource.open(str(path)):
        engine.fold(batch)
        replayed.append(engine.snapshot())
    assert replayed == watch.snapshots


def test_record_then_replay_and_check_the_file(new_lab: NewLab, tmp_path: Path) -> None:
    lab = new_lab(pods=six_pods())
    path = tmp_path / "incident.k8sd"
    record = subprocess.Popen([*K8SDIAG, "record", "-w", str(path)], stderr=subprocess.PIPE, text=True)
    assert record.stderr is not None
    assert "recording to" in record.stderr.readline()
    sums = inject(lab)
    begin_s = time.monotonic()
    record.terminate()
    assert record.wait(10) == 0
    assert time.monotonic() - begin_s < 1.5
    assert path.stat().st_mode & 0o777 == 0o600
    result = json.loads(
        subprocess.run(
            [*K8SDIAG, "check", str(path), "--whole", "-o", "json"], stdout=subprocess.PIPE, check=False
        ).stdout
    )
    found = {
        row["namespace"]: {cause["cause"]: cause["packets"] for cause in row["causes"]} for row in result["namespaces"]
    }
    assert {namespace: found[namespace] for namespace in sums} == sums
    once = subprocess.run([*K8SDIAG, "replay", str(path), "--once"], capture_output=True, text=True, check=True).stdout
    assert all(namespace in once for namespace in sums)


def test_check_says_ok_over_benign_noise(new_lab: NewLab) -> None:
    lab = new_lab()
    # Narrowed to the lab's namespaces: what else the machine loses meanwhile is not this test's business.
    narrow = [word for namespace in {pod.spec.namespace for pod in lab.pods} for word in ("-n", namespace)]
    check = subprocess.Popen(
        [*K8SDIAG, "check", "--duration", "5s", "-o", "json", *narrow], stdout=subprocess.PIPE, text=True
    )
    time.sleep(2)
    lab.inject("benign-noise", 23)
    output, _ = check.communicate(timeout=60)
    result = json.loads(output)
    assert sum(row["packets"] for row in result["drops"] if row["benign"]) > 23
    assert (check.returncode, result["status"], result["findings"]) == (0, "ok", [])
