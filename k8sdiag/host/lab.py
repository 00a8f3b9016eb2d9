"""The laboratory: network namespaces as pods on one "node", with faults injected by name.

    with Lab(prefix="demo") as lab:
        expected = lab.inject("nft-forward", count=23)

Every pod is what k8sdiag finds on a real node: a network namespace behind a veth, a process in a cgroup
with kubelet's path, and kubelet's log directory. Every fault returns what was done (`count`, known by
construction) beside what an independent kernel counter says of it (`counter`): the two must agree, and
whatever k8sdiag reports can be compared with both.

Only the standard library and the programs ip, nft, iptables, tc, nsenter, unshare and sleep are used; root is
needed. All traffic stays inside the namespaces made here. `down()` removes everything, also what a killed
earlier run with the same prefix left behind, except /run/netns itself, which iproute2 keeps mounted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Literal, TypeVar, cast

from k8sdiag.errors import K8sdiagError

STATE_DIR = Path("/run/k8sdiag-lab")
LOG_ROOT = Path("/var/log/pods")
# Left in STATE_DIR when a lab made /var/log/pods, so that the last lab of several removes it.
LOG_ROOT_MARK = STATE_DIR / "made-var-log-pods"
# In the environment of every process the lab starts: they are found again by it, never by a recyclable pid.
PROCESS_MARK = "K8SDIAG_LAB"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

CLONE_NEWNET = 0x40000000
# <asm-generic/socket.h>, <linux/in.h>, <linux/in6.h>, <linux/udp.h>: what the socket module does not name.
SO_RCVBUFFORCE, SO_MEMINFO, SO_NETNS_COOKIE = 33, 55, 71
SK_MEMINFO_DROPS = 8
SOL_IPV6, SOL_UDP = 41, 17
IP_TRANSPARENT, IPV6_TRANSPARENT, IPV6_HDRINCL = 19, 75, 36
UDP_SEGMENT = 103

# Addresses without a way back inside the lab (RFC 2544, RFC 5180: benchmarking). Floods draw their random
# sources from here, and each pod has a blackhole route for them: else each ICMP answer would be a drop too.
RANDOM_SOURCE_V4, RANDOM_SOURCE_V6 = "198.18.0.0/15", "2001:2::/48"
SPOOFED_SOURCE = "192.0.2.66"  # TEST-NET-1
UNROUTED = "203.0.113.7"  # TEST-NET-3: the node has no route to it

Kind = Literal["pod", "container", "netns"]
Driver = Literal["cgroupfs", "systemd"]
T = TypeVar("T")


class LabError(K8sdiagError):
    """The laboratory cannot be built or used: what happened, why, and what to do."""


# ----------------------------------------------------------------------------------------------------
# What a lab is made of


@dataclass(frozen=True)
class PodSpec:
    """One namespace to build.

    `kind` "pod" looks like kubelet's, "container" like docker's, "netns" is a bare named network namespace:
    no process, no cgroup, no logs.
    """

    namespace: str = ""
    name: str = ""
    kind: Kind = "pod"
    driver: Driver = "cgroupfs"
    qos: Literal["guaranteed", "burstable", "besteffort"] = "besteffort"
    container: str = "app"
    cgroup_prefix: str = ""
    """Path put in front of the cgroup path, such as "/kind/node1" (nested kubelets)."""
    named: bool = True
    """False: nothing under /run/netns; only the pod's process holds the network namespace."""
    uid: str = ""
    """Pod uid; "" draws one. A static pod's is 32 hex digits without dashes."""


DEFAULT_PODS = (
    PodSpec("shop", "cart-7d9f8c6b5-x2x4q"),
    PodSpec("shop", "web-5c4d7b9f66-8kq2v", driver="systemd"),
    PodSpec("payments", "ledger-0", qos="guaranteed"),
    PodSpec("payments", "gateway-6b8d5f7c9-pm4zt", driver="systemd", qos="burstable", named=False),
    PodSpec("kube-system", "coredns-76f75df574-h7wqn", qos="burstable"),
    PodSpec("kube-system", "node-exporter-tz9gk", driver="systemd", named=False),
)


@dataclass(frozen=True)
class Tally:
    """What the sending side saw. Unit: packets for UDP, connections for TCP."""

    sent: int = 0
    """Handed to the kernel, including the refused ones."""
    refused: int = 0
    """UDP: the send call failed (EPERM from an OUTPUT rule, ENOBUFS …). TCP: refused, reset or unreachable."""
    timed_out: int = 0
    """TCP: no answer within the timeout."""
    connected: int = 0


@dataclass(frozen=True)
class Expected:
    """What one injected fault did, and how k8sdiag should name it."""

    fault: str
    cause: str | None
    """Slug of the cause catalogue; None for benign noise, which is no fault."""
    owner: str
    """namespace/name of the pod, short container id, or netns name that the drops belong to; "" for none."""
    count: int
    """Packets dropped, known by construction: each packet sent met the fault, or sent minus received."""
    counter: int
    """The same, read from a kernel counter that has nothing to do with kfree_skb."""
    counter_name: str
    reason: str | None
    """Drop reason of skb:kfree_skb, as on 6.18."""
    hook: str | None = None
    """Netfilter hook, where it was netfilter."""
    family: Literal[4, 6] = 4
    netns: int = 0
    """Inode of the network namespace in which the packets died."""
    device: str | None = None
    """The device they were on (skb->dev); None on the way out, before there is one."""


# ----------------------------------------------------------------------------------------------------
# Entering a namespace


