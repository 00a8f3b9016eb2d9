# Namespaces, devices, addresses and pods of the running machine. Everything is made here and taken away again.

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from k8sdiag.facts import Address, AnyFact, HostPod, Link, NetnsOwner
from k8sdiag.host.inventory import LOOKS_PER_TURN, Inventory
from k8sdiag.host.inventory.rtnetlink import Route, parse

pytestmark = [pytest.mark.live, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

CHECKOUT = Path(__file__).resolve().parents[2]
S = 10**9
UID = f"2f0c3b1e-5a7d-4c1e-9b2a-{os.getpid():012x}"
CONTAINER = "3e8b" * 16
_numbers = itertools.count(1)
_Kind = TypeVar("_Kind", bound=AnyFact)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def inode_of(name: str) -> int:
    return os.stat(f"/run/netns/{name}").st_ino


def only(kind: type[_Kind], facts: list[AnyFact], netns: int) -> list[_Kind]:
    return [fact for fact in facts if isinstance(fact, kind) and getattr(fact, "netns", 0) == netns]


class Machine:
    """Namespaces, processes and directories that are gone when the test is over."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directories: list[Path] = []

    def namespace(self, name: str = "") -> str:
        name = name or f"k8dinv-{os.getpid()}-{next(_numbers)}"
        ip("netns", "add", name)
        self._names.append(name)
        return name

    def delete(self, name: str) -> None:
        ip("netns", "del", name)
        self._names.remove(name)

    def pair(self, one: str, two: str) -> tuple[str, str]:
        """A veth between two namespaces; returns the names of its ends."""
        number = next(_numbers)
        ends = f"e{number}a", f"e{number}b"
        ip("link", "add", ends[0], "netns", one, "type", "veth", "peer", "name", ends[1], "netns", two)
        return ends

    def directory(self, path: Path) -> Path:
        """Make a directory and those above it that are missing."""
        missing = [place for place in (path, *path.parents) if not place.exists()]
        path.mkdir(parents=True)
        self._directories += reversed(missing)
        return path

    def process(self, *prefix: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*prefix, "sleep", "300"], stdin=subprocess.DEVNULL)
        self._processes.append(process)
        if prefix:  # `ip netns exec` becomes sleep when it is inside
            wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self._processes.remove(process)

    def pod_process(self, uid: str, *prefix: str) -> subprocess.Popen[bytes]:
        """A process in the cgroup that kubelet would have given it."""
        root = next(path for path in CGROUP_ROOTS if (path / "cgroup.procs").exists())
        cgroup = self.directory(root / f"kubepods-test{os.getpid()}" / "burstable" / f"pod{uid}" / CONTAINER)
        process = self.process(*prefix)
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        return process

    def close(self) -> None:
        for process in list(self._processes):
            self.end(process)
        for name in list(self._names):
            self.delete(name)
        for path in reversed(self._directories):
            for _ in range(50):  # a cgroup is busy for a moment after its last process
                try:
                    path.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.02)
                else:
                    break


CGROUP_ROOTS = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"), *sorted(Path("/sys/fs/cgroup").glob("*"))]


def wait_for(condition: object, seconds: float = 5) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    try:
        yield made
    finally:
        made.close()


def told(inventory: Inventory, t_s: float) -> list[AnyFact]:
    return list(inventory.facts(round(t_s * S)))


def cookie_from_outside(name: str) -> int:
    """SO_NETNS_COOKIE of a namespace, asked by a process of its own."""
    script = "import socket\ns = socket.socket()\nprint(int.from_bytes(s.getsockopt(1, 71, 8), 'little'))"
    return int(ip("netns", "exec", name, sys.executable, "-c", script))


def test_namespaces_are_named_and_their_veths_lead_to_each_other(machine: Machine) -> None:
    one, two = machine.namespace(), machine.namespace()
    first, second = machine.pair(one, two)
    ip("-n", one, "addr", "add", "10.255.77.1/24", "dev", first)
    ip("-n", two, "addr", "add", "10.255.77.2/24", "dev", second)
    ip("-n", two, "addr", "add", "fd77::2/64", "dev", second, "nodad")
    ip("-n", one, "link", "set", "lo", "up")
    facts = told(Inventory(), 1)

    inodes = inode_of(one), inode_of(two)
    for name, inode in zip((one, two), inodes, strict=True):
        (owner,) = only(NetnsOwner, facts, inode)
        assert (owner.kind, owner.name, owner.how, owner.confidence) == ("netns", name, "netns", "proven")
        assert owner.netns_cookie == cookie_from_outside(name) != 0
        assert (owner.from_t_ns, owner.until_t_ns) == (S, None)
    for name, inode, peer, device in ((one, inodes[0], inodes[1], first), (two, inodes[1], inodes[0], second)):
        links = {link.name: link for link in only(Link, facts, inode)}
        told_by_ip = {link["ifname"]: link for link in json.loads(ip("-n", name, "-j", "-d", "link"))}
        assert {n: (link.ifindex, link.mtu) for n, link in links.items()} == {
            n: (link["ifindex"], link["mtu"]) for n, link in told_by_ip.items()
        }
        assert (links[device].kind, links[device].peer_netns) == ("veth", peer)
        assert links[device].peer_ifindex == told_by_ip[device]["link_index"]
        assert links[device].peer_netns_cookie == only(NetnsOwner, facts, peer)[0].netns_cookie
        assert (links["lo"].kind, links["lo"].peer_netns) == ("", 0)
    assert {fact.address for fact in only(Address, facts, inodes[0])} == {"10.255.77.1", "127.0.0.1", "::1"}
    assert {fact.address for fact in only(Address, facts, inodes[1])} >= {"10.255.77.2", "fd77::2"}


def test_a_name_removed_while_a_process_stays_has_ended(machine: Machine) -> None:
    name = machine.namespace()
    inode = inode_of(name)
    machine.process("ip", "netns", "exec", name)
    inventory = Inventory()
    assert [owner.kind for owner in only(NetnsOwner, told(inventory, 1), inode)] == ["netns"]
    machine.delete(name)
    ended, living = only(NetnsOwner, told(inventory, 2), inode)
    assert (ended.kind, ended.name, ended.until_t_ns) == ("netns", name, 2 * S)
    assert (living.kind, living.name, living.netns_cookie) == ("process", "sleep", ended.netns_cookie)


def test_an_address_that_comes_later_is_noticed_within_a_round(machine: Machine) -> None:
    one, two = machine.namespace(), machine.namespace()
    device, _ = machine.pair(one, two)
    inventory = Inventory()
    told(inventory, 1)
    ip("-n", one, "addr", "add", "10.255.79.1/24", "dev", device)
    rounds = len(inventory.inodes) // LOOKS_PER_TURN + 1
    later = [fact for t_s in range(rounds) for fact in told(inventory, 2 + t_s)]
    assert [fact.address for fact in only(Address, later, inode_of(one))] == ["10.255.79.1"]


def test_devices_and_addresses_of_this_machine_are_those_that_ip_tells() -> None:
    with Route() as route:
        found = parse(route.dump())
        assert route.dump() == route.dump()
    devices = json.loads(ip("-j", "-d", "link"))
    assert [(one.ifindex, one.name, one.mtu, one.kind) for one in found.devices] == [
        (one["ifindex"], one["ifname"], one["mtu"], one.get("linkinfo", {}).get("info_kind", "")) for one in devices
    ]
    addresses = [address["local"] for one in json.loads(ip("-j", "addr")) for address in one["addr_info"]]
    assert sorted(found.addresses) == sorted(addresses)


def test_a_question_that_the_kernel_refuses_is_an_error() -> None:
    with Route() as route, Path("/dev/null").open("rb") as null, pytest.raises(OSError, match="Invalid argument"):
        route.netnsid(null.fileno())


def test_a_veth_within_one_namespace_leads_to_itself(machine: Machine) -> None:
    name = machine.namespace()
    ends = machine.pair(name, name)
    links = {link.name: link for link in only(Link, told(Inventory(), 1), inode_of(name))}
    assert [links[end].peer_netns for end in ends] == [inode_of(name)] * 2


def test_a_process_in_the_cgroup_of_a_pod_makes_its_namespace_the_pods(machine: Machine) -> None:
    name = machine.namespace()
    machine.directory(Path(f"/var/log/pods/prod_cart-7d4b9_{UID}"))
    process = machine.pod_process(UID, "ip", "netns", "exec", name)
    inventory = Inventory()
    owners = {owner.kind: owner for owner in only(NetnsOwner, told(inventory, 1), inode_of(name))}
    assert owners.keys() == {"pod", "netns"}
    pod = owners["pod"]
    assert (pod.namespace, pod.name, pod.uid, pod.how) == ("prod", "cart-7d4b9", UID, "cgroup")
    assert pod.netns_cookie == owners["netns"].netns_cookie == inventory.cookie(inode_of(name))
    assert str(process.pid) in pod.source


def test_a_pod_that_uses_the_nodes_network_is_told_until_it_ends(machine: Machine) -> None:
    process = machine.pod_process(UID)
    machine.directory(Path(f"/var/log/pods/kube-system_kube-proxy_{UID}"))
    inventory = Inventory()
    (pod,) = [fact for fact in told(inventory, 1) if isinstance(fact, HostPod) and fact.uid == UID]
    assert (pod.namespace, pod.name, pod.until_t_ns) == ("kube-system", "kube-proxy", None)
    machine.end(process)
    (pod,) = [fact for fact in told(inventory, 2) if isinstance(fact, HostPod) and fact.uid == UID]
    assert pod.until_t_ns == 2 * S


def test_what_was_deleted_is_told_as_ended(machine: Machine) -> None:
    name, other = machine.namespace(), machine.namespace()
    device, _ = machine.pair(name, other)
    ip("-n", name, "addr", "add", "10.255.78.1/24", "dev", device)
    inode = inode_of(name)
    inventory = Inventory()
    before = [fact for fact in told(inventory, 1) if getattr(fact, "netns", 0) == inode]
    machine.delete(name)
    after = [fact for fact in told(inventory, 2) if getattr(fact, "netns", 0) == inode]
    assert {type(fact) for fact in before} == {NetnsOwner, Link, Address}
    assert all(getattr(fact, "until_t_ns", None) is None for fact in before)
    assert len(after) == len(before)
    assert {(getattr(fact, "from_t_ns", 0), getattr(fact, "until_t_ns", 0)) for fact in after} == {(S, 2 * S)}
    assert not inventory.knows(inode, 0, 0)
    assert [fact for fact in told(inventory, 3) if getattr(fact, "netns", 0) == inode] == []


def recycled(machine: Machine, old: str, inode: int, name: str) -> str:
    """Delete a namespace and make others called `name` until one has its inode. Skips where that takes too long."""
    machine.delete(old)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        made = machine.namespace(name)
        if inode_of(made) == inode:
            return made
        machine.delete(made)
        time.sleep(0.005)
    pytest.skip("the kernel did not give the inode out again in 20 s")


def test_a_recycled_inode_is_another_namespace(machine: Machine) -> None:
    old = machine.namespace()
    inode, old_cookie = inode_of(old), cookie_from_outside(old)
    inventory = Inventory()
    told(inventory, 1)
    new = recycled(machine, old, inode, f"{old}-new")
    new_cookie = cookie_from_outside(new)
    assert new_cookie != old_cookie
    spans = only(NetnsOwner, told(inventory, 2), inode)
    assert [(span.name, span.netns_cookie, span.until_t_ns) for span in spans] == [
        (old, old_cookie, 2 * S), (new, new_cookie, None),
    ]  # fmt: skip
    assert inventory.knows(inode, new_cookie, 0)
    assert not inventory.knows(inode, old_cookie, 0)


def test_a_recycled_inode_under_the_same_name_is_another_namespace(machine: Machine) -> None:
    # a lab, or a test, that is built anew between two looks
    old = machine.namespace()
    inode = inode_of(old)
    inventory = Inventory()
    told(inventory, 1)
    new = recycled(machine, old, inode, old)
    new_cookie = cookie_from_outside(new)
    spans = only(NetnsOwner, told(inventory, 2), inode)
    assert [(span.until_t_ns, span.netns_cookie == new_cookie) for span in spans] == [(2 * S, False), (None, True)]


def test_watching_a_namespace_does_not_keep_it_alive(machine: Machine) -> None:
    name, other = machine.namespace(), machine.namespace()
    _, outside = machine.pair(name, other)
    inventory = Inventory()
    for t_s in range(1, 4):
        inventory.suspect([inode_of(name), inode_of(other)])
        told(inventory, t_s)
    assert inventory.path(inode_of(name))
    machine.delete(name)

    # a veth goes when the namespace of its other end is really taken apart
    def gone() -> bool:
        return outside not in {link["ifname"] for link in json.loads(ip("-n", other, "-j", "link"))}

    wait_for(gone, 5)
    told(inventory, 4)
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    ]
    assert not [target for target in held if target.startswith("net:")]


def test_this_process_stays_in_its_own_namespace(machine: Machine) -> None:
    machine.pair(machine.namespace(), machine.namespace())
    before = os.stat("/proc/thread-self/ns/net").st_ino
    told(Inventory(), 1)
    assert os.stat("/proc/thread-self/ns/net").st_ino == before


WATCH_FROM_INSIDE = """
import json, os, sys
from k8sdiag.host.inventory import LOOKS_PER_TURN, Inventory
from k8sdiag.host.inventory.rtnetlink import Route, parse
from k8sdiag.facts import Link
home = os.stat("/proc/self/ns/net").st_ino
there = os.stat(sys.argv[1]).st_ino
links = [f for f in Inventory().facts(1) if isinstance(f, Link) and f.netns == there and f.kind == "veth"]
print(json.dumps([home, [link.peer_netns for link in links]]))
"""


def test_a_veth_that_leads_to_a_namespace_of_this_process_alone_is_followed(machine: Machine) -> None:
    ours, theirs = machine.namespace(), machine.namespace()
    machine.pair(ours, theirs)
    # our namespace has no name that the watcher sees, and no process but the watcher
    command = ["ip", "netns", "exec", ours, "unshare", "--mount", "sh", "-c",
               'umount "/run/netns/$1"; shift; exec "$@"', "sh", ours,
               sys.executable, "-c", WATCH_FROM_INSIDE, f"/run/netns/{theirs}"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
    )
    home, peers = json.loads(done.stdout)
    assert home == inode_of(ours)
    assert peers == [home]


def test_looking_again_costs_a_fraction_of_looking_first(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU time of facts() with 30 more namespaces, ten pairs of which have a veth."""
    names = [machine.namespace() for _ in range(30)]
    for one, two in zip(names[0:10], names[10:20], strict=True):
        machine.pair(one, two)
    told(Inventory(), 1)
    inventory = Inventory()
    begin_s = time.process_time()
    facts = told(inventory, 1)
    first_s = time.process_time() - begin_s
    assert {inode_of(name) for name in names} <= set(inventory.inodes)
    assert sum(isinstance(fact, Link) and fact.kind == "veth" for fact in facts) >= 20
    calls = 20
    begin_s = time.process_time()
    for turn in range(calls):
        told(inventory, 2 + turn)
    again_s = (time.process_time() - begin_s) / calls
    with capsys.disabled():
        print(f"\n  inventory, {len(inventory.inodes)} namespaces: first look {first_s * 1000:.1f} ms CPU, "
              f"then {again_s * 1000:.2f} ms a call")  # fmt: skip
    assert again_s < first_s / 2


def test_nothing_stays_behind() -> None:
    assert f"k8dinv-{os.getpid()}-" not in ip("netns", "list")
    assert not list(Path("/sys/fs/cgroup").glob(f"**/kubepods-test{os.getpid()}"))
    assert not list(Path("/var/log").glob(f"pods/*{UID}"))
