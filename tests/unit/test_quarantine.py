"""Quarantine: every order of the writes of people, operator and agents, and what agents do and say of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from meshwire.api.meshconfig import Encryption, MeshConfig, Mode
from meshwire.api.meshnode import Key, MeshNode, Phase, Revoked, Spec, Status
from meshwire.api.meshstatus import MeshStatus, Quarantine
from meshwire.encryption import plan as plans
from meshwire.encryption.desired import Inputs as AgentInputs
from meshwire.encryption.desired import desired
from meshwire.encryption.model import (
    AddressFlags,
    ClusterNode,
    Datapath,
    Desired,
    DeviceState,
    HeldKey,
    Link,
    Member,
    Observed,
    PeerState,
    Route,
    SecretKey,
)
from meshwire.encryption.plan import plan
from meshwire.encryption.report import Counts, is_urgent, report
from meshwire.operator import reconcile as operator
from meshwire.operator.objects import Config, KeySecret, Node
from meshwire.operator.quarantine import follow, revocation_of, waits_for

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NUMBERS = {"a": 1, "b": 2, "x": 3}


def public_key(name: str, serial: int) -> str:
    return f"{NUMBERS[name]}{serial:041d}A="


@dataclass(frozen=True)
class Peer:
    """`a` or `b`: the key of x that its device has, 0: none; what it confirms, and has told of that."""

    live: bool = True
    has: int = 1
    confirms: Revoked | None = None
    told: Revoked | None = None


@dataclass(frozen=True)
class State:
    """`published` and `secret` are x's keys, 0: none; `made` is how many there have been, `withdrawn` the
    last that was taken back."""

    quarantined: bool = False
    revocation: int = 0
    generation: int = 1
    published: int = 1
    secret: int = 1
    made: int = 1
    withdrawn: int = 0
    asked: Quarantine | None = None
    a: Peer = Peer()
    b: Peer = Peer()
    toggles: int = 3
    outages: int = 1


def spec(name: str, state: State) -> Spec:
    serial = state.published if name == "x" else 1
    return Spec(
        id=NUMBERS[name],
        addresses=(ip_address(f"192.0.2.{NUMBERS[name]}"),),
        pod_cidrs=(ip_network(f"10.0.{NUMBERS[name]}.0/24"),),
        cluster_cidrs=(ip_network("10.0.0.0/16"),),
        keys=(Key(epoch=1, public_key=public_key(name, serial)),) if serial else (),
        phase=Phase.ENFORCING,
        epoch=1,
        quarantined=name == "x" and state.quarantined,
        revocation=state.revocation if name == "x" else 0,
    )


def inputs(state: State) -> operator.Inputs:
    peers = {"a": state.a, "b": state.b}
    secrets = {"a": 1, "b": 1, "x": state.secret}
    return operator.Inputs(
        nodes={
            name: Node(
                name=name,
                uid=f"node-{name}",
                live=name not in peers or peers[name].live,
                addresses=spec(name, state).addresses,
                pod_cidrs=spec(name, state).pod_cidrs,
            )
            for name in NUMBERS
        },
        mesh_nodes={
            name: MeshNode(
                name=name,
                uid=f"mesh-{name}",
                owner=f"node-{name}",
                generation=state.generation if name == "x" else 1,
                spec=spec(name, state),
                status=Status(
                    observed_generation=100,
                    sealing_key=public_key(name, 1000),
                    active_epoch=1,
                    strict=True,
                    revoked=tuple(filter(None, [peers[name].told])) if name in peers else (),
                ),
            )
            for name in NUMBERS
        },
        secrets={
            name: KeySecret(
                node=name,
                uid=f"secret-{name}",
                owner=f"mesh-{name}",
                sealed_to=public_key(name, 1000),
                keys=(Key(epoch=1, public_key=public_key(name, serial)),),
            )
            for name, serial in secrets.items()
            if serial
        },
        config=Config(
            uid="config",
            resource_version="1",
            generation=1,
            config=MeshConfig(generation=1, encryption=Encryption(enabled=True)),
        ),
        status=MeshStatus(phase=Phase.ENFORCING, epoch=1, quarantines=(state.asked,) if state.asked else ()),
        found_cidrs=(ip_network("10.0.0.0/16"),),
        recent_ids=(),
        now=NOW,
    )


def as_operators_see(state: State) -> State:
    """Without what makes no difference to them."""

    def told(peer: Peer) -> Peer:
        return Peer(live=peer.live, told=peer.told)

    return replace(state, a=told(state.a), b=told(state.b), toggles=0, outages=0, made=0, withdrawn=0)


@cache
def actions(state: State) -> tuple[operator.Action, ...]:
    return operator.reconcile(inputs(state)).actions


def steps(state: State) -> Iterator[tuple[str, State]]:
    yield from quiet_steps(state)
    if state.toggles:
        words = "ends the quarantine" if state.quarantined else "quarantines"
        yield (
            f"somebody {words}",
            replace(
                state,
                quarantined=not state.quarantined,
                generation=state.generation + 1,
                toggles=state.toggles - 1,
            ),
        )
    if state.outages or not state.a.live:
        yield (
            f"a is {'away' if state.a.live else 'back'}",
            replace(state, a=replace(state.a, live=not state.a.live), outages=state.outages - state.a.live),
        )


def quiet_steps(state: State) -> Iterator[tuple[str, State]]:
    for action in actions(as_operators_see(state)):
        match action:
            case operator.PatchSpec(node="x"):
                serial = state.secret if action.spec.keys else 0
                yield (
                    f"operator writes {action.spec.revocation}, key {serial}",
                    replace(
                        state,
                        revocation=action.spec.revocation,
                        published=serial,
                        withdrawn=state.withdrawn if serial else state.published or state.withdrawn,
                        generation=state.generation + 1,
                    ),
                )
            case operator.IssueKey(node="x"):
                made = state.made + 1
                yield f"operator issues key {made}", replace(state, secret=made, made=made)
            case operator.DeleteSecret():
                assert action.secret.node == "x"
                yield "operator deletes the Secret", replace(state, secret=0)
            case operator.WriteStatus():
                told = next(iter(action.status.quarantines), None)
                if told != state.asked:
                    yield f"operator tells {told}", replace(state, asked=told)
            case operator.WriteConfigStatus():
                pass
            case _:
                raise AssertionError(action)
    for name in ("a", "b"):
        peer: Peer = getattr(state, name)
        if not peer.live:
            continue
        is_out = state.quarantined or bool(state.revocation)
        acted = replace(
            peer,
            has=0 if is_out else state.published,
            confirms=Revoked(NUMBERS["x"], state.revocation) if state.revocation else None,
        )
        if acted != peer:
            yield f"{name} acts", having(state, name, acted)
        if peer.told != peer.confirms:
            yield f"{name} reports", having(state, name, replace(peer, told=peer.confirms))


def having(state: State, name: str, peer: Peer) -> State:
    return replace(state, a=peer) if name == "a" else replace(state, b=peer)


def check(state: State) -> None:
    assert not (state.published and state.revocation), "a key is published in quarantine"
    assert not state.published or state.published > state.withdrawn, "a withdrawn key is published again"
    for name in ("a", "b"):
        peer: Peer = getattr(state, name)
        if peer.live and peer.has and state.secret and peer.has != state.secret:
            raise AssertionError(f"{name} has key {peer.has}, and there is key {state.secret}")


@pytest.mark.parametrize(("toggles", "outages"), [(3, 0), (2, 1)])
def test_no_new_key_is_made_while_a_live_node_has_the_old_one_and_all_comes_right(
    toggles: int, outages: int
) -> None:
    begin = State(toggles=toggles, outages=outages)
    came: dict[State, tuple[State, str] | None] = {begin: None}
    queue = deque([begin])
    while queue:
        state = queue.popleft()
        for words, following in steps(state):
            if following in came:
                continue
            came[following] = (state, words)
            # One that was away may have an old key for a moment.
            if following.outages == outages:
                try:
                    check(following)
                except AssertionError as error:
                    raise AssertionError(f"{error}: {story(came, following)}") from None
            queue.append(following)
    assert len(came) > 1000
    seen: set[State] = set()
    for state in came:
        on_the_way = set()
        while state not in seen and (step := next(quiet_steps(state), None)):
            assert state not in on_the_way, f"never at rest: {state}"
            on_the_way.add(state)
            state = step[1]
        seen |= on_the_way
        if state in seen:
            continue
        seen.add(state)
        assert bool(state.published) is bool(state.secret) is not state.quarantined
        assert bool(state.revocation) is state.quarantined
        for peer in (state.a, state.b):
            assert not peer.live or peer.has == state.published
        told = state.asked
        assert (told is not None) is state.quarantined
        assert told is None or (told.revoked_at and not told.waiting)


def story(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    told: list[str] = []
    while step := came[state]:
        state, words = step
        told.append(words)
    return told[::-1]


# The operator's parts.


def node(name: str, **changes: Any) -> MeshNode:
    revoked = changes.pop("revoked", ())
    return MeshNode(
        name=name,
        generation=7,
        spec=replace(Spec(id=NUMBERS[name]), **changes),
        status=Status(revoked=revoked),
    )


def test_who_is_waited_for() -> None:
    confirmed = (Revoked(3, 5),)
    out = node("x", quarantined=True, revocation=5)
    members = {"a": node("a", revoked=confirmed), "b": node("b"), "x": out}
    assert waits_for(out, members, ["a", "b", "x"]) == ("b",)
    assert waits_for(out, members, ["a", "x"]) == ()
    earlier = {**members, "a": node("a", revoked=(Revoked(3, 4),))}
    assert waits_for(out, earlier, ["a", "x"]) == ("a",)
    both_out = {**members, "b": node("b", quarantined=True)}
    assert waits_for(out, both_out, ["a", "b", "x"]) == ()


def test_nothing_is_revoked_while_every_node_looks_dead_unless_there_is_none_to_ask() -> None:
    out = node("x", quarantined=True, revocation=5)
    (told,) = follow((), {"a": node("a"), "x": out}, live=[], now=NOW)
    assert not told.revoked_at
    # A dead node is not waited for, be it the last member.
    (told,) = follow((), {"a": node("a"), "x": out}, live=["x"], now=NOW)
    assert told.revoked_at
    (told,) = follow((), {"x": out}, live=[], now=NOW)
    assert told.revoked_at
    assert (
        revocation_of(replace(out, spec=replace(out.spec, quarantined=False)), [told], has_secret=False) == 0
    )


def test_a_revocations_number_is_never_used_twice() -> None:
    assert revocation_of(node("x", quarantined=True), [], has_secret=True) == 7
    assert revocation_of(node("x", quarantined=True, revocation=3), [], has_secret=True) == 3
    assert revocation_of(node("x", revocation=3), [], has_secret=False) == 3


# The agents.


def member(name: str, **changes: Any) -> Member:
    return Member(
        name=name,
        created=f"2026-01-01T00:00:0{NUMBERS[name]}Z",
        spec=replace(spec(name, State()), **changes),
    )


def wanted(
    own: str = "a", mode: Mode = Mode.STRICT, phase: Phase = Phase.ENFORCING, **changes: Any
) -> Desired:
    """With these changes of x's spec."""
    secret = SecretKey(sha256(own.encode()).digest())
    members = {name: member(name, phase=phase) for name in NUMBERS}
    members["x"] = member("x", phase=phase, **changes)
    found = desired(
        AgentInputs(
            node=own,
            members=members,
            nodes={name: ClusterNode(name=name, ready=True) for name in NUMBERS},
            config=MeshConfig(encryption=Encryption(enabled=True, mode=mode)),
            held={1: HeldKey(1, public_key(own, 1), secret)},
            links={"eth0": Link(index=2, name="eth0", up=True)},
            routes=(Route(ip_network("0.0.0.0/0"), (2,)),),
            in_place=True,
        )
    )
    assert found
    return found


