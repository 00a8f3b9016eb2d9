"""What can be seen on this node, found out by trying it: the probe is loaded and has to count drops made for it.

Each row is one check. A check that is `required` and missing means that nothing can be watched here (exit code 1);
any other that is missing only blinds what its row says.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from k8sdiag import __version__
from k8sdiag.errors import BccMissing, BtfMissing, K8sdiagError, bcc_install_command, command_line
from k8sdiag.facts import AnyFact, Capability, DropKey, Drops, HostPod, NetnsOwner, Sample, Status
from k8sdiag.host.bpf import Compilation, bpf
from k8sdiag.host.btf import Btf, BtfError
from k8sdiag.host.instances import DIRECTORY, also_running, living
from k8sdiag.host.inventory import Inventory, netns
from k8sdiag.host.sensors.drops import DropSensor
from k8sdiag.host.symbols import KernelSymbols

SCHEMA = "k8sdiag/doctor/v1"
PROVOKED = 7
"""Datagrams sent to a closed port of the loopback address, to see whether the probe counts them all."""

_CHECKOUT = Path(__file__).resolve().parents[2]
_LIBC = ctypes.CDLL(None, use_errno=True)
_MEMBARRIER = {"x86_64": 324, "aarch64": 283}.get(platform.machine(), 324)
_MEMBARRIER_GLOBAL = 1  # include/uapi/linux/membarrier.h
_PROG_LOAD = 5
_PROG_TYPE_TRACING, _TRACE_FENTRY = 26, 24  # include/uapi/linux/bpf.h

_EVERYTHING = "everything that is watched live; traces can still be read"
_BTF_REMEDY = "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y; in a container, mount the host's /sys"


class Row(msgspec.Struct, frozen=True):
    """One check."""

    signal: str
    """What was checked, such as "drops" or "kprobes"."""
    status: Status
    required: bool
    """Whether nothing can be watched without it."""
    hook: str
    """What it rests on here: the file, the probe, the system call."""
    why: str = ""
    """What was found; for what is not "full", the reason."""
    blinds: str = ""
    """What cannot be seen, or is seen less well, because of it; empty for "full"."""
    remedy: str = ""
    """The command that mends it, or in words what would; empty where nothing need be done."""


class Report(msgspec.Struct, frozen=True):
    """All checks of one run."""

    schema: str
    tool: str
    """Version of k8sdiag."""
    node: str
    kernel: str
    """Kernel release. uname(2)."""
    architecture: str
    rows: tuple[Row, ...]

    @property
    def exit_code(self) -> int:
        """1 if something that is required is missing, else 0."""
        return int(any(row.required and row.status == "missing" for row in self.rows))


def examine(root: Path = Path("/")) -> Report:
    """Try everything. Takes about a second, changes nothing, and leaves nothing behind.

    `root` is where the host's files are seen. Needs no privileges: what they are needed for is then missing.
    """
    vmlinux, btf = _btf(root)
    symbols = KernelSymbols()
    rows = (
        _privileges(root),
        _lockdown(root),
        btf,
        _bcc(),
        *_drops(symbols, vmlinux, root),
        _quiescence(),
        _symbols(symbols, root),
        _tracefs(root),
        _kprobes(root),
        _fentry(vmlinux, root),
        _cookies(),
        _cgroups(root),
        *_pods(root),
        _instances(root),
        _statistics(root),
    )
    return Report(SCHEMA, __version__, platform.node(), platform.release(), platform.machine(), rows)


# ----------------------------------------------------------------------------------------------------
# What watching cannot do without


class _Privilege(NamedTuple):
    bit: int  # include/uapi/linux/capability.h
    blinds: str


_PRIVILEGES = {
    "CAP_BPF": _Privilege(39, "no probe can be loaded"),
    "CAP_PERFMON": _Privilege(38, "no probe can read kernel memory"),
    "CAP_SYS_ADMIN": _Privilege(21, "network namespaces cannot be entered: their devices and addresses stay unknown"),
    "CAP_NET_ADMIN": _Privilege(12, "parts of what namespaces say of their devices"),
    "CAP_SYS_PTRACE": _Privilege(19, "processes of other users: whose a namespace is stays unknown"),
    "CAP_SYSLOG": _Privilege(34, "names of kernel functions"),
}


_TO_LOAD = {"CAP_BPF", "CAP_PERFMON"}
"""Without these no probe loads. Watching also takes CAP_SYS_ADMIN: without namespaces nothing can be attributed."""


def _privileges(root: Path) -> Row:
    hook = "effective capabilities"
    has = _held(root)
    lacking = [name for name in _PRIVILEGES if name not in has]
    if not lacking:
        return Row("privileges", "full", True, hook, ", ".join(_PRIVILEGES))
    blinds = "; ".join(f"{name}: {_PRIVILEGES[name].blinds}" for name in lacking)
    status: Status = "missing" if "CAP_SYS_ADMIN" in lacking else "inferred"  # as host.live.require_permission()
    whose = "root of a user namespace, which counts only inside it," if _is_confined(root) else f"user {os.geteuid()}"
    why = f"{whose} lacks {', '.join(lacking)}"
    return Row("privileges", status, True, hook, why, blinds, _more_rights(root, lacking))


def _held(root: Path) -> set[str]:
    """Those of _PRIVILEGES that are effective. CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON (linux/capability.h)."""
    effective = 0
    if _is_confined(root):
        return set()
    for line in _text(root / "proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
    held = {name for name, privilege in _PRIVILEGES.items() if effective >> privilege.bit & 1}
    return held | _TO_LOAD if "CAP_SYS_ADMIN" in held else held


def _is_confined(root: Path) -> bool:
    """Whether this is a user namespace with fewer users than the machine (rootless containers)."""
    return _text(root / "proc/self/uid_map").split() not in ([], ["0", "0", "4294967295"])


def _more_rights(root: Path, capabilities: Sequence[str]) -> str:
    """How to get them: by sudo, or, for a root that was robbed of them (a container), from whoever starts it."""
    if _is_confined(root):
        return f"outside of the user namespace: sudo {command_line()}"
    if os.geteuid():
        return f"sudo {command_line()}"
    names = ", ".join(name.removeprefix("CAP_") for name in capabilities)
    return f"start the container with securityContext.capabilities.add: [{names}]"


def _lockdown(root: Path) -> Row:
    hook = "/sys/kernel/security/lockdown"
    text = _text(root / hook[1:]).strip()
    if not text:
        return Row(
            "lockdown", "full", True, hook, "no such file: securityfs is not mounted, or the kernel has no lockdown"
        )
    level = text.partition("[")[2].partition("]")[0] or text
    if level != "confidentiality":
        return Row("lockdown", "full", True, hook, f"{level}: BPF may read kernel memory")
    return Row(
        "lockdown", "missing", True, hook,
        "confidentiality: BPF programs may not read kernel memory",
        _EVERYTHING,
        "lockdown cannot be lowered while the kernel runs: boot with lockdown=integrity on its command line",
    )  # fmt: skip


def _btf(root: Path) -> tuple[Btf | None, Row]:
    hook = "/sys/kernel/btf/vmlinux"
    begin_s = time.perf_counter()
    try:
        vmlinux = Btf.vmlinux(root / "sys/kernel/btf")
    except BtfError as error:
        return None, Row(
            "btf", "missing", True, hook, str(error),
            "everything that is watched live: without it no probe finds its way in the kernel's memory",
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y; in a container, mount the host's /sys",
        )  # fmt: skip
    took_ms = (time.perf_counter() - begin_s) * 1000
    size = (root / hook[1:]).stat().st_size
    return vmlinux, Row("btf", "full", True, hook, f"{size / 1e6:.1f} MB, parsed in {took_ms:.0f} ms")


_FIND_BCC = """\
import json, sys
sys.path.insert(0, sys.argv[1])
from k8sdiag.host.loader import LoadError, find_bcc
try:
    bcc = find_bcc()
    print(json.dumps({"path": bcc.__path__[0], "version": bcc.__version__}))
