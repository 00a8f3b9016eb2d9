"""Pods as the container runtime knows them, asked over the CRI: gRPC on a Unix socket.

The runtime adds what /proc cannot tell: labels, and from them the workload. Everything here is optional: what does
not answer in time is missing from the listing, and the listing says so.

Of the CRI only a few messages matter, so they are taken apart here by their field numbers, which stand in
pkg/apis/runtime/v1/api.proto of Kubernetes' cri-api and are the same in v1alpha2.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import msgspec

if TYPE_CHECKING:
    from h2.events import Event

TIME_LIMIT_S = 0.5
"""For one listing, whatever is asked and of however many runtimes."""
RETRY_S = 1.0, 60.0
"""A pod whose status is not to be had is asked again after the first, then after ever longer, up to the second."""
SEARCH_S = 5.0, 60.0
"""Sockets are searched anew after the first while none answers, and after the second else."""
MAX_ANSWER_BYTES = 16 << 20  # kubelet's own limit
SICK_NAMED = 3
"""So many pods without a status get a line of their own."""

KNOWN_SOCKETS = (
    "/run/containerd/containerd.sock",
    "/run/k3s/containerd/containerd.sock",  # k3s and RKE2
    "/var/snap/microk8s/common/run/containerd.sock",
    "/run/k0s/containerd.sock",
    "/run/crio/crio.sock",
    "/run/cri-dockerd.sock",
    "/run/dockershim.sock",  # Bottlerocket's name for containerd's; kubelet before 1.24
)
_SERVICES = "runtime.v1.RuntimeService", "runtime.v1alpha2.RuntimeService"
_RUNNING = b"\x0a\x04\x12\x02\x08\x01"  # ListContainersRequest{filter: {state: {state: CONTAINER_RUNNING}}}
_NETWORK_OF_NODE = 2  # NamespaceMode.NODE
_DEADLINE_EXCEEDED, _NOT_FOUND, _UNIMPLEMENTED = 4, 5, 12  # status codes of gRPC
_UNDER_WAY = 64
"""Questions asked at once: one that hangs then holds up nobody, and gRPC servers commonly admit a hundred."""
_WINDOW_BYTES = 1 << 20  # a listing of two hundred pods then comes without a pause
_SUN_PATH_BYTES = 108  # struct sockaddr_un, unix(7)


class Pod(NamedTuple):
    """One pod sandbox. A pod that was restarted has several, of which one is ready."""

    uid: str
    """As in the paths of its cgroups: of a static pod its config hash, which is not its uid in the API."""
    name: str
    namespace: str
    labels: Mapping[str, str]
    """The pod's, and kubelet's own io.kubernetes.pod.*"""
    annotations: Mapping[str, str]
    sandbox: str
    """Id of the sandbox, most often 64 hex digits."""
    ready: bool
    created_ns: int
    """Wall clock, since 1970."""
    runtime: str
    """Such as containerd; empty where it does not say."""
    runtime_version: str
    containers: Mapping[str, str]
    """Name by id, of those that run; without the sandbox's own."""
    pid: int = 0
    """A process that holds the pod's namespaces. 0: unknown, has ended, or has another number for us (kind)."""
    netns_path: str = ""
    """Its network namespace, to be opened from here: the host's root is in front. Empty: unknown."""
    netns: int = 0
    """Inode of that; of a pod in the node's network the node's own. 0 where it could not be seen."""
    host_network: bool | None = None
    """Whether it shares the node's network. None: nobody said."""
    addresses: tuple[str, ...] = ()
    """As the runtime got them from CNI; empty for a pod in the node's network."""


class Listing(NamedTuple):
    pods: tuple[Pod, ...]
    """Those ready, and those that have ended but were not removed yet."""
    reasons: tuple[str, ...]
    """What is missing and why, a sentence each."""
    complete: bool = False
    """Whether every runtime that was found listed its pods: only then is one that is missing here gone."""
    runtimes: tuple[str, ...] = ()
    """Which answered: "containerd 1.6.20 at /run/containerd/containerd.sock"."""


