"""What the lab's processes do inside a namespace: send, read, end connections badly.

Run as a file, `python3 -IS traffic.py NAME JSON-ARGUMENTS`, so it imports the standard library only. What a
process has to say it prints as lines of JSON; those that wait for questions read them as lines on stdin and
end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

# Addresses without a way back inside the lab (RFC 2544, RFC 5180: benchmarking). Floods draw their random
# sources from here, and each pod has a blackhole route for them: else each ICMP answer would be a drop too.
RANDOM_SOURCE_V4, RANDOM_SOURCE_V6 = "198.18.0.0/15", "2001:2::/48"
UNROUTED = "203.0.113.7"  # TEST-NET-3: the node has no route to it

# <asm-generic/socket.h>, <linux/in.h>, <linux/in6.h>, <linux/udp.h>: what the socket module does not name.
SO_RCVBUFFORCE, SO_MEMINFO = 33, 55
SK_MEMINFO_DROPS = 8
SOL_UDP, UDP_SEGMENT = 17, 103
TCP_REPAIR = 19
IP_TRANSPARENT, IPV6_HDRINCL = 19, 36


@dataclass(frozen=True)
class Tally:
    """What the sending side saw. Unit: packets for UDP, connections for TCP, one packet each for attempts."""

    sent: int = 0
    """Handed to the kernel, including the refused ones."""
    refused: int = 0
    """UDP: the send call failed (EPERM from an OUTPUT rule, ENOBUFS …). TCP: refused, reset or unreachable."""
    timed_out: int = 0
    """TCP and attempts: no answer within the timeout."""
    connected: int = 0
    """TCP: established. Attempts by UDP: answered."""


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _checksum(data: bytes) -> int:
    """Ones' complement checksum of 16-bit words (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ipv4_header(source: str, destination: str, udp_payload_bytes: int) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    start = struct.pack("!BBHHHBB", 0x45, 0, 20 + 8 + udp_payload_bytes, 0, 0, 64, socket.IPPROTO_UDP)
    return start + struct.pack("!H", _checksum(start + addresses)) + addresses


# ----------------------------------------------------------------------------------------------------
# Datagrams


def _udp(dst: str, port: int, count: int, size: int, sport: int, source: str) -> Tally:
    refused = 0
    with socket.socket(_family(dst), socket.SOCK_DGRAM) as sender:
        if source:
            sender.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        sender.bind((source, sport))
        payload = bytes(size)
        for number in range(1, count + 1):
            try:
                sender.sendto(payload, (dst, port))
            except OSError:
                refused += 1
            if number % 128 == 0:  # far below netdev_max_backlog, should softirqs fall behind
                time.sleep(0.001)
    return Tally(sent=count, refused=refused)


def _bursts(dst: str, port: int, size: int) -> None:
    """For each line, a list of numbers of datagrams: one segmentation-offload buffer for each number."""
    with socket.socket(_family(dst), socket.SOCK_DGRAM) as sender:
        sender.setsockopt(SOL_UDP, UDP_SEGMENT, size)
        for line in sys.stdin:
            lengths = json.loads(line)
            for length in lengths:
                sender.sendto(bytes(size * length), (dst, port))
                time.sleep(0.0005)
            _say(sum(lengths))


