"""The screen in a real terminal over real drops: seen within three seconds, left within one, nothing left behind."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not all(map(shutil.which, ("tmux", "ip", "bpftool"))), reason="needs tmux, ip and bpftool"),
]
SEND = """
import socket, sys
to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(int(sys.argv[1])):
    to.sendto(b"x", ("127.0.0.1", 9))
"""  # an unconnected socket is not told of the ICMP error, so that all are sent
TOP = (sys.executable, "-m", "k8sdiag", "top")
Left = Callable[["Terminal"], None]


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def probes() -> set[int]:
    """Ids of the drop programs that are loaded, by whomever."""
    return {program["id"] for program in json.loads(said("bpftool", "-j", "prog", "show"))
            if program.get("name") == "on_kfree_skb"}  # fmt: skip


def probes_of(pid: int) -> set[int]:
    """Ids of the programs that a process holds by a descriptor of its own or of a link."""
    texts = []
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            texts.append(path.read_text())
    return {int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("prog_id:")}


class Terminal:
    """A tmux of its own with one command in it."""

    def __init__(self, command: tuple[str, ...], width: int, height: int, **environment: str) -> None:
        self._tmux = ("tmux", "-L", f"k8sdiag-{os.getpid()}-{secrets.token_hex(4)}", "-f", "/dev/null")
        words = [*(f"{name}={value}" for name, value in environment.items()), *command]
        line = f'cd {shlex.quote(str(ROOT))}; env {shlex.join(words)}; echo "EXIT $?"; exec sleep 60'
        said(*self._tmux, "new-session", "-d", "-x", str(width), "-y", str(height), "sh", "-c", line)

    def screen(self) -> str:
        return said(*self._tmux, "capture-pane", "-p")

    def press(self, *keys: str) -> None:
        said(*self._tmux, "send-keys", *keys)

    def wait(self, text: str, seconds: float) -> float:
        """Seconds until `text` was on the screen."""
        begin_s = time.monotonic()
        while text not in self.screen():
            assert time.monotonic() - begin_s < seconds, f"no {text!r} within {seconds} s:\n{self.screen()}"
            time.sleep(0.02)
        return time.monotonic() - begin_s

    def pid(self) -> int:
        """The process in front: k8sdiag itself."""
        shell = int(said(*self._tmux, "display-message", "-p", "#{pane_pid}"))
        children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        return int(children[0])

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False, capture_output=True)
        Path(f"/tmp/tmux-{os.geteuid()}", self._tmux[2]).unlink(missing_ok=True)


@pytest.fixture
def new_terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def make(*command: str, width: int = 80, height: int = 24, **environment: str) -> Terminal:
        opened.append(Terminal(command, width, height, **environment))
        return opened[-1]

    yield make
    for terminal in opened:
        terminal.close()


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"top-{secrets.token_hex(3)}"
    said("ip", "netns", "add", name)
    try:
        said("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        said("ip", "netns", "delete", name)


def send(netns: str, count: int) -> None:
    said("ip", "netns", "exec", netns, sys.executable, "-c", SEND, str(count))


def test_the_dropping_namespace_is_on_the_screen_within_three_seconds(
    new_terminal: Callable[..., Terminal], netns: str
) -> None:
    terminal = new_terminal(*TOP)
    terminal.wait("last ", 15)
    begin_s = time.monotonic()
    send(netns, 1009)
    terminal.wait(f"netns {netns}: nothing listens on the port", 3)
    assert time.monotonic() - begin_s < 3
    terminal.wait("1,009 packets", 2)
    assert "ss -lntup" in terminal.screen()
    terminal.press("2")
    terminal.wait("[2 Pods]", 2)
    terminal.wait("NAMESPACE OR OWNER", 2)
    assert netns in terminal.screen()
    terminal.press("3")
    terminal.wait("NO_SOCKET", 2)
    assert max(map(len, terminal.screen().splitlines())) <= 80


def by_key(*keys: str) -> Left:
    return lambda terminal: terminal.press(*keys)


def by_signal(number: signal.Signals) -> Left:
    return lambda terminal: os.kill(terminal.pid(), number)


@pytest.mark.parametrize(
    "leave",
    [by_key("q"), by_key("C-c"), by_signal(signal.SIGTERM), by_signal(signal.SIGHUP),
     by_signal(signal.SIGINT)],
    ids=["q", "ctrl-c", "SIGTERM", "SIGHUP", "SIGINT"],
)  # fmt: skip
def test_it_is_left_in_less_than_a_second_and_no_probe_stays(
    new_terminal: Callable[..., Terminal], netns: str, leave: Left
) -> None:
    terminal = new_terminal(*TOP)
    terminal.wait("last ", 15)
    send(netns, 23)
    ours = probes_of(terminal.pid()) & probes()
    assert ours
    begin_s = time.monotonic()
    leave(terminal)
    terminal.wait("EXIT 0", 3)
    assert time.monotonic() - begin_s < 1
    assert not ours & probes()
    assert "Traceback" not in terminal.screen()


def test_a_terminal_that_is_closed_takes_the_program_and_its_probe_with_it(
    new_terminal: Callable[..., Terminal], netns: str
) -> None:
    terminal = new_terminal(*TOP)
    terminal.wait("last ", 15)
    pid = terminal.pid()
    ours = probes_of(pid) & probes()
    assert ours
    send(netns, 23)  # so that there is something to draw when nobody is there any more
    terminal.close()
    deadline_s = time.monotonic() + 3
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert not ours & probes()


def test_q_leaves_from_a_page_too(new_terminal: Callable[..., Terminal]) -> None:
    terminal = new_terminal(*TOP)
    terminal.wait("last ", 15)
    terminal.press("?")
    terminal.wait("Choose a namespace", 2)
    terminal.press("q")
    assert terminal.wait("EXIT 0", 3) < 1


@pytest.mark.parametrize(("width", "height"), [(60, 20), (200, 50)])
@pytest.mark.parametrize("environment", [{}, {"TERM": "linux", "NO_COLOR": "1"}], ids=["colour", "no-colour"])
def test_other_sizes_and_terminals_show_the_same_verdict(
    new_terminal: Callable[..., Terminal], netns: str, width: int, height: int, environment: dict[str, str]
) -> None:
    terminal = new_terminal(*TOP, width=width, height=height, **environment)
    terminal.wait("last ", 15)
    send(netns, 523)
    terminal.wait(f"netns {netns}: ", 3)
    terminal.wait("523 packets", 2)
    terminal.press("q")
    terminal.wait("EXIT 0", 3)


def test_watching_with_the_screen_open_stays_within_its_memory(
    new_terminal: Callable[..., Terminal], netns: str
) -> None:
    terminal = new_terminal(*TOP)
    terminal.wait("last ", 15)
    send(netns, 997)
    for key in "23456":
        terminal.press(key)
        terminal.wait(f"[{key} ", 2)
    status = Path(f"/proc/{terminal.pid()}/status").read_text()
    resident_kib = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))
    assert resident_kib < 160 * 1024


def test_without_a_terminal_it_says_what_to_use_instead() -> None:
    done = subprocess.run(TOP, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert done.returncode == 2
    assert "--once" in done.stderr
    assert not done.stdout