# ---- workloads ------------------------------------------------------------------------------------

_RANDOM = "[bcdfghjklmnpqrstvwxz2456789]{5}"  # what generateName appends: k8s.io/apimachinery/pkg/util/rand
_LONGEST_GENERATED = 63  # generateName cuts what stands before those five
_RANDOM_END = re.compile(rf"(.+)-{_RANDOM}")
_ORDINAL_END = re.compile(r"(.+)-[0-9]+")


def workload(name: str, labels: Mapping[str, str], annotations: Mapping[str, str]) -> str:
    """Kind and name, such as Deployment/cart; empty where nothing is known.

    Likely, not proven: it rests on labels that controllers put on their pods and on how they form names, and anybody
    may write such labels by hand. Only the API's owner references are proof. Where label and name do not go
    together, or the name was cut so that the controller's cannot be read from it, nothing is said. A Job of a
    CronJob is named as the Job.
    """
    if annotations.get("kubernetes.io/config.source") in {"file", "http"}:
        return ""  # a static pod: kubelet read it itself, no controller made it
    if template := labels.get("pod-template-hash"):
        owner = _deployment(name, template)
        return f"Deployment/{owner}" if owner else ""
    if labels.get("statefulset.kubernetes.io/pod-name") == name:
        numbered = _ORDINAL_END.fullmatch(name)
        return f"StatefulSet/{numbered[1]}" if numbered else ""
    job = labels.get("batch.kubernetes.io/job-name") or labels.get("job-name")
    if job and name.startswith(job[: _LONGEST_GENERATED - 6]):
        return f"Job/{job}"
    if "controller-revision-hash" in labels and "pod-template-generation" in labels:
        generated = _RANDOM_END.fullmatch(name)
        return f"DaemonSet/{generated[1]}" if generated and len(name) < _LONGEST_GENERATED else ""
    return ""


def _deployment(name: str, template: str) -> str:
    """cart from cart-7d9f8c6b5-x2vqp. Of a long name only the beginning of the hash is left; "" if nothing is."""
    whole = re.fullmatch(rf"(.+)-{re.escape(template)}-{_RANDOM}", name)
    if whole:
        return whole[1]
    if len(name) == _LONGEST_GENERATED:
        stem = name[:-5]
        for kept in range(len(template), 2, -1):
            if stem.endswith("-" + template[:kept]):
                return stem[: -kept - 1]
    return ""


# ---- the runtimes of this node --------------------------------------------------------------------


class Runtime:
    """The container runtimes of a node. Nothing stays open between listings; one thread at a time."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._endpoints: list[_Endpoint] = []
        self._search_at_s = 0.0

    def pods(self) -> Listing:
        """Ask for all pods; takes TIME_LIMIT_S at the worst, and raises nothing.

        What is settled when a sandbox is made (namespace, process, addresses) is asked once.
        """
        start_s = time.monotonic()
        if start_s >= self._search_at_s:
            known = {endpoint.place: endpoint for endpoint in self._endpoints}
            self._endpoints = [known.get(place) or _Endpoint(place) for place in sockets(self._root)]
            self._search_at_s = start_s + SEARCH_S[1]
        listings = _at_once(self._endpoints, start_s + TIME_LIMIT_S)
        served = any(listing.complete for listing in listings)
        if not served:
            self._search_at_s = min(self._search_at_s, start_s + SEARCH_S[0])
        if not listings:
            return Listing((), ("no socket of a container runtime was found",))
        if served:
            # Docker brings a containerd whose CRI is switched off: no loss where another runtime has the pods.
            pairs = zip(self._endpoints, listings, strict=True)
            listings = [listing for endpoint, listing in pairs if not endpoint.without_cri]
        return Listing(
            tuple(pod for listing in listings for pod in listing.pods),
            tuple(reason for listing in listings for reason in listing.reasons),
            all(listing.complete for listing in listings),
            tuple(runtime for listing in listings for runtime in listing.runtimes),
        )


def _at_once(endpoints: Sequence[_Endpoint], deadline_s: float) -> list[Listing]:
    """What each says. One that hangs does not use up the time of the others."""
    listings = [Listing((), ())] * len(endpoints)

    def ask(number: int) -> None:
        listings[number] = endpoints[number].listing(deadline_s)

    threads = [Thread(target=ask, args=(number,), daemon=True) for number in range(1, len(endpoints))]
    for thread in threads:
        thread.start()
    if endpoints:
        ask(0)
    for thread in threads:
        thread.join()
    return listings


class Place(NamedTuple):
    """A socket, and how what its runtime says about paths and processes is to be read from here."""

    address: str
    """Its path as the runtime knows it."""
    below: str
    """What goes before any path that the runtime names: the host's root, or /proc/PID/root. Empty for ours."""
    proc: str
    """The /proc in which the runtime's process ids are valid. Empty: none that we have (kind)."""

    @property
    def path(self) -> str:
        return self.below + self.address


