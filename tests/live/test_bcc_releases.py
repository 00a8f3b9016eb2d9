# The probe is compiled by whatever bcc, LLVM and Python a node's distribution has. Debian's releases, as
# plain directories (scripts/roots), are those that can be met on one machine; the kernel is the running one.

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ROOTS = str(CHECKOUT / "scripts" / "roots")
SELFTEST = ["python3", "-m", "k8sdiag.host.selftest"]
BUILD_TIMEOUT_S, RUN_TIMEOUT_S = 600, 60

# Suite and the bcc it must turn out to have; None where it moves (sid).
RELEASES = [("bullseye", "0.18."), ("bookworm", "0.26."), ("trixie", "0.31."), ("sid", None)]

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="chroot, mount and bpf(2) need root"),
]


def called(command: list[str], timeout_s: float, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("K8SDIAG_")}


def inside(suite: str) -> list[str]:
    """What to put before a command so that it meets the suite's bcc: nothing if that is the machine's own."""
    if platform.freedesktop_os_release().get("VERSION_CODENAME") == suite:
        return []
    built = called([ROOTS, "build", suite], BUILD_TIMEOUT_S, **settings())
    if built.returncode == 3 and suite == "sid":
        pytest.skip(f"Debian's unstable release cannot be unpacked today: {built.stderr}")
    assert built.returncode == 0, built.stderr
    return [ROOTS, "run", suite, "--"]


@pytest.mark.parametrize(("suite", "bcc"), RELEASES, ids=[suite for suite, _ in RELEASES])
def test_the_drop_probe_loads_and_counts_with_the_bcc_of(suite: str, bcc: str | None) -> None:
    done = called([*inside(suite), *SELFTEST], RUN_TIMEOUT_S, **settings())
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["skbs"] == 23, found
    assert found["bcc"].startswith(bcc or "0."), found


def test_a_root_is_left_without_a_mount_and_cannot_write_to_the_checkout() -> None:
    before = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    code = "import errno, os; os.listdir('/proc/self'); os.stat('/sys/kernel/btf/vmlinux'); open('x', 'w')"
    called([ROOTS, "build", "trixie"], BUILD_TIMEOUT_S, **settings())
    done = called([ROOTS, "run", "trixie", "--", "python3", "-c", code], RUN_TIMEOUT_S, **settings())
    assert done.returncode == 1
    assert "Read-only file system: 'x'" in done.stderr
    assert Path("/proc/self/mountinfo").read_text(encoding="utf-8") == before


def test_a_root_that_cannot_be_built_names_the_step_that_failed(tmp_path: Path) -> None:
    done = called(
        [ROOTS, "run", "trixie", "--", "python3", "-c", "print('never')"],
        BUILD_TIMEOUT_S,
        K8SDIAG_CACHE=str(tmp_path),
        K8SDIAG_DEBIAN_MIRROR="http://127.0.0.1:9/debian",  # discard: nothing listens there
    )
    assert done.returncode == 3
    assert "trixie: fetching the package lists failed" in done.stderr
    assert not done.stdout
    assert [path.name for path in (tmp_path / "roots").iterdir()] == ["trixie.lock"]
