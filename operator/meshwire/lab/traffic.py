"""Traffic that tells what happened to it, as a command for pods; needs the standard library alone.

`serve` answers; `udp`, `tcp`, `flows` (both, to several hosts at once), `ping` and `ask` talk to it (or,
`ping`, to any host) and print one JSON object. They run for `--seconds`, or until SIGTERM or SIGINT, and end
with 1 where something was lost, damaged or unanswered."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Final

PORT: Final = 5201

MAGIC: Final = 0x4D57
HEADER: Final = struct.Struct(">HBBQQ")
"""Magic, kind, padding, flow, and by kind: DATA sequence number from 0, END packets sent."""
OPEN, DATA, END, RESULT, ASK, ANSWER = range(1, 7)
RATE: Final = struct.Struct(">IH")
"""In OPEN: packets per second the server is to send, and their bytes; 0: none."""

RECEIVE_BUFFER: Final = 8 * 1024 * 1024
SO_RCVBUFFORCE: Final = 33
MAX_GAPS: Final = 50
"""Of a flow that has lost something: when a later packet came, the first number that was not there, and how
many."""
MIN_PAUSE: Final = 0.01
"""Seconds between two times of sending, and of reading: a wake-up costs more than a packet, and what traffic
costs is missing where it is looked after."""
MAX_READ: Final = 1024
"""Packets read in one go: others have a turn then."""
DRAIN_SECONDS: Final = 1.0
"""How long a packet may be late before it counts as lost."""
OPEN_SECONDS: Final = 10.0
END_ATTEMPTS: Final = 40
END_INTERVAL: Final = 0.25
FORGET_SECONDS: Final = 60.0


@dataclass(slots=True)
class Counted:
    """One direction of a flow, seen by its receiver. Times are in seconds. What it remembers grows with what
    is lost, not with what arrives: a flow may last for hours."""

    received: int = 0
    duplicates: int = 0
    reordered: int = 0
    longest_gap: float = 0.0
    _gaps: list[tuple[float, int, int]] = field(default_factory=list)
    _missing: set[int] = field(default_factory=set)
    _highest: int = -1
    _last: float | None = None

    def take(self, sequence: int, now: float) -> None:
        if sequence > self._highest:
            if (skipped := sequence - self._highest - 1) and len(self._gaps) < MAX_GAPS:
                self._gaps.append((round(time.time(), 3), self._highest + 1, skipped))
            self._missing.update(range(self._highest + 1, sequence))
            self._highest = sequence
        elif sequence in self._missing:
            self._missing.discard(sequence)
            self.reordered += 1
        else:
            self.duplicates += 1
            return
        self.received += 1
        if self._last is not None:
            self.longest_gap = max(self.longest_gap, now - self._last)
        self._last = now

    def missing(self, sent: int) -> list[int]:
        """Sequence numbers that were sent and not received, the first 50."""
        late = range(self._highest + 1, sent)
        return [*sorted(self._missing)[:50], *late[:50]][:50]

    def summary(self, sent: int) -> dict[str, object]:
        return {
            "sent": sent,
            "received": self.received,
            "lost": sent - self.received,
            "duplicates": self.duplicates,
            "reordered": self.reordered,
            "longest_gap_ms": round(self.longest_gap * 1000, 1),
            "missing": self.missing(sent),
            "gaps": self._gaps if self.received < sent else [],
        }


class Sender:
    """Sends numbered packets at a rate until stopped. What the kernel refuses to send counts as sent: it
    didn't arrive."""

    def __init__(self, flow: int, rate: int, size: int, send: Callable[[bytes], None]) -> None:
        self.sent = 0
        self.refused = 0
        self._flow = flow
        self._rate = rate
        self._padding = bytes(max(0, size - HEADER.size))
        self._send = send
        self._stopped = False
        self.task = asyncio.create_task(self._run())

    def stop(self) -> None:
        self._stopped = True

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        while not self._stopped:
            due = int((loop.time() - start) * self._rate) + 1
            # After a pause of ours what is due goes out spread out, not in one burst that overflows a queue.
            for _ in range(min(due - self.sent, 32)):
                packet = HEADER.pack(MAGIC, DATA, 0, self._flow, self.sent) + self._padding
                self.sent += 1
                try:
                    self._send(packet)
                except OSError:
                    self.refused += 1
            pause = 0.001 if due > self.sent else start + self.sent / self._rate - loop.time()
            await asyncio.sleep(max(pause, MIN_PAUSE))


