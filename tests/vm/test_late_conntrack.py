# A kernel with kprobes whose nf_conntrack is loaded only after the watch has begun, by the first rule that needs it.

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import pytest

Observed = Callable[[str, str], dict[str, Any]]

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="qemu shows the guest this machine's files as root"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are x86-64"),
]


@pytest.mark.parametrize("kernel", ["5.10", "6.12"])
@pytest.mark.parametrize("deed", ["early"])
def test_without_kprobes_refusals_are_told_by_statistics_and_the_watch_says_why(
    kernel: str, deed: str, observed: Observed
) -> None:
    guest = f"{kernel} {deed}"
    begun = observed(guest, deed)
    assert begun["loaded"] is False
    (conntrack,) = [found for found in begun["capabilities"] if found["signal"] == "conntrack"]
    assert conntrack["status"] == "inferred"
    assert "nf_conntrack was not loaded when the watch began" in conntrack["why"]
    assert observed(guest, "totals")["during"]["kprobes"] == []
    seen = observed(guest, "snat-clash")
    assert seen["expected"]["count"] == seen["expected"]["counter"] == 22
    assert sum(row["skbs"] for row in seen["rows"]) == 22
    assert {(row["cause"], row["verdict"], row["confidence"]) for row in seen["rows"]} == {
        ("ct-snat-port-clash", "clash", "likely")
    }
    (finding,) = seen["findings"]
    assert (finding["cause"], finding["packets"], finding["confidence"]) == ("ct-snat-port-clash", 22, "likely")
    assert observed(guest, "totals")["table"]["insert_failed"] == 22
