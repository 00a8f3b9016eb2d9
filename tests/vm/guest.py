"""Runs inside a guest: faults of the lab under k8sdiag's eyes, and what it made of them, as JSON on stdout.

    python guest.py FAULT …

One line a fault, {"fault", "error"} or {"fault", "expected", "rows", "findings"}, and at the end one line of totals:
{"flood": {"sent", "counter", "softnet", "skbs", "overflowed", "lost_before"}, "strangers": […], "lost": {…},
"capabilities": […]}.
To boot and to load the probe is dear under emulation, so all faults share one watch, and each has a pod to itself in
a Kubernetes namespace of its own, by which their counts are told apart. Nothing is judged here: that is the test's.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any

import msgspec

from k8sdiag.host.lab import Expected, Lab, PodSpec, softnet_dropped
from k8sdiag.snapshot import Snapshot
from tests.live.watch import Watch, drops_of

COUNT = 13
FLOOD = 100_000
FLOODED = PodSpec("flood", "flooded-0")
PEER = PodSpec("peer", "peer-0")
READY_S = 100
TICK_S = 0.5


def say(line: dict[str, Any]) -> None:
    print(msgspec.json.encode(line).decode(), flush=True)


def inject(lab: Lab, fault: str) -> Expected | str:
    """What was done, or why it could not be done (a tool of this machine and this kernel may not agree)."""
    try:
        return lab.inject(fault, COUNT, f"{fault}/pod-0")
    except Exception:  # noqa: BLE001 -- the other faults shall have their turn
        return traceback.format_exc()


def flood(lab: Lab) -> dict[str, int]:
    pod = lab.pod("flood/flooded-0")
    before, softnet_before = pod.udp_no_ports(), softnet_dropped()
    tally = pod.flood_udp(pod.ipv4, 4711, FLOOD)
    deadline = time.monotonic() + 20
    while True:  # softirqs may be late
        counter, softnet = pod.udp_no_ports() - before, softnet_dropped() - softnet_before
        if counter + softnet >= tally.sent or time.monotonic() > deadline:
            return {"sent": tally.sent, "counter": counter, "softnet": softnet}
        time.sleep(0.1)


def watch_faults(lab: Lab, faults: list[str]) -> tuple[dict[str, Expected | str], dict[str, int], Snapshot]:
    watch = Watch(TICK_S)
    watch._thread.start()
    if not watch._ready.wait(READY_S):
        sys.exit(f"no drop probe after {READY_S} s")
    if watch._error:
        raise watch._error
    injected = {fault: inject(lab, fault) for fault in faults}
    ticks = len(watch.snapshots)
    while len(watch.snapshots) < ticks + 2:  # what the faults lost, if anything, is known by then
        time.sleep(TICK_S)
    lost_before = watch.snapshots[-1].lost.events
    flooded = flood(lab)
    return injected, flooded | {"lost_before": lost_before}, watch.end()


def main(faults: list[str]) -> None:
    pods = [PEER, *(PodSpec(fault, "pod-0") for fault in faults), FLOODED]
    with Lab(prefix=f"vm{os.getpid()}", pods=pods) as lab:
        inodes = {lab.node.inode, *(pod.inode for pod in lab.pods)}
        injected, flooded, snapshot = watch_faults(lab, faults)
    for fault, expected in injected.items():
        if isinstance(expected, str):
            say({"fault": fault, "error": expected})
            continue
        pod = f"{fault}/pod-0"
        findings = [found for found in snapshot.findings if pod in {owner.label for owner in found.victims}]
        say({"fault": fault, "expected": vars(expected), "rows": drops_of(snapshot, pod), "findings": findings})
    rows = drops_of(snapshot, "flood/flooded-0")
    skbs = {cause: sum(row.skbs for row in rows if row.cause == cause) for cause in ("closed-port", "softnet-backlog")}
    known = {f"{fault}/pod-0" for fault in faults} | {"flood/flooded-0"}
    strangers = [row for row in snapshot.drops if row.netns in inodes and row.owner.label not in known]
    say(
        {
            "flood": flooded | {"skbs": skbs["closed-port"], "overflowed": skbs["softnet-backlog"]},
            "strangers": [row for row in strangers if not row.benign],
            "lost": snapshot.lost,
            "capabilities": snapshot.capabilities,
        }
    )


if __name__ == "__main__":
    main(sys.argv[1:])
