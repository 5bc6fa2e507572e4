"""The operator against an API server that is always a little ahead of what the operator has seen, nodes
that come, go, die and lie idle, and a leader that crashes between any two writes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from itertools import combinations
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshwire.api import names
from meshwire.api.conditions import Condition
from meshwire.api.meshconfig import Encryption, MeshConfig
from meshwire.api.meshnode import Key, MeshNode, Phase, Revoked, Status
from meshwire.api.meshstatus import MeshStatus
from meshwire.operator.objects import Config, EpochSecret, KeySecret, Node
from meshwire.operator.reconcile import (
    Action,
    AdoptSecret,
    CreateMeshNode,
    DeleteEpochSecret,
    DeleteMeshNode,
    DeleteSecret,
    Inputs,
    IssueKey,
    LiftTaint,
    MakeEpochSecret,
    PatchSpec,
    WithdrawKeys,
    WriteConfigStatus,
    WriteStatus,
    reconcile,
)
from meshwire.operator.store import Overlay

NODES = ("a", "b", "c", "d")
KINDS = ("nodes", "mesh_nodes", "secrets", "epoch_secrets", "configs", "statuses")
START = datetime(2026, 1, 1, tzinfo=UTC)
SUCCESSORS = {
    Phase.OFF: {Phase.ENABLING, Phase.ENFORCING},
    Phase.ENABLING: {Phase.ENFORCING, Phase.DISABLING},
    Phase.ENFORCING: {Phase.DISABLING},
    Phase.DISABLING: {Phase.DRAINING},
    Phase.DRAINING: {Phase.OFF},
}


class Conflict(Exception):
    """What the API server answers with 404 or 409."""


def public_key(number: int) -> str:
    """Canonical base64 that stands for a key."""
    return f"{number:042d}".replace(" ", "0") + "A="


@dataclass
class Agent:
    """A node's datapath as it is (`strict`, `active`), and what its agent has read."""

    generation: int = 0
    epoch: int = 0
    phase: Phase = Phase.OFF
    strict: bool = False
    active: int = 0
    retiring: int = 0
    unreached: frozenset[int] = frozenset()
    peers: int = 0
    known: dict[str, frozenset[str]] = field(default_factory=dict)
    revoked: frozenset[Revoked] = frozenset()
    sealing_key: str = ""


@dataclass
class Server:
    """Every version there ever was of each kind, by name."""

    history: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {kind: [{}] for kind in KINDS})
    version: int = 0

    def now(self, kind: str) -> dict[str, Any]:
        return self.history[kind][-1]

    def write(self, kind: str, item: Any) -> Any:
        self.version += 1
        item = replace(item, resource_version=str(self.version))
        self.history[kind].append({**self.now(kind), item.name: item})
        return item

    def remove(self, kind: str, name: str) -> None:
        self.version += 1
        self.history[kind].append({key: item for key, item in self.now(kind).items() if key != name})


class OperatorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.seen = dict.fromkeys(KINDS, 0)
        self.overlays: dict[str, Overlay[Any]] = {kind: Overlay() for kind in KINDS}
        self.agents: dict[str, Agent] = {}
        self.clock = START
        self.serial = 0
        self.recent_ids: list[int] = []
        self.reported: dict[int, set[str]] = defaultdict(set)
        self.highest_ordered = 0
        self.ended: set[int] = set()
        self.requests = 0
        self.preshared = True
        self.secret_deleted = False
        self.relist()

    # What happens to the cluster.

    @initialize(rounds=st.integers(0, 8), enabled=st.booleans())
    def begin(self, rounds: int, enabled: bool) -> None:
        """So many undisturbed rounds on the way to Enforcing."""
        for name in NODES[:3]:
            self.add_node(name, 0)
        self.configure(True)
        for _ in range(rounds):
            self.everything_is_seen_and_written()
            self.agents_work(set(NODES), True, True)
        self.configure(enabled)

    @rule(name=st.sampled_from(NODES), shift=st.integers(0, 2))
    def add_node(self, name: str, shift: int) -> None:
        """`shift` lets nodes come with the addresses of another."""
        if name in self.server.now("nodes"):
            return
        number = NODES.index(name) + 1 + shift
        self.clock += timedelta(seconds=1)
        self.serial += 1
        self.server.write(
            "nodes",
            Node(
                name=name,
                uid=f"node-{self.serial}",
                created=self.clock.isoformat(),
                live=True,
                tainted=True,
                addresses=(ip_address(f"192.0.2.{number}"),),
                pod_cidrs=(ip_network(f"10.0.{number}.0/24"),),
            ),
        )
        self.agents[name] = Agent(sealing_key=public_key(10_000 + self.serial))

    @rule(name=st.sampled_from(NODES))
    def remove_node(self, name: str) -> None:
        if name in self.server.now("nodes"):
            self.server.remove("nodes", name)
            self.agents.pop(name)

    @rule(name=st.sampled_from(NODES), live=st.booleans())
    def change_liveness(self, name: str, live: bool) -> None:
        node = self.server.now("nodes").get(name)
        if node and node.live != live:
            self.server.write("nodes", replace(node, live=live))

    @rule(seconds=st.sampled_from((1, 30, 120)))
    def time_passes(self, seconds: int) -> None:
        self.clock += timedelta(seconds=seconds)

    @rule()
    def ask_for_new_keys(self) -> None:
        self.requests += 1
        old = self.server.now("configs").get(names.CONFIG_NAME)
        self.configure(bool(old and old.config.encryption.enabled))

    @rule(wanted=st.booleans())
    def change_preshared_keys(self, wanted: bool) -> None:
        self.preshared = wanted
        old = self.server.now("configs").get(names.CONFIG_NAME)
        self.configure(bool(old and old.config.encryption.enabled))

    @property
    def is_calm(self) -> bool:
        """No keys are made or changed, or will be for what was asked."""
        nodes = self.server.now("mesh_nodes").values()
        return not self.requests and all(
            node.spec.phase is Phase.ENFORCING and node.spec.keys and not node.spec.retiring
            for node in nodes
        )

    # Lost while nodes still wait for keys of the epoch, it holds them up until encryption is turned off and
    # on, as the docs say.
    @precondition(lambda self: self.server.now("epoch_secrets") and self.is_calm)
    @rule()
    def delete_epoch_secrets_by_hand(self) -> None:
        """Nobody watches them: it is found out by the next list."""
        for name in self.server.now("epoch_secrets"):
            self.server.remove("epoch_secrets", name)
        self.secret_deleted = True

    @rule(enabled=st.booleans())
    def configure(self, enabled: bool) -> None:
        old = self.server.now("configs").get(names.CONFIG_NAME)
        generation = old.generation + 1 if old else 1
        rotate = str(self.requests) if self.requests else ""
        config = MeshConfig(
            generation=generation,
            encryption=Encryption(enabled=enabled, preshared_keys=self.preshared),
            rotate=rotate,
        )
        self.server.write(
            "configs",
            Config(uid="config", resource_version="", generation=generation, config=config),
        )

    @rule(name=st.sampled_from(NODES))
    def reinstall_host(self, name: str) -> None:
        if name in self.agents:
            self.serial += 1
            self.agents[name] = Agent(sealing_key=public_key(10_000 + self.serial))

    @rule(name=st.sampled_from(NODES))
    def delete_mesh_node_by_hand(self, name: str) -> None:
        if name in self.server.now("mesh_nodes"):
            self.server.remove("mesh_nodes", name)

    @precondition(lambda self: not self.secret_deleted)
    @rule(name=st.sampled_from(NODES))
    def delete_secret_by_hand(self, name: str) -> None:
        if name in self.server.now("secrets"):
            self.server.remove("secrets", name)

    @rule(name=st.sampled_from(NODES), quarantined=st.booleans())
    def quarantine(self, name: str, quarantined: bool) -> None:
        """As people do, whatever else is going on."""
        node = self.server.now("mesh_nodes").get(name)
        if node and node.spec.quarantined is not quarantined:
            spec = replace(node.spec, quarantined=quarantined)
            self.server.write("mesh_nodes", replace(node, spec=spec, generation=node.generation + 1))

    @rule(name=st.sampled_from(NODES), prompt=st.sets(st.sampled_from(NODES)), rounds=st.integers(0, 3))
    def a_quarantine_passes(self, name: str, prompt: set[str], rounds: int) -> None:
        """Sooner than all have heard of it."""
        self.quarantine(name, True)
        for _ in range(rounds):
            self.everything_is_seen_and_written()
            self.agents_work(prompt, True, True)
        self.quarantine(name, False)
        for _ in range(3):
            self.everything_is_seen_and_written()

    @rule(name=st.sampled_from(NODES), able=st.booleans(), reaches=st.booleans())
    def agent_acts(self, name: str, able: bool = True, reaches: bool = True) -> None:
        """Reads its orders and, if it is able to, carries them out; `reaches`: the handshakes with all
        peers are proven."""
        agent, node = self.agents.get(name), self.server.now("mesh_nodes").get(name)
        if agent is None or node is None:
            return
        agent.generation, agent.phase, agent.epoch = node.generation, node.spec.phase, node.spec.epoch
        agent.retiring = node.spec.retiring
        if not able:
            return
        agent.strict = agent.phase is Phase.ENFORCING
        others = [peer for peer in self.server.now("mesh_nodes").values() if peer.name != name]
        peers = [peer for peer in others if not peer.spec.is_out]
        agent.peers = sum(1 for peer in peers if peer.spec.public_key(agent.epoch))
        agent.known = {
            peer.name: frozenset(key.public_key for key in peer.spec.keys)
            for peer in peers
            if not node.spec.is_out and node.spec.keys
        }
        agent.revoked = frozenset(
            Revoked(peer.spec.id, peer.spec.revocation) for peer in others if peer.spec.revocation
        )
        has_key = node.spec.public_key(agent.epoch) is not None and not node.spec.is_out
        if node.spec.is_out:
            agent.active = 0
        if agent.phase in (Phase.OFF, Phase.DRAINING):
            agent.active = 0
        elif agent.phase in (Phase.ENABLING, Phase.ENFORCING):
            if has_key and reaches:
                agent.active = agent.epoch
            elif agent.active != agent.epoch and not node.spec.public_key(agent.active):
                agent.active = 0
        # By the new keys goes what had a handshake; a peer that has only the old ones is left behind.
        agent.unreached = frozenset(
            peer.spec.id
            for peer in peers
            if agent.retiring
            and not node.spec.is_out
            and node.spec.public_key(agent.retiring)
            and peer.spec.public_key(agent.retiring)
            and not (peer.spec.public_key(agent.epoch) and agent.active == agent.epoch)
        )

    @rule(name=st.sampled_from(NODES))
    def agent_reports(self, name: str) -> None:
        agent, node = self.agents.get(name), self.server.now("mesh_nodes").get(name)
        if agent is None or node is None or (agent.generation and agent.generation > node.generation):
            return
        if agent.active:
            self.reported[agent.active].add(name)
        ready = agent.phase is Phase.OFF or agent.active == agent.epoch
        self.server.write(
            "mesh_nodes",
            replace(
                node,
                status=Status(
                    observed_generation=agent.generation,
                    sealing_key=agent.sealing_key,
                    active_epoch=agent.active,
                    prepared_epoch=agent.active,
                    unreached=tuple(sorted(agent.unreached)),
                    revoked=tuple(sorted(agent.revoked)),
                    strict=agent.strict,
                    peers=agent.peers,
                    conditions=(
                        Condition(
                            type="Ready",
                            status=ready,
                            reason="Ready" if ready else "Preparing",
                            observed_generation=agent.generation,
                            since="2026-01-01T00:00:00Z",
                        ),
                    ),
                ),
            ),
        )

    @rule()
    def garbage_is_collected(self) -> None:
        owners = {node.uid for node in self.server.now("mesh_nodes").values()}
        for name, secret in self.server.now("secrets").items():
            if secret.owner not in owners:
                self.server.remove("secrets", name)

    # What the operator sees and does.

    @rule(kind=st.sampled_from(KINDS), versions=st.integers(1, 5))
    def watch_brings_news(self, kind: str, versions: int) -> None:
        for _ in range(versions):
            if self.seen[kind] == len(self.server.history[kind]) - 1:
                return
            before = self.watched(kind)
            self.seen[kind] += 1
            for name in before.keys() - self.watched(kind).keys():
                self.overlays[kind].deletion_seen(name, before[name].uid)

    @rule()
    def another_leader_takes_over(self) -> None:
        """It has watches of its own, as late as they like, and lists everything once."""
        self.overlays = {kind: Overlay() for kind in KINDS}
        self.recent_ids = []
        self.relist()

    @rule()
    def everything_is_seen_and_written(self) -> None:
        for kind in KINDS:
            self.watch_brings_news(kind, len(self.server.history[kind]))
        inputs = self.inputs()
        for action in reconcile(inputs).actions:
            self.try_to(action, inputs)

    @rule(names=st.sets(st.sampled_from(NODES)), able=st.booleans(), report=st.booleans())
    def agents_work(self, names: set[str], able: bool, report: bool) -> None:
        for name in sorted(names):
            self.agent_acts(name, able)
            if report:
                self.agent_reports(name)

    @rule(writes=st.integers(0, 6), order=st.randoms(use_true_random=False))
    def look_and_write(self, writes: int, order: Any) -> None:
        """One round, cut short after some writes, in any order."""
        inputs = self.inputs()
        actions = list(reconcile(inputs).actions)
        order.shuffle(actions)
        for action in actions[:writes]:
            self.try_to(action, inputs)

    def relist(self) -> None:
        for kind in ("secrets", "epoch_secrets", "mesh_nodes", "nodes", "configs", "statuses"):
            self.overlays[kind].listed(
                self.server.now(kind).values(), self.watched(kind), str(self.server.version)
            )

    def watched(self, kind: str) -> dict[str, Any]:
        return self.server.history[kind][self.seen[kind]]

    def inputs(self) -> Inputs:
        view = {kind: self.overlays[kind].over(self.watched(kind)) for kind in KINDS}
        return Inputs(
            nodes=view["nodes"],
            mesh_nodes=view["mesh_nodes"],
            secrets=view["secrets"],
            epoch_secrets=view["epoch_secrets"],
            config=view["configs"].get(names.CONFIG_NAME),
            status=view["statuses"].get(names.STATUS_NAME),
            found_cidrs=(ip_network("10.0.0.0/16"),),
            recent_ids=tuple(self.recent_ids),
            now=self.clock,
        )

    def try_to(self, action: Action, inputs: Inputs) -> None:
        try:
            self.apply(action, inputs)
        except Conflict:
            self.relist()

    def apply(self, action: Action, inputs: Inputs) -> None:
        """As the API server would: writes to what has changed since are refused."""
        mesh_nodes, secrets = self.server.now("mesh_nodes"), self.server.now("secrets")
        match action:
            case CreateMeshNode():
                if action.node in mesh_nodes:
                    raise Conflict
                self.serial += 1
                self.clock += timedelta(seconds=1)
                created = MeshNode(
                    name=action.node,
                    uid=f"mesh-{self.serial}",
                    owner=action.owner,
                    generation=1,
                    created=self.clock.isoformat(),
                    spec=action.spec,
                )
                self.check_order(None, created, inputs)
                self.wrote("mesh_nodes", created)
            case PatchSpec():
                old = mesh_nodes.get(action.node)
                if old is None or old.resource_version != action.resource_version:
                    raise Conflict
                new = replace(old, spec=action.spec, generation=old.generation + 1)
                self.check_order(old, new, inputs)
                self.wrote("mesh_nodes", new)
            case DeleteMeshNode():
                node = self.server.now("nodes").get(action.node)
                if node and node.uid == action.owner:
                    raise Conflict
                if action.node in mesh_nodes and mesh_nodes[action.node].uid == action.uid:
                    self.recent_ids.append(mesh_nodes[action.node].spec.id)
                    self.server.remove("mesh_nodes", action.node)
                self.overlays["mesh_nodes"].deleted(action.node, action.uid)
            case IssueKey():
                self.issue_key(action, secrets.get(action.node))
            case MakeEpochSecret():
                found = self.server.now("epoch_secrets").get(str(action.epoch))
                if found is None:
                    assert not self.digests(action.epoch) or self.secret_deleted, (
                        "a second secret for an epoch, or one for an epoch that is without"
                    )
                    self.serial += 1
                    made = EpochSecret(
                        epoch=action.epoch, uid=f"epoch-{self.serial}", digest=public_key(self.serial)
                    )
                    self.wrote("epoch_secrets", made)
                else:
                    self.overlays["epoch_secrets"].wrote(found)
            case DeleteEpochSecret():
                epoch = action.secret.epoch
                assert not any(
                    node.spec.public_key(epoch)
                    or (node.spec.phase is not Phase.OFF and node.spec.epoch == epoch)
                    for node in mesh_nodes.values()
                ), "the secret of an epoch in use is deleted"
                kept = self.server.now("epoch_secrets").get(action.secret.name)
                if kept and kept.uid == action.secret.uid:
                    self.server.remove("epoch_secrets", action.secret.name)
                self.overlays["epoch_secrets"].deleted(action.secret.name, action.secret.uid)
            case WithdrawKeys():
                found = secrets.get(action.secret.node)
                if found is None or found.resource_version != action.secret.resource_version:
                    raise Conflict
                published = {key.epoch for key in mesh_nodes[found.node].spec.keys}
                assert not published & set(action.epochs), "a key that is still published is withdrawn"
                left = tuple(key for key in found.keys if key.epoch not in action.epochs)
                self.wrote("secrets", replace(found, keys=left))
            case AdoptSecret():
                found = secrets.get(action.secret.node)
                if found is None or found.resource_version != action.secret.resource_version:
                    raise Conflict
                self.wrote("secrets", replace(found, owner=action.owner))
            case DeleteSecret():
                name = action.secret.node
                spec = mesh_nodes[name].spec if name in mesh_nodes else None
                if spec and spec.phase is not Phase.OFF and not spec.revocation:
                    raise Conflict
                if name in secrets and secrets[name].uid == action.secret.uid:
                    self.server.remove("secrets", name)
                self.overlays["secrets"].deleted(name, action.secret.uid)
            case LiftTaint():
                node = self.server.now("nodes").get(action.node)
                if node is None:
                    raise Conflict
                self.wrote("nodes", replace(node, tainted=False))
            case WriteConfigStatus():
                config = self.server.now("configs").get(names.CONFIG_NAME)
                if config is None or config.resource_version != action.resource_version:
                    raise Conflict
                self.wrote("configs", replace(config, conditions=action.conditions))
            case WriteStatus():
                status = self.server.now("statuses").get(names.STATUS_NAME)
                if (status is None) is not action.create or (
                    status and status.resource_version != action.status.resource_version
                ):
                    raise Conflict
                self.wrote("statuses", action.status)

    def issue_key(self, action: IssueKey, found: KeySecret | None) -> None:
        if (found is None) is not (action.secret is None) or (
            found and action.secret and found.resource_version != action.secret.resource_version
        ):
            raise Conflict
        assert action.epoch not in self.ended, "a key for an epoch that had ended"
        if action.secret_digest:
            epoch_secret = self.server.now("epoch_secrets").get(str(action.epoch))
            if epoch_secret is None or epoch_secret.digest != action.secret_digest:
                raise Conflict
        self.serial += 1
        self.wrote(
            "secrets",
            KeySecret(
                node=action.node,
                uid=found.uid if found else f"secret-{self.serial}",
                owner=action.owner,
                sealed_to=action.sealing_key,
                keys=(
                    *(key for key in (found.keys if found else ()) if key.epoch == action.beside),
                    Key(
                        epoch=action.epoch,
                        public_key=public_key(self.serial),
                        secret_digest=action.secret_digest,
                    ),
                ),
            ),
        )

    def wrote(self, kind: str, item: Any) -> None:
        self.overlays[kind].wrote(self.server.write(kind, item))

    def digests(self, epoch: int) -> set[str]:
        """Of all keys of the epoch that are in force, or on their way."""
        keys = [key for node in self.server.now("mesh_nodes").values() for key in node.spec.keys]
        keys += [key for secret in self.server.now("secrets").values() for key in secret.keys]
        return {key.secret_digest for key in keys if key.epoch == epoch}

    # What must hold.

    @invariant()
    def all_keys_of_an_epoch_go_by_one_secret_or_by_none(self) -> None:
        for epoch in {node.spec.epoch for node in self.server.now("mesh_nodes").values()}:
            assert len(self.digests(epoch)) < 2

    def check_order(self, old: MeshNode | None, new: MeshNode, inputs: Inputs) -> None:
        phase, epoch = new.spec.phase, new.spec.epoch
        others = [node for name, node in self.server.now("mesh_nodes").items() if name != new.name]
        live = [
            name
            for name, node in inputs.nodes.items()
            if node.live and name in inputs.mesh_nodes and not inputs.mesh_nodes[name].spec.is_out
        ]
        given = {(node.spec.phase, node.spec.epoch) for node in others}
        if old is not None:
            assert phase in {old.spec.phase, *SUCCESSORS[old.spec.phase]}, "a phase was skipped"
            assert epoch >= old.spec.epoch, "an epoch went back"
            if old.spec.keys and not new.spec.keys:
                kept = self.server.now("secrets").get(new.name)
                is_stolen = kept is not None and kept.sealed_to != old.status.sealing_key
                assert (
                    phase is Phase.OFF
                    or is_stolen
                    or new.spec.revocation
                    or kept is None
                    or kept.public_key(epoch) is None
                ), "a key withdrawn early"
            assert new.spec.quarantined is old.spec.quarantined, "only people quarantine"
            assert not (new.spec.keys and new.spec.is_out), "keys in quarantine"
            if old.spec.revocation and not new.spec.revocation:
                assert not old.spec.quarantined
                for name in live:
                    agent = self.agents.get(name)
                    assert agent is None or not agent.known.get(new.name), (
                        f"{name} still has {new.name}'s old keys when it may get new ones"
                    )
        if phase is not Phase.OFF and epoch > self.highest_ordered:
            if phase is not Phase.ENABLING:
                assert new.spec.retiring, "an epoch begins with Enabling or a rotation"
                assert phase is Phase.ENFORCING, "a rotation begins in Enforcing"
                assert old is None or old.spec.phase is Phase.ENFORCING, "a rotation begins in Enforcing"
                assert {node.spec.epoch for node in others if node.spec.phase is not Phase.OFF} <= {
                    new.spec.retiring
                }, "a rotation begins before the one before has ended"
            self.highest_ordered = epoch
        assert not new.spec.retiring or (epoch - new.spec.retiring) % 2, "two epochs on one device"
        if old is not None and old.spec.retiring and old.spec.epoch == epoch and not new.spec.retiring:
            self.check_retirement(old, phase, others, live, inputs)
        if phase is not Phase.OFF:
            assert epoch not in self.ended, "an epoch was used twice"
        if old is None or (phase, epoch) == (old.spec.phase, old.spec.epoch) or (phase, epoch) in given:
            return
        # The first order of this phase: what it waits for must really be so.
        agents = {name: self.agents[name] for name in live if name in self.agents}
        match phase:
            case Phase.ENFORCING if old.spec.phase is Phase.ENABLING:
                assert live, "nobody was asked"
                assert self.reported[epoch] >= set(agents), "Enforcing before every live node had moved"
            case Phase.DRAINING:
                assert live, "nobody was asked"
                told = [name for name in agents if inputs.mesh_nodes[name].spec.phase is not Phase.OFF]
                assert not any(agents[name].strict for name in told), "Draining while a node still drops"
            case Phase.OFF if old.spec.phase is Phase.DRAINING:
                told = [name for name in agents if inputs.mesh_nodes[name].spec.phase is not Phase.OFF]
                assert not any(agents[name].active for name in told), (
                    "Off while a node still sends encrypted"
                )
                self.ended.add(epoch)

    def check_retirement(
        self, old: MeshNode, phase: Phase, others: list[MeshNode], live: list[str], inputs: Inputs
    ) -> None:
        """The first node is told that the old keys end: nobody may still send by them."""
        epoch, retiring = old.spec.epoch, old.spec.retiring
        told = {node.spec.retiring for node in others if node.spec.epoch == epoch}
        if phase is not Phase.ENFORCING or 0 in told:
            return
        assert live, "nobody was asked"
        for name in live:
            node = inputs.mesh_nodes[name]
            if node.spec.public_key(retiring):
                assert node.status.active_epoch == epoch, "the old keys end while a node sends by them"
                assert not set(node.status.unreached) & {inputs.mesh_nodes[peer].spec.id for peer in live}, (
                    "a live node is left behind"
                )

    @invariant()
    def no_two_nodes_share_anything(self) -> None:
        mesh_nodes = self.server.now("mesh_nodes").values()
        for one, other in combinations(mesh_nodes, 2):
            assert one.spec.id != other.spec.id
            assert not set(one.spec.addresses) & set(other.spec.addresses)
            assert not set(one.spec.pod_cidrs) & set(other.spec.pod_cidrs)
            assert not {key.public_key for key in one.spec.keys} & {
                key.public_key for key in other.spec.keys
            }

    @invariant()
    def nobody_sends_in_clear_what_another_may_drop(self) -> None:
        """All have left Enabling and Enforcing before anyone drains."""
        orders = {(node.spec.epoch, node.spec.phase) for node in self.server.now("mesh_nodes").values()}
        newest = max((epoch for epoch, _ in orders), default=0)
        phases = {phase for epoch, phase in orders if epoch == newest}
        assert Phase.DRAINING not in phases or not phases & {Phase.ENABLING, Phase.ENFORCING}

    @precondition(lambda self: any(node.live for node in self.server.now("nodes").values()))
    @rule()
    def left_in_peace_all_comes_right(self) -> None:
        mesh_nodes = self.server.now("mesh_nodes")
        live = [name for name, node in self.server.now("nodes").items() if node.live]
        if all(name in mesh_nodes and mesh_nodes[name].spec.quarantined for name in live):
            # With nobody left to ask, nothing goes on.
            self.quarantine(live[0], False)
        for _ in range(40):
            for kind in KINDS:
                self.watch_brings_news(kind, len(self.server.history[kind]))
            inputs = self.inputs()
            plan = reconcile(inputs)
            before = self.server.version
            self.clock += timedelta(seconds=30)
            for action in plan.actions:
                self.try_to(action, inputs)
            for name in self.agents:
                if self.server.now("nodes")[name].live:
                    old = self.server.now("mesh_nodes").get(name)
                    self.agent_acts(name)
                    agent = self.agents[name]
                    if old and (
                        (old.status.active_epoch, old.status.strict, old.status.observed_generation)
                        != (agent.active, agent.strict, agent.generation)
                        or set(old.status.unreached) != agent.unreached
                        or set(old.status.revoked) != agent.revoked
                        or (old.status.peers, old.status.sealing_key) != (agent.peers, agent.sealing_key)
                    ):
                        self.agent_reports(name)
            is_waiting = plan.look_again and plan.look_again < self.clock + timedelta(minutes=2)
            if not plan.actions and self.server.version == before and not is_waiting:
                break
        else:
            raise AssertionError(f"never at rest: {plan.actions}")
        config = self.server.now("configs").get(names.CONFIG_NAME)
        enabled = bool(config and config.config and config.config.encryption.enabled)
        nodes, mesh_nodes = self.server.now("nodes"), self.server.now("mesh_nodes")
        assert mesh_nodes.keys() == nodes.keys()
        assert {node.spec.phase for node in mesh_nodes.values()} == {
            Phase.ENFORCING if enabled else Phase.OFF
        }
        secrets = self.server.now("secrets")
        out = {name for name, node in mesh_nodes.items() if node.spec.is_out}
        assert out == {name for name, node in mesh_nodes.items() if node.spec.quarantined}
        told = {each.node: each for each in self.server.now("statuses")[names.STATUS_NAME].quarantines}
        assert told.keys() == out
        for name in out:
            assert not mesh_nodes[name].spec.keys and name not in secrets
            assert told[name].revoked_at and not told[name].waiting
        if not enabled:
            assert not secrets
        else:
            members = {name for name, node in nodes.items() if node.live and name not in out}
            assert members <= secrets.keys()
            for name in members:
                epoch = mesh_nodes[name].spec.epoch
                assert mesh_nodes[name].spec.public_key(epoch) == secrets[name].public_key(epoch)
                assert secrets[name].sealed_to == self.agents[name].sealing_key
        status: MeshStatus = self.server.now("statuses")[names.STATUS_NAME]
        assert status.encryption == ("WireGuard" if enabled else "Off")
        assert status.epoch >= self.highest_ordered
        assert not any(node.spec.retiring for node in mesh_nodes.values()) and status.rotation is None
        assert not enabled or not self.requests or status.handled_request == str(self.requests)
        for name, secret in secrets.items():
            assert {key.epoch for key in secret.keys} <= {mesh_nodes[name].spec.epoch}, "old keys are left"
        epochs = {node.spec.epoch for node in mesh_nodes.values()} if enabled else set()
        for each in self.server.now("epoch_secrets").values():
            assert each.epoch in epochs, "an old epoch secret is left"
            assert self.digests(each.epoch) <= {"", each.digest}


