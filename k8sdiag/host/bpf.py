"""BPF programs in the kernel, seen from user space: load one, switch and drain its maps, read its losses.

Only bpf(2) is used here. The compiler is a process of its own (loader.py) that hands over descriptors, so this
process never holds LLVM, and what differs between releases of bcc stays out of the counting.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from k8sdiag.errors import BccMissing, BtfMissing, NotPermitted, ProbeRefused
from k8sdiag.host import wire
from k8sdiag.host.symbols import KernelSymbols

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBC = ctypes.CDLL(None, use_errno=True)
_BPF = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine, 321)
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}.get(os.uname().machine, 298)
_MEMBARRIER = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine, 324)
_MAP_CREATE, _MAP_UPDATE, _PROG_INFO, _RAW_TRACEPOINT_OPEN, _DRAIN_BATCH = 0, 2, 15, 17, 25
_MAP_LOOKUP = 1
_ARRAY, _ARRAY_OF_MAPS = 2, 12
_PAGE = mmap.PAGESIZE


def require_permission() -> None:
    """Raises NotPermitted unless this process may load BPF programs and look into other namespaces."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    has = {name: bool(effective >> bit & 1) for name, bit in _CAPABILITIES.items()}
    if not has["CAP_SYS_ADMIN"]:
        raise NotPermitted([name for name, there in has.items() if not there], is_root=os.geteuid() == 0)


# include/uapi/linux/capability.h. CAP_SYS_ADMIN is needed for setns(2); it includes what CAP_BPF and CAP_PERFMON allow.
_CAPABILITIES = {
    "CAP_SYS_ADMIN": 21,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}


def probes_directory() -> Path:
    """Where the C sources are: inside an installed package, beside it in a checkout."""
    inside = _PACKAGE / "probes"
    return inside if inside.is_dir() else _PACKAGE.parent / "probes"


def possible_cpus(text: str | None = None) -> int:
    """How many values a per-CPU map has: CPUs that could ever be plugged in. /sys/devices/system/cpu/possible."""
    text = Path("/sys/devices/system/cpu/possible").read_text() if text is None else text
    spans = (span.partition("-")[::2] for span in text.strip().split(","))
    return sum(int(last or first) - int(first) + 1 for first, last in spans)


def bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """bpf(2): the result and the attributes as the kernel left them. Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = _LIBC.syscall(_BPF, command, buffer, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result, buffer.raw


class ProgramRuns(NamedTuple):
    """bpf_prog_info of a program. `runs` and `run_ns` are counted only while kernel.bpf_stats_enabled is 1."""

    runs: int
    run_ns: int
    misses: int
    """Events that were skipped because they interrupted the program itself; from 5.12."""


class BpfMap:
    """A map of the loaded probe. `cpus` is 1 for maps that are not per-CPU."""

    def __init__(self, fd: int, key_size: int, value_size: int, cpus: int = 1) -> None:
        self.fd = fd
        self._key_size = key_size
        self._value_size = value_size * cpus
        self._batch = 2048

    def update(self, key: bytes, value: bytes) -> None:
        keys, values = ctypes.create_string_buffer(key), ctypes.create_string_buffer(value, len(value))
        bpf(_MAP_UPDATE, struct.pack("<IIQQQ", self.fd, 0, _address(keys), _address(values), 0))

    def lookup(self, key: bytes) -> bytes:
        keys, values = ctypes.create_string_buffer(key), ctypes.create_string_buffer(self._value_size)
        bpf(_MAP_LOOKUP, struct.pack("<IIQQQ", self.fd, 0, _address(keys), _address(values), 0))
        return values.raw

    def drain(self) -> Iterator[tuple[bytes, bytes]]:
        """Chunks of (keys, values of all CPUs), deleted from the map. No program may be writing to it.

        BPF_MAP_LOOKUP_AND_DELETE_BATCH, from 5.6 for hash maps.
        """
        cursor_in, cursor_out = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
        first = True
        while True:
            count = self._batch
            keys = ctypes.create_string_buffer(count * self._key_size)
            values = ctypes.create_string_buffer(count * self._value_size)
            attributes = ctypes.create_string_buffer(
                struct.pack(
                    "<QQQQIIQQ",
                    0 if first else _address(cursor_in), _address(cursor_out), _address(keys), _address(values),
                    count, self.fd, 0, 0,
                )
            )  # fmt: skip
            result = _LIBC.syscall(_BPF, _DRAIN_BATCH, attributes, 56)
            number = ctypes.get_errno() if result < 0 else 0
            if number == errno.ENOSPC:  # one bucket holds more than the whole buffer
                self._batch *= 2
                continue
            if number not in (0, errno.ENOENT):
                raise OSError(number, os.strerror(number))
            got = struct.unpack_from("<I", attributes.raw, 32)[0]
            if got:
                yield keys.raw[: got * self._key_size], values.raw[: got * self._value_size]
            if number == errno.ENOENT:
                return
            first = False
            ctypes.memmove(cursor_in, cursor_out, 8)


class RingBuffer:
    """The consumer's end of a BPF ring buffer (kernel/bpf/ringbuf.c describes the two position pages)."""

    def __init__(self, fd: int, data_bytes: int) -> None:
        self._mask = data_bytes - 1
        self._consumer = mmap.mmap(fd, _PAGE)
        self._data = mmap.mmap(fd, _PAGE + 2 * data_bytes, prot=mmap.PROT_READ, offset=_PAGE)
        self._consumed = memoryview(self._consumer).cast("Q")
        self._produced = memoryview(self._data)[:8].cast("Q")

    def read(self) -> Iterator[bytes]:
        """Records that are complete by now."""
        at, end = self._consumed[0], self._produced[0]
        while at < end:
            place = _PAGE + (at & self._mask)
            header = struct.unpack_from("<I", self._data, place)[0]
            if header & 0x80000000:  # still being written
                break
            length = header & 0x3FFFFFFF
            if not header & 0x40000000:  # not discarded
                yield self._data[place + 8 : place + 8 + length]
            at += (length + 8 + 7) & ~7
        self._consumed[0] = at

    def close(self) -> None:
        self._consumed.release()
        self._produced.release()
        self._consumer.close()
        self._data.close()


