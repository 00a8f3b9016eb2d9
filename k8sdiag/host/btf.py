"""What the running kernel says about its own types: a reader of BTF, the kernel's type description.

Offsets of struct members, enum values and the argument count of tracepoints are looked up here by name and
never written down anywhere else, because they differ between kernels and between builds of one kernel.

Format: kernel Documentation/bpf/btf.rst. Module BTF continues the ids and strings of vmlinux ("split BTF").

    >>> vmlinux = Btf.vmlinux()
    >>> vmlinux.offset("sk_buff", "len")
    112
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from pathlib import Path

KIND_INT, KIND_PTR, KIND_ARRAY, KIND_STRUCT, KIND_UNION, KIND_ENUM, KIND_FWD = 1, 2, 3, 4, 5, 6, 7
KIND_TYPEDEF, KIND_VOLATILE, KIND_CONST, KIND_RESTRICT, KIND_FUNC, KIND_FUNC_PROTO = 8, 9, 10, 11, 12, 13
KIND_VAR, KIND_DATASEC, KIND_FLOAT, KIND_DECL_TAG, KIND_TYPE_TAG, KIND_ENUM64 = 14, 15, 16, 17, 18, 19

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_ENUMERATOR = struct.Struct("<Ii")
_ENUMERATOR64 = struct.Struct("<III")
_SIGNED_ENUMERATOR64 = struct.Struct("<IIi")
# Bytes that follow the 12-byte type record: a fixed part and a part per member (btf.rst, "type encoding").
_FIXED = {KIND_INT: 4, KIND_ARRAY: 12, KIND_VAR: 4, KIND_DECL_TAG: 4}
_PER_MEMBER = {
    KIND_STRUCT: 12,
    KIND_UNION: 12,
    KIND_ENUM: 8,
    KIND_FUNC_PROTO: 8,
    KIND_DATASEC: 12,
    KIND_ENUM64: 12,
}
_SEE_THROUGH = {KIND_TYPEDEF, KIND_VOLATILE, KIND_CONST, KIND_RESTRICT, KIND_TYPE_TAG}

SYSFS = Path("/sys/kernel/btf")


class BtfError(Exception):
    """The type information is absent or not readable. The message names the file and the reason."""


class Btf:
    """One BTF blob: the kernel's own, or a module's on top of it (`below`)."""

    def __init__(self, blob: bytes, below: Btf | None = None) -> None:
        if len(blob) < _HEADER.size:
            raise BtfError("BTF blob is shorter than its header")
        magic, _, _, header_len, type_at, type_len, string_at, string_len = _HEADER.unpack_from(blob)
        if magic != _MAGIC:
            raise BtfError(f"not little-endian BTF (magic {magic:#x})")
        if len(blob) < header_len + max(type_at + type_len, string_at + string_len):
            raise BtfError("BTF blob is shorter than its header says")
        self._below = below
        self._types = blob[header_len + type_at : header_len + type_at + type_len]
        self._strings = blob[header_len + string_at : header_len + string_at + string_len]
        self._first_id: int = below._next_id if below else 1
        self._first_string: int = below._first_string + len(below._strings) if below else 0
        self._positions = self._find_positions()
        self._next_id: int = self._first_id + len(self._positions)
        self._found: dict[tuple[str, int], int] = {}

    @classmethod
    def vmlinux(cls, sysfs: Path = SYSFS) -> Btf:
        """The running kernel's types. Raises BtfError where it was built without CONFIG_DEBUG_INFO_BTF."""
        return cls(_read(sysfs / "vmlinux"))

    def module(self, name: str, sysfs: Path = SYSFS) -> Btf | None:
        """The types of a loaded module on top of these, or None where it has none (built in, or not loaded)."""
        path = sysfs / name
        return Btf(_read(path), self) if path.exists() else None

    def offset(self, record: str, path: str) -> int | None:
        """Byte offset of a member such as ("net", "ns.inum"); anonymous structs and unions are looked through.

        None where this kernel has no such struct or member. Bit fields give the byte they start in.
        """
        type_id = self._find(record, KIND_STRUCT)
        bits = 0
        for name in path.split("."):
            found = self._member(type_id, name) if type_id else None
            if found is None:
                return None
            at, type_id = found
            bits += at
        return bits // 8

    def size(self, record: str) -> int | None:
        """Bytes of a struct; None where this kernel has no such struct."""
        type_id = self._find(record, KIND_STRUCT)
        return self._record(type_id)[2] if type_id else None

    def enum(self, name: str) -> dict[str, int]:
        """Enumerators by name, empty where this kernel has no such enum."""
        type_id = self._find(name, KIND_ENUM)
        if not type_id:
            return {}
        types, at, _, kind, vlen = self._record(type_id)
        record = _ENUMERATOR
        if kind == KIND_ENUM64:  # kind_flag says whether the upper half carries a sign
            record = _SIGNED_ENUMERATOR64 if _kind_flag(types, at) else _ENUMERATOR64
        values = {}
        for i in range(vlen):
            name_at, low, *high = record.unpack_from(types, at + i * record.size)
            values[self._string(name_at)] = high[0] << 32 | low if high else low
        return values

    def function(self, name: str) -> int | None:
        """Id of a function's type, which is what fentry programs are loaded with; None where there is none."""
        return self._find(name, KIND_FUNC) or None

    def tracepoint_args(self, name: str) -> int | None:
        """How many arguments the raw tracepoint passes; None where there is no such tracepoint.

        The kernel declares `typedef void (*btf_trace_NAME)(void *__data, …)` for each.
        """
        type_id = self._find(f"btf_trace_{name}", KIND_TYPEDEF)
        while type_id:
            _, _, next_id, kind, vlen = self._record(type_id)
            if kind == KIND_FUNC_PROTO:
                return int(vlen) - 1
            type_id = next_id
        return None

    def _find_positions(self) -> list[int]:
        types, end, at = self._types, len(self._types), 0
        unpack = struct.Struct("<I").unpack_from
        extra = [(_FIXED.get(kind, 0), _PER_MEMBER.get(kind, 0)) for kind in range(32)]
        positions: list[int] = []
        append = positions.append
        while at < end:
            append(at)
            info = unpack(types, at + 4)[0]
            fixed, per_member = extra[info >> 24 & 31]
            at += 12 + fixed + (info & 0xFFFF) * per_member
        return positions

    def _record(self, type_id: int) -> tuple[bytes, int, int, int, int]:
        """(type bytes, where the members start, type or size field, kind, vlen) of a type."""
        if type_id < self._first_id:
            assert self._below is not None
            return self._below._record(type_id)
        at = self._positions[type_id - self._first_id]
        _, info, third = _TYPE.unpack_from(self._types, at)
        return self._types, at + 12, third, info >> 24 & 31, info & 0xFFFF

    def _string(self, at: int) -> str:
        if at < self._first_string:
            assert self._below is not None
            return self._below._string(at)
        start = at - self._first_string
        return self._strings[start : self._strings.index(b"\0", start)].decode()

    def _string_offset(self, text: str) -> int | None:
        if self._strings.startswith(text.encode() + b"\0"):  # a module's strings begin without an empty one
            return self._first_string
        at = self._strings.find(b"\0" + text.encode() + b"\0")
        if at >= 0:
            return self._first_string + at + 1
        return self._below._string_offset(text) if self._below else None

    def _find(self, name: str, kind: int) -> int:
        """Id of the named type of that kind (a plain enum also matches a 64-bit one), or 0."""
        if (name, kind) not in self._found:
            self._found[name, kind] = self._search(name, kind)
        return self._found[name, kind]

    def _search(self, name: str, kind: int) -> int:
        name_at = self._string_offset(name)
        if name_at is not None:
            needle, at = struct.pack("<I", name_at), -1
            while (at := self._types.find(needle, at + 1)) >= 0:
                index = bisect_left(self._positions, at)
                if index == len(self._positions) or self._positions[index] != at:
                    continue
                found = struct.unpack_from("<I", self._types, at + 4)[0] >> 24 & 31
                if found == kind or (kind == KIND_ENUM and found == KIND_ENUM64):
                    return self._first_id + index
        return self._below._find(name, kind) if self._below else 0

    def _member(self, type_id: int, name: str) -> tuple[int, int] | None:
        """(bit offset, type id) of a member, searching anonymous members too."""
        while True:
            types, at, third, kind, vlen = self._record(type_id)
            if kind not in _SEE_THROUGH:
                break
            type_id = third
        if kind not in (KIND_STRUCT, KIND_UNION):
            return None
        # With kind_flag the upper 8 bits of the offset word hold a bit-field's width.
        kind_flag = _kind_flag(types, at)
        for i in range(vlen):
            name_at, member_type, word = _TYPE.unpack_from(types, at + i * 12)
            bits = word & 0xFFFFFF if kind_flag else word
            if name_at == 0:
                inner = self._member(member_type, name)
                if inner:
                    return bits + inner[0], inner[1]
            elif self._string(name_at) == name:
                return bits, member_type
        return None


def _kind_flag(types: bytes, at: int) -> bool:
    """The flag of the type whose members start there: its meaning depends on the kind."""
    return bool(struct.unpack_from("<I", types, at - 8)[0] >> 31)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BtfError(f"{path}: {error.strerror}") from error
