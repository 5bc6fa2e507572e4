from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest

from meshwire.agent import loop
from meshwire.api.conditions import Condition
from meshwire.api.meshconfig import BootGuard, Encryption, MeshConfig, Mode, Userspace
from meshwire.api.meshnode import Implementation, MeshNode, Phase, Spec, Status
from meshwire.api.meshstatus import MeshStatus
from meshwire.cli.diagnosis import BOOT_GUARD, REASONS, Snapshot, age, as_json, diagnose, is_ready
from meshwire.cli.findings import Level
from meshwire.cli.status import boot_guard
from meshwire.encryption import bootguard, desired, report

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def condition(type: str, status: bool | None, reason: str = "Because", message: str = "") -> Condition:
    return Condition(type=type, status=status, reason=reason, message=message, observed_generation=1)


def config(*, accepted: bool = True, generation: int = 1, **encryption: object) -> MeshConfig:
    return MeshConfig(
        encryption=replace(Encryption(enabled=True), **encryption),  # type: ignore[arg-type]
        generation=generation,
        conditions=(
            condition("Accepted", accepted, "Accepted" if accepted else "NoSuchDevice", "eth7 is unknown"),
        ),
    )


def node(
    name: str, *, ready: bool | None = True, reason: str = "Ready", message: str = "", **status: object
) -> MeshNode:
    """A MeshNode in force on epoch 1; `ready` None: its agent has never reported."""
    reported = Status(
        observed_generation=1,
        implementation=Implementation.KERNEL,
        prepared_epoch=1,
        active_epoch=1,
        strict=True,
        peers=2,
        handshakes=2,
        agent_version="0.1.0",
        conditions=(condition("Ready", ready, reason, message),),
    )
    return MeshNode(
        name=name,
        generation=1,
        spec=Spec(id=1, phase=Phase.ENFORCING, epoch=1),
        status=Status() if ready is None else replace(reported, **status),  # type: ignore[arg-type]
    )


def mesh(phase: Phase = Phase.ENFORCING, *conditions: Condition) -> MeshStatus:
    return MeshStatus(
        encryption="WireGuard" if phase is Phase.ENFORCING else str(phase),
        phase=phase,
        epoch=1,
        epoch_started_at="2026-01-01T11:57:30Z",
        nodes=2,
        nodes_ready=2,
        conditions=conditions or (condition("Ready", True),),
    )


