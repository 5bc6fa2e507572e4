"""A pair of nodes whose tunnel dies in silence, in several ways: found, shown, repaired alone, while traffic
of the other pairs loses nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from click.testing import CliRunner

from meshwire.api.names import device_name
from meshwire.cli.__main__ import main
from meshwire.encryption import health
from meshwire.lab.exercise import Exercise, Flows
from meshwire.lab.model import PATIENCE

PACE = health.pace(2)
DETECT = PACE.detection + 5
"""Seconds that finding out may take, and telling the API server, on a busy machine."""
NOWHERE = "198.18.0.250:51871"


@dataclass(frozen=True)
class Ends:
    """Node `here` and its peer `there`, as WireGuard knows it."""

    exercise: Exercise
    here: str
    there: str

    @property
    def device(self) -> str:
        return device_name(self.exercise.mesh_status()["epoch"])

    @property
    def key(self) -> str:
        [key] = self.exercise.mesh_node(self.there)["spec"]["keys"]
        return str(key["publicKey"])

    def wg(self, *arguments: str) -> None:
        self.exercise.lab.on_node(self.here, "wg", "set", self.device, "peer", self.key, *arguments)

    def field(self, name: str) -> str:
        """Of `wg show DEVICE NAME`, the peer's."""
        shown = self.exercise.lab.on_node(self.here, "wg", "show", self.device, name).stdout
        return next(line.split("\t", 1)[1] for line in shown.splitlines() if line.startswith(self.key))

    @property
    def unreachable(self) -> list[str]:
        """Who `here` says is dead."""
        found = self.exercise.mesh_node(self.here)["status"].get("unreachable", [])
        return [each["node"] for each in found]

    @property
    def answers(self) -> bool:
        target = self.exercise.probe(self.there).addresses[0]
        return bool(self.exercise.run(self.here, "ask", target)["complete"])


def ends(exercise: Exercise, here: str, there: str) -> tuple[Ends, Ends]:
    return Ends(exercise, here, there), Ends(exercise, there, here)


def matrix(exercise: Exercise) -> dict[str, Any]:
    """What `meshwire status --matrix` shows."""
    result = CliRunner().invoke(
        main, ["status", "--matrix", "-o", "json", "--kubeconfig", str(exercise.lab.kubeconfig)]
    )
    found: dict[str, Any] = json.loads(result.stdout)["matrix"]
    return found


def pairs_healthy(exercise: Exercise) -> dict[str, str]:
    found = [each for each in exercise.mesh_status()["conditions"] if each["type"] == "PairsHealthy"]
    return dict(found[0]) if found else {"status": ""}


