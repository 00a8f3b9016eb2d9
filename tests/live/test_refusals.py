# What a node may refuse, made for real: by dropping rights, or in a mount namespace of its own where something is
# covered. Each refusal has to be told in words with a remedy and the right exit code, and a trace recorded before
# has to stay readable. Only lockdown is simulated: a running kernel cannot be locked down and released again.

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
K8SDIAG = [sys.executable, "-m", "k8sdiag"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"}
NETNS = f"refused-{os.getpid()}"
DATAGRAMS = 23
NAGIOS = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}
KPTR_RESTRICT = Path("/proc/sys/kernel/kptr_restrict")

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and bpf(2) need root"),
]


def privately(script: str) -> list[str]:
    """Run what follows in a mount namespace of its own, after a shell script."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'{script} && exec "$@"', "sh"]


def covered(directory: str) -> list[str]:
    """As if this directory were empty."""
    return privately(f"mount -t tmpfs none {shlex.quote(directory)}")


def without_rights(*capabilities: str) -> list[str]:
    """As root, but without these capabilities: the kernel itself refuses."""
    return ["setpriv", "--bounding-set=" + ",".join(f"-{name}" for name in capabilities)]


def called(*words: str, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, *K8SDIAG, *words], cwd="/", env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )


def drop_23() -> None:
    """Send datagrams to a port that nobody has, inside the network namespace of these tests."""
    code = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"for _ in range({DATAGRAMS}): s.sendto(b'x', ('127.0.0.1', 4477))"
    )
    subprocess.run(["ip", "netns", "exec", NETNS, sys.executable, "-I", "-c", code], check=True, timeout=20)


@pytest.fixture(scope="module", autouse=True)
def _namespace() -> Iterator[None]:
    subprocess.run(["ip", "netns", "add", NETNS], check=True, timeout=20)
    try:
        subprocess.run(["ip", "-n", NETNS, "link", "set", "lo", "up"], check=True, timeout=20)
        yield
    finally:
        subprocess.run(["ip", "netns", "delete", NETNS], check=True, timeout=20)


class Recording:
    """`k8sdiag record` in a process of its own, from the moment it counts until finish()."""

    def __init__(self, path: Path, before: Sequence[str] = ()) -> None:
        self._path = path
        self._said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by stop)
        self.process = subprocess.Popen(
            [*before, *K8SDIAG, "record", "-w", str(path)], cwd="/", env=ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said,
        )  # fmt: skip
        give_up_s = time.monotonic() + 30
        while "recording to" not in self.said():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > give_up_s:
                said = self.said()
                self.stop()
                pytest.fail(f"record did not begin: {said}")
            time.sleep(0.02)

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def finish(self, before: Sequence[str] = ()) -> dict[str, Any]:
        """End it as Ctrl-C would, and return what `check` makes of the whole trace."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(20) == 0, self.said()
        assert "Traceback" not in self.said()
        done = called("check", str(self._path), "--whole", "-o", "json", before=before)
        assert "Traceback" not in done.stderr
        read: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == NAGIOS[read["status"]]
        return read

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)
        self._said.close()


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Callable[..., Recording]]:
    started: list[Recording] = []

    def start(*before: str) -> Recording:
        started.append(Recording(tmp_path / f"{len(started)}.k8sd", before))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def our_drops(check: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in check["drops"] if row["owner"]["name"] == NETNS]


def assert_23_drops(check: dict[str, Any]) -> dict[str, Any]:
    """Returns the one row they make."""
    rows = our_drops(check)
    assert [(row["packets"], row["reason"], row["owner"]["kind"]) for row in rows] == [
        (DATAGRAMS, "NO_SOCKET", "netns")
    ]
    return rows[0]


def capability(check: dict[str, Any], signal_: str) -> dict[str, Any]:
    (found,) = (row for row in check["capabilities"] if row["signal"] == signal_)
    read: dict[str, Any] = found
    return read


@dataclass(frozen=True)
class Recorded:
    """A trace made while nothing was refused, and what is said of it then."""

    path: Path
    check: str
    check_code: int
    replay: str


@pytest.fixture(scope="module")
def recorded(_namespace: None) -> Iterator[Recorded]:
    directory = Path(tempfile.mkdtemp(prefix="k8sdiag-refusals-"))
    one = None
    try:
        path = directory / "before.k8sd"
        one = Recording(path)
        drop_23()
        assert_23_drops(one.finish())
        directory.chmod(0o755)  # it is read by an ordinary user too
        path.chmod(0o644)
        check, replay = called("check", str(path)), called("replay", str(path), "--once")
        assert replay.returncode == 0, replay.stderr
        assert NETNS in replay.stdout
        yield Recorded(path, check.stdout, check.returncode, replay.stdout)
    finally:
        if one is not None:
            one.stop()
        shutil.rmtree(directory)


@dataclass(frozen=True)
class Refusal:
    name: str
    before: list[str]
    said: tuple[str, ...] = field(default=())
    """Regular expressions that the message has to match: what happened, why, and what to do."""


REFUSALS = [
    Refusal(
        "an-ordinary-user",
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"],
        (r"[Nn]ot permitted", "CAP_BPF", "CAP_NET_ADMIN", "CAP_SYS_PTRACE", r"sudo /\S+ -m k8sdiag {words}\n"),
    ),
    Refusal(
        "root-without-bpf",
        without_rights("sys_admin", "bpf", "perfmon"),
        (r"[Nn]ot permitted", "CAP_BPF"),
    ),
    Refusal(
        "root-without-perfmon",
        without_rights("sys_admin", "perfmon"),
        (r"[Nn]ot permitted|refused", "CAP_PERFMON"),
    ),
    # It has every capability, inside; the kernel refuses none the less.
    Refusal(
        "root-of-a-user-namespace",
        ["unshare", "--user", "--map-root-user"],
        ("refused|[Nn]ot permitted", "Operation not permitted", "k8sdiag doctor"),
    ),
    Refusal(
        "no-bcc",
        covered("/usr/lib/python3/dist-packages/bcc"),
        ("no bcc package found", r"(apt-get|dnf|apk) \S+ .*b(pf)?cc", "replay, check FILE"),
    ),
    Refusal("no-btf", covered("/sys/kernel/btf"), ("/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF=y")),
]


