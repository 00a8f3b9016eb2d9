# The layout that the probes and the program share.

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8sdiag.host import wire
from k8sdiag.host.wire import Field, Layout

CHECKOUT = Path(__file__).resolve().parents[2]
PROBES = CHECKOUT / "probes"


def compile_c(text: str) -> subprocess.CompletedProcess[str]:
    """What the C compiler of this machine says to `text`, with the probes' own type names and no others."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    return subprocess.run(
        ["gcc", "-std=gnu11", "-fsyntax-only", "-nostdinc", "-Wall", "-Wextra", "-Wpadded", "-Werror",
         "-I", str(PROBES), "-I", str(PROBES / "kernel/include"), "-x", "c", "-"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_committed_header_is_what_would_be_generated() -> None:
    assert (PROBES / "wire.h").read_text() == wire.c_header()


def test_the_c_compiler_agrees_with_every_offset_and_finds_no_padding() -> None:
    result = compile_c('#include <linux/types.h>\n#include "wire.h"\n')
    assert (result.returncode, result.stderr) == (0, "")
    text = wire.c_header()
    for record in wire.RECORDS:
        for field in record.fields:
            assert f"__builtin_offsetof(struct {record.name}, {field.name})" in text


def test_the_c_compiler_refuses_a_header_with_one_number_changed() -> None:
    text = wire.c_header().replace("\tu32 netns;", "\tu64 netns;", 1)
    result = compile_c("#include <linux/types.h>\n" + text)
    assert result.returncode != 0
    assert "static assertion failed" in result.stderr


@pytest.mark.parametrize("enum", wire.ENUMS)
def test_every_enumerator_has_its_number_in_c(enum: type[wire.Hook]) -> None:
    prefix = {"NetnsFrom": "NETNS_FROM"}.get(enum.__name__, enum.__name__.upper())
    asserts = "\n".join(
        f'_Static_assert({prefix}_{member.name} == {member.value}, "{member.name}");' for member in enum
    )
    result = compile_c('#include <linux/types.h>\n#include "wire.h"\n' + asserts)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_first_hooks_are_the_kernels_numbers_plus_one() -> None:
    # include/uapi/linux/netfilter.h, enum nf_inet_hooks
    kernel = ("PRE_ROUTING", "LOCAL_IN", "FORWARD", "LOCAL_OUT", "POST_ROUTING")
    assert [wire.Hook[name] - 1 for name in kernel] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "fields",
    [
        (Field("small", "u8", ""), Field("big", "u64", "")),
        (Field("word", "u32", ""), Field("big", "u64", "")),
        (Field("small", "u8", ""), Field("pair", "u16", ""), Field("rest", "u8[5]", "")),
        (Field("bytes", "u8[3]", ""), Field("word", "u32", "")),
    ],
)
def test_padding_that_a_compiler_would_add_is_refused(fields: tuple[Field, ...]) -> None:
    with pytest.raises(ValueError, match="explicit padding"):
        Layout("record", *fields)


def test_a_size_that_a_map_would_round_up_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        Layout("record", Field("big", "u64", ""), Field("word", "u32", ""))


@pytest.mark.parametrize("ctype", ["int", "u8 []", "char[4]", "u32[", "", "u8[16] "])
def test_a_type_that_is_not_ours_is_refused(ctype: str) -> None:
    with pytest.raises(ValueError, match="C type"):
        Layout("record", Field("odd", ctype, ""))


@pytest.mark.parametrize("record", wire.RECORDS, ids=lambda record: record.name)
def test_a_record_is_laid_out_as_the_machine_would_do_it(record: Layout) -> None:
    numbers = {"u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64}
    fields = []
    for field in record.fields:
        base, count = Layout._parse(field.ctype)
        fields.append((field.name, numbers[base] * count if count > 1 else numbers[base]))
    native = type("Native", (ctypes.LittleEndianStructure,), {"_fields_": fields})
    assert {name: getattr(native, name).offset for name, _ in fields} == record.offsets
    assert ctypes.sizeof(native) == record.size


def test_a_drop_key_is_the_beginning_of_a_flow_key_and_that_of_a_sample() -> None:
    for longer, shorter in ((wire.FLOW_KEY, wire.DROP_KEY), (wire.SAMPLE, wire.FLOW_KEY)):
        assert list(longer.offsets.items())[: len(shorter.offsets)] == list(shorter.offsets.items())
        assert longer.fields[: len(shorter.fields)] == shorter.fields


@pytest.mark.parametrize("record", wire.RECORDS, ids=lambda record: record.name)
@given(data=st.data())
def test_what_is_packed_unpacks_to_the_same(record: Layout, data: st.DataObject) -> None:
    values: list[int | bytes] = []
    for field in record.fields:
        base, count = Layout._parse(field.ctype)
        if base == "u8" and count > 1:
            values.append(data.draw(st.binary(min_size=count, max_size=count)))
        else:
            largest = 2 ** int(base[1:]) - 1
            values += data.draw(st.lists(st.integers(0, largest), min_size=count, max_size=count))
    raw = record.codec.pack(*values)
    assert len(raw) == record.size
    assert list(record.codec.unpack(raw)) == values
