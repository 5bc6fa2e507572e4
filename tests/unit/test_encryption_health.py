"""Whether pairs work: judged by what a WireGuard at the other end would answer, on random schedules of
silence."""

from __future__ import annotations

import struct
from base64 import b64encode
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwire.agent.pairs import Pairs
from meshwire.api.meshnode import MAX_UNREACHABLE, Phase, Status, Unreachable
from meshwire.encryption import health, plan, uapi, wireguard
from meshwire.encryption.health import (
    INITIATION,
    PATIENCE,
    RETRIES,
    Pair,
    PairKey,
    Reading,
    Repair,
    Round,
    State,
    Track,
    says_something,
)
from meshwire.encryption.model import (
    AddressEntry,
    AddressFlags,
    Datapath,
    Desired,
    Device,
    Endpoint,
    HeldKey,
    Link,
    Observed,
    Peer,
    Redirect,
    SecretKey,
    Settings,
    SettingsFlags,
)
from meshwire.encryption.question import checksum, question

WALL = 1_700_000_000.0
unhurried = settings(deadline=None, max_examples=50)
"""Minutes of a node's life take a while on a busy machine."""


def key(number: int) -> str:
    return b64encode(number.to_bytes(32)).decode()


def endpoint(number: int) -> Endpoint:
    return Endpoint(ip_address(f"198.18.0.{number}"), 51872)


def peer(number: int) -> Peer:
    return Peer(
        node=f"n{number}",
        public_key=key(number),
        endpoint=endpoint(number),
        allowed_ips=frozenset({ip_network(f"10.244.{number}.0/24"), ip_network(f"198.18.0.{number}/32")}),
        keepalive=25,
        pods=frozenset({bytes([10, 9, 0, number])}),
    )


def device(*peers: Peer, epoch: int = 1) -> Device:
    held = HeldKey(epoch, key(200), SecretKey(bytes(32)))
    return Device(
        name=f"meshwire_wg{epoch % 2}", epoch=epoch, key=held, port=51871, mtu=1420, peers=tuple(peers)
    )


def pairs(count: int, *, live: bool = True) -> tuple[Pair, ...]:
    made = device(*(peer(number) for number in range(1, count + 1)))
    return tuple(Pair(device=made, peer=each, live=live) for each in made.peers)


@dataclass
class Far:
    """The other end: when it is dead, what it has sent, and when it owes an answer."""

    silent: tuple[tuple[float, float], ...] = ()
    chatty: bool = False
    received: int = 0
    handshake: float = WALL
    endpoint: Endpoint | None = None
    due: float | None = None
    first_messages: bool = False

    def is_silent(self, now: float) -> bool:
        return any(start <= now < end for start, end in self.silent)

    def asked(self, now: float) -> None:
        if not self.is_silent(now) and self.due is None:
            self.due = now + health.ANSWER

    def pass_time(self, now: float) -> None:
        if self.is_silent(now):
            self.due = None
            self.received += INITIATION if self.first_messages and int(now) % 5 == 0 else 0
        elif self.chatty or (self.due is not None and now >= self.due):
            self.received += 32
            self.due = None


@dataclass
class World:
    """One node's judgement over time."""

    far: dict[PairKey, Far]
    pairs: tuple[Pair, ...]
    tracks: dict[PairKey, Track] = field(default_factory=dict)
    now: float = 100.0
    rounds: list[tuple[float, Round]] = field(default_factory=list)
    repairs: list[tuple[float, PairKey, Repair]] = field(default_factory=list)

    @property
    def pace(self) -> health.Pace:
        return health.pace(len(self.pairs))

    def look(self) -> None:
        readings = {key: Reading(far.received, far.handshake, far.endpoint) for key, far in self.far.items()}
        found = health.judge(
            self.tracks, self.pairs, readings, now=self.now, wall=WALL + self.now, pace=self.pace
        )
        self.tracks = dict(found.tracks)
        for step, pair in found.repair:
            self.repairs.append((self.now, pair.key, step))
            self.tracks = health.repaired(self.tracks, pair.key, self.now)
        for pair in found.ask:
            if pair.key in self.far:
                self.far[pair.key].asked(self.now)
        self.tracks = health.asked(self.tracks, {pair.key for pair in found.ask}, self.now)
        self.rounds.append((self.now, found))

    def run(self, seconds: float, late: tuple[float, ...] = ()) -> None:
        """`late`: how much too late each look is, in turns."""
        end, number = self.now + seconds, 0
        while self.now < end:
            self.look()
            step = self.pace.look + (late[number % len(late)] if late else 0.0)
            number += 1
            target = self.now + step
            while self.now < target:
                self.now += min(0.5, target - self.now)
                for far in self.far.values():
                    far.pass_time(self.now)

    def deaths(self, node: str) -> list[float]:
        return [now for now, found in self.rounds for death in found.died if death.node == node]

    def recoveries(self, node: str) -> list[float]:
        return [now for now, found in self.rounds for each in found.recovered if each.node == node]

    def state(self, pair: Pair) -> State:
        return self.tracks[pair.key].state(self.now, self.pace)


