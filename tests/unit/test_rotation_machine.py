"""Every order in which nodes, the operator and faults can act while keys change, up to a bound.

Operator and agents are the real pure functions; what lies between them, API server and kernels, is a state
that can be compared. A step is one write of the operator, or of an agent what others can see of its plan: a
crash between any two writes is the same as nothing more happening, for both begin by looking at everything.
What an agent has planned is carried out even if the API has changed meanwhile."""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256
from ipaddress import ip_address, ip_network
from itertools import permutations
from typing import Any

import pytest
from tests.unit.test_encryption_convergence import UPLINK, FakeKernel, public

from meshwire.api.meshconfig import Encryption, KeyRotation, MeshConfig
from meshwire.api.meshnode import Key, MeshNode, Phase, Spec, Status
from meshwire.api.meshstatus import MeshStatus, Rotation
from meshwire.api.names import device_name
from meshwire.encryption import plan as plans
from meshwire.encryption.desired import Inputs as AgentInputs
from meshwire.encryption.desired import desired
from meshwire.encryption.model import ClusterNode, Direction, HeldKey, Link, Member, SecretKey, SettingsFlags
from meshwire.encryption.report import Counts, report
from meshwire.operator import reconcile as operator
from meshwire.operator.objects import Config, KeySecret, Node

NUMBERS = {"a": 1, "b": 2, "c": 3}
CLUSTER = ip_network("10.244.0.0/16")
START = "2026-01-01T00:00:00Z"
NOW = datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
"""When every overlap is over."""


def pod_cidr(name: str) -> Any:
    return ip_network(f"10.244.{NUMBERS[name]}.0/24")


def wire(name: str) -> Any:
    return ip_address(f"198.18.0.{NUMBERS[name]}")


@cache
def raw_key(name: str, epoch: int, disk: int) -> bytes:
    return sha256(f"{name} {epoch} {disk}".encode()).digest()


@cache
def key_of(name: str, epoch: int, disk: int) -> str:
    return public(SecretKey(raw_key(name, epoch, disk)))


@cache
def sealing_key(name: str, disk: int) -> str:
    return public(SecretKey(sha256(f"{name} seals {disk}".encode()).digest()))


class Remembered:
    """Compared far more often than made."""

    def __hash__(self) -> int:
        if (found := self.__dict__.get("_hash")) is None:
            found = hash(tuple(value for name, value in self.__dict__.items() if name != "_hash"))
            self.__dict__["_hash"] = found
        return found


@dataclass(frozen=True)
class Machine(Remembered):
    """A node and what the API has of it. `spec` None: no MeshNode yet. `current`: the status is about this
    spec. `secret`: (epoch, disk) of the keys in its Secret, `held` of those the agent has opened. `kernel`
    and `pending` (the rest of a plan) are interned. `moved_off`: peers to which it has just left an epoch,
    and whose packets may still be on their way. `caught_up`: it has done what it was told since it was last
    away."""

    live: bool = True
    disk: int = 0
    spec: Spec | None = None
    status: Status = Status()
    current: bool = False
    secret: tuple[tuple[int, int], ...] = ()
    sealed_to: int = -1
    held: frozenset[tuple[int, int]] = frozenset()
    kernel: int = 0
    pending: int = 0
    moved_off: frozenset[tuple[str, int]] = frozenset()
    caught_up: bool = False

    __hash__ = Remembered.__hash__


@dataclass(frozen=True)
class State(Remembered):
    """`works`: ordered pairs of live nodes between which packets arrive. `faults`: those that may still
    happen."""

    nodes: tuple[tuple[str, Machine], ...]
    phase: Phase
    rotation: tuple[int, bool] | None
    handled: int
    asked: int
    enabled: bool
    overlap_over: bool
    works: frozenset[tuple[str, str]]
    faults: frozenset[tuple[str, str]]

    __hash__ = Remembered.__hash__

    def machine(self, name: str) -> Machine:
        return self.nodes[NUMBERS[name] - 1][1]

    def having(self, name: str, **changes: Any) -> State:
        return replace(
            self, nodes=tuple((n, replace(m, **changes) if n == name else m) for n, m in self.nodes)
        )


class Kernel(FakeKernel):
    """A device keeps its index when it is made anew: nothing may lead to it when it goes, which is
    checked."""

    def apply(self, action: plans.Action) -> None:
        match action:
            case plans.CreateDevice(name):
                self.next_index = 10 + int(name[-1])
            case plans.DeleteDevice(name):
                assert self.links[name].index not in self.nodes.values(), f"{name} goes while it is sent by"
        super().apply(action)