def make_udp_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    # A receiver that gets no processor for a while must not look like a network that loses packets.
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock


def read_in_turns(sock: socket.socket, read: Callable[[], None]) -> None:
    """Calls `read` when something has arrived, and then not before MIN_PAUSE is over."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        loop.remove_reader(sock)
        read()
        loop.call_later(MIN_PAUSE, loop.add_reader, sock, readable)

    loop.add_reader(sock, readable)


@dataclass(slots=True)
class ServerFlow:
    counted: Counted
    sender: Sender | None
    peer: tuple[object, ...]
    last: float


class UdpServer:
    """Counts each flow's packets and sends its own back to where they come from."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._flows: dict[int, ServerFlow] = {}
        read_in_turns(sock, self._read)

    def _read(self) -> None:
        for _ in range(MAX_READ):
            try:
                packet, peer = self._socket.recvfrom(65535)
            except BlockingIOError:
                return
            except OSError:
                # An ICMP error for something we sent earlier.
                continue
            if len(packet) >= HEADER.size:
                magic, kind, _, flow, number = HEADER.unpack_from(packet)
                if magic == MAGIC:
                    self._take(kind, flow, number, packet, peer)

    def _take(self, kind: int, flow: int, number: int, packet: bytes, peer: tuple[object, ...]) -> None:
        now = time.monotonic()
        if kind == ASK:
            self._reply(ANSWER, flow, os.uname().nodename.encode(), peer)
            return
        state = self._flows.get(flow)
        if kind == OPEN and state is None:
            for old in [key for key, value in self._flows.items() if now - value.last > FORGET_SECONDS]:
                if sender := self._flows.pop(old).sender:
                    sender.stop()
            rate, size = RATE.unpack_from(packet, HEADER.size)
            state = self._flows[flow] = ServerFlow(Counted(), None, peer, now)
            if rate:
                state.sender = Sender(flow, rate, size, lambda data: self._send_to(flow, data))
        if state is None:
            return
        state.peer, state.last = peer, now
        if kind == DATA:
            state.counted.take(number, now)
        elif kind == END:
            if state.sender:
                state.sender.stop()
            result = {
                "forward": state.counted.summary(number),
                "sent": state.sender.sent if state.sender else 0,
                "refused": state.sender.refused if state.sender else 0,
            }
            self._reply(RESULT, flow, json.dumps(result).encode(), peer)

    def _send_to(self, flow: int, data: bytes) -> None:
        self._socket.sendto(data, self._flows[flow].peer)

    def _reply(self, kind: int, flow: int, payload: bytes, peer: tuple[object, ...]) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendto(HEADER.pack(MAGIC, kind, 0, flow, 0) + payload, peer)


async def serve_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """First line ECHO: sends everything back; ASK: says who this is."""
    with contextlib.suppress(OSError):
        request = await reader.readline()
        if request == b"ASK\n":
            writer.write(os.uname().nodename.encode() + b"\n")
        elif request == b"ECHO\n":
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        await writer.drain()
    writer.close()


async def serve(port: int) -> None:
    """Both families, UDP and TCP, until stopped."""
    servers = []
    for family, wildcard in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        # A machine may have one family only.
        with contextlib.suppress(OSError):
            sock = make_udp_socket(family)
            sock.bind((wildcard, port))
            servers.append(UdpServer(sock))
            await asyncio.start_server(serve_tcp, wildcard, port, family=family)
    if not servers:
        raise SystemExit(f"can't listen on port {port}")
    print(f"serving on port {port}", flush=True)
    await _stop_after(None).wait()