except LoadError as error:
    print(json.dumps({"error": str(error)}))
"""


def _bcc() -> Row:
    """Imported in a child, as for a probe: this process stays free of LLVM."""
    child = subprocess.run(
        [sys.executable, "-I", "-W", "ignore::SyntaxWarning", "-c", _FIND_BCC, str(_CHECKOUT)],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found: dict[str, str] = json.loads(child.stdout)
    except ValueError:  # its import ended the process
        found = {"error": " ".join(child.stderr.split())[-500:] or f"exit code {child.returncode}"}
    if "error" not in found:
        return Row("bcc", "full", True, found["path"], f"version {found['version']}")
    return Row("bcc", "missing", True, "python3-bpfcc", found["error"], _EVERYTHING, bcc_install_command())


# ----------------------------------------------------------------------------------------------------
# The probe, really


class _Seen(NamedTuple):
    """What the probe made of the datagrams sent for it."""

    skbs: int
    samples: int
    """Samples of them that came through the ring buffer."""


def _drops(symbols: KernelSymbols, vmlinux: Btf | None, root: Path) -> Iterator[Row]:
    """Compile, load and attach the drop probe, let it count drops made on purpose, and detach it."""
    begin_s = time.perf_counter()
    sensor = DropSensor(Compilation("drops").begin(symbols))
    try:
        said = sensor.start()
        ready_s = time.perf_counter() - begin_s
        try:
            seen: _Seen | str = _provoke(sensor)
        except OSError as error:
            seen = f"not tried, because nothing can be sent on the loopback device here: {error.strerror}"
    except (K8sdiagError, OSError) as error:
        yield _refused(error, root)
        return
    finally:
        sensor.stop()
    for fact in said:
        if isinstance(fact, Capability) and fact.signal == "drops":
            yield _counted(fact, seen, ready_s)
    yield _sampled(seen)
    for fact in said:
        if isinstance(fact, Capability) and fact.signal in _CONNTRACK_BLINDS:
            yield _conntrack(fact)
    yield _losses(vmlinux)


def _refused(error: K8sdiagError | OSError, root: Path) -> Row:
    remedy = "please report what `k8sdiag doctor -o json` says"
    if isinstance(error, BccMissing):
        remedy = bcc_install_command()
    elif isinstance(error, BtfMissing):
        remedy = _BTF_REMEDY
    elif lacking := _TO_LOAD - _held(root):
        remedy = _more_rights(root, sorted(lacking))
    why = Exception.__str__(error)  # without the advice for those who only see the message
    return Row("drops", "missing", True, "raw_tracepoint:kfree_skb", why, _EVERYTHING, remedy)


def _counted(capability: Capability, seen: _Seen | str, ready_s: float) -> Row:
    took = f"ready in {ready_s:.2f} s"
    if isinstance(seen, str):
        return Row("drops", "inferred", True, capability.hook, f"{seen}; {took}", "whether counts are exact",
                   "ip link set lo up")  # fmt: skip
    counted = f"counted {seen.skbs} of {PROVOKED} drops made on loopback"
    if seen.skbs != PROVOKED:
        return Row(
            "drops", "missing", True, capability.hook, f"{counted}; {took}", "counts on this node cannot be relied on",
            "run it again on a quieter machine; if it stays so, please report it",
        )  # fmt: skip
    if capability.status == "full":
        return Row("drops", "full", True, capability.hook, f"{counted}; {took}")
    return Row("drops", capability.status, True, capability.hook, f"{counted}; {took}; {capability.why}",
               "causes are told by function names only", "boot a kernel from 5.17 on")  # fmt: skip


def _sampled(seen: _Seen | str) -> Row:
    hook = "BPF ring buffer"
    if isinstance(seen, _Seen) and seen.samples:
        return Row("samples", "full", False, hook, f"{seen.samples} of {PROVOKED} drops came with headers and stack")
    why = seen if isinstance(seen, str) else f"none of {PROVOKED} drops came with headers and stack"
    return Row(
        "samples", "missing", False, hook, why, "headers and call stacks of single packets; counts are whole", ""
    )


_CONNTRACK_BLINDS = {
    "conntrack-state": "whether a dropped packet's connection was new or confirmed",
    "conntrack": "proof that conntrack refused a packet, and whose clashes it resolved",
}


def _conntrack(capability: Capability) -> Row:
    signal, status, hook = capability.signal, capability.status, capability.hook
    if status == "full":
        return Row(signal, "full", False, hook)
    remedy = "" if status == "inferred" else "modprobe nf_conntrack, then start k8sdiag anew"
    return Row(signal, status, False, hook, capability.why, _CONNTRACK_BLINDS[signal], remedy)


def _losses(vmlinux: Btf | None) -> Row:
    """Events a program missed are counted from 5.12 on (9ed9e9ba2337); a kernel that does so has the member."""
    hook = "bpf_prog_info.recursion_misses"
    if vmlinux is not None and vmlinux.offset("bpf_prog_info", "recursion_misses") is not None:
        return Row("losses", "full", False, hook)
    return Row(
        "losses", "counters", False, hook, "this kernel does not count events that a program missed",
        "drops that happened inside the probe's own run: found by comparing with SNMP and softnet counters only",
        "boot a kernel from 5.12 on",
    )  # fmt: skip


def _provoke(sensor: DropSensor) -> _Seen:
    """Send datagrams to a port that nobody has, and find them in what is counted. Raises OSError where none can go."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken,
    ):
        sender.bind(("127.0.0.1", 0))
        taken.bind(("127.0.0.1", 0))
        flow = "127.0.0.1", sender.getsockname()[1], "127.0.0.1", taken.getsockname()[1]
        taken.close()
        facts: list[AnyFact] = [*sensor.read()]
        for _ in range(PROVOKED):
            sender.sendto(b"k8sdiag doctor", flow[2:])
        # Loopback delivers before sendto() returns, unless softirq work was put off.
        give_up_s = time.monotonic() + 1.0
        while time.monotonic() < give_up_s:
            facts += sensor.read()
            seen = _seen(facts, flow)
            if seen.skbs >= PROVOKED and seen.samples:
                break
            time.sleep(0.02)
    return seen


