"""The loop between a kernel and an API server that do as they are told, or don't."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from meshwire.agent import loop
from meshwire.agent.kernel import Metrics, Part
from meshwire.agent.loop import Agent
from meshwire.agent.pairs import News
from meshwire.agent.settings import Settings
from meshwire.agent.watch import World
from meshwire.api import preshared
from meshwire.api.meshconfig import BootGuard, Encryption, MeshConfig, NetworkSettings, Userspace
from meshwire.api.meshnode import Key, MeshNode, Phase, Spec, Status, Unreachable
from meshwire.bpf import loader
from meshwire.bpf.layouts import Direction, Reason
from meshwire.bpf.maps import Counter
from meshwire.encryption import keys
from meshwire.encryption import plan as plans
from meshwire.encryption.health import Pace, Reading
from meshwire.encryption.model import ClusterNode, Link, Member, Observed, SecretKey
from meshwire.operator.keys import issue, seal_epoch_secret

SEALING = SecretKey(bytes(range(32)))


@dataclass
class StubKernel:
    """Remembers what it was told; only pins come and go."""

    observed: Observed = field(
        default_factory=lambda: Observed(links={"eth0": Link(index=2, name="eth0", up=True)})
    )
    applied: list[plans.Action] = field(default_factory=list)
    looks: list[Part] = field(default_factory=list)
    fail: dict[type, Exception] = field(default_factory=dict)
    unreadable: Exception | None = None
    counters: Metrics = field(default_factory=dict)

    def observe(self, mode: Userspace, fresh: Part, pods: object = ()) -> Observed:
        self.looks.append(fresh)
        if self.unreadable:
            raise self.unreadable
        return self.observed

    def apply(self, action: plans.Action) -> None:
        self.applied.append(action)
        if error := self.fail.get(type(action)):
            raise error
        if isinstance(action, plans.UnloadDatapath):
            self.observed = replace(self.observed, pinned=False)

    def metrics(self) -> Metrics:
        return self.counters

    def read_peers(self) -> dict[tuple[str, str], Reading]:
        return {}

    def ask(self, device: str, packet: bytes) -> None:
        raise AssertionError("there is no peer to ask")

    def close(self) -> None:
        pass


@dataclass
class StubClient:
    patches: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    secrets: dict[str, Any] = field(default_factory=dict)
    reads: int = 0
    down: bool = False

    async def find(self, path: str) -> dict[str, Any] | None:
        self.reads += 1
        if self.down:
            raise aiohttp.ClientConnectionError("refused")
        return self.secrets.get(path)

    async def patch(self, path: str, body: dict[str, Any]) -> None:
        if self.down:
            raise aiohttp.ClientConnectionError("refused")
        assert path == "/apis/meshwire.dev/v1alpha1/meshnodes/a/status"
        self.patches.append(body["status"])

    async def create(self, path: str, body: dict[str, Any]) -> None:
        self.events.append(body)

    @property
    def condition(self) -> dict[str, Any]:
        [condition] = self.patches[-1]["conditions"]
        return dict(condition)


@dataclass
class Bench:
    """An agent that runs, with everything around it in the test's hands."""

    agent: Agent
    kernel: StubKernel
    client: StubClient
    settings: Settings
    world: World = field(default_factory=World)

    def say(self, **changes: Any) -> None:
        self.world = replace(self.world, **changes)
        world = self.world
        self.agent.follow(lambda: world)

    async def until(self, done: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.005)

    async def settle(self) -> None:
        """Until a further event has been through the loop."""
        runs, looks = self.agent.health.runs, len(self.kernel.looks)
        self.agent.wake()
        await self.until(lambda: self.agent.health.runs > runs and len(self.kernel.looks) > looks)


def own(phase: Phase = Phase.OFF, **spec: Any) -> Member:
    fields: dict[str, Any] = {
        "addresses": (ip_address("198.18.0.1"),),
        "pod_cidrs": (ip_network("10.244.1.0/24"),),
        "epoch": 1,
        **spec,
    }
    return Member(name="a", uid="1", generation=4, spec=Spec(id=1, phase=phase, **fields))