def world(count: int, **first: object) -> World:
    made = pairs(count)
    far = {pair.key: Far(endpoint=pair.peer.endpoint) for pair in made}
    far[made[0].key] = Far(**{"endpoint": made[0].peer.endpoint, **first})  # type: ignore[arg-type]
    return World(far, made)


@unhurried
@given(
    silence=st.lists(st.tuples(st.floats(100, 400), st.floats(1, 200)), max_size=4),
    late=st.lists(st.floats(0, 30), max_size=5),
    chatty=st.booleans(),
    first_messages=st.booleans(),
    count=st.integers(2, 4),
)
def test_who_answers_is_never_repaired(
    silence: list[tuple[float, float]],
    late: list[float],
    chatty: bool,
    first_messages: bool,
    count: int,
) -> None:
    spans = tuple((start, start + length) for start, length in silence)
    made = world(count, silent=spans, chatty=chatty, first_messages=first_messages)
    made.run(500, tuple(late))
    for pair in made.pairs[1:]:
        assert not made.deaths(pair.peer.node)
    one = made.far[made.pairs[0].key]
    for now, repaired, _ in made.repairs:
        assert repaired == made.pairs[0].key
        # Nothing came from it for as long as it would have had to answer in.
        assert any(start < now and start + PATIENCE - health.ANSWER <= now for start, _ in spans), one


@unhurried
@given(
    dies=st.floats(130, 200), chatty=st.booleans(), first_messages=st.booleans(), count=st.integers(1, 120)
)
def test_a_death_is_known_in_time(dies: float, chatty: bool, first_messages: bool, count: int) -> None:
    made = world(1, silent=((dies, 1e9),), chatty=chatty, first_messages=first_messages)
    # As among many peers, without so many to work through.
    speed = health.pace(count)
    made.__class__ = type("Paced", (World,), {"pace": property(lambda self: speed)})
    made.run(200 + speed.detection)
    [death] = made.deaths("n1")
    assert dies <= death <= dies + speed.detection + health.ANSWER
    assert made.state(made.pairs[0]) is State.DEAD
    assert made.repairs[0][0] == death


@unhurried
@given(length=st.floats(40, 300))
def test_it_is_known_when_it_answers_again_and_how_often_it_was_repaired(length: float) -> None:
    made = world(2, silent=((150, 150 + length),))
    made.run(length + 100)
    assert len(made.deaths("n1")) == len(made.recoveries("n1")) == 1
    back = 150 + length
    [heard] = made.recoveries("n1")
    assert back <= heard <= back + health.ANSWER + made.pace.ask_again + 2 * made.pace.look
    assert made.state(made.pairs[0]) is State.HEALTHY
    times = [now for now, _, _ in made.repairs]
    gaps = [later - sooner for sooner, later in zip(times, times[1:], strict=False)]
    assert all(gap >= wanted for gap, wanted in zip(gaps, RETRIES, strict=False))


def test_the_endpoint_comes_first_where_it_is_another_and_renewal_next() -> None:
    made = world(1, silent=((110, 1e9),), endpoint=Endpoint(ip_address("203.0.113.1"), 1))
    made.run(60)
    assert [step for _, _, step in made.repairs][:2] == [Repair.ENDPOINT, Repair.RENEW]
    made = world(1, silent=((110, 1e9),))
    made.run(60)
    assert {step for _, _, step in made.repairs} == {Repair.RENEW}