def _flood(dst: str, port: int, count: int, random_source: bool) -> Tally:
    """sendmmsg, 256 packets a call; with random sources the packets are built here, headers included."""
    family, batch, size = _family(dst), 256, 32
    if random_source:
        packets, redraw = _random_packets(dst, port, size, batch)
        sender = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        if family == socket.AF_INET6:
            sender.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
            port = 0  # the kernel wants none in the address of a raw IPv6 packet
    else:
        packets, redraw = bytearray(size * batch), lambda: None
        sender = socket.socket(family, socket.SOCK_DGRAM)
    flow_label = bytes(4) if family == socket.AF_INET6 else b""
    address = struct.pack("=H", family) + struct.pack("!H", port) + flow_label + socket.inet_pton(family, dst)
    name = ctypes.create_string_buffer(address, 28)  # the size of sockaddr_in6, the longer one
    stride = len(packets) // batch
    start = ctypes.addressof((ctypes.c_char * len(packets)).from_buffer(packets))
    iovecs = ctypes.create_string_buffer(b"".join(struct.pack("@PN", start + i * stride, stride) for i in range(batch)))
    iovec_bytes = struct.calcsize("@PN")
    message = "@PIPNPNi0PI0P"  # struct mmsghdr: name and its length, iovecs, control, flags; bytes sent
    messages = ctypes.create_string_buffer(
        b"".join(
            struct.pack(
                message, ctypes.addressof(name), len(name), ctypes.addressof(iovecs) + i * iovec_bytes, 1, 0, 0, 0, 0
            )
            for i in range(batch)
        )
    )
    sendmmsg = ctypes.CDLL(None).sendmmsg
    done = refused = 0
    with sender:
        while done < count:
            redraw()
            wanted, offset = min(batch, count - done), 0
            while offset < wanted:
                first = ctypes.byref(messages, offset * struct.calcsize(message))
                sent = sendmmsg(sender.fileno(), first, wanted - offset, 0)
                if sent < 0:  # this one packet was refused (EPERM, ENOBUFS): go on behind it
                    sent, refused = 1, refused + 1
                offset += sent
            done += wanted
    return Tally(sent=done, refused=refused)


_COMPLEMENT = bytes(255 - i for i in range(256))
_HIGH_PORT = bytes(i | 0x80 for i in range(256))


def _random_packets(dst: str, port: int, size: int, batch: int) -> tuple[bytearray, Callable[[], None]]:
    """`batch` equal UDP packets, and a function that draws their source addresses and ports anew.

    The UDP checksum (IPv6 needs one) stays right without being computed again: each random byte stands in the
    packet together with its one's complement, the two adding up to 0xff.
    """
    twins: dict[int, int | None]  # a random byte's place in the packet: its complement's
    if _family(dst) == socket.AF_INET:
        header = _ipv4_header(RANDOM_SOURCE_V4.partition("/")[0], dst, size)
        twins, checksum = {14: None, 15: None}, 0  # none, legal in IPv4; the kernel mends the header's own
    else:
        # Of the source's words, 4 to 7 are v, ~v, w, ~w; the port and the first of the payload are p, ~p.
        source = socket.inet_pton(socket.AF_INET6, RANDOM_SOURCE_V6.partition("/")[0])
        addresses = source[:8] + bytes.fromhex("0000ffff0000ffff") + socket.inet_pton(socket.AF_INET6, dst)
        header = struct.pack("!IHBB", 6 << 28, 8 + size, socket.IPPROTO_UDP, 64) + addresses
        pseudo_header = addresses + struct.pack("!II", 8 + size, socket.IPPROTO_UDP)
        udp = struct.pack("!HHHHH", 0, port, 8 + size, 0, 0xFFFF)
        twins, checksum = {16: 18, 17: 19, 20: 22, 21: 23}, _checksum(pseudo_header + udp) or 0xFFFF
    sport_at = len(header)
    twins |= {sport_at: sport_at + 8, sport_at + 1: sport_at + 9}
    packet = header + struct.pack("!HHHH", 0, port, 8 + size, checksum) + bytes(size)
    packets = bytearray(packet * batch)

    def redraw() -> None:
        for at, twin in twins.items():
            values = os.urandom(batch)
            if at == sport_at:
                values = values.translate(_HIGH_PORT)
            packets[at :: len(packet)] = values
            if twin is not None:
                packets[twin :: len(packet)] = values.translate(_COMPLEMENT)

    return packets, redraw


def _flows(dst: str, port: int, first_sport: int) -> None:
    """For each line, a number: so many datagrams, each from a source port of its own, counted up from the first."""
    sport = first_sport
    for line in sys.stdin:
        for number in range(1, int(line) + 1):
            with socket.socket(_family(dst), socket.SOCK_DGRAM) as sender:
                sender.bind(("", sport))
                sender.sendto(b"flow", (dst, port))
            sport += 1
            if number % 128 == 0:
                time.sleep(0.001)
        _say(int(line))