TestOperatorMachine = OperatorMachine.TestCase
TestOperatorMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def enforcing() -> OperatorMachine:
    """Three nodes that encrypt with epoch 1."""
    machine = OperatorMachine()
    machine.begin(8, True)
    machine.left_in_peace_all_comes_right()
    return machine


def epoch_of(machine: OperatorMachine) -> int:
    [epoch] = {node.spec.epoch for node in machine.server.now("mesh_nodes").values()}
    return int(epoch)


def test_a_lost_epoch_secret_is_followed_by_another_epoch_and_never_by_another_secret() -> None:
    machine = enforcing()
    [before] = machine.digests(1)
    machine.delete_epoch_secrets_by_hand()
    machine.add_node("d", 0)
    machine.relist()
    machine.everything_is_seen_and_written()
    machine.agents_work(set(NODES), True, True)
    machine.everything_is_seen_and_written()
    assert machine.digests(1) == {before}, "who joins waits"
    machine.left_in_peace_all_comes_right()
    assert epoch_of(machine) == 2 and len(machine.server.now("secrets")) == 4
    [after] = machine.digests(2)
    assert after not in ("", before)


def test_preshared_keys_come_and_go_with_the_next_keys() -> None:
    machine = enforcing()
    [with_secret] = machine.digests(1)
    assert with_secret
    machine.change_preshared_keys(False)
    machine.reinstall_host("a")
    machine.left_in_peace_all_comes_right()
    assert epoch_of(machine) == 1 and machine.digests(1) == {with_secret}, "the setting is the next epoch's"
    machine.ask_for_new_keys()
    machine.left_in_peace_all_comes_right()
    assert epoch_of(machine) == 2 and machine.digests(2) == {""}
    assert not machine.server.now("epoch_secrets")
    machine.change_preshared_keys(True)
    machine.left_in_peace_all_comes_right()
    assert machine.digests(2) == {""}
    machine.ask_for_new_keys()
    machine.left_in_peace_all_comes_right()
    assert machine.digests(3) == {each.digest for each in machine.server.now("epoch_secrets").values()}
    machine.configure(False)
    machine.left_in_peace_all_comes_right()
    assert not machine.server.now("epoch_secrets")


def test_a_node_whose_secret_was_tampered_with_gets_a_new_key() -> None:
    machine = enforcing()
    before = machine.server.now("secrets")["a"]
    [key] = before.keys
    machine.server.write("secrets", replace(before, keys=(replace(key, secret_digest=""),)))
    for _ in range(6):
        # What the API server refuses, for a key's digest is settled, is not even tried for long.
        machine.everything_is_seen_and_written()
    [after] = machine.server.now("secrets")["a"].keys
    assert after.secret_digest == key.secret_digest and after.public_key != key.public_key
    machine.left_in_peace_all_comes_right()
    assert epoch_of(machine) == 1
