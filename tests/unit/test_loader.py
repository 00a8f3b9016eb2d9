# What of a kernel's types and functions reaches the compiler, and what happens where some of it is not there.

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from k8sdiag.host import bpf, btf, loader
from k8sdiag.host.bpf import Compilation, Probe
from k8sdiag.host.btf import Btf
from k8sdiag.host.loader import CONNTRACK_GROUPS, KPROBED_FUNCTIONS, KPROBES
from tests.unit.test_btf import Blob

PROBES = Path(__file__).resolve().parents[2] / "probes"
SPANS = {name: (0xFFFFFFFF81000000 + 0x100 * at, 0xFFFFFFFF81000100 + 0x100 * at)
         for at, name in enumerate(KPROBED_FUNCTIONS)}  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Kprobes


def on(monkeypatch: pytest.MonkeyPatch, machine: str, pmu: Path) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    monkeypatch.setattr(loader, "KPROBE_PMU", pmu)


@pytest.mark.parametrize(
    ("machine", "first_argument", "returned"), [("x86_64", 112, 80), ("aarch64", 0, 0)], ids=["x86_64", "aarch64"]
)
def test_where_kprobes_and_their_functions_are_conntrack_is_compiled_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, first_argument: int, returned: int
) -> None:
    # struct pt_regs: di and ax on x86_64, regs[0] for both on aarch64
    on(monkeypatch, machine, tmp_path)
    assert loader.kprobe_defines(SPANS) == [
        "-DKPROBES", f"-DARGUMENT_1={first_argument // 8}", f"-DRETURNED={returned // 8}",
    ]  # fmt: skip


def test_without_kprobes_conntrack_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on(monkeypatch, "x86_64", tmp_path / "none")
    assert loader.kprobe_defines(SPANS) == []


@pytest.mark.parametrize("machine", ["riscv64", "s390x", "i686"])
def test_on_other_machines_conntrack_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str) -> None:
    on(monkeypatch, machine, tmp_path)
    assert loader.kprobe_defines(SPANS) == []


@pytest.mark.parametrize("missing", KPROBED_FUNCTIONS)
def test_where_a_function_is_missing_conntrack_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    on(monkeypatch, "x86_64", tmp_path)
    assert loader.kprobe_defines({name: span for name, span in SPANS.items() if name != missing}) == []
    assert loader.kprobe_defines(SPANS)


def test_each_program_for_a_function_stands_in_the_probe() -> None:
    text = (PROBES / "conntrack.c").read_text()
    assert set(re.findall(r"^int (on_\w+)\(struct registers \*", text, re.MULTILINE)) == {
        name for name, _, _ in KPROBES
    }
    assert {function for _, function, _ in KPROBES} == set(KPROBED_FUNCTIONS) <= set(loader.SYMBOLS)


# ----------------------------------------------------------------------------------------------------
# Types


def kernel(members: set[tuple[str, str]], records: dict[str, int]) -> bytes:
    """A kernel's types with these members (dotted paths too), 8 bytes each, and these sizes."""
    blob = Blob()
    word = blob.integer("long", 8)

    def record(name: str, paths: list[str]) -> int:
        own = list(dict.fromkeys(path.split(".")[0] for path in paths))
        kinds = []
        for member in own:
            inner = [path.partition(".")[2] for path in paths if path.startswith(member + ".")]
            kinds.append(record("", inner) if inner else word)
        tail = b"".join(
            struct.pack("<III", blob.text(member), kind, 64 * at)
            for at, (member, kind) in enumerate(zip(own, kinds, strict=True), 1)
        )
        return blob.add(btf.KIND_STRUCT, name, records.get(name, 64), tail, len(own))

    for name in dict.fromkeys(record_name for record_name, _ in sorted(members)):
        record(name, [path for one, path in sorted(members) if one == name])
    return blob.build()


WHOLE = {member for _, members, _ in CONNTRACK_GROUPS for member in members}
CHAINS = ("ip_conntrack_stat", "chaintoolong")
SIZES = {"nf_conntrack_tuple_hash": 56, "nf_conn": 248}


def conntrack_defines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, members: set[tuple[str, str]]
) -> tuple[list[str], list[str]]:
    monkeypatch.setattr(loader, "SYSFS", tmp_path)  # conntrack is built in
    defines, known = loader._conntrack_defines(Btf(kernel(members, SIZES)))
    assert len(defines) == len(set(defines))
    return defines, known


def test_all_groups_are_known_where_all_of_conntrack_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    defines, known = conntrack_defines(monkeypatch, tmp_path, WHOLE | {CHAINS})
    assert known == [*(group for group, _, _ in CONNTRACK_GROUPS), "chains"]
    names = {define.partition("=")[0] for define in defines}
    assert names == {
        *(f"-DOFF_{record}_{path.replace('.', '_')}" for record, path in WHOLE | {CHAINS}),
        *(f"-DSIZE_{record}" for _, _, records in CONNTRACK_GROUPS for record in records),
    }
    assert "-DSIZE_nf_conntrack_tuple_hash=56" in defines
    # the first word of each made-up struct is at 8
    assert "-DOFF_ip_conntrack_stat_chaintoolong=8" in defines
    assert "-DOFF_ip_conntrack_stat_drop=16" in defines
    assert "-DOFF_nf_conn_ct_net_net=16" in defines