@asynccontextmanager
async def running(directory: Path, kernel: StubKernel | None = None) -> AsyncIterator[Bench]:
    settings = Settings(
        node="a",
        namespace="ns",
        state_directory=directory,
        pin_directory=directory / "pins",
        run_directory=directory,
        proc_sys=directory,
        metrics_address=("127.0.0.1", 0),
        systemd_directory=directory / "systemd",
        host_usr=directory / "usr",
    )
    kernel, client = kernel or StubKernel(), StubClient()
    agent = Agent(settings, kernel, client, SEALING)  # type: ignore[arg-type]
    task = asyncio.create_task(agent.run("1.2.3"))
    try:
        yield Bench(agent, kernel, client, settings)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        agent.close()


async def test_nothing_is_touched_before_the_api_server_has_answered(tmp_path: Path) -> None:
    kernel = StubKernel(replace(StubKernel().observed, pinned=True))
    async with running(tmp_path, kernel) as bench:
        for _ in range(3):
            bench.agent.wake()
            await asyncio.sleep(0.05)
        assert kernel.looks == []
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        assert list(map(str, kernel.applied)) == ["unpin maps"]


async def test_nothing_is_touched_without_an_order(tmp_path: Path) -> None:
    kernel = StubKernel(replace(StubKernel().observed, pinned=True))
    async with running(tmp_path, kernel) as bench:
        bench.say(nodes={"a": ClusterNode(name="a", ready=True)})
        await bench.until(lambda: kernel.looks)
        await bench.settle()
        assert kernel.applied == []
        assert bench.client.patches == []


