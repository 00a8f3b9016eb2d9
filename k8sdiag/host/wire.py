"""What the probes and this program share: the layout of map keys, values and samples, and their small enums.

Each record is written down once, here. `python3 -m k8sdiag.host.wire` prints the C text that is committed as
probes/wire.h; it carries a _Static_assert for every offset, so each compile on each node proves that both sides
still agree. Numbers are little-endian, padding is explicit, addresses are 16 bytes (IPv4 mapped into IPv6).
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from typing import NamedTuple

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


class Field(NamedTuple):
    name: str
    ctype: str
    """u8, u16, u32, u64, or one of these with a count, as in `u8[16]` or `u64[10]`."""
    doc: str


class Layout:
    """A C struct and the struct.Struct that reads it. Arrays of u8 unpack to bytes, other arrays flatten."""

    def __init__(self, name: str, *fields: Field) -> None:
        self.name = name
        self.fields = fields
        self.offsets: dict[str, int] = {}
        formats: list[str] = []
        for field in fields:
            base, count = self._parse(field.ctype)
            code = _FORMATS[base]
            size = struct.calcsize(code)
            at = struct.calcsize("<" + "".join(formats))
            if at % size:
                raise ValueError(f"{name}.{field.name} at {at} needs explicit padding")
            self.offsets[field.name] = at
            formats.append(f"{count}s" if base == "u8" and count > 1 else f"{count if count > 1 else ''}{code}")
        self.codec = struct.Struct("<" + "".join(formats))
        if self.codec.size % 8:
            raise ValueError(f"{name} has {self.codec.size} bytes: pad it to a multiple of 8")

    @property
    def size(self) -> int:
        return self.codec.size

    def c_text(self) -> str:
        lines = [f"struct {self.name} {{"]
        for field in self.fields:
            base, count = self._parse(field.ctype)
            suffix = f"[{count}]" if count > 1 else ""
            lines.append(f"\t{base} {field.name}{suffix};\t/* {field.doc} */")
        lines.append("};")
        lines += [
            f'_Static_assert(__builtin_offsetof(struct {self.name}, {name}) == {at}, "{self.name}.{name}");'
            for name, at in self.offsets.items()
        ]
        lines.append(f'_Static_assert(sizeof(struct {self.name}) == {self.size}, "{self.name}");')
        return "\n".join(lines)

    @staticmethod
    def _parse(ctype: str) -> tuple[str, int]:
        match = re.fullmatch(r"(u\d+)(?:\[(\d+)\])?", ctype)
        if not match:
            raise ValueError(f"unknown C type {ctype}")
        return match[1], int(match[2] or 1)


class Hook(IntEnum):
    """The netfilter hook a packet was at. The first five are the kernel's NF_INET_* numbers plus one."""

    NONE = 0
    PRE_ROUTING = 1
    LOCAL_IN = 2
    FORWARD = 3
    LOCAL_OUT = 4
    POST_ROUTING = 5
    INGRESS = 6
    EGRESS = 7
    BRIDGE = 8
    UNKNOWN = 15


class Conntrack(IntEnum):
    """What `skb->_nfct` and `nf_conn.status` said of the packet's connection."""

    NONE = 0
    UNTRACKED = 1
    NEW = 2
    CONFIRMED = 3
    UNKNOWN = 4


class Verdict(IntEnum):
    """What conntrack had to do with a netfilter drop: which of this CPU's statistics rose since the last one."""

    NONE = 0
    """Not a netfilter drop, or this kernel does not let the probe look."""
    RULE = 1
    """None rose: a rule, a policy or another netfilter user dropped it."""
    REFUSED = 2
    """`drop` alone: no entry was allocated."""
    CLASH = 3
    """`insert_failed` and `drop`: the connection's tuple was taken by another one."""
    CHAIN_TOO_LONG = 4
    """`insert_failed` and `chaintoolong`."""
    INSERT_FAILED = 5
    """`insert_failed` alone: the entry was being deleted."""
    UNKNOWN = 6
    """More than one step: events were missed in between, or the namespace was never looked at."""
    CLASH_RESOLVED = 7
    """No drop: two packets of one flow met, and conntrack made one connection of them."""