@pytest.mark.parametrize(
    ("group", "missing"), [(group, member) for group, members, _ in CONNTRACK_GROUPS for member in members]
)
def test_a_group_of_which_anything_is_missing_is_left_out_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str, missing: tuple[str, str]
) -> None:
    defines, known = conntrack_defines(monkeypatch, tmp_path, WHOLE - {missing})
    assert known == [name for name, _, _ in CONNTRACK_GROUPS if name != group]
    mine = next(members for name, members, _ in CONNTRACK_GROUPS if name == group)
    for record, path in mine:
        assert not [define for define in defines if define.startswith(f"-DOFF_{record}_{path.replace('.', '_')}=")]
    assert ("-DSIZE_nf_conntrack_tuple_hash=56" in defines) == (group != "tuples")


def test_without_conntrack_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert conntrack_defines(monkeypatch, tmp_path, {("sk_buff", "len")}) == ([], [])


def test_a_kernel_that_counts_no_long_chains_does_not_know_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    defines, known = conntrack_defines(monkeypatch, tmp_path, WHOLE)
    assert "chains" not in known
    assert "statistics" in known
    assert not [define for define in defines if "chaintoolong" in define]


def test_the_types_of_conntrack_are_those_of_its_module_where_it_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "SYSFS", tmp_path)
    below = Blob()
    word = below.integer("long", 8)
    below.record("sk_buff", ("len", word, 64))
    module = Blob(below)
    module.record("nf_conn", ("status", word, 1024))
    (tmp_path / "nf_conntrack").write_bytes(module.build())
    assert loader._conntrack_defines(Btf(below.build())) == (["-DOFF_nf_conn_status=128"], ["state"])


@pytest.mark.parametrize("size", [0, 56, 70_000])
def test_the_size_of_a_struct_is_what_the_kernel_says(size: int) -> None:
    blob = Blob()
    blob.add(btf.KIND_FWD, "tuple")
    blob.add(btf.KIND_STRUCT, "tuple", size)
    blob.add(btf.KIND_UNION, "either", 8)
    types = Btf(blob.build())
    assert types.size("tuple") == size
    assert types.size("either") is None
    assert types.size("nothing") is None


def test_the_size_of_a_struct_of_the_running_kernel_holds_its_last_member() -> None:
    if not Path("/sys/kernel/btf/vmlinux").exists():
        pytest.skip("this kernel was built without BTF")
    types = Btf.vmlinux()
    size, last = types.size("sk_buff"), types.offset("sk_buff", "extensions")
    assert size is not None
    assert last is not None
    assert last + 8 <= size < 2 * last
    assert types.size("list_head") == 2 * struct.calcsize("P")


# ----------------------------------------------------------------------------------------------------
# Programs for kernel functions


def probe_of(*functions: tuple[str, bool]) -> Probe:
    """A probe with a descriptor for each program and no map; none of them is a program."""
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(1 + len(functions))]
    about = {"kprobes": [list(function) for function in functions], "maps": []}
    return Probe(cast("Compilation", SimpleNamespace(result=lambda: (about, descriptors))))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_descriptors_are_those_of_the_programs_and_then_of_the_maps() -> None:
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    about: dict[str, Any] = {"kprobes": [["f", False], ["g", True]], "maps": ["control", "seen"]}
    probe = Probe(cast("Compilation", SimpleNamespace(result=lambda: (about, descriptors))))
    assert probe.program == descriptors[0]
    assert probe._kprobe_programs == descriptors[1:3]
    assert probe.map_fds == {"control": descriptors[3], "seen": descriptors[4]}
    probe.close()
    assert not any(map(is_open, descriptors))


def test_a_function_that_cannot_be_probed_is_named_with_the_kernels_reason() -> None:
    # whether this kernel has kprobes or not: it has no such function, and no such program
    probe = probe_of(("no_such_function_of_any_kernel", False))
    try:
        why = probe.attach_kprobes()
        assert re.fullmatch(r"no_such_function_of_any_kernel: [A-Z].+", why)
        assert probe._links == []
    finally:
        probe.close()


def test_programs_are_attached_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str, bool]] = []
    links: list[int] = []
    refused = {"early_drop"}

    def attached(program: int, function: str, *, at_return: bool) -> int:
        asked.append((program, function, at_return))
        if function in refused:
            raise PermissionError(1, "Operation not permitted")
        links.append(os.open(os.devnull, os.O_RDONLY))
        return links[-1]

    monkeypatch.setattr(bpf, "_kprobe", attached)
    probe = probe_of(("confirm", False), ("confirm", True), ("early_drop", True))
    try:
        assert probe.attach_kprobes() == "early_drop: Operation not permitted"
        assert len(links) == 2
        assert not any(map(is_open, links))
        assert probe._links == []
        refused.clear()
        asked.clear()
        links.clear()
        assert probe.attach_kprobes() == ""
        programs = probe._kprobe_programs
        assert asked == [
            (programs[0], "confirm", False), (programs[1], "confirm", True), (programs[2], "early_drop", True),
        ]  # fmt: skip
        assert all(map(is_open, links))
        probe.detach()
        assert not any(map(is_open, links))
    finally:
        probe.close()


def test_no_programs_for_functions_are_attached_at_once() -> None:
    probe = probe_of()
    assert probe.attach_kprobes() == ""
    probe.close()