async def test_the_sealing_key_is_published_with_the_first_status(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        status = bench.client.patches[0]
        assert status["sealingKey"] == keys.public_key(SEALING)
        assert (status["observedGeneration"], status["agentVersion"]) == (4, "1.2.3")
        assert bench.client.condition["reason"] == "Off"


async def test_an_equal_node_is_not_written_to_and_an_equal_status_not_sent(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        bench.say(
            status=MeshNode.from_object(
                {"metadata": {"name": "a"}, "status": bench.client.patches[0]}
            ).status
        )
        for _ in range(3):
            await bench.settle()
        assert bench.kernel.applied == []
        assert len(bench.client.patches) == 1


async def test_an_api_event_that_changes_nothing_does_not_look_at_the_kernel(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        bench.say(
            status=MeshNode.from_object(
                {"metadata": {"name": "a"}, "status": bench.client.patches[0]}
            ).status
        )
        await bench.settle()
        looks = len(bench.kernel.looks)
        for _ in range(3):
            bench.say()
            await asyncio.sleep(0.05)
        assert len(bench.kernel.looks) == looks


async def test_a_kernel_event_reads_the_network_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        await bench.settle()
        assert bench.kernel.looks[0] is Part.ALL
        assert bench.kernel.looks[-1] is Part.NETWORK


async def test_a_status_that_somebody_changed_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "COUNTERS_EVERY", 0.05)
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        bench.say(status=Status())
        await bench.until(lambda: len(bench.client.patches) == 2)
        assert bench.client.patches[0] == bench.client.patches[1]


async def test_a_new_meshnode_of_the_same_name_is_told_everything(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        bench.say(members={"a": replace(own(), uid="2", generation=1)}, status=None)
        await bench.until(lambda: len(bench.client.patches) == 2)
        assert bench.client.patches[1]["sealingKey"] == keys.public_key(SEALING)
        assert bench.client.patches[1]["observedGeneration"] == 1


async def test_counters_wait_and_changes_do_not(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        bench.say(
            status=MeshNode.from_object(
                {"metadata": {"name": "a"}, "status": bench.client.patches[0]}
            ).status
        )
        bench.kernel.counters = {
            (Reason.DROP_CLEAR_ARRIVED, Direction.INGRESS): Counter(2, 200),
            (Reason.DROP_NO_TUNNEL, Direction.EGRESS): Counter(3, 300),
            (Reason.CLEAR_LEAKED, Direction.EGRESS): Counter(5, 500),
            (Reason.ENCRYPTED, Direction.EGRESS): Counter(7, 700),
        }
        await bench.settle()
        assert len(bench.client.patches) == 1
        bench.say(members={"a": replace(own(), generation=5)})
        await bench.until(lambda: len(bench.client.patches) == 2)
        assert (bench.client.patches[1]["leaked"], bench.client.patches[1]["dropped"]) == (7, 5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (loader.Refused("mw_to_netdev", "R1 invalid mem access"), "DatapathRefused"),
        (OSError(1, "Operation not permitted"), "ApplyFailed"),
    ],
)
async def test_what_fails_first_ends_the_plan_and_is_told(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    async with running(tmp_path, StubKernel(fail={plans.LoadDatapath: error})) as bench:
        config = MeshConfig(encryption=Encryption(enabled=True))
        bench.say(members={"a": own(Phase.ENFORCING)}, config=config)
        await bench.until(lambda: bench.client.patches)
        assert {type(action) for action in bench.kernel.applied} == {plans.LoadDatapath}
        assert (bench.client.condition["status"], bench.client.condition["reason"]) == ("False", reason)
        assert str(error) in bench.client.condition["message"]
        await bench.until(lambda: bench.client.events)
        assert bench.client.events[-1]["reason"] == reason
        assert bench.client.events[-1]["type"] == "Warning"


async def test_what_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "RETRIES", (0.01,))
    kernel = StubKernel(
        replace(StubKernel().observed, pinned=True), fail={plans.UnloadDatapath: OSError(16, "busy")}
    )
    async with running(tmp_path, kernel) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: len(kernel.applied) > 2)
        assert bench.client.condition["reason"] == "ApplyFailed"
        kernel.fail.clear()
        await bench.until(lambda: bench.client.condition["reason"] == "Off")
        assert not kernel.observed.pinned


async def test_a_kernel_that_cannot_be_read_is_told_too(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        bench.kernel.unreadable = ConnectionRefusedError(111, "Connection refused")
        bench.agent.wake()
        await bench.until(lambda: len(bench.client.patches) == 2)
        assert bench.client.condition["reason"] == "ObserveFailed"


async def test_an_api_server_that_is_away_stops_only_the_telling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "RETRIES", (0.01,))
    kernel = StubKernel(replace(StubKernel().observed, pinned=True))
    async with running(tmp_path, kernel) as bench:
        bench.client.down = True
        bench.say(members={"a": own()})
        await bench.until(lambda: kernel.applied)
        await bench.settle()
        assert not kernel.observed.pinned
        bench.client.down = False
        await bench.until(lambda: bench.client.patches)


def secret_of(epoch: int) -> tuple[Key, dict[str, Any]]:
    issued = issue(node="a", epoch=epoch, sealing_key=keys.public_key(SEALING))
    data = {f"epoch-{epoch}": base64.b64encode(issued.sealed).decode()}
    return Key(epoch=epoch, public_key=issued.public_key), {"data": data}


SECRET_PATH = "/api/v1/namespaces/ns/secrets/meshwire-key-a"


async def test_a_published_key_is_fetched_once_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key, secret = secret_of(1)
    async with running(tmp_path) as bench:
        bench.client.secrets[SECRET_PATH] = secret
        bench.say(members={"a": own(keys=(key,))})
        await bench.until(lambda: bench.client.patches)
        for _ in range(3):
            await bench.settle()
        assert bench.client.reads == 1
        held = keys.read_held(bench.settings.held_keys_file)
        assert held[1].public_key == key.public_key
        raw = held[1].private_key.reveal()
        for place in (caplog.text, json.dumps(bench.client.patches), json.dumps(bench.client.events)):
            assert raw.hex() not in place
            assert base64.b64encode(raw).decode() not in place
    async with running(tmp_path) as restarted:
        restarted.say(members={"a": own(keys=(key,))})
        await restarted.until(lambda: restarted.client.patches)
        assert restarted.client.reads == 0


async def test_a_key_that_is_withdrawn_is_forgotten(tmp_path: Path) -> None:
    key, secret = secret_of(1)
    async with running(tmp_path) as bench:
        bench.client.secrets[SECRET_PATH] = secret
        bench.say(members={"a": own(keys=(key,))})
        await bench.until(lambda: keys.read_held(bench.settings.held_keys_file))
        bench.say(members={"a": own()})
        await bench.until(lambda: not keys.read_held(bench.settings.held_keys_file))


async def test_a_refused_key_is_told(tmp_path: Path) -> None:
    key, _ = secret_of(1)
    _, other = secret_of(1)
    async with running(tmp_path) as bench:
        bench.client.secrets[SECRET_PATH] = other
        bench.say(members={"a": own(keys=(key,))})
        await bench.until(lambda: bench.client.patches)
        assert bench.client.condition["reason"] == "KeyRefused"
        assert "not the one the operator published" in bench.client.condition["message"]


def with_epoch_secret(
    epoch: int, secret: bytes = bytes(32), *, node: str = "a"
) -> tuple[Key, dict[str, Any]]:
    """The epoch secret is sealed to `node`."""
    key, issued = secret_of(epoch)
    sealed = seal_epoch_secret(secret, node=node, epoch=epoch, sealing_key=keys.public_key(SEALING))
    issued["data"][f"epoch-{epoch}-secret"] = base64.b64encode(sealed).decode()
    return replace(key, secret_digest=preshared.digest(secret, epoch)), issued


async def test_an_epoch_secret_comes_with_its_key_and_shows_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    raw = bytes(range(50, 82))
    key, secret = with_epoch_secret(1, raw)
    async with running(tmp_path) as bench:
        bench.client.secrets[SECRET_PATH] = secret
        bench.say(members={"a": own(keys=(key,))})
        await bench.until(lambda: bench.client.patches)
        await bench.settle()
        assert bench.client.reads == 1
        [held] = keys.read_held(bench.settings.held_keys_file).values()
        assert held.epoch_secret == SecretKey(raw)
        assert bench.settings.held_keys_file.stat().st_mode & 0o777 == 0o600
        for place in (caplog.text, json.dumps(bench.client.patches), json.dumps(bench.client.events)):
            assert raw.hex() not in place and base64.b64encode(raw).decode() not in place
    async with running(tmp_path) as restarted:
        restarted.client.down = True
        restarted.say(members={"a": own(phase=Phase.ENFORCING, keys=(key,))})
        await restarted.until(lambda: restarted.agent.health.desired)
        assert restarted.agent.health.desired
        [device] = restarted.agent.health.desired.devices
        assert device.key.epoch_secret == SecretKey(raw)
        assert restarted.client.reads == 0


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda data, other: data.pop("epoch-1-secret"), "has no epoch secret of epoch 1"),
        (lambda data, other: data.update({"epoch-1-secret": data["epoch-1"]}), "another node or epoch"),
        (lambda data, other: data.update({"epoch-1-secret": other}), "not the one the operator published"),
        (lambda data, other: data.update({"epoch-1-secret": "AAAA"}), "not sealed to this node"),
    ],
)
async def test_a_key_is_refused_without_the_epoch_secret_that_goes_with_it(
    tmp_path: Path, tamper: Callable[[dict[str, str], str], object], message: str
) -> None:
    """And no device is set up that would do without."""
    key, secret = with_epoch_secret(1)
    _, other = with_epoch_secret(1, bytes([1]) * 32)
    tamper(secret["data"], other["data"]["epoch-1-secret"])
    async with running(tmp_path) as bench:
        bench.client.secrets[SECRET_PATH] = secret
        bench.say(members={"a": own(phase=Phase.ENFORCING, keys=(key,))})
        await bench.until(lambda: bench.client.patches)
        await bench.settle()
        assert bench.client.condition["reason"] == "KeyRefused"
        assert message in bench.client.condition["message"]
        assert not keys.read_held(bench.settings.held_keys_file)
        assert bench.agent.health.desired and not bench.agent.health.desired.devices


