"""Maps that are too small: who is closed, who isn't, and in which order it is written. The maps here are
dictionaries that count."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_policy_model import allow, app, labels_of, packed, pod, remote

from meshwire.agent.policy.enforcer import _failed, _in_force
from meshwire.agent.policy.model import CLOSED, Model, Surroundings
from meshwire.agent.policy.objects import Namespace, Pod, compact
from meshwire.agent.policy.room import BlockClaim, Claim, Fill, admit, admit_blocks, pressure
from meshwire.agent.policy.tables import AddressTable
from meshwire.agent.policy.write import entry_key, write
from meshwire.api.fields import Network
from meshwire.api.meshendpointslice import MeshEndpointSlice
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import (
    CidrPeer,
    Direction,
    Kind,
    Policy,
    PolicyMode,
    PortRange,
    Protocol,
    Rule,
    Selector,
)
from meshwire.api.meshpolicyreport import MapPressure
from meshwire.bpf.policylayouts import CidrFlag, EndpointFlag, StateFlag
from meshwire.bpf.policymaps import EndpointEntry
from meshwire.policy import identity
from meshwire.policy.compile import Compiler

ENFORCED = EndpointFlag.INGRESS_ENFORCED | EndpointFlag.EGRESS_ENFORCED
AMPLE = {"policy": 10_000, "cidrs": 10_000, "identities": 10_000, "endpoints": 10_000, "services": 10_000}


class Map(dict[Any, Any]):
    """Refuses what is too much, as the kernel does: before 6.13, an LPM trie that is full refuses to replace
    as well. `refuses`: keys for which there is no memory, whatever the capacity."""

    def __init__(self, name: str, kernel: Kernel) -> None:
        super().__init__()
        self.name = name
        self.kernel = kernel
        self.refuses: Callable[[Any], bool] = lambda key: False
        self.watch: Callable[[Any, Any], None] = lambda key, value: None
        self.writes = 0

    def read(self) -> dict[Any, Any]:
        return dict(self)

    def update(self, key: Any, value: Any = 0) -> None:  # type: ignore[override]
        capacity = self.kernel.capacities[self.name]
        is_trie = self.name in ("policy", "cidrs")
        if self.refuses(key):
            raise OSError(errno.ENOMEM, self.name)
        # No test may come here but those of `refuses`: what doesn't fit is not tried.
        assert len(self) + ((key not in self) or is_trie) <= capacity, self.name
        self[key] = value
        self.writes += 1
        self.watch(key, value)
        self.kernel.check()

    def update_many(self, entries: Mapping[Any, Any]) -> None:
        for key, value in entries.items():
            self.update(key, value)

    def delete(self, key: Any) -> None:
        if self.name == "cidrs":
            for entry in self.kernel.endpoints.values():
                assert entry.set == CLOSED or key not in self.kernel.needs(entry.identity)
        self.writes += self.pop(key, None) is not None
        self.kernel.check()

    def delete_many(self, keys: Iterable[Any]) -> None:
        for key in keys:
            self.delete(key)


class Kernel:
    def __init__(self, **capacities: int) -> None:
        self.capacities = AMPLE | capacities
        self.policies = Map("policy", self)
        self.cidrs, self.identities = Map("cidrs", self), Map("identities", self)
        self.endpoints, self.services = Map("endpoints", self), Map("services", self)
        self.whole: Callable[[int], bool] = lambda number: True
        self.needs: Callable[[int], frozenset[Network]] = lambda number: frozenset()
        self.seen: dict[Any, int] = {}
        self.renewed = 0

    # Of policy_state.

    def read(self) -> StateFlag:
        return StateFlag.SKIP_STACK

    def renew(self, flags: StateFlag) -> None:
        assert flags == StateFlag.SKIP_STACK
        self.renewed += 1

    @property
    def maps(self) -> list[Map]:
        return [self.policies, self.cidrs, self.identities, self.endpoints, self.services]

    def check(self) -> None:
        """At any instant: whoever is pointed to a set finds it whole."""
        moved = {address: value.set for address, value in self.endpoints.items()}
        for address, number in moved.items() - self.seen.items():
            assert self.whole(number), "a pod has come to a set that isn't whole"
            if number != CLOSED and self.seen.get(address, CLOSED) == CLOSED:
                assert self.needs(self.endpoints[address].identity) <= self.cidrs.keys(), (
                    "a pod is opened before the blocks that its rules name are there"
                )
        self.seen = moved

    def sets(self) -> dict[int, set[Any]]:
        found: dict[int, set[Any]] = {}
        for key, entry in self.policies.items():
            found.setdefault(key.set, set()).add((entry_key(key), entry.deny))
        return found

    def carry_out(self, model: Model) -> int:
        """As PolicyKernel.apply; how many writes it took."""
        before = sum(each.writes for each in self.maps)
        model.update()
        model.fit(self.capacities)

        def whole(number: int) -> bool:
            wanted = {key for key in model.entries.desired if key[0] == number}
            found = {(key.set, entry_key(key)) for key in self.policies if key.set == number}
            return wanted <= found and (number != CLOSED or not found)

        self.whole = whole
        self.needs = lambda number: model.compiler.blocks_of(number, audit=False)
        renewed = self.renewed
        write(model, SimpleNamespace(**vars(self), state=self), skips_stack=True)  # type: ignore[arg-type]
        assert (self.renewed > renewed) or sum(each.writes for each in self.maps) == before
        assert not model.entries.writes() and not model.entries.deletes()
        assert not model.endpoints.writes() and not model.cidrs.writes()
        return sum(each.writes for each in self.maps) - before

    def restart(self) -> Model:
        """A new model that finds the maps as they are."""
        sets = [each for value in self.endpoints.values() for each in (value.set, value.audit_set)]
        model = Model(
            revision=max((value.revision for value in self.endpoints.values()), default=0),
            first_set=max([*sets, *(key.set for key in self.policies)], default=0),
        )
        model.identities.found({address.packed: number for address, number in self.identities.items()})
        model.cidrs.found({block: (entry.number, entry.flags) for block, entry in self.cidrs.items()})
        model.services.found({address.packed: 0 for address in self.services})
        model.endpoints.found(
            {address.packed: _endpoint_value(value) for address, value in self.endpoints.items()}
        )
        model.entries.found(
            {(key.set, entry_key(key)): (each.deny, each.rule) for key, each in self.policies.items()}
        )
        model.put_namespace(Namespace(uid="n", name="shop", labels={}))
        return model

    def is_closed(self, address: str) -> bool:
        entry = self.endpoints[ip_address(address)]
        assert (entry.set == CLOSED) is (entry.flags == ENFORCED and not self.sets().get(entry.set))
        return bool(entry.set == CLOSED)


def _endpoint_value(entry: EndpointEntry) -> Any:
    from meshwire.agent.policy.model import EndpointValue

    return EndpointValue(
        entry.ifindex, entry.identity, entry.set, entry.audit_set, entry.revision, entry.born, entry.flags
    )


def ports(
    name: str, of: str, count: int, *, first: int = 1, mode: PolicyMode = PolicyMode.ENFORCE
) -> Policy:
    """Pods of app `of` get TCP on so many single ports: one entry each, as none is next to another."""
    return Policy(
        kind=Kind.MESH_POLICY,
        namespace="shop",
        name=name,
        uid=name,
        selector=app(of),
        mode=mode,
        default_deny=frozenset({Direction.INGRESS}),
        rules=(
            Rule(
                direction=Direction.INGRESS,
                path="spec.ingress[0]",
                ports=tuple(
                    PortRange(Protocol.TCP, port, port) for port in range(first, first + 2 * count, 2)
                ),
            ),
        ),
    )


def blocks(name: str, of: str, *cidrs: str, excepts: tuple[str, ...] = ()) -> Policy:
    holes = tuple(ip_network(each) for each in excepts)
    peers = tuple(
        CidrPeer(network, tuple(hole for hole in holes if hole.subnet_of(network)))  # type: ignore[arg-type]
        for network in map(ip_network, cidrs)
    )
    return Policy(
        kind=Kind.MESH_POLICY,
        namespace="shop",
        name=name,
        uid=name,
        selector=app(of),
        default_deny=frozenset({Direction.EGRESS}),
        rules=(Rule(direction=Direction.EGRESS, path="spec.egress[0]", peers=peers),),
    )


def started() -> Model:
    model = Model()
    model.put_namespace(Namespace(uid="n", name="shop", labels={}))
    return model


def add(model: Model, name: str, address: str, app: str, device: int = 7) -> Pod:
    added = pod(name, address, app)
    model.put_pod(added)
    model.set_device(name, device)
    return added


A, B, C = "10.1.1.5", "10.1.1.6", "10.1.1.7"


def reasons(model: Model) -> dict[str, str]:
    return {failure.uid: f"{failure.reason} {failure.message}" for failure in _failed(model)}


def test_whose_rules_do_not_fit_is_closed_and_nobody_else() -> None:
    model, kernel = started(), Kernel(policy=11)
    model.put_policy(ports("a", "a", 6))
    add(model, "pod-a", A, "a")
    kernel.carry_out(model)
    before = kernel.endpoints[ip_address(A)]
    model.put_policy(ports("b", "b", 5))
    add(model, "pod-b", B, "b", 8)
    kernel.carry_out(model)
    # One entry of a trie stays free.
    assert kernel.is_closed(B) and kernel.endpoints[ip_address(A)] == before
    assert len(kernel.sets()[before.set]) == 6 and len(kernel.policies) == 6
    assert reasons(model) == {
        "b": "MapFull map policy, which holds 11 entries, has no room for 5 more: "
        "its pods get and send nothing"
    }
    assert [each.uid for each in _in_force(model, _failed(model), {})] == ["a"]
    assert model.closed_pods() == {"pod-b"}
    assert model.fills(kernel.capacities)["policy"] == Fill(6, 11, 5)
    assert kernel.carry_out(model) == 0, "nothing has changed"

    closed = kernel.endpoints[ip_address(B)]
    model.put_policy(ports("a", "a", 4))
    kernel.carry_out(model)
    opened = kernel.endpoints[ip_address(B)]
    assert not kernel.is_closed(A) and not kernel.is_closed(B) and not _failed(model)
    # Flows that were let through before it was closed are another revision's.
    assert opened.revision > closed.revision and opened.born == closed.born


def test_a_new_set_goes_in_turns_where_there_is_no_room_for_all_at_once() -> None:
    """Ten pods, each with a set of its own that changes: nobody is closed for it."""
    model, kernel = started(), Kernel(policy=26)
    for number in range(4):
        model.put_policy(ports(f"p{number}", f"app{number}", 5))
        add(model, f"pod{number}", f"10.1.1.{number + 5}", f"app{number}", number + 1)
    kernel.carry_out(model)
    for number in range(4):
        model.put_policy(ports(f"p{number}", f"app{number}", 5, first=1000))
    closed: list[Any] = []
    kernel.check = lambda: closed.extend(  # type: ignore[method-assign]
        each for each in kernel.endpoints.values() if each.set == CLOSED
    )
    kernel.carry_out(model)
    assert not closed and len(kernel.policies) == 20
    assert all(key.port >= 1000 for key in kernel.policies)


def test_a_set_that_only_its_predecessor_is_in_the_way_of_comes_after_it() -> None:
    model, kernel = started(), Kernel(policy=10)
    model.put_policy(ports("a", "a", 6))
    add(model, "pod-a", A, "a")
    kernel.carry_out(model)
    model.put_policy(ports("a", "a", 7, first=1000))
    kernel.carry_out(model)
    assert not kernel.is_closed(A) and len(kernel.policies) == 7


def test_a_restart_takes_the_same_choice() -> None:
    model, kernel = started(), Kernel(policy=11)

    def tell(model: Model) -> None:
        model.put_policy(ports("a", "a", 6))
        model.put_policy(ports("b", "b", 5))
        add(model, "pod-a", A, "a")
        add(model, "pod-b", B, "b", 8)

    model.put_policy(ports("a", "a", 6))
    add(model, "pod-a", A, "a")
    kernel.carry_out(model)
    tell(model)
    kernel.carry_out(model)
    assert (kernel.is_closed(A), kernel.is_closed(B)) == (False, True)
    again = kernel.restart()
    tell(again)
    kernel.carry_out(again)
    # The smaller one would be first if it were not for who is in force.
    assert (kernel.is_closed(A), kernel.is_closed(B)) == (False, True)


def test_an_audit_set_goes_before_a_pod_is_closed() -> None:
    model, kernel = started(), Kernel(policy=16)
    model.put_policy(ports("a", "a", 4))
    model.put_policy(ports("audit", "a", 3, first=1000, mode=PolicyMode.AUDIT))
    add(model, "pod-a", A, "a")
    kernel.carry_out(model)
    assert kernel.endpoints[ip_address(A)].audit_set and len(kernel.policies) == 11
    model.put_policy(ports("b", "b", 6))
    add(model, "pod-b", B, "b", 8)
    kernel.carry_out(model)
    assert not kernel.is_closed(A) and not kernel.is_closed(B)
    without = kernel.endpoints[ip_address(A)]
    assert not without.audit_set and not without.flags & EndpointFlag.INGRESS_AUDITED
    # What is to be enforced is.
    assert list(reasons(model)) == ["audit"] and "MapFull" in reasons(model)["audit"]
    assert not model.closed_pods() and kernel.carry_out(model) == 0
    model.remove_policy("b")
    kernel.carry_out(model)
    assert kernel.endpoints[ip_address(A)].audit_set and not _failed(model)


def test_without_its_blocks_a_pod_is_closed_and_the_clusters_own_come_first() -> None:
    model, kernel = started(), Kernel(cidrs=5)
    model.set_surroundings(
        Surroundings(cluster=(ip_network("10.1.0.0/16"),), own=(ip_network("10.1.1.0/24"),))
    )
    model.put_policy(blocks("b", "b", "192.0.2.0/24"))
    add(model, "pod-b", B, "b", 8)
    kernel.carry_out(model)
    model.put_policy(blocks("a", "a", "198.51.0.0/16", excepts=("198.51.100.0/24",)))
    add(model, "pod-a", A, "a")
    kernel.carry_out(model)
    # An exception counts: without it, its addresses would be allowed with the block around.
    assert kernel.is_closed(A) and not kernel.is_closed(B)
    assert set(kernel.cidrs) == {ip_network(each) for each in ("10.1.0.0/16", "10.1.1.0/24", "192.0.2.0/24")}
    assert "map cidrs, which holds 5 entries, has no room for 2 more" in reasons(model)["a"]
    assert model.fills(kernel.capacities)["cidrs"] == Fill(3, 5, 2)
    assert kernel.carry_out(model) == 0
    model.remove_policy("b")
    kernel.carry_out(model)
    assert not kernel.is_closed(A) and len(kernel.cidrs) == 4
    # More of the cluster's own than there is room for: nobody can be told to be of the cluster.
    own = tuple(ip_network(f"10.1.{number}.0/24") for number in range(1, 9))
    model.set_surroundings(Surroundings(cluster=own, own=(ip_network("10.1.1.0/24"),)))
    kernel.carry_out(model)
    assert kernel.is_closed(A) and kernel.is_closed(B) and len(kernel.cidrs) == 4
    assert kernel.cidrs[ip_network("10.1.1.0/24")].flags & CidrFlag.LOCAL


def test_of_addresses_this_nodes_own_come_first_and_the_rest_is_of_nobody() -> None:
    model, kernel = started(), Kernel(identities=4)
    model.set_surroundings(Surroundings(cluster=(ip_network("10.1.0.0/16"),)))
    model.put_slice(
        compact(
            MeshEndpointSlice(
                name="s",
                endpoints=tuple(
                    remote(300, f"10.{1 + (last == 9)}.2.{last}", str(last)) for last in range(5, 10)
                ),
            )
        )
    )
    kernel.carry_out(model)
    assert len(kernel.identities) == 4 and model.fills(kernel.capacities)["identities"].left_out == 1
    add(model, "pod-a", A, "a")
    model.set_surroundings(
        Surroundings(cluster=(ip_network("10.1.0.0/16"),), remote=frozenset({packed("192.0.2.1")}))
    )
    kernel.carry_out(model)
    assert {ip_address(A), ip_address("192.0.2.1")} <= set(kernel.identities)
    assert len(kernel.identities) == 4
    # One that is in no block of the cluster would be of the world.
    assert kernel.cidrs[ip_network("10.2.2.9/32")].flags == CidrFlag.CLUSTER
    assert kernel.carry_out(model) == 0
    model.remove_slice("s")
    kernel.carry_out(model)
    assert set(kernel.identities) == {ip_address(A), ip_address("192.0.2.1")}
    assert not model.identities.left_out and ip_network("10.2.2.9/32") not in kernel.cidrs


def test_a_pod_without_a_place_is_out_of_reach_until_one_is_free() -> None:
    model, kernel = started(), Kernel(endpoints=2)
    model.put_policy(ports("p", "a", 1))
    for name, address in (("one", A), ("two", B), ("three", "10.1.1.4")):
        add(model, name, address, "a", packed(address)[3])
        kernel.carry_out(model)
    assert set(kernel.endpoints) == {ip_address(A), ip_address(B)}
    # Its device is to have the programs: they let nothing through that is in no entry.
    assert {value.ifindex for value in model.guarded()} == {4, 5, 6}
    assert model.closed_pods() == {"three"} and "map endpoints" in reasons(model)["p"]
    assert kernel.carry_out(model) == 0
    model.remove_pod("one")
    kernel.carry_out(model)
    assert ip_address("10.1.1.4") in kernel.endpoints and not _failed(model)


def test_what_the_kernel_refuses_concerns_nobody_else() -> None:
    """There is room, but no memory."""
    model, kernel = started(), Kernel()
    for name, address, device in (("a", A, 7), ("b", B, 8), ("c", C, 9)):
        model.put_policy(ports(name, name, 3, first=10 * device))
        add(model, f"pod-{name}", address, name, device)
    kernel.policies.refuses = lambda key: key.port == 82
    kernel.identities.refuses = lambda address: address == ip_address(C)
    kernel.endpoints.refuses = lambda address: address == ip_address(A)
    kernel.carry_out(model)
    assert set(kernel.endpoints) == {ip_address(B), ip_address(C)}
    assert kernel.is_closed(B) and not kernel.is_closed(C)
    assert ip_address(C) not in kernel.identities
    assert {key.set for key in kernel.policies} >= {kernel.endpoints[ip_address(C)].set}
    assert not [key for key in kernel.policies if 80 <= key.port < 90], "the rest of that set is gone"
    assert list(reasons(model)) == ["a", "b"]
    # Not again with every event.
    assert kernel.carry_out(model) == 0
    for each in kernel.maps:
        each.refuses = lambda key: False
    model.forgive()
    kernel.carry_out(model)
    assert len(kernel.endpoints) == 3 and not kernel.is_closed(B) and not _failed(model)


def test_what_was_written_in_vain_is_gone() -> None:
    """Of many entries at once some are written when the kernel refuses one, and then it refuses another."""
    model, kernel = started(), Kernel()
    model.put_policy(ports("a", "a", 3))
    add(model, "pod-a", A, "a")

    def write_and_fail(entries: Mapping[Any, Any]) -> None:
        Map.update_many(kernel.policies, entries)
        kernel.policies.refuses = lambda key: key.port == 1
        raise OSError(errno.ENOMEM, "policy")

    kernel.policies.update_many = write_and_fail  # type: ignore[method-assign]
    kernel.carry_out(model)
    assert kernel.is_closed(A) and not kernel.policies


def test_who_has_its_blocks_keeps_them() -> None:
    model, kernel = started(), Kernel(cidrs=4)
    model.put_policy(blocks("b", "b", "192.0.2.0/24", "203.0.113.0/24"))
    add(model, "pod-b", B, "b", 8)
    kernel.carry_out(model)
    model.put_policy(blocks("a", "a", "198.51.100.0/24", "198.51.101.0/24"))
    add(model, "pod-a", A, "a", 1)
    kernel.carry_out(model)
    assert kernel.is_closed(A) and not kernel.is_closed(B)
    # Who has its blocks already stays, be they more: those of who comes don't fit beside them.
    model, kernel = started(), Kernel(cidrs=3)
    model.put_policy(blocks("b", "b", "192.0.2.0/24", "203.0.113.0/24"))
    add(model, "pod-b", B, "b", 8)
    kernel.carry_out(model)
    model.put_policy(blocks("a", "a", "198.51.100.0/24"))
    add(model, "pod-a", A, "a", 1)
    kernel.carry_out(model)
    assert kernel.is_closed(A) and not kernel.is_closed(B)


def test_a_block_that_the_kernel_refuses_closes_who_needs_it() -> None:
    model, kernel = started(), Kernel()
    model.put_policy(ports("a", "a", 1))
    model.put_policy(blocks("b", "b", "192.0.2.0/24"))
    add(model, "pod-a", A, "a")
    add(model, "pod-b", B, "b", 8)
    kernel.carry_out(model)
    written: list[Any] = []
    kernel.endpoints.watch = lambda address, value: written.append((address, value))
    model.put_policy(blocks("a", "a", "198.51.0.0/16", excepts=("198.51.100.0/24",)))
    kernel.cidrs.refuses = lambda block: block == ip_network("198.51.100.0/24")
    kernel.carry_out(model)
    assert kernel.is_closed(A) and not kernel.is_closed(B)
    # Its new rules were in force for a moment: what was judged by them must not stay.
    opened, closed = (value for address, value in written if address == ip_address(A))
    assert opened.set != CLOSED == closed.set and closed.revision > opened.revision
    assert set(kernel.cidrs) == {ip_network("192.0.2.0/24")}
    kernel.cidrs.refuses = lambda block: False
    model.forgive()
    kernel.carry_out(model)
    assert not kernel.is_closed(A) and len(kernel.cidrs) == 3


def test_a_policy_fails_once_and_only_where_it_is_concerned() -> None:
    """The API server refuses a report that names a policy twice."""
    model, kernel = started(), Kernel()
    model.compiler = Compiler(max_entries=3)
    everybody = Selector()
    model.put_policy(replace(ports("large", "", 4), selector=everybody))
    for name, address, device in (("a", A, 7), ("b", B, 8)):
        add(model, f"pod-{name}", address, name, device)
    kernel.carry_out(model)
    assert reasons(model) == {"large": "TooLarge 4 entries for one pod where 3 fit"}
    assert not _in_force(model, _failed(model), {})
    # Never in force before, and nothing of it now: closed both ways.
    assert {entry.flags for entry in kernel.endpoints.values()} == {ENFORCED}
    assert model.closed_pods() == {"pod-a", "pod-b"}

    model.put_policy(replace(ports("large", "", 2), selector=everybody))
    model.put_policy(ports("audit", "a", 2, first=1000, mode=PolicyMode.AUDIT))
    kernel.carry_out(model)
    # Only what would be denied can't be told.
    assert reasons(model) == {"audit": "TooLarge 4 entries for one pod where 3 fit"}
    assert [each.uid for each in _in_force(model, _failed(model), {})] == ["large"]
    assert not model.closed_pods()


def test_anything_else_that_goes_wrong_is_an_error() -> None:
    model, kernel = started(), Kernel()
    model.put_policy(ports("a", "a", 1))
    add(model, "pod-a", A, "a")

    def fail(entries: Any) -> None:
        raise OSError(errno.EPERM, "policy")

    kernel.policies.update_many = fail  # type: ignore[method-assign]
    with pytest.raises(PermissionError):
        kernel.carry_out(model)


# Whatever happens.

STEPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 4)), max_size=25)
CAPACITIES = st.fixed_dictionaries(
    {
        "policy": st.integers(1, 40),
        "cidrs": st.integers(1, 9),
        "identities": st.integers(0, 8),
        "endpoints": st.integers(0, 5),
    }
)
APPS = ("web", "client", "db", "other")


def step(model: Model, kind: int, which: int, what: int) -> None:
    match kind:
        case 0 | 1:
            add(model, f"p{which}", f"10.1.1.{which + 5}", APPS[what % 4], which + 10)
        case 2:
            model.remove_pod(f"p{which}")
        case 3:
            model.put_identity(MeshIdentity(number=300 + which, labels=labels_of(APPS[what % 4])))
        case 4:
            model.remove_identity(300 + which)
        case 5:
            model.put_policy(ports(f"q{which}", APPS[which], 2 * what, first=1 + 100 * what))
        case 6:
            model.put_policy(allow(f"q{which}", APPS[which], APPS[what % 4]))
        case 7:
            mode = (PolicyMode.ENFORCE, PolicyMode.AUDIT)[what % 2]
            model.put_policy(ports(f"r{which}", APPS[which], what, mode=mode))
        case 8:
            named = [f"198.51.{number}.0/24" for number in range(what + 1)]
            model.put_policy(blocks(f"s{which}", APPS[which], "198.51.0.0/16", excepts=tuple(named)))
        case 9:
            model.remove_policy(f"{'qrs'[what % 3]}{which}")


PLACES = tuple(ip_address(f"198.51.{number}.1") for number in range(7))


def ends(model: Model, kernel: Kernel) -> dict[str, Any]:
    """What each pod of the model is judged by: rules on pods, and on single addresses by the smallest block
    that they are in. None where it is closed."""
    found: dict[str, Any] = {}

    def who(number: int) -> Any:
        own = identity.PROVISIONAL <= number < 2 * identity.PROVISIONAL
        return model.labels_of(number) if own else number

    def block(address: Any) -> int:
        around = [each for each in kernel.cidrs if address in each]
        number = kernel.cidrs[max(around, key=lambda each: each.prefixlen)].number if around else 0
        return identity.CIDR | number

    sets = kernel.sets()
    for uid, each in model.pods.items():
        for address in each.addresses:
            entry = kernel.endpoints.get(ip_address(address))
            if entry is None or entry.set == CLOSED:
                found[uid] = None
                assert entry is None or (entry.flags == ENFORCED and not entry.audit_set)
                continue
            rules = sets.get(entry.set, set())
            found[uid] = (
                entry.flags & ENFORCED,
                {
                    (who(key.identity), key.direction, key.port, deny)
                    for key, deny in rules
                    if not identity.CIDR <= key.identity < identity.PROVISIONAL
                },
                {
                    (place, key.direction, key.port, deny)
                    for place in PLACES
                    for key, deny in rules
                    if key.identity == block(place)
                },
            )
    return found


@settings(max_examples=400, deadline=None)
@given(rounds=st.lists(STEPS, min_size=1, max_size=4), capacities=CAPACITIES, restarts=st.booleans())
def test_a_pod_is_wholly_as_written_or_closed(
    rounds: list[list[tuple[int, int, int]]], capacities: dict[str, int], restarts: bool
) -> None:
    small, ample = Kernel(**capacities), Kernel()
    model, reference = started(), started()
    told: list[tuple[int, int, int]] = []
    for steps in rounds:
        if restarts:
            model = small.restart()
            for each in told:
                step(model, *each)
        for each in steps:
            step(model, *each)
            step(reference, *each)
        told += steps
        small.carry_out(model)
        ample.carry_out(reference)
        found, meant = ends(model, small), ends(reference, ample)
        assert found.keys() == meant.keys()
        closed = {uid for uid, value in found.items() if value is None}
        for uid in found.keys() - closed:
            assert found[uid] == meant[uid]
        assert closed == model.closed_pods()
        in_small = {each.uid for each in _in_force(model, _failed(model), {})}
        failed = {failure.uid for failure in _failed(model)}
        assert in_small | failed == {policy.uid for policy in model.concerned()} and not in_small & failed
        # Nothing changes, so nothing is written, and nobody flaps.
        assert small.carry_out(model) == 0
        assert ends(model, small) == found
    # There is room.
    small.capacities = dict(AMPLE)
    small.carry_out(model)
    assert ends(model, small) == ends(reference, ample)
    assert not model.closed_pods() and not _failed(model)
    assert {
        ip_address(each): number for each, number in model.identities.desired.items()
    } == small.identities


@given(
    claims=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), unique_by=lambda each: each[1]),
    free=st.integers(0, 60),
)
def test_the_smallest_come_first(claims: list[tuple[int, int]], free: int) -> None:
    wanted = [Claim(*each) for each in claims]
    chosen = admit(wanted, free)
    assert sum(each.entries for each in chosen) <= free
    left = set(wanted) - set(chosen)
    # Nobody who is left fits, and nobody larger was preferred.
    assert all(each.entries > free - sum(other.entries for other in chosen) for each in left)
    assert not left or not chosen or max(chosen) < min(left)
    assert admit(reversed(wanted), free) == chosen


@given(
    wanted=st.lists(st.tuples(st.integers(0, 1), st.frozensets(st.integers(0, 12), max_size=6)), max_size=8),
    own=st.frozensets(st.integers(0, 12), max_size=4),
    capacity=st.integers(0, 12),
)
def test_blocks_are_shared(
    wanted: list[tuple[int, frozenset[int]]], own: frozenset[int], capacity: int
) -> None:
    def networks(numbers: frozenset[int]) -> frozenset[Network]:
        return frozenset(ip_network(f"192.0.{number}.0/24") for number in numbers)

    claims = [BlockClaim(rank, subject, networks(each)) for subject, (rank, each) in enumerate(wanted)]
    admitted, named = admit_blocks(networks(own), claims, capacity)
    assert len(named | networks(own)) <= capacity or not admitted
    for claim in claims:
        if claim.subject in admitted:
            assert claim.blocks <= named
        elif len(own) <= capacity:
            assert len(named | networks(own) | claim.blocks) > capacity


ADDRESSES = st.integers(0, 9).map(lambda number: bytes([10, 0, 0, number]))


@settings(max_examples=300)
@given(
    held=st.sets(ADDRESSES),
    wanted=st.sets(ADDRESSES),
    first=st.sets(ADDRESSES),
    more=st.sets(ADDRESSES),
    capacities=st.lists(st.integers(0, 11), min_size=1, max_size=4),
)
def test_addresses_share_what_room_there_is(
    held: set[bytes], wanted: set[bytes], first: set[bytes], more: set[bytes], capacities: list[int]
) -> None:
    table: AddressTable[int] = AddressTable()
    table.found(dict.fromkeys(held, 1))
    for address in wanted:
        table.set(address, 1)
    for capacity in capacities:
        for address in more:
            table.set(address, 1)
        wanted = wanted | more
        before = set(table.desired)
        changed = table.fit(capacity, first.__contains__)
        assert changed is (before != set(table.desired))
        assert len(table.desired) == min(capacity, len(wanted))
        assert table.desired.keys() | table.left_out.keys() == wanted
        assert not table.desired.keys() & table.left_out.keys()
        assert not (first & table.left_out.keys()) or table.desired.keys() <= first
        assert not table.fit(capacity, first.__contains__)
        table.deleted(table.deletes())
        table.wrote(table.writes())
        assert table.actual.keys() == table.desired.keys()


def test_pressure_has_a_memory() -> None:
    def at(entries: int, before: tuple[MapPressure, ...] = (), left_out: int = 0) -> tuple[MapPressure, ...]:
        return pressure(before, {"policy": Fill(entries, 100, left_out), "cidrs": Fill(1, 100)})

    assert at(79) == ()
    began = at(80)
    assert began == (MapPressure("policy", 80, 100),)
    # Not every entry is news.
    assert at(99, began) == began == at(75, began)
    assert at(74, began) == ()
    full = at(99, began, 7)
    assert full == (MapPressure("policy", 99, 100, True, 7),)
    assert at(98, full, 9) == full and at(90, full) == (MapPressure("policy", 90, 100),)
    assert at(10, (), 3) == (MapPressure("policy", 10, 100, True, 3),), (
        "one that is too large for what is left"
    )
    assert replace(full[0], full=False) not in at(98, full, 9)
