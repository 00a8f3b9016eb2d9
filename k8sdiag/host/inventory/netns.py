"""Network namespaces: their names, cookies, and how to ask something inside one."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

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


def named(root: Path = Path("/")) -> dict[str, int]:
    """Inode by name of what is mounted under /run/netns. A name whose mount is still to come is left out."""
    directory = root / "run/netns"
    found = {}
    try:
        nsfs = os.stat("/proc/self/ns/net").st_dev
        for entry in os.scandir(directory):
            stat = entry.stat()
            if stat.st_dev == nsfs:
                found[entry.name] = stat.st_ino
    except OSError:
        pass
    return found


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Run the body in the namespace that `path` refers to. Only this thread moves. Raises OSError.

    The namespace is not kept alive: nothing stays open afterwards.
    """
    with _one_at_a_time:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