def sockets(root: Path = Path("/")) -> list[Place]:
    """Where CRI services may listen: what running shims, conmons and kubelets were told, then KNOWN_SOCKETS.

    A runtime inside a container (kind) is found through its shims' own root directory.
    """
    below = str(root).rstrip("/")
    places: dict[tuple[int, int] | str, Place] = {}
    for pid, address in _told(f"{below}/proc"):
        direct = Place(address, below, f"{below}/proc")
        seen = Place(address, f"{below}/proc/{pid}/root", "" if _in_a_container(f"{below}/proc/{pid}") else direct.proc)
        inode = _inode(seen.path)
        if inode is None or inode == _inode(direct.path):
            places.setdefault(_inode(direct.path) or direct.path, direct)
        else:
            places.setdefault(inode, seen)
    for address in KNOWN_SOCKETS:
        direct = Place(address, below, f"{below}/proc")
        inode = _inode(direct.path)
        if inode:
            places.setdefault(inode, direct)
    return list(places.values())


def _told(proc: str) -> Iterable[tuple[int, str]]:
    """(process, path of a CRI socket) by command lines, one process for each path and mount namespace."""
    found: dict[tuple[str, int], int] = {}
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        try:
            with open(f"{proc}/{entry}/cmdline", "rb", buffering=0) as file:
                words = file.read(1 << 16).decode(errors="replace").split("\0")
            address = _address(words)
            if address:
                found.setdefault((address, os.stat(f"{proc}/{entry}/ns/mnt").st_ino), int(entry))
        except OSError:  # gone, or not ours to read
            continue
    return [(pid, address) for (address, _), pid in found.items()]


def _address(words: Sequence[str]) -> str:
    """Path of the CRI socket that a command line tells, else empty."""
    program = os.path.basename(words[0])
    path = ""
    if program.startswith("containerd-shim") and _option(words, "-namespace") == "k8s.io":
        path = _option(words, "-address")
    elif program == "conmon":
        directory = _option(words, "--socket-dir-path")
        path = f"{directory}/crio.sock" if directory.endswith("/crio") else ""  # else it is podman's
    elif program == "kubelet":
        path = _option(words, "--container-runtime-endpoint")
    path = _settled(path.removeprefix("unix://"))
    return path if path.startswith("/") else ""


def _option(words: Sequence[str], name: str) -> str:
    """Value of -name VALUE or -name=VALUE."""
    for number, word in enumerate(words):
        if word == name:
            return words[number + 1] if number + 1 < len(words) else ""
        if word.startswith(name + "="):
            return word[len(name) + 1 :]
    return ""


def _settled(path: str) -> str:
    """/var/run is a link to /run everywhere, and below another root it would lead out of it."""
    return path.removeprefix("/var") if path.startswith("/var/run/") else path


