# Who is who, from files alone: cgroup paths as the runtimes write them, and a made-up /proc.

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k8sdiag.facts import Address, AnyFact, HostPod, Link, NetnsOwner
from k8sdiag.host import inventory
from k8sdiag.host.inventory import Inventory, netns, rtnetlink
from k8sdiag.host.inventory.procfs import (
    SCANS_PER_ROUND,
    YOUNG_SCANS,
    PodLogs,
    PodName,
    Process,
    Processes,
    cgroup_owner,
)
from k8sdiag.host.inventory.rtnetlink import Device, Interior

UID = "2f0c3b1e-5a7d-4c1e-9b2a-0123456789ab"
SLICE_UID = UID.replace("-", "_")
STATIC = "0123456789abcdef0123456789abcdef"
ID, OUTER = "3e8b" * 16, "77aa" * 16
S = 10**9

V1_CGROUPFS = "\n".join(
    f"{number}:{controllers}:/kubepods/burstable/pod{UID}/{ID}"
    for number, controllers in ((12, "memory"), (11, "cpu,cpuacct"), (10, "pids"), (1, "name=systemd"))
)
V1_SYSTEMD = "\n".join(
    f"{number}:{controllers}:/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE_UID}.slice/docker-{ID}.scope"
    for number, controllers in ((12, "memory"), (4, "net_cls,net_prio"), (1, "name=systemd"))
)
SLICE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE_UID}.slice"

CGROUPS = {
    "v2 systemd, containerd": (f"0::{SLICE}/cri-containerd-{ID}.scope\n", UID, ID),
    "v2 systemd, CRI-O": (f"0::{SLICE}/crio-{ID}.scope\n", UID, ID),
    "v2 systemd, CRI-O with crun": (f"0::{SLICE}/crio-{ID}.scope/container\n", UID, ID),
    "v2 systemd, guaranteed": (f"0::/kubepods.slice/kubepods-pod{SLICE_UID}.slice/crio-{ID}.scope\n", UID, ID),
    "v2 systemd, containerd set to cgroupfs": (
        f"0::/system.slice/containerd.service/kubepods-burstable-pod{SLICE_UID}.slice:cri-containerd:{ID}\n", UID, ID,
    ),
    "v2 systemd, the pod itself": (f"0::{SLICE}\n", UID, ""),
    "v2 cgroupfs": (f"0::/kubepods/besteffort/pod{UID}/{ID}\n", UID, ID),
    "v2 cgroupfs, guaranteed": (f"0::/kubepods/pod{UID}/{ID}\n", UID, ID),
    "v2 cgroupfs, CRI-O": (f"0::/kubepods/burstable/pod{UID}/crio-{ID}\n", UID, ID),
    "v1 cgroupfs": (V1_CGROUPFS + "\n", UID, ID),
    "v1 cgroupfs beside an empty v2": (V1_CGROUPFS + "\n0::/\n", UID, ID),
    "v1 systemd": (V1_SYSTEMD + "\n", UID, ID),
    "v1 systemd beside v2": (V1_SYSTEMD + "\n0::/system.slice/containerd.service\n", UID, ID),
    "seen from another cgroup namespace": (f"0::/../../..{SLICE}/cri-containerd-{ID}.scope\n", UID, ID),
    "kind, seen from outside": (
        f"0::/docker/{OUTER}/kubelet.slice/kubelet-kubepods-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope\n", UID, ID,
    ),
    "kind, cgroupfs": (f"0::/system.slice/docker-{OUTER}.scope/kubelet/kubepods/besteffort/pod{UID}/{ID}\n", UID, ID),
    "static pod, systemd": (
        f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/cri-containerd-{ID}.scope\n",
        STATIC, ID,
    ),
    "static pod, cgroupfs": (f"0::/kubepods/burstable/pod{STATIC}/{ID}\n", STATIC, ID),
    "docker in a pod": (f"0::{SLICE}/cri-containerd-{OUTER}.scope/docker/{ID}\n", UID, ID),
    "docker, systemd": (f"0::/system.slice/docker-{ID}.scope\n", "", ID),
    "docker, cgroupfs": (f"0::/docker/{ID}\n", "", ID),
    "podman, root": (f"0::/machine.slice/libpod-{ID}.scope/container\n", "", ID),
    "podman, user": (
        f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container\n", "", ID,
    ),
    "a user's session": ("0::/user.slice/user-1000.slice/session-1.scope\n", "", ""),
    "a user's service": ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-pod.scope\n", "", ""),
    "a service": ("0::/system.slice/containerd.service\n", "", ""),
    "kubelet": ("0::/system.slice/kubelet.service\n", "", ""),
    "all pods": ("0::/kubepods.slice/kubepods-burstable.slice\n", "", ""),
    "v1 root": ("12:memory:/\n11:cpu,cpuacct:/\n1:name=systemd:/init.scope\n0::/init.scope\n", "", ""),
    "a kernel thread": ("0::/\n", "", ""),
    "a virtual machine": ("0::/machine.slice/machine-qemu\\x2d1\\x2dpod1.scope\n", "", ""),
    "nothing": ("", "", ""),
}  # fmt: skip