class Table:
    """Kernels and plans, each known by a small number."""

    def __init__(self) -> None:
        self.items: list[Any] = [None]
        self.numbers: dict[Any, int] = {}

    def number(self, key: Any, item: Any) -> int:
        if key not in self.numbers:
            self.numbers[key] = len(self.items)
            self.items.append(item)
        return self.numbers[key]


def frozen(kernel: FakeKernel) -> Any:
    return (
        tuple(
            sorted(
                (name, link.index, link.up, link.mtu, link.addresses) for name, link in kernel.links.items()
            )
        ),
        tuple(
            sorted(
                (name, device.public_key, device.port, frozenset(device.peers.items()))
                for name, device in kernel.wireguard.items()
            )
        ),
        frozenset(kernel.addresses.items()),
        frozenset(kernel.nodes.items()),
        kernel.settings,
        kernel.loaded,
        frozenset(kernel.filters.items()),
        frozenset(kernel.hooked),
        frozenset(kernel.sysctls.items()),
        frozenset(kernel.endpoints.items()),
    )


def in_words(action: plans.Action) -> str:
    secret = (
        action.private_key.reveal().hex()
        if isinstance(action, plans.ConfigureDevice) and action.private_key
        else ""
    )
    return f"{action} {secret} {getattr(action, 'peers', '')}"


def others_see(action: plans.Action) -> bool:
    """Whether it changes what any other node, or a packet, can tell."""
    match action:
        case plans.ConfigureDevice():
            return bool(action.peers or action.release or action.fresh)
        case plans.WriteNodes() | plans.DeleteDevice() | plans.WriteSettings() | plans.UnloadDatapath():
            return True
        case plans.Detach():
            return True
    return False


