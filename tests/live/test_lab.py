"""The laboratory keeps its promises: faults are as large as it says, and nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from k8sdiag.host.lab import (
    FAULTS,
    LOG_ROOT,
    STATE_DIR,
    Expected,
    Lab,
    LabError,
    Pod,
    PodSpec,
    fill_table,
    lab_prefixes,
    share_snat_port,
)
from k8sdiag.host.lab.fault import VM_MARK

CHECKOUT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root"),
]

# Each fault its own prime, so that no count can be right by accident.
PRIMES = dict(zip(FAULTS, (n for n in range(7, 200) if all(n % d for d in range(2, 14) if d < n)), strict=False))
REAL_FAULTS = [name for name, fault in FAULTS.items() if fault.cause and not fault.vm_only]

CONNTRACK_MAX = Path("/proc/sys/net/netfilter/nf_conntrack_max")

# A program that builds a lab and holds it until it is killed.
HOLD = """
import time
from k8sdiag.host.lab import Lab
with Lab({prefix!r}):
    print("ready", flush=True)
    time.sleep(60)
"""


def prefix(letter: str) -> str:
    """A prefix of this test run only: several runs may share the machine."""
    return f"t{letter}{os.getpid()}"


@pytest.fixture(scope="module")
def routed() -> Iterator[Lab]:
    with Lab(prefix("r")) as lab:
        yield lab


@pytest.fixture(scope="module")
def bridged() -> Iterator[Lab]:
    with Lab(prefix("b"), bridge=True) as lab:
        yield lab


def marked_processes(lab_prefix: str) -> list[int]:
    """Living processes that carry the mark of a lab."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = environment.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"K8SDIAG_LAB={lab_prefix}".encode() in words:
            found.append(int(environment.parent.name))
    return found


def remains(state: dict[str, Any], lab_prefix: str) -> list[str]:
    """Whatever of a lab is still there: namespaces, cgroups, logs, processes, its state file."""
    names = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
    paths = [*state["cgroups"], *state["logs"], str(STATE_DIR / f"{lab_prefix}.json")]
    return [
        *(name for name in names if name.startswith(f"{lab_prefix}-")),
        *(path for path in paths if os.path.exists(path)),
        *(f"pid {pid}" for pid in marked_processes(lab_prefix)),
    ]