def _seen(facts: Sequence[AnyFact], flow: tuple[str, int, str, int]) -> _Seen:
    keys = {
        fact.id
        for fact in facts
        if isinstance(fact, DropKey) and (fact.src, fact.sport, fact.dst, fact.dport) == flow and fact.protocol == 17
    }
    skbs = sum(
        count
        for fact in facts
        if isinstance(fact, Drops)
        for key, count in zip(fact.key, fact.skbs, strict=True)
        if key in keys
    )
    return _Seen(skbs, sum(isinstance(fact, Sample) and fact.key in keys for fact in facts))


# ----------------------------------------------------------------------------------------------------
# What makes counts and causes better


def _quiescence() -> Row:
    """How the reader knows that no program still writes to the maps it drains (host.bpf.GracePeriod)."""
    if _LIBC.syscall(_MEMBARRIER, _MEMBARRIER_GLOBAL, 0, 0) >= 0:
        return Row("grace-period", "full", False, "membarrier(2)")
    why = f"membarrier(2): {os.strerror(ctypes.get_errno())} (so on kernels booted with nohz_full)"
    return Row("grace-period", "full", False, "update of a map of maps", why)


def _symbols(symbols: KernelSymbols, root: Path) -> Row:
    restrict = _text(root / "proc/sys/kernel/kptr_restrict").strip() or "unknown"
    hook = "/proc/kallsyms"
    if not symbols.hidden:
        return Row("symbols", "full", False, hook, f"kernel.kptr_restrict is {restrict}")
    blinds = "names of the functions that drop (shown as numbers), netfilter hooks (UNKNOWN), causes told by place"
    remedy = "sysctl -w kernel.kptr_restrict=1" if restrict == "2" else _more_rights(root, ["CAP_SYSLOG"])
    return Row(
        "symbols", "missing", False, hook, f"kernel.kptr_restrict is {restrict}: addresses read as zero", blinds, remedy
    )