def _stop_after(seconds: float | None) -> asyncio.Event:
    """Is set by SIGTERM, SIGINT, or when the time is over."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if seconds is not None:
        loop.call_later(seconds, stop.set)
    return stop


async def udp(
    host: str,
    port: int,
    *,
    rate: int,
    size: int,
    stop: asyncio.Event,
    started: Callable[[], None] = lambda: None,
) -> dict[str, object]:
    """A flow in both directions; `lost` of each. `complete` is false where the server could not be asked at
    the end, so that `lost` is not known."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    sock = make_udp_socket(family)
    sock.connect(address)
    flow = random.getrandbits(63)
    backward = Counted()
    results: list[dict[str, object]] = []

    def read() -> None:
        for _ in range(MAX_READ):
            try:
                packet = sock.recv(65535)
            except BlockingIOError:
                return
            except OSError:
                continue
            magic, kind, _, its_flow, number = HEADER.unpack_from(packet)
            if (magic, its_flow) != (MAGIC, flow):
                continue
            if kind == DATA:
                backward.take(number, time.monotonic())
            elif kind == RESULT:
                results.append(json.loads(packet[HEADER.size :]))

    read_in_turns(sock, read)
    opened = time.monotonic()
    while not backward.received:
        if time.monotonic() - opened > OPEN_SECONDS:
            return {"kind": "udp", "target": host, "complete": False, "error": "no answer"}
        with contextlib.suppress(OSError):
            sock.send(HEADER.pack(MAGIC, OPEN, 0, flow, 0) + RATE.pack(rate, size))
        await asyncio.sleep(0.1)
    sender = Sender(flow, rate, size, lambda data: _send(sock, data))
    started()
    await stop.wait()
    sender.stop()
    await sender.task
    for _ in range(END_ATTEMPTS):
        # Asked again until nothing is missing or late packets have had their time.
        with contextlib.suppress(OSError):
            sock.send(HEADER.pack(MAGIC, END, 0, flow, sender.sent))
        await asyncio.sleep(END_INTERVAL)
        waited_for_late = len(results) * END_INTERVAL >= DRAIN_SECONDS
        if results and (waited_for_late or _all_there(results[-1], backward)):
            break
    if not results:
        error = "no answer at the end"
        return {"kind": "udp", "target": host, "complete": False, "error": error, "sent": sender.sent}
    sent_back = results[-1]["sent"]
    assert isinstance(sent_back, int)
    return {
        "kind": "udp",
        "target": host,
        "complete": True,
        "forward": results[-1]["forward"],
        "backward": backward.summary(sent_back),
        "refused": {"forward": sender.refused, "backward": results[-1]["refused"]},
    }


def _all_there(result: dict[str, object], backward: Counted) -> bool:
    forward = result["forward"]
    return isinstance(forward, dict) and forward["lost"] == 0 and backward.received == result["sent"]


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.send(data)
    except ConnectionRefusedError:
        # The answer to an earlier packet; this one has not been tried.
        sock.send(data)


PERIOD: Final = 65521
"""A prime: no segment, and no number of equal ones, can be missing or doubled unseen."""
BLOCK: Final = random.Random(1).randbytes(PERIOD) * 3


def pattern(offset: int, length: int) -> bytes:
    """The bytes of a stream from `offset` on, computed from the place alone; up to 2 * PERIOD at a time."""
    return BLOCK[offset % PERIOD :][:length]