_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def _thread_in(netns: str) -> Iterator[None]:
    """This thread in that namespace, then back: a thread outlives its join() in the kernel for a moment."""
    with open("/proc/thread-self/ns/net", "rb") as home, open(netns, "rb") as away:
        _setns(away.fileno())
        try:
            yield
        finally:
            _setns(home.fileno())


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def inside(netns: str, act: Callable[[], T]) -> T:
    """Run `act` in the network namespace at path `netns`, in a thread of its own: only that thread moves.

    Sockets opened by `act` stay in that namespace; /proc/sys/net and /proc/thread-self/net belong to it.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def enter_and_act() -> None:
        try:
            with _thread_in(netns):
                results.append(act())
        except BaseException as failure:  # noqa: BLE001 -- raised again in the caller, below
            failures.append(failure)

    thread = threading.Thread(target=enter_and_act, name="lab-netns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


# Joins the cgroups named before "--" and becomes the rest, so that the process never ran outside of them.
_JOIN_AND_EXEC = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 125; shift; done; shift; exec "$@"'


class Netns:
    """One network namespace of the lab: run things in it, send from it, read its counters."""

    def __init__(self, prefix: str, name: str, path: str, cgroups: Sequence[str] = ()) -> None:
        self.prefix = prefix
        self.name = name
        self.path = path
        """Path that opens the namespace: /run/netns/NAME, or /proc/PID/ns/net."""
        self.cgroups = tuple(cgroups)
        """Directories of the cgroup, one per hierarchy; empty: the caller's own cgroups."""

    # -- running -------------------------------------------------------------------------------------

    def command(self, argv: Sequence[str], *, unshare: bool = False) -> list[str]:
        """The command line that runs `argv` here, in the cgroups too; `unshare` makes a new namespace."""
        enter = ["unshare", "--net"] if unshare else ["nsenter", f"--net={self.path}"]
        procs = [f"{cgroup}/cgroup.procs" for cgroup in self.cgroups]
        return [*enter, "--", "sh", "-c", _JOIN_AND_EXEC, "sh", *procs, "--", *argv]

    def environment(self) -> dict[str, str]:
        paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, PROCESS_MARK: self.prefix, "PYTHONPATH": os.pathsep.join(paths)}

    def run(
        self, argv: Sequence[str], *, stdin: str = "", check: bool = True, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end, as the pod would: in its network namespace and cgroup."""
        return _run(self.command(argv), stdin=stdin, check=check, timeout_s=timeout_s, env=self.environment())

    def start(self, argv: Sequence[str], *, unshare: bool = False) -> subprocess.Popen[str]:
        """Start a command here, in a session of its own, with pipes for stdin, stdout and stderr."""
        return subprocess.Popen(
            self.command(argv, unshare=unshare),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(),
            start_new_session=True,
            text=True,
        )

    def ip(self, *lines: str) -> None:
        """Configure by `ip -batch`: all the lines in one process."""
        _run(
            ["nsenter", f"--net={self.path}", "--", "ip", "-batch", "-"],
            stdin="".join(f"{line}\n" for line in lines),
            env=self.environment(),
        )

    def sysctl(self, name: str, value: int | str | None = None) -> str:
        """Read a sysctl of this namespace, after writing `value` if given. A "/" stands for a literal dot."""
        path = Path("/proc/sys", *(part.replace("/", ".") for part in name.split(".")))

        def access() -> str:
            if value is not None:
                path.write_text(str(value))
            return path.read_text().strip()

        return inside(self.path, access)

    # -- identity ------------------------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """The name k8sdiag should give to what belongs to this namespace."""
        return self.name

    @property
    def inode(self) -> int:
        """Inode of the network namespace, as in /proc/PID/ns/net. The kernel reuses it after the end."""
        return os.stat(self.path).st_ino

    @property
    def cookie(self) -> int:
        """SO_NETNS_COOKIE: names this namespace and no later one."""

        def ask() -> int:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                raw = probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
            return int.from_bytes(raw, sys.byteorder)

        return inside(self.path, ask)

    # -- counters the kernel keeps by itself ---------------------------------------------------------

    def snmp(self) -> dict[str, int]:
        """Counters of /proc/net/{snmp,netstat,snmp6} by nstat's names: "UdpNoPorts", "TcpExtListenDrops" …"""

        def read() -> list[str]:
            here = Path("/proc/thread-self/net")
            return [
                (here / name).read_text() if (here / name).exists() else "" for name in ("snmp", "netstat", "snmp6")
            ]

        snmp, netstat, snmp6 = inside(self.path, read)
        counters: dict[str, int] = {}
        lines = (snmp + netstat).splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            group, *fields = names.split()
            counters.update(
                (group.rstrip(":") + name, int(value)) for name, value in zip(fields, values.split()[1:], strict=True)
            )
        for line in snmp6.splitlines():
            name, value = line.split()
            counters[name] = int(value)
        return counters

    def udp_no_ports(self, family: int = 4) -> int:
        """UDP datagrams that found no socket: UdpNoPorts or Udp6NoPorts."""
        return self.snmp()["UdpNoPorts" if family == 4 else "Udp6NoPorts"]

    def nft_counter(self, family: str, table: str) -> int:
        """Packets counted by all the rules of one nft table."""
        listing = json.loads(self.tool(["nft", "-j", "list", "table", family, table]))
        rules = [entry["rule"] for entry in listing["nftables"] if "rule" in entry]
        return sum(int(part["counter"]["packets"]) for rule in rules for part in rule["expr"] if "counter" in part)

    def iptables_counter(self, binary: str, table: str, chain: str, port: int) -> int:
        """Packets counted by the DROP rules for a destination port in one chain."""
        listing = self.tool([binary, "-w", "-t", table, "-nvxL", chain])
        rules = (line.split() for line in listing.splitlines()[2:])
        return sum(int(rule[0]) for rule in rules if "DROP" in rule and f"dpt:{port}" in rule)

    def qdisc_dropped(self, device: str, kind: str) -> int:
        """Packets dropped by the device's qdiscs of one kind ("tbf", "clsact"): `tc -s qdisc`."""
        listing = self.tool(["tc", "-s", "qdisc", "show", "dev", device])
        drops = re.findall(r"^qdisc (\S+) .*\n.*\(dropped (\d+),", listing, re.MULTILINE)
        return sum(int(dropped) for name, dropped in drops if name == kind)

    def device_rx_dropped(self, device: str) -> int:
        """RX "drop" of /proc/net/dev: on a veth, packets that met a full CPU backlog (or no protocol)."""

        def read() -> str:
            return Path("/proc/thread-self/net/dev").read_text()

        found = re.search(rf"^\s*{re.escape(device)}:(.*)$", inside(self.path, read), re.MULTILINE)
        if found is None:
            raise LabError(f"no device {device} in {self.name}. `lab status` shows what the lab has.")
        return int(found.group(1).split()[3])

    def tool(self, argv: Sequence[str]) -> str:
        return _run(["nsenter", f"--net={self.path}", "--", *argv], env=self.environment()).stdout

    # -- traffic, sent by a process of its own in this namespace -------------------------------------

    def udp(
        self,
        dst: str,
        port: int,
        count: int,
        *,
        size: int = 32,
        sport: int | None = None,
        source: str | None = None,
    ) -> Tally:
        """Send `count` UDP datagrams, slowly enough that no queue on the way overflows by itself.

        `source`: another address to send from, also one that is not ours (IP_TRANSPARENT).
        """
        return self.send_by("udp", dst=dst, port=port, count=count, size=size, sport=sport, source=source)

    def udp_bursts(self, dst: str, port: int, bursts: Sequence[int], *, size: int = 64) -> Tally:
        """Send UDP segmentation-offload bursts: each a single buffer of that many datagrams (at most 64)."""
        return self.send_by("bursts", dst=dst, port=port, bursts=list(bursts), size=size)

    def tcp_connect(self, dst: str, port: int, count: int, timeout_s: float = 0.7) -> Tally:
        """Open `count` TCP connections at once, wait for their fate, close them.

        Under one second a lost SYN is not sent again, so it is one packet per connection.
        """
        return self.send_by("tcp", dst=dst, port=port, count=count, timeout_s=timeout_s)

    def flood_udp(
        self,
        dst: str,
        port: int,
        count: int,
        *,
        processes: int = 2,
        random_source: bool = False,
        size: int = 32,
    ) -> Tally:
        """Send `count` datagrams in all, as fast as `processes` processes can: it loads the machine.

        `random_source`: source addresses and ports are random (RANDOM_SOURCE_V4/_V6, ports from 32768 up, so
        none looks like a late DNS answer). Aim it at an address of this very namespace, or build the lab with
        conntrack=False: through a tracking node it would fill the conntrack table, which is another fault.
        """
        shares = [count // processes + (1 if i < count % processes else 0) for i in range(processes)]
        children = [
            self.child("flood", dst=dst, port=port, count=share, random_source=random_source, size=size)
            for share in shares
        ]
        tallies = [Tally(**child.result()) for child in children]
        return Tally(sent=sum(t.sent for t in tallies), refused=sum(t.refused for t in tallies))

    @contextlib.contextmanager
    def sink(self, port: int) -> Iterator[Sink]:
        """A UDP socket, IPv4 and IPv6, that reads everything: `sink.received()` datagrams so far."""
        with self.child("sink", port=port) as child:
            yield Sink(child)

    def send_by(self, act: str, **arguments: Any) -> Tally:
        return Tally(**self.child(act, **arguments).result())

    def child(self, act: str, **arguments: Any) -> _Child:
        argv = [sys.executable, "-S", "-m", "k8sdiag.host.lab", "_act", act, json.dumps(arguments)]
        return _Child(self.start(argv), act, self.name)


class _Child:
    """A traffic process (see `_ACTS`): answers each line with a JSON line and ends when stdin ends."""

    def __init__(self, process: subprocess.Popen[str], act: str, where: str) -> None:
        self.process = process
        self._questions = cast("IO[str]", process.stdin)
        self._answers = cast("IO[str]", process.stdout)
        self._complaints = cast("IO[str]", process.stderr)
        self.act = f"{act} in {where}"

    def ask(self, question: str = "") -> Any:
        with contextlib.suppress(BrokenPipeError):  # then the answer is missing, reported below
            self._questions.write(question + "\n")
            self._questions.flush()
        return self.answer()

    def answer(self, timeout_s: float = 120) -> Any:
        readable, _, _ = select.select([self._answers], [], [], timeout_s)
        line = self._answers.readline() if readable else ""
        if not line:
            self.process.kill()
            said = self._complaints.read().strip() or "it said nothing"
            raise LabError(f"the lab's traffic process ({self.act}) ended without an answer: {said}")
        return json.loads(line)

    def result(self) -> Any:
        """The one answer of a child that sends and ends."""
        with self:
            return self.answer()

    def close(self) -> None:
        for pipe in (self._questions, self._answers, self._complaints):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sink:
    """A reading UDP socket in some namespace."""

    def __init__(self, child: _Child) -> None:
        self._process = child
        child.answer()  # bound

    def received(self) -> int:
        """Datagrams read so far."""
        return int(self._process.ask())


class Pod(Netns):
    """A pod, container or bare namespace of the lab, behind its veth."""

    def __init__(self, lab: Lab, number: int, spec: PodSpec, container_id: str, pid: int = 0) -> None:
        name = f"{lab.prefix}-{number}"
        super().__init__(lab.prefix, name, f"/run/netns/{name}")
        self.number = number
        self.spec = spec
        self.container_id = container_id
        self.pid = pid
        """The long-lived ("pause") process; 0 for kind "netns"."""
        if not spec.named:
            self.path = f"/proc/{pid}/ns/net"
        self.cgroup_path = _cgroup_path(spec, container_id)
        """Path of the cgroup inside its hierarchy, as in /proc/PID/cgroup; "" for kind "netns"."""
        if self.cgroup_path:
            self.cgroups = tuple(f"{mount}{self.cgroup_path}" for mount in _cgroup_mounts())
        self.veth = f"veth{number}"
        """The node's end; the pod's end is eth0."""
        subnet, host = (0, number + 1) if lab.bridge else (number, 2)
        self.ipv4 = f"10.{lab.subnet}.{subnet}.{host}"
        self.ipv6 = f"fd6b:3864:{lab.subnet:x}:{subnet:x}::{host:x}"
        self.gateway_ipv4 = f"10.{lab.subnet}.{subnet}.1"
        self.gateway_ipv6 = f"fd6b:3864:{lab.subnet:x}:{subnet:x}::1"
        self.mac = f"0a:58:0a:{lab.subnet:02x}:{number:02x}:02"
        self.gateway_mac = f"0a:58:0a:{lab.subnet:02x}:{0 if lab.bridge else number:02x}:01"

    @property
    def owner(self) -> str:
        if self.spec.kind == "pod":
            return f"{self.spec.namespace}/{self.spec.name}"
        return self.container_id[:12] if self.spec.kind == "container" else self.name

    @property
    def log_dir(self) -> Path | None:
        """Kubelet's directory for the pod's logs; outlives a pod, names it without any API."""
        if self.spec.kind != "pod":
            return None
        return LOG_ROOT / f"{self.spec.namespace}_{self.spec.name}_{self.spec.uid}"

    def udp_full(self, port: int) -> contextlib.AbstractContextManager[object]:
        """A UDP socket that nobody reads, its buffer already full; filling it cost exactly one drop."""
        child = self.child("full", port=port, address=self.ipv4)
        child.answer()
        return child


def _cgroup_path(spec: PodSpec, container_id: str) -> str:
    """The path a kubelet (or docker) with this cgroup driver gives to a container."""
    if spec.kind == "netns":
        return ""
    if spec.kind == "container":
        leaf = f"/system.slice/docker-{container_id}.scope" if spec.driver == "systemd" else f"/docker/{container_id}"
    elif spec.driver == "systemd":
        parents = ["kubepods"] if spec.qos == "guaranteed" else ["kubepods", f"kubepods-{spec.qos}"]
        parents.append(f"{parents[-1]}-pod{spec.uid.replace('-', '_')}")
        leaf = "".join(f"/{parent}.slice" for parent in parents) + f"/cri-containerd-{container_id}.scope"
    else:
        qos = "" if spec.qos == "guaranteed" else f"/{spec.qos}"
        leaf = f"/kubepods{qos}/pod{spec.uid}/{container_id}"
    return spec.cgroup_prefix.rstrip("/") + leaf


def _cgroup_mounts() -> list[str]:
    """Mount points of the hierarchies to use: v2, and of v1 those that carry no limits (systemd's, pids)."""
    mounts = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and {"name=systemd", "pids"} & set(options.split(","))):
            mounts.append(mount)
    return mounts


# ----------------------------------------------------------------------------------------------------
# The laboratory


class Lab:
    """Pods on one node namespace. A context manager: up on entry, down on exit, exception, SIGINT or SIGTERM.

    `prefix` names everything the lab makes (`<prefix>-node`, `<prefix>-1` …): labs with different prefixes
    live side by side, one with the same prefix replaces the other. Routed (the default): each pod has a /24
    and a /64 with its own gateway on the node's veth. `bridge`: all pods hang on cni0. `conntrack`: the node
    tracks connections, as every node with kube-proxy does.
    """

    def __init__(
        self,
        prefix: str = "k8d",
        *,
        bridge: bool = False,
        pods: Sequence[PodSpec] = DEFAULT_PODS,
        ipv6: bool = True,
        conntrack: bool = True,
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]{0,20}", prefix):
            raise LabError(f"{prefix!r} is no lab prefix. Use a lower-case word of at most 21 letters and digits.")
        if not 1 <= len(pods) <= 200:
            raise LabError(f"a lab holds 1 to 200 pods, not {len(pods)}. Pass fewer PodSpecs.")
        self.prefix = prefix
        self.bridge = bridge
        self.ipv6 = ipv6
        self.conntrack = conntrack
        self.subnet = 0
        self.node = Netns(prefix, f"{prefix}-node", f"/run/netns/{prefix}-node")
        self.pods: list[Pod] = []
        self._specs = tuple(_with_uid(spec) for spec in pods)
        self._processes: list[subprocess.Popen[str]] = []
        self._sysctls: dict[str, str] = {}
        self._old_sigterm: Any = None

    # -- life ----------------------------------------------------------------------------------------

    def up(self) -> Lab:
        """Build everything; what stands half built is removed again when something fails."""
        _require_root_and_tools()
        self.down()
        try:
            self._plan()
            self._build()
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """Remove everything this prefix ever made, also after a kill -9; nothing there is no error."""
        state = _read_state(self.prefix) or {"sysctls": {}, "cgroups": [], "logs": [], "netns": []}
        for name, value in state["sysctls"].items():
            Path("/proc/sys", *name.split(".")).write_text(value)
        _kill_marked(self.prefix)
        for process in self._processes:
            process.communicate()
        self._processes.clear()
        made_here = re.compile(rf"{self.prefix}-(node|\d+)")
        present = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
        for name in filter(made_here.fullmatch, present):
            _run(["ip", "netns", "delete", name])
        with _shared_directories():
            for cgroup in state["cgroups"]:
                _remove_cgroup(Path(cgroup))
            for log_dir in state["logs"]:
                shutil.rmtree(log_dir, ignore_errors=True)
            _state_file(self.prefix).unlink(missing_ok=True)
            if LOG_ROOT_MARK.exists() and not _remove_if_empty(LOG_ROOT):
                LOG_ROOT_MARK.unlink()
            _remove_if_empty(STATE_DIR)
        self.pods = []

    def __enter__(self) -> Lab:
        # A plain kill ends Python without unwinding: make it an exception, unless somebody else cares.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._old_sigterm = signal.signal(signal.SIGTERM, _exit_on_signal)
        try:
            return self.up()
        except BaseException:
            self._restore_sigterm()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.down()
        finally:
            self._restore_sigterm()

    def _restore_sigterm(self) -> None:
        if self._old_sigterm is not None:
            signal.signal(signal.SIGTERM, self._old_sigterm)
            self._old_sigterm = None

    @classmethod
    def attach(cls, prefix: str = "k8d") -> Lab:
        """The lab that an earlier `up` left standing; it stays when this object goes."""
        state = _read_state(prefix)
        if state is None or not state["ready"]:
            raise LabError(f"no lab {prefix!r} is up. Start one: scripts/lab --prefix {prefix} up")
        specs = [PodSpec(**pod["spec"]) for pod in state["pods"]]
        lab = cls(prefix, bridge=state["bridge"], pods=specs, ipv6=state["ipv6"], conntrack=state["conntrack"])
        lab.subnet = state["subnet"]
        lab.pods = [
            Pod(lab, number, spec, pod["container_id"], pod["pid"])
            for number, (spec, pod) in enumerate(zip(specs, state["pods"], strict=True), 1)
        ]
        for pod in lab.pods:
            if not os.path.exists(pod.path):
                raise LabError(
                    f"lab {prefix!r} is damaged: {pod.owner} has no namespace any more. "
                    f"Rebuild it: scripts/lab --prefix {prefix} up"
                )
        return lab

    # -- building ------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Decide every name first and write them down, so that `down` finds whatever a kill leaves behind."""
        specs = self._specs
        if os.path.isdir("/var/lib/kubelet/pods"):
            # A real kubelet kills what it does not know below its own cgroups: stay out of them.
            specs = tuple(dataclasses.replace(s, cgroup_prefix=s.cgroup_prefix or "/k8sdiag-lab") for s in specs)
        with _shared_directories():
            taken = {state["subnet"] for prefix in lab_prefixes() if (state := _read_state(prefix))}
            first = 64 + zlib.crc32(self.prefix.encode()) % 128
            self.subnet = next(n for n in (64 + (first - 64 + i) % 128 for i in range(129)) if n not in taken)
            self.pods = [Pod(self, number, spec, secrets.token_hex(32)) for number, spec in enumerate(specs, 1)]
            if any(pod.cgroup_path and not pod.cgroups for pod in self.pods):
                raise LabError("no cgroup hierarchy is mounted, so nothing can look like a pod. Mount cgroup2 first.")
            STATE_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._write_state(ready=False)

    def _write_state(self, *, ready: bool) -> None:
        state = {
            "prefix": self.prefix,
            "ready": ready,
            "bridge": self.bridge,
            "ipv6": self.ipv6,
            "conntrack": self.conntrack,
            "subnet": self.subnet,
            "pods": [
                {"spec": dataclasses.asdict(pod.spec), "container_id": pod.container_id, "pid": pod.pid}
                for pod in self.pods
            ],
            "cgroups": [cgroup for pod in self.pods for cgroup in pod.cgroups],
            "logs": [str(pod.log_dir) for pod in self.pods if pod.log_dir],
            "sysctls": self._sysctls,
        }
        draft = _state_file(self.prefix).with_suffix(".new")
        draft.write_text(json.dumps(state, indent=1))
        draft.rename(_state_file(self.prefix))

    def _build(self) -> None:
        for netns in [self.node, *(pod for pod in self.pods if pod.spec.named)]:
            _run(["ip", "netns", "add", netns.name])
        with _shared_directories():
            for pod in self.pods:
                self._make_cgroup_and_logs(pod)
        for pod in self.pods:
            if pod.spec.kind != "netns":
                self._start_pause(pod)
        self._write_state(ready=False)
        self._configure_node()
        for pod in self.pods:
            self._connect(pod)
        if self.bridge:
            self._open_bridge()
        if self.conntrack:
            _add_nft_rule(
                self.node,
                "inet",
                "k8sdiag_lab",
                "type filter hook forward priority 10;",
                "ct state new counter",
            )
        self._write_state(ready=True)

    def _make_cgroup_and_logs(self, pod: Pod) -> None:
        for cgroup in pod.cgroups:
            _make_cgroup(Path(cgroup))
        if pod.log_dir:
            if not LOG_ROOT.exists():
                LOG_ROOT_MARK.touch()
            container = pod.log_dir / pod.spec.container
            container.mkdir(parents=True, exist_ok=True)
            (container / "0.log").touch()

    def _start_pause(self, pod: Pod) -> None:
        process = pod.start(["sleep", "infinity"], unshare=not pod.spec.named)
        self._processes.append(process)
        pod.pid = process.pid
        if not pod.spec.named:
            pod.path = f"/proc/{pod.pid}/ns/net"
        # nsenter, then sh, then sleep: once it is sleep, namespace and cgroup are entered.
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pod.pid}/comm").read_text().strip() != "sleep":
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise LabError(
                    f"the process of {pod.owner} did not start in {pod.cgroup_path}: "
                    f"{process.communicate()[1].strip() or 'it said nothing'}. "
                    "Is the cgroup file system writable (in a container it often is not)?"
                )
            time.sleep(0.002)

    def _configure_node(self) -> None:
        _quiet_ipv6(self.node)
        self.node.sysctl("net.ipv4.conf.all.rp_filter", 0)
        self.node.sysctl("net.ipv4.conf.default.rp_filter", 0)
        self.node.sysctl("net.ipv4.ip_forward", 1)
        if self.ipv6:
            self.node.sysctl("net.ipv6.conf.all.forwarding", 1)
        self.node.ip("link set lo up")
        if self.bridge:
            self.node.ip("link add cni0 type bridge mcast_snooping 0")

    def _connect(self, pod: Pod) -> None:
        """Make veth, addresses, routes, and permanent neighbours: no ARP shall mix with the counts."""
        _quiet_ipv6(pod)
        pod.sysctl("net.ipv4.conf.all.rp_filter", 0)
        pod.sysctl("net.ipv4.conf.default.rp_filter", 0)
        where = pod.name if pod.spec.named else pod.pid
        node_mac = _port_mac(pod) if self.bridge else pod.gateway_mac
        pod_side = f"peer name eth0 address {pod.mac} netns {where}"
        node_end = [f"link add {pod.veth} address {node_mac} type veth {pod_side}"]
        if self.bridge:
            node_end += [f"link set {pod.veth} master cni0"]
        else:
            node_end += [f"addr add {pod.gateway_ipv4}/24 dev {pod.veth}"]
            node_end += [f"addr add {pod.gateway_ipv6}/64 dev {pod.veth} nodad"] if self.ipv6 else []
        node_end += [f"link set {pod.veth} up"]
        if not self.bridge:
            node_end += [
                f"neigh replace {a} lladdr {pod.mac} dev {pod.veth} nud permanent" for a in self._addresses(pod)
            ]
        self.node.ip(*node_end)
        pod_end = ["link set lo up", f"addr add {pod.ipv4}/24 dev eth0", "link set eth0 up"]
        pod_end += [
            f"neigh replace {pod.gateway_ipv4} lladdr {pod.gateway_mac} dev eth0 nud permanent",
            f"route add default via {pod.gateway_ipv4}",
            f"route add blackhole {RANDOM_SOURCE_V4}",
        ]
        if self.ipv6:
            pod_end += [
                f"addr add {pod.ipv6}/64 dev eth0 nodad",
                f"neigh replace {pod.gateway_ipv6} lladdr {pod.gateway_mac} dev eth0 nud permanent",
                f"route add default via {pod.gateway_ipv6}",
                f"route add blackhole {RANDOM_SOURCE_V6}",
            ]
        pod.ip(*pod_end)

    def _open_bridge(self) -> None:
        first = self.pods[0]
        lines = [f"link set cni0 address {first.gateway_mac}", f"addr add {first.gateway_ipv4}/24 dev cni0"]
        lines += [f"addr add {first.gateway_ipv6}/64 dev cni0 nodad"] if self.ipv6 else []
        lines += ["link set cni0 up"]
        for pod in self.pods:
            lines += [f"neigh replace {a} lladdr {pod.mac} dev cni0 nud permanent" for a in self._addresses(pod)]
        self.node.ip(*lines)
        for pod in self.pods:
            others = [other for other in self.pods if other is not pod]
            pod.ip(
                *(
                    f"neigh replace {a} lladdr {other.mac} dev eth0 nud permanent"
                    for other in others
                    for a in self._addresses(other)
                )
            )
        # Where each address is, told, not learnt: an unknown one is flooded, one copy (and drop) per port.
        fdb = "".join(f"fdb replace {pod.mac} dev {pod.veth} master static\n" for pod in self.pods)
        _run(["nsenter", f"--net={self.node.path}", "--", "bridge", "-batch", "-"], stdin=fdb)
        # Until the carrier is up, a port is "disabled" and swallows frames in silence.
        deadline = time.monotonic() + 5
        while True:
            ports = json.loads(self.node.tool(["ip", "-j", "-d", "link", "show", "master", "cni0"]))
            if all(port["linkinfo"]["info_slave_data"]["state"] == "forwarding" for port in ports):
                return
            if time.monotonic() > deadline:
                raise LabError("the ports of the bridge cni0 do not come up. `ip -d link` in the node shows why.")
            time.sleep(0.02)

    def _addresses(self, pod: Pod) -> list[str]:
        return [pod.ipv4, pod.ipv6] if self.ipv6 else [pod.ipv4]

    # -- use -----------------------------------------------------------------------------------------

    def pod(self, owner: str) -> Pod:
        """The pod whose owner name ("shop/cart-…"), name or namespace name this is."""
        found = [pod for pod in self.pods if owner in (pod.owner, pod.spec.name, pod.name)]
        if len(found) != 1:
            raise LabError(f"the lab has no pod {owner!r}. It has: {', '.join(pod.owner for pod in self.pods)}")
        return found[0]

    def gateway_device(self, pod: Pod) -> str:
        """The node's device that routes what the pod sends."""
        return "cni0" if self.bridge else pod.veth

    def inject(self, name: str, count: int = 23, owner: Pod | str | None = None) -> Expected:
        """Make the fault `name` drop `count` packets that belong to `owner` (the first pod by default)."""
        return _fault(name)(self, count, owner)

    @contextlib.contextmanager
    def host_sysctl(self, name: str, value: int) -> Iterator[None]:
        """Change a sysctl of the whole machine for a moment; `down` restores it after a kill."""
        path = Path("/proc/sys", *name.split("."))
        directory = os.open(STATE_DIR, os.O_RDONLY)
        try:
            # One lab at a time: else the second would take the first one's value for the machine's own.
            fcntl.flock(directory, fcntl.LOCK_EX)
            self._sysctls[name] = path.read_text().strip()
            self._write_state(ready=True)
            try:
                path.write_text(str(value))
                yield
            finally:
                path.write_text(self._sysctls.pop(name))
                self._write_state(ready=True)
        finally:
            os.close(directory)