async def test_a_held_key_that_is_to_go_with_another_secret_is_not_used(tmp_path: Path) -> None:
    key, secret = with_epoch_secret(1)
    async with running(tmp_path) as bench:
        bench.client.secrets[SECRET_PATH] = secret
        bench.say(members={"a": own(keys=(key,))})
        await bench.until(lambda: keys.read_held(bench.settings.held_keys_file))
        other = replace(key, secret_digest=preshared.digest(bytes([1]) * 32, 1))
        bench.say(members={"a": own(keys=(other,))})
        await bench.until(lambda: not keys.read_held(bench.settings.held_keys_file))
        await bench.until(lambda: bench.client.condition["reason"] == "KeyRefused")


async def test_the_last_good_config_survives_a_restart(tmp_path: Path) -> None:
    good = MeshConfig(encryption=Encryption(enabled=True, port=1234))
    bad = MeshConfig(network=NetworkSettings(uplinks=("eth7",)))
    async with running(tmp_path) as bench:
        bench.say(
            members={"a": own()}, config=good, config_spec={"encryption": {"enabled": True, "port": 1234}}
        )
        await bench.until(lambda: bench.client.patches)
    async with running(tmp_path) as bench:
        bench.say(members={"a": own()}, config=bad, config_spec={"network": {"uplinks": ["eth7"]}})
        await bench.until(lambda: bench.client.patches)
        assert bench.client.condition["reason"] == "DeviceNotFound"
        assert json.loads(bench.settings.config_file.read_text())["encryption"]["port"] == 1234