def _tracefs(root: Path) -> Row:
    for place in ("sys/kernel/tracing", "sys/kernel/debug/tracing"):
        if (root / place / "events").is_dir():
            return Row("tracefs", "full", False, f"/{place}", "mounted, and not needed: BTF says the same")
    return Row(
        "tracefs", "missing", False, "/sys/kernel/tracing", "not mounted: done without, BTF says the same",
        "nothing", "",
    )  # fmt: skip


_BY_FUNCTION_HOOK = "proof of conntrack refusals: they are inferred from drops and the CPU's conntrack statistics"


_UNUSED_HOOK = "nothing yet: conntrack's functions are probed by kprobes alone"


def _kprobes(root: Path) -> Row:
    hook = "/sys/bus/event_source/devices/kprobe/type"
    if (root / hook[1:]).exists():
        return Row("kprobes", "full", False, hook)
    return Row(
        "kprobes", "missing", False, hook, "this kernel is built without CONFIG_KPROBES, or /sys is not the host's",
        _BY_FUNCTION_HOOK, "boot a kernel built with CONFIG_KPROBES=y",
    )  # fmt: skip


def _fentry(vmlinux: Btf | None, root: Path) -> Row:
    """Load the smallest fentry program there is, on a function every kernel has; it is never attached."""
    function = "kfree_skb_list_reason"
    type_id = 0
    if vmlinux is not None:
        # 5.17 gave the function its reason and its name
        type_id = vmlinux.function(function) or vmlinux.function("kfree_skb_list") or 0
    remedy = "boot a kernel that permits BPF_PROG_TYPE_TRACING (x86-64 from 5.5 on, arm64 from 6.0 on)"
    if lacking := _TO_LOAD - _held(root):
        remedy = _more_rights(root, sorted(lacking))
    hook = "BPF_PROG_TYPE_TRACING"
    if not type_id:
        return Row("fentry", "missing", False, hook, "no type information of kernel functions", _UNUSED_HOOK, remedy)
    instructions = ctypes.create_string_buffer(bytes.fromhex("b7000000000000009500000000000000"), 16)  # return 0
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "<IIQQIIQII16sIIIIQIIQIII",
        _PROG_TYPE_TRACING, 2, ctypes.addressof(instructions), ctypes.addressof(licence),
        0, 0, 0, 0, 0, b"k8sdiag_doctor", 0, _TRACE_FENTRY, 0, 0, 0, 0, 0, 0, 0, type_id, 0,
    )  # fmt: skip
    try:
        program, _ = bpf(_PROG_LOAD, attributes)
    except OSError as error:
        return Row("fentry", "missing", False, hook, f"refused: {error.strerror}", _UNUSED_HOOK, remedy)
    os.close(program)
    return Row("fentry", "full", False, hook)