@pytest.mark.parametrize(("text", "uid", "container"), [pytest.param(*case, id=name) for name, case in CGROUPS.items()])
def test_a_cgroup_path_tells_pod_and_container(text: str, uid: str, container: str) -> None:
    assert cgroup_owner(text) == (uid, container)


def test_a_container_of_docker_is_found_in_every_line_of_cgroup_v1() -> None:
    text = f"12:memory:/docker/{ID}\n1:name=systemd:/docker/{ID}\n0::/system.slice/containerd.service\n"
    assert cgroup_owner(text) == ("", ID)


@pytest.mark.parametrize(
    "text", [f"0::{SLICE}/crio-conmon-{ID}.scope\n", f"0::/kubepods/burstable/pod{UID}/crio-conmon-{ID}\n"]
)
def test_the_monitor_that_cri_o_keeps_beside_a_pod_is_no_part_of_it(text: str) -> None:
    # conmon_cgroup = "pod" (OpenShift): conmon lives in the node's network namespace
    assert cgroup_owner(text)[0] == ""


# Names of pods


def test_names_of_pods_are_read_from_their_log_directories(tmp_path: Path) -> None:
    logs = tmp_path / "var/log/pods"
    for entry in (f"prod_cart-7d4b9_{UID}", f"kube-system_etcd-node-1_{STATIC}", "no-underscores", "a_b", "a_b_c_d"):
        (logs / entry).mkdir(parents=True)
    assert PodLogs(tmp_path).names() == {
        UID: PodName("prod", "cart-7d4b9"),
        STATIC: PodName("kube-system", "etcd-node-1"),
    }


def test_a_node_without_log_directories_has_no_names(tmp_path: Path) -> None:
    assert PodLogs(tmp_path).names() == {}


def test_new_and_gone_log_directories_are_noticed(tmp_path: Path) -> None:
    logs = tmp_path / "var/log/pods"
    logs.mkdir(parents=True)
    names = PodLogs(tmp_path)
    assert names.names() == {}
    (logs / f"prod_cart_{UID}").mkdir()
    os.utime(logs, ns=(S, S))
    assert names.names() == {UID: PodName("prod", "cart")}
    (logs / f"prod_cart_{UID}").rmdir()
    os.utime(logs, ns=(2 * S, 2 * S))
    assert names.names() == {}


def test_log_directories_that_come_back_unchanged_are_read_again(tmp_path: Path) -> None:
    logs = tmp_path / "var/log/pods"
    (logs / f"prod_cart_{UID}").mkdir(parents=True)
    names = PodLogs(tmp_path)
    assert names.names()
    logs.rename(tmp_path / "away")
    assert names.names() == {}
    (tmp_path / "away").rename(logs)
    assert names.names() == {UID: PodName("prod", "cart")}


# A made-up machine


def attribute(kind: int, value: bytes | int) -> bytes:
    value = struct.pack("=i", value) if isinstance(value, int) else value
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 4711) + body


