# scripts/vm itself: what a command in the guest sees, what comes back, and that nothing stays.

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
VM = str(CHECKOUT / "scripts" / "vm")
# The smallest and the quickest to boot; the others are booted by test_kernels.py and below.
KERNEL = "6.12"
TIMEOUT_S = 60

# What the lab, tunnels and conntrack need of a kernel, each made to load its modules.
MODULES = """
set -ex
for kind in veth bridge "vxlan id 1 dstport 4789" "ipip remote 127.0.0.1" "geneve id 1 remote 127.0.0.1" wireguard; do
    ip link add k8d0 type $kind
    ip link del k8d0
done
ip link add k8d0 type dummy
ip link set k8d0 up
tc qdisc add dev k8d0 root netem loss 1%
tc qdisc add dev k8d0 clsact
tc filter add dev k8d0 egress matchall action drop
nft add table inet k8d
nft add chain inet k8d c '{ type filter hook input priority 0; }'
nft add rule inet k8d c ct state invalid counter drop
nft add table ip k8dnat
nft add chain ip k8dnat c '{ type nat hook postrouting priority 100; }'
nft add rule ip k8dnat c masquerade
iptables-legacy -t nat -A POSTROUTING -m conntrack --ctstate NEW -j SNAT --to-source 127.0.0.2
iptables-nft -A INPUT -m statistic --mode random --probability 0.1 -j DROP
iptables-nft -D INPUT 1
test "$(cat /proc/sys/net/netfilter/nf_conntrack_count)" -ge 0
test -r /sys/kernel/btf/nf_conntrack || test -r /sys/kernel/btf/vmlinux
grep -q __nf_conntrack_confirm /proc/kallsyms
echo p:k8d/confirm __nf_conntrack_confirm >/sys/kernel/tracing/kprobe_events
"""

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="qemu shows the guest this machine's files as root"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are x86-64"),
]


def vm(*words: str, timeout_s: int = TIMEOUT_S, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VM, "--timeout", str(timeout_s), *words],
        cwd=CHECKOUT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S + 600,  # the kernel may have to be downloaded
        check=False,
    )


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in listed.split()]


def wait_for_guest(process: subprocess.Popen[str]) -> int:
    """The pid of the qemu that a starting scripts/vm has as its only lasting child."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in children_of(process.pid):
            if Path(f"/proc/{child}/comm").read_text(encoding="utf-8").startswith("qemu"):
                return child
        time.sleep(0.05)
    raise AssertionError("no qemu was started")


def test_a_command_meets_another_kernel_and_our_files_and_its_results_come_back(tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("from the host\n")
    program = f"""
        cat {tmp_path}/ours; uname -r; nproc; id -u; pwd
        echo changed >{tmp_path}/ours && cat {tmp_path}/ours
        touch /usr/k8sdiag-vm-test /var/log/k8sdiag-vm-test
        echo "$K8SDIAG_TEST" >&2
        sleep 1000 &
        exit 7
    """
    done = vm(KERNEL, "sh", "-c", program, K8SDIAG_TEST="two words'")
    first, release, *rest = done.stdout.splitlines()
    assert (first, rest) == ("from the host", ["2", "0", str(CHECKOUT), "changed"]), done.stderr
    assert release.startswith(KERNEL)
    assert done.stderr == "two words'\n"
    assert done.returncode == 7
    assert (tmp_path / "ours").read_text() == "from the host\n"
    assert not Path("/usr/k8sdiag-vm-test").exists()
    assert not Path("/var/log/k8sdiag-vm-test").exists()


def test_much_output_arrives_whole_and_in_order() -> None:
    done = vm(KERNEL, "seq", "300000")
    assert done.returncode == 0
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 300_001))


def test_a_guest_that_hangs_is_ended_and_nothing_stays(tmp_path: Path) -> None:
    began_s = time.monotonic()
    done = vm(KERNEL, "sleep", "1000", timeout_s=3, TMPDIR=str(tmp_path))
    assert done.returncode == 124
    assert "trixie: not done after 3 s" in done.stderr
    assert time.monotonic() - began_s < 10
    assert list(tmp_path.iterdir()) == []


def test_a_guest_that_dies_shows_its_console() -> None:
    done = vm(KERNEL, "sh", "-c", "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")
    assert done.returncode == 125
    assert "sysrq triggered crash" in done.stderr
    assert "the guest died" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_guest_ends_with_who_started_it(sent: signal.Signals, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    call = [VM, KERNEL, "sleep", "1000"]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment) as process:
        guest = wait_for_guest(process)
        process.send_signal(sent)
        _, said = process.communicate(timeout=10)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{guest}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{guest}/stat").read_text(encoding="ascii").split()[2] == "Z":
            break  # ended; waiting for process 1 to notice
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{guest}/stat").exists()
    if sent != signal.SIGKILL:
        assert process.returncode == 130
        assert said == ""
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12", "7.x"])
def test_a_kernel_has_the_modules_of_a_node(kernel: str) -> None:
    done = vm(kernel, "sh", "-c", MODULES, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words", [[], ["6.1"], ["4.4", "true"], ["--timeout", "long", "6.1", "true"], ["fetch", "4.4"]]
)
def test_a_misspelt_call_is_explained(words: list[str]) -> None:
    done = subprocess.run([VM, *words], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert "scripts/vm [OPTION …] KERNEL COMMAND …" in done.stderr