def enforced() -> dict[str, Member]:
    others = {
        "b": Member(
            name="b",
            uid="2",
            spec=replace(own(Phase.ENFORCING).spec, id=2, pod_cidrs=(ip_network("10.244.2.0/24"),)),
        )
    }
    return {"a": own(Phase.ENFORCING), **others}


async def test_a_rebooted_node_guards_before_the_api_server_answers(tmp_path: Path) -> None:
    config = MeshConfig(encryption=Encryption(enabled=True))
    async with running(tmp_path) as bench:
        bench.say(members=enforced(), config=config, config_spec={"encryption": {"enabled": True}})
        await bench.until(lambda: bench.settings.guard_file.exists())
    async with running(tmp_path) as rebooted:
        await rebooted.until(lambda: rebooted.kernel.applied)
        # The stub never has what it loads, so what follows is in tests/netns.
        assert {type(action) for action in rebooted.kernel.applied} == {plans.LoadDatapath}
        assert (rebooted.client.reads, rebooted.client.patches) == (0, [])
    (tmp_path / "pins").mkdir()
    async with running(tmp_path) as restarted:
        restarted.agent.wake()
        await asyncio.sleep(0.1)
        assert restarted.kernel.looks == [], "without a reboot the kernel still guards"


async def test_a_node_that_no_longer_enforces_remembers_nothing_to_guard(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members=enforced(), config=MeshConfig(encryption=Encryption(enabled=True)))
        await bench.until(lambda: bench.settings.guard_file.exists())
        bench.say(members={"a": own(Phase.DISABLING)})
        await bench.until(lambda: not bench.settings.guard_file.exists())


GUARDED = MeshConfig(encryption=Encryption(enabled=True, boot_guard=BootGuard.SYSTEMD))


def boot_guard(client: StubClient) -> dict[str, Any]:
    """The condition, {} where there is none."""
    found = [each for each in client.patches[-1]["conditions"] if each["type"] == "BootGuard"]
    return dict(found[0]) if found else {}


