"""What a lab is made of: pods with their cgroups and logs, the node that connects them; and its removal."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from k8sdiag.host.lab.netns import PROCESS_MARK, LabError, Netns, run
from k8sdiag.host.lab.traffic import RANDOM_SOURCE_V4, RANDOM_SOURCE_V6

if TYPE_CHECKING:
    from k8sdiag.host.lab.fault import Expected

STATE_DIR = Path("/run/k8sdiag-lab")
LOG_ROOT = Path("/var/log/pods")
# Left in STATE_DIR when a lab made /var/log/pods, so that the last lab of several removes it.
LOG_ROOT_MARK = STATE_DIR / "made-var-log-pods"


@dataclass(frozen=True)
class PodSpec:
    """One namespace to build.

    `kind` "pod" looks like kubelet's, "container" like docker's, "netns" is a bare named network namespace:
    no process, no cgroup, no logs.
    """

    namespace: str = ""
    name: str = ""
    kind: Literal["pod", "container", "netns"] = "pod"
    driver: Literal["cgroupfs", "systemd"] = "cgroupfs"
    qos: Literal["guaranteed", "burstable", "besteffort"] = "besteffort"
    cgroup_prefix: str = ""
    """Path put in front of the cgroup path, such as "/kind/node1" (nested kubelets)."""
    named: bool = True
    """False: nothing under /run/netns; only the pod's process holds the network namespace."""
    uid: str = ""
    """Pod uid; "" draws one. A static pod's is 32 hex digits without dashes."""


DEFAULT_PODS = (
    PodSpec("shop", "cart-7d9f8c6b5-x2x4q"),
    PodSpec("shop", "web-5c4d7b9f66-8kq2v", driver="systemd"),
    PodSpec("payments", "ledger-0", qos="guaranteed"),
    PodSpec("payments", "gateway-6b8d5f7c9-pm4zt", driver="systemd", qos="burstable", named=False),
    PodSpec("kube-system", "coredns-76f75df574-h7wqn", qos="burstable"),
    PodSpec("kube-system", "node-exporter-tz9gk", driver="systemd", named=False),
)


# ----------------------------------------------------------------------------------------------------
# Pods


class Pod(Netns):
    """A pod, container or bare namespace of the lab, behind its veth."""

    def __init__(self, lab: Lab, number: int, spec: PodSpec, container_id: str, pid: int = 0) -> None:
        super().__init__(lab.prefix, f"{lab.prefix}-{number}")
        self.number = number
        self.spec = spec
        self.container_id = container_id
        self.pid = pid
        """The long-lived ("pause") process; 0 for kind "netns"."""
        if not spec.named:
            self.path = f"/proc/{pid}/ns/net"
        self.cgroup_path = _cgroup_path(spec, container_id)
        """Path of the cgroup inside its hierarchy, as in /proc/PID/cgroup; "" for kind "netns"."""
        if self.cgroup_path:
            self.cgroups = tuple(f"{mount}{self.cgroup_path}" for mount in _cgroup_mounts())
        self.veth = f"veth{number}"
        """The node's end; the pod's end is eth0."""
        subnet, host = (0, number + 1) if lab.bridge else (number, 2)
        self.ipv4 = f"10.{lab.subnet}.{subnet}.{host}"
        self.ipv6 = f"fd6b:3864:{lab.subnet:x}:{subnet:x}::{host:x}"
        self.gateway_ipv4 = f"10.{lab.subnet}.{subnet}.1"
        self.gateway_ipv6 = f"fd6b:3864:{lab.subnet:x}:{subnet:x}::1"
        self.mac = f"0a:58:0a:{lab.subnet:02x}:{number:02x}:02"
        self.gateway_mac = f"0a:58:0a:{lab.subnet:02x}:{subnet:02x}:01"

    @property
    def owner(self) -> str:
        if self.spec.kind == "pod":
            return f"{self.spec.namespace}/{self.spec.name}"
        return self.container_id[:12] if self.spec.kind == "container" else self.name

    @property
    def log_dir(self) -> Path | None:
        """Kubelet's directory for the pod's logs; outlives a pod, names it without any API."""
        if self.spec.kind != "pod":
            return None
        return LOG_ROOT / f"{self.spec.namespace}_{self.spec.name}_{self.spec.uid}"

    @contextlib.contextmanager
    def udp_full(self, port: int) -> Iterator[None]:
        """A UDP socket that nobody reads, its buffer already full; filling it cost exactly one drop."""
        with self.child("full", port=port, address=self.ipv4) as child:
            child.answer()
            yield


