from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from meshwire.lab import traffic
from meshwire.lab.traffic import Counted


def test_losses_duplicates_and_disorder_are_told_apart() -> None:
    counted = Counted()
    for sequence, when in [(0, 0.0), (1, 0.1), (3, 0.2), (2, 0.7), (2, 0.7), (5, 0.8)]:
        counted.take(sequence, when)
    summary = counted.summary(7)
    assert (summary["sent"], summary["received"], summary["lost"]) == (7, 5, 2)
    assert (summary["duplicates"], summary["reordered"], summary["missing"]) == (1, 1, [4, 6])
    assert summary["longest_gap_ms"] == 500.0


def test_a_stream_is_the_same_however_it_is_cut() -> None:
    period = traffic.PERIOD
    whole = traffic.pattern(0, period) + traffic.pattern(period, period)
    for offset, length in [(0, 1), (7, 100), (period - 3, 10), (period, 5), (12345, 2 * period - 12345)]:
        assert traffic.pattern(offset, length) == whole[offset : offset + length]


def test_a_shifted_stream_is_another_one() -> None:
    block = traffic.pattern(1000, 64)
    assert all(traffic.pattern(1000 + shift, 64) != block for shift in (1, 32, 1448, 65536, 100000))


@pytest.mark.parametrize(
    ("result", "clean"),
    [
        ({"complete": True, "forward": {"lost": 0}, "backward": {"lost": 0}}, True),
        ({"complete": True, "forward": {"lost": 0}, "backward": {"lost": 1}}, False),
        ({"complete": True, "forward": {"lost": 1}, "backward": {"lost": 0}}, False),
        ({"complete": False, "error": "no answer"}, False),
        ({"complete": True, "damaged_at": None}, True),
        ({"complete": True, "damaged_at": 0}, False),
        ({"complete": True, "lost": 2}, False),
        ({"flows": [{"complete": True}, {"complete": True, "lost": 0}]}, True),
        ({"flows": [{"complete": True}, {"complete": True, "lost": 1}]}, False),
    ],
)
def test_a_result_is_clean_or_not(result: dict[str, object], clean: bool) -> None:
    assert traffic.is_clean(result) is clean


def test_the_checksum_makes_the_whole_sum_up_to_zero() -> None:
    for data in (
        b"\x08\x00\x00\x00\x12\x34\x00\x01" + bytes(56),
        b"\x08\x00\x00\x00\xff\xff\xff",
        b"\xff" * 64,
    ):
        padded = data + b"\0" * (len(data) % 2)
        total = sum(struct.unpack(f">{len(padded) // 2}H", padded)) + traffic._checksum(data)
        assert total % 0xFFFF == 0


@pytest.fixture(params=["127.0.0.1", "::1"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[tuple[str, int]]:
    host = str(request.param)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        udp = traffic.make_udp_socket(family)
        udp.bind((host, 0))
    except OSError:
        pytest.skip(f"no {host} on this machine")
    port = udp.getsockname()[1]
    traffic.UdpServer(udp)
    tcp = await asyncio.start_server(traffic.serve_tcp, host, port, family=family)
    yield host, port
    asyncio.get_running_loop().remove_reader(udp)
    udp.close()
    tcp.close()


def stop_after(seconds: float) -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    return stop


async def test_udp_both_ways_over_loopback(server: tuple[str, int]) -> None:
    started: list[bool] = []
    host, port = server
    result = await traffic.udp(
        host, port, rate=200, size=100, stop=stop_after(0.3), started=lambda: started.append(True)
    )
    assert traffic.is_clean(result) and started == [True]
    forward, backward = result["forward"], result["backward"]
    assert isinstance(forward, dict) and forward["received"] >= 10
    assert isinstance(backward, dict) and backward["received"] >= 10


async def test_tcp_there_and_back_over_loopback(server: tuple[str, int]) -> None:
    host, port = server
    result = await traffic.tcp(host, port, rate=1_000_000, stop=stop_after(0.3))
    assert traffic.is_clean(result)
    assert result["sent"] == result["returned"] != 0


async def test_a_flow_nobody_answers_is_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "OPEN_SECONDS", 0.2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        for result in (
            await traffic.udp("127.0.0.1", port, rate=10, size=50, stop=asyncio.Event()),
            await traffic.tcp("127.0.0.1", port, rate=10, stop=asyncio.Event()),
            await traffic.ask("127.0.0.1", port, use_udp=True, count=1, seconds=0.2),
            await traffic.ask("127.0.0.1", port, use_udp=False, count=1, seconds=0.2),
        ):
            assert not result["complete"] and result["error"]
            assert not traffic.is_clean(result)


async def test_a_damaged_stream_is_seen() -> None:
    async def damage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        while data := await reader.read(65536):
            writer.write(data[:100] + b"?" + data[101:])
        writer.close()

    server = await asyncio.start_server(damage, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    result = await traffic.tcp("127.0.0.1", port, rate=100_000, stop=stop_after(0.2))
    assert result["damaged_at"] is not None and not traffic.is_clean(result)
    server.close()


async def test_a_stream_the_other_side_ends_is_incomplete() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    result = await traffic.tcp("127.0.0.1", port, rate=100_000, stop=stop_after(5))
    assert not result["complete"] and result["error"]
    server.close()


async def test_who_answers_is_asked_over_both(server: tuple[str, int]) -> None:
    host, port = server
    name = socket.gethostname()
    for use_udp in (False, True):
        result = await traffic.ask(host, port, use_udp=use_udp, count=2, seconds=2)
        assert result["names"] == [name, name]


def test_the_command_line() -> None:
    arguments = traffic.parse_arguments(["flows", "--udp-rate=7", "a", "b"])
    assert (arguments.command, arguments.hosts, arguments.udp_rate, arguments.port) == (
        "flows",
        ["a", "b"],
        7,
        5201,
    )
    assert traffic.parse_arguments(["--port=9", "ask", "--udp", "h"]).use_udp