def _add_nft_rule(netns: Netns, family: str, table: str, chain: str, rule: str) -> None:
    text = f"table {family} {table} {{\nchain c {{\n{chain}\n{rule}\n}}\n}}\n"
    netns.run(["nft", "-f", "-"], stdin=text)


def _with_uid(spec: PodSpec) -> PodSpec:
    if spec.kind == "netns" and not spec.named:
        raise LabError("a PodSpec of kind 'netns' has no process, so nothing would hold it: leave named=True.")
    if spec.kind == "pod" and not (spec.namespace and spec.name):
        raise LabError(f"{spec} needs namespace and name, such as PodSpec('shop', 'cart-7d9f8c6b5-x2x4q').")
    return spec if spec.uid else dataclasses.replace(spec, uid=str(uuid.uuid4()))


def _port_mac(pod: Pod) -> str:
    """A bridge port's own address, which must not be the bridge's."""
    return pod.mac[:-2] + "03"


def _quiet_ipv6(netns: Netns) -> None:
    """No duplicate detection, no router solicitation, multicast reports at once: nothing unasked later."""
    if not os.path.isdir("/proc/sys/net/ipv6"):
        return
    for name, value in {
        "accept_dad": 0,
        "accept_ra": 0,
        "router_solicitations": 0,
        "mldv1_unsolicited_report_interval": 1,
        "mldv2_unsolicited_report_interval": 1,
    }.items():
        netns.sysctl(f"net.ipv6.conf.default.{name}", value)


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _run(
    argv: Sequence[str],
    *,
    stdin: str = "",
    check: bool = True,
    timeout_s: float = 60,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout_s, env=env, check=False)
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        shown = [word if len(word) < 60 else "…" for word in argv]
        raise LabError(f"`{' '.join(shown)}` failed: {said}. `lab down` removes what was built.")
    return done


