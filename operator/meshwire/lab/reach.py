"""Who reaches whom, as a command for pods; needs the standard library alone.

`serve` answers every TCP or SCTP connection and every UDP datagram with its host name, on all addresses of
both families. `probe` asks any number of targets at once (tcp:10.1.1.5:80, udp:[fd00::5]:81, icmp:10.1.1.5)
and prints one JSON object: {target: {"reached": ..., "by": host name, "error": ...}}. What a policy drops
gives no answer: `timeout`; any other error says that the packet went somewhere. `watch` asks again and
again, and prints one such answer, with `target` and `time`, whenever it is another one than before."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

TIMEOUT: Final = 0.5
"""Seconds an attempt waits for the answer."""
ATTEMPTS: Final = 2
"""A lost packet is told from a dropped one by asking again."""
BACKLOG: Final = 512

SCTP: Final = 132
STREAMS: Final = {"tcp": socket.IPPROTO_TCP, "sctp": SCTP}
# linux/in6.h: Python knows them on some platforms only.
IPV6_RECVPKTINFO: Final = 49
IPV6_PKTINFO: Final = 50
PKTINFO: Final = struct.Struct("=16si")
"""struct in6_pktinfo: address (an IPv4 one is mapped), interface."""
ICMP_FAMILIES: Final = {
    socket.AF_INET: (socket.IPPROTO_ICMP, 8, 0),
    socket.AF_INET6: (socket.IPPROTO_ICMPV6, 128, 129),
}
"""Protocol, and the types of echo request and reply."""
ERRORS: Final = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
}


class NoAnswer(Exception):
    """The connection was made and ended without a name."""


@dataclass(frozen=True, slots=True)
class Target:
    """`port` is 0 for ICMP."""

    text: str
    protocol: str
    host: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises ValueError for anything but PROTOCOL:ADDRESS[:PORT]."""
        protocol, _, rest = text.partition(":")
        if protocol == "icmp":
            target = cls(text, protocol, rest.strip("[]"), 0)
        elif protocol in (*STREAMS, "udp"):
            host, _, port = rest.rpartition(":")
            target = cls(text, protocol, host.strip("[]"), int(port))
        else:
            raise ValueError(f"{text!r}: want tcp:, udp:, sctp: or icmp: and an address")
        try:
            socket.inet_pton(target.family, target.host)
        except OSError:
            raise ValueError(f"{text!r}: {target.host!r} is no address") from None
        return target


def format_target(protocol: str, address: str, port: int = 0) -> str:
    """As `probe` takes it; `protocol` in any case."""
    protocol = protocol.lower()
    if protocol == "icmp":
        return f"icmp:{address}"
    return f"{protocol}:[{address}]:{port}" if ":" in address else f"{protocol}:{address}:{port}"


# Serving


def listen(protocol: str, port: int) -> socket.socket:
    """On all addresses of both families. Raises OSError, also where the kernel has no such protocol."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_INET6, kind, STREAMS.get(protocol, socket.IPPROTO_UDP))
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if protocol == "udp":
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::", port))
        if protocol != "udp":
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def answer_connections(listener: socket.socket, name: bytes) -> None:
    """Called when somebody may be waiting."""
    # Whoever gave up meanwhile is no error.
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.send(name)


def answer_datagrams(sock: socket.socket, name: bytes) -> None:
    """The same for UDP. The answer comes from the address that was asked, whichever others there are."""
    with contextlib.suppress(BlockingIOError):
        while True:
            _, ancillary, _, peer = sock.recvmsg(2048, socket.CMSG_SPACE(PKTINFO.size))
            own = [
                (level, kind, PKTINFO.pack(PKTINFO.unpack(data)[0], 0))
                for level, kind, data in ancillary
                if (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO)
            ]
            with contextlib.suppress(OSError):
                sock.sendmsg([name], own, 0, peer)


async def serve(ports: Iterable[tuple[str, int]]) -> None:
    """For ever. Prints `ready` when all (protocol, port) are open. Raises OSError."""
    name = socket.gethostname().encode()
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as sockets:
        for protocol, port in ports:
            sock = sockets.enter_context(listen(protocol, port))
            answer = answer_datagrams if protocol == "udp" else answer_connections
            loop.add_reader(sock, answer, sock, name)
        print("ready", flush=True)
        await asyncio.Event().wait()


# Probing


async def ready(sock: socket.socket, *, to_write: bool) -> None:
    """Waits until the socket can be read, or written."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if to_write else (loop.add_reader, loop.remove_reader)
    )
    add(sock, done.set)
    try:
        await done.wait()
    finally:
        remove(sock)


async def ask_stream(target: Target, source: str) -> str:
    with socket.socket(target.family, socket.SOCK_STREAM, STREAMS[target.protocol]) as sock:
        sock.setblocking(False)
        if source:
            sock.bind((source, 0))
        with contextlib.suppress(BlockingIOError):
            sock.connect((target.host, target.port))
        await ready(sock, to_write=True)
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        await ready(sock, to_write=False)
        if name := sock.recv(1024).decode():
            return name
        raise NoAnswer


async def ask_datagram(target: Target, sock: socket.socket) -> str:
    sock.send(b"who")
    await ready(sock, to_write=False)
    return sock.recv(2048).decode()


