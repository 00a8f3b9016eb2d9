# Each check of the doctor against made-up files; the probe itself is tried in tests/live/test_doctor.py.

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from k8sdiag.facts import AnyFact, Capability, DropKey, Drops, Sample, Status
from k8sdiag.host import doctor
from k8sdiag.host.doctor import PROVOKED, Report, Row

CHECKOUT = Path(__file__).resolve().parents[2]
FULL_RIGHTS = 0x1FFFFFFFFFF
WIDE_COMMAND = "sysctl -w " + "net.ipv4.conf.all.rp_filter=2 " * 5


def root_with(tmp_path: Path, **files: str) -> Path:
    """A host root with the files; __ in a name stands for a slash."""
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def report_of(*rows: Row) -> Report:
    return Report(doctor.SCHEMA, "0.1", "node-1", "6.18.0", "x86_64", rows)


@pytest.mark.parametrize(
    ("text", "status", "named"),
    [
        ("[none] integrity confidentiality\n", "full", "none"),
        ("none [integrity] confidentiality\n", "full", "integrity"),
        ("none integrity [confidentiality]\n", "missing", "confidentiality"),
    ],
)
def test_lockdown_is_named_and_blinds_only_at_confidentiality(
    tmp_path: Path, text: str, status: Status, named: str
) -> None:
    row = doctor._lockdown(root_with(tmp_path, sys__kernel__security__lockdown=text))
    assert (row.status, row.required) == (status, True)
    assert row.why.startswith(named)
    assert ("lockdown=integrity" in row.remedy) == (status == "missing")


def test_no_lockdown_file_is_no_lockdown_and_said(tmp_path: Path) -> None:
    row = doctor._lockdown(tmp_path)
    assert row.status == "full"
    assert "no such file" in row.why


@pytest.mark.parametrize(
    ("lacking_bits", "status", "lacking"),
    [
        ((), "full", set()),
        ((39, 38), "full", set()),  # CAP_SYS_ADMIN stands for both
        ((34,), "inferred", {"CAP_SYSLOG"}),
        ((21,), "missing", {"CAP_SYS_ADMIN"}),
        ((21, 39), "missing", {"CAP_SYS_ADMIN", "CAP_BPF"}),
        ((21, 38, 19, 12), "missing", {"CAP_SYS_ADMIN", "CAP_PERFMON", "CAP_SYS_PTRACE", "CAP_NET_ADMIN"}),
    ],
)
def test_lacking_capabilities_are_named_with_what_each_blinds(
    tmp_path: Path, lacking_bits: tuple[int, ...], status: Status, lacking: set[str]
) -> None:
    effective = FULL_RIGHTS & ~sum(1 << bit for bit in lacking_bits)
    row = doctor._privileges(root_with(tmp_path, proc__self__status=f"Name:\tx\nCapEff:\t{effective:016x}\n"))
    assert row.status == status
    assert {name for name in doctor._PRIVILEGES if f"{name}:" in row.blinds} == lacking
    assert bool(row.remedy) == bool(lacking)


def test_rights_that_end_at_a_user_namespace_do_not_count(tmp_path: Path) -> None:
    status = f"CapEff:\t{FULL_RIGHTS:016x}\n"
    root = root_with(tmp_path, proc__self__status=status, proc__self__uid_map="         0          0 4294967295\n")
    assert doctor._privileges(root).status == "full"
    root = root_with(tmp_path, proc__self__uid_map="         0       1000          1\n")
    row = doctor._privileges(root)
    assert row.status == "missing"
    assert row.why.startswith("root of a user namespace")
    assert row.remedy.startswith("outside of the user namespace: sudo ")


def test_kprobes_are_there_where_the_kernel_has_the_event_source(tmp_path: Path) -> None:
    missing = doctor._kprobes(tmp_path)
    assert (missing.status, missing.required) == ("missing", False)
    assert "conntrack" in missing.blinds
    assert doctor._kprobes(root_with(tmp_path, sys__bus__event_source__devices__kprobe__type="6\n")).status == "full"