class Explorer:
    """The steps there are, with what was worked out before."""

    def __init__(self, *, fine: bool = True) -> None:
        self.fine = fine
        """Else an agent's run is one step, and so are a key and its publication, and both ends of a
        handshake."""
        self.kernels, self.plans = Table(), Table()
        self.looks: dict[Any, tuple[int, frozenset[tuple[int, int]], Status]] = {}
        self.reconciled: dict[Any, tuple[operator.Action, ...]] = {}
        self.applied: dict[tuple[int, str], int] = {}
        self.rests: dict[State, State] = {}
        self.accepted: dict[tuple[str, str, int, int, int], bool] = {}
        self.leaves: dict[tuple[int, str], str] = {}
        self.shook: dict[tuple[int, str, str], int] = {}
        fresh = Kernel(links={UPLINK: Link(index=2, name=UPLINK, up=True)})
        self.fresh = self.intern(fresh)

    def intern(self, kernel: Kernel) -> int:
        kernel.writes = kernel.interruptions = 0
        return self.kernels.number(frozen(kernel), kernel)

    def kernel(self, number: int) -> Kernel:
        found: Kernel = self.kernels.items[number]
        return found

    # The operator.

    def actions(self, state: State) -> tuple[operator.Action, ...]:
        seen = (
            tuple(
                (name, m.live, m.disk, m.spec, m.status, m.current, m.secret, m.sealed_to)
                for name, m in state.nodes
            ),
            state.phase,
            state.rotation,
            state.handled,
            state.asked,
            state.enabled,
            state.overlap_over,
        )
        if seen not in self.reconciled:
            self.reconciled[seen] = operator.reconcile(self.inputs(state)).actions
        return self.reconciled[seen]

    def inputs(self, state: State) -> operator.Inputs:
        config = MeshConfig(
            generation=1,
            rotate=str(state.asked) if state.asked else "",
            encryption=Encryption(
                enabled=state.enabled,
                key_rotation=KeyRotation(interval=timedelta(), overlap=timedelta(minutes=1)),
            ),
        )
        mesh_nodes = {}
        for name, machine in state.nodes:
            if machine.spec is not None:
                mesh_nodes[name] = MeshNode(
                    name=name,
                    uid=f"uid-{name}",
                    owner=f"node-{name}",
                    resource_version="1",
                    generation=2,
                    created=f"2026-01-01T00:00:0{NUMBERS[name]}Z",
                    spec=machine.spec,
                    status=replace(machine.status, observed_generation=2 if machine.current else 1),
                )
        epoch = max((m.spec.epoch for _, m in state.nodes if m.spec), default=0)
        rotation = None
        if state.rotation:
            origin, moved = state.rotation
            rotation = Rotation(from_epoch=origin, started_at=START, moved_at=START if moved else "")
        return operator.Inputs(
            nodes={
                name: Node(
                    name=name,
                    uid=f"node-{name}",
                    created=f"2026-01-01T00:00:0{NUMBERS[name]}Z",
                    live=machine.live,
                    addresses=(wire(name),),
                    pod_cidrs=(pod_cidr(name),),
                )
                for name, machine in state.nodes
            },
            mesh_nodes=mesh_nodes,
            secrets={
                name: KeySecret(
                    node=name,
                    uid=f"secret-{name}",
                    owner=f"uid-{name}",
                    sealed_to=sealing_key(name, machine.sealed_to),
                    keys=tuple(Key(epoch=e, public_key=key_of(name, e, d)) for e, d in machine.secret),
                )
                for name, machine in state.nodes
                if machine.secret
            },
            config=Config(uid="config", resource_version="1", generation=1, config=config),
            status=MeshStatus(
                phase=state.phase,
                epoch=epoch,
                epoch_started_at=START,
                rotation=rotation,
                handled_request=str(state.handled) if state.handled else "",
            ),
            found_cidrs=(CLUSTER,),
            recent_ids=(),
            now=LATER if state.overlap_over else NOW,
        )

    def operator_steps(self, state: State) -> Iterator[tuple[str, State]]:
        for words, following, node in self.operator_writes(state):
            if node and not self.fine:
                for more, published, _ in self.operator_writes(following):
                    if more.startswith(f"operator orders {node} "):
                        words, following = f"{words}; {more}", published
                        break
            yield words, following

    def operator_writes(self, state: State) -> Iterator[tuple[str, State, str]]:
        """The last item: the node that has got a key."""
        for action in self.actions(state):
            match action:
                case operator.PatchSpec():
                    old = state.machine(action.node)
                    assert old.spec is not None
                    yield (
                        f"operator orders {action.node} {action.spec.phase} {action.spec.epoch}"
                        f" retiring {action.spec.retiring} keys {[key.epoch for key in action.spec.keys]}",
                        state.having(action.node, spec=action.spec, current=False),
                        "",
                    )
                case operator.CreateMeshNode():
                    yield (
                        f"operator adds {action.node}",
                        state.having(action.node, spec=action.spec, current=False),
                        "",
                    )
                case operator.IssueKey():
                    machine = state.machine(action.node)
                    disk = next(d for d in (0, 1) if sealing_key(action.node, d) == action.sealing_key)
                    kept = tuple((e, d) for e, d in machine.secret if e == action.beside != action.epoch)
                    yield (
                        f"operator issues {action.node} a key of {action.epoch}",
                        state.having(
                            action.node,
                            secret=tuple(sorted((*kept, (action.epoch, disk)))),
                            sealed_to=disk,
                        ),
                        action.node,
                    )
                case operator.WithdrawKeys():
                    name = action.secret.node
                    left = tuple((e, d) for e, d in state.machine(name).secret if e not in action.epochs)
                    yield (
                        f"operator withdraws {name}'s keys of {action.epochs}",
                        state.having(name, secret=left),
                        "",
                    )
                case operator.DeleteSecret():
                    yield (
                        "operator deletes a Secret",
                        state.having(action.secret.node, secret=(), sealed_to=-1),
                        "",
                    )
                case operator.WriteStatus():
                    rotation = action.status.rotation
                    moved = bool(rotation and rotation.moved_at)
                    written = replace(
                        state,
                        phase=action.status.phase,
                        rotation=(rotation.from_epoch, moved) if rotation else None,
                        handled=int(action.status.handled_request or 0),
                        overlap_over=state.overlap_over and moved,
                    )
                    if written != state:
                        yield f"operator writes {action.status.rotation}", written, ""
                case operator.WriteConfigStatus() | operator.AdoptSecret() | operator.LiftTaint():
                    pass
                case _:
                    raise AssertionError(action)

    # Agents.

    def look(self, state: State, name: str) -> tuple[int, frozenset[tuple[int, int]], Status]:
        """The plan, the keys held, and the status to report once there is nothing to do."""
        machine = state.machine(name)
        seen = (
            name,
            tuple((n, m.live, m.spec) for n, m in state.nodes),
            machine.status,
            machine.secret,
            machine.sealed_to == machine.disk,
            machine.held,
            machine.disk,
            machine.kernel,
            not machine.moved_off,
        )
        if seen not in self.looks:
            self.looks[seen] = self._look(state, name, machine)
        return self.looks[seen]

    def _look(
        self, state: State, name: str, machine: Machine
    ) -> tuple[int, frozenset[tuple[int, int]], Status]:
        members = {
            n: Member(name=n, created=f"2026-01-01T00:00:0{NUMBERS[n]}Z", generation=2, spec=m.spec)
            for n, m in state.nodes
            if m.spec is not None
        }
        published = {key.epoch: key.public_key for key in machine.spec.keys} if machine.spec else {}
        fetched = machine.secret if machine.sealed_to == machine.disk else ()
        held = frozenset(
            (e, d) for e, d in {*machine.held, *fetched} if published.get(e) == key_of(name, e, d)
        )
        kernel = self.kernel(machine.kernel)
        observed = kernel.observe()
        wanted = desired(
            AgentInputs(
                node=name,
                members=members,
                nodes={
                    n: ClusterNode(name=n, ready=m.live, addresses=(wire(n),), pod_cidrs=(pod_cidr(n),))
                    for n, m in state.nodes
                },
                config=MeshConfig(encryption=Encryption(enabled=True)),
                held={e: HeldKey(e, key_of(name, e, d), SecretKey(raw_key(name, e, d))) for e, d in held},
                links=observed.links,
                routes=observed.routes,
                in_place=observed.pinned,
                told=machine.status,
            )
        )
        todo = plans.plan(wanted, observed) if wanted else ()
        status = report(
            wanted,
            observed,
            previous=replace(machine.status, conditions=()),
            generation=2,
            sealing_key=sealing_key(name, machine.disk),
            problems=(),
            counts=Counts(),
            version="",
            drained=not machine.moved_off,
        )
        # What no decision hangs on is left out, so that fewer states differ.
        status = Status(
            sealing_key=status.sealing_key,
            prepared_epoch=status.prepared_epoch,
            active_epoch=status.active_epoch,
            unreached=status.unreached,
            strict=status.strict,
            peers=status.peers if wanted and wanted.phase is Phase.ENABLING else 0,
        )
        return self.plans.number(tuple(map(in_words, todo)), todo) if todo else 0, held, status

    def agent_steps(self, state: State, name: str) -> Iterator[tuple[str, State]]:
        if self.fine:
            yield from self.agent_writes(state, name)
            return
        words, reached = "", state
        while (step := next(self.agent_writes(reached, name), None)) is not None:
            try:
                words, reached = f"{words}; {step[0]}", self.judged(step[1])
            except AssertionError as error:
                raise AssertionError(f"{error}, after {words}; {step[0]}") from None
        if reached is not state:
            yield words, reached

    def agent_writes(self, state: State, name: str) -> Iterator[tuple[str, State]]:
        machine = state.machine(name)
        if machine.pending:
            yield self.carry_out(state, name, machine.pending)
        todo, held, status = self.look(state, name)
        if held != machine.held:
            state = state.having(name, held=held)
            machine = state.machine(name)
        if todo and todo != machine.pending:
            yield self.carry_out(state, name, todo)
        elif not todo and machine.spec is not None and (status != machine.status or not machine.current):
            yield (
                f"{name} reports {status.active_epoch} of {status.prepared_epoch}, not {status.unreached}",
                state.having(
                    name,
                    status=status,
                    current=True,
                    pending=0,
                ),
            )

    def carry_out(self, state: State, name: str, number: int) -> tuple[str, State]:
        """The plan's actions up to the first that others see."""
        machine = state.machine(name)
        todo: plans.Plan = self.plans.items[number]
        kernel, moved_off = machine.kernel, machine.moved_off
        done = 0
        words = ""
        for action in todo:
            done += 1
            words = str(action)
            if isinstance(action, plans.WriteNodes):
                moved_off |= self.left_by(state, name, kernel, action)
            kernel = self.after(kernel, action)
            if others_see(action) or isinstance(action, plans.LoadDatapath):
                break
        rest = () if isinstance(action, plans.LoadDatapath) else todo[done:]
        return (
            f"{name}: {words}",
            state.having(
                name,
                kernel=kernel,
                moved_off=moved_off,
                pending=self.plans.number(tuple(map(in_words, rest)), rest) if rest else 0,
            ),
        )

    def left_by(
        self, state: State, name: str, kernel: int, action: plans.WriteNodes
    ) -> frozenset[tuple[str, int]]:
        """Peers that were sent to by another device until now, and the parity of its epoch."""
        before = self.kernel(kernel).nodes
        numbers = {number: peer for peer, number in NUMBERS.items()}
        return frozenset(
            (numbers[number], before[number] - 10)
            for number, device in action.entries
            if number in before
            and device != device_name(before[number])
            # What never arrived has nothing on its way. Who was away while the others moved, and comes back
            # as the old keys end, isn't spared.
            and (name, numbers[number]) in state.works
            and (spec := state.machine(name).spec)
            and spec.retiring
        )

    def after(self, number: int, action: plans.Action) -> int:
        key = (number, in_words(action))
        if key not in self.applied:
            kernel = copy.copy(self.kernel(number))
            for item in (
                "links",
                "wireguard",
                "addresses",
                "nodes",
                "filters",
                "hooked",
                "sysctls",
                "endpoints",
            ):
                setattr(kernel, item, copy.copy(getattr(kernel, item)))
            kernel.apply(action)
            self.applied[key] = self.intern(kernel)
        return self.applied[key]

    # Packets.

    def accepts(self, state: State, sender: str, receiver: str, parity: int) -> bool:
        """A packet from the one arrives at the other by this device, when the two have shaken hands."""
        numbers = state.machine(sender).kernel, state.machine(receiver).kernel
        key = (sender, receiver, parity, *numbers)
        if key not in self.accepted:
            self.accepted[key] = self._accepts(sender, receiver, parity, *map(self.kernel, numbers))
        return self.accepted[key]

    def _accepts(self, sender: str, receiver: str, parity: int, one: Kernel, two: Kernel) -> bool:
        name = device_name(parity)
        here, there = one.wireguard.get(name), two.wireguard.get(name)
        if not here or not there or not one.links[name].up or not two.links[name].up:
            return False
        peer, back = here.peers.get(there.public_key), there.peers.get(here.public_key)
        return bool(
            peer
            and back
            and pod_cidr(receiver) in peer.networks
            and pod_cidr(sender) in back.networks
            and (name, Direction.INGRESS) in two.filters
        )

    def arrives(self, state: State, sender: str, receiver: str) -> bool:
        key = (state.machine(sender).kernel, receiver)
        if key not in self.leaves:
            self.leaves[key] = self.kernel(key[0]).egress(pod_cidr(receiver)[7])
        by, receiver_kernel = self.leaves[key], self.kernel(state.machine(receiver).kernel)
        assert by != "lost", f"{sender} sends to {receiver} by a tunnel that isn't there"
        if by == "clear":
            spec = state.machine(sender).spec
            # A node that has just come up has no pods before it has its guard.
            is_up = (
                state.machine(sender).caught_up or (UPLINK, Direction.EGRESS) in self.kernel(key[0]).filters
            )
            assert not is_up or (spec and spec.phase is not Phase.ENFORCING), (
                f"{sender} sends to {receiver} in clear"
            )
            settings = receiver_kernel.settings
            return settings is None or SettingsFlags.STRICT not in settings.flags
        return by.startswith("meshwire") and self.accepts(state, sender, receiver, int(by[-1]))

    def handshakes(self, state: State) -> Iterator[tuple[str, State]]:
        """One end's, of any pair and device: the other end's may come much later."""
        for one, two in permutations([name for name, machine in state.nodes if machine.live], 2):
            for parity in (0, 1):
                if not self.accepts(state, one, two, parity) or not self.accepts(state, two, one, parity):
                    continue
                machine = state.machine(one)
                name = device_name(parity)
                key = self.kernel(state.machine(two).kernel).wireguard[name].public_key
                number = self.proven(machine.kernel, name, key)
                if number == machine.kernel:
                    continue
                if not self.fine:
                    other = state.machine(two).kernel
                    back = self.kernel(machine.kernel).wireguard[name].public_key
                    yield (
                        f"{one} and {two} shake hands on {name}",
                        state.having(one, kernel=number).having(two, kernel=self.proven(other, name, back)),
                    )
                else:
                    yield f"{one} has a handshake with {two} on {name}", state.having(one, kernel=number)

    def proven(self, number: int, device: str, key: str) -> int:
        if (number, device, key) not in self.shook:
            kernel = copy.copy(self.kernel(number))
            state = kernel.wireguard[device]
            peers = {**state.peers, key: replace(state.peers[key], handshake=kernel.now - 5)}
            kernel.wireguard = {**kernel.wireguard, device: replace(state, peers=peers)}
            self.shook[number, device, key] = self.intern(kernel)
        return self.shook[number, device, key]

    # Everything.

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        yield from self.quiet_steps(state)
        yield from self.faults(state)

    def quiet_steps(self, state: State) -> Iterator[tuple[str, State]]:
        yield from self.operator_steps(state)
        for name, machine in state.nodes:
            if machine.live:
                yield from self.agent_steps(state, name)
            if machine.moved_off:
                yield f"what {name} sent before has arrived", state.having(name, moved_off=frozenset())
        yield from self.handshakes(state)
        if state.rotation and state.rotation[1] and not state.overlap_over:
            yield "the overlap is over", replace(state, overlap_over=True)

    def faults(self, state: State) -> Iterator[tuple[str, State]]:
        for fault in sorted(state.faults):
            kind, name = fault
            left = replace(state, faults=state.faults - {fault})
            match kind:
                case "ask" if name == "again":
                    # When the first nodes are told that the old keys end.
                    if any(m.spec and m.spec.epoch > 1 and not m.spec.retiring for _, m in state.nodes):
                        yield "new keys are asked for again", replace(left, asked=state.asked + 1)
                case "ask":
                    yield "new keys are asked for", replace(left, asked=state.asked + 1)
                case "disable":
                    yield "encryption is turned off", replace(left, enabled=False)
                case "away":
                    away = left.having(name, live=False, caught_up=False, pending=0, moved_off=frozenset())
                    yield f"{name} goes away", replace(away, faults=away.faults | {("back", name)})
                case "reboot":
                    off = left.having(
                        name,
                        live=False,
                        caught_up=False,
                        pending=0,
                        kernel=self.fresh,
                        moved_off=frozenset(),
                    )
                    off = self.forget_sessions(off, name)
                    yield f"{name} goes down", replace(off, faults=off.faults | {("back", name)})
                case "back":
                    yield f"{name} is back", left.having(name, live=True)
                case "lose disk":
                    lost = left.having(
                        name,
                        disk=state.machine(name).disk + 1,
                        held=frozenset(),
                        kernel=self.fresh,
                        pending=0,
                        caught_up=False,
                        moved_off=frozenset(),
                    )
                    yield f"{name} loses its disk", self.forget_sessions(lost, name)
                case "join":
                    added = Machine(kernel=self.fresh)
                    yield f"{name} joins", replace(left, nodes=(*left.nodes, (name, added)))

    def forget_sessions(self, state: State, name: str) -> State:
        """Nothing that was on its way to it has to arrive any more."""
        works = frozenset(pair for pair in state.works if name not in pair)
        for other, machine in state.nodes:
            left = frozenset(item for item in machine.moved_off if item[0] != name)
            state = state.having(other, moved_off=left)
        return replace(state, works=works)

    def judged(self, state: State) -> State:
        """The state with what works now. Raises AssertionError where something has ceased to."""
        orders = {(m.spec.phase, m.spec.epoch, m.spec.retiring) for _, m in state.nodes if m.spec}
        for name, machine in state.nodes:
            # Who comes back while the old keys end joins by the new ones when they have ended.
            if (
                not machine.caught_up
                and machine.live
                and machine.current
                and machine.spec
                and machine.status.active_epoch == machine.spec.epoch
                and len(orders) == 1
                and not self.look(state, name)[0]
            ):
                state = state.having(name, caught_up=True)
        works = set()
        for one, two in permutations([name for name, machine in state.nodes], 2):
            sender, receiver = state.machine(one), state.machine(two)
            if not sender.live or not receiver.live or not sender.kernel or not receiver.kernel:
                continue
            arrives = self.arrives(state, one, two)
            assert arrives or (one, two) not in state.works, f"{one} doesn't reach {two} any more"
            if arrives and ((one, two) in state.works or (sender.caught_up and receiver.caught_up)):
                works.add((one, two))
        for one, machine in state.nodes:
            for two, parity in machine.moved_off:
                if (one, two) in works:
                    assert self.accepts(state, one, two, parity), f"what {one} sent {two} before is lost"
        return replace(state, works=frozenset(works))

    def explore(self, begin: State, *, limit: int = 10**9) -> list[State]:
        """All states that can be reached. From each, without further faults, everything must come right."""
        begin = self.judged(begin)
        came: dict[State, tuple[State, str] | None] = {begin: None}
        queue = deque([begin])
        while queue:
            state = queue.popleft()
            words = ""
            try:
                for words, following in self.steps(state):
                    following = self.judged(following)
                    if following not in came:
                        came[following] = (state, words)
                        queue.append(following)
            except AssertionError as error:
                story = "\n".join([*self.story(came, state), f"then: {words}"])
                raise AssertionError(f"{error}\n{story}") from error
            assert len(came) < limit, "too many states"
        return list(came)

    def story(self, came: Any, state: State) -> list[str]:
        told: list[str] = []
        while came[state]:
            state, words = came[state]
            told.append(words)
        return told[::-1]

    def at_rest(self, state: State) -> State:
        """After as many quiet steps as there are, any of them; they must end."""
        path: list[State] = []
        while state not in self.rests:
            assert len(path) < 2000, "never at rest"
            path.append(state)
            step = next(self.quiet_steps(state), None)
            if step is None:
                self.rests[state] = state
            else:
                state = self.judged(step[1])
        self.rests |= dict.fromkeys(path, self.rests[state])
        return self.rests[state]

    def settled(self, names: tuple[str, ...]) -> State:
        """These nodes in Enforcing, epoch 1."""
        begin = State(
            nodes=tuple((name, Machine(kernel=self.fresh)) for name in names),
            phase=Phase.OFF,
            rotation=None,
            handled=0,
            asked=0,
            enabled=True,
            overlap_over=False,
            works=frozenset(),
            faults=frozenset(),
        )
        state = self.at_rest(begin)
        assert state.phase is Phase.ENFORCING
        assert len(state.works) == len(names) * (len(names) - 1)
        return state


