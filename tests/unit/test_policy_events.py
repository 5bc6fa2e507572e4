"""What the datapath's events become on their way to a person."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from meshwire.agent.policy import events as events_module
from meshwire.agent.policy.events import SOCKET, Hub, describe_event
from meshwire.agent.policy.model import Model, Surroundings
from meshwire.agent.policy.objects import Namespace, Pod
from meshwire.api.meshpolicy import (
    Direction,
    Kind,
    Operator,
    Policy,
    PolicyMode,
    Requirement,
    Rule,
    Selector,
)
from meshwire.bpf.layouts import Direction as Side
from meshwire.bpf.layouts import Reason
from meshwire.bpf.policymaps import Event
from meshwire.policy import identity

WEB = Selector((Requirement("app", Operator.IN, ("web",)),))


def policy(name: str, mode: PolicyMode, *, deny: bool = False) -> Policy:
    rules = (Rule(direction=Direction.INGRESS, path="spec.ingressDeny[0]", deny=True),) if deny else ()
    return Policy(
        kind=Kind.MESH_POLICY,
        namespace="shop",
        name=name,
        uid=name,
        mode=mode,
        selector=WEB,
        default_deny=frozenset() if deny else frozenset({Direction.INGRESS}),
        rules=rules,
    )


@pytest.fixture
def model() -> Model:
    model = Model()
    model.set_surroundings(Surroundings(own=(ip_network("10.1.1.0/24"),)))
    model.put_namespace(Namespace(uid="n", name="shop", labels={}))
    web = Pod(
        uid="web",
        namespace="shop",
        name="web-1",
        labels=(("app", "web"),),
        addresses=(ip_address("10.1.1.5").packed,),
    )
    model.put_pod(web)
    model.set_device("web", 7)
    return model


def event(model: Model, reason: Reason = Reason.DROP_POLICY_INGRESS, rule: int = 0) -> Event:
    return Event(
        time_ns=1_000_000,
        src=ip_address("203.0.113.9"),
        dst=ip_address("10.1.1.5"),
        src_identity=identity.WORLD,
        dst_identity=model.identities.desired[ip_address("10.1.1.5").packed],
        rule=rule,
        ifindex=7,
        length=60,
        sport=40000,
        dport=80,
        protocol=6,
        direction=Side.INGRESS,
        reason=reason,
    )


def test_a_drop_for_want_of_a_rule_names_who_isolates(model: Model) -> None:
    for each in (policy("a", PolicyMode.ENFORCE), policy("b", PolicyMode.AUDIT)):
        model.put_policy(each)
    model.update()
    told = describe_event(event(model), model, "node1", 10**18)
    assert told["time"] == "2001-09-09T01:46:40.001000Z"
    assert (told["node"], told["verdict"], told["reason"]) == ("node1", "DROP", "DROP_POLICY_INGRESS")
    assert (told["direction"], told["protocol"], told["policy"]) == ("ingress", "TCP", None)
    assert told["isolatedBy"] == ["MeshPolicy shop/a"]
    assert told["source"] == {
        "address": "203.0.113.9",
        "port": 40000,
        "identity": identity.WORLD,
        "name": "world",
        "pod": "",
        "labels": {},
    }
    assert (told["destination"]["pod"], told["destination"]["labels"]["app"]) == ("shop/web-1", "web")
    audited = describe_event(event(model, Reason.POLICY_WOULD_DENY), model, "node1", 0)
    assert (audited["verdict"], audited["isolatedBy"]) == ("AUDIT", ["MeshPolicy shop/b"])


def test_a_drop_by_a_rule_names_it(model: Model) -> None:
    model.put_policy(policy("a", PolicyMode.ENFORCE, deny=True))
    model.update()
    ((_, rule),) = set(model.entries.desired.values())
    told = describe_event(event(model, rule=rule), model, "node1", 0)
    assert told["policy"] == {
        "kind": "MeshPolicy",
        "namespace": "shop",
        "name": "a",
        "path": "spec.ingressDeny[0]",
    }
    assert told["isolatedBy"] == []


def test_a_rule_that_is_gone_by_now_is_no_reason_to_fail(model: Model) -> None:
    told = describe_event(event(model, rule=4711), model, "node1", 0)
    assert told["policy"] is None and told["isolatedBy"] == []


class Buffer:
    """A ring buffer that the test fills."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.waiting: list[Event] = []

    def put(self, *found: Event) -> None:
        self.waiting += found
        os.write(self.write_end, b"x")

    def fileno(self) -> int:
        return self.read_end

    def read(self) -> list[Event]:
        os.read(self.read_end, 100)
        found, self.waiting = self.waiting, []
        return found

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


async def connected(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for _ in range(500):
        try:
            return await asyncio.open_unix_connection(path)
        except FileNotFoundError:
            await asyncio.sleep(0.01)
    raise AssertionError("nobody listens")


async def test_whoever_listens_gets_every_event_from_then_on(model: Model, tmp_path: Path) -> None:
    model.put_policy(policy("b", PolicyMode.AUDIT))
    model.update()
    hub, buffer = Hub("node1", tmp_path, lambda: model), Buffer()
    hub.open(buffer)  # type: ignore[arg-type]
    serving = asyncio.create_task(hub.serve())
    one, other = [await connected(tmp_path / SOCKET) for _ in range(2)]
    assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600
    while len(hub._listeners) < 2:
        await asyncio.sleep(0.01)
    buffer.put(event(model), event(model, Reason.POLICY_WOULD_DENY))
    for reader, _ in (one, other):
        assert [json.loads(await reader.readline())["verdict"] for _ in range(2)] == ["DROP", "AUDIT"]
    assert hub.would_deny == {"b": 1}
    other[1].close()
    while len(hub._listeners) > 1:
        await asyncio.sleep(0.01)
    buffer.put(event(model))
    assert json.loads(await one[0].readline())["verdict"] == "DROP"
    one[1].close()
    hub.open(None)
    assert not hub.is_open
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_a_listener_that_is_too_slow_is_told_what_it_missed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "BACKLOG", 2)
    hub, buffer = Hub("node1", tmp_path, lambda: model), Buffer()
    hub.open(buffer)  # type: ignore[arg-type]
    serving = asyncio.create_task(hub.serve())
    reader, writer = await connected(tmp_path / SOCKET)
    while not hub._listeners:
        await asyncio.sleep(0.01)
    # All at once: the listener's turn comes after the last of them.
    buffer.put(*(event(model) for _ in range(7)))
    told = [json.loads(await reader.readline()) for _ in range(3)]
    assert [line.get("missed") for line in told] == [5, None, None]
    writer.close()
    hub.open(None)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_the_printer_ends_with_whoever_asked(tmp_path: Path) -> None:
    async def serve(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"verdict": "DROP"}\n')
        await writer.drain()

    async with await asyncio.start_unix_server(serve, tmp_path / SOCKET):
        printer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "meshwire.agent", "events"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "MESHWIRE_RUN_DIR": str(tmp_path)},
        )
        assert printer.stdin and printer.stdout
        assert json.loads(await printer.stdout.readline()) == {"verdict": "DROP"}
        printer.stdin.close()
        assert await printer.wait() == 0


async def test_the_printer_says_that_nobody_tells_anything(tmp_path: Path) -> None:
    printer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "meshwire.agent", "events"),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "MESHWIRE_RUN_DIR": str(tmp_path)},
    )
    _, errors = await printer.communicate()
    assert printer.returncode == 1 and b"not running" in errors