@pytest.mark.parametrize("phase", [Phase.ENABLING, Phase.ENFORCING, Phase.DISABLING, Phase.DRAINING])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_node_in_quarantine_is_no_peer_and_its_pods_stay_known(phase: Phase, mode: Mode) -> None:
    found = wanted(phase=phase, mode=mode, quarantined=True)
    assert [peer.node for peer in found.devices[0].peers] == ["b"]
    assert 3 not in found.redirects and 3 not in found.live_ids
    assert found.quarantined == {3}
    entry = found.addresses[ip_network("10.0.3.0/24")]
    assert (entry.node, entry.flags) == (3, AddressFlags.POD)
    before = wanted(phase=phase, mode=mode)
    assert {peer.node for peer in before.devices[0].peers} == {"b", "x"} and not before.quarantined


def test_the_node_itself_has_no_device_and_guards_on() -> None:
    found = wanted("x", quarantined=True)
    assert not found.devices and not found.redirects and found.strict
    assert found.quarantined == {1, 2}
    assert [problem.reason for problem in found.problems if problem.blocking][0] == "Quarantined"


def test_until_all_have_let_go_it_is_no_peer_but_waits_as_any_node_without_keys() -> None:
    found = wanted(revocation=9)
    assert [peer.node for peer in found.devices[0].peers] == ["b"]
    assert not found.quarantined and found.revocations == {3: 9}