def assert_all_is_right(explorer: Explorer, state: State) -> None:
    live = [name for name, machine in state.nodes if machine.live]
    assert state.rotation is None and state.handled == state.asked
    epochs = {machine.spec.epoch for _, machine in state.nodes if machine.spec}
    assert len(epochs) == 1
    (epoch,) = epochs
    for name in live:
        machine = state.machine(name)
        kernel = explorer.kernel(machine.kernel)
        assert machine.spec and machine.spec.phase is Phase.ENFORCING and not machine.spec.retiring
        assert [key.epoch for key in machine.spec.keys] == [epoch] == [e for e, _ in machine.secret]
        assert {e for e, _ in machine.held} == {epoch}
        assert list(kernel.wireguard) == [device_name(epoch)]
        assert len(kernel.wireguard[device_name(epoch)].peers) >= len(live) - 1
    assert state.works == frozenset(permutations(live, 2))


SCENARIOS = {
    # Names, faults, fine steps.
    "keys change twice": ("ab", [("ask", ""), ("ask", "again")], True),
    "a node is away": ("ab", [("ask", ""), ("away", "b")], False),
    "a node goes down": ("ab", [("ask", ""), ("reboot", "b")], False),
    "a node loses its disk": ("ab", [("ask", ""), ("lose disk", "b")], False),
    "encryption is turned off": ("ab", [("ask", ""), ("disable", "")], False),
    "a node joins": ("a", [("ask", ""), ("join", "b")], False),
    "three nodes": ("abc", [("ask", "")], False),
}
if os.environ.get("MESHWIRE_EXHAUSTIVE"):
    # Minutes each, tens of thousands of states.
    for name, (nodes, faults, _) in list(SCENARIOS.items())[1:6]:
        SCENARIOS[f"{name}, in fine steps"] = (nodes, faults, True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whatever_happens_while_keys_change(scenario: str) -> None:
    names, faults, fine = SCENARIOS[scenario]
    explorer = Explorer(fine=fine)
    states = explorer.explore(replace(explorer.settled(tuple(names)), faults=frozenset(faults)))
    ends = set()
    for state in states:
        # Without further faults; but who is away comes back.
        back = next((name for kind, name in state.faults if kind == "back"), None)
        state = replace(state, faults=frozenset())
        for begin in (state, state.having(back, live=True)) if back else (state,):
            end = explorer.at_rest(explorer.judged(begin))
            if end not in ends and end.enabled:
                assert_all_is_right(explorer, end)
            ends.add(end)
    print(f"{scenario}: {len(states)} states, {len(ends)} ends")