class Nat(IntEnum):
    """What conntrack translates of a connection: IPS_SRC_NAT and IPS_DST_NAT of nf_conn.status."""

    NONE = 0
    SRC = 1
    DST = 2
    BOTH = 3
    REPLY = 4
    """Added to these: the packet answers."""


class Segment(IntEnum):
    """What a TCP segment does, by its flags."""

    NONE = 0
    SYN = 1
    SYN_ACK = 2
    FIN = 3
    RST = 4
    OTHER = 5


class NetnsFrom(IntEnum):
    """Which pointer led from the packet to its network namespace."""

    NOTHING = 0
    DEVICE = 1
    SOCKET = 2
    ROUTE = 3
    CONNTRACK = 4


class Family(IntEnum):
    OTHER = 0
    IPV4 = 2
    IPV6 = 10


class Loss(IntEnum):
    """Index into the `losses` per-CPU array."""

    KEYS = 0
    """Drops for which not even the exact map had room."""
    SAMPLES = 1
    """Samples not taken because of the rate limit or a full ring."""
    HOOKS = 2
    """Netfilter drops whose hook needed a stack after the limit was used up."""


STACK_DEPTH = 10
"""Frames kept with a sample."""
HOOK_FRAMES = 6
"""Frames looked at for a hook, after the program and its caller: the IP function is the third to sixth of them."""
SAMPLE_BYTES = 128
SLOTS = 64
"""Flows per CPU and turn that are counted without a hash map, where the kernel allows it."""

_EXPLAINS = (
    Field("net", "u64", "struct net *, 0 unknown; which one it was, the tally says"),
    Field("location", "u64", "return address inside the dropping function"),
    Field("ifindex", "u32", "skb->dev->ifindex, 0 without a device"),
    Field("reason", "u32", "enum skb_drop_reason of this kernel, 0 before 5.17"),
    Field("hook", "u8", "enum Hook of wire.py"),
    Field("verdict", "u8", "enum Verdict of wire.py, plus PROBED where a probe saw it"),
    Field("conntrack", "u8", "enum Conntrack of wire.py"),
    Field("nat", "u8", "enum Nat of wire.py"),
    Field("netns_from", "u8", "enum NetnsFrom of wire.py"),
    Field("family", "u8", "AF_INET, AF_INET6 or 0"),
    Field("protocol", "u8", "IPPROTO_* of the transport header, 0 unless IP"),
    Field("segment", "u8", "enum Segment of wire.py"),
)

DROP_KEY = Layout("drop_key", *_EXPLAINS)
FLOW_KEY = Layout(
    "flow_key",
    *_EXPLAINS,
    Field("reply_src", "u8[16]", "where the connection is translated: source of its reply; else zero"),
    Field("reply_dst", "u8[16]", "and destination"),
    Field("reply_sport", "u16", "and ports, as below"),
    Field("reply_dport", "u16", "and ports, as below"),
    Field("iif", "u32", "skb->skb_iif, the device the packet came in by"),
    Field("src", "u8[16]", "source, IPv4 as ::ffff:a.b.c.d; where translated, as the packet was sent"),
    Field("dst", "u8[16]", "destination"),
    Field("sport", "u16", "source port, host order, 0 where the protocol has none"),
    Field("dport", "u16", "destination port"),
    Field("flow_pad", "u32", "zero"),
)
TALLY = Layout(
    "tally",
    Field("skbs", "u64", "buffers freed"),
    Field("packets", "u64", "wire packets: a GSO buffer counts its segments"),
    Field("bytes", "u64", "skb->len"),
    Field("netns_cookie", "u64", "struct net.net_cookie when the key was new, 0 before 5.12"),
    Field("netns", "u32", "net.ns.inum then, the inode of /proc/PID/ns/net; 0 unknown"),
    Field("tally_pad", "u32", "zero"),
)
CONTROL = Layout(
    "control",
    Field("side", "u32", "which of each pair of maps is being written, 0 or 1"),
    Field("turn", "u32", "increases at each switch; renews the budgets"),
    Field("samples", "u32", "samples each CPU may take per turn"),
    Field("stacks", "u32", "stacks each CPU may take per turn to find a hook"),
    Field("baselined", "u32", "1: a namespace that conntrack_seen lacks had no conntrack failures before"),
    Field("control_pad", "u32", "zero"),
)
BUDGET = Layout(
    "budget",
    Field("turn", "u32", "the turn these numbers belong to"),
    Field("samples", "u32", "taken in this turn"),
    Field("stacks", "u32", "taken in this turn"),
    Field("flows_full", "u32", "the flow map had no room in this turn: insert no more"),
    Field(
        "percpu_offset", "u64", "where this CPU's per-CPU data stand, relative to a per-CPU pointer; 0 not yet known"
    ),
)
CONNTRACK_SEEN = Layout(
    "conntrack_seen",
    Field("insert_failed", "u32", "one CPU's ip_conntrack_stat when the last netfilter drop there was looked at"),
    Field("drop", "u32", "the same"),
    Field("chain_too_long", "u32", "the same; 0 on kernels without it"),
    Field("seen_pad", "u32", "zero"),
)
SAMPLE = Layout(
    "sample",
    *FLOW_KEY.fields,
    Field("netns_cookie", "u64", "as in tally"),
    Field("t_ns", "u64", "CLOCK_BOOTTIME"),
    Field("netns", "u32", "as in tally"),
    Field("length", "u32", "skb->len"),
    Field("captured", "u16", "bytes of headers that follow"),
    Field("frames", "u16", "stack frames that follow"),
    Field("sample_pad", "u32", "zero"),
    Field("stack", f"u64[{STACK_DEPTH}]", "return addresses, innermost first"),
    Field("headers", f"u8[{SAMPLE_BYTES}]", "from the network header on, cut after the transport header"),
)

