# The reader of the kernel's type description: against bpftool on the running kernel, and on blobs written by hand
# for what the running kernel happens not to contain. Format: kernel Documentation/bpf/btf.rst.

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k8sdiag.host import btf
from k8sdiag.host.btf import Btf, BtfError

VMLINUX = Path("/sys/kernel/btf/vmlinux")
HEADER_BYTES = 24


class Blob:
    """BTF written type by type. Ids and string offsets continue those of `below`, as in a module's file."""

    def __init__(self, below: Blob | None = None, first_string: bytes = b"\0") -> None:
        self.next_id: int = below.next_id if below else 1
        self._string_from: int = below._string_from + len(below.strings) if below else 0
        self.strings: bytearray = bytearray(first_string)
        self.types = bytearray()

    def text(self, text: str) -> int:
        if not text:
            return 0
        if self.strings.startswith(text.encode() + b"\0"):
            return self._string_from
        at = self.strings.find(b"\0" + text.encode() + b"\0")
        if at < 0:
            self.strings += text.encode() + b"\0"
            at = len(self.strings) - len(text.encode()) - 2
        return self._string_from + at + 1

    def add(
        self, kind: int, name: int | str = "", third: int = 0, tail: bytes = b"", vlen: int = 0, flag: bool = False
    ) -> int:
        """Append a type record; returns its id. `name` is a string, or the offset of one."""
        name_at = self.text(name) if isinstance(name, str) else name
        self.types += struct.pack("<III", name_at, flag << 31 | kind << 24 | vlen, third) + tail
        self.next_id += 1
        return self.next_id - 1

    def integer(self, name: str = "int", size: int = 4) -> int:
        return self.add(btf.KIND_INT, name, size, struct.pack("<I", size * 8))

    def record(self, name: str, *members: tuple[str, int, int], kind: int = btf.KIND_STRUCT, flag: bool = False) -> int:
        """A struct or union of (name, type id, offset word)."""
        tail = b"".join(struct.pack("<III", self.text(member), type_id, at) for member, type_id, at in members)
        return self.add(kind, name, 64, tail, len(members), flag)

    def build(self) -> bytes:
        lengths = len(self.types), len(self.types), len(self.strings)
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, HEADER_BYTES, 0, *lengths)
        return header + bytes(self.types) + bytes(self.strings)


@pytest.fixture(scope="module")
def vmlinux() -> Btf:
    if not VMLINUX.exists():
        pytest.skip("this kernel was built without BTF")
    return Btf.vmlinux()


@pytest.fixture(scope="module")
def bpftool_types() -> list[dict[str, Any]]:
    """The same types by an independent reader, in order of their ids, which begin at 1."""
    if not VMLINUX.exists() or not shutil.which("bpftool"):
        pytest.skip("needs BTF and bpftool")
    command = ["bpftool", "-j", "btf", "dump", "file", str(VMLINUX)]
    said = subprocess.run(command, capture_output=True, check=True).stdout
    types: list[dict[str, Any]] = json.loads(said)["types"]
    return types


