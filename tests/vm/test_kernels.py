# The kernels that nodes run today: Debian's, each booted under qemu (scripts/vm) with this checkout inside. What is
# asked there is asked on the running kernel too (tests/live/test_exact.py), so that a difference is the kernel's.

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
VM = str(CHECKOUT / "scripts" / "vm")
GUEST = str(CHECKOUT / "tests" / "vm" / "guest.py")
# Emulation is some twenty times slower than the machine, and the machine may be busy.
SELFTEST_TIMEOUT_S, FAULTS_TIMEOUT_S, FETCH_TIMEOUT_S = 120, 400, 600

KERNELS = ["5.10", "6.1", "6.12", "7.x"]
FAULTS = [
    "closed-port",
    "closed-port-v6",
    "nft-forward",
    "nft-input",
    "iptables-legacy",
    "rp-filter",
    "udp-rcvbuf",
    "tc-ingress",
    "tbf-overflow",
    "no-route",
]
NOISE = "benign-noise"  # no fault: see test_benign_noise_is_no_finding

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="qemu shows the guest this machine's files as root"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are x86-64"),
]


@functools.cache
def fetched(kernel: str) -> str:
    """Empty, or why this kernel cannot be had today."""
    listed = subprocess.run([VM, "list"], capture_output=True, text=True, check=True, timeout=30).stdout
    if any(line.split()[0] == kernel and "not here" not in line for line in listed.splitlines()):
        return ""
    done = subprocess.run([VM, "fetch", kernel], capture_output=True, text=True, check=False, timeout=FETCH_TIMEOUT_S)
    return "" if done.returncode == 0 else done.stderr


def in_guest(kernel: str, timeout_s: int, *command: str) -> subprocess.CompletedProcess[str]:
    why = fetched(kernel)
    if why and kernel == "7.x":
        pytest.skip(f"Debian's unstable release cannot be downloaded today: {why}")
    assert not why
    return subprocess.run(
        [VM, "--timeout", str(timeout_s), kernel, *command],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s + 60,
        check=False,
    )


@functools.cache
def boot_with_faults(kernel: str) -> subprocess.CompletedProcess[str]:
    """The only boot for all that is asked of the faults, also if it fails."""
    return in_guest(kernel, FAULTS_TIMEOUT_S, sys.executable, GUEST, *FAULTS, NOISE)


def observed(kernel: str) -> dict[str, Any]:
    """What k8sdiag made of each fault on that kernel, by the fault's name, and tests/vm/guest.py's totals."""
    done = boot_with_faults(kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.get("fault", "totals"): line for line in lines}


def fault_on(kernel: str, fault: str) -> dict[str, Any]:
    seen: dict[str, Any] = observed(kernel)[fault]
    assert "error" not in seen, seen["error"]
    return seen


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_drop_probe_loads_and_counts_on(kernel: str) -> None:
    done = in_guest(kernel, SELFTEST_TIMEOUT_S, "/usr/bin/python3", "-m", "k8sdiag.host.selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["skbs"], found["expected"]) == (23, 23)
    assert found["kernel"].startswith(kernel.replace("x", ""))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_counted_exactly_for_its_pod(kernel: str, fault: str) -> None:
    seen = fault_on(kernel, fault)
    expected, rows = seen["expected"], seen["rows"]
    assert expected["owner"] == f"{fault}/pod-0"
    assert expected["count"] == expected["counter"] == 13
    assert sum(row["skbs"] for row in rows) == expected["counter"], rows
    assert {row["hook"] for row in rows} == {expected["hook"]}
    assert {(row["owner"]["how"], row["owner"]["confidence"]) for row in rows} <= {
        ("netns", "proven"),
        ("veth", "proven"),
    }


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_the_right_cause(kernel: str, fault: str) -> None:
    seen = fault_on(kernel, fault)
    expected, rows = seen["expected"], seen["rows"]
    assert {row["cause"] for row in rows} == {expected["cause"]}, rows
    (finding,) = seen["findings"]
    assert (finding["cause"], finding["packets"]) == (expected["cause"], expected["count"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_benign_noise_is_no_finding(kernel: str) -> None:
    seen = fault_on(kernel, NOISE)
    assert (seen["rows"], seen["findings"]) == ([], [])


@pytest.mark.parametrize("kernel", KERNELS)
def test_nobody_else_is_said_to_lose_packets(kernel: str) -> None:
    assert observed(kernel)["totals"]["strangers"] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_counted_and_lost_of_a_flood_are_what_the_kernel_counted(kernel: str) -> None:
    totals = observed(kernel)["totals"]
    flood, lost = totals["flood"], totals["lost"].get("events", 0)
    # A slow CPU's input queue may overflow, and the ICMP answers meet it too.
    assert flood["sent"] == 100_000 <= flood["counter"] + flood["softnet"]
    assert flood["lost_before"] == 0  # each fault before it was counted exactly
    assert flood["skbs"] + flood["overflowed"] + lost == flood["counter"] + flood["softnet"]
    assert totals["lost"].get("keys", 0) == 0