def state_of(lab_prefix: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((STATE_DIR / f"{lab_prefix}.json").read_text())
    return state


def start_python(program: str) -> subprocess.Popen[str]:
    """A Python process of its own that builds a lab, up to the line it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def assert_agreed(expected: Expected, wanted: int) -> None:
    """What was done and what the kernel counted are the same, and as much as was asked for."""
    if FAULTS[expected.fault].lossless:
        assert expected.count == 0 < expected.counter
        return
    assert expected.count == expected.counter
    # Other traffic on the machine may fill the backlog as well.
    assert expected.count == wanted or (expected.fault == "softnet-backlog" and expected.count > wanted)


@pytest.mark.parametrize("name", REAL_FAULTS)
def test_the_kernels_own_counter_agrees_with_what_a_fault_claims(routed: Lab, name: str) -> None:
    owner = routed.pods[REAL_FAULTS.index(name) % len(routed.pods)]

    expected = routed.inject(name, PRIMES[name], owner)

    assert_agreed(expected, PRIMES[name])
    assert (expected.fault, expected.owner) == (name, owner.owner)
    assert expected.netns in (owner.inode, routed.node.inode)
    if expected.culprit:
        assert expected.culprit in {pod.owner for pod in routed.pods} - {owner.owner}


@pytest.mark.parametrize("name", REAL_FAULTS)
def test_on_a_bridge_the_counts_hold_too(bridged: Lab, name: str) -> None:
    expected = bridged.inject(name, 5, bridged.pods[1])

    assert_agreed(expected, 5)
    assert expected.owner == bridged.pods[1].owner


def state_of_node(lab: Lab) -> tuple[str, ...]:
    """What faults change in the node and the pods beside rules: routes, addresses, the strictness of tracking."""
    addresses = (pod.tool(["ip", "-br", "address"]) for pod in lab.pods)
    loose = lab.node.sysctl("net.netfilter.nf_conntrack_tcp_loose")
    return lab.node.tool(["ip", "route"]), loose, *addresses


def test_a_fault_is_gone_after_it_was_injected(routed: Lab) -> None:
    pod, peer = routed.pods[0], routed.pods[2]
    before = state_of_node(routed)
    conntrack_max = CONNTRACK_MAX.read_text()
    for name in REAL_FAULTS:
        routed.inject(name, 1, pod)

    assert state_of_node(routed) == before
    with peer.sink(1111) as sink:
        pod.udp(peer.ipv4, 1111, 5)
        pod.udp(peer.ipv6, 1111, 6)
        deadline = time.monotonic() + 3
        while sink.received() < 11 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sink.received() == 11

    with routed.host_sysctl("net.core.netdev_budget", 301):  # waits until no lab changes the host
        assert state_of(routed.prefix)["sysctls"].keys() == {"net.core.netdev_budget"}
        assert int(Path("/proc/sys/net/core/netdev_max_backlog").read_text()) > 16
        assert CONNTRACK_MAX.read_text() == conntrack_max
    for netns in (routed.node, *routed.pods):
        assert "fault" not in netns.tool(["nft", "list", "tables"])
        assert "DROP" not in netns.tool(["iptables-legacy", "-S"])
    assert "tbf" not in routed.node.run(["tc", "qdisc"]).stdout
    assert "clsact" not in routed.node.run(["tc", "qdisc"]).stdout


def test_a_fault_that_fails_halfway_is_gone_too(routed: Lab) -> None:
    pod = routed.pods[0]
    before = state_of_node(routed)
    routed.node.add_nft_rule("inet", "no_dns", "type filter hook forward priority 0;", "udp dport 53 drop")
    try:
        with pytest.raises(LabError, match="does not answer"):
            routed.inject("stale-dnat", 3, pod)
    finally:
        routed.node.tool(["nft", "delete", "table", "inet", "no_dns"])
    assert state_of_node(routed) == before
    assert "fault" not in routed.node.tool(["nft", "list", "tables"])
    assert routed.inject("stale-dnat", 3, pod).counter == 3


def test_what_a_table_holds_is_told_and_can_be_forgotten(routed: Lab) -> None:
    node, pod, peer = routed.node, routed.pods[0], routed.pods[2]
    node.flush_conntrack()
    with peer.tcp_server(8000), pod.tcp_held(peer.ipv4, 8000, 37):
        assert node.conntrack()["entries"] == 37 == int(node.sysctl("net.netfilter.nf_conntrack_count"))
        node.flush_conntrack()
        assert node.conntrack()["entries"] == 0
        assert pod.conntrack()["entries"] == 0, "pods do not track"


def test_held_connections_end_without_a_packet(routed: Lab) -> None:
    pod, peer = routed.pods[0], routed.pods[2]
    with peer.tcp_server(8000), pod.tcp_held(peer.ipv4, 8000, 5):
        before = [netns.snmp() for netns in (pod, peer)]
    for netns, old in zip((pod, peer), before, strict=True):
        new = netns.snmp()
        assert {name: new[name] - old[name] for name in ("TcpOutSegs", "TcpOutRsts", "TcpInSegs")} == {
            "TcpOutSegs": 0,
            "TcpOutRsts": 0,
            "TcpInSegs": 0,
        }


@pytest.mark.parametrize("family", [4, 6])
def test_clients_of_one_source_port_know_what_each_of_them_lost(routed: Lab, family: Literal[4, 6]) -> None:
    one, two, three, busy, server = routed.pods[:5]

    done = share_snat_port(routed, {one: 8, two: 14, three: 24}, server, family=family, bystander=busy, packets=3_001)

    assert {owner: tally.sent for owner, tally in done.tallies.items()} == {
        one.owner: 8,
        two.owner: 14,
        three.owner: 24,
    }
    assert sum(done.lost.values()) == done.counter == 8 + 14 + 24 - 1
    assert (done.bystander.sent, done.bystander.connected) == (3_001, 3_001)
    assert routed.node.conntrack()["entries"] == 0, "what was translated is forgotten"


def table_pods(lab: Lab) -> tuple[dict[Pod, int], Pod, Pod]:
    """Two clients with different numbers of attempts, a server, and who fills the table."""
    one, two, culprit, _, server = lab.pods[:5]
    return {one: 11, two: 29}, server, culprit


@pytest.mark.parametrize("family", [4, 6])
def test_victims_of_a_full_table_know_what_each_of_them_lost(routed: Lab, family: Literal[4, 6]) -> None:
    before = CONNTRACK_MAX.read_text()
    clients, server, culprit = table_pods(routed)

    done = fill_table(routed, clients, server, culprit, family=family)

    assert done.lost == {pod.owner: count for pod, count in clients.items()}
    assert done.counter == sum(clients.values())
    assert {(tally.timed_out, tally.refused) for tally in done.tallies.values()} == {(11, 0), (29, 0)}
    with routed.host_sysctl("net.core.netdev_budget", 301):  # waits until no lab changes the host
        assert CONNTRACK_MAX.read_text() == before


def test_a_full_table_leaves_room_to_the_others_of_the_machine(
    routed: Lab, bridged: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, server, culprit = table_pods(routed)
    pod, peer = bridged.pods[0], bridged.pods[2]
    bridged.node.flush_conntrack()
    with peer.tcp_server(8000), pod.tcp_held(peer.ipv4, 8000, 90):
        assert bridged.node.conntrack()["entries"] == 90
        done = fill_table(routed, clients, server, culprit)
        assert done.limit > 90
        assert done.counter == sum(clients.values())
        monkeypatch.setattr("k8sdiag.host.lab.conntrack.HELD_MAX", 100)
        with pytest.raises(LabError, match="would be hurt"):
            fill_table(routed, clients, server, culprit)


@pytest.mark.skipif(VM_MARK.exists(), reason="a guest of scripts/vm may")
def test_what_would_hurt_the_machine_is_refused(routed: Lab) -> None:
    buckets = Path("/proc/sys/net/netfilter/nf_conntrack_buckets")
    before = buckets.read_text()
    with pytest.raises(LabError, match="scripts/vm"):
        routed.inject("chain-too-long", 3)
    assert buckets.read_text() == before


def test_without_tracking_there_is_nothing_to_fill() -> None:
    with Lab(prefix("n"), conntrack=False) as lab, pytest.raises(LabError, match="does not track"):
        lab.inject("table-full", 3)


def test_benign_noise_is_noise_and_no_fault(routed: Lab) -> None:
    pod = routed.pods[1]
    before = pod.snmp()

    expected = routed.inject("benign-noise", 5, pod)

    after = pod.snmp()
    grown = {name: after[name] - before[name] for name in ("UdpNoPorts", "UdpRcvbufErrors", "TcpEstabResets")}
    assert expected == Expected("benign-noise", None, "", 0, 0, "none", None)
    assert grown["UdpNoPorts"] == 5, "the late DNS answers arrived"
    assert grown["UdpRcvbufErrors"] == 0
    assert grown["TcpEstabResets"] >= 10, "both ways to end a connection by RST"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("random_source", [False, True])
def test_a_flood_arrives_whole(routed: Lab, family: int, random_source: bool) -> None:
    pod = routed.pods[0]
    before = pod.udp_no_ports(family)
    no_routes = routed.node.snmp()["IpExtInNoRoutes"]

    tally = pod.flood_udp(pod.ipv4 if family == 4 else pod.ipv6, 9999, 50_021, random_source=random_source)

    assert (tally.sent, tally.refused) == (50_021, 0)
    assert pod.udp_no_ports(family) - before == 50_021
    assert routed.node.snmp()["IpExtInNoRoutes"] == no_routes, "ICMP answers do not become drops elsewhere"


def test_random_sources_are_really_many(routed: Lab) -> None:
    pod = routed.pods[0]
    rule = "udp dport 9999 add @seen { ip saddr . udp sport }"
    pod.run(
        ["nft", "-f", "-"],
        stdin=f"table ip many {{\nset seen {{ type ipv4_addr . inet_service; size 65535; flags dynamic; }}\n"
        f"chain c {{\ntype filter hook input priority 0;\n{rule}\n}}\n}}\n",
    )
    try:
        pod.flood_udp(pod.ipv4, 9999, 2_000, random_source=True)
        listing = json.loads(pod.run(["nft", "-j", "list", "set", "ip", "many", "seen"]).stdout)
        sources = [tuple(pair["concat"]) for pair in listing["nftables"][-1]["set"]["elem"]]
    finally:
        pod.run(["nft", "delete", "table", "ip", "many"])
    assert len(sources) > 1_990
    assert all(address.startswith("198.18.") and port >= 32768 for address, port in sources)


def test_tcp_connects_are_told_apart(routed: Lab) -> None:
    pod, peer = routed.pods[0], routed.pods[1]
    server = peer.start(
        [sys.executable, "-c", "import socket; s = socket.create_server(('', 8000)); print('on', flush=True); input()"]
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "on\n"
    try:
        connected = pod.tcp_connect(peer.ipv4, 8000, 3)
    finally:
        server.communicate("\n")
    refused = pod.tcp_connect(peer.ipv4, 8000, 5)
    rule = ["FORWARD", "-p", "tcp", "--dport", "8000", "-j", "DROP"]
    routed.node.run(["iptables-nft", "-I", *rule])
    try:
        timed_out = pod.tcp_connect(peer.ipv4, 8000, 7, timeout_s=0.3)
    finally:
        routed.node.run(["iptables-nft", "-D", *rule])
    assert (connected.connected, refused.refused, timed_out.timed_out) == (3, 5, 7)
    assert (connected.sent, refused.sent, timed_out.sent) == (3, 5, 7)


def test_pods_look_as_kubelet_makes_them() -> None:
    uid = str(uuid.uuid4())
    top = f"/k8sdiag-{prefix('k')}"
    specs = [
        PodSpec("shop", "cart-1", uid=uid, cgroup_prefix=top),
        PodSpec("shop", "web-1", driver="systemd", uid=uid, qos="burstable", cgroup_prefix=top, named=False),
        PodSpec(kind="container", cgroup_prefix=top),
        PodSpec(kind="netns"),
    ]
    with Lab(prefix("k"), pods=specs) as lab:
        cart, web, container, bare = lab.pods
        cgroups = [set(re.findall(r":(/.*)", Path(f"/proc/{pod.pid}/cgroup").read_text())) for pod in lab.pods[:3]]
        underscored = uid.replace("-", "_")
        assert f"{top}/kubepods/besteffort/pod{uid}/{cart.container_id}" in cgroups[0]
        assert (
            f"{top}/kubepods.slice/kubepods-burstable.slice/"
            f"kubepods-burstable-pod{underscored}.slice/cri-containerd-{web.container_id}.scope"
        ) in cgroups[1]
        assert f"{top}/docker/{container.container_id}" in cgroups[2]
        for pod in (cart, web, container):
            assert os.stat(f"/proc/{pod.pid}/ns/net").st_ino == pod.inode
        assert (LOG_ROOT / f"shop_cart-1_{uid}" / "app" / "0.log").is_file()
        assert not os.path.exists(f"/run/netns/{web.name}"), "anonymous: only its process holds it"
        assert os.stat(f"/run/netns/{bare.name}").st_ino == bare.inode
        assert len({pod.inode for pod in lab.pods} | {lab.node.inode}) == 5
        assert len({pod.cookie for pod in lab.pods} | {lab.node.cookie}) == 5
        assert [pod.owner for pod in lab.pods] == ["shop/cart-1", "shop/web-1", container.container_id[:12], bare.name]
        # A command runs where its pod lives.
        assert web.run(["readlink", "/proc/self/ns/net"]).stdout == f"net:[{web.inode}]\n"
        assert web.cgroup_path in web.run(["cat", "/proc/self/cgroup"]).stdout
    assert not any(path for path in [*Path("/sys/fs/cgroup").glob(top[1:]), *Path("/sys/fs/cgroup").glob(f"*{top}")])


def test_the_caller_stays_in_its_own_namespace(routed: Lab) -> None:
    before = os.stat("/proc/thread-self/ns/net").st_ino

    routed.inject("closed-port", 3)
    routed.pods[0].sysctl("net.ipv4.ip_forward")

    assert os.stat("/proc/thread-self/ns/net").st_ino == before
    assert {task.stat().st_ino for task in Path("/proc/self/task").glob("*/ns/net")} == {before}


def test_down_leaves_nothing() -> None:
    logs_before = LOG_ROOT.exists()
    with Lab(prefix("d")) as lab:
        state = state_of(lab.prefix)
        lab.inject("udp-rcvbuf", 3)
        assert len(remains(state, lab.prefix)) > 3 * len(lab.pods)
    assert remains(state, lab.prefix) == []
    if not lab_prefixes():
        assert LOG_ROOT.exists() == logs_before


def test_an_exception_inside_leaves_nothing() -> None:
    states = []

    def fail_inside() -> None:
        with Lab(prefix("e")) as lab:
            states.append(state_of(lab.prefix))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert remains(states[0], prefix("e")) == []


def test_an_exception_while_building_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []

    def fail(lab: Lab, _pod: object) -> None:
        states.append(state_of(lab.prefix))
        raise OSError("no veth today")

    monkeypatch.setattr(Lab, "_connect", fail)
    with pytest.raises(OSError, match="no veth today"), Lab(prefix("x")):
        pass
    assert remains(states[0], prefix("x")) == []


def test_sigterm_takes_the_lab_down() -> None:
    process = start_python(HOLD.format(prefix=prefix("s")))
    state = state_of(prefix("s"))
    process.terminate()
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert process.stdout is not None
    process.stdout.close()
    assert remains(state, prefix("s")) == []


def test_what_a_killed_lab_leaves_is_removed_by_down() -> None:
    sysctl = Path("/proc/sys/net/core/netdev_budget")
    before = sysctl.read_text()
    changed = int(before) + 1
    process = start_python(
        "import time\nfrom k8sdiag.host.lab import Lab\n"
        f"with Lab({prefix('z')!r}) as lab, lab.pods[0].sink(7777), "
        f"lab.host_sysctl('net.core.netdev_budget', {changed}):\n print('ready', flush=True); time.sleep(60)"
    )
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    state = state_of(prefix("z"))
    assert len(remains(state, prefix("z"))) > 10
    assert int(sysctl.read_text()) == changed

    Lab(prefix("z")).down()

    assert remains(state, prefix("z")) == []
    assert sysctl.read_text() == before


def test_a_lab_replaces_a_killed_one_of_the_same_name() -> None:
    process = start_python(HOLD.format(prefix=prefix("o")))
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    old = state_of(prefix("o"))
    with Lab(prefix("o")) as lab:
        assert lab.inject("closed-port", 3).counter == 3
        assert not any(os.path.exists(path) for path in [*old["cgroups"], *old["logs"]])
    assert remains(old, prefix("o")) == []


def test_two_labs_live_side_by_side(routed: Lab) -> None:
    with Lab(prefix("p")) as other:
        assert other.subnet != routed.subnet
        results: dict[str, Expected] = {}

        def inject(lab: Lab, count: int) -> None:
            results[lab.prefix] = lab.inject("nft-forward", count)

        threads = [threading.Thread(target=inject, args=(lab, count)) for lab, count in ((routed, 101), (other, 103))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results[routed.prefix].counter == 101
        assert results[other.prefix].counter == 103
    assert routed.inject("closed-port", 3).counter == 3, "taking one down does not hurt the other"


def lab_command(*words: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(CHECKOUT / "scripts/lab"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, user=user, timeout=60)


def test_the_command_line_finds_its_lab_again() -> None:
    name = ["--prefix", prefix("c")]
    try:
        up = lab_command(*name, "up", "--bridge")
        assert up.returncode == 0, up.stderr
        assert lab_command(*name, "status").stdout.count("shop/cart-7d9f8c6b5-x2x4q") >= 1
        injected = lab_command(*name, "inject", "nft-input", "--count", "13", "--pod", "payments/ledger-0")
        expected = json.loads(injected.stdout)
        assert (expected["owner"], expected["count"], expected["counter"]) == ("payments/ledger-0", 13, 13)
        state = state_of(prefix("c"))
    finally:
        down = lab_command(*name, "down")
    assert down.returncode == 0, down.stderr
    assert remains(state, prefix("c")) == []


def test_the_command_line_lists_and_explains_every_fault() -> None:
    lines = lab_command("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(FAULTS)
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prefix", "nosuchlab", "inject", "closed-port"], "no lab 'nosuchlab' is up"),
        (["--prefix", "Bad Name", "down"], "is no lab prefix"),
    ],
)
def test_errors_say_what_to_do_without_a_traceback(words: list[str], says: str) -> None:
    result = lab_command(*words)
    assert result.returncode == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_without_root_the_message_names_sudo() -> None:
    program = "import sys; from k8sdiag.host import lab; sys.exit(lab.main(['up']))"
    # The interpreter may live where only root can look: drop root after it has started.
    demoted = f"import os; from k8sdiag.host import lab; os.setuid(65534)\n{program}"
    result = subprocess.run(
        [sys.executable, "-c", demoted], capture_output=True, text=True, cwd=CHECKOUT, check=False, timeout=30
    )
    assert result.returncode == 1
    assert "sudo" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_fault_or_pod_names_the_known_ones(routed: Lab) -> None:
    with pytest.raises(LabError, match="closed-port"):
        routed.inject("no-such-fault")
    with pytest.raises(LabError, match="payments/ledger-0"):
        routed.inject("closed-port", 3, "shop/nobody")


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "nft" else found(tool))
    with pytest.raises(LabError, match=r"missing: nft.*install.* nftables"):
        Lab(prefix("m")).up()