# ----------------------------------------------------------------------------------------------------
# Who is who


def _cookies() -> Row:
    hook = "SO_NETNS_COOKIE"
    if netns.cookie_here():
        return Row("netns-cookies", "full", False, hook)
    return Row(
        "netns-cookies", "inferred", False, hook, "this kernel has none: namespaces are told apart by inode and time",
        "whose a namespace was, where its inode was given to a new one within a second", "boot a kernel from 5.14 on",
    )  # fmt: skip


def _cgroups(root: Path) -> Row:
    types = [line.partition(" - ")[2].split(" ")[0] for line in _text(root / "proc/self/mountinfo").splitlines()]
    versions = [name for name, kind in (("v1", "cgroup"), ("v2", "cgroup2")) if kind in types]
    if versions:
        return Row("cgroups", "full", False, "/proc/PID/cgroup", f"cgroup {' and '.join(versions)}")
    if _text(root / "proc/self/cgroup").strip():
        return Row(
            "cgroups", "full", False, "/proc/PID/cgroup", "no cgroup file system is mounted here, and none is needed"
        )
    return Row(
        "cgroups", "missing", False, "/proc/PID/cgroup", "no control groups, or not the host's /proc",
        "which pod a process belongs to", f"{command_line()} --host-root /proc/1/root",
    )  # fmt: skip