class Compilation:
    """A probe on its way into the kernel, compiled by a process of its own (loader.py) while this one goes on.

    The process starts with the object; it warms up while the caller reads the symbol table for begin().
    """

    def __init__(self, probe: str) -> None:
        self._probe = probe
        self._words = os.fdopen(os.memfd_create("k8sdiag"), "w+b")
        self._channel, theirs = socket.socketpair()
        with theirs:
            start = "import sys; sys.path.insert(0, sys.argv.pop()); from k8sdiag.host.loader import main; main()"
            here = str(_PACKAGE.parent)
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-W", "ignore::SyntaxWarning", "-c", start, str(theirs.fileno()), here],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                start_new_session=True,  # Ctrl-C is for us; the child ends with us
            )

    def begin(self, symbols: KernelSymbols) -> Compilation:
        """Tell the process where the functions stand that the probe has to know."""
        self.symbols = symbols
        from k8sdiag.host.loader import SYMBOLS

        spans = symbols.spans(SYMBOLS)
        request = {
            "probe": self._probe,
            "probes": str(probes_directory()),
            "spans": spans,
            "defines": wire.map_sizes(possible_cpus()),
        }
        with contextlib.suppress(OSError):  # it has ended: result() says why
            self._channel.sendall(json.dumps(request).encode() + b"\n")
        return self

    def result(self) -> tuple[dict[str, Any], list[int]]:
        """What the process found out of this kernel, and descriptors: of the programs, then of their maps.

        Raises BccMissing, BtfMissing or ProbeRefused.
        """
        line = b""
        descriptors: list[int] = []
        try:
            line, descriptors, _, _ = socket.recv_fds(self._channel, 1 << 20, 32)
            while line and not line.endswith(b"\n"):
                line += self._channel.recv(1 << 20)
        except OSError:
            pass
        finally:
            self.cancel()
        self._words.seek(0)
        said = self._words.read()[-4000:].decode(errors="replace").strip()
        self._words.close()
        if not line:
            raise ProbeRefused("the compiler ended early: " + said)
        answer = json.loads(line)
        if "error" in answer:
            raise _refusal(answer["error"], f"{answer['text']}\n{said}".strip())
        return answer, list(descriptors)

    def cancel(self) -> None:
        """End the process: its answer is here, or never comes; the exit handlers of LLVM are not waited for."""
        self._channel.close()
        self._child.kill()
        self._child.wait()


