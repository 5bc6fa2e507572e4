"""What the node's policy maps should hold, kept up to date object by object. Pure: nothing here touches the
kernel or the API."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Final

from meshwire.agent.policy.objects import (
    Backends,
    Namespace,
    Pod,
    Refused,
    Remote,
    Service,
    Slice,
)
from meshwire.agent.policy.room import LPM_SPARE, BlockClaim, Fill, Shortage, admit_blocks
from meshwire.agent.policy.tables import AddressTable, Table
from meshwire.api.fields import Network
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import Direction, Policy
from meshwire.bpf.policylayouts import CidrFlag, EndpointFlag
from meshwire.policy import identity
from meshwire.policy.compile import Compiler, EntryKey, EntryValue, PolicySet, RuleRef, TooLarge
from meshwire.policy.identity import Labels
from meshwire.policy.model import ServiceInfo

CLOSED: Final = 0
"""A set that never has entries. With default deny in both directions, its pods get and send nothing."""


@dataclass(frozen=True, slots=True)
class EndpointValue:
    """As struct mw_endpoint."""

    ifindex: int
    identity: int
    set: int
    audit_set: int
    revision: int
    born: int
    flags: EndpointFlag


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is no object of policy's own: addresses are packed. `local` are those of the node's own devices,
    `remote` the other nodes'. `cluster` are the networks that pods have addresses of, `own` those of this
    node's pods; where it has none, its pods may have any that `shared` holds. `node` is its name."""

    local: frozenset[bytes] = frozenset()
    remote: frozenset[bytes] = frozenset()
    cluster: tuple[Network, ...] = ()
    own: tuple[Network, ...] = ()
    shared: tuple[Network, ...] = ()
    node: str = ""
    excluded_labels: frozenset[str] = identity.HIGH_CARDINALITY


@dataclass(slots=True)
class _Sets:
    """One subject's rules in the `policy` map. `revision` changes with them. `entries` and `audit_entries`
    are all of them, whether there is room for them or not; those that are `closed` are not in the map, nor
    are those of audit where `audit_closed`. `barred`: because blocks that the rules name are not in
    `cidrs`."""

    number: int
    audit_number: int
    revision: int
    flags: EndpointFlag
    entries: dict[tuple[int, EntryKey], tuple[bool, int]] = field(default_factory=dict)
    audit_entries: dict[tuple[int, EntryKey], tuple[bool, int]] = field(default_factory=dict)
    closed: Shortage | None = None
    audit_closed: Shortage | None = None
    barred: bool = False
    audit_barred: bool = False


@dataclass(slots=True)
class _Subject:
    labels: Labels
    pods: set[str] = field(default_factory=set)


