"""Debian's kernels under qemu (scripts/vm), each booted once for nearly all that the tests of this run ask of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
VM = str(CHECKOUT / "scripts" / "vm")
GUEST = str(CHECKOUT / "tests" / "vm" / "guest.py")
# Emulation is some twenty times slower than the machine, and the machine may be busy.
BOOT_TIMEOUT_S, FETCH_TIMEOUT_S = 600, 600
GUEST_KIB = 3 << 20  # 2 GiB, what qemu itself takes, and something to spare

# Of a guest in which the watch begins before there is conntrack, no other test wants to know anything.
EARLY = ("early", "snat-clash")

Observed = Callable[[str, str], dict[str, Any]]


def fetched(kernel: str) -> str:
    """Empty, or why this kernel cannot be had today."""
    listed = subprocess.run([VM, "list"], capture_output=True, text=True, check=True, timeout=30).stdout
    if any(line.split()[0] == kernel and "not here" not in line for line in listed.splitlines()):
        return ""
    done = subprocess.run([VM, "fetch", kernel], capture_output=True, text=True, check=False, timeout=FETCH_TIMEOUT_S)
    return "" if done.returncode == 0 else done.stderr


class Boots:
    """A boot for each guest, begun with the first question and going on while tests judge another's answers."""

    def __init__(self, asked: dict[str, list[str]]) -> None:
        """`asked`: by guest, which is a kernel or "KERNEL early", what it shall do (see guest.py)."""
        self._asked = asked
        memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free_kib = int(memory["MemAvailable"].split()[0])
        # A guest has two processors, but most of the time only one of them has anything to do.
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, max(1, free_kib // GUEST_KIB), len(asked)))
        self._boots: dict[str, Future[subprocess.CompletedProcess[str] | str]] = {}
        self._closing = threading.Event()

    def observed(self, guest: str, deed: str) -> dict[str, Any]:
        """What a guest said of a deed, or its totals. Skips the test where the kernel cannot be had."""
        for other, deeds in self._asked.items():
            if other not in self._boots:
                self._boots[other] = self._pool.submit(self._boot, other.partition(" ")[0], deeds)
        done = self._boots[guest].result()
        if isinstance(done, str):
            if guest.startswith("7.x"):
                pytest.skip(f"Debian's unstable release cannot be downloaded today: {done}")
            pytest.fail(done)
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = [line for line in map(json.loads, done.stdout.splitlines()) if line["deed"] == deed]
        assert "error" not in found, found["error"]
        return dict(found)

    def _boot(self, kernel: str, deeds: Sequence[str]) -> subprocess.CompletedProcess[str] | str:
        why = "the tests are over" if self._closing.is_set() else fetched(kernel)
        if why:
            return why
        return subprocess.run(
            [VM, "--timeout", str(BOOT_TIMEOUT_S), kernel, sys.executable, GUEST, *deeds],
            cwd=CHECKOUT,
            env=os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=BOOT_TIMEOUT_S + 60,
            check=False,
        )

    def close(self) -> None:
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def boots(request: pytest.FixtureRequest) -> Iterator[Boots]:
    """Boots for what the collected tests are parametrized with: `kernel` and `deed`."""
    asked: dict[str, list[str]] = {}
    for item in request.session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if {"kernel", "deed"} <= parameters.keys():
            kernel, deed = parameters["kernel"], parameters["deed"]
            deeds = asked.setdefault(kernel, []) if deed != "early" else asked.setdefault(f"{kernel} early", [*EARLY])
            if deed not in (*deeds, "totals"):
                deeds.append(deed)
    found = Boots(asked)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def observed(boots: Boots) -> Observed:
    return boots.observed