def _inode(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _in_a_container(process: str) -> bool:
    """Whether a process has a number of its own in a process namespace below that of this /proc."""
    try:
        with open(f"{process}/status", encoding="utf-8", errors="replace") as file:
            numbers = next((line for line in file if line.startswith("NSpid:")), "")
    except OSError:
        return False
    return len(numbers.split()) > 2


# ---- one runtime ----------------------------------------------------------------------------------


class _Status(NamedTuple):
    """What PodSandboxStatus adds."""

    pid: int = 0
    netns_path: str = ""
    netns: int = 0
    host_network: bool | None = None
    addresses: tuple[str, ...] = ()


class _Sick(NamedTuple):
    """A pod whose status was not to be had."""

    problem: str
    pause_s: float
    retry_at_s: float


class _Namespace(msgspec.Struct):
    type: str = ""
    path: str = ""


class _Linux(msgspec.Struct):
    namespaces: list[_Namespace] | None = None


class _RuntimeSpec(msgspec.Struct):
    linux: _Linux | None = None


class _Info(msgspec.Struct, rename="camel"):
    """The JSON under "info" of a verbose status; containerd and CRI-O agree as far as this goes."""

    pid: int = 0
    runtime_spec: _RuntimeSpec | None = None

    def netns_path(self) -> str:
        linux = self.runtime_spec.linux if self.runtime_spec else None
        namespaces = (linux.namespaces if linux else None) or []
        return next((_settled(namespace.path) for namespace in namespaces if namespace.type == "network"), "")


_info = msgspec.json.Decoder(_Info)


class _Endpoint:
    """A CRI socket, and what it said of each sandbox that still is."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.without_cri = False
        self._service = _SERVICES[0]
        self._pods: dict[str, Pod] = {}
        self._statuses: dict[str, _Status] = {}
        self._sick: dict[str, _Sick] = {}

    def listing(self, deadline_s: float) -> Listing:
        try:
            channel = _Channel(self.place.path, deadline_s)
        except OSError as error:
            words = {
                FileNotFoundError: "the container runtime is stopped: there is no socket",
                ConnectionRefusedError: "the container runtime is stopped: nobody listens",
                TimeoutError: _LATE,
            }.get(type(error), f"cannot connect: {error.strerror or error}")
            return Listing((), (f"{self.place.path}: {words}",))
        with closing(channel):
            return self._ask(channel)

    def _ask(self, channel: _Channel) -> Listing:
        try:
            version, sandboxes, containers = self._lists(channel)
        except _Unusable as problem:
            self.without_cri = problem.code == _UNIMPLEMENTED
            words = "the CRI is switched off there" if self.without_cri else f"cannot list the pods: {problem}"
            return Listing((), (f"{self.place.path}: {words}",))
        self.without_cri = False
        name, number = version.text(2), version.text(3)
        reasons: list[str] = []
        running = self._running(containers, reasons)
        pods: dict[str, Pod] = {}
        complete = True
        for part in sandboxes.parts(1):
            try:
                item = _Message(part)
                sandbox, ready = item.text(1), item.number(3) == 0
                pod = self._pods.get(sandbox) or _pod(item)
            except _Unusable as problem:
                complete = False
                reasons.append(f"{self.place.path}: a pod cannot be read: {problem}")
                continue
            pods[sandbox] = pod._replace(
                ready=ready, runtime=name, runtime_version=number, containers=running.get(sandbox, {})
            )
        self._pods = pods
        self._look(channel, pods)
        for known in (self._statuses, self._sick):
            for gone in known.keys() - pods.keys():
                del known[gone]
        reasons += self._sick_words(pods)
        return Listing(
            tuple(self._with_status(pod) for pod in pods.values()),
            tuple(reasons),
            complete=complete,
            runtimes=(" ".join(word for word in (name, number, "at", self.place.path) if word),),
        )

    def _lists(self, channel: _Channel) -> tuple[_Message, _Message, _Answer]:
        """Version, sandboxes, and containers if they can be had. Raises _Unusable."""
        try:
            return self._lists_of(self._service, channel)
        except _Unusable as problem:
            if problem.code != _UNIMPLEMENTED:
                raise
        other = next(service for service in _SERVICES if service != self._service)
        lists = self._lists_of(other, channel)
        self._service = other
        return lists

    @staticmethod
    def _lists_of(service: str, channel: _Channel) -> tuple[_Message, _Message, _Answer]:
        requests = [("Version", b""), ("ListPodSandbox", b""), ("ListContainers", _RUNNING)]
        version, sandboxes, containers = channel.ask(service, requests)
        pods = sandboxes.message()
        try:
            return version.message(), pods, containers
        except _Unusable:  # it has pods, so it may be nameless
            return _EMPTY, pods, containers

    def _running(self, answer: _Answer, reasons: list[str]) -> dict[str, dict[str, str]]:
        """Names of containers by id, by sandbox."""
        running: dict[str, dict[str, str]] = {}
        try:
            for item in answer.message().parts(1):
                container = _Message(item)
                running.setdefault(container.text(2), {})[container.text(1)] = container.message(3).text(1)
        except _Unusable as problem:
            reasons.append(f"{self.place.path}: cannot list the containers of the pods: {problem}")
        return running

    def _look(self, channel: _Channel, pods: Mapping[str, Pod]) -> None:
        """Ask for the status of those that are new. One that has ended has no process and no namespace to tell."""
        now_s = time.monotonic()
        asked = [
            pod.sandbox
            for pod in pods.values()
            if pod.ready
            and pod.sandbox not in self._statuses
            and (pod.sandbox not in self._sick or self._sick[pod.sandbox].retry_at_s <= now_s)
        ]
        requests = [("PodSandboxStatus", _string(1, sandbox) + b"\x10\x01") for sandbox in asked]  # verbose
        for sandbox, answer in zip(asked, channel.ask(self._service, requests), strict=True):
            try:
                self._statuses[sandbox] = self._status(answer.message())
                self._sick.pop(sandbox, None)
            except _Unusable as problem:
                if problem.code == _NOT_FOUND:  # removed since it was listed
                    continue
                before = self._sick.get(sandbox)
                pause_s = min(2 * before.pause_s, RETRY_S[1]) if before else RETRY_S[0]
                self._sick[sandbox] = _Sick(str(problem), pause_s, time.monotonic() + pause_s)

    def _status(self, answer: _Message) -> _Status:
        status = answer.message(1)
        network = status.message(5)
        addresses = [network.text(1), *(_Message(more).text(1) for more in network.parts(2))]
        try:
            info = _info.decode(answer.pairs(2).get("info", "{}"))
        except msgspec.MsgspecError:
            info = _Info()
        pid = info.pid if self.place.proc else 0
        host_network = None
        if status.parts(6):
            host_network = status.message(6).message(1).message(2).number(1) == _NETWORK_OF_NODE
        candidates = [self.place.below + info.netns_path()] if info.netns_path() else []
        if pid:
            candidates.append(f"{self.place.proc}/{pid}/ns/net")
        path, netns = next(((path, inode) for path in candidates if (inode := _netns(path))), ("", 0))
        return _Status(pid, path, netns, host_network, tuple(filter(None, addresses)))

    def _with_status(self, pod: Pod) -> Pod:
        status = self._statuses.get(pod.sandbox)
        if status is None:
            return pod
        if not pod.ready:  # Its process has ended. Its namespace may live on, or its inode be somebody else's by now.
            status = status._replace(pid=0)
            if status.netns and _netns(status.netns_path) != status.netns:
                status = status._replace(netns_path="", netns=0)
        return pod._replace(**status._asdict())

    def _sick_words(self, pods: Mapping[str, Pod]) -> list[str]:
        words = [
            f"no status of pod {pods[sandbox].namespace}/{pods[sandbox].name} from {self.place.path}: {sick.problem}"
            for sandbox, sick in islice(self._sick.items(), SICK_NAMED)
        ]
        more = len(self._sick) - len(words)
        return [*words, f"no status of {more} more pods from {self.place.path}"] if more else words


def _pod(item: _Message) -> Pod:
    """What stays the same of a PodSandbox as long as it exists. Raises _Unusable."""
    metadata = item.message(2)
    return Pod(
        uid=metadata.text(2),
        name=metadata.text(1),
        namespace=metadata.text(3),
        labels=item.pairs(5),
        annotations=item.pairs(6),
        sandbox=item.text(1),
        ready=False,
        created_ns=item.number(4),
        runtime="",
        runtime_version="",
        containers={},
    )


def _netns(path: str) -> int:
    """Inode of the network namespace at a path. 0 where there is none: a mount that did not reach us is a mere file."""
    try:
        stat = os.stat(path)
        return stat.st_ino if stat.st_dev == os.stat("/proc/self/ns/net").st_dev else 0
    except (OSError, ValueError):  # ValueError: a null character
        return 0


# ---- gRPC and protobuf ----------------------------------------------------------------------------


class _Unusable(Exception):
    """No answer, an error, or not what was agreed on; the text says which."""

    def __init__(self, text: str, code: int = -1) -> None:
        super().__init__(text)
        self.code = code


class _Message:
    """A protobuf message by field numbers. Raises _Unusable where it is none. What is missing is empty or 0."""

    def __init__(self, data: bytes) -> None:
        self._numbers: dict[int, int] = {}
        self._parts: dict[int, list[bytes]] = {}
        at, end = 0, len(data)
        while at < end:
            key, at = _varint(data, at)
            field, kind = key >> 3, key & 7
            if kind == 2:
                length, at = _varint(data, at)
                self._parts.setdefault(field, []).append(data[at : at + length])
                at += length
            elif kind == 0:
                self._numbers[field], at = _varint(data, at)
            elif kind in {1, 5}:  # fixed numbers: none of ours, but later versions may have some
                at += 8 if kind == 1 else 4
            else:
                raise _Unusable("garbled message")
        if at > end:
            raise _Unusable("message cut short")

    def number(self, field: int) -> int:
        return self._numbers.get(field, 0)

    def parts(self, field: int) -> list[bytes]:
        return self._parts.get(field, [])

    def text(self, field: int) -> str:
        parts = self._parts.get(field)
        return parts[-1].decode(errors="replace") if parts else ""

    def message(self, field: int) -> _Message:
        parts = self._parts.get(field)
        return _Message(parts[-1]) if parts else _EMPTY

    def pairs(self, field: int) -> dict[str, str]:
        """A map<string, string>."""
        entries = [_Message(part) for part in self.parts(field)]
        return {entry.text(1): entry.text(2) for entry in entries}


_EMPTY = _Message(b"")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where the next begins)."""
    if at < len(data) and data[at] < 128:  # nearly all of them
        return data[at], at + 1
    value = shift = 0
    for position in range(at, min(at + 10, len(data))):
        byte = data[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        shift += 7
    raise _Unusable("garbled message")


def _string(field: int, text: str) -> bytes:
    """A field of a request. Its length has to fit one byte or two."""
    data = text.encode()
    length = bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, len(data) >> 7])
    return bytes([field << 3 | 2]) + length + data


