"""What a fault of the lab is, and what it should do to the counts.

Whose is a dropped packet? One that is addressed to or from the namespace in which it dies belongs to that
namespace; one in transit through the node belongs to the pod behind the veth it is on (skb->dev): the sender on
its way in, the receiver in the qdisc on its way out. On a bridge, PREROUTING and routing see cni0, so only the
source address tells the sender, and FORWARD sees the port towards the receiver. What conntrack refuses on its way
out belongs to who opened the connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from k8sdiag.host.lab.netns import LabError
from k8sdiag.host.lab.topology import Lab, Pod

# What a guest of scripts/vm has, and no other machine.
VM_MARK = Path("/run/k8sdiag-vm")


@dataclass(frozen=True)
class Expected:
    """What one injected fault did, and how k8sdiag should name it."""

    fault: str
    cause: str | None
    """Slug of the cause catalogue; None for benign noise, which is no fault."""
    owner: str
    """namespace/name of the pod, short container id, or netns name that the drops belong to; "" for none."""
    count: int
    """Packets dropped, known by construction: each packet sent met the fault, or sent minus received."""
    counter: int
    """The same, read from a kernel counter that has nothing to do with kfree_skb."""
    counter_name: str
    reason: str | None
    """Drop reason of skb:kfree_skb, as on 6.18."""
    hook: str | None = None
    """Netfilter hook, where it was netfilter."""
    family: Literal[4, 6] = 4
    netns: int = 0
    """Inode of the network namespace in which the packets died."""
    device: str | None = None
    """The device they were on (skb->dev); None on the way out, before there is one."""
    culprit: str = ""
    """Who fills the connection table that had no room for them; "" for other faults."""


@dataclass(frozen=True)
class Fault:
    """A named way to lose packets. Call it: `fault(lab, count)`."""

    name: str
    says: str
    """One line for `lab list`."""
    act: Callable[[Case], tuple[int, int]] = field(repr=False)
    """Returns the `count` and the `counter` of Expected."""
    cause: str | None
    reason: str | None
    counter_name: str
    at: Literal["pod", "node"] = "pod"
    """Where the packets die."""
    hook: str | None = None
    family: Literal[4, 6] = 4
    host_wide: bool = False
    """Touches the whole machine for a moment."""
    tracked: bool = False
    """Takes a node that tracks connections."""
    lossless: bool = False
    """Costs no packet: `count` is 0, and `counter` says how often it happened."""
    vm_only: bool = False
    """Would hurt everybody on the machine: scripts/vm's guests only."""

    def __call__(self, lab: Lab, count: int = 23, owner: Pod | str | None = None) -> Expected:
        if count < 1:
            raise LabError(f"count must be at least 1, not {count}.")
        if self.family == 6 and not lab.ipv6:
            raise LabError("this lab has no IPv6. Build it with ipv6=True (and without --no-ipv6).")
        if self.tracked and not lab.conntrack:
            raise LabError("this lab does not track connections. Build it with conntrack=True (no --no-conntrack).")
        if self.vm_only and not VM_MARK.exists():
            raise LabError(f"{self.name} changes the whole machine for the worse. Try it in a guest of scripts/vm.")
        pod = owner if isinstance(owner, Pod) else lab.pod(owner) if owner else lab.pods[0]
        others = [other for other in lab.pods if other is not pod]
        if not others:
            raise LabError("faults need a second pod to talk to. Build the lab with at least two PodSpecs.")
        # A pod of the same namespace would blur sums per namespace: prefer one from elsewhere.
        peer = next((other for other in others if other.spec.namespace != pod.spec.namespace), others[0])
        case = Case(self, lab, count, pod, peer)
        dropped, counter = self.act(case)
        if self.cause is None:
            return Expected(self.name, None, "", dropped, counter, self.counter_name, None)
        return Expected(
            fault=self.name,
            cause=self.cause,
            owner=pod.owner,
            count=dropped,
            counter=counter,
            counter_name=self.counter_name,
            reason=self.reason,
            hook=self.hook,
            family=self.family,
            netns=(pod if self.at == "pod" else lab.node).inode,
            device=case.device,
            culprit=case.culprit.owner if self.cause == "ct-table-full" else "",
        )


@dataclass(frozen=True)
class Case:
    """One fault, this time."""

    fault: Fault
    lab: Lab
    count: int
    """Packets that shall be dropped."""
    pod: Pod
    """Whose they shall be."""
    peer: Pod
    """Another one to talk to."""

    @property
    def device(self) -> str | None:
        """Where skb->dev points when the packets die."""
        if self.fault.reason is None:
            return None
        if self.fault.at == "pod":
            return None if self.fault.hook == "LOCAL_OUT" else "eth0"
        if self.fault.hook == "POST_ROUTING":
            return self.peer.veth
        if self.fault.hook == "PRE_ROUTING" or self.fault.reason == "IP_INNOROUTES":
            return self.lab.gateway_device(self.pod)
        return self.pod.veth

    @property
    def culprit(self) -> Pod:
        """A third pod, which fills the table; with two pods only, the peer does."""
        return next((pod for pod in self.lab.pods if pod is not self.pod and pod is not self.peer), self.peer)

    @property
    def ends(self) -> tuple[Pod, Pod]:
        """Sender and receiver of packets that meet netfilter where they belong to `pod`.

        Routed, a packet in FORWARD is still on the device it came in by; bridged, on the one it leaves by.
        """
        if self.fault.hook == "LOCAL_IN" or (self.fault.hook == "FORWARD" and self.lab.bridge):
            return self.peer, self.pod
        return self.pod, self.peer

    def address(self, pod: Pod) -> str:
        return pod.ipv4 if self.fault.family == 4 else pod.ipv6


def settled(read: Callable[[], int], wanted: int) -> int:
    """Read a counter until it says `wanted`, at most 3 s (softirqs may be late); what it says."""
    deadline = time.monotonic() + 3
    while (value := read()) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return value