async def tcp(
    host: str, port: int, *, rate: int, stop: asyncio.Event, started: Callable[[], None] = lambda: None
) -> dict[str, object]:
    """A stream of `rate` bytes per second that comes back; every byte is compared."""
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as refusal:
        return {
            "kind": "tcp",
            "target": host,
            "complete": False,
            "error": f"no connection: {refusal or 'timeout'}",
        }
    writer.write(b"ECHO\n")
    sent = returned = 0
    damaged_at: int | None = None
    longest_stall = 0.0
    error = ""

    async def send() -> None:
        nonlocal sent
        loop = asyncio.get_running_loop()
        start, chunk = loop.time(), max(1, min(16384, rate // 20))
        while not stop.is_set():
            if sent < (loop.time() - start) * rate:
                writer.write(pattern(sent, chunk))
                sent += chunk
                await writer.drain()
            else:
                await asyncio.sleep(0.05)
        writer.write_eof()

    async def receive() -> None:
        nonlocal returned, damaged_at, longest_stall
        last = time.monotonic()
        while data := await reader.read(PERIOD):
            if not returned:
                started()
            now = time.monotonic()
            longest_stall, last = max(longest_stall, now - last), now
            if damaged_at is None and data != pattern(returned, len(data)):
                damaged_at = returned
            returned += len(data)

    tasks = [asyncio.create_task(send()), asyncio.create_task(receive())]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not stop.is_set():
        # The other side ended the stream; sending on would only show that again.
        tasks[0].cancel()
    await asyncio.wait(tasks, timeout=OPEN_SECONDS)
    for task in tasks:
        if not task.done():
            task.cancel()
            error = error or "the stream did not end"
        elif task.cancelled():
            error = error or "the other side ended the stream"
        elif problem := task.exception():
            error = f"{type(problem).__name__}: {problem}"
    writer.close()
    return {
        "kind": "tcp",
        "target": host,
        "complete": not error and returned == sent,
        "sent": sent,
        "returned": returned,
        "damaged_at": damaged_at,
        "longest_stall_ms": round(longest_stall * 1000, 1),
        **({"error": error} if error else {}),
    }


async def flows(
    hosts: list[str], port: int, *, udp_rate: int, size: int, tcp_rate: int, stop: asyncio.Event
) -> dict[str, object]:
    """UDP and TCP to every host at once. Prints a line `started` when all of them run."""
    waiting = 2 * len(hosts)

    def started() -> None:
        nonlocal waiting
        waiting -= 1
        if not waiting:
            print("started", flush=True)

    async def watched(flow: Coroutine[None, None, dict[str, object]]) -> dict[str, object]:
        result = await flow
        if not result["complete"]:
            # Who waits for the rest should hear of it now.
            stop.set()
        return result

    results = await asyncio.gather(
        *(watched(udp(host, port, rate=udp_rate, size=size, stop=stop, started=started)) for host in hosts),
        *(watched(tcp(host, port, rate=tcp_rate, stop=stop, started=started)) for host in hosts),
    )
    return {"flows": results}


async def ask(host: str, port: int, *, use_udp: bool, count: int, seconds: float) -> dict[str, object]:
    """Who answers there, `count` times, each with a connection of its own."""
    answers = []
    try:
        for _ in range(count):
            async with asyncio.timeout(seconds):
                answers.append(await (_ask_udp(host, port) if use_udp else _ask_tcp(host, port)))
    except (OSError, TimeoutError) as error:
        problem = f"{type(error).__name__}: {error}"
        return {"target": host, "complete": False, "names": answers, "error": problem}
    return {"target": host, "complete": True, "names": answers}


async def _ask_tcp(host: str, port: int) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"ASK\n")
    name = await reader.readline()
    writer.close()
    return name.decode().strip()


async def _ask_udp(host: str, port: int) -> str:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    loop = asyncio.get_running_loop()
    with make_udp_socket(family) as sock:
        sock.connect(address)
        while True:
            await loop.sock_sendall(sock, HEADER.pack(MAGIC, ASK, 0, 0, 0))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    return (await loop.sock_recv(sock, 65535))[HEADER.size :].decode()


async def ping(host: str, *, count: int, interval: float, size: int) -> dict[str, object]:
    """ICMP echo; `size` bytes of payload, not fragmented on the way."""
    family, _, _, _, address = socket.getaddrinfo(host, None)[0]
    is_v4 = family == socket.AF_INET
    protocol = socket.IPPROTO_ICMP if is_v4 else socket.IPPROTO_ICMPV6
    request, reply = (8, 0) if is_v4 else (128, 129)
    identifier = random.getrandbits(16)
    loop = asyncio.get_running_loop()
    sent_at: dict[int, float] = {}
    times: dict[int, float] = {}
    refused = 0
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        sock.setblocking(False)
        if is_v4:
            # IP_MTU_DISCOVER = IP_PMTUDISC_DO
            sock.setsockopt(socket.IPPROTO_IP, 10, 2)
        sock.connect(address)

        def read() -> None:
            with contextlib.suppress(OSError):
                packet = sock.recv(65535)
                message = packet[(packet[0] & 15) * 4 :] if is_v4 else packet
                kind, _, _, its_identifier, number = struct.unpack(">BBHHH", message[:8])
                if (kind, its_identifier) == (reply, identifier) and number in sent_at:
                    times.setdefault(number, time.monotonic() - sent_at[number])

        loop.add_reader(sock, read)
        for number in range(count):
            body = struct.pack(">HH", identifier, number) + bytes(size)
            checksum = _checksum(struct.pack(">BBH", request, 0, 0) + body) if is_v4 else 0
            sent_at[number] = time.monotonic()
            try:
                sock.send(struct.pack(">BBH", request, 0, checksum) + body)
            except OSError:
                refused += 1
            await asyncio.sleep(interval)
        deadline = time.monotonic() + DRAIN_SECONDS
        while len(times) < count - refused and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        loop.remove_reader(sock)
    milliseconds = sorted(value * 1000 for value in times.values())
    return {
        "target": host,
        "complete": True,
        "sent": count,
        "received": len(times),
        "lost": count - len(times),
        "refused": refused,
        "median_ms": round(milliseconds[len(milliseconds) // 2], 3) if milliseconds else None,
    }


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def is_clean(result: dict[str, object]) -> bool:
    """Whether nothing was lost, damaged or unanswered."""
    if isinstance(results := result.get("flows"), list):
        return all(map(is_clean, results))
    directions = [result[name] for name in ("forward", "backward") if name in result]
    lost = [part["lost"] for part in directions if isinstance(part, dict)]
    lost.append(result.get("lost", 0))
    return bool(result["complete"]) and not any(lost) and result.get("damaged_at") is None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m meshwire.lab.traffic", description=__doc__)
    parser.add_argument("--port", type=int, default=PORT)
    commands = parser.add_subparsers(dest="command", required=True)
    packets = argparse.ArgumentParser(add_help=False)
    packets.add_argument("--udp-rate", type=int, default=200, help="packets per second, each direction")
    packets.add_argument("--size", type=int, default=200, help="bytes of a packet's payload")
    stream = argparse.ArgumentParser(add_help=False)
    stream.add_argument("--tcp-rate", type=int, default=200_000, help="bytes per second, each direction")
    until = argparse.ArgumentParser(add_help=False)
    until.add_argument("--seconds", type=float)

    commands.add_parser("serve")
    commands.add_parser("udp", parents=[packets, until]).add_argument("host")
    commands.add_parser("tcp", parents=[stream, until]).add_argument("host")
    commands.add_parser("flows", parents=[packets, stream, until]).add_argument("hosts", nargs="+")
    asking = commands.add_parser("ask")
    asking.add_argument("host")
    asking.add_argument("--udp", action="store_true", dest="use_udp")
    asking.add_argument("--count", type=int, default=1)
    asking.add_argument("--seconds", type=float, default=3.0, help="to wait for each answer")
    pinging = commands.add_parser("ping")
    pinging.add_argument("host")
    pinging.add_argument("--count", type=int, default=5)
    pinging.add_argument("--interval", type=float, default=0.2, help="seconds")
    pinging.add_argument("--size", type=int, default=56, help="bytes of payload")
    return parser.parse_args(arguments)


async def run(arguments: argparse.Namespace) -> dict[str, object] | None:
    a = arguments
    match a.command:
        case "serve":
            await serve(a.port)
            return None
        case "udp":
            return await udp(a.host, a.port, rate=a.udp_rate, size=a.size, stop=_stop_after(a.seconds))
        case "tcp":
            return await tcp(a.host, a.port, rate=a.tcp_rate, stop=_stop_after(a.seconds))
        case "flows":
            stop = _stop_after(a.seconds)
            return await flows(
                a.hosts, a.port, udp_rate=a.udp_rate, size=a.size, tcp_rate=a.tcp_rate, stop=stop
            )
        case "ask":
            return await ask(a.host, a.port, use_udp=a.use_udp, count=a.count, seconds=a.seconds)
        case _:
            return await ping(a.host, count=a.count, interval=a.interval, size=a.size)


def main() -> int:
    result = asyncio.run(run(parse_arguments()))
    if result is None:
        return 0
    print(json.dumps(result), flush=True)
    return 0 if is_clean(result) else 1


if __name__ == "__main__":
    sys.exit(main())