def _cgroup_path(spec: PodSpec, container_id: str) -> str:
    """The path a kubelet (or docker) with this cgroup driver gives to a container."""
    if spec.kind == "netns":
        return ""
    if spec.kind == "container":
        leaf = f"/system.slice/docker-{container_id}.scope" if spec.driver == "systemd" else f"/docker/{container_id}"
    elif spec.driver == "systemd":
        parents = ["kubepods"] if spec.qos == "guaranteed" else ["kubepods", f"kubepods-{spec.qos}"]
        parents.append(f"{parents[-1]}-pod{spec.uid.replace('-', '_')}")
        leaf = "".join(f"/{parent}.slice" for parent in parents) + f"/cri-containerd-{container_id}.scope"
    else:
        qos = "" if spec.qos == "guaranteed" else f"/{spec.qos}"
        leaf = f"/kubepods{qos}/pod{spec.uid}/{container_id}"
    return spec.cgroup_prefix.rstrip("/") + leaf


def _cgroup_mounts() -> list[str]:
    """Mount points of the hierarchies to use: v2, and of v1 those that carry no limits (systemd's, pids)."""
    mounts = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and {"name=systemd", "pids"} & set(options.split(","))):
            mounts.append(mount)
    return mounts


def _make_cgroup(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise LabError(
            f"cannot make the cgroup {path}: {failure.strerror}. A pod needs a writable cgroup file "
            "system; in a container, run with --privileged."
        ) from failure


def _remove_cgroup(path: Path) -> None:
    """Remove the cgroup and, while they are empty, its parents up to the mount point."""
    mounts = {Path(mount) for mount in _cgroup_mounts()}
    deadline = time.monotonic() + 2
    while path not in mounts and path != path.parent:
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            # Busy: either others live there (leave it), or our dead process is not quite out yet.
            if any(child.is_dir() for child in path.iterdir()) or time.monotonic() > deadline:
                return
            time.sleep(0.005)
            continue
        path = path.parent


def _checked(spec: PodSpec) -> PodSpec:
    """The spec, with a uid."""
    if spec.kind == "netns" and not spec.named:
        raise LabError("a PodSpec of kind 'netns' has no process, so nothing would hold it: leave named=True.")
    if spec.kind == "pod" and not (spec.namespace and spec.name):
        raise LabError(f"{spec} needs namespace and name, such as PodSpec('shop', 'cart-7d9f8c6b5-x2x4q').")
    return spec if spec.uid else dataclasses.replace(spec, uid=str(uuid.uuid4()))


# ----------------------------------------------------------------------------------------------------
# The laboratory


class Lab:
    """Pods on one node namespace. A context manager: up on entry, down on exit, exception, SIGINT or SIGTERM.

    `prefix` names everything the lab makes (`<prefix>-node`, `<prefix>-1` …): labs with different prefixes
    live side by side, one with the same prefix replaces the other. Routed (the default): each pod has a /24
    and a /64 with its own gateway on the node's veth. `bridge`: all pods hang on cni0. `conntrack`: the node
    tracks connections, as every node with kube-proxy does.
    """

    def __init__(
        self,
        prefix: str = "k8d",
        *,
        bridge: bool = False,
        pods: Sequence[PodSpec] = DEFAULT_PODS,
        ipv6: bool = True,
        conntrack: bool = True,
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]{0,20}", prefix):
            raise LabError(f"{prefix!r} is no lab prefix. Use a lower-case word of at most 21 letters and digits.")
        if not 1 <= len(pods) <= 200:
            raise LabError(f"a lab holds 1 to 200 pods, not {len(pods)}. Pass fewer PodSpecs.")
        self.prefix = prefix
        self.bridge = bridge
        self.ipv6 = ipv6
        self.conntrack = conntrack
        self.subnet = 0
        self.node = Netns(prefix, f"{prefix}-node")
        self.pods: list[Pod] = []
        self._specs = tuple(_checked(spec) for spec in pods)
        self._processes: list[subprocess.Popen[str]] = []
        self._sysctls: dict[str, str] = {}
        self._exit = contextlib.ExitStack()

    # -- life ----------------------------------------------------------------------------------------

    def up(self) -> Lab:
        """Build everything; what stands half built is removed again when something fails."""
        require_root_and_tools()
        self.down()
        try:
            self._plan()
            self._build()
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """Remove everything this prefix ever made, also after a kill -9; nothing there is no error."""
        state = _read_state(self.prefix) or {"sysctls": {}, "cgroups": [], "logs": []}
        for name, value in state["sysctls"].items():
            Path("/proc/sys", *name.split(".")).write_text(value)
        _kill_marked(self.prefix)
        for process in self._processes:
            process.communicate()
        self._processes.clear()
        made_here = re.compile(rf"{self.prefix}-(node|\d+)")
        present = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
        for name in filter(made_here.fullmatch, present):
            run(["ip", "netns", "delete", name])
        with _shared_directories():
            for cgroup in state["cgroups"]:
                _remove_cgroup(Path(cgroup))
            for log_dir in state["logs"]:
                shutil.rmtree(log_dir, ignore_errors=True)
            _state_file(self.prefix).unlink(missing_ok=True)
            if LOG_ROOT_MARK.exists():
                with contextlib.suppress(OSError):  # others' logs are in it
                    LOG_ROOT.rmdir()
                if not LOG_ROOT.exists():
                    LOG_ROOT_MARK.unlink()
            with contextlib.suppress(OSError):  # another lab is up
                STATE_DIR.rmdir()
        self.pods = []

    def __enter__(self) -> Lab:
        with contextlib.ExitStack() as undo:
            # A plain kill ends Python without unwinding: make it an exception, unless somebody else cares.
            main = threading.current_thread() is threading.main_thread()
            if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, exit_on_signal)
                undo.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
            self.up()
            undo.callback(self.down)
            self._exit = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    @classmethod
    def attach(cls, prefix: str = "k8d") -> Lab:
        """The lab that an earlier `up` left standing; it stays when this object goes."""
        state = _read_state(prefix)
        if state is None:
            raise LabError(f"no lab {prefix!r} is up. Start one: scripts/lab --prefix {prefix} up")
        if not state["ready"]:
            raise LabError(f"lab {prefix!r} is half built. Remove it: scripts/lab --prefix {prefix} down")
        specs = [PodSpec(**pod["spec"]) for pod in state["pods"]]
        lab = cls(prefix, pods=specs, **state["options"])
        lab.subnet = state["subnet"]
        lab.pods = [
            Pod(lab, number, spec, pod["container_id"], pod["pid"])
            for number, (spec, pod) in enumerate(zip(specs, state["pods"], strict=True), 1)
        ]
        for pod in lab.pods:
            if not os.path.exists(pod.path):
                raise LabError(
                    f"lab {prefix!r} is damaged: {pod.owner} has no namespace any more. "
                    f"Rebuild it: scripts/lab --prefix {prefix} up"
                )
        return lab

    # -- building ------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Decide every name first and write them down, so that `down` finds whatever a kill leaves behind."""
        specs = self._specs
        if os.path.isdir("/var/lib/kubelet/pods"):
            # A real kubelet kills what it does not know below its own cgroups: stay out of them.
            specs = tuple(dataclasses.replace(s, cgroup_prefix=s.cgroup_prefix or "/k8sdiag-lab") for s in specs)
        with _shared_directories():
            taken = {state["subnet"] for prefix in lab_prefixes() if (state := _read_state(prefix))}
            preferred = zlib.crc32(self.prefix.encode())
            subnets = (64 + (preferred + i) % 128 for i in range(128))
            self.subnet = next((subnet for subnet in subnets if subnet not in taken), 64)
            self.pods = [Pod(self, number, spec, secrets.token_hex(32)) for number, spec in enumerate(specs, 1)]
            if any(pod.cgroup_path and not pod.cgroups for pod in self.pods):
                raise LabError("no cgroup hierarchy is mounted, so nothing can look like a pod. Mount cgroup2 first.")
            STATE_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._write_state(ready=False)

    def _write_state(self, *, ready: bool) -> None:
        state = {
            "ready": ready,
            "options": {"bridge": self.bridge, "ipv6": self.ipv6, "conntrack": self.conntrack},
            "subnet": self.subnet,
            "pods": [
                {"spec": dataclasses.asdict(pod.spec), "container_id": pod.container_id, "pid": pod.pid}
                for pod in self.pods
            ],
            "cgroups": [cgroup for pod in self.pods for cgroup in pod.cgroups],
            "logs": [str(pod.log_dir) for pod in self.pods if pod.log_dir],
            "sysctls": self._sysctls,
        }
        draft = _state_file(self.prefix).with_suffix(".new")
        draft.write_text(json.dumps(state, indent=1))
        draft.rename(_state_file(self.prefix))

    def _build(self) -> None:
        for netns in [self.node, *(pod for pod in self.pods if pod.spec.named)]:
            run(["ip", "netns", "add", netns.name])
        with _shared_directories():
            for pod in self.pods:
                self._make_cgroup_and_logs(pod)
        for pod in self.pods:
            if pod.spec.kind != "netns":
                self._start_pause(pod)
        self._write_state(ready=False)
        self._configure_node()
        for pod in self.pods:
            self._connect(pod)
        if self.bridge:
            self._await_bridge()
        if self.conntrack:
            chain = "type filter hook forward priority 10;"
            self.node.add_nft_rule("inet", "k8sdiag_lab", chain, "ct state new counter")
        self._write_state(ready=True)

    def _make_cgroup_and_logs(self, pod: Pod) -> None:
        for cgroup in pod.cgroups:
            _make_cgroup(Path(cgroup))
        if pod.log_dir:
            if not LOG_ROOT.exists():
                LOG_ROOT_MARK.touch()
            container = pod.log_dir / "app"
            container.mkdir(parents=True, exist_ok=True)
            (container / "0.log").touch()

    def _start_pause(self, pod: Pod) -> None:
        process = pod.start(["sleep", "infinity"], unshare=not pod.spec.named)
        self._processes.append(process)
        pod.pid = process.pid
        if not pod.spec.named:
            pod.path = f"/proc/{pod.pid}/ns/net"
        # nsenter, then sh, then sleep: once it is sleep, namespace and cgroup are entered.
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pod.pid}/comm").read_text().strip() != "sleep":
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise LabError(
                    f"the process of {pod.owner} did not start in {pod.cgroup_path}: "
                    f"{process.communicate()[1].strip() or 'it said nothing'}. "
                    "Is the cgroup file system writable (in a container it often is not)?"
                )
            time.sleep(0.002)

    def _configure_node(self) -> None:
        _quiet(self.node)
        self.node.sysctl("net.ipv4.ip_forward", 1)
        if self.ipv6:
            self.node.sysctl("net.ipv6.conf.all.forwarding", 1)
        lines = ["link set lo up"]
        if self.bridge:
            mac = self.pods[0].gateway_mac
            lines += [f"link add cni0 address {mac} type bridge mcast_snooping 0", "link set cni0 up"]
            lines += self._gateway(self.pods[0], "cni0")
        self.node.ip(*lines)

    def _connect(self, pod: Pod) -> None:
        """Make veth, addresses, routes, and permanent neighbours: no ARP shall mix with the counts."""
        _quiet(pod)
        # A bridge port's own address must not be the bridge's.
        node_mac = f"{pod.mac[:-2]}03" if self.bridge else pod.gateway_mac
        where = pod.name if pod.spec.named else pod.pid
        self.node.ip(
            f"link add {pod.veth} address {node_mac} type veth peer name eth0 address {pod.mac} netns {where}",
            f"link set {pod.veth} {'master cni0' if self.bridge else ''} up",
            *([] if self.bridge else self._gateway(pod, pod.veth)),
            *self._neighbours([pod], self.gateway_device(pod)),
        )
        lines = ["link set lo up", f"addr add {pod.ipv4}/24 dev eth0", "link set eth0 up"]
        lines += [f"addr add {pod.ipv6}/64 dev eth0 nodad"] if self.ipv6 else []
        gateways = {pod.gateway_ipv4: RANDOM_SOURCE_V4} | ({pod.gateway_ipv6: RANDOM_SOURCE_V6} if self.ipv6 else {})
        for gateway, random_source in gateways.items():
            lines += [
                f"neigh replace {gateway} lladdr {pod.gateway_mac} dev eth0 nud permanent",
                f"route add default via {gateway}",
                f"route add blackhole {random_source}",
            ]
        if self.bridge:
            lines += self._neighbours([other for other in self.pods if other is not pod], "eth0")
            # Where each address is, told, not learnt: an unknown one is flooded, one copy (and drop) per port.
            self.node.tool(["bridge", "fdb", "replace", pod.mac, "dev", pod.veth, "master", "static"])
        pod.ip(*lines)

    def _gateway(self, pod: Pod, device: str) -> list[str]:
        """Lines for `ip`: the gateway's addresses on a device of the node."""
        ipv6 = [f"addr add {pod.gateway_ipv6}/64 dev {device} nodad"] if self.ipv6 else []
        return [f"addr add {pod.gateway_ipv4}/24 dev {device}", *ipv6]

    def _neighbours(self, pods: Sequence[Pod], device: str) -> list[str]:
        """Lines for `ip`: where the pods are, for ever."""
        return [
            f"neigh replace {address} lladdr {pod.mac} dev {device} nud permanent"
            for pod in pods
            for address in ([pod.ipv4, pod.ipv6] if self.ipv6 else [pod.ipv4])
        ]

    def _await_bridge(self) -> None:
        """Until the carrier is up, a port is "disabled" and swallows frames in silence."""
        deadline = time.monotonic() + 5
        while True:
            ports = json.loads(self.node.tool(["ip", "-j", "-d", "link", "show", "master", "cni0"]))
            if all(port["linkinfo"]["info_slave_data"]["state"] == "forwarding" for port in ports):
                return
            if time.monotonic() > deadline:
                raise LabError("the ports of the bridge cni0 do not come up. `ip -d link` in the node shows why.")
            time.sleep(0.02)

    # -- use -----------------------------------------------------------------------------------------

    def pod(self, owner: str) -> Pod:
        """The pod whose owner name ("shop/cart-…"), name or namespace name this is."""
        found = [pod for pod in self.pods if owner in (pod.owner, pod.spec.name, pod.name)]
        if len(found) != 1:
            raise LabError(f"the lab has no pod {owner!r}. It has: {', '.join(pod.owner for pod in self.pods)}")
        return found[0]

    def gateway_device(self, pod: Pod) -> str:
        """The node's device that routes what the pod sends."""
        return "cni0" if self.bridge else pod.veth

    def inject(self, name: str, count: int = 23, owner: Pod | str | None = None) -> Expected:
        """Make the fault `name` drop `count` packets that belong to `owner` (the first pod by default)."""
        from k8sdiag.host.lab.faults import FAULTS  # faults know labs, and a lab only this of faults

        if name not in FAULTS:
            raise LabError(f"no fault {name!r}. There are: {', '.join(FAULTS)}")
        return FAULTS[name](self, count, owner)

    @contextlib.contextmanager
    def host_sysctl(self, name: str, value: int) -> Iterator[None]:
        """Change a sysctl of the whole machine for a moment; `down` restores it after a kill."""
        path = Path("/proc/sys", *name.split("."))
        # One lab at a time: else the second would take the first one's value for the machine's own.
        with _locked(STATE_DIR):
            self._sysctls[name] = path.read_text().strip()
            self._write_state(ready=True)
            try:
                path.write_text(str(value))
                yield
            finally:
                path.write_text(self._sysctls.pop(name))
                self._write_state(ready=True)