class Probe:
    """A loaded and attached probe. Closing its descriptors is what detaches it: no state stays in the kernel."""

    def __init__(self, compilation: Compilation) -> None:
        self.about, descriptors = compilation.result()
        programs = 1 + len(self.about["kprobes"])
        self.program, *self._kprobe_programs = descriptors[:programs]
        self.map_fds: dict[str, int] = dict(zip(self.about["maps"], descriptors[programs:], strict=True))
        self._links: list[int] = []

    def attach(self, tracepoint: str) -> None:
        """Start counting. Raises ProbeRefused with the kernel's reason."""
        name = ctypes.create_string_buffer(tracepoint.encode())
        try:
            link, _ = bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QII", _address(name), self.program, 0))
        except OSError as error:
            raise ProbeRefused(f"tracepoint {tracepoint}: {error.strerror}") from error
        self._links.append(link)

    def attach_kprobes(self) -> str:
        """Attach what was loaded for kernel functions: all or none. Returns why one could not be, "" for all."""
        links: list[int] = []
        for program, (function, at_return) in zip(self._kprobe_programs, self.about["kprobes"], strict=True):
            try:
                links.append(_kprobe(program, function, at_return=at_return))
            except OSError as error:
                # Half of them would tell half: a failure whose clash nobody saw.
                for link in links:
                    os.close(link)
                return f"{function}: {error.strerror}"
        self._links += links
        return ""

    def runs(self) -> ProgramRuns:
        """Of all programs together; misses of the tracepoint's alone: a kprobe that was skipped is no drop unseen."""
        infos = []
        for program in (self.program, *self._kprobe_programs):
            info = ctypes.create_string_buffer(256)
            bpf(_PROG_INFO, struct.pack("<IIQ", program, 256, _address(info)))
            run_ns, runs, misses = struct.unpack_from("<QQQ", info.raw, 192)
            infos.append(ProgramRuns(runs, run_ns, misses))
        return ProgramRuns(sum(info.runs for info in infos), sum(info.run_ns for info in infos), infos[0].misses)

    def detach(self) -> None:
        for link in self._links:
            os.close(link)
        self._links.clear()

    def close(self) -> None:
        self.detach()
        for fd in (self.program, *self._kprobe_programs, *self.map_fds.values()):
            os.close(fd)
        self.map_fds = {}


def _kprobe(program: int, function: str, *, at_return: bool) -> int:
    """Run a program when a kernel function is entered or returns; closing the descriptor ends it. Raises OSError.

    perf_event_open(2) with the kprobe PMU, from 4.17: nothing is left in tracefs by a process that is killed.
    """
    kind = int(Path("/sys/bus/event_source/devices/kprobe/type").read_text())
    name = ctypes.create_string_buffer(function.encode())
    size = 72  # PERF_ATTR_SIZE_VER1, the first with config2
    attributes = ctypes.create_string_buffer(
        struct.pack("<IIQQQQQIIQQ", kind, size, int(at_return), 1, 0, 0, 0, 1, 0, _address(name), 0), size
    )
    fd = _LIBC.syscall(_PERF_EVENT_OPEN, attributes, -1, 0, -1, 8)  # of every process, on any CPU; close on exec
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        fcntl.ioctl(fd, 0x40042408, program)  # PERF_EVENT_IOC_SET_BPF
        fcntl.ioctl(fd, 0x2400, 0)  # PERF_EVENT_IOC_ENABLE
    except OSError:
        os.close(fd)
        raise
    return int(fd)


class GracePeriod:
    """Waits until every run of a BPF program that had begun is over.

    membarrier(MEMBARRIER_CMD_GLOBAL) is synchronize_rcu(), under which programs run. It is refused on kernels
    booted with nohz_full; there, an update of a map of maps waits for the same (maybe_wait_bpf_programs()).
    """

    def __init__(self) -> None:
        self._maps: tuple[int, int] | None = None
        if _LIBC.syscall(_MEMBARRIER, 1, 0, 0) < 0:
            inner, _ = bpf(_MAP_CREATE, struct.pack("<IIII", _ARRAY, 4, 8, 1) + bytes(56))
            outer, _ = bpf(_MAP_CREATE, struct.pack("<IIIIII", _ARRAY_OF_MAPS, 4, 4, 1, 0, inner) + bytes(48))
            self._maps = inner, outer

    def wait(self) -> None:
        if self._maps is None:
            _LIBC.syscall(_MEMBARRIER, 1, 0, 0)
        else:
            inner, outer = self._maps
            BpfMap(outer, 4, 4).update(bytes(4), struct.pack("<I", inner))

    def close(self) -> None:
        for fd in self._maps or ():
            os.close(fd)
        self._maps = None


def _address(buffer: Any) -> int:
    return ctypes.addressof(buffer)


def _refusal(kind: str, text: str) -> Exception:
    if kind == "bcc":
        return BccMissing(text)
    if kind == "btf":
        return BtfMissing(text)
    return ProbeRefused(_why_refused(text))


def _why_refused(text: str) -> str:
    lockdown = Path("/sys/kernel/security/lockdown")
    if lockdown.exists() and "[confidentiality]" in lockdown.read_text():
        return "kernel lockdown is at confidentiality, where BPF may not read kernel memory. " + text
    return text
