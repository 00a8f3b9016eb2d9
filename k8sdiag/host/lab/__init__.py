"""The laboratory: network namespaces as pods on one "node", with faults injected by name.

    with Lab(prefix="demo") as lab:
        expected = lab.inject("nft-forward", count=23)

Every pod is what k8sdiag finds on a real node: a network namespace behind a veth, a process in a cgroup
with kubelet's path, and kubelet's log directory. Every fault returns what was done (`count`, known by
construction) beside what an independent kernel counter says of it (`counter`): the two must agree, and
whatever k8sdiag reports can be compared with both.

Only the standard library and the programs ip, bridge, tc, nft, iptables, nsenter, unshare and sleep are used;
root is needed. All traffic stays inside the namespaces made here. `down()` removes everything, also what a
killed earlier run with the same prefix left behind, except /run/netns itself, which iproute2 keeps mounted.
"""

from __future__ import annotations

from collections.abc import Sequence

from k8sdiag.host.lab.conntrack import Attempts, fill_table, share_snat_port
from k8sdiag.host.lab.fault import Expected, Fault
from k8sdiag.host.lab.faults import FAULTS
from k8sdiag.host.lab.netns import LabError, Netns, Server, Sink, inside, softnet_dropped
from k8sdiag.host.lab.topology import DEFAULT_PODS, LOG_ROOT, STATE_DIR, Lab, Pod, PodSpec, lab_prefixes
from k8sdiag.host.lab.traffic import RANDOM_SOURCE_V4, RANDOM_SOURCE_V6, Tally

__all__ = [
    "DEFAULT_PODS",
    "FAULTS",
    "LOG_ROOT",
    "RANDOM_SOURCE_V4",
    "RANDOM_SOURCE_V6",
    "STATE_DIR",
    "Attempts",
    "Expected",
    "Fault",
    "Lab",
    "LabError",
    "Netns",
    "Pod",
    "PodSpec",
    "Server",
    "Sink",
    "Tally",
    "fill_table",
    "inside",
    "lab_prefixes",
    "main",
    "share_snat_port",
    "softnet_dropped",
]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `k8sdiag.host.lab.__main__`."""
    # Imported late: under `python3 -m` it would otherwise be there already, and runpy warns of that.
    from k8sdiag.host.lab.__main__ import main as command_line

    return command_line(argv)