async def test_the_boot_guard_is_on_the_disk_while_strict_is_asked_for(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        rules = bench.settings.boot_rules_file
        bench.say(members=enforced(), config=MeshConfig(encryption=Encryption(enabled=True)))
        await bench.until(lambda: bench.client.patches)
        assert not rules.exists() and boot_guard(bench.client) == {}, "nobody has asked for it"
        bench.say(config=GUARDED)
        # Without a mount, which is no mere detail.
        await bench.until(lambda: boot_guard(bench.client).get("reason") == "NotMounted")
        assert "10.244.2.0/24" in rules.read_text() and bench.agent.health.boot_guard is False
        bench.settings.systemd_directory.joinpath("getty.target.wants").mkdir(parents=True)
        bench.settings.host_usr.joinpath("bin").mkdir(parents=True)
        bench.settings.host_usr.joinpath("bin/nft").touch()
        bench.say(members={**enforced(), "c": replace(own(Phase.ENFORCING), name="c", uid="3")})
        bench.agent._stale = Part.ALL
        await bench.until(lambda: boot_guard(bench.client).get("status") == "True")
        assert bench.settings.systemd_directory.joinpath("meshwire-boot.service").exists()
        bench.say(members={"a": own(Phase.DISABLING)})
        await bench.until(lambda: not rules.exists() and boot_guard(bench.client) == {})
        assert [each.name for each in bench.settings.systemd_directory.rglob("*meshwire*")] == []


async def test_a_node_that_can_t_do_all_it_should_keeps_the_boot_guard(tmp_path: Path) -> None:
    """Nothing of it is taken away on the word of an order that wasn't carried out."""
    kernel = StubKernel(
        replace(StubKernel().observed, pinned=True), fail={plans.UnloadDatapath: OSError(16, "busy")}
    )
    async with running(tmp_path, kernel) as bench:
        rules = bench.settings.boot_rules_file
        rules.write_text("what an earlier agent left")
        bench.say(members={"a": own(Phase.OFF)}, config=GUARDED)
        await bench.until(lambda: len(bench.client.patches) and kernel.applied)
        assert rules.exists()
        kernel.fail.clear()
        await bench.until(lambda: not rules.exists())


async def test_before_the_api_server_answers_the_boot_guard_stays_on_the_disk(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.say(members=enforced(), config=GUARDED, config_spec={"encryption": {"enabled": True}})
        await bench.until(lambda: bench.settings.guard_file.exists())
        await bench.until(lambda: bench.settings.boot_rules_file.exists())
    before = bench.settings.boot_rules_file.read_text()
    kernel = StubKernel(replace(StubKernel().observed, boot_guard=True))
    async with running(tmp_path, kernel) as rebooted:
        await rebooted.until(lambda: rebooted.kernel.applied)
        assert plans.RemoveBootGuard() not in kernel.applied, "programs are not loaded yet"
        assert rebooted.settings.boot_rules_file.read_text() == before


async def test_a_tunnel_that_was_left_is_called_empty_only_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that send by it take it away at that word, with what it still holds."""
    monkeypatch.setattr(loop, "DRAIN", 0.3)
    async with running(tmp_path) as bench:
        bench.say(members={"a": own(Phase.DRAINING)})
        left = time.monotonic()
        await bench.until(lambda: bench.client.patches)
        assert bench.client.patches[-1]["activeEpoch"] == 1
        await bench.until(lambda: bench.client.patches[-1]["activeEpoch"] == 0)
        assert time.monotonic() - left >= 0.3


@dataclass
class StubPairs:
    """Finds what the test says; refuses to look first."""

    news: list[News]
    status: Status = field(default_factory=Status)
    told: list[tuple[Unreachable, ...]] = field(default_factory=list)
    failures: int = 1
    pace: Pace = field(default_factory=lambda: Pace(quiet=0.01, look=0.01, settled=0))

    def look(self, desired: object, observed: object, told: tuple[Unreachable, ...]) -> News:
        if self.failures:
            self.failures -= 1
            raise OSError("no such device")
        self.told.append(told)
        if not self.news:
            return News()
        found = self.news.pop(0)
        dead = tuple(found.dead.values())
        self.status = Status(unreachable=dead, unreachable_count=len(dead))
        return found

    def add_to(self, status: Status) -> Status:
        return replace(
            status,
            unreachable=self.status.unreachable,
            unreachable_count=self.status.unreachable_count,
        )


async def test_a_pair_that_dies_and_comes_back_is_told_of_at_once(tmp_path: Path) -> None:
    dead = {"b": Unreachable(node="b", since="2026-01-01T00:00:00Z", reason="NoAnswer")}
    async with running(tmp_path) as bench:
        pairs = StubPairs([News(dead=dead)])
        bench.agent._pairs = pairs  # type: ignore[assignment]
        bench.say(members={"a": own()})
        await bench.until(lambda: bench.client.patches)
        watching = asyncio.create_task(bench.agent.watch_pairs())
        try:
            await bench.until(lambda: bench.client.patches[-1]["unreachableCount"])
            assert bench.client.patches[-1]["unreachable"] == [
                {"node": "b", "since": "2026-01-01T00:00:00Z", "reason": "NoAnswer"}
            ]
            await bench.until(lambda: [each["reason"] for each in bench.client.events][-1:] == ["PairDead"])
            event = bench.client.events[-1]
            assert (event["type"], event["regarding"]["uid"]) == ("Warning", "1")
            # A failed look is no reason to stop looking, and what was told is known to the next one.
            await bench.until(lambda: pairs.told[-1] == tuple(dead.values()))
            pairs.news.append(News(back=dead))
            await bench.until(lambda: not bench.client.patches[-1]["unreachableCount"])
            await bench.until(lambda: bench.client.events[-1]["reason"] == "PairRecovered")
            looks = len(bench.kernel.looks)
            pairs.news.append(News(lost=True))
            await bench.until(lambda: len(bench.kernel.looks) > looks)
            assert Part.WIREGUARD in bench.kernel.looks[-1]
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
