"""Other k8sdiag processes that watch this node at the same moment: named, never refused.

Each live instance keeps a file of its own in /run/k8sdiag and holds flock(2) on it. The kernel drops that lock
when the process ends, however it ends: a file that nobody holds is stale, and whoever meets it removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from k8sdiag.errors import command_line
from k8sdiag.facts import Capability

DIRECTORY = "run/k8sdiag"
"""Below the host's root, so that instances in containers and on the node itself meet."""
_TEXT_BYTES_MAX = 64 << 10


class Other(NamedTuple):
    """Another living instance."""

    pid: int
    """As it sees itself: a number of another PID namespace where `here` is false."""
    command: str
    """What was typed, quoted for a shell."""
    here: bool
    """Whether `pid` means the same process to us."""

    @property
    def label(self) -> str:
        where = "" if self.here else " of another PID namespace"
        return f"pid {self.pid}{where} ({self.command})"


class _Text(msgspec.Struct):
    """What an instance's file says."""

    pid: int
    pid_namespace: int
    command: str


class Instance:
    """This process, announced from the moment of construction until close().

    Being announced is a courtesy to other instances, so nothing here raises OSError: where /run/k8sdiag cannot be
    written (a read-only container, no root), `unannounced` says why and the watch goes on.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._directory = root / DIRECTORY
        self._fd = -1
        self._path = ""
        self.unannounced = ""
        """Why other instances will not see this one; empty where they will."""
        try:
            self._announce()
        except OSError as error:
            self.unannounced = f"{error.filename or self._directory}: {error.strerror}"

    def _announce(self) -> None:
        text = msgspec.json.encode(_Text(os.getpid(), _pid_namespace(), command_line()))
        while True:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                fd, path = tempfile.mkstemp(prefix=f"{os.getpid()}-", dir=self._directory)
            except FileNotFoundError:  # the last instance just left and took the directory with it
                continue
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Between those two calls the file looked stale to anybody who came by.
            if not _is_at(fd, path):
                os.close(fd)
                continue
            self._fd, self._path = fd, path
            try:
                os.write(fd, text)
            except OSError:  # no room, even for this
                self.close()
                raise
            return

    def others(self) -> list[Other]:
        """Living instances in other processes, by pid; the files of dead ones are removed."""
        return living(self._directory)

    def capability(self) -> Capability:
        """What the stream of facts says of it: counting is not disturbed by others, only paid for twice."""
        why = also_running(self.others())
        if self.unannounced:
            why = f"not announced to other instances ({self.unannounced}). {why}".strip()
        return Capability("instances", "missing" if self.unannounced else "full", f"/{DIRECTORY}", why)

    def close(self) -> None:
        """Leave nothing behind; safe to call twice."""
        if self._fd >= 0:
            # Removed while it is still locked: once unlocked, somebody else might remove a newer file of this name.
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):  # not empty: others are still there
                self._directory.rmdir()

    def __enter__(self) -> Instance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def also_running(others: Sequence[Other]) -> str:
    """A remark that names them; empty where there are none."""
    if not others:
        return ""
    return f"also running: {', '.join(other.label for other in others)}; each counts every drop by itself"


def living(directory: Path = Path("/", DIRECTORY)) -> list[Other]:
    """Instances in other processes whose files in `directory` are locked, by pid. Empty where it may not be read."""
    found = []
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    for name in names:
        text = _read_if_held(os.path.join(directory, name))
        if text is not None:
            here = text.pid_namespace == _pid_namespace()
            if not (here and text.pid == os.getpid()):
                found.append(Other(text.pid, text.command, here))
    return sorted(found)


def _read_if_held(path: str) -> _Text | None:
    """What a locked file says. A file that nobody holds is removed: its process is dead."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            return msgspec.json.decode(os.read(fd, _TEXT_BYTES_MAX), type=_Text)
        except (OSError, msgspec.DecodeError):  # it is writing just now: there, but yet without a name
            return None
    except OSError:
        return None
    else:
        with contextlib.suppress(OSError):
            if _is_at(fd, path):
                os.unlink(path)
        return None
    finally:
        os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    """Whether the open file is (still) what the path names."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