def _pods(root: Path) -> Iterator[Row]:
    inventory = Inventory(root)
    owners: dict[str, str] = {}
    names: set[str] = set()
    for fact in inventory.facts(time.clock_gettime_ns(time.CLOCK_BOOTTIME)):
        if isinstance(fact, HostPod) or (isinstance(fact, NetnsOwner) and fact.kind == "pod"):
            owners[fact.uid] = fact.namespace
        elif isinstance(fact, NetnsOwner) and fact.kind == "netns":
            names.add(fact.name)
    closed = _unreadable(root)
    found = (
        f"{_count(len(owners), 'pod')}, {_count(len(inventory.inodes), 'network namespace')}, "
        f"{len(names)} of them with a name under /run/netns"
    )
    hook = "/proc/PID/ns/net, /proc/PID/cgroup"
    if inventory.inodes and not closed:
        yield Row("pods", "full", False, hook, found)
    else:
        status: Status = "inferred" if inventory.inodes else "missing"
        lacking = {"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"} - _held(root)
        why = f"{found}; {_count(closed, 'process', 'es')} may not be looked at"
        remedy = _more_rights(root, sorted(lacking)) if lacking else ""
        yield Row("pods", status, False, hook, why, "whose the namespaces are that could not be seen", remedy)
    yield _pod_names(root, owners)


def _pod_names(root: Path, owners: dict[str, str]) -> Row:
    hook = "/var/log/pods"
    unnamed = [uid for uid, namespace in owners.items() if not namespace]
    remedy = f"{command_line()} --host-root DIR, where DIR/var/log/pods is the node's"
    try:
        entries = len(os.listdir(root / hook[1:]))
    except OSError as error:
        why = f"{error.strerror}" + ("" if owners else "; no pods run here either")
        return Row("pod-names", "missing", False, hook, why, "names of pods: they are shown by their uid", remedy)
    if not unnamed:
        return Row("pod-names", "full", False, hook, _count(entries, "entry", "", "entries"))
    why = f"{len(unnamed)} of {_count(len(owners), 'pod')} have no directory there"
    return Row("pod-names", "inferred", False, hook, why, "names of those pods: they are shown by their uid", remedy)


def _unreadable(root: Path) -> int:
    """Processes whose network namespace we may not ask for."""
    closed = 0
    for name in os.listdir(root / "proc"):
        if name.isdigit():
            try:
                os.stat(root / "proc" / name / "ns/net")
            except PermissionError:
                closed += 1
            except OSError:  # gone
                pass
    return closed


# ----------------------------------------------------------------------------------------------------
# Beside the watch


def _instances(root: Path) -> Row:
    return Row(
        "instances", "full", False, f"/{DIRECTORY}", also_running(living(root / DIRECTORY)) or "no other is running"
    )


def _statistics(root: Path) -> Row:
    hook = "kernel.bpf_stats_enabled"
    if _text(root / "proc/sys/kernel/bpf_stats_enabled").strip() == "1":
        return Row("probe-cost", "full", False, hook)
    return Row(
        "probe-cost", "missing", False, hook, "off, as usual: measuring slows every BPF program a little",
        "how often the probe runs, and for how long (self.bpf_runs, self.bpf_ns)",
        "sysctl -w kernel.bpf_stats_enabled=1",
    )  # fmt: skip


def _text(path: Path) -> str:
    """Content of a small file, empty where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _count(number: int, singular: str, ending: str = "s", plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + ending}"


# ----------------------------------------------------------------------------------------------------
# As text

_INDENT = " " * 26


def text(report: Report, width: int) -> list[str]:
    """Lines for a terminal, none wider than `width` but commands, which are not broken so that they can be copied."""
    lines = [f"k8sdiag {report.tool} on {report.node}, kernel {report.kernel} ({report.architecture})", ""]
    for row in report.rows:
        head = f"{row.status:9}{row.signal:17}"
        lines += _wrapped(row.hook, width, head)
        if row.why:
            lines += _wrapped(row.why, width, _INDENT)
        if row.status != "full" and row.blinds:
            lines += _wrapped(f"blinds: {row.blinds}", width, _INDENT)
        if row.remedy:
            lines.append(f"{_INDENT}do: {row.remedy}")
    missing = [row.signal for row in report.rows if row.required and row.status == "missing"]
    verdict = (
        f"Watching is not possible here: {', '.join(missing)} missing." if missing else "This node can be watched."
    )
    return [*lines, "", *_wrapped(verdict, width, "")]


def _wrapped(words: str, width: int, first: str) -> list[str]:
    return textwrap.wrap(
        words, max(width, len(_INDENT) + 20), initial_indent=first, subsequent_indent=_INDENT if first else "",
        break_on_hyphens=False,
    )  # fmt: skip