def _quiet(netns: Netns) -> None:
    """No reverse-path filter; IPv6 sends nothing unasked later: no duplicate detection, solicitation, late reports."""
    for name in ("all", "default"):
        netns.sysctl(f"net.ipv4.conf.{name}.rp_filter", 0)
    if not os.path.isdir("/proc/sys/net/ipv6"):
        return
    for name in ("accept_dad", "accept_ra", "router_solicitations"):
        netns.sysctl(f"net.ipv6.conf.default.{name}", 0)
    for name in ("mldv1_unsolicited_report_interval", "mldv2_unsolicited_report_interval"):
        netns.sysctl(f"net.ipv6.conf.default.{name}", 1)


def exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def require_root_and_tools() -> None:
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces, and that takes root. Run it with sudo.")
    package_of = {
        **dict.fromkeys(("ip", "bridge", "tc"), "iproute2"),
        "nft": "nftables",
        **dict.fromkeys(("iptables-nft", "iptables-legacy"), "iptables"),
        **dict.fromkeys(("nsenter", "unshare"), "util-linux"),
    }
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys([*directories, "/usr/sbin", "/sbin"]))
    missing = [tool for tool in package_of if shutil.which(tool) is None]
    if missing:
        wanted = " ".join(sorted({package_of[tool] for tool in missing}))
        raise LabError(f"missing: {', '.join(missing)}. Install them: apt-get install --no-install-recommends {wanted}")