def members(types: list[dict[str, Any]], type_id: int, bits: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, bit offset, type id) of all members, those of anonymous ones among them, as bpftool tells them."""
    for member in types[type_id - 1]["members"]:
        at = bits + member["bits_offset"]
        if member["name"] != "(anon)":
            yield member["name"], at, member["type_id"]
            continue
        inner = member["type_id"]
        while types[inner - 1]["kind"] in ("TYPEDEF", "CONST", "VOLATILE"):
            inner = types[inner - 1]["type_id"]
        if types[inner - 1]["kind"] in ("STRUCT", "UNION"):
            yield from members(types, inner, at)


@pytest.mark.parametrize(
    "record",
    [
        "sk_buff", "net_device", "net", "sock", "sock_common", "inet_sock", "dst_entry", "rtable", "skb_shared_info",
        "task_struct", "netns_ipv4", "tcp_sock", "page", "vxlan_dev",
    ],
)  # fmt: skip
def test_every_member_stands_where_bpftool_says(vmlinux: Btf, bpftool_types: list[dict[str, Any]], record: str) -> None:
    found = [one["id"] for one in bpftool_types if one["kind"] == "STRUCT" and one["name"] == record]
    if not found:
        pytest.skip(f"this kernel has no struct {record} built in")
    expected: dict[str, int] = {}
    for name, bits, _ in members(bpftool_types, found[0]):
        expected.setdefault(name, bits // 8)
    assert len(expected) >= 3
    assert {name: vmlinux.offset(record, name) for name in expected} == expected


def test_a_path_leads_through_named_members(vmlinux: Btf, bpftool_types: list[dict[str, Any]]) -> None:
    of = {one["name"]: one["id"] for one in bpftool_types if one["kind"] == "STRUCT"}

    def bits(record: int, name: str) -> tuple[int, int]:
        return next((at, type_id) for member, at, type_id in members(bpftool_types, record) if member == name)

    outer, inner_id = bits(of["net"], "ns")
    inner, _ = bits(inner_id, "inum")
    assert vmlinux.offset("net", "ns.inum") == (outer + inner) // 8
    # possible_net_t is a typedef of an anonymous struct
    outer, _ = bits(of["net_device"], "nd_net")
    assert vmlinux.offset("net_device", "nd_net.net") == outer // 8


def test_drop_reasons_are_those_that_bpftool_lists(vmlinux: Btf, bpftool_types: list[dict[str, Any]]) -> None:
    found = [one for one in bpftool_types if one["kind"] == "ENUM" and one["name"] == "skb_drop_reason"]
    if not found:
        pytest.skip("this kernel has no drop reasons")
    expected = {value["name"]: value["val"] & 0xFFFFFFFF for value in found[0]["values"]}
    ours = {name: number & 0xFFFFFFFF for name, number in vmlinux.enum("skb_drop_reason").items()}
    assert ours == expected
    assert len(ours) > 20


def test_every_raw_tracepoint_has_as_many_arguments_as_bpftool_counts(
    vmlinux: Btf, bpftool_types: list[dict[str, Any]]
) -> None:
    expected = {}
    for one in bpftool_types:
        if one["kind"] == "TYPEDEF" and one["name"].startswith("btf_trace_"):
            pointer = bpftool_types[one["type_id"] - 1]
            prototype = bpftool_types[pointer["type_id"] - 1]
            expected[one["name"].removeprefix("btf_trace_")] = prototype["vlen"] - 1
    assert "kfree_skb" in expected
    some = dict(sorted(expected.items())[::7])
    some["kfree_skb"] = expected["kfree_skb"]
    assert {name: vmlinux.tracepoint_args(name) for name in some} == some


def test_functions_have_the_ids_that_bpftool_gives_them(vmlinux: Btf, bpftool_types: list[dict[str, Any]]) -> None:
    expected: dict[str, set[int]] = {}
    for one in bpftool_types:
        if one["kind"] == "FUNC":
            expected.setdefault(one["name"], set()).add(one["id"])
    some = [name for name in ("ip_rcv", "nf_hook_slow", "kfree_skb_list", "tcp_v4_rcv") if name in expected]
    assert some
    for name in some:
        assert vmlinux.function(name) in expected[name]


def test_what_the_kernel_lacks_is_none_or_empty(vmlinux: Btf) -> None:
    assert vmlinux.offset("sk_buff", "no_such_member") is None
    assert vmlinux.offset("sk_buff", "len.deeper") is None
    assert vmlinux.offset("no_such_struct", "len") is None
    assert vmlinux.enum("no_such_enum") == {}
    assert vmlinux.tracepoint_args("no_such_tracepoint") is None
    assert vmlinux.function("no_such_function") is None
    assert vmlinux.function("sk_buff") is None  # a struct
    assert vmlinux.module("no_such_module") is None


def test_anonymous_unions_and_structs_are_looked_through() -> None:
    blob = Blob()
    word = blob.integer()
    inside = blob.record("", ("deep", word, 0), ("deeper", word, 32))
    either = blob.record("", ("", inside, 0), ("flat", word, 0), kind=btf.KIND_UNION)
    blob.record("outer", ("first", word, 0), ("", either, 64), ("last", word, 128))
    types = Btf(blob.build())
    names = ("first", "deep", "deeper", "flat", "last")
    assert [types.offset("outer", name) for name in names] == [0, 8, 12, 8, 16]


def test_typedefs_and_qualifiers_are_looked_through() -> None:
    blob = Blob()
    word = blob.integer()
    target = blob.record("target", ("one", word, 0), ("two", word, 32))
    for kind in (btf.KIND_CONST, btf.KIND_VOLATILE, btf.KIND_TYPE_TAG, btf.KIND_RESTRICT):
        target = blob.add(kind, "", target)
    named = blob.add(btf.KIND_TYPEDEF, "target_t", target)
    blob.record("outer", ("before", word, 0), ("it", named, 32))
    assert Btf(blob.build()).offset("outer", "it.two") == 8


def test_a_pointer_is_not_followed() -> None:
    blob = Blob()
    word = blob.integer()
    target = blob.record("target", ("one", word, 0))
    pointer = blob.add(btf.KIND_PTR, "", target)
    blob.record("outer", ("it", pointer, 0))
    assert Btf(blob.build()).offset("outer", "it.one") is None


def test_bit_fields_give_the_byte_they_begin_in() -> None:
    blob = Blob()
    word = blob.integer()
    blob.record(
        "flags",
        ("plain", word, 0),
        ("three", word, 3 << 24 | 37),
        ("eight", word, 8 << 24 | 48),
        ("after", word, 64),
        flag=True,
    )
    types = Btf(blob.build())
    assert [types.offset("flags", name) for name in ("plain", "three", "eight", "after")] == [0, 4, 6, 8]


def test_a_struct_is_told_from_other_kinds_of_the_same_name() -> None:
    blob = Blob()
    word = blob.integer("net")
    blob.add(btf.KIND_FWD, "net")
    blob.add(btf.KIND_FUNC, "net", word)
    # the number of the string "net" also stands here as a size and as a member's type, which is no match
    blob.add(btf.KIND_ARRAY, "", 0, struct.pack("<III", blob.text("net"), blob.text("net"), blob.text("net")))
    blob.record("net", ("inum", word, 96))
    blob.record("network", ("inum", word, 32))
    assert Btf(blob.build()).offset("net", "inum") == 12


def test_every_kind_of_type_is_stepped_over() -> None:
    blob = Blob()
    word = blob.integer()
    blob.add(btf.KIND_ARRAY, "", 0, struct.pack("<III", word, word, 4))
    blob.add(btf.KIND_ENUM, "colour", 4, struct.pack("<Ii", blob.text("RED"), 1), 1)
    blob.add(btf.KIND_ENUM64, "wide", 8, struct.pack("<III", blob.text("W"), 1, 0), 1)
    prototype = blob.add(btf.KIND_FUNC_PROTO, "", 0, struct.pack("<IIII", 0, word, 0, word), 2)
    function = blob.add(btf.KIND_FUNC, "run", prototype)
    variable = blob.add(btf.KIND_VAR, "seen", word, struct.pack("<I", 1))
    blob.add(btf.KIND_DATASEC, ".data", 8, struct.pack("<III", variable, 0, 4), 1)
    blob.add(btf.KIND_FLOAT, "float", 4)
    blob.add(btf.KIND_DECL_TAG, "tag", function, struct.pack("<i", -1))
    blob.record("last", ("here", word, 40))
    assert Btf(blob.build()).offset("last", "here") == 5


def test_enumerators_keep_their_sign() -> None:
    blob = Blob()
    values = ("MINUS", -2), ("ZERO", 0), ("TEN", 10)
    blob.add(btf.KIND_ENUM, "plain", 4, b"".join(struct.pack("<Ii", blob.text(n), v) for n, v in values), 3, flag=True)
    assert Btf(blob.build()).enum("plain") == dict(values)


def test_wide_enumerators_are_whole() -> None:
    blob = Blob()
    blob.add(btf.KIND_ENUM64, "wide", 8, struct.pack("<III", blob.text("HIGH"), 5, 1 << 8), 1)
    assert Btf(blob.build()).enum("wide") == {"HIGH": (1 << 40) + 5}


def test_wide_enumerators_keep_their_sign_where_the_enum_has_one() -> None:
    blob = Blob()
    all_ones = struct.pack("<III", blob.text("ALL"), 0xFFFFFFFF, 0xFFFFFFFF)
    blob.add(btf.KIND_ENUM64, "signed", 8, all_ones, 1, flag=True)
    blob.add(btf.KIND_ENUM64, "unsigned", 8, all_ones, 1)
    types = Btf(blob.build())
    assert types.enum("signed") == {"ALL": -1}
    assert types.enum("unsigned") == {"ALL": (1 << 64) - 1}


def test_an_enum64_is_found_where_an_enum_is_asked_for() -> None:
    blob = Blob()
    pairs = ("LOW", 7), ("LOWER", 3)
    tail = b"".join(struct.pack("<III", blob.text(name), value, 0) for name, value in pairs)
    blob.add(btf.KIND_ENUM64, "wide", 8, tail, 2)
    assert Btf(blob.build()).enum("wide") == dict(pairs)


def test_a_tracepoint_counts_arguments_without_the_first() -> None:
    blob = Blob()
    word = blob.integer()
    prototype = blob.add(btf.KIND_FUNC_PROTO, "", 0, struct.pack("<II", 0, word) * 5, 5)
    pointer = blob.add(btf.KIND_PTR, "", prototype)
    blob.add(btf.KIND_TYPEDEF, "btf_trace_kfree_skb", pointer)
    assert Btf(blob.build()).tracepoint_args("kfree_skb") == 4


def module_on_kernel(first_string: bytes = b"\0") -> tuple[Blob, Blob]:
    kernel = Blob()
    word = kernel.integer()
    kernel.record("shared", ("zero", word, 0), ("one", word, 32))
    module = Blob(kernel, first_string)
    shared = kernel.next_id - 1
    module.text("nf_conn")
    module.record("nf_conn", ("status", word, 192), ("ct_net", shared, 256))
    # a name that only the kernel's strings hold, for a type of the module
    module.add(btf.KIND_UNION, kernel.text("one"), 4, struct.pack("<III", module.text("low"), word, 0), 1)
    module.add(btf.KIND_STRUCT, kernel.text("zero"), 8, struct.pack("<III", kernel.text("one"), word, 64), 1)
    return kernel, module


def test_module_types_continue_those_of_the_kernel() -> None:
    kernel, module = module_on_kernel()
    types = Btf(module.build(), Btf(kernel.build()))
    assert types.offset("nf_conn", "status") == 24
    assert types.offset("nf_conn", "ct_net.one") == 36
    assert types.offset("zero", "one") == 8
    assert types.offset("shared", "one") == 4
    assert Btf(kernel.build()).offset("nf_conn", "status") is None


def test_the_first_name_of_a_module_is_found() -> None:
    # libbpf gives only the kernel's own string section an empty first string (btf_new_empty())
    kernel, module = module_on_kernel(b"")
    assert module.strings.startswith(b"nf_conn\0")
    assert Btf(module.build(), Btf(kernel.build())).offset("nf_conn", "status") == 24


def test_a_module_is_read_from_the_directory_of_the_kernel(tmp_path: Path) -> None:
    kernel, module = module_on_kernel()
    (tmp_path / "vmlinux").write_bytes(kernel.build())
    (tmp_path / "nf_conntrack").write_bytes(module.build())
    types = Btf.vmlinux(tmp_path).module("nf_conntrack", tmp_path)
    assert types is not None
    assert types.offset("nf_conn", "status") == 24


def test_a_kernel_without_btf_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BtfError, match="vmlinux: No such file"):
        Btf.vmlinux(tmp_path)


@pytest.mark.parametrize("blob", [b"", b"\x9f", b"\xeb\x9f" + bytes(30), b"\x9f\xeb" + bytes(10), bytes(64)])
def test_what_is_no_btf_is_refused(blob: bytes) -> None:
    with pytest.raises(BtfError):
        Btf(blob)


def test_a_file_cut_anywhere_is_refused() -> None:
    kernel, _ = module_on_kernel()
    whole = kernel.build()
    assert Btf(whole).offset("shared", "one") == 4
    for length in range(len(whole)):
        with pytest.raises(BtfError):
            Btf(whole[:length])
