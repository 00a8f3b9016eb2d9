"""Compile and load one probe, in a process of its own that hands the file descriptors over and ends.

LLVM takes about 100 MB and stays in whatever process used it, so the process that compiles is not the one that
watches. It needs the standard library and the distribution's bcc only. What clang and the verifier write to
standard error (LLVM may even abort) the parent catches in a file and reports.

    parent ── {"probe": "drops", "spans": {…}, "defines": {…}} ──►  this process
    parent ◄─ {"maps": {name: {…}}, "reasons": {…}, …} + descriptors ──
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from k8sdiag.host.btf import SYSFS, Btf, BtfError

BCC_DIRECTORIES = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib/python3.*/site-packages",
    "/usr/lib64/python3.*/site-packages",
)

# Which members a probe reads. Those in OPTIONAL may be absent: the probe does without (#ifdef OFF_…).
MEMBERS = (
    *(
        ("sk_buff", member)
        for member in (
            "dev", "sk", "_skb_refdst", "_nfct", "len", "skb_iif", "protocol",
            "network_header", "tail", "end", "head",
        )
    ),
    ("net_device", "ifindex"),
    ("net_device", "nd_net.net"),
    ("net", "ns.inum"),
    ("net", "net_cookie"),
    ("dst_entry", "dev"),
    ("dst_entry", "input"),
    ("sock_common", "skc_net.net"),
    ("skb_shared_info", "gso_segs"),
)  # fmt: skip
OPTIONAL = {("sk_buff", "_nfct"), ("net", "net_cookie")}
# Of conntrack, which may be a module that is not loaded. A probe does without a group of which anything is missing.
CONNTRACK_GROUPS: tuple[tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]], ...] = (
    ("state", (("nf_conn", "status"),), ()),
    ("netns", (("nf_conn", "ct_net.net"),), ()),
    (
        "tuples",
        (
            ("nf_conn", "tuplehash"),
            ("nf_conntrack_tuple_hash", "tuple"),
            *(("nf_conntrack_tuple", member) for member in ("src.u3", "src.u", "dst.u3", "dst.u")),
        ),
        ("nf_conntrack_tuple_hash",),
    ),
    (
        "statistics",
        (
            ("net", "ct.stat"),
            ("bpf_array", "pptrs"),
            *(("ip_conntrack_stat", member) for member in ("insert_failed", "drop")),
        ),
        (),
    ),
    (
        "walk",
        (
            ("nf_conn", "timeout"),
            ("nf_conn", "proto.tcp.state"),
            ("nf_conntrack_tuple_hash", "hnnode"),
            ("hlist_nulls_node", "next"),
            ("hlist_nulls_node", "pprev"),
            *(("nf_conntrack_tuple", member) for member in ("src.l3num", "dst.protonum", "dst.dir")),
        ),
        (),
    ),
    ("zone", (("nf_conn", "zone"), ("nf_conntrack_zone", "id"), ("nf_conntrack_zone", "dir")), ()),
)

# The innermost of these in the stack tells the netfilter hook (net/ipv4, net/ipv6, net/bridge, net/core/dev.c).
HOOK_FUNCTIONS = {
    "PRE_ROUTING": (
        "ip_rcv",
        "ipv6_rcv",
        "ip_list_rcv",
        "ipv6_list_rcv",
        "br_nf_pre_routing",
        "br_nf_pre_routing_ipv6",
    ),
    "LOCAL_IN": ("ip_local_deliver", "ip6_input"),
    "FORWARD": ("ip_forward", "ip6_forward", "br_nf_forward", "br_nf_forward_ip"),
    "LOCAL_OUT": ("__ip_local_out", "__ip6_local_out", "ip6_xmit", "raw_sendmsg", "rawv6_sendmsg"),
    "POST_ROUTING": ("ip_output", "ip_mc_output", "ip6_output", "br_nf_post_routing"),
    "INGRESS": ("__netif_receive_skb_core",),
    "EGRESS": ("__dev_queue_xmit",),
    "BRIDGE": ("br_handle_frame", "br_handle_frame_finish", "__br_forward", "br_forward_finish", "br_pass_frame_up"),
}  # br_nf_* call the hooks of IP for what crosses a bridge (net.bridge.bridge-nf-call-iptables)
ROUTE_INPUTS = ("ip_local_deliver", "ip6_input", "ip_forward", "ip6_forward")
RECURSION_GUARD = "bpf_prog_inc_misses_counter"
"""There since raw tracepoint programs are never run inside themselves (6.1): counts need no atomic addition."""
NETFILTER_FUNCTIONS = ("nf_hook_slow", "nf_hook_slow_list", "nft_do_chain")
KPROBED_FUNCTIONS = ("__nf_conntrack_confirm", "nf_ct_resolve_clash", "early_drop")
SYMBOLS = sorted(
    {*sum(HOOK_FUNCTIONS.values(), ()), *ROUTE_INPUTS, *NETFILTER_FUNCTIONS, *KPROBED_FUNCTIONS, RECURSION_GUARD}
)


class LoadError(Exception):
    """`kind` is one of bcc, btf, compile, refused: the parent makes the user's message of it."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def find_bcc() -> ModuleType:
    """The distribution's bcc, wherever this interpreter comes from. Raises LoadError("bcc").

    PyPI has an unrelated package of that name, so it is told apart by its BPF class. Only that one package is
    taken from the distribution's directory: the rest of it may be built for another interpreter.
    """
    try:
        bcc: ModuleType = importlib.import_module("bcc")

        if hasattr(bcc, "BPF"):
            return bcc
    except ImportError:
        pass
    for name in [name for name in sys.modules if name == "bcc" or name.startswith("bcc.")]:
        del sys.modules[name]
    places = [os.environ.get("K8SDIAG_BCC_PATH", "")]
    places += [place for pattern in BCC_DIRECTORIES for place in sorted(glob.glob(pattern), reverse=True)]
    for place in filter(None, places):
        init = Path(place, "bcc", "__init__.py")
        if not init.exists():
            continue
        stat = init.stat()
        if stat.st_uid not in (0, os.geteuid()) or stat.st_mode & 0o022:
            raise LoadError("bcc", f"{init} may be written by others than root: not loaded")
        spec = importlib.util.spec_from_file_location("bcc", init, submodule_search_locations=[str(init.parent)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bcc"] = module
        sys.dont_write_bytecode = True
        try:
            spec.loader.exec_module(module)
        except (ImportError, OSError, AttributeError) as error:
            raise LoadError("bcc", f"{init.parent} does not load: {error}") from error
        return module
    raise LoadError("bcc", "no bcc package found in " + ", ".join(BCC_DIRECTORIES))


def type_defines() -> tuple[list[str], dict[str, Any]]:
    """The -D options that BTF gives, and what else of it the parent wants to know. Raises LoadError("btf")."""
    try:
        vmlinux = Btf.vmlinux()
    except BtfError as error:
        raise LoadError("btf", str(error)) from error
    defines, offsets = [], {}
    for record, path in MEMBERS:
        # Where user space cannot ask for cookies (before 5.14), the probe does without them too.
        at = vmlinux.offset(record, path) if path != "net_cookie" or _has_cookies() else None
        if at is None and (record, path) not in OPTIONAL:
            raise LoadError("btf", f"this kernel's BTF has no {record}.{path}")
        if at is not None:
            offsets[record, path] = at
            defines.append(f"-DOFF_{record}_{path.replace('.', '_')}={at}")
    if ("sk_buff", "_nfct") not in offsets:
        raise LoadError("btf", "this kernel is built without conntrack")
    # dev and sk stand far in front of the others: what lies between would fill the program's stack.
    apart = ("dev", "sk")
    defines += _window(
        "SKB", [at for (record, name), at in offsets.items() if record == "sk_buff" and name not in apart]
    )
    device = [at for (record, _), at in offsets.items() if record == "net_device"]
    if max(device) - min(device) <= 56:
        defines += _window("DEV", device)
    args = vmlinux.tracepoint_args("kfree_skb")
    if args is None:
        raise LoadError("btf", "this kernel has no tracepoint kfree_skb")
    defines.append(f"-DKFREE_ARGS={args}")
    reasons = {name.removeprefix("SKB_DROP_REASON_").removeprefix("SKB_"): number
               for name, number in vmlinux.enum("skb_drop_reason").items()}  # fmt: skip
    if "NETFILTER_DROP" in reasons:
        defines.append(f"-DREASON_NETFILTER_DROP={reasons['NETFILTER_DROP']}")
    conntrack_defines, known = _conntrack_defines(vmlinux)
    about = {
        "reasons": {str(number): name for name, number in reasons.items()},
        "arguments": args,
        "conntrack": known,
    }
    return defines + conntrack_defines, about


def _has_cookies() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return bool(probe.getsockopt(socket.SOL_SOCKET, 71, 8))  # SO_NETNS_COOKIE
        except OSError:
            return False


def _conntrack_defines(vmlinux: Btf) -> tuple[list[str], list[str]]:
    """The -D options for what is known of conntrack's types, and the names of the groups that are complete."""
    conntrack = vmlinux.module("nf_conntrack", SYSFS) or vmlinux
    defines, known = [], []
    for group, members, records in CONNTRACK_GROUPS:
        offsets = {(record, path): conntrack.offset(record, path) for record, path in members}
        sizes = {record: conntrack.size(record) for record in records}
        if None in offsets.values() or None in sizes.values():
            continue
        known.append(group)
        defines += [f"-DOFF_{record}_{path.replace('.', '_')}={at}" for (record, path), at in offsets.items()]
        defines += [f"-DSIZE_{record}={size}" for record, size in sizes.items()]
    chain = conntrack.offset("ip_conntrack_stat", "chaintoolong")
    if chain is not None:
        known.append("chains")
        defines.append(f"-DOFF_ip_conntrack_stat_chaintoolong={chain}")
    return defines, known


def symbol_defines(spans: dict[str, tuple[int, int]]) -> list[str]:
    """The -D options that /proc/kallsyms gives: where the functions stand that tell a netfilter hook."""
    hooks = [
        f"X({spans[name][0]}ULL,{spans[name][1]}ULL,HOOK_{hook})"
        for hook, names in HOOK_FUNCTIONS.items()
        for name in names
        if name in spans
    ]
    netfilter = [f"X({spans[name][0]}ULL,{spans[name][1]}ULL)" for name in NETFILTER_FUNCTIONS if name in spans]
    return [
        *(f"-DSYM_{name}={spans[name][0] if name in spans else 0}ULL" for name in ROUTE_INPUTS),
        "-DHOOK_RANGES(X)=" + " ".join(hooks),
        "-DNETFILTER_RANGES(X)=" + " ".join(netfilter),
        *(["-DRECURSION_SAFE"] if RECURSION_GUARD in spans else []),
    ]


def kprobe_defines(spans: dict[str, tuple[int, int]]) -> list[str]:
    """The -D options of conntrack.c; empty where kprobes or one of its functions are not there."""
    registers = _REGISTERS.get(os.uname().machine)
    if not registers or not KPROBE_PMU.exists() or any(function not in spans for function in KPROBED_FUNCTIONS):
        return []
    return ["-DKPROBES", *registers]


class Loaded(NamedTuple):
    """A compiled probe. Descriptors live as long as `module`."""

    maps: dict[str, int]
    programs: list[int]
    """Of the raw tracepoint, then of `kprobes`."""
    kprobes: list[tuple[str, bool]]
    """Kernel function, and whether at its return."""
    bcc: ModuleType
    module: Any


def load(probes: Path, probe: str, defines: list[str]) -> Loaded:
    """Compile probes/PROBE.c without kernel headers and load its programs. Raises LoadError."""
    os.environ["BCC_KERNEL_SOURCE"] = str(probes / "kernel")
    bcc = find_bcc()
    with_kprobes = probe == "drops" and "-DKPROBES" in defines
    names = ("prelude.c", *(["conntrack.c"] if with_kprobes else []), f"{probe}.c")
    text = "\n".join(f'#line 1 "probes/{name}"\n' + (probes / name).read_text() for name in names)
    tables = {_table_name(line.split("(", 1)[1].split(",")) for line in text.splitlines() if line.startswith("BPF_")}
    try:
        # A fresh list: bcc appends to what it is given on some architectures.
        module = bcc.BPF(text=text, cflags=["-I" + str(probes), f"-DPAGE_SIZE={os.sysconf('SC_PAGE_SIZE')}", *defines])
        programs = [module.load_func(f"on_{PROGRAMS[probe]}", bcc.BPF.RAW_TRACEPOINT).fd]
    except Exception as error:  # bcc raises bare Exception only; clang's and the verifier's words are on stderr
        raise LoadError("compile" if "compile" in str(error) else "refused", str(error)) from error
    maps = {}
    for name in sorted(tables):
        with contextlib.suppress(KeyError):  # not compiled in on this kernel
            maps[name] = module[name].map_fd
    kprobes: list[tuple[str, bool]] = []
    for name, function, at_return in KPROBES if with_kprobes else ():
        try:
            programs.append(module.load_func(name, bcc.BPF.KPROBE).fd)
        except Exception:  # noqa: BLE001 -- programs of this type may be refused alone: drops.c does without them
            del programs[1:], kprobes[:]
            break
        kprobes.append((function, at_return))
    return Loaded(maps, programs, kprobes, bcc, module)


PROGRAMS = {"drops": "kfree_skb", "walk": "kmem_cache_alloc"}
"""The raw tracepoint of each probe; its program is called on_NAME."""
KPROBES = (
    ("on_confirm", "__nf_conntrack_confirm", False),
    ("on_confirmed", "__nf_conntrack_confirm", True),
    ("on_clash", "nf_ct_resolve_clash", False),
    ("on_clash_over", "nf_ct_resolve_clash", True),
    ("on_evicted", "early_drop", True),
)
"""Programs of conntrack.c: the kernel function each is for, and whether it runs when that returns."""
_REGISTERS = {"x86_64": ("-DARGUMENT_1=14", "-DRETURNED=10"), "aarch64": ("-DARGUMENT_1=0", "-DRETURNED=0")}
"""Places in struct pt_regs, counted in words."""
KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe")


def _table_name(parts: list[str]) -> str:
    return (parts[3] if parts[0].startswith('"') else parts[0]).strip(" )")


def _window(name: str, offsets: list[int]) -> list[str]:
    start = min(offsets) & ~7
    return [f"-D{name}_AT={start}", f"-D{name}_SIZE={(max(offsets) + 8 - start + 7) & ~7}"]


def serve(channel: socket.socket) -> None:
    """Answer one request on a connected Unix socket (framing: a JSON line each way)."""
    try:
        # Both while the parent still reads its symbol table.
        defines, about = type_defines()
        find_bcc()
        request = json.loads(channel.makefile("r").readline())
        spans = {name: tuple(span) for name, span in request["spans"].items()}
        defines += symbol_defines(spans) + kprobe_defines(spans)
        defines += [f"-D{name}={value}" for name, value in request["defines"].items()]
        loaded = load(Path(request["probes"]), request["probe"], defines)
    except LoadError as error:
        channel.sendall(json.dumps({"error": error.kind, "text": str(error)}).encode() + b"\n")
        return
    about |= {
        "maps": list(loaded.maps),
        "kprobes": loaded.kprobes,
        "bcc": loaded.bcc.__version__,
        "bcc_path": str(Path(str(loaded.bcc.__file__)).parent),
    }
    socket.send_fds(channel, [json.dumps(about).encode() + b"\n"], [*loaded.programs, *loaded.maps.values()])


def main() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: never outlive the parent
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        serve(channel)


if __name__ == "__main__":
    main()
