"""Network namespaces: their names, cookies, and how to ask something inside one."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

_CLONE_NEWNET = 0x40000000
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, from 5.14
_LIBC = ctypes.CDLL(None, use_errno=True)
_one_at_a_time = Lock()


def own_inode() -> int:
    """Inode of the node's namespace: that of process 1 where it may be read, else ours."""
    for path in ("/proc/1/ns/net", "/proc/self/ns/net"):
        try:
            return os.stat(path).st_ino
        except OSError:
            continue
    return 0


class Name(NamedTuple):
    """A name under /run/netns and what is mounted there."""

    name: str
    inode: int
    since_ns: int
    """When the kernel made the inode, wall clock: another one, though its number is the same, is another namespace."""


def named(root: Path = Path("/")) -> list[Name]:
    """All names under /run/netns. One whose mount is still to come is left out."""
    found = []
    try:
        nsfs = os.stat("/proc/self/ns/net").st_dev
        entries = list(os.scandir(root / "run/netns"))
    except OSError:
        return []
    for entry in entries:
        try:
            stat = entry.stat()
        except OSError:  # deleted in this moment
            continue
        if stat.st_dev == nsfs:
            found.append(Name(entry.name, stat.st_ino, stat.st_ctime_ns))
    return found


def opened(path: str, inode: int = 0) -> int:
    """A descriptor of the namespace that `path` refers to, to be closed. Raises OSError.

    With `inode`, ESTALE where it is no longer that one: a process may have gone elsewhere since it was looked at.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if inode and os.fstat(fd).st_ino != inode:
        os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    return fd


@contextmanager
def inside(path: str, inode: int = 0) -> Iterator[None]:
    """Run the body in the namespace that `path` refers to, as opened() says. Only this thread moves. Raises OSError.

    The namespace is not kept alive: nothing stays open afterwards. In the body, /proc/self/ns/net and the like of
    this process's own id lead to where the thread is now: paths are to be opened before.
    """
    with _one_at_a_time:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = opened(path, inode)
            try:
                _enter(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _enter(home)
        finally:
            os.close(home)


def _enter(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def cookie_here() -> int:
    """Cookie of the current namespace, 0 where the kernel has none. Cookies are never given out twice."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
        except OSError:
            return 0