class Pinger:
    """One raw socket for all targets of a family; `ask` gives the echo a number that finds its way back."""

    def __init__(self, family: socket.AddressFamily, source: str) -> None:
        protocol, self._request, self._reply = ICMP_FAMILIES[family]
        self._header = 0 if family == socket.AF_INET6 else 20
        self._identifier = os.getpid() & 0xFFFF
        self._waiting: dict[tuple[str, int], asyncio.Future[None]] = {}
        self._sequence = 0
        self._socket = socket.socket(family, socket.SOCK_RAW, protocol)
        self._socket.setblocking(False)
        if source:
            self._socket.bind((source, 0))
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    async def ask(self, target: Target) -> str:
        self._sequence += 1
        key = target.host, self._sequence & 0xFFFF
        answered = asyncio.get_running_loop().create_future()
        self._waiting[key] = answered
        body = struct.pack(">BBHHH", self._request, 0, 0, self._identifier, key[1])
        if self._header:
            body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
        try:
            self._socket.sendto(body, (target.host, 0))
            await answered
        finally:
            del self._waiting[key]
        return target.host

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                packet, peer = self._socket.recvfrom(2048)
                message = packet[self._header and (packet[0] & 15) * 4 :]
                if len(message) < 8:
                    continue
                kind, _, _, identifier, sequence = struct.unpack(">BBHHH", message[:8])
                answered = self._waiting.get((peer[0], sequence))
                if (kind, identifier) == (self._reply, self._identifier) and answered:
                    if not answered.done():
                        answered.set_result(None)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Prober:
    """Asks targets, each for itself. `sources`: own addresses to ask from, at most one of each family."""

    def __init__(self, *, timeout: float, attempts: int, sources: Sequence[str] = ()) -> None:
        self._timeout = timeout
        self._attempts = attempts
        self._sources = {socket.AF_INET6 if ":" in source else socket.AF_INET: source for source in sources}
        self._pingers: dict[socket.AddressFamily, Pinger] = {}

    async def probe(self, targets: Iterable[Target]) -> dict[str, dict[str, object]]:
        targets = tuple(targets)
        try:
            found = await asyncio.gather(*(self._probe_one(target) for target in targets))
        finally:
            for pinger in self._pingers.values():
                pinger.close()
            self._pingers.clear()
        return {target.text: result for target, result in zip(targets, found, strict=True)}

    async def _probe_one(self, target: Target) -> dict[str, object]:
        error = "timeout"
        with contextlib.ExitStack() as sockets:
            datagrams = None
            for _ in range(self._attempts):
                try:
                    if target.protocol == "udp" and datagrams is None:
                        # One for all attempts: a late answer to the first is an answer.
                        datagrams = sockets.enter_context(self._connected(target))
                    async with asyncio.timeout(self._timeout):
                        name = await self._ask(target, datagrams)
                    return {"reached": True, "by": name, "error": ""}
                except TimeoutError:
                    error = "timeout"
                except NoAnswer:
                    error = "no answer"
                except OSError as problem:
                    error = ERRORS.get(problem.errno or 0) or errno.errorcode.get(
                        problem.errno or 0, "error"
                    )
        return {"reached": False, "by": "", "error": error}

    async def _ask(self, target: Target, datagrams: socket.socket | None) -> str:
        if datagrams is not None:
            return await ask_datagram(target, datagrams)
        if target.protocol == "icmp":
            return await self._pinger(target.family).ask(target)
        return await ask_stream(target, self._sources.get(target.family, ""))

    async def watch(self, target: Target, pause: float) -> None:
        """For ever, with `pause` seconds between an answer and the next question. `time` is when the
        question was asked, in seconds since 1970."""
        before: dict[str, object] = {}
        while True:
            began = time.time()
            answer = await self._probe_one(target)
            if answer != before:
                print(json.dumps({"target": target.text, "time": began, **answer}), flush=True)
                before = answer
            await asyncio.sleep(pause)

    def _connected(self, target: Target) -> socket.socket:
        sock = socket.socket(target.family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            if source := self._sources.get(target.family):
                sock.bind((source, 0))
            sock.connect((target.host, target.port))
        except OSError:
            sock.close()
            raise
        return sock

    def _pinger(self, family: socket.AddressFamily) -> Pinger:
        if family not in self._pingers:
            self._pingers[family] = Pinger(family, self._sources.get(family, ""))
        return self._pingers[family]


def parse_ports(text: str) -> tuple[int, ...]:
    """Numbers with commas between."""
    return tuple(int(part) for part in text.split(",") if part)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m meshwire.lab.reach", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve")
    for protocol in (*STREAMS, "udp"):
        serving.add_argument(f"--{protocol}", type=parse_ports, default=(), metavar="PORT,...")
    for command in ("probe", "watch"):
        probing = commands.add_parser(command)
        probing.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each attempt")
        probing.add_argument("--attempts", type=int, default=ATTEMPTS)
        probing.add_argument("--source", action="append", default=[], help="own address; one of each family")
        probing.add_argument("targets", type=Target.parse, nargs="+", metavar="TARGET")
    probing.add_argument("--pause", type=float, default=0.05, help="seconds between answer and question")
    return parser.parse_args(arguments)


async def watch_all(prober: Prober, targets: Iterable[Target], pause: float) -> None:
    """For ever."""
    async with asyncio.TaskGroup() as tasks:
        for target in targets:
            tasks.create_task(prober.watch(target, pause))


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "serve":
        ports = [(name, port) for name in (*STREAMS, "udp") for port in getattr(arguments, name)]
        asyncio.run(serve(ports))
        return 0
    prober = Prober(timeout=arguments.timeout, attempts=arguments.attempts, sources=arguments.source)
    if arguments.command == "watch":
        asyncio.run(watch_all(prober, arguments.targets, arguments.pause))
    print(json.dumps(asyncio.run(prober.probe(arguments.targets))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
