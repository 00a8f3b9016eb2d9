"""Processes, and whose they are: read from /proc alone, so it works with any container runtime and without one.

A pod's uid stands in the cgroup path that kubelet gave it, whatever the cgroup version and driver:
    /kubepods/burstable/pod2f0c…-…/3e8b…                                          cgroupfs
    /kubepods.slice/…/kubepods-burstable-pod2f0c…_….slice/cri-containerd-3e8b….scope   systemd
also below a prefix (kind, a kubelet with cgroupRoot). A static pod's uid is the 32 hex digits of its config hash.
Its name stands in the directory that kubelet makes for its logs: /var/log/pods/NAMESPACE_NAME_UID.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

_HEX = "[0-9a-f]"
_POD = re.compile(
    rf"(?:/|-)pod({_HEX}{{8}}(?:[-_]{_HEX}{{4}}){{3}}[-_]{_HEX}{{12}}|{_HEX}{{32}})(?=[./]|$)", re.MULTILINE
)
_CONTAINER = re.compile(rf"({_HEX}{{64}})(?:\.scope)?(?:/|$)", re.MULTILINE)
YOUNG_SCANS = 3
"""A process is looked at again in this many scans: it may move to its namespace and cgroup after it began."""
SCANS_PER_ROUND = 32
"""Within this many scans everybody is looked at anew: numbers are given out again, and a process may move late."""


class Process(NamedTuple):
    pid: int
    netns: int
    """Inode of its network namespace."""
    pod_uid: str
    container: str
    """64 hex digits, or empty."""
    comm: str


class PodName(NamedTuple):
    namespace: str
    name: str


def cgroup_owner(text: str) -> tuple[str, str]:
    """(pod uid, container id) found in the text of /proc/PID/cgroup, each empty where there is none.

    conmon, which CRI-O may keep in the cgroup of a pod that it watches, belongs to no pod: it is in the network
    namespace of the node.
    """
    if "/crio-conmon-" in text:
        return "", ""
    pods = _POD.findall(text)
    containers = _CONTAINER.findall(text)
    return (pods[-1].replace("_", "-") if pods else ""), (containers[-1] if containers else "")


class Processes:
    """All processes of the machine, kept up to date at the cost of looking at the new ones."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._known: dict[int, tuple[Process | None, int]] = {}
        self._turn = 0

    def scan(self) -> list[Process]:
        """Those alive now that have a namespace we may read."""
        alive = {int(name) for name in os.listdir(self._proc) if name.isdigit()}
        self._turn += 1
        for pid in self._known.keys() - alive:
            del self._known[pid]
        for pid in alive:
            known = self._known.get(pid)
            if known and known[1] >= YOUNG_SCANS and (pid + self._turn) % SCANS_PER_ROUND:
                continue
            self._known[pid] = self._look(pid), (known[1] + 1 if known else 1)
        return [process for process, _ in self._known.values() if process]

    def _look(self, pid: int) -> Process | None:
        directory = f"{self._proc}/{pid}"
        try:
            netns = os.stat(f"{directory}/ns/net").st_ino
            uid, container = cgroup_owner(_read(f"{directory}/cgroup"))
            comm = _read(f"{directory}/comm").strip()
        except OSError:  # gone, a zombie, or not ours to read
            return None
        return Process(pid, netns, uid, container, comm)


def _read(path: str) -> str:
    """A short file of /proc; open() with a decoder costs twice as much."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16).decode(errors="replace")
    finally:
        os.close(fd)


class PodLogs:
    """Names of pods by uid, from kubelet's log directories; they outlive the pod."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._directory = root / "var/log/pods"
        self._changed_ns = -1
        self._settled = False
        self._names: dict[str, PodName] = {}

    def names(self) -> dict[str, PodName]:
        """The same object again while nothing changes."""
        try:
            changed_ns = self._directory.stat().st_mtime_ns
            # The time stamp is coarse: a second change within milliseconds of the first leaves it as it is.
            if changed_ns != self._changed_ns or not self._settled:
                self._settled = changed_ns == self._changed_ns
                self._changed_ns = changed_ns
                names = {
                    parts[2]: PodName(parts[0], parts[1])
                    for entry in os.listdir(self._directory)
                    if len(parts := entry.split("_")) == 3
                }
                if names != self._names:
                    self._names = names
        except OSError:
            self._changed_ns = -1
            self._names = {}
        return self._names