def _talk(dst: str, port: int) -> None:
    """For each line, a number: so many datagrams from one socket, and how many answers came within half a second."""
    with socket.socket(_family(dst), socket.SOCK_DGRAM) as talker:  # not connected: ICMP errors shall not stop it
        for line in sys.stdin:
            for _ in range(int(line)):
                talker.sendto(b"talk", (dst, port))
            answered, deadline = 0, time.monotonic() + 0.5
            while answered < int(line) and (left_s := deadline - time.monotonic()) > 0:
                talker.settimeout(left_s)
                with contextlib.suppress(TimeoutError):
                    talker.recv(64)
                    answered += 1
            _say(answered)


def _twins(dst: str, port: int, sockets: int) -> None:
    """For each line, new sockets (at most 255), each sending two datagrams at the same moment from two processes.

    Nobody knows the connection before the first of the two has passed, so both are the first.
    """
    for _ in sys.stdin:
        senders = []
        for _ in range(sockets):
            sender = socket.socket(_family(dst), socket.SOCK_DGRAM)
            sender.connect((dst, port))
            senders.append(sender)
        with mmap.mmap(-1, 2) as arrived:  # how far each process has come
            child = os.fork()
            me = 0 if child else 1
            for number, sender in enumerate(senders, 1):
                arrived[me] = number
                deadline = time.monotonic() + 0.1  # the other may have lost its CPU, or ended
                while arrived[1 - me] < number and time.monotonic() < deadline:
                    pass
                with contextlib.suppress(ConnectionRefusedError):
                    sender.send(b"twin")
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
        for sender in senders:
            sender.close()
        _say(2 * sockets)


def _sink(port: int, echo: bool, address: str) -> None:
    """Read everything, and send it back if asked to; answer each line with the number of datagrams so far."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as reader:
        reader.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        reader.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        reader.bind((address, port))
        reader.setblocking(False)
        _say("ready")
        received, asked = 0, False
        while True:
            with contextlib.suppress(BlockingIOError):
                while True:
                    datagram, sender = reader.recvfrom(64)
                    received += 1
                    if echo:
                        reader.sendto(datagram, sender)
            if asked:  # after reading: the answer includes what was there when the question came
                _say(received)
            readable, _, _ = select.select([reader, sys.stdin], [], [])
            asked = sys.stdin in readable
            if asked and not sys.stdin.readline():
                return


def _full(port: int, address: str) -> None:
    """A socket nobody reads, filled until exactly one datagram was dropped."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as full,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel's minimum, about 2,300 bytes
        full.bind((address, port))
        full.setblocking(False)

        def drops() -> int:
            return int(struct.unpack("=9I", full.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[SK_MEMINFO_DROPS])

        for _ in range(100):
            if drops():
                break
            sender.sendto(b"x", (address, port))
            time.sleep(0.001)
        if drops() != 1:
            sys.exit(f"filling the socket's buffer dropped {drops()} datagrams instead of one")
        _say("ready")
        sys.stdin.read()
        with contextlib.suppress(BlockingIOError):  # closing a socket with unread data makes events of its own
            while True:
                full.recv(1)


# ----------------------------------------------------------------------------------------------------
# Connections


def _attempts(dst: str, port: int, count: int, timeout_s: float, udp: bool, wait: bool) -> Tally:
    """TCP connects, or datagrams from a socket each that hope for an answer; with `wait` not before a line comes."""
    waiting: dict[int, socket.socket] = {}
    poll = select.poll()
    for _ in range(count):
        attempt = socket.socket(_family(dst), socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
        attempt.setblocking(False)
        waiting[attempt.fileno()] = attempt
    if wait:
        _say("ready")
        sys.stdin.readline()
    for descriptor, attempt in waiting.items():
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):  # a refusal shows in the poll as well
            attempt.connect((dst, port))
            if udp:
                attempt.send(b"attempt")
        poll.register(descriptor, select.POLLIN if udp else select.POLLOUT)
    connected = refused = 0
    deadline = time.monotonic() + timeout_s
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left_s * 1000):
            poll.unregister(descriptor)
            with waiting.pop(descriptor) as attempt:
                try:
                    if udp:
                        attempt.recv(64)
                    else:
                        attempt.getpeername()
                    connected += 1
                except OSError:
                    refused += 1
    for attempt in waiting.values():
        attempt.close()
    return Tally(sent=count, refused=refused, timed_out=len(waiting), connected=connected)