NODES = (node("a"), node("b"))
ALIVE = {"a": True, "b": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    config: MeshConfig | None = field(default_factory=config)
    status: MeshStatus | None = field(default_factory=mesh)
    nodes: tuple[MeshNode, ...] = NODES
    alive: Mapping[str, bool] | None = field(default_factory=lambda: ALIVE)
    ready: bool = False
    expected: tuple[tuple[str, Level, str], ...] = ()
    """Check, level and a part of the words of each finding, in order."""

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(config=self.config, status=self.status, meshnodes=self.nodes, alive=self.alive)


NOT_READY = (condition("Ready", False, "NodesNotReady", "1 of 2"),)

CASES = (
    Case(name="in force everywhere: nothing to say", ready=True),
    Case(
        name="no MeshConfig: off, and said so",
        config=None,
        status=mesh(Phase.OFF),
        nodes=(),
        ready=True,
        expected=(("meshconfig", Level.WARN, "There is no MeshConfig"),),
    ),
    Case(
        name="off on purpose is ready",
        config=config(enabled=False),
        status=mesh(Phase.OFF),
        nodes=(),
        ready=True,
        expected=(("encryption", Level.WARN, "as the MeshConfig says"),),
    ),
    Case(
        name="the operator has not seen the latest MeshConfig: its Ready is about the one before",
        config=config(generation=2),
        expected=(("meshconfig", Level.FAIL, "has not looked at the MeshConfig"),),
    ),
    Case(
        name="a refused MeshConfig: the last good state stays",
        config=config(accepted=False),
        ready=True,
        expected=(("meshconfig", Level.FAIL, "NoSuchDevice: eth7 is unknown"),),
    ),
    Case(
        name="Permissive is worth a word",
        config=config(mode=Mode.PERMISSIVE),
        ready=True,
        expected=(("encryption", Level.WARN, "Permissive"),),
    ),
    Case(
        name="no MeshStatus: no operator",
        status=None,
        expected=(("operator", Level.FAIL, "never written"),),
    ),
    Case(
        name="a stalled operator",
        status=mesh(
            Phase.ENFORCING, condition("Ready", False), condition("Stalled", True, "NoIds", "16383 nodes")
        ),
        expected=(("operator", Level.FAIL, "NoIds: 16383 nodes"), ("mesh", Level.FAIL, "Because")),
    ),
    Case(
        name="turning on waits for the nodes that have not moved",
        status=mesh(Phase.ENABLING, *NOT_READY),
        nodes=(node("a"), node("b", ready=False, reason="WaitingForKey", active_epoch=0)),
        expected=(("mesh", Level.FAIL, "waiting for b"), ("node b", Level.FAIL, "WaitingForKey")),
    ),
    Case(
        name="turning on does not wait for a dead node",
        status=mesh(Phase.ENABLING, *NOT_READY),
        nodes=(node("a"), node("b", active_epoch=0)),
        alive={"a": True, "b": False},
        expected=(("mesh", Level.FAIL, "every node has done its part"), ("node b", Level.WARN, "not Ready")),
    ),
    Case(
        name="turning off waits for the strict ones",
        config=config(enabled=False),
        status=mesh(Phase.DISABLING, *NOT_READY),
        nodes=(node("a", strict=False), node("b")),
        expected=(("encryption", Level.WARN, "off"), ("mesh", Level.FAIL, "waiting for b")),
    ),
    Case(
        name="draining waits for those that still send through tunnels",
        config=config(enabled=False),
        status=mesh(Phase.DRAINING, *NOT_READY),
        nodes=(node("a", strict=False, active_epoch=0), node("b", strict=False)),
        expected=(("encryption", Level.WARN, "off"), ("mesh", Level.FAIL, "waiting for b")),
    ),
    Case(
        name="wanted on, accepted, and nothing happens",
        status=mesh(Phase.OFF),
        nodes=(),
        expected=(("operator", Level.FAIL, "asks for the phase Enforcing, and it is still Off"),),
    ),
    Case(
        name="not ready, and no node says why: the operator's words",
        status=mesh(Phase.ENFORCING, condition("Ready", False, "Strange", "so it is")),
        expected=(("mesh", Level.FAIL, "Strange: so it is"),),
    ),
    Case(
        name="strict without cluster CIDRs",
        status=mesh(
            Phase.ENFORCING,
            condition("Ready", True),
            condition("StrictScope", False, "NoCIDRs", "none known"),
        ),
        ready=True,
        expected=(("strict scope", Level.WARN, "NoCIDRs: none known"),),
    ),
    Case(
        name="policy maps that fill up",
        status=mesh(
            Phase.ENFORCING,
            condition("Ready", True),
            condition("PolicyMapPressure", True, "MapsFillUp", "b (policy: 83 % of 524288 entries)"),
        ),
        ready=True,
        expected=(("policy maps", Level.WARN, "b (policy: 83 % of 524288 entries)"),),
    ),
    Case(
        name="policy maps that are full",
        status=mesh(
            Phase.ENFORCING,
            condition("Ready", True),
            condition("PolicyMapPressure", True, "MapFull", "b (policy: no room in 524288 entries)"),
        ),
        ready=True,
        expected=(("policy maps", Level.FAIL, "MapFull: b"),),
    ),
    Case(
        name="policy maps that have room",
        status=mesh(
            Phase.ENFORCING, condition("Ready", True), condition("PolicyMapPressure", False, "MapsHaveRoom")
        ),
        ready=True,
    ),
    Case(
        name="an agent that never came up",
        status=mesh(Phase.ENFORCING, *NOT_READY),
        nodes=(node("a"), node("b", ready=None)),
        expected=(("node b", Level.FAIL, "never reported"),),
    ),
    Case(
        name="an agent that has stopped listening",
        status=mesh(Phase.ENFORCING, *NOT_READY),
        nodes=(node("a"), node("b", observed_generation=0)),
        expected=(("node b", Level.FAIL, "latest order"),),
    ),
    Case(
        name="a reason nobody told this client about still shows",
        status=mesh(Phase.ENFORCING, *NOT_READY),
        nodes=(node("a"), node("b", ready=False, reason="SomethingNew", message="of a later version")),
        expected=(("node b", Level.FAIL, "SomethingNew: of a later version"),),
    ),
    Case(
        name="a leak",
        nodes=(node("a", leaked=7), node("b")),
        ready=True,
        expected=(("node a", Level.FAIL, "7 packets between pods were seen in clear"),),
    ),
    Case(
        name="peers without a fresh handshake",
        nodes=(node("a", handshakes=1), node("b")),
        ready=True,
        expected=(("node a", Level.WARN, "1 of 2 peers"),),
    ),
    Case(
        name="user space, though the kernel's was preferred",
        nodes=(node("a", implementation=Implementation.USERSPACE), node("b")),
        ready=True,
        expected=(("wireguard", Level.WARN, "on a"),),
    ),
    Case(
        name="user space as ordered",
        config=config(userspace=Userspace.ALWAYS),
        nodes=(node("a", implementation=Implementation.USERSPACE), node("b")),
        ready=True,
    ),
    Case(
        name="agents of two versions",
        nodes=(node("a"), node("b", agent_version="0.2.0")),
        ready=True,
        expected=(("versions", Level.WARN, "0.1.0, 0.2.0"),),
    ),
    Case(
        name="Nodes that may not be listed count as live",
        status=mesh(Phase.ENABLING, *NOT_READY),
        nodes=(node("a"), node("b", active_epoch=0)),
        alive=None,
        expected=(("mesh", Level.FAIL, "waiting for b"),),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_state_is_explained(case: Case) -> None:
    found = diagnose(case.snapshot)
    assert [(finding.check, finding.level) for finding in found] == [each[:2] for each in case.expected]
    for finding, (_, _, words) in zip(found, case.expected, strict=True):
        assert words in finding.what
        assert finding.why and finding.todo
    assert is_ready(case.snapshot) is case.ready


@pytest.mark.parametrize("case", [case for case in CASES if not case.ready], ids=lambda case: case.name)
def test_what_is_not_ready_has_a_failure_that_says_why(case: Case) -> None:
    assert any(finding.level is Level.FAIL for finding in diagnose(case.snapshot))


def test_every_reason_an_agent_gives_is_explained() -> None:
    given = {
        call.args[0].value
        for module in (desired, report, loop)
        for call in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Problem"
        if isinstance(call.args[0], ast.Constant)
    }
    assert given
    assert given <= REASONS.keys()


def test_json_has_the_documented_shape() -> None:
    answer = as_json(CASES[0].snapshot, NOW)
    assert answer["ready"] is True
    assert answer["mesh"]["encryption"] == "WireGuard"
    assert answer["mesh"]["keyAgeSeconds"] == 150
    assert [item["name"] for item in answer["nodes"]] == ["a", "b"]
    assert answer["nodes"][0]["activeEpoch"] == 1
    assert "sealingKey" not in answer["nodes"][0]
    assert answer["findings"] == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59, "59s"), (60, "1m"), (150, "2m30s"), (3600, "1h"), (5400, "1h30m"),
     (36000, "10h"), (86400 * 2 + 7200, "2d2h"), (86400 * 40, "40d")],
)  # fmt: skip
def test_ages_read_as_kubectl_prints_them(seconds: int | None, text: str) -> None:
    assert age(seconds) == text


