"""The shortest way through probe, maps and ring buffer: 23 datagrams to a closed loopback port, counted.

`python3 -m k8sdiag.host.selftest` needs the standard library and bcc only, and prints one JSON object.
"""

from __future__ import annotations

import json
import platform
import socket
import struct
import sys
import time

from k8sdiag.errors import K8sdiagError
from k8sdiag.host import wire
from k8sdiag.host.bpf import BpfMap, Compilation, GracePeriod, Probe, possible_cpus
from k8sdiag.host.symbols import KernelSymbols

DATAGRAMS = 23


def count_own_drops() -> dict[str, object]:
    """Load the drop probe, provoke drops, read them back, detach. Raises the errors of host.bpf."""
    begin_s = time.perf_counter()
    probe = Probe(Compilation("drops").begin(KernelSymbols()))
    try:
        BpfMap(probe.map_fds["control"], 4, wire.CONTROL.size).update(
            bytes(4), wire.CONTROL.codec.pack(0, 1, DATAGRAMS, DATAGRAMS, 0, 0)
        )
        probe.attach("kfree_skb")
        load_s = time.perf_counter() - begin_s
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind(("127.0.0.1", 0))
            port = receiver.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(DATAGRAMS):
                sender.sendto(b"k8sdiag", ("127.0.0.1", port))
        probe.detach()
        GracePeriod().wait()
        cpus = possible_cpus()
        slot = struct.Struct("<" + (wire.FLOW_KEY.codec.format + wire.TALLY.codec.format).replace("<", ""))
        dport, skbs_at = [field.name for field in wire.FLOW_KEY.fields].index("dport"), len(wire.FLOW_KEY.fields)
        counted = []
        if "slots_0" in probe.map_fds:
            slots = BpfMap(probe.map_fds["slots_0"], 4, wire.SLOTS * slot.size, cpus).lookup(bytes(4))
            counted += [(fields[dport], fields[skbs_at]) for fields in slot.iter_unpack(slots)]
        for keys, values in BpfMap(probe.map_fds["flows_0"], wire.FLOW_KEY.size, wire.TALLY.size, cpus).drain():
            tallies = struct.iter_unpack("<" + wire.TALLY.codec.format.replace("<", "") * cpus, values)
            for flow, tally in zip(wire.FLOW_KEY.codec.iter_unpack(keys), tallies, strict=True):
                counted.append((flow[dport], sum(tally[0 :: len(wire.TALLY.fields)])))
        skbs = sum(count for to_port, count in counted if to_port == port)
        return {
            "bcc": probe.about["bcc"],
            "python": platform.python_version(),
            "kernel": platform.release(),
            "skbs": skbs,
            "expected": DATAGRAMS,
            "load_s": round(load_s, 3),
        }
    finally:
        probe.close()


if __name__ == "__main__":
    try:
        result = count_own_drops()
    except K8sdiagError as error:
        sys.exit(str(error))
    print(json.dumps(result))
    sys.exit(result["skbs"] != DATAGRAMS)
