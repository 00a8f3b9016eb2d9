"""Runs inside a guest: what a test wants done there under k8sdiag's eyes, and what it made of it, as JSON on stdout.

    python guest.py DEED …

A deed is a fault of the lab, or one of the four words below. One line for each, and at the end one of totals:
    {"deed": FAULT, "error"} or {"deed": FAULT, "expected", "rows", "findings"}
    {"deed": "selftest", "found", "said"}: of the shortest way through the probe, by the distribution's Python
    {"deed": "early", "loaded", "capabilities"}: the watch begins before the lab, so before nf_conntrack is loaded
    {"deed": "flood", "sent", "counter", "softnet", "skbs", "overflowed", "lost_before"}
    {"deed": "kill", "during", "after"}: hooks of a recording that is killed (see hooks())
    {"deed": "totals", "strangers": […], "lost": {…}, "capabilities": […], "table": {…} or null, "before": {…},
     "during": {…}, "after": {…}}: the last three are the hooks before, during and after the watch
To boot and to load the probe is dear under emulation, so all faults share one watch, and each has a pod to itself in
a Kubernetes namespace of its own, by which their counts are told apart. Nothing is judged here: that is the test's.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from k8sdiag.host.lab import FAULTS, Expected, Lab, PodSpec, softnet_dropped
from k8sdiag.snapshot import Snapshot
from tests.live.watch import Watch, drops_of

COUNT = 22  # of 23 who want one port, 22 get none
FLOOD = 100_000
FLOODED = PodSpec("flood", "flooded-0")
PEER = PodSpec("peer", "peer-0")
READY_S = 200
TICK_S = 0.5
GONE_S = 10  # programs are freed after a grace period
KPROBES = Path("/sys/kernel/debug/kprobes/list")
KPROBE_EVENTS = Path("/sys/kernel/tracing/kprobe_events")
MODULE = Path("/sys/module/nf_conntrack")


def say(deed: str, **what: Any) -> None:
    print(msgspec.json.encode({"deed": deed} | what).decode(), flush=True)


def hooks() -> dict[str, list[str]]:
    """What the kernel has of probes: functions with a kprobe, events in tracefs, BPF programs by their names."""
    programs = json.loads(subprocess.check_output(["bpftool", "-j", "prog", "show"]))
    return {
        "kprobes": sorted({line.split()[2].partition("+")[0] for line in KPROBES.read_text().splitlines()}),
        "events": KPROBE_EVENTS.read_text().splitlines(),
        "programs": sorted(program.get("name", program["type"]) for program in programs),
    }


def hooks_when(wanted: dict[str, list[str]]) -> dict[str, list[str]]:
    """The hooks as soon as they are these, or after GONE_S."""
    deadline = time.monotonic() + GONE_S
    while (found := hooks()) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def inject(lab: Lab, watch: Watch, fault: str) -> Expected | str:
    """What was done, or why it could not be done (a tool of this machine and this kernel may not agree)."""
    try:
        if FAULTS[fault].cause == "ct-table-full":
            # A table is read again only after a pause, which is long under emulation, and the lab keeps this one
            # full for a moment only: let it be seen empty, and it is read as soon as it is not.
            lab.node.flush_conntrack()
            after_ticks(watch, 3)
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


def begun() -> Watch:
    watch = Watch(TICK_S)
    watch._thread.start()
    if not watch._ready.wait(READY_S):
        sys.exit(f"no drop probe after {READY_S} s")
    if watch._error:
        raise watch._error
    return watch


def selftest() -> None:
    command = ["/usr/bin/python3", "-m", "k8sdiag.host.selftest"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=READY_S)
    say("selftest", found=json.loads(done.stdout or "{}"), said=done.stderr)


def kill() -> None:
    """Kill a recording the hard way, once its last hook is there."""
    before = hooks()
    with subprocess.Popen([sys.executable, "-m", "k8sdiag", "record", "-w", "/dev/null"]) as recording:
        deadline = time.monotonic() + READY_S
        # The one that is attached last.
        while "early_drop" not in (during := hooks())["kprobes"] and time.monotonic() < deadline:
            time.sleep(0.2)
        recording.kill()
    say("kill", during=during, after=hooks_when(before))


@contextlib.contextmanager
def watched(pods: list[PodSpec], *, early: bool) -> Iterator[tuple[Lab, Watch]]:
    """A lab, and a watch of it that began before or after it was built."""
    loaded = MODULE.exists()
    watch = begun() if early else None
    with Lab(prefix=f"vm{os.getpid()}", pods=pods) as lab:
        if watch:
            say("early", loaded=loaded, capabilities=watch.snapshots[-1].capabilities)
        yield lab, watch or begun()


def after_ticks(watch: Watch, count: int) -> Snapshot:
    ticks = len(watch.snapshots)
    while len(watch.snapshots) < ticks + count:
        time.sleep(TICK_S / 5)
    return watch.snapshots[-1]


def main(deeds: list[str]) -> None:
    faults = [deed for deed in deeds if deed in FAULTS]
    if "selftest" in deeds:
        selftest()
    pods = [PEER, *(PodSpec(fault, "pod-0") for fault in faults), FLOODED]
    before = hooks()
    with watched(pods, early="early" in deeds) as (lab, watch):
        node, inodes = lab.node.inode, {lab.node.inode, *(pod.inode for pod in lab.pods)}
        during = hooks()
        injected = {fault: inject(lab, watch, fault) for fault in faults}
        lost_before = after_ticks(watch, 2).lost.events  # what the faults lost, if anything, is known by then
        flooded = flood(lab) if "flood" in deeds else {}
        snapshot = watch.end()
        after = hooks_when(before)
    for fault, expected in injected.items():
        if isinstance(expected, str):
            say(fault, error=expected)
            continue
        pod = f"{fault}/pod-0"
        findings = [found for found in snapshot.findings if pod in {owner.label for owner in found.victims}]
        say(fault, expected=vars(expected), rows=drops_of(snapshot, pod), findings=findings)
    if flooded:
        rows = drops_of(snapshot, "flood/flooded-0")
        skbs = {name: sum(row.skbs for row in rows if row.cause == name) for name in ("closed-port", "softnet-backlog")}
        counted = {"skbs": skbs["closed-port"], "overflowed": skbs["softnet-backlog"], "lost_before": lost_before}
        say("flood", **flooded, **counted)
    known = {f"{fault}/pod-0" for fault in faults} | {"flood/flooded-0"}
    strangers = [row for row in snapshot.drops if row.netns in inodes and row.owner.label not in known]
    if "kill" in deeds:
        kill()
    say(
        "totals",
        strangers=[row for row in strangers if not row.benign],
        lost=snapshot.lost,
        capabilities=snapshot.capabilities,
        table=next((row for row in snapshot.conntrack if row.netns == node), None),
        before=before,
        during=during,
        after=after,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