@pytest.fixture(params=REFUSALS, ids=[refusal.name for refusal in REFUSALS])
def refusal(request: pytest.FixtureRequest) -> Refusal:
    chosen: Refusal = request.param
    if chosen.name == "no-bcc" and not Path("/usr/lib/python3/dist-packages/bcc").is_dir():
        pytest.skip("bcc is elsewhere on this distribution")
    return chosen


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["check"], 3),
        (["check", "--for", "simple", "-o", "json"], 3),
        (["top", "--once"], 1),
        (["record", "-w", "FILE"], 1),
    ],
    ids=["check", "check-json", "top", "record"],
)
def test_a_refusal_is_told_in_words_with_what_to_do(
    refusal: Refusal, words: list[str], code: int, tmp_path: Path
) -> None:
    file = tmp_path / "never.k8sd"
    words = [str(file) if word == "FILE" else word for word in words]
    done = called(*words, before=refusal.before)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("k8sdiag: ")
    for pattern in refusal.said:
        expected = pattern.replace("{words}", re.escape(shlex.join(words)))
        assert re.search(expected, done.stderr), f"{expected!r} is not in: {done.stderr}"
    assert not file.exists(), "a file with nothing in it"


def test_a_trace_stays_readable_whatever_the_node_refuses(refusal: Refusal, recorded: Recorded) -> None:
    check = called("check", str(recorded.path), before=refusal.before)
    assert (check.returncode, check.stdout, check.stderr) == (recorded.check_code, recorded.check, "")
    replay = called("replay", str(recorded.path), "--once", before=refusal.before)
    assert (replay.returncode, replay.stdout, replay.stderr) == (0, recorded.replay, "")


def test_the_line_to_type_is_the_one_that_works() -> None:
    done = called("check", "--duration", "500ms", before=REFUSALS[0].before)
    line = next(line for line in done.stderr.splitlines() if "sudo " in line)
    typed = shlex.split(line.partition("sudo ")[2])
    assert Path(typed[0]).is_absolute()
    worked = subprocess.run(typed, cwd="/", env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert worked.stdout.startswith("k8sdiag "), worked.stderr
    assert worked.stderr == ""


def test_lockdown_is_named_where_the_kernel_refuses_under_it() -> None:
    # Simulated: the file says so, and the kernel refuses the root of a user namespace.
    script = (
        'mount -t tmpfs none /sys/kernel/security && echo "none integrity [confidentiality]" '
        "> /sys/kernel/security/lockdown"
    )
    done = called("check", before=["unshare", "--user", "--map-root-user", *privately(script)[1:]])
    assert done.returncode == 3
    assert "lockdown" in done.stderr
    assert "confidentiality" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("mounted", [True, False], ids=["with-tracefs", "without-tracefs"])
def test_tracefs_is_not_needed(mounted: bool, recording: Callable[..., Recording]) -> None:
    mount = "mount -t tracefs none /sys/kernel/tracing" if mounted else "mount -t tmpfs none /sys/kernel/tracing"
    one = recording(*privately(mount))
    drop_23()
    row = assert_23_drops(one.finish())
    assert row["cause"] == "closed-port"
    assert row["location"].startswith("__udp4_lib_rcv")


@contextlib.contextmanager
def pointers_hidden() -> Iterator[None]:
    """kernel.kptr_restrict=2 for a moment, host-wide."""
    before = KPTR_RESTRICT.read_text()
    KPTR_RESTRICT.write_text("2")
    try:
        yield
    finally:
        KPTR_RESTRICT.write_text(before)


def test_hidden_addresses_cost_names_and_not_counts(recording: Callable[..., Recording]) -> None:
    with pointers_hidden():
        one = recording()  # it has read the symbols, or tried to, when it says that it records
    drop_23()
    check = one.finish()
    row = assert_23_drops(check)
    assert re.fullmatch(r"0x[0-9a-f]+", row["location"]), row["location"]
    assert row["cause"] == "closed-port"
    symbols = capability(check, "symbols")
    assert symbols["status"] == "missing"
    assert "kptr_restrict" in symbols["why"]


def test_two_instances_count_the_same_and_the_second_names_the_first(recording: Callable[..., Recording]) -> None:
    first = recording()
    second = recording()
    drop_23()
    by_second, by_first = second.finish(), first.finish()
    assert_23_drops(by_first)
    assert_23_drops(by_second)
    assert f"pid {first.process.pid} " in capability(by_second, "instances")["why"]
    assert str(second.process.pid) not in capability(by_first, "instances")["why"]
    assert not any(name.startswith(f"{first.process.pid}-") for name in _instance_files())


def test_a_killed_instance_is_not_named(recording: Callable[..., Recording]) -> None:
    victim = recording()
    victim.process.kill()
    victim.process.wait(20)
    check = recording().finish()
    assert str(victim.process.pid) not in capability(check, "instances")["why"]
    assert not any(name.startswith(f"{victim.process.pid}-") for name in _instance_files())


def _instance_files() -> list[str]:
    try:
        return os.listdir("/run/k8sdiag")
    except FileNotFoundError:
        return []
