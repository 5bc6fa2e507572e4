"""The prober that tells forbidden from reached, over loopback."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from meshwire.lab import reach
from meshwire.lab.reach import Prober, Target

ADDRESSES = ("127.0.0.1", "::1")
NAME = socket.gethostname()


@pytest.mark.parametrize(
    ("text", "protocol", "host", "port"),
    [
        ("tcp:10.1.1.5:80", "tcp", "10.1.1.5", 80),
        ("udp:[fd00::5]:81", "udp", "fd00::5", 81),
        ("sctp:10.1.1.5:82", "sctp", "10.1.1.5", 82),
        ("icmp:10.1.1.5", "icmp", "10.1.1.5", 0),
        ("icmp:fd00::5", "icmp", "fd00::5", 0),
    ],
)
def test_a_target_is_read_and_written(text: str, protocol: str, host: str, port: int) -> None:
    target = Target.parse(text)
    assert (target.protocol, target.host, target.port) == (protocol, host, port)
    assert target.family == (socket.AF_INET6 if ":" in host else socket.AF_INET)
    assert reach.format_target(protocol.upper(), host, port) == text


@pytest.mark.parametrize(
    "text", ["tcp:10.1.1.5", "tcp:host:80", "http:10.1.1.5:80", "udp:[fd00::5]:x", "icmp:"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Target.parse(text)


@pytest.fixture
async def ports() -> AsyncIterator[tuple[int, int]]:
    """Where TCP and where UDP is answered, on both families."""
    loop = asyncio.get_running_loop()
    try:
        tcp, udp = reach.listen("tcp", 0), reach.listen("udp", 0)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    loop.add_reader(tcp, reach.answer_connections, tcp, NAME.encode())
    loop.add_reader(udp, reach.answer_datagrams, udp, NAME.encode())
    yield tcp.getsockname()[1], udp.getsockname()[1]
    for sock in (tcp, udp):
        loop.remove_reader(sock)
        sock.close()


async def probe(*targets: str, **options: float) -> dict[str, dict[str, object]]:
    prober = Prober(timeout=options.get("timeout", 0.5), attempts=int(options.get("attempts", 2)))
    return await prober.probe(map(Target.parse, targets))


async def test_who_answers_says_its_name_in_both_families(ports: tuple[int, int]) -> None:
    targets = [
        reach.format_target(protocol, address, port)
        for address in ADDRESSES
        for protocol, port in zip(("tcp", "udp"), ports, strict=True)
    ]
    found = await probe(*targets)
    assert found == {target: {"reached": True, "by": NAME, "error": ""} for target in targets}


async def test_a_datagram_is_answered_from_the_address_it_was_sent_to(ports: tuple[int, int]) -> None:
    [result] = (await probe(f"udp:127.0.0.9:{ports[1]}")).values()
    assert result["reached"]


async def test_a_closed_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = await probe(f"tcp:127.0.0.1:{port}", f"udp:127.0.0.1:{port}")
    assert [result["error"] for result in found.values()] == ["refused", "refused"]
    assert not any(result["reached"] for result in found.values())


async def test_silence_is_a_timeout_for_each_attempt() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        began = asyncio.get_running_loop().time()
        [result] = (await probe(f"udp:127.0.0.1:{port}", timeout=0.05, attempts=3)).values()
        assert (result["reached"], result["error"]) == (False, "timeout")
        assert 0.14 < asyncio.get_running_loop().time() - began < 2
        silent.setblocking(False)
        assert [silent.recv(100) for _ in range(3)] == [b"who"] * 3


async def test_a_lost_datagram_is_no_drop() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lossy:
        lossy.bind(("127.0.0.1", 0))
        lossy.setblocking(False)
        asked: list[bytes] = []

        def answer() -> None:
            data, peer = lossy.recvfrom(100)
            asked.append(data)
            if len(asked) == 2:
                lossy.sendto(b"late", peer)

        asyncio.get_running_loop().add_reader(lossy, answer)
        [result] = (await probe(f"udp:127.0.0.1:{lossy.getsockname()[1]}", timeout=0.1)).values()
        asyncio.get_running_loop().remove_reader(lossy)
    assert result == {"reached": True, "by": "late", "error": ""}


async def test_a_connection_without_a_name_is_not_reached() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    [result] = (await probe(f"tcp:127.0.0.1:{port}")).values()
    server.close()
    assert (result["reached"], result["error"]) == (False, "no answer")


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")
async def test_echoes_are_told_apart() -> None:
    # The whole of 127.0.0.0/8 answers; nobody has the last one.
    targets = ("icmp:127.0.0.1", "icmp:127.0.0.2", "icmp:::1")
    found = await probe(*targets)
    assert [found[target]["by"] for target in targets] == ["127.0.0.1", "127.0.0.2", "::1"]


async def test_the_source_can_be_chosen(ports: tuple[int, int]) -> None:
    prober = Prober(timeout=0.5, attempts=1, sources=("127.0.0.7", "::1"))
    targets = [f"tcp:127.0.0.1:{ports[0]}", f"udp:127.0.0.1:{ports[1]}", f"tcp:[::1]:{ports[0]}"]
    assert all(result["reached"] for result in (await prober.probe(map(Target.parse, targets))).values())


def test_the_command_line() -> None:
    serving = reach.parse_arguments(["serve", "--tcp=80,81", "--udp", "81"])
    assert (serving.tcp, serving.udp, serving.sctp) == ((80, 81), (81,), ())
    probing = reach.parse_arguments(["probe", "--timeout=0.2", "tcp:10.0.0.1:80", "icmp:10.0.0.1"])
    assert (probing.timeout, probing.attempts, len(probing.targets)) == (0.2, 2, 2)


def test_it_serves_and_probes_as_a_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "meshwire.lab.reach"]
    serving = subprocess.Popen([*command, "serve", f"--tcp={port}"], stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout and serving.stdout.readline() == "ready\n"
        done = subprocess.run(
            [*command, "probe", f"tcp:127.0.0.1:{port}"], capture_output=True, text=True, check=True
        )
        assert f'"by": "{NAME}"' in done.stdout
    finally:
        serving.kill()
        serving.communicate()
