# The kernels that nodes run today: Debian's, each booted under qemu (scripts/vm) with this checkout inside. What is
# asked there is asked on the running kernel too (tests/live/test_exact.py), so that a difference is the kernel's.

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import pytest

Observed = Callable[[str, str], dict[str, Any]]

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

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="qemu shows the guest this machine's files as root"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are x86-64"),
]
on_each_kernel = pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12", "7.x"])


@on_each_kernel
@pytest.mark.parametrize("deed", ["selftest"])
def test_the_drop_probe_loads_and_counts_on(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    found = seen["found"]
    assert (found.get("skbs"), found.get("expected")) == (23, 23), seen["said"]
    assert found["kernel"].startswith(kernel.replace("x", ""))


@on_each_kernel
@pytest.mark.parametrize("deed", FAULTS)
def test_each_fault_is_counted_exactly_for_its_pod(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    expected, rows = seen["expected"], seen["rows"]
    assert expected["owner"] == f"{deed}/pod-0"
    assert expected["count"] == expected["counter"] == 22
    assert sum(row["skbs"] for row in rows) == expected["counter"], rows
    assert {row["hook"] for row in rows} == {expected["hook"]}
    assert {(row["owner"]["how"], row["owner"]["confidence"]) for row in rows} <= {
        ("netns", "proven"),
        ("veth", "proven"),
    }


@on_each_kernel
@pytest.mark.parametrize("deed", FAULTS)
def test_each_fault_has_the_right_cause(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    expected, rows = seen["expected"], seen["rows"]
    assert {row["cause"] for row in rows} == {expected["cause"]}, rows
    (finding,) = seen["findings"]
    assert (finding["cause"], finding["packets"]) == (expected["cause"], expected["count"])


@on_each_kernel
@pytest.mark.parametrize("deed", ["benign-noise"])
def test_benign_noise_is_no_finding(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    assert (seen["rows"], seen["findings"]) == ([], [])


@on_each_kernel
@pytest.mark.parametrize("deed", ["totals"])
def test_nobody_else_is_said_to_lose_packets(kernel: str, deed: str, observed: Observed) -> None:
    assert observed(kernel, deed)["strangers"] == []


@on_each_kernel
@pytest.mark.parametrize("deed", ["flood"])
def test_counted_and_lost_of_a_flood_are_what_the_kernel_counted(kernel: str, deed: str, observed: Observed) -> None:
    flood, lost = observed(kernel, deed), observed(kernel, "totals")["lost"]
    # A slow CPU's input queue may overflow, and the ICMP answers meet it too.
    assert flood["sent"] == 100_000 <= flood["counter"] + flood["softnet"]
    assert flood["lost_before"] == 0  # each fault before it was counted exactly
    assert flood["skbs"] + flood["overflowed"] + lost.get("events", 0) == flood["counter"] + flood["softnet"]
    assert lost.get("keys", 0) == 0


@on_each_kernel
@pytest.mark.parametrize("deed", ["kill"])
def test_nothing_stays_in_the_kernel_of_a_recording_that_is_killed(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    assert set(seen["during"]["kprobes"]) == {"__nf_conntrack_confirm", "nf_ct_resolve_clash", "early_drop"}
    assert "on_kfree_skb" in seen["during"]["programs"]
    assert seen["after"] == observed(kernel, "totals")["before"]


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.x"])  # Linux 5.15 was the first to give up on a long chain
@pytest.mark.parametrize("deed", ["chain-too-long"])
def test_hash_chains_that_are_too_long_are_named(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    expected, rows = seen["expected"], seen["rows"]
    assert expected["count"] == expected["counter"] >= 22
    assert sum(row["skbs"] for row in rows) == expected["counter"]
    assert {(row["cause"], row["verdict"], row["confidence"]) for row in rows} == {
        ("ct-chain-too-long", "chain_too_long", "proven")
    }
    (finding,) = seen["findings"]
    assert (finding["cause"], finding["packets"]) == ("ct-chain-too-long", expected["counter"])