class _Answer:
    """What has come in on one stream."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.data = bytearray()
        self.problem = ""

    def message(self) -> _Message:
        """Raises _Unusable, with gRPC's status code if there is one."""
        if self.problem:
            raise _Unusable(self.problem)
        http = self.headers.get(b":status", b"").decode(errors="replace")
        status = self.headers.get(b"grpc-status", b"").decode(errors="replace")
        if http != "200" or not status.isdecimal() or len(status) > 9:
            raise _Unusable(f"the answer is not gRPC (HTTP {http or 'without a status'})")
        code = int(status)
        if code == _DEADLINE_EXCEEDED:
            raise _Unusable(_LATE, code)
        if code:
            text = unquote(self.headers.get(b"grpc-message", b"").decode(errors="replace"))
            raise _Unusable(text or f"gRPC status {code}", code)
        length = int.from_bytes(self.data[1:5], "big")
        if len(self.data) < 5 + length or self.data[:1] != b"\0":  # 1 would be a compressed one, which we did not offer
            raise _Unusable("the answer was cut short")
        return _Message(bytes(self.data[5 : 5 + length]))


_SETTINGS = b"\x04"  # type of the frame with which a server begins, RFC 9113 3.4
_LATE = f"no answer within {TIME_LIMIT_S} s"