def test_a_node_that_is_not_ready_is_left_alone_and_not_told_of() -> None:
    made = world(1, silent=((110, 1e9),))
    made.pairs = pairs(1, live=False)
    made.run(200)
    assert made.deaths("n1") and not made.repairs
    assert not health.find_unreachable(made.tracks, {}, now=made.now, pace=made.pace)
    # It is Ready again, and still doesn't answer.
    made.pairs = pairs(1)
    made.run(5)
    assert len(made.repairs) == 1
    [told] = health.find_unreachable(made.tracks, {}, now=made.now, pace=made.pace).values()
    assert told.node == "n1" and told.since.startswith("2023-11-14T22:1")


def test_who_could_not_be_asked_owes_no_answer() -> None:
    tracks: dict[PairKey, Track] = {}
    readings = {("meshwire_wg1", key(1)): Reading(1, WALL)}
    for second in range(200):
        found = health.judge(tracks, pairs(1), readings, now=second, wall=WALL, pace=health.pace(1))
        tracks = dict(found.tracks)
        assert not found.died and (second < 6 or found.ask)


def test_what_can_not_be_read_is_no_sign_of_life() -> None:
    made = world(1, silent=((110, 1e9),), received=4711)
    made.run(60)
    [pair] = made.pairs
    far = made.far.pop(pair.key)
    made.run(5)
    assert made.rounds[-1][1].lost and made.state(pair) is State.DEAD
    made.far[pair.key] = far
    made.run(5)
    assert not made.rounds[-1][1].lost and made.state(pair) is State.DEAD
    # Taken away by somebody and brought back: it counts from 0, and has still said nothing.
    far.received, far.handshake = 0, 0.0
    made.run(5)
    assert made.state(pair) is State.DEAD
    far.received = 92
    made.run(1)
    assert made.state(pair) is State.HEALTHY


def deaf(made: World) -> bool:
    return bool(health.find_deaf(made.tracks, {}, made.now))


def test_a_device_is_deaf_only_if_all_its_peers_are_dead_and_renewed_in_vain() -> None:
    made = world(2, silent=((110, 1e9),))
    made.run(300)
    assert made.deaths("n1") and not deaf(made)
    made = world(1, silent=((110, 1e9),))
    made.run(300)
    assert made.deaths("n1") and not deaf(made), "one peer's silence may be that peer's"

    made = world(3)
    for far in made.far.values():
        far.silent = ((110, 1e9),)
    made.run(60)
    assert len(made.repairs) >= 3
    tracks = {key: replace(track, repairs=1, dead=185.0) for key, track in made.tracks.items()}
    assert not health.find_deaf(tracks, {}, 199)
    unrepaired = {key: replace(track, repairs=0) for key, track in tracks.items()}
    assert not health.find_deaf(unrepaired, {}, 200)
    assert health.find_deaf(tracks, {}, 200) == ("meshwire_wg1",)
    assert not health.find_deaf(tracks, {"meshwire_wg1": 0.0}, 200)
    assert health.find_deaf(tracks, {"meshwire_wg1": 0.0}, 600)
    none_live = {key: replace(track, live=False) for key, track in tracks.items()}
    assert not health.find_deaf(none_live, {}, 200)
    one_heard = {**tracks, next(iter(tracks)): replace(next(iter(tracks.values())), dead=None)}
    assert not health.find_deaf(one_heard, {}, 200)


@unhurried
@given(st.lists(st.floats(110, 140), min_size=2, max_size=4))
def test_a_device_whose_peers_were_missed_one_after_the_other_is_deaf_too(deaths: list[float]) -> None:
    made = world(len(deaths))
    for far, dies in zip(made.far.values(), deaths, strict=True):
        far.silent = ((dies, 1e9),)
    looks = []
    while made.now < 230:
        looks.append(deaf(made))
        made.run(1)
    first = 100 + looks.index(True)
    last = max(made.deaths(f"n{number}")[0] for number in range(1, len(deaths) + 1))
    assert last + RETRIES[0] <= first <= last + RETRIES[0] + 3 * made.pace.look