def _require_root_and_tools() -> None:
    if os.geteuid() != 0:
        raise LabError(
            "the lab makes network namespaces, and that takes root. "
            f"Run: sudo {PACKAGE_ROOT}/scripts/lab … (or the Python program that uses Lab)."
        )
    tools_of = {
        "iproute2": ("ip", "bridge", "tc"),
        "nftables": ("nft",),
        "iptables": ("iptables-nft", "iptables-legacy"),
        "util-linux": ("nsenter", "unshare"),
    }
    packages = {tool: package for package, tools in tools_of.items() for tool in tools}
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [tool for tool in packages if shutil.which(tool) is None]
    if missing:
        wanted = " ".join(sorted({packages[tool] for tool in missing}))
        raise LabError(f"missing: {', '.join(missing)}. Install them: apt-get install --no-install-recommends {wanted}")


def _kill_marked(prefix: str) -> None:
    """Kill every process that carries this lab's mark in its environment, and wait until they are gone."""
    mark = f"{PROCESS_MARK}={prefix}".encode()
    deadline = time.monotonic() + 5
    while True:
        alive = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    if mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                        alive.append(int(entry))
        if not alive:
            return
        if time.monotonic() > deadline:
            raise LabError(f"processes {alive} of lab {prefix!r} do not die. Look at them with ps -fp PID.")
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


