"""One network namespace of a lab: run things in it, send from it, read what the kernel counts in it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from k8sdiag.errors import K8sdiagError
from k8sdiag.host.lab import traffic
from k8sdiag.host.lab.traffic import Tally

# In the environment of every process the lab starts: they are found again by it, never by a recyclable pid.
PROCESS_MARK = "K8SDIAG_LAB"

CLONE_NEWNET = 0x40000000
SO_NETNS_COOKIE = 71  # <asm-generic/socket.h>
# <linux/netfilter/nfnetlink.h>, <linux/netfilter/nfnetlink_conntrack.h>, <linux/netlink.h>
NETLINK_NETFILTER, NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE = 12, 1, 2
NLM_F_REQUEST, NLM_F_ACK, NLMSG_ERROR = 1, 4, 2

T = TypeVar("T")


class LabError(K8sdiagError):
    """The laboratory cannot be built or used: what happened, why, and what to do."""


def run(
    argv: Sequence[str], *, stdin: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60, env=env, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        shown = [word if len(word) < 60 else "…" for word in argv]
        raise LabError(f"`{' '.join(shown)}` failed: {said}. `lab down` removes what was built.")
    return done


_libc = ctypes.CDLL(None, use_errno=True)


def _setns(namespace: IO[bytes]) -> None:
    if _libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def inside(netns: str, act: Callable[[], T]) -> T:
    """Run `act` in the network namespace at path `netns`, in a thread of its own: only that thread moves.

    Sockets opened by `act` stay in that namespace; /proc/sys/net and /proc/thread-self/net belong to it.
    """

    def enter_and_act() -> T:
        with open("/proc/thread-self/ns/net", "rb") as home, open(netns, "rb") as away:
            _setns(away)
            try:
                return act()
            finally:
                _setns(home)  # a thread outlives its join() in the kernel for a moment

    # Never the caller's thread: while the main one is away, so is /proc/self for whoever looks.
    with ThreadPoolExecutor(1, thread_name_prefix="lab-netns") as threads:
        return threads.submit(enter_and_act).result()


# Joins the cgroups named before "--" and becomes the rest, so that the process never ran outside of them.
_JOIN_AND_EXEC = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 125; shift; done; shift; exec "$@"'


class Netns:
    """One network namespace of the lab: run things in it, send from it, read its counters."""

    def __init__(self, prefix: str, name: str) -> None:
        self.prefix = prefix
        self.name = name
        self.path = f"/run/netns/{name}"
        """Path that opens the namespace: /run/netns/NAME, or /proc/PID/ns/net."""
        self.cgroups: tuple[str, ...] = ()
        """Directories of the cgroup, one per hierarchy; empty: the caller's own cgroups."""

    # -- running -------------------------------------------------------------------------------------

    def command(self, argv: Sequence[str], *, unshare: bool = False) -> list[str]:
        """The command line that runs `argv` here, in the cgroups too; `unshare` makes a new namespace."""
        enter = ["unshare", "--net"] if unshare else ["nsenter", f"--net={self.path}"]
        procs = [f"{cgroup}/cgroup.procs" for cgroup in self.cgroups]
        return [*enter, "--", "sh", "-c", _JOIN_AND_EXEC, "sh", *procs, "--", *argv]

    def environment(self) -> dict[str, str]:
        return {**os.environ, PROCESS_MARK: self.prefix}

    def run(self, argv: Sequence[str], *, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command here to its end, as the pod would: in its network namespace and cgroup."""
        return run(self.command(argv), stdin=stdin, env=self.environment())

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

    def tool(self, argv: Sequence[str], *, stdin: str = "") -> str:
        """What a command prints that acts on this namespace from outside of the pod's cgroup."""
        return run(["nsenter", f"--net={self.path}", "--", *argv], stdin=stdin, env=self.environment()).stdout

    def ip(self, *lines: str) -> None:
        """Configure by `ip -batch`: all the lines in one process."""
        self.tool(["ip", "-batch", "-"], stdin="\n".join(lines))

    def add_nft_rule(self, family: str, table: str, chain: str, rule: str) -> None:
        """Make an nft table with one chain, given by its type and hook, with one rule."""
        self.tool(["nft", "-f", "-"], stdin=f"table {family} {table} {{\nchain c {{\n{chain}\n{rule}\n}}\n}}\n")

    def sysctl(self, name: str, value: int | str | None = None) -> str:
        """Read a sysctl of this namespace, after writing `value` if given."""
        path = Path("/proc/sys", *name.split("."))

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
                return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)

        return inside(self.path, ask)

    # -- counters the kernel keeps by itself ---------------------------------------------------------

    def snmp(self) -> dict[str, int]:
        """Counters of /proc/net/{snmp,netstat,snmp6} by nstat's names: "UdpNoPorts", "TcpExtListenDrops" …"""

        def read() -> list[list[str]]:
            files = [Path("/proc/thread-self/net", name) for name in ("snmp", "netstat", "snmp6")]
            return [file.read_text().splitlines() if file.exists() else [] for file in files]

        snmp, netstat, snmp6 = inside(self.path, read)
        counters = {name: int(value) for name, value in map(str.split, snmp6)}
        lines = [line.split() for line in snmp + netstat]
        for (group, *names), (_, *values) in zip(lines[::2], lines[1::2], strict=True):
            prefix = group.rstrip(":")
            counters |= {prefix + name: int(value) for name, value in zip(names, values, strict=True)}
        return counters

    def udp_no_ports(self, family: int = 4) -> int:
        """UDP datagrams that found no socket: UdpNoPorts or Udp6NoPorts."""
        return self.snmp()["UdpNoPorts" if family == 4 else "Udp6NoPorts"]

    def conntrack(self) -> dict[str, int]:
        """Counters of /proc/net/stat/nf_conntrack by its own names, summed over CPUs; "entries" is a gauge."""
        try:
            table = inside(self.path, lambda: Path("/proc/thread-self/net/stat/nf_conntrack").read_text())
        except FileNotFoundError as failure:
            raise LabError("this kernel does not track connections, or does not tell (nf_conntrack).") from failure
        names, *rows = (line.split() for line in table.splitlines())
        cpus = [[int(value, 16) for value in row] for row in rows]
        counters = {name: sum(column) for name, column in zip(names, zip(*cpus, strict=True), strict=True)}
        return counters | {"entries": cpus[0][names.index("entries")]}  # each CPU's row repeats it

    def flush_conntrack(self) -> None:
        """Forget every tracked connection of this namespace, as `conntrack -F` does."""

        def flush() -> int:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
                kind = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE
                # nlmsghdr and nfgenmsg; no attributes: all of them
                netlink.send(struct.pack("=IHHIIBBH", 20, kind, NLM_F_REQUEST | NLM_F_ACK, 1, 0, 0, 0, 0))
                _, answer, _, _, _, error = struct.unpack_from("=IHHIIi", netlink.recv(4096))
            return -error if answer == NLMSG_ERROR else 0

        if error := inside(self.path, flush):
            raise LabError(f"cannot flush the connection table of {self.name}: {os.strerror(error)}.")

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
        table = inside(self.path, lambda: Path("/proc/thread-self/net/dev").read_text())
        found = re.search(rf"^\s*{re.escape(device)}:(.*)$", table, re.MULTILINE)
        if found is None:
            raise LabError(f"no device {device} in {self.name}. `lab status` shows what the lab has.")
        return int(found.group(1).split()[3])

    # -- traffic, sent by a process of its own in this namespace -------------------------------------

    def udp(self, dst: str, port: int, count: int, *, size: int = 32, sport: int = 0, source: str = "") -> Tally:
        """Send `count` UDP datagrams, slowly enough that no queue on the way overflows by itself.

        `source`: another IPv4 address to send from, also one that is not ours (IP_TRANSPARENT).
        """
        return self.send_by("udp", dst=dst, port=port, count=count, size=size, sport=sport, source=source)

    def udp_bursts(self, dst: str, port: int, bursts: Sequence[int], *, size: int = 64) -> Tally:
        """Send UDP segmentation-offload bursts: each a single buffer of that many datagrams (at most 64)."""
        with self.child("bursts", dst=dst, port=port, size=size) as child:
            return Tally(sent=child.ask(json.dumps(list(bursts))))

    def tcp_connect(self, dst: str, port: int, count: int, timeout_s: float = 0.7) -> Tally:
        """Open `count` TCP connections at once, wait for their fate, close them.

        Under one second a lost SYN is not sent again, so it is one packet per connection.
        """
        return self.send_by("attempts", dst=dst, port=port, count=count, timeout_s=timeout_s, udp=False, wait=False)

    @contextlib.contextmanager
    def tcp_server(self, port: int) -> Iterator[Server]:
        """Accepts every connection, IPv4 and IPv6, and holds it; at the end gives them up without a packet."""
        with self.child("server", port=port) as child:
            child.answer()  # listening
            yield Server(child)

    @contextlib.contextmanager
    def tcp_held(self, dst: str, port: int, count: int) -> Iterator[None]:
        """`count` established connections; at the end they are given up without a packet."""
        with self.child("hold", dst=dst, port=port, count=count) as child:
            child.answer()  # established
            yield

    def flood_udp(self, dst: str, port: int, count: int, *, processes: int = 2, random_source: bool = False) -> Tally:
        """Send `count` datagrams in all, as fast as `processes` processes can: it loads the machine.

        `random_source`: source addresses and ports are random (RANDOM_SOURCE_V4/_V6, ports from 32768 up, so
        none looks like a late DNS answer). Aim it at an address of this very namespace, or build the lab with
        conntrack=False: through a tracking node it would fill the conntrack table, which is another fault.
        """
        shares = [count // processes + (i < count % processes) for i in range(processes)]
        what = {"dst": dst, "port": port, "random_source": random_source}
        children = [self.child("flood", count=share, **what) for share in shares]
        tallies = [child.tally() for child in children]
        return Tally(sent=sum(t.sent for t in tallies), refused=sum(t.refused for t in tallies))

    @contextlib.contextmanager
    def sink(self, port: int, *, echo: bool = False, address: str = "::") -> Iterator[Sink]:
        """A UDP socket, IPv4 and IPv6, that reads everything: `sink.received()` datagrams so far.

        `echo`: and sends it back. `address`: bound to this IPv6 address ("::ffff:192.0.2.1" for IPv4) alone.
        """
        with self.child("sink", port=port, echo=echo, address=address) as child:
            child.answer()  # bound
            yield Sink(child)

    def send_by(self, act: str, **arguments: Any) -> Tally:
        return self.child(act, **arguments).tally()

    def child(self, act: str, **arguments: Any) -> _Child:
        """Start one of the acts of traffic.py here."""
        argv = [sys.executable, "-IS", traffic.__file__, act, json.dumps(arguments)]
        return _Child(self.start(argv), f"{act} in {self.name}")


class _Child:
    """A process of traffic.py: prints lines of JSON, some of them in answer to a line, and ends with stdin."""

    def __init__(self, process: subprocess.Popen[str], act: str) -> None:
        self._process = process
        self._act = act

    def tell(self, line: str = "") -> None:
        lines = cast("IO[str]", self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # then the answer will be missing, and answer() says so
            lines.write(line + "\n")
            lines.flush()

    def ask(self, question: str = "") -> Any:
        self.tell(question)
        return self.answer()

    def answer(self) -> Any:
        answers, complaints = cast("IO[str]", self._process.stdout), cast("IO[str]", self._process.stderr)
        readable, _, _ = select.select([answers], [], [], 120)
        line = answers.readline() if readable else ""
        if not line:
            self._process.kill()
            said = complaints.read().strip() or "it said nothing"
            raise LabError(f"the lab's traffic process ({self._act}) ended without an answer: {said}")
        return json.loads(line)

    def tally(self) -> Tally:
        """The one answer of a child that sends and ends."""
        with self:
            return Tally(**self.answer())

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class Sink:
    """A reading UDP socket in some namespace."""

    def __init__(self, child: _Child) -> None:
        self._child = child

    def received(self) -> int:
        """Datagrams read so far."""
        return int(self._child.ask())


class Server:
    """A TCP server in some namespace."""

    def __init__(self, child: _Child) -> None:
        self._child = child

    def write(self) -> int:
        """Send one segment on each connection; on how many."""
        return int(self._child.ask("write"))

    def write_once(self) -> int:
        """The same, but give each connection up before it could send the segment again."""
        return int(self._child.ask("abandon"))


def softnet_dropped() -> int:
    """Packets that met a full CPU backlog, whole machine since boot: column 2 of /proc/net/softnet_stat."""
    return sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())
