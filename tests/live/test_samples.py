"""What is sampled of a dropped packet: its headers and where it died, never what it carried; and what gets no room."""

from __future__ import annotations

import io
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from k8sdiag import report
from k8sdiag.facts import DropKey, Sample, Symbol
from k8sdiag.host import wire
from k8sdiag.host.lab import Lab, PodSpec
from k8sdiag.source import Batch
from k8sdiag.trace import TraceSource, TraceWriter
from tests.live.watch import drops_of, watching

pytestmark = pytest.mark.live
NewLab = Callable[..., Lab]
NETNS = PodSpec(kind="netns", name="plain")

SEND = """
import socket, sys
family, to, port, payload = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), bytes.fromhex(sys.argv[4])
socket.socket(family, socket.SOCK_DGRAM).sendto(payload, (to, port))
"""
TCP = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
one = socket.create_connection(listener.getsockname())
two, _ = listener.accept()
import subprocess
subprocess.run(["nft", "table ip s { chain i { type filter hook input priority 0; tcp dport %d drop; }; }"
                % listener.getsockname()[1]], check=True)
one.sendall(bytes.fromhex(sys.argv[1]))
"""


def record(traffic: Callable[[], object]) -> tuple[bytes, list[Batch]]:
    file = io.BytesIO()
    writer = TraceWriter(file)
    with watching(write=writer.write) as watch:
        traffic()
        watch.end()
    content = file.getvalue()
    batches = list(TraceSource(io.BytesIO(content), "memory"))
    return content, batches


def samples(batches: list[Batch], port: int) -> list[Sample]:
    facts = [fact for batch in batches for fact in batch.facts]
    keys = {fact.id for fact in facts if isinstance(fact, DropKey) and fact.dport == port}
    return [fact for fact in facts if isinstance(fact, Sample) and fact.key in keys]


@pytest.mark.parametrize(("family", "headers_bytes"), [(socket.AF_INET, 28), (socket.AF_INET6, 48)])
def test_a_sample_ends_with_the_transport_header(new_lab: NewLab, family: int, headers_bytes: int) -> None:
    (netns,) = new_lab(pods=[NETNS]).pods
    secret = secrets.token_bytes(64)
    to = netns.ipv4 if family == socket.AF_INET else netns.ipv6
    _, batches = record(lambda: netns.run([sys.executable, "-c", SEND, str(family), to, "4711", secret.hex()]))
    (sample,) = samples(batches, 4711)
    assert len(sample.headers) == 2 * headers_bytes
    assert sample.length in (headers_bytes + 64, 8 + 64)
    assert all(secret[i : i + 4].hex() not in line for i in range(60) for line in lines(batches))
    names = {fact.address: fact.name for batch in batches for fact in batch.facts if isinstance(fact, Symbol)}
    assert {"__udp4_lib_rcv", "__udp6_lib_rcv"} & {names[address] for address in sample.stack}


def test_nothing_of_a_tcp_payload_is_in_a_trace(new_lab: NewLab) -> None:
    (netns,) = new_lab(pods=[NETNS]).pods
    secret = secrets.token_bytes(64)
    _, batches = record(lambda: netns.run([sys.executable, "-c", TCP, secret.hex()]))
    taken = [fact for batch in batches for fact in batch.facts if isinstance(fact, Sample)]
    assert any(len(sample.headers) == 2 * (20 + 32) for sample in taken)  # TCP with timestamps
    assert all(secret[i : i + 4].hex() not in line for i in range(60) for line in lines(batches))


def test_inside_a_vxlan_tunnel_the_inner_headers_are_kept_and_nothing_more(new_lab: NewLab) -> None:
    (netns,) = new_lab(pods=[NETNS]).pods
    secret = secrets.token_bytes(64)
    inner_udp = (4000).to_bytes(2, "big") + (53).to_bytes(2, "big") + (8 + 64).to_bytes(2, "big") + bytes(2)
    inner_ip = bytes([0x45, 0]) + (28 + 64).to_bytes(2, "big") + bytes(4) + bytes([64, 17]) + bytes(2)
    inner_ip += socket.inet_aton("10.244.1.2") + socket.inet_aton("10.244.2.2")
    vxlan = bytes([8, 0, 0, 0, 0, 0, 1, 0]) + bytes(12) + b"\x08\x00" + inner_ip + inner_udp + secret
    send = [sys.executable, "-c", SEND, str(int(socket.AF_INET)), netns.ipv4, "8472", vxlan.hex()]
    _, batches = record(lambda: netns.run(send))
    (sample,) = samples(batches, 8472)
    assert sample.headers.endswith((inner_ip + inner_udp).hex())
    assert len(sample.headers) == 2 * (20 + 8 + 8 + 14 + 20 + 8)
    assert all(secret[i : i + 4].hex() not in line for i in range(60) for line in lines(batches))


def lines(batches: list[Batch]) -> list[str]:
    """Every text in which bytes of a packet could hide."""
    return [fact.headers for batch in batches for fact in batch.facts if isinstance(fact, Sample)]


def test_samples_are_limited_and_the_rest_is_counted(new_lab: NewLab) -> None:
    (netns,) = new_lab(pods=[NETNS], ipv6=False, conntrack=False).pods
    with watching() as watch:
        netns.flood_udp(netns.ipv4, 4711, 20_000, random_source=True)
        snapshot = watch.end()
    taken = len(watch.engine.samples)
    assert 0 < taken < 2000
    assert snapshot.lost.samples > 5_000
    assert report.status(snapshot) != "unknown"  # samples are held back on purpose


def test_noise_of_unix_sockets_does_not_cost_a_key_each() -> None:
    make_noise = (
        "import socket\n"
        "for _ in range(500):\n"
        "    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "    one.send(b'unread')\n"
        "    one.close(); two.close()\n"
    )
    with watching() as watch:
        subprocess.run([sys.executable, "-c", make_noise], check=True)
        snapshot = watch.end()
    noise = [row for row in snapshot.drops if row.family is None and row.benign]
    assert sum(row.packets for row in noise) >= 500
    assert sum(row.flows or 0 for row in noise) < 20


def test_drops_for_which_even_the_exact_map_has_no_room_are_owned_up_to(
    new_lab: NewLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"FLOWS": 8, "DROPS": 1, "SAMPLE_PAGES": wire.SAMPLE_PAGES}
    monkeypatch.setattr(wire, "map_sizes", lambda _cpus: sizes)
    one, two = new_lab(pods=[NETNS, PodSpec(kind="netns", name="other")], ipv6=False, conntrack=False).pods
    with watching(interval_s=30) as watch:
        for netns in (one, two):
            netns.flood_udp(netns.ipv4, 4711, 5_000, processes=1, random_source=True)
        snapshot = watch.end()
    counted = sum(row.skbs for netns in (one, two) for row in drops_of(snapshot, netns.owner))
    assert one.udp_no_ports() + two.udp_no_ports() == 10_000
    assert snapshot.lost.keys > 0
    assert 10_000 <= counted + snapshot.lost.keys <= 10_020  # drops of others found no room either
    assert snapshot.lost.events < 20  # told apart: these were seen
    assert report.status(snapshot) in ("unknown", "critical")