def test_tracefs_may_be_absent_and_blinds_nothing(tmp_path: Path) -> None:
    row = doctor._tracefs(tmp_path)
    assert (row.status, row.required, row.blinds) == ("missing", False, "nothing")
    assert "done without" in row.why
    (tmp_path / "sys/kernel/debug/tracing/events").mkdir(parents=True)
    assert doctor._tracefs(tmp_path).hook == "/sys/kernel/debug/tracing"


@pytest.mark.parametrize(
    ("mounts", "why"),
    [
        ("25 1 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "cgroup v2"),
        ("25 1 0:22 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", "cgroup v1"),
        ("1 1 0:1 / /a rw - cgroup cgroup rw\n2 1 0:2 / /b rw shared:3 - cgroup2 cgroup2 rw\n", "cgroup v1 and v2"),
    ],
)
def test_the_cgroup_versions_are_named(tmp_path: Path, mounts: str, why: str) -> None:
    row = doctor._cgroups(root_with(tmp_path, proc__self__mountinfo=mounts))
    assert (row.status, row.why) == ("full", why)


def test_without_cgroups_pods_are_not_told(tmp_path: Path) -> None:
    assert doctor._cgroups(tmp_path).status == "missing"
    assert doctor._cgroups(root_with(tmp_path, proc__self__cgroup="0::/\n")).status == "full"


def test_measuring_the_probe_is_off_unless_the_sysctl_says_one(tmp_path: Path) -> None:
    assert doctor._statistics(root_with(tmp_path, proc__sys__kernel__bpf_stats_enabled="0\n")).status == "missing"
    assert doctor._statistics(root_with(tmp_path, proc__sys__kernel__bpf_stats_enabled="1\n")).status == "full"


def test_pods_without_a_log_directory_are_counted(tmp_path: Path) -> None:
    owners = {"uid-1": "shop", "uid-2": "", "uid-3": ""}
    assert doctor._pod_names(tmp_path, owners).status == "missing"
    (tmp_path / "var/log/pods/shop_web_uid-1").mkdir(parents=True)
    row = doctor._pod_names(tmp_path, owners)
    assert (row.status, row.why) == ("inferred", "2 of 3 pods have no directory there")
    assert doctor._pod_names(tmp_path, {"uid-1": "shop"}).status == "full"


def test_unreadable_type_information_is_missing_with_the_file_named(tmp_path: Path) -> None:
    vmlinux, row = doctor._btf(tmp_path)
    assert vmlinux is None
    assert (row.status, row.required) == ("missing", True)
    assert f"{tmp_path}/sys/kernel/btf/vmlinux: No such file" in row.why
    assert "CONFIG_DEBUG_INFO_BTF" in row.remedy
    assert doctor._losses(None).status == "counters"
    assert doctor._fentry(None, tmp_path).status == "missing"


@pytest.mark.parametrize(
    ("package", "why"),
    [
        ("raise ImportError('libbcc.so.0: cannot open shared object file')", "libbcc.so.0: cannot open"),
        ("import os; os.write(2, b'LLVM is unwell'); os._exit(3)", "LLVM is unwell"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_a_bcc_that_does_not_load_is_missing_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, why: str
) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text(package)
    monkeypatch.setenv("K8SDIAG_BCC_PATH", str(tmp_path))
    row = doctor._bcc()
    assert (row.status, row.required) == ("missing", True)
    assert why in row.why
    assert "install" in row.remedy


def drops_of(*flows: tuple[int, str, int, str, int, int, int]) -> list[AnyFact]:
    """Facts of (key, src, sport, dst, dport, protocol, skbs)."""
    facts: list[AnyFact] = [
        DropKey(key, 3, 1, src=src, sport=sport, dst=dst, dport=dport, protocol=protocol)
        for key, src, sport, dst, dport, protocol, _ in flows
    ]
    counts = tuple(flow[-1] for flow in flows)
    return [*facts, Drops(tuple(flow[0] for flow in flows), counts, counts, counts)]


def test_only_the_drops_made_on_purpose_are_counted() -> None:
    local = "127.0.0.1"
    facts = [
        *drops_of((1, local, 1000, local, 2000, 17, 4), (2, local, 1000, local, 2001, 17, 90)),
        *drops_of((3, local, 2000, local, 1000, 17, 900), (4, local, 1000, local, 2000, 6, 9000)),
        Drops((1, 2), (3, 5), (3, 5), (3, 5)),
        Sample(1, 5, 28),
        Sample(2, 5, 28),
    ]
    assert doctor._seen(facts, (local, 1000, local, 2000)) == (7, 1)


@pytest.mark.parametrize(
    ("skbs", "status"), [(PROVOKED, "full"), (PROVOKED - 1, "missing"), (0, "missing"), (PROVOKED + 1, "missing")]
)
def test_a_probe_that_does_not_count_exactly_is_not_to_be_relied_on(skbs: int, status: Status) -> None:
    row = doctor._counted(Capability("drops", "full", "raw"), doctor._Seen(skbs, 1), 0.4)
    assert row.status == status
    assert row.why == f"counted {skbs} of {PROVOKED} drops made on loopback; ready in 0.40 s"
    assert report_of(row).exit_code == (status == "missing")


def test_a_probe_that_could_not_be_tried_is_neither_proven_nor_missing() -> None:
    row = doctor._counted(Capability("drops", "full", "raw"), "not tried: Network is unreachable", 0.4)
    assert row.status == "inferred"
    assert "Network is unreachable" in row.why
    assert doctor._sampled("not tried").status == "missing"


def test_a_kernel_without_reasons_is_told_by_function_names() -> None:
    said = Capability("drops", "inferred", "raw", "this kernel gives no drop reasons")
    row = doctor._counted(said, doctor._Seen(PROVOKED, 1), 0.4)
    assert row.status == "inferred"
    assert "gives no drop reasons" in row.why


@pytest.mark.parametrize(
    ("status", "required", "exit_code"),
    [("missing", True, 1), ("missing", False, 0), ("inferred", True, 0), ("counters", True, 0), ("full", True, 0)],
)
def test_only_something_required_that_is_missing_fails(status: Status, required: bool, exit_code: int) -> None:
    assert report_of(Row("x", status, required, "h"), Row("y", "full", True, "h")).exit_code == exit_code


def test_a_report_survives_json() -> None:
    report = report_of(Row("kprobes", "missing", False, "/sys/x", "why", "blinds", "remedy"))
    encoded = msgspec.json.encode(report)
    assert msgspec.json.decode(encoded, type=Report) == report
    assert set(msgspec.json.decode(encoded)["rows"][0]) == set(Row.__struct_fields__)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_text_fits_the_width_but_never_breaks_a_command(width: int) -> None:
    words = "what was found here is told in rather many words " * 3
    report = report_of(
        Row("drops", "missing", True, "raw_tracepoint:kfree_skb", words, words, WIDE_COMMAND),
        Row("symbols", "full", False, "/proc/kallsyms", "", "not shown"),
    )
    lines = doctor.text(report, width)
    assert [line for line in lines if len(line) > width] == [f"{' ' * 26}do: {WIDE_COMMAND}"]
    assert lines[0] == "k8sdiag 0.1 on node-1, kernel 6.18.0 (x86_64)"
    assert lines[2] == "missing  drops            raw_tracepoint:kfree_skb"
    assert not any("not shown" in line for line in lines)
    assert lines[-1] == "Watching is not possible here: drops missing."
    assert doctor.text(report_of(report.rows[1]), width)[-1] == "This node can be watched."


def test_the_doctor_keeps_llvm_out_of_its_own_process() -> None:
    code = "import sys; from k8sdiag.host import doctor; doctor._bcc(); print('bcc' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"
