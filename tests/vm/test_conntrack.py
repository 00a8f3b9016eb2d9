# What conntrack refuses, on the kernels that nodes run today: Debian's, with kprobes, and conntrack as a module. Of
# tests/vm, CI runs only this. tests/live/test_conntrack.py asks the running kernel, which may have no kprobes.

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import pytest

Observed = Callable[[str, str], dict[str, Any]]

KERNELS = ["5.10", "6.1", "6.12", "7.x"]
WITHOUT_CHAINS = "5.10"  # Linux 5.15 was the first to give up on a long chain
REFUSALS = {"snat-clash": "clash", "snat-clash-v6": "clash", "table-full": "refused"}
"""What the kernel finds of each, as DropRow.verdict."""
NO_HOOKS: dict[str, list[str]] = {"kprobes": [], "events": [], "programs": []}

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="qemu shows the guest this machine's files as root"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are x86-64"),
]


def evidence(finding: dict[str, Any]) -> dict[str, float | str]:
    return {found["name"]: found["value"] for found in finding["evidence"]}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("deed", REFUSALS)
def test_of_23_clients_22_are_refused_and_a_probe_proves_it(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    expected, rows = seen["expected"], seen["rows"]
    assert expected["count"] == expected["counter"] == 22
    assert sum(row["skbs"] for row in rows) == 22, rows
    assert {(row["cause"], row["verdict"], row["confidence"], row["hook"]) for row in rows} == {
        (expected["cause"], REFUSALS[deed], "proven", expected["hook"])
    }
    (finding,) = seen["findings"]
    assert (finding["cause"], finding["packets"], finding["confidence"]) == (expected["cause"], 22, "proven")
    assert [owner["namespace"] for owner in finding["victims"]] == [deed]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("deed", ["table-full"])
def test_a_full_table_names_who_fills_it_and_how_full_it_was(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    (finding,) = seen["findings"]
    culprits = [f"{owner['namespace']}/{owner['name']}" for owner in finding["culprits"]]
    assert culprits == [seen["expected"]["culprit"]]
    found = evidence(finding)
    assert found["refused"] == 22
    assert found["count"] == found["max"] == 64  # what the lab lowers the limit to, for the second that it takes


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("deed", ["iptables-raw"])
def test_a_rule_of_the_raw_table_beside_a_full_one_is_a_rule(kernel: str, deed: str, observed: Observed) -> None:
    seen = observed(kernel, deed)
    assert seen["expected"]["counter"] == 22
    (row,) = seen["rows"]
    assert (row["skbs"], row["cause"], row["verdict"]) == (22, "networkpolicy-drop", "rule")
    (finding,) = seen["findings"]
    assert "ct-table-full" in {ruled_out["cause"] for ruled_out in finding["ruled_out"]}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("deed", ["totals"])
def test_the_statistics_of_the_table_say_the_same(
    kernel: str, deed: str, observed: Observed, request: pytest.FixtureRequest
) -> None:
    table = observed(kernel, deed)["table"]
    asked = {
        item.callspec.params["deed"]
        for item in request.session.items
        if hasattr(item, "callspec") and item.callspec.params.get("kernel") == kernel
    }
    failed = [observed(kernel, deed)["expected"] for deed in asked & {"snat-clash", "snat-clash-v6", "chain-too-long"}]
    full = [observed(kernel, deed)["expected"] for deed in asked & {"table-full"}]
    assert failed
    assert full
    assert table["insert_failed"] == sum(expected["counter"] for expected in failed)
    assert table["drop"] - table["insert_failed"] == sum(expected["counter"] for expected in full)
    too_long = sum(expected["counter"] for expected in failed if expected["cause"] == "ct-chain-too-long")
    assert table["chain_too_long"] == (None if kernel == WITHOUT_CHAINS else too_long)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("deed", ["totals"])
def test_kprobes_are_used_and_nothing_of_them_stays(kernel: str, deed: str, observed: Observed) -> None:
    totals = observed(kernel, deed)
    assert totals["before"] == totals["after"] == NO_HOOKS
    assert set(totals["during"]["kprobes"]) == {"__nf_conntrack_confirm", "nf_ct_resolve_clash", "early_drop"}
    assert totals["during"]["events"] == []  # nor in tracefs, where a killed process would leave it
    (conntrack,) = [found for found in totals["capabilities"] if found["signal"] == "conntrack"]
    assert conntrack["status"] == "full"