def _many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _abandon(connection: socket.socket) -> None:
    """Close without a packet, and without sending again what was not acknowledged."""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)


def _hold(dst: str, port: int, count: int) -> None:
    """TCP connections, held until stdin ends."""
    _many_files()
    held = [socket.create_connection((dst, port), timeout=5) for _ in range(count)]
    _say(len(held))
    sys.stdin.read()
    for connection in held:
        _abandon(connection)


def _server(port: int) -> None:
    """Accept everything and hold it. A line: write on each connection; "abandon": and give it up at once."""
    accepted: list[socket.socket] = []
    _many_files()
    with socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096) as server:
        server.setblocking(False)
        _say("ready")
        while True:
            readable, _, _ = select.select([server, sys.stdin], [], [])
            with contextlib.suppress(BlockingIOError):
                while True:
                    accepted.append(server.accept()[0])
            if sys.stdin not in readable:
                continue
            line = sys.stdin.readline()
            for connection in accepted:
                if line:
                    connection.send(b"x")
                if not line or line.strip() == "abandon":
                    _abandon(connection)
            if not line:
                return
            _say(len(accepted))
            if line.strip() == "abandon":
                accepted.clear()


def _tcp_endings(count: int) -> Tally:
    """Connections that end by RST in two ways, and a keep-alive probe (an old sequence number)."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:

        def connect() -> tuple[socket.socket, socket.socket]:
            return socket.create_connection(server.getsockname()), server.accept()[0]

        for _ in range(count):
            client, accepted = connect()
            client.sendall(b"never read")
            accepted.close()  # unread data: the close is a RST
            client.close()
            client, accepted = connect()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # abortive close: a RST
            accepted.close()
        idle, accepted = connect()
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        idle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        time.sleep(1.3)
        idle.close()
        accepted.close()
    return Tally(sent=count)


# ----------------------------------------------------------------------------------------------------
# Noise


def _unread(count: int) -> Tally:
    """Sockets that close with data nobody read: Unix datagrams, a Unix stream, UDP."""
    for _ in range(count):
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            one, other = socket.socketpair(socket.AF_UNIX, kind)
            one.send(b"never read")
            other.close()
            one.close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reader:
            reader.bind(("127.0.0.1", 0))
            reader.sendto(b"never read", reader.getsockname())
    return Tally(sent=count)


def _frames(device: str, own_mac: str, address: str, count: int) -> Tally:
    """Frames that are none of the pod's business: for another host, and of an unknown protocol (LLDP)."""
    packet = _ipv4_header(UNROUTED, address, 0) + struct.pack("!HHHH", 9, 9, 8, 0)
    other_mac = bytes.fromhex(own_mac.replace(":", ""))[:5] + b"\xee"
    source_mac = bytes.fromhex("0a580a0000fe")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((device, 0))
        for _ in range(count):
            wire.send(other_mac + source_mac + b"\x08\x00" + packet)
            wire.send(bytes.fromhex("0180c200000e") + source_mac + b"\x88\xcc" + bytes(46))
    return Tally(sent=2 * count)


_ACTS: dict[str, Callable[..., Tally | None]] = {
    "udp": _udp,
    "bursts": _bursts,
    "flood": _flood,
    "flows": _flows,
    "talk": _talk,
    "twins": _twins,
    "sink": _sink,
    "full": _full,
    "attempts": _attempts,
    "hold": _hold,
    "server": _server,
    "tcp-endings": _tcp_endings,
    "unread": _unread,
    "frames": _frames,
}

if __name__ == "__main__":
    tally = _ACTS[sys.argv[1]](**json.loads(sys.argv[2]))
    if tally is not None:
        _say(dataclasses.asdict(tally))
