# The installed package on the running kernel: built from a copy of the checkout that is then deleted, put in
# empty environments, run as root from / without the environment of the test. And the launcher on a machine
# without bcc, which is hidden in a private mount namespace.

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import k8sdiag

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

CHECKOUT = Path(__file__).resolve().parents[2]
PLAIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# exit statuses of `check` (--for nagios) by the status its JSON names
EXIT_STATUS = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}
DIST_PACKAGES = "/usr/lib/python3/dist-packages"


def clean_environment(home: Path) -> dict[str, str]:
    return {"PATH": PLAIN_PATH, "HOME": str(home), "TERM": "xterm", "LANG": "C.UTF-8"}


def hiding(directories: list[str], command: list[str]) -> list[str]:
    """`command`, which finds `directories` empty: in a mount namespace of its own, so only it does."""
    mounts = " && ".join(f"mount -t tmpfs tmpfs '{directory}'" for directory in directories)
    return ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def named_namespaces() -> set[str]:
    listed = subprocess.run(["ip", "-j", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {entry["name"] for entry in json.loads(listed or "[]")}


def tracing_programs() -> set[int]:
    """Ids of the loaded BPF programs of the types that k8sdiag attaches."""
    listed = subprocess.run(["bpftool", "-j", "prog", "show"], capture_output=True, text=True, check=True).stdout
    types = {"raw_tracepoint", "tracepoint", "tracing", "kprobe", "perf_event"}
    return {program["id"] for program in json.loads(listed) if program["type"] in types}


# ---- the wheel and the sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an sdist and the wheel made from it. The copy they were built from is gone."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "checkout"
    ignore = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", "*.k8sd")
    shutil.copytree(CHECKOUT, copy, ignore=ignore)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(copy)
    return folder


@pytest.fixture(scope="module", params=["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def installed(request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment into which nothing but the distribution was installed."""
    (distribution,) = built.glob(request.param)
    environment = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    for_pip = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", str(distribution)],
        env=for_pip,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return environment


def test_the_installed_command_names_its_version_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "bin/k8sdiag"), "--version"]
    done = run(hiding([str(CHECKOUT)], command), clean_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert k8sdiag.__version__ in done.stdout


def test_probes_and_stub_headers_are_beside_the_installed_package(installed: Path) -> None:
    (package,) = installed.glob("lib/python3*/site-packages/k8sdiag")
    for source in (CHECKOUT / "probes").rglob("*"):
        if source.is_file() and source.suffix != ".o":
            copy = package / "probes" / source.relative_to(CHECKOUT / "probes")
            assert copy.read_bytes() == source.read_bytes()


def test_the_installed_check_prints_its_json(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "bin/k8sdiag"), "check", "--duration", "2s", "-o", "json"]
    done = run(hiding([str(CHECKOUT)], command), clean_environment(tmp_path))
    assert done.stdout, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["schema"] == "k8sdiag/check/v1"
    assert done.returncode == EXIT_STATUS[said["status"]]
    assert said["window"]["duration_s"] == pytest.approx(2, abs=1.5)
    # not merely degraded: the drop probe was found, compiled and attached from the installed files
    drops = {entry["signal"]: entry["status"] for entry in said["capabilities"] if "drop" in entry["signal"]}
    assert "full" in drops.values(), said["capabilities"]
    assert "Traceback" not in done.stderr


def test_the_installed_top_prints_one_frame(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "bin/k8sdiag"), "top", "--once"]
    done = run(hiding([str(CHECKOUT)], command), clean_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = named_namespaces(), tracing_programs()
    yield
    until_s = time.monotonic() + 5  # the kernel takes namespaces and programs down with a short delay
    while True:
        left = named_namespaces() - before[0], tracing_programs() - before[1]
        if not any(left) or time.monotonic() > until_s:
            break
        time.sleep(0.1)
    assert left == (set(), set())


@pytest.mark.usefixtures("nothing_left")
def test_the_installed_demo_shows_its_faults_and_cleans_up(installed: Path, tmp_path: Path) -> None:
    done = run([str(installed / "bin/k8sdiag"), "demo", "--once"], clean_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"closed-port|networkpolicy-drop|NO_SOCKET|NETFILTER_DROP", done.stdout), done.stdout
    assert "Traceback" not in done.stdout + done.stderr


# ---- the launcher on a machine without bcc


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The launcher of this checkout, with an environment that is ready."""
    venv = tmp_path_factory.mktemp("launcher") / "venv"
    command = ["env", f"K8SDIAG_VENV={venv}", str(CHECKOUT / "scripts/k8sdiag")]
    done = subprocess.run(
        [*command, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "installing once: Python packages textual==" in done.stderr
    return command


@pytest.mark.parametrize(("words", "status"), [(["top", "--once"], 1), (["-v", "record"], 1), (["check"], 3)])
def test_a_verb_that_reads_the_kernel_names_the_missing_bcc_package(
    launcher: list[str], tmp_path: Path, words: list[str], status: int
) -> None:
    done = run(hiding([f"{DIST_PACKAGES}/bcc"], [*launcher, "--no-install", *words]), clean_environment(tmp_path))
    assert done.returncode == status
    assert done.stdout == ""
    assert re.search(r"packages of the distribution: (python3-bpfcc|python3-bcc) ", done.stderr), done.stderr
    assert "Python packages for" not in done.stderr


@pytest.mark.parametrize("words", [["explain", "--list"], ["check", "--help"], ["--help"]])
def test_what_reads_no_kernel_runs_without_bcc(launcher: list[str], tmp_path: Path, words: list[str]) -> None:
    done = run(hiding([f"{DIST_PACKAGES}/bcc"], [*launcher, "--no-install", *words]), clean_environment(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """pytest's own temporary directories are closed to other users."""
    with tempfile.TemporaryDirectory(prefix="k8sdiag-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_without_root_no_package_is_asked_for(public_directory: Path) -> None:
    """k8sdiag itself then says what it needs."""
    venv, checkout = public_directory / "venv", public_directory / "checkout"
    for part in ("k8sdiag", "probes", "scripts"):
        shutil.copytree(CHECKOUT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", checkout)
    launcher = ["env", f"K8SDIAG_VENV={venv}", str(checkout / "scripts/k8sdiag")]
    prepared = subprocess.run([*launcher, "--version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert prepared.returncode == 0, prepared.stderr

    unprivileged = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *launcher]
    done = run(
        hiding([f"{DIST_PACKAGES}/bcc"], [*unprivileged, "--no-install", "check"]),
        clean_environment(public_directory),
    )
    assert done.returncode == 3
    assert "--no-install" not in done.stderr
    assert "sudo" in done.stderr
    assert "Traceback" not in done.stderr