def test_many_nodes_are_told_later_than_few() -> None:
    dead = Track(node="b", live=True, reading=Reading(), began=0, dead=100.0, since=WALL, reason="NoAnswer")
    tracks = {("meshwire_wg1", key(1)): dead}
    few, many = health.pace(50), health.pace(51)
    assert health.find_unreachable(tracks, {}, now=100, pace=few)
    assert not health.find_unreachable(tracks, {}, now=159, pace=many)
    assert health.find_unreachable(tracks, {}, now=160, pace=many)


def test_an_agent_that_has_just_started_takes_nothing_back_before_it_has_listened() -> None:
    told = {"n1": Unreachable(node="n1", since="2026-01-01T00:00:00Z", reason="NoAnswer")}
    made = world(1, silent=((0, 1e9),))
    for _ in range(40):
        made.run(1)
        assert health.find_unreachable(made.tracks, told, now=made.now, pace=made.pace) == told
    assert made.state(made.pairs[0]) is State.DEAD
    made = world(1, chatty=True)
    made.run(3)
    assert not health.find_unreachable(made.tracks, told, now=made.now, pace=made.pace)


@pytest.mark.parametrize(
    ("before", "now", "heard"),
    [
        pytest.param(Reading(100), Reading(100), False, id="nothing"),
        pytest.param(Reading(100), Reading(132), True, id="a keepalive"),
        pytest.param(Reading(100), Reading(248), False, id="a first message"),
        pytest.param(Reading(100), Reading(692), False, id="four first messages"),
        pytest.param(Reading(100), Reading(100 + 148 * 9), True, id="more than first messages come to"),
        pytest.param(Reading(100), Reading(280), True, id="a first message and a keepalive"),
        pytest.param(Reading(500), Reading(92), True, id="made anew, and an answer to its handshake"),
        pytest.param(Reading(500), Reading(0), False, id="made anew"),
        pytest.param(Reading(500), Reading(148), False, id="made anew, and a first message"),
        pytest.param(Reading(100, 5.0), Reading(248, 6.0), True, id="a handshake that succeeded"),
    ],
)
def test_what_counts_as_a_sign_of_life(before: Reading, now: Reading, heard: bool) -> None:
    assert says_something(before, now) is heard


def test_how_often_scales_with_the_number_of_peers() -> None:
    assert [health.pace(n).quiet for n in (1, 50, 100, 250, 1000)] == [5, 5, 10, 25, 25]
    assert [health.pace(n).look for n in (1, 250, 1000)] == [1, 5, 5]
    assert health.pace(3).detection < 30 and health.pace(1000).detection < 65


# Which peers are looked at.


def in_force(**nodes: int) -> tuple[Desired, Observed]:
    """Two devices, as while keys change; `nodes`: by which one n1 and n2 are sent to."""
    old, new = device(peer(1), peer(2), epoch=1), device(peer(11), peer(12), epoch=2)
    new = replace(new, peers=tuple(replace(each, node=each.node[0] + each.node[2]) for each in new.peers))
    links = {
        name: Link(index=index, name=name, up=True)
        for name, index in (("meshwire_wg1", 7), ("meshwire_wg0", 8))
    }
    desired = Desired(
        phase=Phase.ENFORCING,
        epoch=2,
        settings=Settings(SettingsFlags.STRICT, 9, 1420),
        devices=(old, new),
        addresses={
            ip_network("198.18.0.9/32"): AddressEntry(9, AddressFlags.HOST),
            ip_network("fd00::9/128"): AddressEntry(9, AddressFlags.HOST),
            ip_network("10.244.9.0/24"): AddressEntry(9, AddressFlags.POD),
        },
        redirects={
            1: Redirect("meshwire_wg0", key(11), when_proven=True),
            2: Redirect("meshwire_wg0", key(12), when_proven=True),
        },
        live_ids=frozenset({1}),
    )
    taken = {int(name[1:]): index for name, index in nodes.items()}
    return desired, Observed(links=links, datapath=Datapath({}, taken, None))


def test_a_node_is_looked_at_by_the_device_that_its_traffic_takes() -> None:
    found = health.find_pairs(*in_force(n1=8, n2=7))
    assert {(pair.device.name, pair.peer.public_key, pair.live) for pair in found} == {
        ("meshwire_wg0", key(11), True),
        ("meshwire_wg1", key(2), False),
    }