class Model:
    """Tables of the maps, by what the API server and the node say. `revision` and `first_set` are above all
    that are in use.

    A subject is an identity that pods of this node have. Each has a set of rules of its own; whenever a
    policy of it changes, a new set is written beside the old one and the pods are told the new number: a
    packet sees the one or the other."""

    def __init__(self, revision: int = 1, first_set: int = 1) -> None:
        self.compiler = Compiler()
        self.identities: AddressTable[int] = AddressTable()
        self.cidrs: Table[Network, tuple[int, CidrFlag]] = Table()
        self.services: AddressTable[int] = AddressTable()
        self.endpoints: AddressTable[EndpointValue] = AddressTable()
        self.entries: Table[tuple[int, EntryKey], tuple[bool, int]] = Table()
        self.policies: dict[str, Policy] = {}
        self.refused: dict[str, Refused] = {}
        self.pods: dict[str, Pod] = {}
        self.devices: dict[str, int] = {}
        self.problems: tuple[TooLarge, ...] = ()
        self._revision = revision
        self._set = first_set
        self._rule = 0
        self._around = Surroundings()
        self._apiservers: frozenset[bytes] = frozenset()
        self._namespaces: dict[str, Mapping[str, str]] = {}
        self._numbers: dict[Labels, list[int]] = {}
        self._labels: dict[int, Labels] = {}
        self._provisional: dict[Labels, int] = {}
        self._next_provisional = identity.PROVISIONAL
        self._subject_of: dict[str, int] = {}
        self._subjects: dict[int, _Subject] = {}
        self._sets: dict[int, _Sets] = {}
        self._born: dict[tuple[str, bytes], int] = {}
        self._given: set[bytes] = set()
        self._moved: dict[str, int] = {}
        self._slices: dict[str, tuple[Remote, ...]] = {}
        self._holders: dict[bytes, Remote | list[Remote]] = {}
        self._named_ports: dict[int, dict[str, Mapping[str, frozenset[tuple[int, int]]]]] = {}
        self._services: dict[str, Service] = {}
        self._backends: dict[str, Backends] = {}
        self._rules: dict[RuleRef, int] = {}
        self._rule_refs: dict[int, RuleRef] = {}
        self._own_claims: dict[bytes, dict[str, int]] = {}
        self._cidr_numbers: Mapping[Network, int] = {}
        # Of want of room.
        self._set_owners: dict[int, int] = {}
        self._kept_cidrs: Mapping[Network, int] = {}
        self._lost_addresses: frozenset[Network] = frozenset()
        self._laid_out_lost: frozenset[Network] = frozenset()
        self._refused_blocks: set[Network] = set()
        self._refused_sets: set[int] = set()
        self._cidr_capacity = 0
        self._blocks_left_out = 0
        self._fit_blocks_anew = True
        self._unplaced: dict[int, Shortage] = {}

    @property
    def is_settled(self) -> bool:
        """All maps hold what they should."""
        return all(
            table.is_settled
            for table in (self.identities, self.cidrs, self.services, self.endpoints, self.entries)
        )

    # Policies

    def put_policy(self, policy: Policy) -> None:
        self.refused.pop(policy.uid, None)
        if self.policies.get(policy.uid) != policy:
            self.policies[policy.uid] = policy
            self.compiler.put_policy(policy)

    def refuse_policy(self, refused: Refused) -> None:
        """What was in force of it stays in force."""
        self.refused[refused.uid] = refused

    def remove_policy(self, uid: str) -> None:
        self.refused.pop(uid, None)
        if self.policies.pop(uid, None):
            self.compiler.remove_policy(uid)
            for ref in [ref for ref in self._rules if ref.policy == uid]:
                del self._rule_refs[self._rules.pop(ref)]

    def rule(self, number: int) -> tuple[Policy, str] | None:
        """The policy and the path of a rule that the datapath names, e.g. `spec.ingress[0]`."""
        ref = self._rule_refs.get(number)
        policy = self.policies.get(ref.policy) if ref else None
        return (policy, ref.path) if ref and policy else None

    # Identities and their addresses

    def put_identity(self, found: MeshIdentity) -> None:
        if self._labels.get(found.number) == found.labels:
            return
        self.remove_identity(found.number)
        self._labels[found.number] = found.labels
        self._numbers.setdefault(found.labels, []).append(found.number)
        self.compiler.put_identity(found.number, dict(found.labels))
        self._renumber(found.labels)

    def remove_identity(self, number: int) -> None:
        if (labels := self._labels.pop(number, None)) is None:
            return
        numbers = self._numbers[labels]
        numbers.remove(number)
        if not numbers:
            del self._numbers[labels]
        # First: pods of this node that still have these labels get another number.
        self._renumber(labels)
        self.compiler.remove_identity(number)

    def put_slice(self, found: Slice) -> None:
        old, new = self._slices.get(found.name, ()), set(found.pods)
        # First what is new: a pod that only changes is never nobody's.
        kept = [remote for remote in old if remote in new]
        added = new.difference(kept)
        self._slices[found.name] = (*kept, *added)
        for remote in added:
            for address in remote.addresses:
                self._hold(address, [*self._holding(address), remote])
                self._resolve(address)
            if remote.ports:
                self._name_ports(remote.identity, remote.uid, remote.ports)
        self._release(remote for remote in old if remote not in new)

    def remove_slice(self, name: str) -> None:
        self._release(self._slices.pop(name, ()))

    def _release(self, remotes: Iterable[Remote]) -> None:
        for remote in remotes:
            for address in remote.addresses:
                holders = self._holding(address)
                # One of them, where another slice has the same.
                holders.remove(remote)
                self._hold(address, holders)
                self._resolve(address)
            still = (each for address in remote.addresses for each in self._holding(address))
            # A pod of this node has its ports whatever others hear of it.
            if (
                remote.ports
                and self._subject_of.get(remote.uid) != remote.identity
                and not any((each.uid, each.identity) == (remote.uid, remote.identity) for each in still)
            ):
                self._name_ports(remote.identity, remote.uid, ())

    def _holding(self, address: bytes) -> list[Remote]:
        """The pods that slices have with this address."""
        found = self._holders.get(address)
        if found is None:
            return []
        return [found] if isinstance(found, Remote) else list(found)

    def _hold(self, address: bytes, remotes: list[Remote]) -> None:
        # Nearly all addresses are one pod's.
        if remotes:
            self._holders[address] = remotes[0] if len(remotes) == 1 else remotes
        else:
            self._holders.pop(address, None)

    def pod_name(self, address: bytes) -> tuple[str, str] | None:
        """(namespace, name) of the pod that has an address."""
        for uid in self._own_claims.get(address, {}):
            return self.pods[uid].namespace, self.pods[uid].name
        for remote in self._holding(address):
            return remote.namespace, remote.name
        return None

    def labels_of(self, number: int) -> Labels:
        if number in self._labels:
            return self._labels[number]
        return next((labels for labels, own in self._provisional.items() if own == number), ())

    def _name_ports(self, number: int, pod: str, ports: Iterable[tuple[str, int, int]]) -> None:
        """Pods of one identity may give a port's name to different numbers: each of them counts. `ports` as
        in Pod; none: the pod is gone, or names none."""
        by_pod = self._named_ports.setdefault(number, {})
        found: dict[str, set[tuple[int, int]]] = {}
        for name, protocol, port in ports:
            found.setdefault(name, set()).add((protocol, port))
        if found:
            by_pod[pod] = {name: frozenset(pairs) for name, pairs in found.items()}
        else:
            by_pod.pop(pod, None)
        union: dict[str, frozenset[tuple[int, int]]] = {}
        for each in by_pod.values():
            for name, pairs in each.items():
                union[name] = union.get(name, frozenset()) | pairs
        if not by_pod:
            del self._named_ports[number]
        self.compiler.set_named_ports(number, union)

    def _resolve(self, address: bytes) -> None:
        """Whose an address is. Nodes before pods: a pod can't make itself pass for a node. Where two pods
        have it, and differ in what they may do, nobody can say which of them sends: it is unknown."""
        around = self._around
        is_api = address in self._apiservers
        number: int | None = None
        if address in around.local:
            number = identity.APISERVER_HOST if is_api else identity.HOST
        elif address in around.remote:
            number = identity.APISERVER_NODE if is_api else identity.REMOTE_NODE
        elif own := self._own_claims.get(address):
            number = own[self._newest(own)]
        elif self._is_own(address):
            # A pod of this node that others know of already: until it is guarded, nobody is to talk to it.
            number = None
        elif holders := self._holding(address):
            numbers = {remote.identity for remote in holders}
            number = numbers.pop() if len(numbers) == 1 else identity.UNKNOWN
        elif is_api:
            number = identity.APISERVER
        if number is None:
            self.identities.discard(address)
        else:
            self.identities.set(address, number)

    def _is_own(self, address: bytes) -> bool:
        around = self._around
        if not around.own:
            return any(remote.node == around.node for remote in self._holding(address))
        parsed = ip_address(address)
        return any(parsed in block for block in around.own)

    def _newest(self, uids: Iterable[str]) -> str:
        return max(uids, key=lambda uid: (self.pods[uid].created, uid))

    # Pods of this node

    def put_pod(self, pod: Pod) -> None:
        old = self.pods.get(pod.uid)
        if old == pod:
            return
        self.pods[pod.uid] = pod
        if old and old.addresses != pod.addresses:
            self.devices.pop(pod.uid, None)
            self._withdraw(old)
        self._settle(pod)

    def remove_pod(self, uid: str) -> None:
        if pod := self.pods.get(uid):
            self._withdraw(pod)
            self._leave_subject(uid)
            del self.pods[uid]
            self.devices.pop(uid, None)
            self._moved.pop(uid, None)

    def waiting_for_device(self) -> list[Pod]:
        """Pods that have an address, and whose device has not been found yet."""
        return [pod for pod in self.pods.values() if pod.addresses and pod.uid not in self.devices]

    def lost_devices(self, present: Container[int]) -> list[Pod]:
        """Pods whose device is not among the indexes that there are."""
        return [self.pods[uid] for uid, index in self.devices.items() if index not in present]

    def set_device(self, uid: str, ifindex: int | None) -> None:
        """Index of the host's end of the pod's veth; None: it is gone."""
        if ifindex is None:
            self.devices.pop(uid, None)
        else:
            self.devices[uid] = ifindex
        self._endpoints_of(self.pods[uid])

    def put_namespace(self, found: Namespace) -> None:
        if self._namespaces.get(found.name) != found.labels:
            self._namespaces[found.name] = found.labels
            for pod in list(self.pods.values()):
                if pod.namespace == found.name:
                    self._settle(pod)

    def remove_namespace(self, name: str) -> None:
        # Its pods are gone before it, or on their way: they keep what they have.
        self._namespaces.pop(name, None)

    def _settle(self, pod: Pod) -> None:
        """The pod's identity and addresses."""
        if (namespace_labels := self._namespaces.get(pod.namespace)) is None:
            return
        labels = identity.identity_labels(
            namespace=pod.namespace,
            namespace_labels=namespace_labels,
            service_account=pod.service_account,
            pod_labels=dict(pod.labels),
            excluded=self._around.excluded_labels,
        )
        number = self._number(labels)
        if (before := self._subject_of.get(pod.uid)) != number:
            if before is not None:
                # The rules that it comes under may be older than what it has open.
                self._moved[pod.uid] = self._next_revision()
            self._leave_subject(pod.uid)
            self._subject_of[pod.uid] = number
            if number not in self._subjects:
                self._subjects[number] = _Subject(labels)
                self.compiler.add_subject(number)
            self._subjects[number].pods.add(pod.uid)
        if pod.ports or pod.uid in self._named_ports.get(number, {}):
            self._name_ports(number, pod.uid, pod.ports)
        for address in pod.addresses:
            self._own_claims.setdefault(address, {})[pod.uid] = number
            self._resolve(address)
        self._endpoints_of(pod)

    def _number(self, labels: Labels) -> int:
        """The operator's, or one of our own until there is one."""
        if numbers := self._numbers.get(labels):
            return min(numbers)
        if labels not in self._provisional:
            self._provisional[labels] = self._next_provisional
            self._next_provisional += 1
            self.compiler.put_identity(self._provisional[labels], dict(labels))
        return self._provisional[labels]

    def _renumber(self, labels: Labels) -> None:
        """The operator has given these labels a number, or taken it away."""
        for subject in [each for each in self._subjects.values() if each.labels == labels]:
            for uid in sorted(subject.pods):
                self._settle(self.pods[uid])

    def _leave_subject(self, uid: str) -> None:
        if (number := self._subject_of.pop(uid, None)) is None:
            return
        if self.pods[uid].ports:
            self._name_ports(number, uid, ())
        subject = self._subjects[number]
        subject.pods.discard(uid)
        if subject.pods:
            return
        del self._subjects[number]
        self.compiler.remove_subject(number)
        self._drop_sets(number)
        if self._provisional.get(subject.labels) == number:
            del self._provisional[subject.labels]
            self.compiler.remove_identity(number)

    def _withdraw(self, pod: Pod) -> None:
        """The pod no longer has its addresses."""
        for address in pod.addresses:
            claims = self._own_claims.get(address, {})
            claims.pop(pod.uid, None)
            if not claims:
                self._own_claims.pop(address, None)
            self._born.pop((pod.uid, address), None)
            self._resolve(address)
            if claims:
                self._endpoints_of(self.pods[self._newest(claims)])
            else:
                self.endpoints.discard(address)

    # Services and surroundings

    def put_service(self, service: Service) -> None:
        self.remove_service(service.uid)
        self._services[service.uid] = service
        for address in service.addresses:
            self.services.set(address, 0)
        self._tell_service(service.namespace, service.name)

    def remove_service(self, uid: str) -> None:
        if (old := self._services.pop(uid, None)) is None:
            return
        still = {address for service in self._services.values() for address in service.addresses}
        for address in old.addresses:
            if address not in still:
                self.services.discard(address)
        self._tell_service(old.namespace, old.name)

    def put_backends(self, found: Backends) -> None:
        self.remove_backends(found.uid)
        self._backends[found.uid] = found
        self._tell_service(found.namespace, found.service)

    def remove_backends(self, uid: str) -> None:
        if old := self._backends.pop(uid, None):
            self._tell_service(old.namespace, old.service)

    def _tell_service(self, namespace: str, name: str) -> None:
        if (namespace, name) == ("default", "kubernetes"):
            self._find_apiservers()
        services = [
            each for each in self._services.values() if (each.namespace, each.name) == (namespace, name)
        ]
        if not services:
            self.compiler.remove_service(namespace, name)
            return
        service = services[-1]
        addresses = {
            address
            for each in self._backends.values()
            if (each.namespace, each.service) == (namespace, name)
            for address in each.addresses
        }
        self.compiler.set_service(
            namespace,
            name,
            ServiceInfo(
                labels=dict(service.labels),
                selector=dict(service.selector) if service.selector else None,
                addresses=frozenset(ip_address(address) for address in addresses),
            ),
        )

    def _find_apiservers(self) -> None:
        """The API servers write their own addresses there, wherever they run."""
        old = self._apiservers
        self._apiservers = frozenset(
            address
            for each in self._backends.values()
            if (each.namespace, each.service) == ("default", "kubernetes")
            for address in each.addresses
        )
        for address in old ^ self._apiservers:
            self._resolve(address)

    def set_surroundings(self, around: Surroundings) -> None:
        if around == self._around:
            return
        old, self._around = self._around, around
        for address in (old.local ^ around.local) | (old.remote ^ around.remote):
            self._resolve(address)
        if (old.cluster, old.own, old.shared) != (around.cluster, around.own, around.shared):
            self._fit_blocks_anew = True
            self._lay_out_cidrs()
            for address in list(self._holders):
                self._resolve(address)
        if old.excluded_labels != around.excluded_labels:
            for pod in list(self.pods.values()):
                self._settle(pod)

    def _own_blocks(self) -> dict[Network, CidrFlag]:
        """Those that the cluster has its addresses of."""
        flags: dict[Network, CidrFlag] = dict.fromkeys(self._lost_addresses, CidrFlag.CLUSTER)
        flags |= dict.fromkeys(self._around.cluster, CidrFlag.CLUSTER)
        flags |= dict.fromkeys(self._around.own, CidrFlag.CLUSTER | CidrFlag.LOCAL)
        # Whoever isn't known may be a pod of this node that nothing guards yet, or one of another node.
        flags |= dict.fromkeys(self._around.shared, CidrFlag.CLUSTER | CidrFlag.LOCAL)
        return flags

    def _lay_out_cidrs(self) -> None:
        """Every block's entry says all there is to know of it: the longest match alone decides."""
        flags = self._own_blocks()
        blocks = sorted(
            self._kept_cidrs.keys() | flags.keys(),
            key=lambda block: (block.version, int(block.network_address), block.prefixlen),
        )
        entries: dict[Network, tuple[int, CidrFlag]] = {}
        # Blocks nest or are disjoint, so those around the present one form a stack.
        around: list[Network] = []
        for block in blocks:
            while around and not (
                around[-1].version == block.version
                and int(around[-1].broadcast_address) >= int(block.broadcast_address)
            ):
                around.pop()
            number, inherited = entries[around[-1]] if around else (0, CidrFlag(0))
            entries[block] = (
                self._kept_cidrs.get(block, number),
                flags.get(block, CidrFlag(0)) | inherited,
            )
            around.append(block)
        self.cidrs.replace(entries)
        self._laid_out_lost = self._lost_addresses

    # What follows from all of this

    def concerned(self) -> list[Policy]:
        """Policies that select pods of this node."""
        found = {policy.uid: policy for number in self._subjects for policy in self.policies_of(number)}
        return list(found.values())

    def policies_of(self, subject: int) -> list[Policy]:
        """Those that select it."""
        return [self.policies[uid] for uid in self.compiler.policies_of(subject)]

    def update(self) -> None:
        """Brings what the compiler has found since into the tables."""
        changes = self.compiler.changes()
        if changes.cidrs != self._cidr_numbers:
            self._cidr_numbers = dict(changes.cidrs)
            # As if there were room for all, until `fit` says what there is.
            self._kept_cidrs = self._cidr_numbers
            self._fit_blocks_anew = True
            self._lay_out_cidrs()
        self._fit_blocks_anew |= bool(changes.rebuilt or changes.removed)
        for number, change in changes.rebuilt.items():
            self._replace_sets(number, change.enforced, change.audit)
        for number, touched in changes.touched.items():
            if sets := self._sets.get(number):
                self._touch(sets, touched.enforced, audit=False)
                self._touch(sets, touched.audit, audit=True)
                sets.revision = self._next_revision()
                self._endpoints_of_subject(number)
        self.problems = changes.problems

    def cidrs_written(self) -> None:
        """Flows that were judged while blocks were still as before are judged again."""
        for number, sets in self._sets.items():
            if not sets.closed and sets.flags & (EndpointFlag.INGRESS_CIDRS | EndpointFlag.EGRESS_CIDRS):
                sets.revision = self._next_revision()
                self._endpoints_of_subject(number)

    def _replace_sets(self, number: int, enforced: PolicySet, audit: PolicySet | None) -> None:
        self._drop_sets(number)
        sets = _Sets(
            self._next_set(),
            self._next_set() if audit else 0,
            self._next_revision(),
            _flags(enforced, audit),
        )
        self._sets[number] = sets
        self._set_owners |= {each: number for each in (sets.number, sets.audit_number) if each}
        self._touch(sets, enforced.entries, audit=False)
        if audit:
            self._touch(sets, audit.entries, audit=True)
        self._endpoints_of_subject(number)

    def _touch(self, sets: _Sets, entries: Mapping[EntryKey, EntryValue | None], *, audit: bool) -> None:
        number = sets.audit_number if audit else sets.number
        known = sets.audit_entries if audit else sets.entries
        in_map = not (sets.closed or (audit and sets.audit_closed))
        for key, value in entries.items():
            if value is None:
                self.entries.discard((number, key))
                known.pop((number, key), None)
            else:
                known[number, key] = value.deny, self._rule_number(value.rule)
                if in_map:
                    self.entries.set((number, key), known[number, key])

    def _drop_sets(self, number: int) -> None:
        if sets := self._sets.pop(number, None):
            self._take_out(sets.entries)
            self._take_out(sets.audit_entries)
            for each in (sets.number, sets.audit_number):
                self._set_owners.pop(each, None)
                self._refused_sets.discard(each)

    def _take_out(self, keys: Iterable[tuple[int, EntryKey]]) -> None:
        for key in keys:
            self.entries.discard(key)

    def _rule_number(self, ref: RuleRef) -> int:
        if ref not in self._rules:
            self._rule += 1
            self._rules[ref], self._rule_refs[self._rule] = self._rule, ref
        return self._rules[ref]

    def _next_revision(self) -> int:
        self._revision += 1
        return self._revision

    def _next_set(self) -> int:
        self._set += 1
        return self._set

    def _endpoints_of_subject(self, number: int) -> None:
        for uid in self._subjects[number].pods:
            self._endpoints_of(self.pods[uid])

    def _endpoints_of(self, pod: Pod) -> None:
        number = self._subject_of.get(pod.uid)
        sets = self._sets.get(number) if number is not None else None
        device = self.devices.get(pod.uid)
        for address in pod.addresses:
            claims = self._own_claims.get(address)
            if not claims or self._newest(claims) != pod.uid:
                continue
            if number is None or sets is None or device is None:
                # Not yet, or not any more: without an entry it neither sends nor receives.
                self.endpoints.discard(address)
                continue
            # Flows of the pod that had the address before are not its own. One that is still at the device
            # where an earlier agent left it is the same.
            if (pod.uid, address) not in self._born:
                left = self.endpoints.held(address) if address not in self._given else None
                same = left is not None and left.ifindex == device
                self._born[pod.uid, address] = left.born if left and same else self._next_revision()
                self._given.add(address)
            born = self._born[pod.uid, address]
            has_audit = not (sets.closed or sets.audit_closed)
            flags = sets.flags if has_audit else sets.flags & ~_AUDITED
            self.endpoints.set(
                address,
                EndpointValue(
                    ifindex=device,
                    identity=number,
                    set=CLOSED if sets.closed else sets.number,
                    audit_set=sets.audit_number if has_audit else 0,
                    revision=max(sets.revision, born, self._moved.get(pod.uid, 0)),
                    born=born,
                    flags=_ENFORCED if sets.closed else flags,
                ),
            )

    # Room

    def fit(self, capacities: Mapping[str, int]) -> bool:
        """Leaves out what single maps have no room for, by their capacities in entries; whether that is
        different from before. What there is no room for in `policy` turns out when it is written."""
        changed = self.identities.fit(capacities["identities"], self._goes_first)
        changed |= self.endpoints.fit(capacities["endpoints"])
        # Those that go are still there when the new ones come.
        changed |= self.services.fit(capacities["services"] - len(self.services.deletes()))
        changed |= self._find_lost()
        room = capacities["cidrs"] - LPM_SPARE
        if self._fit_blocks_anew or room != self._cidr_capacity:
            self._fit_blocks_anew, self._cidr_capacity = False, room
            changed |= self._fit_blocks()
        self._unplaced = {
            subject: self._unplaced.get(subject, Shortage("endpoints", capacities["endpoints"], count))
            for subject, count in self._count_unplaced().items()
        }
        return changed

    def _goes_first(self, address: bytes) -> bool:
        """Among `identities`: a node without its own pods' and the nodes' addresses would serve nobody."""
        around = self._around
        return (
            address in self._own_claims
            or address in around.local
            or address in around.remote
            or address in self._apiservers
        )

    def _find_lost(self) -> bool:
        """An address that is in no map must not pass for one of the world."""
        lost: set[Network] = set()
        if self.identities.left_out:
            cluster = set(self._around.cluster)
            lengths = {(block.version, block.prefixlen) for block in cluster}
            lost = {
                alone
                for alone in map(ip_network, self.identities.left_out)
                if not any(
                    version == alone.version and alone.supernet(new_prefix=length) in cluster
                    for version, length in lengths
                )
            }
        if lost != self._lost_addresses:
            self._lost_addresses = frozenset(lost)
            self._fit_blocks_anew = True
            return True
        return False

    def _fit_blocks(self) -> bool:
        base = self._own_blocks()
        wanted = len(base.keys() | self._cidr_numbers.keys())
        enforced: frozenset[int] | None = None
        audited: frozenset[int] | None = None
        kept = self._cidr_numbers
        if wanted > self._cidr_capacity or self._refused_blocks:
            claims = [self._claim_blocks(number, audit=False) for number in self._sets]
            claims = [each for each in claims if self._refused_blocks.isdisjoint(each.blocks)]
            if not self._refused_blocks.isdisjoint(base):
                claims = []
            enforced, named = admit_blocks(base, claims, self._cidr_capacity)
            audits = [
                self._claim_blocks(number, audit=True)
                for number in enforced
                if self._sets[number].audit_number
            ]
            audits = [each for each in audits if self._refused_blocks.isdisjoint(each.blocks)]
            audited, more = admit_blocks(base.keys() | named, audits, self._cidr_capacity)
            named |= more
            kept = {block: number for block, number in self._cidr_numbers.items() if block in named}
        if changed := kept != self._kept_cidrs:
            self._kept_cidrs = kept
        if changed or self._lost_addresses != self._laid_out_lost or len(base) > self._cidr_capacity:
            self._lay_out_cidrs()
        if len(base) > self._cidr_capacity:
            # This node's own before the others': who is not guarded here must be out of reach.
            ranked = sorted(base, key=lambda each: (CidrFlag.LOCAL not in base[each], str(each)))
            self.cidrs.replace({each: self.cidrs.desired[each] for each in ranked[: self._cidr_capacity]})
        self._blocks_left_out = wanted - len(self.cidrs.desired)
        for number, sets in self._sets.items():
            barred = enforced is not None and number not in enforced
            audit_barred = audited is not None and number not in audited
            changed |= (sets.barred, sets.audit_barred) != (barred, audit_barred)
            sets.barred, sets.audit_barred = barred, audit_barred
            if barred or (audit_barred and sets.audit_number):
                blocks = self.compiler.blocks_of(number, audit=not barred)
                shortage = Shortage("cidrs", self._cidr_capacity + LPM_SPARE, len(blocks))
                self.close(number, shortage, audit=not barred)
        return changed

    def _are_held(self, blocks: Iterable[Network]) -> bool:
        return all(self.cidrs.held(block) is not None for block in blocks)

    def _claim_blocks(self, number: int, *, audit: bool) -> BlockClaim:
        blocks = self.compiler.blocks_of(number, audit=audit)
        is_held = self.is_in_force(number) and self._are_held(blocks)
        return BlockClaim(0 if is_held else 1, number, blocks)

    def close(self, subject: int, shortage: Shortage, *, audit: bool = False) -> None:
        """Takes the sets of a subject (of `audit` only: that one) out of `entries`, for want of room. Its
        pods get and send nothing then; without a set of audit it is only not told what would be denied."""
        sets = self._sets[subject]
        if audit:
            if sets.audit_closed or sets.closed:
                sets.audit_closed = sets.audit_closed or shortage
                return
            sets.audit_closed = shortage
        else:
            if sets.closed:
                if sets.closed.map != shortage.map:
                    sets.closed = shortage
                return
            sets.closed = shortage
            if sets.audit_number:
                sets.audit_closed = sets.audit_closed or shortage
            self._take_out(sets.entries)
        self._take_out(sets.audit_entries)
        sets.revision = self._next_revision()
        self._endpoints_of_subject(subject)

    def open(self, subject: int, *, audit: bool = False) -> None:
        """The opposite: there is room. First the enforced set, then `audit`."""
        sets = self._sets[subject]
        if audit:
            sets.audit_closed = None
        else:
            sets.closed = None
        for key, value in (sets.audit_entries if audit else sets.entries).items():
            self.entries.set(key, value)
        sets.revision = self._next_revision()
        self._endpoints_of_subject(subject)

    def refuse_set(self, number: int, capacity: int) -> None:
        """The kernel has no room for the set, whatever was planned: closed until `forgive`."""
        if (subject := self._set_owners.get(number)) is not None:
            audit = number != self._sets[subject].number
            self._refused_sets.add(number)
            self.close(
                subject, Shortage("policy", capacity, self.size_of(subject, audit=audit)), audit=audit
            )

    def refuse_block(self, block: Network) -> None:
        """The same for a block: closes all that can't do without it."""
        self._refused_blocks.add(block)
        self._fit_blocks_anew = True
        self._fit_blocks()

    def forgive(self) -> None:
        """Whatever the kernel refused may be tried again."""
        if self._refused_blocks:
            self._refused_blocks.clear()
            self._fit_blocks_anew = True
        self._refused_sets.clear()
        for table in (self.identities, self.services, self.endpoints):
            table.forgive()

    def owner_of(self, set_number: int) -> tuple[int, bool] | None:
        """The subject, and whether it is its set of audit."""
        if (subject := self._set_owners.get(set_number)) is None:
            return None
        return subject, set_number != self._sets[subject].number

    def sets_of(self, subjects: Iterable[int]) -> set[int]:
        """Numbers of their sets."""
        sets = [self._sets[subject] for subject in subjects]
        return {number for each in sets for number in (each.number, each.audit_number)}

    def size_of(self, subject: int, *, audit: bool) -> int:
        """Entries of its set, whether there is room for them or not."""
        sets = self._sets[subject]
        return len(sets.audit_entries if audit else sets.entries)

    def open_audits(self) -> dict[int, int]:
        """Subject -> entries of its set of audit, of those that have entries in the map."""
        return {
            number: len(sets.audit_entries)
            for number, sets in self._sets.items()
            if sets.audit_entries and not sets.closed and not sets.audit_closed
        }

    def is_in_force(self, subject: int) -> bool:
        """Pods of it are judged by a set of rules, be it an older one, by what the kernel has."""
        return any(
            (value := self.endpoints.held(address)) is not None and value.set != CLOSED
            for uid in self._subjects[subject].pods
            for address in self.pods[uid].addresses
        )

    def waiting(self, *, audit: bool) -> dict[int, int]:
        """Closed subjects (with `audit`: open ones without a set of audit that they should have) that could
        be opened if there were room -> entries that they need."""
        found: dict[int, int] = {}
        for number, sets in self._sets.items():
            closed = (sets.audit_closed and not sets.closed) if audit else sets.closed
            barred = sets.audit_barred if audit else sets.barred
            own = sets.audit_number if audit else sets.number
            if not closed or barred or own in self._refused_sets:
                continue
            found[number] = self.size_of(number, audit=audit)
        return found

    def shortages(self) -> list[tuple[int, bool, Shortage]]:
        """(subject, whether only its set of audit is concerned, why), in order."""
        found = [
            (number, sets.closed is None, shortage)
            for number, sets in self._sets.items()
            if (shortage := sets.closed or sets.audit_closed)
        ]
        found += [(number, False, shortage) for number, shortage in self._unplaced.items()]
        return sorted(found, key=lambda each: each[:2])

    def closed_pods(self) -> frozenset[str]:
        """uids of pods that get and send nothing, for want of room or because their first policies are too
        large."""
        closed = {number for number, sets in self._sets.items() if sets.closed}
        closed |= {
            problem.subject
            for problem in self.problems
            if not problem.audit
            and (sets := self._sets.get(problem.subject)) is not None
            and not sets.entries
            and sets.flags & _ENFORCED == _ENFORCED
        }
        pods = {uid for number in closed for uid in self._subjects[number].pods}
        return frozenset(pods | {uid for uid, pod in self.pods.items() if self._is_unplaced(pod)})

    def _is_unplaced(self, pod: Pod) -> bool:
        left_out = self.endpoints.left_out
        return bool(left_out) and any(address in left_out for address in pod.addresses)

    def _count_unplaced(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for value in self.endpoints.left_out.values():
            counts[value.identity] = counts.get(value.identity, 0) + 1
        return counts

    def fills(self, capacities: Mapping[str, int]) -> dict[str, Fill]:
        """How full the maps are, by their names and capacities."""
        sets = self._sets.values()
        lost = sum(len(each.entries) for each in sets if each.closed)
        lost += sum(len(each.audit_entries) for each in sets if each.closed or each.audit_closed)
        counts = {
            "cidrs": (self.cidrs.size, self._blocks_left_out),
            "endpoints": (self.endpoints.size, len(self.endpoints.left_out)),
            "identities": (self.identities.size, len(self.identities.left_out)),
            "policy": (self.entries.size, lost),
            "services": (self.services.size, len(self.services.left_out)),
        }
        return {name: Fill(held, capacities[name], out) for name, (held, out) in counts.items()}

    def guarded(self) -> Iterator[EndpointValue]:
        """Of all pods whose device is known, whether there is room for them or not: without room, they must
        be out of reach."""
        yield from self.endpoints.desired.values()
        yield from self.endpoints.left_out.values()


_ENFORCED: Final = EndpointFlag.INGRESS_ENFORCED | EndpointFlag.EGRESS_ENFORCED
_AUDITED: Final = EndpointFlag.INGRESS_AUDITED | EndpointFlag.EGRESS_AUDITED


def _flags(enforced: PolicySet, audit: PolicySet | None) -> EndpointFlag:
    uses = enforced.uses_cidrs | (audit.uses_cidrs if audit else frozenset())
    flags = EndpointFlag(0)
    for directions, ingress, egress in (
        (enforced.enforced, EndpointFlag.INGRESS_ENFORCED, EndpointFlag.EGRESS_ENFORCED),
        (audit.enforced if audit else (), EndpointFlag.INGRESS_AUDITED, EndpointFlag.EGRESS_AUDITED),
        (uses, EndpointFlag.INGRESS_CIDRS, EndpointFlag.EGRESS_CIDRS),
    ):
        flags |= ingress if Direction.INGRESS in directions else EndpointFlag(0)
        flags |= egress if Direction.EGRESS in directions else EndpointFlag(0)
    return flags