def dumped(interior: Interior) -> bytes:
    """What the kernel would answer: RTM_NEWLINK (16) and RTM_NEWADDR (20) messages, each list ended by NLMSG_DONE."""
    said = b""
    for device in interior.devices:
        said += message(
            16,
            struct.pack("=BxHiII", 0, 1, device.ifindex, 0x1043, 0)
            + attribute(3, device.name.encode() + b"\0")
            + attribute(4, device.mtu)
            + (attribute(5, device.link) if device.link else b"")
            + (attribute(18, attribute(1, device.kind.encode() + b"\0")) if device.kind else b"")
            + (attribute(37, device.netnsid) if device.netnsid is not None else b""),
        )
    said += message(3, bytes(4))
    for address in interior.addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        said += message(
            20, struct.pack("=BBBBI", family, 24, 0, 0, 2) + attribute(1, socket.inet_pton(family, address))
        )
    return said + message(3, bytes(4))


class MadeUpNode:
    """Files below `root` that look like /proc. Its namespaces are files; processes have hard links to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[str, int] = {}
        self.since_ns: dict[str, int] = {}
        self.cookies: dict[int, int] = {}
        self.interiors: dict[int, Interior] = {}
        self.numbers: dict[int, dict[int, int]] = {}
        """By inode, the number that it gave to each other inode."""
        self.entered: list[int] = []
        self.asked: list[tuple[int, int]] = []
        """(inode, inode of whom it was asked for the number)."""
        self.here = 0
        (root / "proc").mkdir()
        (root / "nets").mkdir()
        (root / "run/netns").mkdir(parents=True)
        self.host = self.here = self.namespace("host", 1)

    def namespace(self, name: str, cookie: int) -> int:
        path = self.root / "nets" / name
        path.touch()
        inode = path.stat().st_ino
        self.cookies[inode] = cookie
        return inode

    def process(self, pid: int, net: str, cgroup: str = "0::/\n", comm: bytes = b"sleep") -> None:
        directory = self.root / "proc" / str(pid)
        (directory / "ns").mkdir(parents=True, exist_ok=True)
        (directory / "ns/net").unlink(missing_ok=True)
        os.link(self.root / "nets" / net, directory / "ns/net")
        (directory / "cgroup").write_text(cgroup)
        (directory / "comm").write_bytes(comm + b"\n")

    def end(self, pid: int) -> None:
        directory = self.root / "proc" / str(pid)
        for file in ("ns/net", "cgroup", "comm"):
            (directory / file).unlink()
        (directory / "ns").rmdir()
        directory.rmdir()

    def named(self, _root: Path) -> list[netns.Name]:
        return [netns.Name(name, inode, self.since_ns.get(name, 0)) for name, inode in self.names.items()]

    @contextmanager
    def inside(self, path: str, inode: int = 0) -> Iterator[None]:
        names = {f"{self.root}/run/netns/{name}": named for name, named in self.names.items()}
        there = names.get(path) or os.stat(path).st_ino
        if inode not in (0, there):
            raise OSError(errno.ESTALE, path)
        self.here = there
        self.entered.append(there)
        try:
            yield
        finally:
            self.here = self.host

    def route(self) -> MadeUpRoute:
        return MadeUpRoute(self, self.here)


class MadeUpRoute:
    """Answers like rtnetlink for the namespace in which it was opened, and only from home."""

    def __init__(self, node: MadeUpNode, inode: int) -> None:
        self._node = node
        self._inode = inode

    def __enter__(self) -> MadeUpRoute:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def dump(self) -> bytes:
        assert self._node.here == self._node.host
        return dumped(self._node.interiors.get(self._inode, Interior([], [])))

    def netnsid(self, fd: int) -> int:
        assert self._node.here == self._node.host
        whom = os.fstat(fd).st_ino
        self._node.asked.append((self._inode, whom))
        return self._node.numbers.get(self._inode, {}).get(whom, -1)


def eth(ifindex: int, name: str = "eth0") -> Device:
    return Device(ifindex, name, "", 1500, 0, None)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpNode:
    made_up = MadeUpNode(tmp_path)
    made_up.process(1, "host", "0::/init.scope\n", b"systemd")
    monkeypatch.setattr(netns, "inside", made_up.inside)
    monkeypatch.setattr(netns, "cookie_here", lambda: made_up.cookies[made_up.here])
    monkeypatch.setattr(netns, "named", made_up.named)
    monkeypatch.setattr(netns, "own_inode", lambda: made_up.host)
    monkeypatch.setattr(rtnetlink, "Route", made_up.route)
    return made_up


def processes(node: MadeUpNode) -> list[tuple[int, str]]:
    return [(process.pid, process.pod_uid) for process in Processes(node.root).scan()]


def test_processes_are_read_with_namespace_pod_and_container(node: MadeUpNode) -> None:
    cart = node.namespace("cart", 7)
    node.process(42, "cart", f"0::{SLICE}/cri-containerd-{ID}.scope\n", b"ngin\xff x")
    (node.root / "proc/uptime").touch()
    (node.root / "proc/99").mkdir()  # gone in this moment
    found = {process.pid: process for process in Processes(node.root).scan()}
    assert found.keys() == {1, 42}
    assert (found[42].netns, found[42].pod_uid, found[42].container) == (cart, UID, ID)
    assert found[42].comm.startswith("ngin")
    assert (found[1].netns, found[1].pod_uid, found[1].container) == (node.host, "", "")


def test_a_process_that_ended_is_left_out(node: MadeUpNode) -> None:
    node.process(42, "host")
    scanner = Processes(node.root)
    assert {process.pid for process in scanner.scan()} == {1, 42}
    node.end(42)
    assert {process.pid for process in scanner.scan()} == {1}


def test_a_young_process_is_followed_into_its_namespace_and_pod(node: MadeUpNode) -> None:
    node.process(42, "host", "0::/system.slice/containerd.service\n")
    scanner = Processes(node.root)
    scanner.scan()
    cart = node.namespace("cart", 7)
    node.process(42, "cart", f"0::{SLICE}/cri-containerd-{ID}.scope\n")
    found = {process.pid: process for process in scanner.scan()}
    assert (found[42].netns, found[42].pod_uid) == (cart, UID)


def test_an_old_process_is_looked_at_again_in_turn(node: MadeUpNode, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in (42, 43, 44):
        node.process(pid, "host")
    scanner = Processes(node.root)
    for _ in range(YOUNG_SCANS):
        scanner.scan()
    looked: list[int] = []
    look = scanner._look

    def counted(pid: int) -> Process | None:
        looked.append(pid)
        return look(pid)

    monkeypatch.setattr(scanner, "_look", counted)
    cart = node.namespace("cart", 7)
    node.process(43, "cart")
    last = [scanner.scan() for _ in range(SCANS_PER_ROUND)][-1]
    assert sorted(looked) == [1, 42, 43, 44]  # each once
    assert {process.pid for process in last if process.netns == cart} == {43}


# What changed


def told(inventory: Inventory, t_s: float) -> list[AnyFact]:
    return list(inventory.facts(round(t_s * S)))


def owners(facts: list[AnyFact]) -> list[tuple[str, str, str]]:
    """(kind, namespace/name, living or ended) of the owners among facts."""
    return sorted(
        (fact.kind, f"{fact.namespace}/{fact.name}".lstrip("/"), "ended" if fact.until_t_ns is not None else "living")
        for fact in facts if isinstance(fact, NetnsOwner)
    )  # fmt: skip


CART_CGROUP = f"0::{SLICE}/cri-containerd-{ID}.scope\n"


def log_of(node: MadeUpNode, entry: str) -> None:
    (node.root / "var/log/pods" / entry).mkdir(parents=True)


def test_a_pod_is_told_once_with_its_name_and_its_span(node: MadeUpNode) -> None:
    cart = node.namespace("cart", 7)
    log_of(node, f"prod_cart_{UID}")
    node.process(42, "cart", CART_CGROUP)
    watch = Inventory(node.root)
    (owner,) = [fact for fact in told(watch, 1) if isinstance(fact, NetnsOwner)]
    assert (owner.netns, owner.netns_cookie, owner.kind, owner.namespace, owner.name) == (
        cart,
        7,
        "pod",
        "prod",
        "cart",
    )
    assert (owner.uid, owner.how, owner.confidence, owner.from_t_ns) == (UID, "cgroup", "proven", S)
    assert "process 42" in owner.source
    assert "/var/log/pods" in owner.source
    assert owners(told(watch, 2)) == []
    node.end(42)
    (ended,) = [fact for fact in told(watch, 3) if isinstance(fact, NetnsOwner)]
    assert (ended.name, ended.from_t_ns, ended.until_t_ns) == ("cart", S, 3 * S)
    assert owners(told(watch, 4)) == []


def test_the_nodes_own_namespace_has_no_owner_but_its_pods(node: MadeUpNode) -> None:
    log_of(node, f"kube-system_kube-proxy_{UID}")
    node.process(42, "host", CART_CGROUP)
    watch = Inventory(node.root)
    facts = told(watch, 1)
    assert owners(facts) == []
    (proxy,) = [fact for fact in facts if isinstance(fact, HostPod)]
    assert (proxy.uid, proxy.namespace, proxy.name) == (UID, "kube-system", "kube-proxy")
    assert not [fact for fact in told(watch, 2) if isinstance(fact, HostPod)]
    node.end(42)
    (ended,) = [fact for fact in told(watch, 3) if isinstance(fact, HostPod)]
    assert ended.until_t_ns == 3 * S


def test_containers_names_and_lone_processes_are_owners_too(node: MadeUpNode) -> None:
    node.process(42, "host")
    for name, cookie in (("docker", 7), ("lone", 8)):
        node.namespace(name, cookie)
    node.names["lab"] = node.namespace("lab", 9)
    node.process(43, "docker", f"0::/docker/{ID}\n")
    node.process(44, "lone", comm=b"bash")
    found = [fact for fact in told(Inventory(node.root), 1) if isinstance(fact, NetnsOwner)]
    assert {(fact.kind, fact.name, fact.uid, fact.confidence) for fact in found} == {
        ("container", ID[:12], ID, "proven"), ("process", "bash", "", "likely"), ("netns", "lab", "", "proven"),
    }  # fmt: skip


def test_a_name_that_comes_late_replaces_the_uid(node: MadeUpNode) -> None:
    node.namespace("cart", 7)
    node.process(42, "cart", CART_CGROUP)
    watch = Inventory(node.root)
    assert owners(told(watch, 1)) == [("pod", UID, "living")]
    log_of(node, f"prod_cart_{UID}")
    assert ("pod", "prod/cart", "living") in owners(told(watch, 2))


def test_a_name_that_comes_late_ends_the_owner_that_only_had_a_uid(node: MadeUpNode) -> None:
    node.namespace("cart", 7)
    node.process(42, "cart", CART_CGROUP)
    watch = Inventory(node.root)
    told(watch, 1)
    log_of(node, f"prod_cart_{UID}")
    assert ("pod", UID, "ended") in owners(told(watch, 2))


def test_a_name_that_comes_late_is_told_of_a_pod_in_the_nodes_namespace_too(node: MadeUpNode) -> None:
    node.process(42, "host", CART_CGROUP)
    watch = Inventory(node.root)
    told(watch, 1)
    log_of(node, f"kube-system_kube-proxy_{UID}")
    assert [fact.name for fact in told(watch, 2) if isinstance(fact, HostPod)] == ["kube-proxy"]


def test_who_left_a_living_namespace_has_ended(node: MadeUpNode) -> None:
    node.names["lab"] = node.namespace("lab", 7)
    node.process(42, "lab")
    watch = Inventory(node.root)
    assert owners(told(watch, 1)) == [("netns", "lab", "living")]
    del node.names["lab"]  # `ip netns del` while a process is still inside
    assert owners(told(watch, 2)) == [("netns", "lab", "ended"), ("process", "sleep", "living")]


def test_a_pod_keeps_its_name_when_its_log_directory_goes_first(node: MadeUpNode) -> None:
    log_of(node, f"prod_cart_{UID}")
    node.namespace("cart", 7)
    node.process(42, "cart", CART_CGROUP)
    node.process(43, "host", CART_CGROUP)
    watch = Inventory(node.root)
    told(watch, 1)
    (node.root / f"var/log/pods/prod_cart_{UID}").rmdir()
    facts = [fact for t_s in (2, 3, 4) for fact in told(watch, t_s)]
    assert not [fact for fact in facts if isinstance(fact, (NetnsOwner, HostPod))]


def test_an_inode_that_was_given_to_a_new_namespace_is_another_owner(node: MadeUpNode) -> None:
    inode = node.namespace("lab", 7)
    node.names["old"] = inode
    watch = Inventory(node.root)
    told(watch, 1)
    del node.names["old"]
    node.names["new"] = inode
    node.cookies[inode] = 8
    assert owners(told(watch, 2)) == [("netns", "new", "living"), ("netns", "old", "ended")]
    assert (watch.knows(inode, 8, 0), watch.knows(inode, 7, 0), watch.cookie(inode)) == (True, False, 8)


def test_a_namespace_that_was_renamed_is_not_another_one(node: MadeUpNode) -> None:
    inode = node.names["old"] = node.namespace("lab", 7)
    node.interiors[inode] = Interior([eth(2)], [])
    watch = Inventory(node.root)
    told(watch, 1)
    del node.names["old"]
    node.names["new"] = inode
    facts = told(watch, 2)
    assert ("netns", "new", "living") in owners(facts)
    assert not [fact for fact in facts if isinstance(fact, Link)]


def test_a_namespace_made_anew_under_its_old_name_and_inode_is_another_one(node: MadeUpNode) -> None:
    inode = node.names["lab"] = node.namespace("lab", 7)
    watch = Inventory(node.root)
    told(watch, 1)
    node.cookies[inode] = 8
    watch.suspect([inode])  # as soon as a drop with the new cookie was counted
    assert owners(told(watch, 2)) == [("netns", "lab", "ended"), ("netns", "lab", "living")]


def test_a_namespace_made_anew_under_its_old_name_and_inode_is_noticed_at_once_without_a_drop(
    node: MadeUpNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "LOOKS_PER_TURN", 0)
    inode = node.names["lab"] = node.namespace("lab", 7)
    node.interiors[inode] = Interior([eth(2)], ["10.0.0.9"])
    watch = Inventory(node.root)
    told(watch, 1)
    node.cookies[inode] = 8
    node.since_ns["lab"] = S
    facts = told(watch, 2)
    assert [(type(fact), getattr(fact, "netns_cookie", 0), getattr(fact, "until_t_ns", 0)) for fact in facts] == [
        (NetnsOwner, 7, 2 * S), (Link, 7, 2 * S), (Address, 7, 2 * S),
        (NetnsOwner, 8, None), (Link, 8, None), (Address, 8, None),
    ]  # fmt: skip


def test_a_namespace_made_anew_that_looks_the_same_is_noticed_in_its_turn(node: MadeUpNode) -> None:
    inode = node.namespace("lab", 7)
    node.process(42, "lab")
    watch = Inventory(node.root)
    told(watch, 1)
    node.cookies[inode] = 8
    assert owners(told(watch, 2)) == [("process", "sleep", "ended"), ("process", "sleep", "living")]


def test_a_suspected_namespace_that_is_new_is_told_with_its_new_cookie(node: MadeUpNode) -> None:
    inode = node.names["lab"] = node.namespace("lab", 7)
    watch = Inventory(node.root)
    told(watch, 1)
    node.cookies[inode] = 8
    watch.suspect([inode])
    facts = [fact for fact in told(watch, 2) if isinstance(fact, NetnsOwner) and fact.until_t_ns is None]
    assert [(fact.name, fact.netns_cookie) for fact in facts] == [("lab", 8)]


def test_a_suspected_namespace_is_looked_into_at_once(node: MadeUpNode) -> None:
    inodes = [node.namespace(f"n{number}", 10 + number) for number in range(20)]
    for number, inode in enumerate(inodes):
        node.names[f"n{number}"] = inode
    watch = Inventory(node.root)
    told(watch, 1)
    for inode in inodes:
        node.interiors[inode] = Interior([eth(5, "new0")], [])
    watch.suspect([inodes[13]])
    found = {fact.netns for fact in told(watch, 2) if isinstance(fact, Link)}
    assert inodes[13] in found
    assert watch.knows(inodes[13], 23, 5)
    assert not watch.knows(inodes[13], 23, 6)


def test_every_namespace_gets_its_turn_to_be_looked_into_again(
    node: MadeUpNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "LOOKS_PER_TURN", 2)
    inodes = [node.namespace(f"n{number}", 10 + number) for number in range(9)]
    for number, inode in enumerate(inodes):
        node.names[f"n{number}"] = inode
    watch = Inventory(node.root)
    told(watch, 1)
    for inode in inodes:
        node.interiors[inode] = Interior([], ["10.0.0.9"])
    found: set[int] = set()
    for turn in range(len(inodes) // 2 + 1):
        node.entered.clear()
        found |= {fact.netns for fact in told(watch, 2 + turn) if isinstance(fact, Address)}
        assert len(set(node.entered)) == 2
    assert found == set(inodes)


def test_devices_and_addresses_are_told_when_they_come_change_and_go(node: MadeUpNode) -> None:
    inode = node.names["lab"] = node.namespace("lab", 7)
    watch = Inventory(node.root)

    def look(t_s: float, devices: list[Device], *addresses: str) -> list[tuple[str, int | None]]:
        node.interiors[inode] = Interior(devices, list(addresses))
        watch.suspect([inode])
        found = [fact for fact in told(watch, t_s) if isinstance(fact, (Link, Address))]
        assert {(fact.netns, fact.netns_cookie) for fact in found} <= {(inode, 7)}
        return sorted((fact.name if isinstance(fact, Link) else fact.address, fact.until_t_ns) for fact in found)

    assert look(1, [eth(2)], "10.0.0.9", "fd00::9") == [("10.0.0.9", None), ("eth0", None), ("fd00::9", None)]
    assert look(2, [eth(2)], "10.0.0.9", "fd00::9") == []
    assert look(3, [eth(2, "net1")], "10.0.0.9") == [("eth0", 3 * S), ("fd00::9", 3 * S), ("net1", None)]
    assert look(4, [eth(2, "net1")]) == [("10.0.0.9", 4 * S)]
    del node.names["lab"]
    assert [(fact.name, fact.until_t_ns) for fact in told(watch, 5) if isinstance(fact, Link)] == [("net1", 5 * S)]


def veths(facts: list[AnyFact], inode: int) -> dict[str, tuple[int, int, int]]:
    """(index of the other end, inode and cookie of its namespace) by name of the living veths of a namespace."""
    return {
        fact.name: (fact.peer_ifindex, fact.peer_netns, fact.peer_netns_cookie)
        for fact in facts
        if isinstance(fact, Link) and (fact.netns, fact.kind, fact.until_t_ns) == (inode, "veth", None)
    }


def test_a_veth_leads_to_the_namespace_whose_number_it_bears(node: MadeUpNode) -> None:
    cart, shop = node.namespace("cart", 7), node.namespace("shop", 8)
    node.process(42, "cart")
    node.process(43, "shop")
    node.numbers[node.host] = {cart: 3, shop: 0}
    node.interiors[node.host] = Interior(
        [
            Device(5, "to-cart", "veth", 1450, 2, 3), Device(6, "to-shop", "veth", 1450, 2, 0),
            Device(8, "one", "veth", 1500, 9, None), Device(10, "vlan7", "vlan", 1500, 5, None),
        ],
        [],
    )  # fmt: skip
    watch = Inventory(node.root)
    assert veths(told(watch, 1), node.host) == {
        "to-cart": (2, cart, 7), "to-shop": (2, shop, 8), "one": (9, node.host, 1),
    }  # fmt: skip
    node.asked.clear()
    node.interiors[node.host].devices.append(Device(11, "more", "veth", 1450, 4, 3))
    watch.suspect([node.host])
    assert veths(told(watch, 2), node.host) == {"more": (4, cart, 7)}
    assert node.asked == []  # answers are kept


def test_a_veth_finds_its_other_end_when_that_comes_late(node: MadeUpNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "LOOKS_PER_TURN", 0)
    node.interiors[node.host] = Interior([Device(5, "to-cart", "veth", 1450, 2, 3)], [])
    watch = Inventory(node.root)
    assert veths(told(watch, 1), node.host) == {"to-cart": (2, 0, 0)}
    cart = node.namespace("cart", 7)
    node.numbers[node.host] = {cart: 3}
    node.process(42, "cart")
    assert veths(told(watch, 2), node.host) == {"to-cart": (2, cart, 7)}


def test_an_other_end_that_nobody_has_is_not_asked_for_again(node: MadeUpNode) -> None:
    node.namespace("cart", 7)
    node.process(42, "cart")
    node.interiors[node.host] = Interior([Device(5, "away", "veth", 1450, 2, 3)], [])
    watch = Inventory(node.root)
    told(watch, 1)
    assert node.asked
    node.asked.clear()
    watch.suspect([node.host])
    told(watch, 2)
    assert node.asked == []


def test_a_process_that_went_elsewhere_does_not_speak_for_where_it_was(node: MadeUpNode) -> None:
    cart = node.namespace("cart", 7)
    node.namespace("shop", 8)
    node.process(42, "cart")
    watch = Inventory(node.root)
    for t_s in range(1, 5):
        told(watch, t_s)
    node.process(42, "shop")  # not looked at anew for a while
    watch.suspect([cart])
    assert owners(told(watch, 5)) == []
    found = [fact for t_s in range(SCANS_PER_ROUND) for fact in told(watch, 6 + t_s)]
    assert owners(found) == [("process", "sleep", "ended"), ("process", "sleep", "living")]
    assert watch.cookie(cart) == 0


def test_a_namespace_that_may_not_be_entered_is_left_out_and_tried_again(
    node: MadeUpNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.names["lab"] = node.namespace("lab", 7)

    def refused(_path: str, _inode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(netns, "inside", refused)
    watch = Inventory(node.root)
    assert told(watch, 1) == []
    monkeypatch.setattr(netns, "inside", node.inside)
    assert owners(told(watch, 2)) == [("netns", "lab", "living")]


# Names of namespaces


def test_names_are_those_that_are_namespaces(tmp_path: Path) -> None:
    directory = tmp_path / "run/netns"
    directory.mkdir(parents=True)
    (directory / "ours").symlink_to("/proc/self/ns/net")
    (directory / "not-mounted-yet").touch()
    here = os.stat("/proc/self/ns/net")
    assert [(name.name, name.inode) for name in netns.named(tmp_path)] == [("ours", here.st_ino)]
    assert netns.named(tmp_path / "nowhere") == []


def test_a_namespace_is_opened_as_the_one_it_was(tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    inode = (tmp_path / "one").stat().st_ino
    fd = netns.opened(str(tmp_path / "one"), inode)
    assert os.fstat(fd).st_ino == inode
    os.close(fd)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        netns.opened(str(tmp_path / "one"), inode + 1)


# Answers of rtnetlink


def test_answers_of_the_kernel_are_read_whole() -> None:
    devices = [
        Device(1, "lo", "", 65536, 0, None), Device(7, "eth0", "veth", 1450, 12, 0),
        Device(8, "vethé", "veth", 1500, 9, None),
    ]  # fmt: skip
    said = dumped(Interior(devices, ["127.0.0.1", "::1", "10.0.0.9", "fd00::9"]))
    assert rtnetlink.parse(said) == (devices, ["127.0.0.1", "::1", "10.0.0.9", "fd00::9"])
    assert rtnetlink.parse(b"") == ([], [])


def test_the_address_of_a_point_to_point_link_is_the_near_one() -> None:
    near, far = socket.inet_aton("10.8.0.1"), socket.inet_aton("10.8.0.2")
    said = message(20, struct.pack("=BBBBI", 2, 32, 0, 0, 2) + attribute(1, far) + attribute(2, near))
    assert rtnetlink.parse(said).addresses == ["10.8.0.1"]


def test_a_name_that_vanishes_while_reading_takes_no_other_with_it(tmp_path: Path) -> None:
    directory = tmp_path / "run/netns"
    directory.mkdir(parents=True)
    for number in range(10):
        (directory / f"gone{number}").symlink_to("/proc/self/ns/no-such-namespace")
        (directory / f"ours{number}").symlink_to("/proc/self/ns/net")
    assert sorted(name.name for name in netns.named(tmp_path)) == [f"ours{number}" for number in range(10)]