def test_who_is_reached_by_no_tunnel_is_not_looked_at() -> None:
    assert not health.find_pairs(*in_force())
    desired, observed = in_force(n1=8)
    assert not health.find_pairs(replace(desired, redirects={}), observed)


# What is sent, and what is done.


@pytest.mark.parametrize(
    ("source", "target"), [("198.18.0.9", "198.18.0.1"), ("fd00::9", "fd00::1")], ids=["IPv4", "IPv6"]
)
def test_a_question_is_an_echo_reply_that_nobody_forwards(source: str, target: str) -> None:
    one, other = ip_address(source), ip_address(target)
    packet = question(one, other)
    if one.version == 4:
        assert (packet[0], packet[8], packet[9], packet[20]) == (0x45, 1, 1, 0)
        assert int.from_bytes(packet[2:4]) == len(packet) == 28
        assert (packet[12:16], packet[16:20]) == (one.packed, other.packed)
        assert checksum(packet[:20]) == checksum(packet[20:]) == 0
    else:
        assert (packet[0], packet[6], packet[7], packet[40]) == (0x60, 58, 1, 129)
        assert int.from_bytes(packet[4:6]) == len(packet) - 40
        assert (packet[8:24], packet[24:40]) == (one.packed, other.packed)
        assert checksum(one.packed + other.packed + struct.pack("!II", 8, 58) + packet[40:]) == 0


def test_a_question_has_one_family() -> None:
    with pytest.raises(ValueError, match="two families"):
        question(ip_address("198.18.0.9"), ip_address("fd00::1"))


def test_a_peer_is_renewed_alone_and_with_all_it_had() -> None:
    made = device(peer(1), peer(2))
    action = plan.renew_peer(made, made.peers[0])
    gone, added = action.peers
    assert (gone.public_key, gone.remove) == (key(1), True)
    assert (added.public_key, added.endpoint, added.keepalive) == (key(1), endpoint(1), 25)
    assert set(added.gain) == made.peers[0].allowed_ips and set(added.pods) == made.peers[0].pods
    assert not action.fresh and action.private_key is None and not action.release
    text = uapi.format_change(action).decode()
    assert text.count("public_key=") == 2 and text.index("remove=true") < text.index("allowed_ip=")
    # What another is told of changes nothing else.
    reset = plan.reset_endpoint(made, made.peers[1])
    [change] = reset.peers
    assert (change.public_key, change.endpoint, change.gain, change.pods) == (key(2), endpoint(2), (), ())


def test_readings_of_a_userspace_device() -> None:
    lines = [
        "private_key=" + "11" * 32,
        "listen_port=51872",
        f"public_key={(1).to_bytes(32).hex()}",
        "endpoint=198.18.0.1:51872",
        "last_handshake_time_sec=1700000000",
        "last_handshake_time_nsec=500000000",
        "tx_bytes=5",
        "rx_bytes=4711",
        "allowed_ip=10.244.1.0/24",
        f"public_key={(2).to_bytes(32).hex()}",
        "rx_bytes=0",
    ]
    assert uapi.parse_readings(lines) == {
        key(1): Reading(4711, 1_700_000_000.5, endpoint(1)),
        key(2): Reading(),
    }


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def test_readings_of_a_kernel_device_whose_peer_is_cut_in_two() -> None:
    four = struct.pack("=H", 2) + (51872).to_bytes(2) + ip_address("198.18.0.1").packed + bytes(8)
    six = struct.pack("=H", 10) + (51872).to_bytes(2) + bytes(4) + ip_address("fd00::2").packed + bytes(4)

    def described(number: int, *attributes: bytes) -> bytes:
        return attribute(0x8000, attribute(1, number.to_bytes(32)) + b"".join(attributes))

    first = described(
        1,
        attribute(4, four),
        attribute(6, struct.pack("=qq", 1_700_000_000, 500_000_000)),
        attribute(7, struct.pack("=Q", 4711)),
        attribute(0x8009, bytes(64)),
    )
    rest = described(1, attribute(0x8009, bytes(64)))
    second = described(2, attribute(4, six), attribute(7, struct.pack("=Q", 148)))
    messages = [
        attribute(1, bytes(4)) + attribute(2, b"meshwire_wg1\0") + attribute(0x8008, first),
        attribute(2, b"meshwire_wg1\0") + attribute(0x8008, rest + second),
    ]
    assert wireguard.parse_readings(messages) == {
        key(1): Reading(4711, 1_700_000_000.5, endpoint(1)),
        key(2): Reading(148, 0.0, Endpoint(ip_address("fd00::2"), 51872)),
    }


