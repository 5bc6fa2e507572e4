"""Preshared keys from an epoch's secret to both ends of a tunnel, and nowhere else."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import nacl.encoding
import nacl.hash
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.public import PrivateKey
from pyroute2.netlink.generic.wireguard import wgmsg

from meshwire.api import names, preshared
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import Key, MeshNode, Phase, Spec
from meshwire.encryption import uapi, wireguard
from meshwire.encryption.desired import Inputs, desired, published_key
from meshwire.encryption.keys import KeyRefused, open_epoch_secret, public_key, read_held, write_held
from meshwire.encryption.model import (
    ClusterNode,
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
from meshwire.encryption.plan import ConfigureDevice, PeerChange, plan
from meshwire.encryption.report import is_prepared
from meshwire.kube.client import ApiError
from meshwire.kube.events import Event
from meshwire.operator import keys as operator_keys
from meshwire.operator.apply import Hands
from meshwire.operator.objects import EpochSecret, KeySecret
from meshwire.operator.reconcile import IssueKey, MakeEpochSecret, WithdrawKeys
from meshwire.operator.rounds import Outdated
from meshwire.operator.secrecy import Next, Secrecy, of_epoch
from meshwire.operator.world import World

SECRET = bytes(range(32))
A, B, C = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2, 3))
SECRETS = st.binary(min_size=32, max_size=32)
EPOCHS = st.integers(1, 2**40)


# Derivation.


def test_derivation_stays_as_it_is() -> None:
    """Nodes of different versions have to agree."""
    assert preshared.pair_key(SECRET, 7, A, B).hex() == (
        "cac3efb5f8dd9d655ca59a33e69ec92498837acd03c2c17b8171e1dd6b671b07"
    )
    assert preshared.digest(SECRET, 7) == "LqDQ9puY91yNHuSAApG9B3upfJvV/ExKBUdZxtnQMHE="


@given(SECRETS, EPOCHS)
def test_it_is_blake2b_as_libsodium_has_it(secret: bytes, epoch: int) -> None:
    def keyed(person: bytes, message: bytes) -> bytes:
        return nacl.hash.blake2b(message, 32, secret, b"", person, nacl.encoding.RawEncoder)

    message = epoch.to_bytes(8) + bytes([1]) * 32 + bytes([2]) * 32
    assert preshared.pair_key(secret, epoch, A, B) == keyed(b"meshwire pair", message)
    assert (
        preshared.digest(secret, epoch)
        == base64.b64encode(keyed(b"meshwire digest", epoch.to_bytes(8))).decode()
    )


@given(SECRETS, EPOCHS, *[st.binary(min_size=32, max_size=32)] * 3)
def test_each_pair_and_epoch_has_its_own_key_and_both_ends_the_same(
    secret: bytes, epoch: int, one: bytes, two: bytes, three: bytes
) -> None:
    a, b, c = (base64.b64encode(each).decode() for each in (one, two, three))
    if len({a, b, c}) < 3:
        with pytest.raises(ValueError, match="a pair"):
            preshared.pair_key(secret, epoch, a, a)
        return
    keys = [
        preshared.pair_key(secret, epoch, a, b),
        preshared.pair_key(secret, epoch, a, c),
        preshared.pair_key(secret, epoch, b, c),
        preshared.pair_key(secret, epoch + 1, a, b),
        preshared.pair_key(bytes([secret[0] ^ 1]) + secret[1:], epoch, a, b),
        base64.b64decode(preshared.digest(secret, epoch)),
        base64.b64decode(preshared.digest(secret, epoch + 1)),
        secret,
    ]
    assert len(set(keys)) == len(keys)
    assert preshared.pair_key(secret, epoch, b, a) == keys[0]


@pytest.mark.parametrize(("secret", "other"), [(b"", B), (bytes(31), B), (SECRET, "x"), (SECRET, "AAAA")])
def test_nothing_is_derived_from_less(secret: bytes, other: str) -> None:
    with pytest.raises(ValueError):
        preshared.pair_key(secret, 1, A, other)


# On the way to the node.


def seal(node: str = "a", epoch: int = 3, secret: bytes = SECRET) -> tuple[bytes, SecretKey]:
    sealing = SecretKey(bytes(PrivateKey.generate()))
    sealed = operator_keys.seal_epoch_secret(secret, node=node, epoch=epoch, sealing_key=public_key(sealing))
    return sealed, sealing


def test_what_the_operator_seals_opens_on_that_node() -> None:
    sealed, sealing = seal()
    digest = preshared.digest(SECRET, 3)
    assert open_epoch_secret(sealed, sealing, node="a", epoch=3, expected=digest) == SecretKey(SECRET)


@pytest.mark.parametrize(
    ("node", "epoch", "secret", "message"),
    [
        ("b", 3, SECRET, "another node or epoch"),
        ("a", 2, SECRET, "another node or epoch"),
        ("a", 3, bytes(32), "not the one the operator published"),
    ],
)
def test_an_epoch_secret_of_another_place_is_refused(
    node: str, epoch: int, secret: bytes, message: str
) -> None:
    """Anybody can seal to a node: what is sealed has to be what was published, too."""
    sealed, sealing = seal(node, epoch, secret)
    with pytest.raises(KeyRefused, match=message) as refused:
        open_epoch_secret(sealed, sealing, node="a", epoch=3, expected=preshared.digest(SECRET, 3))
    assert_hidden(SECRET, str(refused.value))


def test_one_sealed_to_another_key_is_refused() -> None:
    sealed, _ = seal()
    with pytest.raises(KeyRefused, match="not sealed to this node"):
        open_epoch_secret(sealed, SecretKey(bytes(32)), node="a", epoch=3, expected="")


def test_a_private_key_is_no_epoch_secret_though_it_is_sealed_to_the_same_node() -> None:
    sealing = SecretKey(bytes(PrivateKey.generate()))
    issued = operator_keys.issue(node="a", epoch=3, sealing_key=public_key(sealing))
    with pytest.raises(KeyRefused, match="another node or epoch"):
        open_epoch_secret(issued.sealed, sealing, node="a", epoch=3, expected="")


def held(name: str = A, secret: bytes | None = SECRET, epoch: int = 1) -> HeldKey:
    return HeldKey(epoch, name, SecretKey(bytes(32)), SecretKey(secret) if secret else None)


def test_held_secrets_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    private = SecretKey(bytes(range(1, 33)))
    kept = {
        1: HeldKey(1, public_key(private), private),
        2: HeldKey(2, public_key(private), private, SecretKey(SECRET)),
    }
    write_held(path, kept)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_held(path) == kept
    assert {epoch: key.epoch_secret for epoch, key in read_held(path).items()} == {
        1: None,
        2: SecretKey(SECRET),
    }
    path.write_text('{"1": {"privateKey": null}}')
    with pytest.raises(KeyRefused, match="damaged"):
        read_held(path)


def test_keys_of_before_there_were_preshared_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.touch(0o600)
    path.write_text(f'{{"4": "{base64.b64encode(SECRET).decode()}"}}')
    [key] = read_held(path).values()
    assert (key.epoch, key.private_key, key.epoch_secret) == (4, SecretKey(SECRET), None)


# What a node does with it.


def member(name: str, number: int, key: str, digest: str = "") -> Member:
    return Member(
        name=name,
        created=f"2026-01-0{number}T00:00:00Z",
        spec=Spec(
            id=number,
            addresses=(ip_address(f"198.18.0.{number}"),),
            pod_cidrs=(ip_network(f"10.244.{number}.0/24"),),
            keys=(Key(epoch=1, public_key=key, secret_digest=digest),),
            phase=Phase.ENFORCING,
            epoch=1,
        ),
    )


def want(own: HeldKey, *members: Member) -> Desired:
    result = desired(
        Inputs(
            node="a",
            members={each.name: each for each in members},
            nodes={each.name: ClusterNode(name=each.name, ready=True) for each in members},
            config=MeshConfig(),
            held={own.epoch: own},
            links={
                "eth0": Link(index=2, name="eth0", up=True, addresses=frozenset({ip_address("198.18.0.1")}))
            },
            routes=(Route(ip_network("0.0.0.0/0"), (2,)),),
        )
    )
    assert result
    return result


DIGEST = preshared.digest(SECRET, 1)


def test_both_ends_of_a_tunnel_get_the_same_key() -> None:
    found = []
    members = (member("a", 1, A, DIGEST), member("b", 2, B, DIGEST))
    for own in (held(A), held(B)):
        swapped = (
            members
            if own.public_key == A
            else (replace(members[1], name="a"), replace(members[0], name="b"))
        )
        [device] = want(own, *swapped).devices
        [peer] = device.peers
        found.append(peer.preshared_key)
    assert found[0] == found[1] == SecretKey(preshared.pair_key(SECRET, 1, A, B))


def test_without_an_epoch_secret_there_is_no_preshared_key() -> None:
    [device] = want(held(secret=None), member("a", 1, A), member("b", 2, B)).devices
    assert [peer.preshared_key for peer in device.peers] == [None]


@pytest.mark.parametrize("other", ["", preshared.digest(bytes(32), 1)])
def test_a_peer_with_another_secret_or_none_gets_no_tunnel(other: str) -> None:
    """Least of all one without a preshared key."""
    members = (member("a", 1, A, DIGEST), member("b", 2, B, other), member("c", 3, C, DIGEST))
    wanted = want(held(), *members)
    [device] = wanted.devices
    assert [peer.node for peer in device.peers] == ["c"] and list(wanted.redirects) == [3]
    [problem] = wanted.problems
    assert problem.reason == "EpochSecretDiffers" and "b" in problem.message
    without = want(held(secret=None), member("a", 1, A), member("b", 2, B, DIGEST))
    assert not without.devices[0].peers and without.strict


@pytest.mark.parametrize("secret", [None, bytes(32)])
def test_a_key_is_not_used_without_the_secret_that_goes_with_it(secret: bytes | None) -> None:
    wanted = want(held(secret=secret), member("a", 1, A, DIGEST), member("b", 2, B, DIGEST))
    assert not wanted.devices and not wanted.redirects and wanted.strict
    assert [problem.reason for problem in wanted.problems] == ["WaitingForKey"]


def observed(device_key: str, peers: dict[str, PeerState]) -> Observed:
    return Observed(
        links={"meshwire_wg1": Link(index=9, name="meshwire_wg1", up=True)},
        wireguard={
            "meshwire_wg1": DeviceState(name="meshwire_wg1", public_key=device_key, port=51872, peers=peers)
        },
    )


def psk_changes(wanted: Desired, present: dict[str, PeerState]) -> list[SecretKey | None]:
    return [
        peer.preshared_key
        for action in plan(wanted, observed(A, present))
        if isinstance(action, ConfigureDevice)
        for peer in action.peers
    ]


def test_only_a_preshared_key_that_differs_is_set() -> None:
    wanted = want(held(), member("a", 1, A, DIGEST), member("b", 2, B, DIGEST))
    right = SecretKey(preshared.pair_key(SECRET, 1, A, B))
    [peer] = wanted.devices[0].peers
    there = PeerState(
        public_key=B,
        endpoint=peer.endpoint,
        allowed_ips=frozenset({ip_network("10.244.2.0/24")}),
        singles=frozenset({ip_address("198.18.0.2").packed}),
        keepalive=25,
        handshake=1.0,
    )
    assert psk_changes(wanted, {}) == [right]
    assert psk_changes(wanted, {B: there}) == [right], "one that somebody took away"
    assert psk_changes(wanted, {B: replace(there, preshared_key=SecretKey(bytes([9]) * 32))}) == [right]
    assert psk_changes(wanted, {B: replace(there, preshared_key=right)}) == []
    plain = want(held(secret=None), member("a", 1, A), member("b", 2, B))
    assert psk_changes(plain, {B: there}) == []
    assert psk_changes(plain, {B: replace(there, preshared_key=right)}) == [SecretKey(bytes(32))], (
        "none has to be said, or the old one stays"
    )


def test_a_device_is_prepared_with_all_its_preshared_keys() -> None:
    [device] = want(held(), member("a", 1, A, DIGEST), member("b", 2, B, DIGEST)).devices
    [peer] = device.peers
    state = PeerState(public_key=B, allowed_ips=peer.allowed_ips, preshared_key=peer.preshared_key)
    assert is_prepared(device, observed(A, {B: state}))
    assert not is_prepared(device, observed(A, {B: replace(state, preshared_key=None)}))


def assert_hidden(raw: bytes, *texts: str) -> None:
    for text in texts:
        for spelling in (raw.hex(), base64.b64encode(raw).decode().rstrip("="), repr(raw)):
            assert spelling not in text and spelling.upper() not in text


def test_no_secret_shows_in_what_is_logged_or_reported() -> None:
    wanted = want(held(), member("a", 1, A, DIGEST), member("b", 2, B, DIGEST))
    pair = preshared.pair_key(SECRET, 1, A, B)
    actions = plan(wanted, observed(A, {}))
    state = PeerState(public_key=B, preshared_key=SecretKey(pair))
    texts = [*map(str, actions), *map(repr, actions), repr(wanted), repr(observed(A, {B: state}))]
    assert any("set the preshared key" in text for text in texts)
    for raw in (SECRET, pair):
        assert_hidden(raw, *texts, repr(held()), repr(state))


# To WireGuard and back.

PAIR = SecretKey(bytes(range(100, 132)))


def test_uapi_sets_it_before_anything_else_of_the_peer() -> None:
    change = ConfigureDevice(
        name="meshwire_wg1",
        peers=(
            PeerChange(public_key=A, keepalive=25, preshared_key=PAIR, gain=(ip_network("10.0.0.0/24"),)),
            PeerChange(public_key=B, keepalive=25),
        ),
    )
    lines = uapi.format_change(change).decode().splitlines()
    assert lines[1:3] == [f"public_key={'01' * 32}", f"preshared_key={PAIR.reveal().hex()}"]
    assert sum(line.startswith("preshared_key=") for line in lines) == 1


def test_uapi_reads_it() -> None:
    answer = [
        f"public_key={'01' * 32}",
        f"preshared_key={PAIR.reveal().hex()}",
        "tx_bytes=1",
        f"public_key={'02' * 32}",
        f"preshared_key={'00' * 32}",
        f"public_key={'03' * 32}",
        "rx_bytes=1",
    ]
    peers = uapi.parse_device("meshwire_wg1", answer).peers
    assert [peers[key].preshared_key for key in (A, B, C)] == [PAIR, None, None]


def through_netlink(attributes: wireguard.Attributes) -> Any:
    message = wgmsg()
    message["attrs"] = attributes
    message.encode()
    decoded = wireguard.Reply(message.data)
    decoded.decode()
    return decoded


def test_netlink_sets_it_and_reads_it() -> None:
    change = ConfigureDevice(
        name="meshwire_wg1",
        peers=(
            PeerChange(public_key=A, keepalive=25, preshared_key=PAIR),
            PeerChange(public_key=B, keepalive=25),
            PeerChange(public_key=C, keepalive=25, preshared_key=SecretKey(bytes(32))),
        ),
    )
    [attributes] = wireguard.format_change(change)
    message = through_netlink(attributes)
    told = [peer.get_attr("WGPEER_A_PRESHARED_KEY") for peer in message.get_attr("WGDEVICE_A_PEERS")]
    assert told == [base64.b64encode(PAIR.reveal()), None, base64.b64encode(bytes(32))]
    peers = wireguard.parse_device("meshwire_wg1", [message]).peers
    assert [peers[key].preshared_key for key in (A, B, C)] == [PAIR, None, None]


def test_netlink_keeps_it_where_a_dump_cuts_a_peer_in_two() -> None:
    head: wireguard.Attributes = [
        ["WGPEER_A_PUBLIC_KEY", A],
        ["WGPEER_A_PRESHARED_KEY", base64.b64encode(PAIR.reveal())],
    ]
    parts = [through_netlink([["WGDEVICE_A_PEERS", [{"attrs": each}]]]) for each in (head, head[:1])]
    assert wireguard.parse_device("meshwire_wg1", parts).peers[A].preshared_key == PAIR


# What an epoch has is settled once.

D1, D2 = (preshared.digest(bytes([n]) * 32, 1) for n in (1, 2))


def kept(digest: str) -> EpochSecret:
    return EpochSecret(epoch=1, uid="1", digest=digest)


@pytest.mark.parametrize(
    ("digests", "secret", "wanted", "expected"),
    [
        (set(), None, True, Secrecy(Next.SECRET)),
        (set(), None, False, Secrecy(Next.NOTHING)),
        (set(), kept(D1), True, Secrecy(Next.NOTHING, D1)),
        # Made, then the setting was changed before the first key.
        (set(), kept(D1), False, Secrecy(Next.NOTHING, D1)),
        # The setting was changed later: what has begun stays as it is.
        ({""}, None, True, Secrecy(Next.NOTHING)),
        ({""}, kept(D1), True, Secrecy(Next.NOTHING)),
        ({D1}, kept(D1), False, Secrecy(Next.NOTHING, D1)),
        # Gone, replaced, or holding nothing: never a second one for the same epoch.
        ({D1}, None, True, Secrecy(Next.ANOTHER_EPOCH)),
        ({D1}, kept(D2), True, Secrecy(Next.ANOTHER_EPOCH)),
        ({D1}, kept(""), True, Secrecy(Next.ANOTHER_EPOCH)),
        (set(), kept(""), True, Secrecy(Next.ANOTHER_EPOCH)),
        # Somebody tampered with one node's Secret: that one gets a new key.
        ({D1, ""}, kept(D1), True, Secrecy(Next.NOTHING, D1)),
        ({D1, D2}, kept(D1), True, Secrecy(Next.NOTHING, D1)),
        ({D1, ""}, None, True, Secrecy(Next.ANOTHER_EPOCH)),
    ],
)
def test_what_an_epoch_needs(
    digests: set[str], secret: EpochSecret | None, wanted: bool, expected: Secrecy
) -> None:
    assert of_epoch(digests, secret, wanted=wanted) == expected


# The operator's writes.


@dataclass
class Store:
    """Secrets as an API server keeps them."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = 0
    before_create: list[bytes] = field(default_factory=list)
    """Secrets that somebody else is a little faster to make."""

    def _keep(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        metadata = {"uid": f"uid-{self.version}", **body["metadata"], "resourceVersion": str(self.version)}
        self.objects[path] = {**body, "metadata": metadata}
        return self.objects[path]

    async def create(self, collection: str, body: dict[str, Any]) -> dict[str, Any]:
        path = f"{collection}/{body['metadata']['name']}"
        if self.before_create:
            other = base64.b64encode(self.before_create.pop()).decode()
            self._keep(path, {**body, "data": {names.EPOCH_SECRET_DATA_KEY: other}})
        if path in self.objects:
            raise ApiError(409, "AlreadyExists", path)
        return self._keep(path, body)

    async def get(self, path: str) -> dict[str, Any]:
        if path not in self.objects:
            raise ApiError(404, "NotFound", path)
        return self.objects[path]

    async def patch(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        found = await self.get(path)
        if body["metadata"].get("resourceVersion") not in (None, found["metadata"]["resourceVersion"]):
            raise ApiError(409, "Conflict", path)
        return self._keep(path, merged(found, body))


def merged(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        result[name] = merged(result.get(name), value)
    return {name: value for name, value in result.items() if value is not None}


@dataclass
class Operator:
    store: Store = field(default_factory=Store)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = World(self.store, "meshwire-system")  # type: ignore[arg-type]
        self.hands = Hands(self.store, self.world, self.events.append)  # type: ignore[arg-type]

    def do(self, action: Any) -> None:
        asyncio.run(self.hands.apply(action))

    @property
    def epoch_secret(self) -> EpochSecret:
        [found] = self.world.epoch_secrets.over({}).values()
        return found

    @property
    def key_secret(self) -> KeySecret:
        return self.world.secrets.over({})["a"]


KEY_SECRET = "/api/v1/namespaces/meshwire-system/secrets/meshwire-key-a"
EPOCH_SECRET = "/api/v1/namespaces/meshwire-operator/secrets/meshwire-epoch-{}"


def issue(digest: str, epoch: int = 1, secret: KeySecret | None = None, beside: int = 0) -> IssueKey:
    sealing = public_key(SecretKey(SECRET))
    return IssueKey("a", epoch, sealing, "uid", secret, False, beside, digest)


def test_the_secret_is_made_once_whoever_is_first() -> None:
    other = bytes([7]) * 32
    operator = Operator(Store(before_create=[other]))
    operator.do(MakeEpochSecret(1))
    assert operator.epoch_secret.digest == preshared.digest(other, 1)
    operator.do(MakeEpochSecret(1))
    assert operator.epoch_secret.digest == preshared.digest(other, 1)
    [made] = operator.store.objects.values()
    assert made["immutable"] is True


def test_two_epochs_have_two_secrets_of_32_bytes() -> None:
    operator = Operator()
    operator.do(MakeEpochSecret(1))
    operator.do(MakeEpochSecret(2))
    raw = [base64.b64decode(each["data"]["secret"]) for each in operator.store.objects.values()]
    assert len(set(raw)) == 2 and {len(each) for each in raw} == {32}


def test_a_key_comes_with_the_secret_of_its_epoch_sealed_to_the_node() -> None:
    operator = Operator()
    operator.do(MakeEpochSecret(1))
    operator.do(issue(operator.epoch_secret.digest))
    [key] = operator.key_secret.keys
    assert key.secret_digest == operator.epoch_secret.digest
    data = operator.store.objects[KEY_SECRET]["data"]
    raw = base64.b64decode(operator.store.objects[EPOCH_SECRET.format(1)]["data"]["secret"])
    opened = open_epoch_secret(
        base64.b64decode(data["epoch-1-secret"]),
        SecretKey(SECRET),
        node="a",
        epoch=1,
        expected=key.secret_digest,
    )
    assert opened == SecretKey(raw)
    shown = [
        repr(operator.store.objects[KEY_SECRET]),
        repr(operator.events),
        repr(operator.world.epoch_secrets),
    ]
    assert_hidden(raw, *shown)


def test_a_key_is_not_issued_by_another_secret_than_the_one_that_was_seen() -> None:
    operator = Operator()
    operator.do(MakeEpochSecret(1))
    with pytest.raises(Outdated):
        operator.do(issue(D1))
    del operator.store.objects[EPOCH_SECRET.format(1)]
    with pytest.raises(ApiError):
        operator.do(issue(operator.epoch_secret.digest))
    assert KEY_SECRET not in operator.store.objects and not operator.events


def test_of_epochs_that_have_ended_nothing_stays_in_the_nodes_secret() -> None:
    operator = Operator()
    for epoch in (1, 2):
        operator.do(MakeEpochSecret(epoch))
    digests = {int(name): each.digest for name, each in operator.world.epoch_secrets.over({}).items()}
    operator.do(issue(digests[1]))
    operator.do(issue(digests[2], 2, operator.key_secret, beside=1))
    assert {key.epoch: key.secret_digest for key in operator.key_secret.keys} == digests
    operator.do(WithdrawKeys(operator.key_secret, (1,)))
    found = operator.store.objects[KEY_SECRET]
    assert sorted(found["data"]) == ["epoch-2", "epoch-2-secret"]
    assert not [name for name in found["metadata"]["annotations"] if name.endswith("-1")]
    operator.do(issue("", 3, operator.key_secret))
    found = operator.store.objects[KEY_SECRET]
    assert sorted(found["data"]) == ["epoch-3"] and operator.key_secret.keys[0].secret_digest == ""
    operator.do(issue(digests[2], 2, operator.key_secret))
    operator.do(issue("", 2, operator.key_secret))
    assert sorted(operator.store.objects[KEY_SECRET]["data"]) == ["epoch-2"]


def test_a_key_without_the_secret_that_goes_with_it_is_none() -> None:
    operator = Operator()
    operator.do(MakeEpochSecret(1))
    operator.do(issue(operator.epoch_secret.digest))
    found = operator.store.objects[KEY_SECRET]
    del found["data"]["epoch-1-secret"]
    assert KeySecret.from_object(found).keys == ()


@pytest.mark.parametrize("data", [None, {}, {"secret": ""}, {"secret": "AAAA"}, {"secret": "%"}])
def test_an_epoch_secret_that_holds_none_has_no_digest(data: Any) -> None:
    metadata = {"uid": "1", "resourceVersion": "1", "labels": {names.EPOCH_SECRET_LABEL: "4"}}
    assert EpochSecret.from_object({"metadata": metadata, "data": data}).digest == ""


# Objects.


def test_a_published_key_says_what_it_goes_with() -> None:
    spec = Spec(id=1, keys=(published_key(held()), Key(epoch=2, public_key=B)))
    body = {"metadata": {"name": "a", "uid": "1", "resourceVersion": "1"}, "spec": spec.to_dict()}
    assert body["spec"]["keys"] == [
        {"epoch": 1, "publicKey": A, "epochSecretDigest": DIGEST},
        {"epoch": 2, "publicKey": B},
    ]
    assert MeshNode.from_object(body).spec.keys == spec.keys
    with pytest.raises(InvalidSpec, match="epochSecretDigest"):
        MeshNode.from_object(
            {**body, "spec": {"id": 1, "keys": [{**body["spec"]["keys"][0], "epochSecretDigest": "x"}]}}
        )


def test_preshared_keys_are_on_unless_somebody_says_otherwise() -> None:
    assert MeshConfig.from_object({}).encryption.preshared_keys
    said = {"spec": {"encryption": {"presharedKeys": False}}}
    assert not MeshConfig.from_object(said).encryption.preshared_keys