def within(seconds: float, done: Callable[[], bool], what: str) -> float:
    """Seconds it took."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds * PATIENCE, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.2)
    return time.monotonic() - began


@contextmanager
def others_lose_nothing(exercise: Exercise, *nodes: str) -> Iterator[Flows]:
    """Traffic of all pairs but the one between two nodes."""
    [third] = [node for node in exercise.lab.nodes if node not in nodes]
    more = {third: [address for node in nodes for address in exercise.probe(node).addresses]}
    with exercise.flows(nodes=[third], more=more) as flows:
        yield flows
    assert flows.packets > 1000
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)


def test_keys_that_no_longer_fit_are_found_and_the_peer_renewed(encrypted: Exercise) -> None:
    one, other = ends(encrypted, "node1", "node2")
    encrypted.wait_until(lambda: one.answers and other.answers, "the pair works")
    kept = one.field("preshared-keys")
    endpoint, allowed = one.field("endpoints"), one.field("allowed-ips")
    with others_lose_nothing(encrypted, "node1", "node2"):
        # All that the API knows stays as it is; first messages of handshakes still get through, and count.
        encrypted.lab.on_node(
            "node1",
            "sh",
            "-c",
            f"wg genpsk | wg set {one.device} peer {one.key} remove peer {one.key} preshared-key /dev/stdin"
            f" endpoint {endpoint} allowed-ips {allowed.replace(' ', ',')} persistent-keepalive 25",
        )
        broken = time.monotonic()
        assert not one.answers
        # Whatever makes the agent look at its devices meanwhile shows it the key, and nobody is missed.
        found = within(DETECT, lambda: "node2" in one.unreachable or one.answers, "node1 misses node2")
        repaired = within(30, lambda: one.answers, "node1 reaches node2 again")
        total = time.monotonic() - broken
        within(30, lambda: not one.unreachable and not other.unreachable, "nobody is missed")
    print(f"detected after {found:.1f} s, repaired {repaired:.1f} s later, {total:.1f} s in all")
    assert one.field("preshared-keys") == kept


def test_a_wrong_endpoint_heals_by_what_the_peer_sends(encrypted: Exercise) -> None:
    one, other = ends(encrypted, "node1", "node2")
    encrypted.wait_until(lambda: one.answers and other.answers, "the pair works")
    right = one.field("endpoints")
    one.wg("endpoint", NOWHERE)
    healed = within(DETECT, lambda: one.field("endpoints") == right and one.answers, "node1 knows better")
    print(f"one wrong endpoint: right again after {healed:.1f} s")


def test_wrong_endpoints_at_both_ends_are_set_anew(encrypted: Exercise) -> None:
    one, other = ends(encrypted, "node1", "node2")
    encrypted.wait_until(lambda: one.answers and other.answers, "the pair works")
    with others_lose_nothing(encrypted, "node1", "node2"):
        began = time.monotonic()

        def misled() -> bool:
            for end in (one, other):
                end.wg("endpoint", NOWHERE)
            return all(end.field("endpoints") == NOWHERE for end in (one, other))

        # What is on its way to one end puts it right.
        encrypted.wait_until(misled, "both ends send into the void")
        took = within(DETECT + 15, lambda: one.answers and other.answers, "the pair works again")
    print(f"two wrong endpoints: right again after {took:.1f} s, {time.monotonic() - began:.1f} s in all")


def test_a_blocked_pair_is_shown_and_comes_back_alone(encrypted: Exercise) -> None:
    lab = encrypted.lab
    one, other = ends(encrypted, "node1", "node2")
    encrypted.wait_until(lambda: one.answers and other.answers, "the pair works")
    address = one.field("endpoints").rpartition(":")[0]
    rules = (
        "add table inet block",
        "add chain inet block out { type filter hook output priority 0; }",
        "add chain inet block in { type filter hook input priority 0; }",
        f"add rule inet block out ip daddr {address} udp dport 51871-51872 drop",
        f"add rule inet block in ip saddr {address} udp dport 51871-51872 drop",
    )
    with others_lose_nothing(encrypted, "node1", "node2"):
        lab.on_node("node1", "nft", "; ".join(rules))
        try:
            found = within(
                DETECT,
                lambda: one.unreachable == ["node2"] and other.unreachable == ["node1"],
                "both ends miss each other",
            )
            # Long enough for several repairs, none of which can help.
            time.sleep(20)
            assert one.unreachable == ["node2"] and other.unreachable == ["node1"]
            shown = matrix(encrypted)
            assert shown["pairs"] == {"answer": 4, "dead": 2, "unknown": 0}
            assert [(each["at"], each["from"]) for each in shown["dead"]] == [
                ("node1", "node2"),
                ("node2", "node1"),
            ]
            condition = pairs_healthy(encrypted)
            assert (condition["status"], condition["reason"]) == ("False", "PairsDead")
            assert "node1 hears nothing from node2 since" in condition["message"]
        finally:
            lab.on_node("node1", "nft", "delete table inet block")
        healed = within(60, lambda: one.answers and other.answers, "the pair works again")
        within(30, lambda: not one.unreachable and not other.unreachable, "nobody is missed")
    encrypted.wait_until(lambda: pairs_healthy(encrypted)["status"] == "True", "the mesh says so")
    assert matrix(encrypted)["pairs"] == {"answer": 6, "dead": 0, "unknown": 0}
    told = {
        (event["regarding"]["name"], event["reason"])
        for event in json.loads(lab.kubectl("get", "events.events.k8s.io", "-o", "json"))["items"]
    }
    assert {(node, what) for node in ("node1", "node2") for what in ("PairDead", "PairRecovered")} <= told
    print(f"blocked: found after {found:.1f} s; works {healed:.1f} s after the block is gone")


def test_a_peer_whose_agent_is_away_is_not_taken_for_dead(encrypted: Exercise) -> None:
    lab = encrypted.lab
    one, other = ends(encrypted, "node1", "node2")
    encrypted.wait_until(lambda: one.answers and other.answers, "the pair works")
    lab.stop_agent("node2", kill=True)
    try:
        before = one.field("transfer")
        deadline = time.monotonic() + PACE.detection + 10
        while time.monotonic() < deadline:
            assert not one.unreachable
            time.sleep(1)
        received = [int(text.split("\t")[0]) for text in (before, one.field("transfer"))]
        # A peer that was renewed would count from 0.
        assert received[1] > received[0]
    finally:
        lab.start_agent("node2")


def test_a_device_that_has_lost_its_sockets_is_made_anew(encrypted: Exercise) -> None:
    lab = encrypted.lab
    pairs = [each for there in ("node2", "node3") for each in ends(encrypted, "node1", there)]
    encrypted.wait_until(lambda: all(end.answers for end in pairs), "all pairs work")
    began = time.monotonic()
    with encrypted.flows(nodes=["node2", "node3"]) as flows:
        # WireGuard outside of the kernel takes the error for the end of its socket, and never reads again.
        lab.on_node("node1", "ss", "-K", "-u", "-a", "( sport = :51871 or sport = :51872 )")
        within(DETECT, lambda: pairs[0].unreachable == ["node2", "node3"], "node1 hears nobody")
        found = time.monotonic() - began
        within(health.RETRIES[0] + 15, lambda: all(end.answers for end in pairs), "all pairs work again")
    print(f"deaf device: found after {found:.1f} s, all well after {time.monotonic() - began:.1f} s")
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)