# What the agent makes of it.


@dataclass
class StubKernel:
    readings: dict[PairKey, Reading] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    applied: list[plan.Action] = field(default_factory=list)
    deaf: bool = False

    def read_peers(self) -> dict[PairKey, Reading]:
        return self.readings

    def ask(self, device: str, packet: bytes) -> None:
        if self.deaf:
            raise PermissionError("no")
        self.asked.append(device)

    def apply(self, action: plan.Action) -> None:
        self.applied.append(action)


def test_an_agent_asks_tells_and_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 1000.0}
    monkeypatch.setattr("time.monotonic", lambda: clock["now"])
    kernel = StubKernel({("meshwire_wg0", key(11)): Reading(1, WALL, endpoint(11))})
    desired, observed = in_force(n1=8)
    watch = Pairs(kernel)
    assert watch.add_to(Status(unreachable_count=7)).unreachable_count == 7
    news = []
    for _ in range(30):
        news.append(watch.look(desired, observed, ()))
        clock["now"] += 1
    [died] = [each for each in news if each.changed]
    [event] = died.events("n9", "u")
    assert event.warning and event.reason == "PairDead" and "n1 (SessionExpired since" in event.note
    status = watch.add_to(Status())
    assert [each.node for each in status.unreachable] == ["n1"] and status.unreachable_count == 1
    assert set(kernel.asked) == {"meshwire_wg0"} and len(kernel.asked) >= 3
    assert len(kernel.applied) == 1 and watch.counts.repairs[Repair.RENEW] == 1
    assert watch.counts.states[State.DEAD] == watch.counts.dead == 1

    kernel.readings = {("meshwire_wg0", key(11)): Reading(92, WALL + 5, endpoint(11))}
    back = watch.look(desired, observed, ())
    [event] = back.events("n9", "u")
    assert not event.warning and event.reason == "PairRecovered"
    assert watch.add_to(status).unreachable == () and watch.counts.repair.count == 1
    # A peer that is gone from its device is for the loop to bring back.
    kernel.readings = {}
    assert watch.look(desired, observed, ()).lost
    # Encryption is off: nobody is waited for.
    assert not watch.look(Desired(phase=Phase.OFF), observed, ()).lost
    assert watch.counts.states[State.HEALTHY] == 0


def test_a_deaf_device_is_made_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 1000.0}
    monkeypatch.setattr("time.monotonic", lambda: clock["now"])
    kernel = StubKernel({("meshwire_wg0", key(n)): Reading(1, WALL, endpoint(n)) for n in (11, 12)})
    desired, observed = in_force(n1=8, n2=8)
    watch = Pairs(kernel)
    for _ in range(400):
        watch.look(desired, observed, ())
        clock["now"] += 1
    resets = [n for n, each in enumerate(kernel.applied) if isinstance(each, plan.DeleteDevice)]
    # Only n1 is live, and it was renewed once before.
    assert len(resets) == watch.counts.repairs[Repair.DEVICE] == 1
    assert [str(each).split(":")[0] for each in kernel.applied[: resets[0]]] == ["configure meshwire_wg0"]
    for _ in range(600):
        watch.look(desired, observed, ())
        clock["now"] += 1
    assert watch.counts.repairs[Repair.DEVICE] == 2


def test_an_agent_that_can_not_ask_judges_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = {"now": 1000.0}
    monkeypatch.setattr("time.monotonic", lambda: clock["now"])
    kernel = StubKernel({("meshwire_wg0", key(11)): Reading(1)}, deaf=True)
    watch = Pairs(kernel)
    for _ in range(100):
        assert not watch.look(*in_force(n1=8), ()).changed
        clock["now"] += 1
    assert not kernel.applied
    assert len([each for each in caplog.records if "can't ask" in each.message]) == 1


def test_a_status_names_a_bounded_number() -> None:
    many = {f"n{n}": Unreachable(node=f"n{n}", since="x", reason="NoAnswer") for n in range(99)}
    assert len(health.listed(many)) == MAX_UNREACHABLE