def test_a_missing_boot_guard_is_explained() -> None:
    asked = config(boot_guard=BootGuard.SYSTEMD)
    nodes = [
        node(
            name,
            conditions=(
                condition("Ready", True, "Ready"),
                condition("BootGuard", reason == bootguard.IN_PLACE, reason, "Because."),
            ),
        )
        for name, reason in (("a", bootguard.IN_PLACE), ("b", bootguard.NO_NFT))
    ]
    state = Snapshot(config=asked, status=mesh(), meshnodes=nodes, alive=None)
    [finding] = diagnose(state)
    assert (finding.check, finding.level) == ("node b", Level.WARN)
    assert "NoNft" in finding.what and finding.todo == "install nftables on the node"
    assert boot_guard(state) == "in place on 1 of 2 nodes"
    assert "spec.encryption.bootGuard" in (boot_guard(replace(state, config=config())) or "")
    assert boot_guard(replace(state, config=config(mode=Mode.PERMISSIVE))) is None


def test_every_reason_of_a_missing_boot_guard_is_explained() -> None:
    reasons = {
        value
        for name, value in vars(bootguard).items()
        if name.isupper() and isinstance(value, str) and name.startswith(("NO_", "NOT_"))
    }
    assert reasons == BOOT_GUARD.keys() and len(reasons) == 6
