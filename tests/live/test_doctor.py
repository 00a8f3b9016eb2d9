# The doctor on the running kernel: what it says must be what happens when one tries.

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from k8sdiag.host import doctor
from k8sdiag.host.instances import Instance

CHECKOUT = Path(__file__).resolve().parents[2]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
REQUIRED = {"privileges", "lockdown", "btf", "bcc", "drops"}

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="bpf(2) and namespaces need root"),
]


def called(*words: str, before: Sequence[str] = (), verb: str = "doctor") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-m", "k8sdiag", verb, *words],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def examined(before: Sequence[str] = ()) -> tuple[dict[str, dict[str, Any]], int]:
    """Rows by signal, and the exit code."""
    done = called("-o", "json", before=before)
    assert done.stderr == ""
    return {row["signal"]: row for row in json.loads(done.stdout)["rows"]}, done.returncode


def bpf_descriptors() -> int:
    """How many BPF programs, maps and links this process holds."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the directory's own
            continue
    return sum("bpf" in link for link in links)


def test_a_node_that_can_be_watched_is_said_to_be_one_and_nothing_stays_behind() -> None:
    before = bpf_descriptors(), threading.active_count()
    report = doctor.examine()
    rows = {row.signal: row for row in report.rows}
    assert (bpf_descriptors(), threading.active_count()) == before
    assert report.exit_code == 0
    assert (report.node, report.kernel) == (platform.node(), platform.release())
    assert {row.signal for row in report.rows if row.required} == REQUIRED
    assert rows["drops"].why.startswith("counted 7 of 7 drops made on loopback; ready in ")
    for signal in REQUIRED | {"samples", "losses", "netns-cookies", "cgroups"}:
        assert rows[signal].status == "full", rows[signal]
    for row in report.rows:
        assert row.status == "full" or row.blinds, row


def test_other_drops_on_loopback_do_not_confuse_the_count() -> None:
    done = threading.Event()

    def noise() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not done.wait(0.001):
                sender.sendto(b"noise", ("127.0.0.1", 9))

    noisy = threading.Thread(target=noise)
    noisy.start()
    try:
        rows, code = examined()
    finally:
        done.set()
        noisy.join()
    assert code == 0
    assert rows["drops"]["why"].startswith("counted 7 of 7 drops")


def test_what_the_running_kernel_lacks_is_said_honestly() -> None:
    rows, _ = examined()
    for signal, path in (
        ("kprobes", "/sys/bus/event_source/devices/kprobe/type"),
        ("tracefs", "/sys/kernel/tracing/events"),
        ("pod-names", "/var/log/pods"),
    ):
        assert (rows[signal]["status"] == "missing") == (not Path(path).exists())
    enabled = Path("/proc/sys/kernel/bpf_stats_enabled").read_text().strip() == "1"
    assert (rows["probe-cost"]["status"] == "full") == enabled
    restrict = Path("/proc/sys/kernel/kptr_restrict").read_text().strip()
    assert f"kernel.kptr_restrict is {restrict}" in rows["symbols"]["why"]
    if rows["fentry"]["status"] == "missing":
        assert rows["fentry"]["why"].startswith("refused: ")
        assert "conntrack" in rows["fentry"]["blinds"]


def test_an_ordinary_user_learns_which_rights_are_needed() -> None:
    rows, code = examined(before=NOBODY)
    assert code == 1
    assert rows["privileges"]["status"] == rows["drops"]["status"] == "missing"
    assert "CAP_BPF" in rows["privileges"]["why"]
    assert rows["drops"]["remedy"] == f"sudo {sys.executable} -m k8sdiag doctor -o json"
    assert rows["bcc"]["status"] == rows["btf"]["status"] == "full"
    text = called(before=NOBODY)
    assert text.returncode == 1
    assert text.stdout.splitlines()[-1] == "Watching is not possible here: privileges, drops missing."
    assert "Traceback" not in text.stderr


@pytest.mark.parametrize(
    ("dropped", "drops", "check"),
    [
        ("sys_admin,bpf", "missing", "refused"),
        ("sys_admin,perfmon", "missing", "refused"),
        ("sys_admin", "full", "refused"),
        ("bpf,perfmon", "full", "done"),
        ("sys_ptrace", "full", "done"),
    ],
)
def test_the_rights_said_to_be_needed_are_those_that_are(dropped: str, drops: str, check: str) -> None:
    without = ",".join(f"-{name}" for name in dropped.split(","))
    rows, code = examined(before=["setpriv", f"--bounding-set={without}"])
    assert rows["drops"]["status"] == drops, rows["drops"]
    assert (rows["privileges"]["status"] == "missing") == (check == "refused")
    assert code == (check == "refused")
    tried = called("--duration", "100ms", before=["setpriv", f"--bounding-set={without}"], verb="check")
    assert ("ermitted" in tried.stderr) == (check == "refused"), tried.stderr
    if drops == "missing":
        lacking = dropped.split(",")[1].upper()
        assert rows["drops"]["remedy"].endswith(f"capabilities.add: [{lacking}]")


def test_root_of_a_user_namespace_is_told_that_it_is_no_root_of_the_node() -> None:
    rows, code = examined(before=["unshare", "--user", "--map-root-user"])
    assert code == 1
    assert rows["drops"]["status"] == rows["privileges"]["status"] == "missing"
    assert "user namespace" in rows["privileges"]["why"]
    assert rows["drops"]["remedy"].startswith("outside of the user namespace: sudo /")


def test_without_a_loopback_device_the_probe_is_loaded_and_not_proven() -> None:
    rows, code = examined(before=["unshare", "--net"])
    assert rows["drops"]["status"] == "inferred"
    assert "not tried" in rows["drops"]["why"]
    assert code == 0


def test_hidden_addresses_are_named_with_the_sysctl() -> None:
    rows, code = examined(before=["setpriv", "--bounding-set=-syslog"])
    shown = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) <= 1
    hidden = Path("/proc/sys/kernel/kptr_restrict").read_text().strip() != "0" or not shown
    assert (rows["symbols"]["status"] == "missing") == hidden
    assert rows["drops"]["status"] == "full"
    assert code == 0


def test_a_simulated_lockdown_is_named_as_what_it_is() -> None:
    # /sys/kernel/security is empty here or somebody's securityfs: covered, in a mount namespace of its own.
    script = 'mount -t tmpfs none /sys/kernel/security && echo "none integrity [confidentiality]" > \
              /sys/kernel/security/lockdown && exec "$@"'
    rows, code = examined(before=["unshare", "--mount", "sh", "-c", script, "sh"])
    assert rows["lockdown"]["status"] == "missing"
    assert "lockdown=integrity" in rows["lockdown"]["remedy"]
    assert code == 1


def test_another_instance_is_named() -> None:
    with Instance() as instance:
        assert not instance.unannounced
        rows, code = examined()
    assert f"pid {os.getpid()} (" in rows["instances"]["why"]
    assert code == 0


def test_the_text_fits_a_terminal() -> None:
    done = called()
    assert done.returncode == 0
    wide = [line for line in done.stdout.splitlines() if len(line) > 80]
    assert all(line.lstrip().startswith("do: ") for line in wide)
    assert done.stdout.splitlines()[-1] == "This node can be watched."