def _kill_marked(prefix: str) -> None:
    """Kill every process that carries this lab's mark in its environment, and wait until they are gone."""
    mark = f"{PROCESS_MARK}={prefix}".encode()
    deadline = time.monotonic() + 5
    while True:
        alive = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    if mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                        alive.append(int(entry))
        if not alive:
            return
        if time.monotonic() > deadline:
            raise LabError(f"processes {alive} of lab {prefix!r} do not die. Look at them with ps -fp PID.")
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


# ----------------------------------------------------------------------------------------------------
# What labs share


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    directory = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _shared_directories() -> contextlib.AbstractContextManager[None]:
    """Only one lab at a time makes or removes the directories that labs share, or picks its subnet.

    The lock is on /run itself: a lock file of our own would be one more thing to leave behind.
    """
    return _locked(STATE_DIR.parent)


def _state_file(prefix: str) -> Path:
    return STATE_DIR / f"{prefix}.json"


def _read_state(prefix: str) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(_state_file(prefix).read_text())
    except FileNotFoundError:
        return None
    except ValueError as failure:
        raise LabError(f"{_state_file(prefix)} is damaged ({failure}). Remove it and run `lab down`.") from failure
    return state


def lab_prefixes() -> list[str]:
    """Prefixes of the labs that are up, or were killed and not yet taken down."""
    return sorted(path.stem for path in STATE_DIR.glob("*.json"))