def observed(found: Desired, *peers: str, nodes: dict[int, int] | None = None) -> Observed:
    states = {public_key(name, 1): PeerState(public_key=public_key(name, 1)) for name in peers}
    return Observed(
        links={"meshwire_wg1": Link(index=9, name="meshwire_wg1", up=True)},
        wireguard={
            "meshwire_wg1": DeviceState(name="meshwire_wg1", public_key=public_key("a", 1), peers=states)
        },
        datapath=Datapath({}, nodes or {}, found.settings),
        pinned=True,
    )


def told(found: Desired, seen: Observed) -> tuple[Revoked, ...]:
    return report(
        found,
        seen,
        previous=Status(),
        generation=1,
        sealing_key=public_key("a", 1000),
        problems=(),
        counts=Counts(),
        version="1",
    ).revoked


def test_an_agent_confirms_what_the_kernel_says_not_what_it_wants() -> None:
    found = wanted(quarantined=True, revocation=9)
    assert told(found, observed(found, "b")) == (Revoked(3, 9),)
    assert told(found, observed(found, "b", "x")) == ()
    assert told(found, observed(found, "b", nodes={3: 9})) == ()
    uncounted = wanted(quarantined=True)
    assert told(uncounted, observed(uncounted, "b")) == ()


def test_others_wait_for_the_word_that_a_node_is_let_go_of_and_not_for_the_end_of_it() -> None:
    with_it, without = Status(revoked=(Revoked(3, 9),)), Status()
    assert is_urgent(without, with_it) and not is_urgent(with_it, without)
    assert is_urgent(with_it, Status(revoked=(Revoked(3, 12),)))


def test_sending_stops_before_the_peer_goes_and_the_entry_is_taken_back_after() -> None:
    found = wanted(quarantined=True)
    todo = plan(found, observed(found, "b", "x", nodes={2: 9, 3: 9}))
    kinds = [type(action) for action in todo]
    first = todo[kinds.index(plans.WriteNodes)]
    assert isinstance(first, plans.WriteNodes) and (3, plans.QUARANTINED) in first.entries
    assert kinds.index(plans.WriteNodes) < kinds.index(plans.ConfigureDevice)
    back = wanted(revocation=9)
    seen = observed(back, "b")
    assert seen.datapath
    still = replace(seen, datapath=replace(seen.datapath, quarantined=frozenset({3})))
    written = [action for action in plan(back, still) if isinstance(action, plans.WriteNodes)]
    assert (3, "") in [entry for action in written for entry in action.entries]