class _Channel:
    """One HTTP/2 connection, for as long as one listing takes."""

    def __init__(self, path: str, deadline_s: float) -> None:
        """Raises OSError where nobody listens."""
        # Imported where it is used: a node without a runtime does not pay for it.
        from h2.config import H2Configuration
        from h2.connection import H2Connection
        from h2.settings import SettingCodes, Settings

        self._deadline_s = deadline_s
        self._broken = ""
        self._greeted = False
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        window = {SettingCodes.ENABLE_PUSH: 0, SettingCodes.INITIAL_WINDOW_SIZE: _WINDOW_BYTES}
        self._h2.local_settings = Settings(client=True, initial_values=window)
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_WINDOW_BYTES)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(self._left_s())
            _connect(self._socket, path)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        """What is still unanswered is thereby cancelled."""
        self._socket.close()

    def ask(self, service: str, requests: Sequence[tuple[str, bytes]]) -> list[_Answer]:
        """All (method, message) at once. Comes back with all answers, or at the deadline with those that came."""
        from h2.exceptions import H2Error, ProtocolError

        answers = [_Answer() for _ in requests]
        unsent = deque(zip(answers, requests, strict=True))
        under_way: dict[int, _Answer] = {}
        try:
            while not self._broken and (unsent or under_way):
                while unsent and len(under_way) < min(_UNDER_WAY, self._h2.remote_settings.max_concurrent_streams):
                    answer, (method, message) = unsent[0]
                    under_way[self._send(service, method, message)] = answer
                    unsent.popleft()
                self._socket.settimeout(self._left_s())
                self._socket.sendall(self._h2.data_to_send())
                data = self._socket.recv(1 << 18)
                if not data:
                    self._broken = "the connection was closed before the answer"
                elif not self._greeted and data[3:4] not in {b"", _SETTINGS}:
                    raise ProtocolError  # said at once: h2 would wait for the rest of a frame that never was one
                self._greeted = True
                for event in self._h2.receive_data(data):
                    self._take(event, under_way)
        except TimeoutError:
            self._broken = _LATE
        except OSError as error:
            self._broken = f"the connection broke: {error.strerror or error}"
        except H2Error as error:
            self._broken = f"what listens there does not speak gRPC ({type(error).__name__})"
        for answer in [*under_way.values(), *(answer for answer, _ in unsent)]:
            answer.problem = self._broken
        return answers

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def _send(self, service: str, method: str, message: bytes) -> int:
        stream: int = self._h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{service}/{method}"),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("grpc-timeout", f"{max(1, int(1000 * self._left_s()))}m"),
        ]
        self._h2.send_headers(stream, headers)
        self._h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        return stream

    def _take(self, event: Event, under_way: dict[int, _Answer]) -> None:
        from h2 import events

        if isinstance(event, events.ConnectionTerminated):
            self._broken = "the runtime ended the connection"
            return
        answer = under_way.get(getattr(event, "stream_id", None) or 0)
        if answer is None:
            return
        if isinstance(event, (events.ResponseReceived, events.TrailersReceived)):
            answer.headers.update(event.headers)
        elif isinstance(event, events.DataReceived):
            answer.data += event.data
            if len(answer.data) > MAX_ANSWER_BYTES:
                self._broken = f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB"
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, (events.StreamEnded, events.StreamReset)):
            if isinstance(event, events.StreamReset):
                answer.problem = "the runtime broke off"
            del under_way[event.stream_id]


def _connect(connection: socket.socket, path: str) -> None:
    """Connect to a path of any length. Raises OSError."""
    if len(os.fsencode(path)) < _SUN_PATH_BYTES:
        connection.connect(path)
        return
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