@contextlib.contextmanager
def _shared_directories() -> Iterator[None]:
    """Only one lab at a time makes or removes the directories that labs share, or picks its subnet.

    The lock is on /run itself: a lock file of our own would be one more thing to leave behind.
    """
    directory = os.open(STATE_DIR.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _remove_if_empty(directory: Path) -> bool:
    """Whether the directory is still there, because somebody else uses it."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _make_cgroup(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise LabError(
            f"cannot make the cgroup {path}: {failure.strerror}. A pod needs a writable cgroup file "
            "system; in a container, run with --privileged."
        ) from failure


def _remove_cgroup(path: Path) -> None:
    """Remove the cgroup and, while they are empty, its parents up to the mount point."""
    mounts = {Path(mount) for mount in _cgroup_mounts()}
    deadline = time.monotonic() + 2
    while path not in mounts and path != path.parent:
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            # Busy: either others live there (leave it), or our dead process is not quite out yet.
            if any(child.is_dir() for child in path.iterdir()) or time.monotonic() > deadline:
                return
            time.sleep(0.005)
            continue
        path = path.parent


def _state_file(prefix: str) -> Path:
    return STATE_DIR / f"{prefix}.json"


def _read_state(prefix: str) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(_state_file(prefix).read_text())
    except FileNotFoundError:
        return None
    except ValueError as failure:
        raise LabError(f"{_state_file(prefix)} is damaged ({failure}). Remove it and run `lab down`.") from failure
    return state


def lab_prefixes() -> list[str]:
    """Prefixes of the labs that are up, or were killed and not yet taken down."""
    return sorted(path.stem for path in STATE_DIR.glob("*.json"))


def softnet_dropped() -> int:
    """Packets that met a full CPU backlog, whole machine since boot: column 2 of /proc/net/softnet_stat."""
    return sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())


# ----------------------------------------------------------------------------------------------------
# Faults. Whose is a dropped packet? One that is addressed to or from the namespace in which it dies belongs
# to that namespace; one in transit through the node belongs to the pod behind the veth it is on (skb->dev):
# the sender on its way in, the receiver in the qdisc on its way out. On a bridge, PREROUTING and routing see
# cni0, so only the source address tells the sender, and FORWARD sees the port towards the receiver.


@dataclass(frozen=True)
class Fault:
    """A named way to lose packets. Call it: `fault(lab, count)`."""

    name: str
    says: str
    """One line for `lab list`."""
    act: Callable[[Lab, int, Pod, Pod], Expected] = field(repr=False)
    """(lab, count, the pod that shall own the drops, a pod that helps)"""
    host_wide: bool = False
    """Touches the whole machine for a moment."""

    def __call__(self, lab: Lab, count: int = 23, owner: Pod | str | None = None) -> Expected:
        if count < 1:
            raise LabError(f"count must be at least 1, not {count}.")
        pod = owner if isinstance(owner, Pod) else lab.pod(owner) if owner else lab.pods[0]
        others = [other for other in lab.pods if other is not pod]
        if not others:
            raise LabError("faults need a second pod to talk to. Build the lab with at least two PodSpecs.")
        # A pod of the same namespace would blur sums per namespace: prefer one from elsewhere.
        peer = next((other for other in others if other.spec.namespace != pod.spec.namespace), others[0])
        return self.act(lab, count, pod, peer)


def _fault(name: str) -> Fault:
    if name not in FAULTS:
        raise LabError(f"no fault {name!r}. There are: {', '.join(FAULTS)}")
    return FAULTS[name]


def _settled(read: Callable[[], int], wanted: int) -> int:
    """Read a counter until it says `wanted`, at most 3 s (softirqs may be late); what it says."""
    deadline = time.monotonic() + 3
    while (value := read()) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def _closed_udp(family: Literal[4, 6]) -> Callable[[Lab, int, Pod, Pod], Expected]:
    def act(lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
        before = pod.udp_no_ports(family)
        peer.udp(pod.ipv4 if family == 4 else _ipv6(lab, pod), 8125, count)
        return Expected(
            fault="closed-port" if family == 4 else "closed-port-v6",
            cause="closed-port",
            owner=pod.owner,
            count=count,
            counter=_settled(lambda: pod.udp_no_ports(family) - before, count),
            counter_name="UdpNoPorts" if family == 4 else "Udp6NoPorts",
            reason="NO_SOCKET",
            family=family,
            netns=pod.inode,
            device="eth0",
        )

    return act


def _closed_tcp(_lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
    before = pod.snmp()["TcpOutRsts"]
    tally = peer.tcp_connect(pod.ipv4, 8080, count)
    return Expected(
        fault="closed-port-tcp",
        cause="closed-port",
        owner=pod.owner,
        count=tally.refused,
        counter=_settled(lambda: pod.snmp()["TcpOutRsts"] - before, count),
        counter_name="TcpOutRsts",
        reason="NO_SOCKET",
        netns=pod.inode,
        device="eth0",
    )


def _nft_drop(
    name: str,
    hook: str,
    *,
    at: Literal["node", "pod"],
    send: Literal["to peer", "from peer"],
    family: Literal[4, 6] = 4,
) -> Callable[[Lab, int, Pod, Pod], Expected]:
    """An nft rule `udp dport 1111 counter drop` in a chain of its own at that hook."""

    def act(lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
        netns = lab.node if at == "node" else pod
        table_family = "netdev" if hook == "ingress" else "inet"
        device = f"device {pod.veth} " if hook == "ingress" else ""
        chain = f"type filter hook {hook} {device}priority {-300 if hook == 'prerouting' else 0};"
        sender, receiver = (pod, peer) if send == "to peer" else (peer, pod)
        if hook == "forward":
            sender, receiver = _across_forward(lab, pod, peer)
        destination = receiver.ipv4 if family == 4 else _ipv6(lab, receiver)
        table = f"fault_{name.replace('-', '_')}"
        _add_nft_rule(netns, table_family, table, chain, "udp dport 1111 counter drop")
        try:
            sender.udp(destination, 1111, count)
            counter = _settled(lambda: netns.nft_counter(table_family, table), count)
        finally:
            netns.run(["nft", "delete", "table", table_family, table])
        return Expected(
            fault=name,
            cause="networkpolicy-drop",
            owner=pod.owner,
            count=count,
            counter=counter,
            counter_name=f"nft {table_family} {hook} rule counter",
            reason="NETFILTER_DROP",
            hook=_HOOK_NAMES[hook],
            family=family,
            netns=netns.inode,
            device=_hook_device(lab, pod, hook),
        )

    return act


def _across_forward(lab: Lab, pod: Pod, peer: Pod) -> tuple[Pod, Pod]:
    """Sender and receiver of a packet that dies in FORWARD on the veth of `pod`.

    Routed, a packet is still on the device it came in by; bridged, it is on the one it leaves by.
    """
    return (peer, pod) if lab.bridge else (pod, peer)


def _hook_device(lab: Lab, pod: Pod, hook: str) -> str | None:
    """Where skb->dev points at a netfilter hook."""
    devices = {"prerouting": lab.gateway_device(pod), "input": "eth0", "output": None}
    return devices.get(hook, pod.veth)


_HOOK_NAMES = {
    "prerouting": "PRE_ROUTING",
    "input": "LOCAL_IN",
    "forward": "FORWARD",
    "output": "LOCAL_OUT",
    "ingress": "INGRESS",
}


def _iptables_drop(name: str, binary: str, table: str, chain: str) -> Callable[[Lab, int, Pod, Pod], Expected]:
    """A DROP rule in the node's namespace, met by what the pod sends."""

    def act(lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
        port = 2222
        sender, receiver = _across_forward(lab, pod, peer) if chain == "FORWARD" else (pod, peer)
        rule = [chain, "-p", "udp", "--dport", str(port), "-d", receiver.ipv4, "-j", "DROP"]
        iptables = [binary, "-w", "-t", table]
        lab.node.run([*iptables, "-I", *rule])
        try:
            sender.udp(receiver.ipv4, port, count)
            counter = _settled(lambda: lab.node.iptables_counter(binary, table, chain, port), count)
        finally:
            lab.node.run([*iptables, "-D", *rule])
        return Expected(
            fault=name,
            cause="networkpolicy-drop",
            owner=pod.owner,
            count=count,
            counter=counter,
            counter_name=f"{binary} {table} {chain} rule counter",
            reason="NETFILTER_DROP",
            hook=_HOOK_NAMES[chain.lower()],
            netns=lab.node.inode,
            device=_hook_device(lab, pod, chain.lower()),
        )

    return act


def _tc_ingress(lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
    # Classic BPF, because it needs no clang: if IPv4 and UDP to port 3333, return TC_ACT_SHOT (2), else 0.
    # Dropping everything would also drop, and count, what happens to pass by.
    bytecode = "8,40 0 0 12,21 0 5 2048,48 0 0 23,21 0 3 17,40 0 0 36,21 0 1 3333,6 0 0 2,6 0 0 0,"
    lab.node.run(["tc", "qdisc", "add", "dev", pod.veth, "clsact"])
    try:
        lab.node.run(["tc", "filter", "add", "dev", pod.veth, "ingress", "bpf", "da", "bytecode", bytecode])
        pod.udp(peer.ipv4, 3333, count)
        counter = _settled(lambda: lab.node.qdisc_dropped(pod.veth, "clsact"), count)
    finally:
        lab.node.run(["tc", "qdisc", "del", "dev", pod.veth, "clsact"])
    return Expected(
        fault="tc-ingress",
        cause="tc-bpf-drop",
        owner=pod.owner,
        count=count,
        counter=counter,
        counter_name="tc -s qdisc clsact dropped",
        reason="TC_INGRESS",
        netns=lab.node.inode,
        device=pod.veth,
    )


def _tbf_overflow(lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
    """A token bucket on the way to the pod: 16 bytes a second, one packet long.

    So it is full after two packets, drops all that follow, and nothing trickles out while they are counted.
    """
    tbf = ["dev", pod.veth, "root", "tbf", "rate"]
    port, sent = 4444, 0

    def dropped() -> int:
        return lab.node.qdisc_dropped(pod.veth, "tbf")

    with pod.sink(port) as sink:
        lab.node.run(["tc", "qdisc", "add", *tbf, "128bit", "burst", "1600", "limit", "1600"])
        try:
            while dropped() == 0 and sent < 10:
                sent += peer.udp(pod.ipv4, port, 1, size=1200).sent
            if count > 1:
                sent += peer.udp(pod.ipv4, port, count - 1, size=1200).sent
            counter = _settled(dropped, count)
            # Let the queue run empty before it is deleted: a purged queue would be one more dropped packet.
            # The new rate is looked at when the next packet comes.
            lab.node.run(["tc", "qdisc", "change", *tbf, "1gbit", "burst", "1mb", "limit", "1mb"])
            sent += peer.udp(pod.ipv4, port, 1, size=1200).sent
            received = _settled(sink.received, sent - count)
        finally:
            lab.node.run(["tc", "qdisc", "del", "dev", pod.veth, "root"])
    return Expected(
        fault="tbf-overflow",
        cause="qdisc-overlimit",
        owner=pod.owner,
        count=sent - received,
        counter=counter,
        counter_name="tc -s qdisc tbf dropped",
        reason="QDISC_DROP",
        netns=lab.node.inode,
        device=pod.veth,
    )


def _rp_filter(_lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
    """The pod's way back to the source leads elsewhere than eth0, and strict reverse-path filtering is on."""
    before = pod.snmp()["TcpExtIPReversePathFilter"]
    pod.ip(f"route add {SPOOFED_SOURCE}/32 dev lo")
    try:
        pod.sysctl("net.ipv4.conf.eth0.rp_filter", 1)
        peer.udp(pod.ipv4, 5555, count, source=SPOOFED_SOURCE)
        counter = _settled(lambda: pod.snmp()["TcpExtIPReversePathFilter"] - before, count)
    finally:
        pod.sysctl("net.ipv4.conf.eth0.rp_filter", 0)
        pod.ip(f"route del {SPOOFED_SOURCE}/32 dev lo")
    return Expected(
        fault="rp-filter",
        cause="rp-filter",
        owner=pod.owner,
        count=count,
        counter=counter,
        counter_name="TcpExtIPReversePathFilter",
        reason="IP_RPFILTER",
        netns=pod.inode,
        device="eth0",
    )


def _udp_rcvbuf(_lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
    before = pod.snmp()["UdpRcvbufErrors"]
    with pod.udp_full(8126):  # the first drop: it told that the buffer is full
        if count > 1:
            peer.udp(pod.ipv4, 8126, count - 1, size=512)
        counter = _settled(lambda: pod.snmp()["UdpRcvbufErrors"] - before, count)
    return Expected(
        fault="udp-rcvbuf",
        cause="udp-rcvbuf",
        owner=pod.owner,
        count=count,
        counter=counter,
        counter_name="UdpRcvbufErrors",
        reason="SOCKET_RCVBUFF",
        netns=pod.inode,
        device="eth0",
    )


def _no_route(lab: Lab, count: int, pod: Pod, _peer: Pod) -> Expected:
    before = lab.node.snmp()["IpExtInNoRoutes"]
    pod.udp(UNROUTED, 6666, count)
    return Expected(
        fault="no-route",
        cause="no-route",
        owner=pod.owner,
        count=count,
        counter=_settled(lambda: lab.node.snmp()["IpExtInNoRoutes"] - before, count),
        counter_name="IpExtInNoRoutes",
        reason="IP_INNOROUTES",
        netns=lab.node.inode,
        device=lab.gateway_device(pod),
    )


def _softnet_backlog(lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
    """Bursts longer than the CPU's backlog may be, reaching the pod all at once.

    The node must cut them into datagrams because its veth takes no offload. The kernel accepts one more than
    netdev_max_backlog says.
    """
    backlog, longest, port = 16, 60, 7777
    before, sent = pod.device_rx_dropped("eth0"), 0
    lab.node.ip(f"link set {pod.veth} gso_max_segs 1")
    try:
        with (
            pod.sink(port) as sink,
            peer.child("bursts", dst=pod.ipv4, port=port, bursts=[], size=64) as burst,
        ):
            burst.answer()
            # Another packet in the same backlog at the same moment changes the outcome: make up for it.
            for _ in range(5):
                missing = count - (sent - sink.received())
                if missing <= 0:
                    break
                bursts = [longest] * (missing // (longest - backlog - 1))
                rest = missing % (longest - backlog - 1)
                bursts += [rest + backlog + 1] if rest else []
                with lab.host_sysctl("net.core.netdev_max_backlog", backlog):
                    sent += int(burst.ask(json.dumps(bursts))["sent"])
                _settled(lambda: sink.received() + pod.device_rx_dropped("eth0") - before, sent)
            received = sink.received()
    finally:
        lab.node.ip(f"link set {pod.veth} gso_max_segs 65535")
    return Expected(
        fault="softnet-backlog",
        cause="softnet-backlog",
        owner=pod.owner,
        count=sent - received,
        counter=pod.device_rx_dropped("eth0") - before,
        counter_name="rx_dropped of eth0",
        reason="CPU_BACKLOG",
        netns=pod.inode,
        device="eth0",
    )


def _benign_noise(lab: Lab, count: int, pod: Pod, peer: Pod) -> Expected:
    """Events of kfree_skb that mean nothing: k8sdiag must call none of them a problem."""
    pod.send_by("unread", count=count)
    pod.send_by("tcp-endings", count=count)
    peer.udp(pod.ipv4, 40053, count, sport=53)  # a DNS answer for a resolver that has closed its socket
    lab.node.send_by("frames", device=pod.veth, own_mac=pod.mac, address=pod.ipv4, count=count)
    return Expected("benign-noise", None, "", 0, 0, "none", None)


def _ipv6(lab: Lab, pod: Pod) -> str:
    if not lab.ipv6:
        raise LabError("this lab has no IPv6. Build it with ipv6=True (and without --no-ipv6).")
    return pod.ipv6


_ALL_FAULTS = (
    Fault("closed-port", "UDP to a port of the pod that nobody listens on", _closed_udp(4)),
    Fault("closed-port-v6", "the same over IPv6", _closed_udp(6)),
    Fault("closed-port-tcp", "TCP to a port of the pod that nobody listens on (refused)", _closed_tcp),
    Fault("nft-forward", "nft drop in the node's FORWARD hook, of what the pod sends",
          _nft_drop("nft-forward", "forward", at="node", send="to peer")),
    Fault("nft-forward-v6", "the same over IPv6",
          _nft_drop("nft-forward-v6", "forward", at="node", send="to peer", family=6)),
    Fault("nft-prerouting", "nft drop in the node's PREROUTING hook, before conntrack, of what the pod sends",
          _nft_drop("nft-prerouting", "prerouting", at="node", send="to peer")),
    Fault("nft-ingress", "nft drop at ingress (netdev) of the node's veth, of what the pod sends",
          _nft_drop("nft-ingress", "ingress", at="node", send="to peer")),
    Fault("nft-input", "nft drop in the pod's own INPUT hook",
          _nft_drop("nft-input", "input", at="pod", send="from peer")),
    Fault("nft-output", "nft drop in the pod's own OUTPUT hook (its sends fail with EPERM)",
          _nft_drop("nft-output", "output", at="pod", send="to peer")),
    Fault("iptables-nft", "iptables-nft DROP in the node's FORWARD chain",
          _iptables_drop("iptables-nft", "iptables-nft", "filter", "FORWARD")),
    Fault("iptables-legacy", "iptables-legacy DROP in the node's FORWARD chain",
          _iptables_drop("iptables-legacy", "iptables-legacy", "filter", "FORWARD")),
    Fault("iptables-raw", "iptables-legacy DROP in raw PREROUTING, which looks like a full conntrack table",
          _iptables_drop("iptables-raw", "iptables-legacy", "raw", "PREROUTING")),
    Fault("tc-ingress", "a tc BPF program on the node's veth drops what the pod sends", _tc_ingress),
    Fault("tbf-overflow", "the bandwidth limit (tbf) on the way to the pod overflows", _tbf_overflow),
    Fault("rp-filter", "reverse-path filter in the pod: the way back is another device", _rp_filter),
    Fault("udp-rcvbuf", "the pod's UDP socket has a tiny buffer and nobody reads it", _udp_rcvbuf),
    Fault("no-route", "the pod sends to an address the node has no route for", _no_route),
    Fault("softnet-backlog", "the CPU's backlog overflows on the way into the pod (host-wide, a moment)",
          _softnet_backlog, host_wide=True),
    Fault("benign-noise", "closed sockets, late DNS answers, other hosts' frames: events without a fault",
          _benign_noise),
)  # fmt: skip

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _ALL_FAULTS}


# ----------------------------------------------------------------------------------------------------
# Traffic: what the child processes do (`_act NAME ARGUMENTS`, in the pod's namespace and cgroup)


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


def _address_family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _act_udp(dst: str, port: int, count: int, size: int, sport: int | None, source: str | None) -> None:
    family = _address_family(dst)
    refused = 0
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        if source is not None:
            level, option = (
                (socket.SOL_IP, IP_TRANSPARENT) if family == socket.AF_INET else (SOL_IPV6, IPV6_TRANSPARENT)
            )
            sender.setsockopt(level, option, 1)
        if source is not None or sport is not None:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sender.bind((source or "", sport or 0))
        payload = bytes(size)
        for number in range(1, count + 1):
            try:
                sender.sendto(payload, (dst, port))
            except OSError:
                refused += 1
            if number % 128 == 0:  # far below netdev_max_backlog, should softirqs fall behind
                time.sleep(0.001)
    _say(dataclasses.asdict(Tally(sent=count, refused=refused)))


def _act_bursts(dst: str, port: int, bursts: list[int], size: int) -> None:
    """One buffer per burst; more bursts may be asked for on stdin."""
    with socket.socket(_address_family(dst), socket.SOCK_DGRAM) as sender:
        sender.setsockopt(SOL_UDP, UDP_SEGMENT, size)

        def send(lengths: list[int]) -> None:
            for length in lengths:
                sender.sendto(bytes(size * length), (dst, port))
                time.sleep(0.0005)
            _say(dataclasses.asdict(Tally(sent=sum(lengths))))

        send(bursts)
        for line in sys.stdin:
            send(json.loads(line))


def _act_tcp(dst: str, port: int, count: int, timeout_s: float) -> None:
    waiting: dict[int, socket.socket] = {}
    poll = select.poll()
    for _ in range(count):
        connection = socket.socket(_address_family(dst), socket.SOCK_STREAM)
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):  # a refusal shows in the poll as well
            connection.connect((dst, port))
        waiting[connection.fileno()] = connection
        poll.register(connection, select.POLLOUT)
    connected = refused = 0
    deadline = time.monotonic() + timeout_s
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left_s * 1000):
            poll.unregister(descriptor)
            connection = waiting.pop(descriptor)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 and _has_peer(connection):
                connected += 1
            else:
                refused += 1
            connection.close()
    for connection in waiting.values():
        connection.close()
    _say(dataclasses.asdict(Tally(sent=count, refused=refused, timed_out=len(waiting), connected=connected)))


def _has_peer(connection: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        connection.getpeername()
        return True
    return False


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("header", _Msghdr), ("sent_length", ctypes.c_uint))


def _act_flood(dst: str, port: int, count: int, random_source: bool, size: int) -> None:
    """sendmmsg, 256 packets a call; with random sources the packets are built here, headers included."""
    family = _address_family(dst)
    batch = 256
    if random_source:
        packets, redraw = _random_packets(dst, port, size, batch)
        sender = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        if family == socket.AF_INET6:
            sender.setsockopt(SOL_IPV6, IPV6_HDRINCL, 1)
    else:
        packets, redraw = bytearray(size * batch), None
        sender = socket.socket(family, socket.SOCK_DGRAM)
    target = socket.inet_pton(family, dst)
    if family == socket.AF_INET:
        name = struct.pack("=H2s4s8x", family, struct.pack("!H", port), target)
    else:  # the kernel wants port 0 in the address of a raw IPv6 packet
        name = struct.pack("=H2s4x16sI", family, struct.pack("!H", 0 if random_source else port), target, 0)
    name_buffer = ctypes.create_string_buffer(name, len(name))
    stride = len(packets) // batch
    start = ctypes.addressof((ctypes.c_char * len(packets)).from_buffer(packets))
    iovecs = (_Iovec * batch)(*(_Iovec(start + i * stride, stride) for i in range(batch)))
    messages = (_Mmsghdr * batch)()
    for message, iovec in zip(messages, iovecs, strict=True):
        message.header.name, message.header.name_length = ctypes.addressof(name_buffer), len(name)
        message.header.iov, message.header.iov_count = ctypes.pointer(iovec), 1
    done = refused = 0
    with sender:
        descriptor = sender.fileno()
        while done < count:
            if redraw is not None:
                redraw()
            wanted = min(batch, count - done)
            offset = 0
            while offset < wanted:
                sent = _libc.sendmmsg(
                    descriptor, ctypes.byref(messages, offset * ctypes.sizeof(_Mmsghdr)), wanted - offset, 0
                )
                if sent < 0:  # this one packet was refused (EPERM, ENOBUFS): go on behind it
                    sent, refused = 1, refused + 1
                offset += sent
            done += wanted
    _say(dataclasses.asdict(Tally(sent=done, refused=refused)))


_COMPLEMENT = bytes(255 - i for i in range(256))
_HIGH_PORT = bytes(i | 0x80 for i in range(256))


def _random_packets(dst: str, port: int, size: int, batch: int) -> tuple[bytearray, Callable[[], None]]:
    """`batch` equal UDP packets, and a function that draws their sources anew.

    The UDP checksum (needed for IPv6) stays right without computing it: each random word stands in the packet
    together with its one's complement.
    """
    size = max(size, 2)
    ipv4 = ":" not in dst
    if ipv4:
        source = socket.inet_aton("198.18.0.0")
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + 8 + size, 0, 0, 64, 17, 0, source, socket.inet_aton(dst))
        checksum = 0  # none; legal in IPv4
        address_bytes, complement_bytes = [14, 15], []
    else:
        source = socket.inet_pton(socket.AF_INET6, "2001:2::ffff:0:ffff")
        target = socket.inet_pton(socket.AF_INET6, dst)
        header = struct.pack("!IHBB16s16s", 6 << 28, 8 + size, 17, 64, source, target)
        # Source words 4..7 are w, ~w, v, ~v; source port and first payload word are p, ~p: 0xffff each pair.
        words = struct.unpack("!16H", source[:8] + b"\0\0\xff\xff\0\0\xff\xff" + target)
        total = sum(words) + 17 + (8 + size) + port + (8 + size) + 0xFFFF
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        checksum = (~total & 0xFFFF) or 0xFFFF
        address_bytes, complement_bytes = [16, 17, 20, 21], [18, 19, 22, 23]
    udp_at = len(header)
    packet = header + struct.pack("!HHHH", 0, port, 8 + size, checksum) + bytes(size)
    packets = bytearray(packet * batch)
    stride = len(packet)

    def draw(at: int, values: bytes) -> None:
        packets[at::stride] = values

    def redraw() -> None:
        for i, at in enumerate(address_bytes):
            values = os.urandom(batch)
            draw(at, values)
            if complement_bytes:
                draw(complement_bytes[i], values.translate(_COMPLEMENT))
        high, low = os.urandom(batch).translate(_HIGH_PORT), os.urandom(batch)
        draw(udp_at, high)
        draw(udp_at + 1, low)
        draw(udp_at + 8, high.translate(_COMPLEMENT))
        draw(udp_at + 9, low.translate(_COMPLEMENT))

    return packets, redraw


def _act_sink(port: int) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as reader:
        reader.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        reader.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        reader.bind(("::", port))
        reader.setblocking(False)
        received = 0

        def drain() -> None:
            nonlocal received
            with contextlib.suppress(BlockingIOError):
                while True:
                    reader.recv(1)
                    received += 1

        _say("ready")
        while True:
            readable, _, _ = select.select([reader, sys.stdin], [], [])
            drain()
            if sys.stdin in readable:
                if not sys.stdin.readline():
                    return
                drain()
                _say(received)


def _act_full(port: int, address: str) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as full,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel's minimum, about 2,300 bytes
        full.bind((address, port))
        full.setblocking(False)

        def drops() -> int:
            return int(struct.unpack("=9I", full.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[SK_MEMINFO_DROPS])

        for _ in range(100):
            if drops():
                break
            sender.sendto(b"x", (address, port))
            time.sleep(0.001)
        _say("ready" if drops() == 1 else f"drops {drops()}")
        sys.stdin.read()
        with contextlib.suppress(BlockingIOError):  # closing a socket with unread data makes events of its own
            while True:
                full.recv(1)


def _act_unread(count: int) -> None:
    """Sockets that close with data nobody read: Unix datagrams, a Unix stream, UDP."""
    for _ in range(count):
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            one, other = socket.socketpair(socket.AF_UNIX, kind)
            one.send(b"never read")
            other.close()
            one.close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reader:
            reader.bind(("127.0.0.1", 0))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"never read", reader.getsockname())
    _say(dataclasses.asdict(Tally(sent=count)))


def _act_tcp_endings(count: int) -> None:
    """Connections that end by RST in several ways, and a keep-alive probe (an old sequence number)."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        address = server.getsockname()
        for _ in range(count):
            client = socket.create_connection(address)
            accepted, _ = server.accept()
            client.sendall(b"never read")
            accepted.close()  # unread data: the close is a RST
            client.close()
            client = socket.create_connection(address)
            accepted, _ = server.accept()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # abortive close: a RST
            accepted.close()
        idle = socket.create_connection(address)
        accepted, _ = server.accept()
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        idle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        time.sleep(1.3)
        idle.close()
        accepted.close()
    _say(dataclasses.asdict(Tally(sent=count)))


def _act_frames(device: str, own_mac: str, address: str, count: int) -> None:
    """Frames that are none of the pod's business: for another host, and of an unknown protocol (LLDP)."""
    udp = struct.pack("!HHHH", 9, 9, 8, 0)
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, socket.inet_aton(UNROUTED), socket.inet_aton(address)
    )
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + struct.pack("!H", checksum) + header[12:]
    other_mac = bytes.fromhex(own_mac.replace(":", ""))[:5] + b"\xee"
    source_mac = bytes.fromhex("0a580a0000fe")
    lldp = bytes.fromhex("0180c200000e") + source_mac + b"\x88\xcc" + bytes(46)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((device, 0))
        for _ in range(count):
            wire.send(other_mac + source_mac + b"\x08\x00" + header + udp)
            wire.send(lldp)
    _say(dataclasses.asdict(Tally(sent=2 * count)))


_ACTS: dict[str, Callable[..., None]] = {
    "udp": _act_udp,
    "bursts": _act_bursts,
    "tcp": _act_tcp,
    "flood": _act_flood,
    "sink": _act_sink,
    "full": _act_full,
    "unread": _act_unread,
    "tcp-endings": _act_tcp_endings,
    "frames": _act_frames,
}


# ----------------------------------------------------------------------------------------------------
# Command line


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab",
        description="Network namespaces as pods on a node, with faults injected by name. Needs root.",
    )
    parser.add_argument("--prefix", default="k8d", help="name of the lab; several may live side by side (default k8d)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    up = verbs.add_parser("up", help="build the lab and leave it standing")
    up.add_argument("--bridge", action="store_true", help="pods on a bridge cni0 instead of routed veths")
    up.add_argument("--no-ipv6", action="store_true", help="IPv4 only")
    up.add_argument("--no-conntrack", action="store_true", help="the node does not track connections")
    verbs.add_parser("down", help="remove the lab and whatever a killed one left")
    verbs.add_parser("list", help="the faults that can be injected")
    verbs.add_parser("status", help="the labs that are up and their pods")
    inject = verbs.add_parser("inject", help="drop some packets in a named way")
    inject.add_argument("fault", metavar="NAME", help="see `lab list`")
    inject.add_argument("--count", type=int, default=23, help="packets to drop (default 23)")
    inject.add_argument("--pod", metavar="NAMESPACE/NAME", help="the pod they shall belong to (default: the first)")
    return parser


def _print_lab(lab: Lab) -> None:
    print(f"lab {lab.prefix}: {'bridge cni0' if lab.bridge else 'routed'}, node namespace {lab.node.name}")
    width = max(len(pod.owner) for pod in lab.pods)
    for pod in lab.pods:
        where = pod.name if pod.spec.named else f"held by pid {pod.pid}"
        print(f"  {pod.owner:{width}}  {pod.ipv4:15}  {pod.veth:8}  netns {pod.inode}  {where}")


def main(argv: Sequence[str] | None = None) -> int:
    """The verbs of scripts/lab. Exit code: 0 done, 1 failed; argparse exits with 2 on bad usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["_act"]:
        _ACTS[words[1]](**json.loads(words[2]))
        return 0
    arguments = _arguments().parse_args(words)
    try:
        if arguments.verb == "list":
            width = max(map(len, FAULTS))
            for fault in FAULTS.values():
                print(f"{fault.name:{width}}  {fault.says}")
            return 0
        _require_root_and_tools()
        if arguments.verb == "up":
            signal.signal(signal.SIGTERM, _exit_on_signal)  # then what is half built is removed
            lab = Lab(
                arguments.prefix,
                bridge=arguments.bridge,
                ipv6=not arguments.no_ipv6,
                conntrack=not arguments.no_conntrack,
            )
            _print_lab(lab.up())
        elif arguments.verb == "down":
            Lab(arguments.prefix).down()
        elif arguments.verb == "status":
            prefixes = lab_prefixes()
            for prefix in prefixes:
                if (_read_state(prefix) or {}).get("ready"):
                    _print_lab(Lab.attach(prefix))
                else:
                    print(f"lab {prefix}: half built. Remove it: lab --prefix {prefix} down")
            if not prefixes:
                print("no lab is up; start one with: lab up")
        elif arguments.verb == "inject":
            expected = Lab.attach(arguments.prefix).inject(arguments.fault, arguments.count, arguments.pod)
            print(json.dumps(dataclasses.asdict(expected), indent=1))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