PROBED = 0x80
NAMESPACES_SEEN = 4096

CONSTANTS = ("STACK_DEPTH", "HOOK_FRAMES", "SLOTS", "SAMPLE_BYTES", "PROBED", "NAMESPACES_SEEN")
RECORDS = (DROP_KEY, FLOW_KEY, TALLY, CONTROL, BUDGET, CONNTRACK_SEEN, SAMPLE)
ENUMS = (Hook, Verdict, Conntrack, Nat, Segment, NetnsFrom, Loss)


SAMPLE_PAGES = 32
"""Size of the ring buffer; a power of two."""
FLOWS_MAX, FLOWS_MIN, DROPS_MAX, REPAIRS_MAX = 8192, 1024, 4096, 512
MAP_BYTES_MAX = 16 << 20
"""The flow maps shrink where many possible CPUs would make them bigger than this."""


def map_sizes(cpus: int) -> dict[str, int]:
    """Entries of the maps, as the probe is compiled for a machine with so many possible CPUs."""
    flows = max(FLOWS_MIN, min(FLOWS_MAX, MAP_BYTES_MAX // (TALLY.size * cpus)))
    return {"FLOWS": flows, "DROPS": DROPS_MAX, "REPAIRS": REPAIRS_MAX, "SAMPLE_PAGES": SAMPLE_PAGES}


def map_bytes(cpus: int) -> int:
    """Kernel memory of the counting maps: keys and a value for each CPU, without the kernel's own links."""
    sizes = map_sizes(cpus)
    flow, drop = FLOW_KEY.size + TALLY.size * cpus, DROP_KEY.size + TALLY.size * cpus
    slots = SLOTS * (FLOW_KEY.size + TALLY.size) * cpus
    seen = NAMESPACES_SEEN * (8 + CONNTRACK_SEEN.size * cpus)
    return 2 * (sizes["FLOWS"] * flow + sizes["DROPS"] * drop + slots) + seen


def c_header() -> str:
    """The text of probes/wire.h."""
    parts = [
        "/* Generated by `python3 -m k8sdiag.host.wire`. Edit k8sdiag/host/wire.py, not this file. */",
        "\n".join(f"#define {name} {globals()[name]}" for name in CONSTANTS),
    ]
    for enum in ENUMS:
        prefix = re.sub(r"(?<!^)([A-Z])", r"_\1", enum.__name__).upper()
        members = "\n".join(f"\t{prefix}_{member.name} = {member.value}," for member in enum)
        parts.append(f"enum {{\n{members}\n}};")
    parts += [layout.c_text() for layout in RECORDS]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(c_header(), end="")
