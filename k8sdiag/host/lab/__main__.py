"""scripts/lab: build a lab and leave it standing, inject faults by name, take it down."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence

from k8sdiag.host.lab.faults import FAULTS
from k8sdiag.host.lab.netns import LabError
from k8sdiag.host.lab.topology import Lab, exit_on_signal, lab_prefixes, require_root_and_tools


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab",
        description="Network namespaces as pods on a node, with faults injected by name. Needs root.",
    )
    parser.add_argument("--prefix", default="k8d", help="name of the lab; several may live side by side (default k8d)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    up = verbs.add_parser("up", help="build the lab and leave it standing")
    up.add_argument("--bridge", action="store_true", help="pods on a bridge cni0 instead of routed veths")
    up.add_argument("--no-ipv6", action="store_true", help="IPv4 only")
    up.add_argument("--no-conntrack", action="store_true", help="the node does not track connections")
    verbs.add_parser("down", help="remove the lab and whatever a killed one left")
    verbs.add_parser("list", help="the faults that can be injected")
    verbs.add_parser("status", help="the labs that are up and their pods")
    inject = verbs.add_parser("inject", help="drop some packets in a named way")
    inject.add_argument("fault", metavar="NAME", help="see `lab list`")
    inject.add_argument("--count", type=int, default=23, help="packets to drop (default 23)")
    inject.add_argument("--pod", metavar="NAMESPACE/NAME", help="the pod they shall belong to (default: the first)")
    return parser


def _print_lab(lab: Lab) -> None:
    print(f"lab {lab.prefix}: {'bridge cni0' if lab.bridge else 'routed'}, node namespace {lab.node.name}")
    width = max(len(pod.owner) for pod in lab.pods)
    for pod in lab.pods:
        where = pod.name if pod.spec.named else f"held by pid {pod.pid}"
        print(f"  {pod.owner:{width}}  {pod.ipv4:15}  {pod.veth:8}  netns {pod.inode}  {where}")


def _status() -> None:
    prefixes = lab_prefixes()
    for prefix in prefixes:
        try:
            _print_lab(Lab.attach(prefix))
        except LabError as error:
            print(error)
    if not prefixes:
        print("no lab is up; start one with: lab up")


def _obey(arguments: argparse.Namespace) -> None:
    if arguments.verb == "list":
        width = max(map(len, FAULTS))
        for fault in FAULTS.values():
            print(f"{fault.name:{width}}  {fault.says}")
        return
    require_root_and_tools()
    if arguments.verb == "up":
        signal.signal(signal.SIGTERM, exit_on_signal)  # then what is half built is removed
        routing = {"bridge": arguments.bridge, "ipv6": not arguments.no_ipv6, "conntrack": not arguments.no_conntrack}
        _print_lab(Lab(arguments.prefix, **routing).up())
    elif arguments.verb == "down":
        Lab(arguments.prefix).down()
    elif arguments.verb == "status":
        _status()
    elif arguments.verb == "inject":
        expected = Lab.attach(arguments.prefix).inject(arguments.fault, arguments.count, arguments.pod)
        print(json.dumps(dataclasses.asdict(expected), indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say. Exit code: 0 done, 1 failed; argparse exits with 2 on bad usage."""
    try:
        _obey(_arguments().parse_args(argv))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
