"""The policy programs and their maps on this node. Blocking; one thread uses it."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Final

from pyroute2.iproute import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshwire.agent.kernel import remove_pins
from meshwire.agent.policy.devices import find_pod_device
from meshwire.agent.policy.model import EndpointValue, Model
from meshwire.agent.policy.room import Fill
from meshwire.agent.policy.write import entry_key, write
from meshwire.agent.settings import Settings
from meshwire.api.fields import Network
from meshwire.bpf import loader, migrate, tc
from meshwire.bpf.layouts import Direction as Hook
from meshwire.bpf.layouts import Reason
from meshwire.bpf.loader import Programs
from meshwire.bpf.maps import Counter
from meshwire.bpf.policymaps import Events, PolicyMaps
from meshwire.encryption import netlink
from meshwire.encryption.model import Link

log = logging.getLogger("meshwire.agent")

CHECK_EVERY: Final = 2.0
"""Seconds between looks at all filters; those of new devices don't wait."""

FORGIVE_EVERY: Final = 30.0
"""Seconds after which is tried again what the kernel had no room for, though there should have been."""


class PolicyKernel:
    """From one thread that runs no event loop: pyroute2 brings its own. Raises NetlinkError, OSError,
    loader.Refused, loader.IncompatibleMap and tc.Conflict; whatever was done before stays."""

    def __init__(self, settings: Settings) -> None:
        self._pins = settings.policy_pin_directory
        self._socket: IPRoute | None = None
        self._programs: Programs | None = None
        self._maps: PolicyMaps | None = None
        self._links: dict[str, Link] = {}
        self._attached: dict[tuple[int, Hook], str] = {}
        self._checked_at = 0.0
        self._is_settled = False
        self._forgave_at = 0.0

    def close(self) -> None:
        """Lets go of everything; what is attached and pinned stays in force."""
        for part in (self._maps, self._programs, self._socket):
            if part:
                part.close()
        self._maps, self._programs, self._socket = None, None, None

    @property
    def _ipr(self) -> IPRoute:
        if self._socket is None:
            self._socket = IPRoute()
        return self._socket

    def _loaded(self) -> PolicyMaps:
        # Pins that somebody removed are no longer what the next agent would find: load anew.
        if self._maps is None or not (self._pins / "endpoints").exists():
            for part in (self._maps, self._programs):
                if part:
                    part.close()
            self._maps, self._programs = None, None
            # Where an earlier agent has been at work, the pods that were there are guarded.
            self._is_settled = self._pins.exists()
            self._programs = migrate.load(self._pins, objects=loader.POLICY_OBJECTS)
            self._maps = PolicyMaps.open(self._pins)
            self._attached.clear()
        return self._maps

    def new_model(self) -> Model:
        """With what the maps hold. Its sets and revisions are above all that were given before: whatever an
        earlier agent judged is judged again."""
        maps = self._loaded()
        endpoints, entries = maps.endpoints.read(), maps.policies.read()
        flows = maps.flows.read()
        revisions = [entry.revision for entry in endpoints.values()]
        sets = [number for entry in endpoints.values() for number in (entry.set, entry.audit_set)]
        model = Model(
            revision=max([*revisions, *(flow.revision for flow in flows.values())], default=0),
            first_set=max([*sets, *(key.set for key in entries)], default=0),
        )
        self._read_into(model)
        return model

    def links(self, *, fresh: bool) -> Mapping[str, Link]:
        """All devices by name; without `fresh`, as they were seen last."""
        if fresh or not self._links:
            self._links = netlink.observe_links(self._ipr)
        return self._links

    def find_device(self, addresses: Iterable[bytes]) -> int | None:
        """The host's end of the veth of the pod that has these addresses (packed)."""
        links = {link.index: link for link in self._links.values()}
        for address in addresses:
            if (found := find_pod_device(self._ipr, address, links)) is not None:
                return found
        return None

    def metrics(self) -> dict[tuple[Reason, Hook], Counter]:
        """The policy programs' counters; none where they aren't loaded."""
        return self._maps.metrics.read() if self._maps else {}

    def fill_of(self, model: Model) -> dict[str, Fill]:
        """How full each map is, by name."""
        return model.fills(self._loaded().capacities)

    def open_events(self) -> Events | None:
        """The ring buffer, which one may read; None where it isn't there."""
        return self._maps.open_events() if self._maps else None

    def remove(self) -> None:
        """Takes everything of policy off the node."""
        if not self._pins.exists():
            return
        hooked = {
            message["index"]
            for message in self._ipr.get_qdiscs()
            if message.get_attr("TCA_KIND") == "clsact"
        }
        for index in hooked:
            for found in tc.find_filters(self._ipr, index, tc.POLICY_POD):
                tc.detach(self._ipr, found)
        for part in (self._maps, self._programs):
            if part:
                part.close()
        self._maps, self._programs = None, None
        self._attached.clear()
        self._is_settled = False
        remove_pins(self._pins)
        log.info("policy is off: its filters and maps are gone")

    def guess_pod_devices(self, own: Iterable[Network]) -> frozenset[int]:
        """Veths that have a route for a single address of this node's pods: there is a pod, or will be in a
        moment, whether the API server has said so or not."""
        veths = {link.index for link in self._links.values() if link.kind == "veth"}
        return frozenset(
            route.interfaces[0]
            for route in netlink.observe_routes()
            if route.interfaces[0] in veths
            and route.destination.prefixlen == route.destination.max_prefixlen
            and any(route.destination.network_address in block for block in own)
        )

    def apply(
        self,
        model: Model,
        outward: Iterable[Link],
        guessed: Iterable[int],
        *,
        skips_stack: bool,
        resync: bool,
        fresh: bool,
    ) -> None:
        """Brings maps and filters to what the model says. `outward` are the devices by which pods' traffic
        leaves the node, `guessed` those that seem to be pods'. `skips_stack`: that between two of them does
        so directly."""
        maps = self._loaded()
        if resync:
            self._read_into(model)
        if time.monotonic() - self._forgave_at > FORGIVE_EVERY:
            self._forgave_at = time.monotonic()
            model.forgive()
        model.update()
        model.fit(maps.capacities)
        if self._is_settled:
            # A pod that is new is guarded first, and then comes to be known to others.
            self._attach(model, outward, guessed, fresh)
            write(model, maps, skips_stack=skips_stack)
        else:
            # Pods that run already go on while there is nothing yet to judge them by.
            write(model, maps, skips_stack=skips_stack)
            self._attach(model, outward, guessed, fresh)
            self._is_settled = True

    # Maps

    def _read_into(self, model: Model) -> None:
        maps = self._loaded()
        model.identities.found(maps.identities.read_packed())
        model.cidrs.found({block: (entry.number, entry.flags) for block, entry in maps.cidrs.read().items()})
        model.services.found({address.packed: 0 for address in maps.services.read()})
        model.endpoints.found(
            {
                address.packed: EndpointValue(
                    entry.ifindex,
                    entry.identity,
                    entry.set,
                    entry.audit_set,
                    entry.revision,
                    entry.born,
                    entry.flags,
                )
                for address, entry in maps.endpoints.read().items()
            }
        )
        model.entries.found(
            {
                (key.set, entry_key(key)): (entry.deny, entry.rule)
                for key, entry in maps.policies.read().items()
            }
        )

    # Filters

    def _attach(self, model: Model, outward: Iterable[Link], guessed: Iterable[int], fresh: bool) -> None:
        wanted: dict[tuple[int, Hook], str] = {}
        for index in (*guessed, *(value.ifindex for value in model.guarded())):
            wanted[index, Hook.INGRESS] = loader.FROM_POD
            wanted[index, Hook.EGRESS] = loader.TO_POD
        for link in outward:
            wanted[link.index, Hook.INGRESS] = loader.POLICY_IN if link.ethernet else loader.POLICY_IN_L3
            wanted[link.index, Hook.EGRESS] = loader.POLICY_OUT if link.ethernet else loader.POLICY_OUT_L3
        present = {link.index for link in self._links.values()}
        if fresh and time.monotonic() - self._checked_at > CHECK_EVERY:
            self._checked_at = time.monotonic()
            self._attached = self._observe(present & {index for index, _ in (*wanted, *self._attached)})
        self._attached = {key: name for key, name in self._attached.items() if key[0] in present}
        assert self._programs
        for (index, hook), name in wanted.items():
            if self._attached.get((index, hook)) == name:
                continue
            place = tc.POLICY_POD if name in (loader.FROM_POD, loader.TO_POD) else tc.POLICY_OUT
            try:
                tc.attach(self._ipr, index, hook, self._programs.get(name), place)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise
                # The pod has just gone, and its device with it.
                continue
            self._attached[index, hook] = name
        for index, hook in self._attached.keys() - wanted.keys():
            if self._attached[index, hook] in (loader.FROM_POD, loader.TO_POD):
                # A pod that nobody knows (any more) and that is still there gets and sends nothing.
                continue
            for found in tc.find_filters(self._ipr, index, tc.POLICY_POD):
                if found.direction == hook:
                    tc.detach(self._ipr, found)
            del self._attached[index, hook]

    def _observe(self, devices: Iterable[int]) -> dict[tuple[int, Hook], str]:
        """What our filters on these devices run; empty text for what is not up to date."""
        assert self._programs
        found: dict[tuple[int, Hook], str] = {}
        for index in devices:
            for each in tc.find_filters(self._ipr, index, tc.POLICY_POD):
                is_known = each.name in self._programs.names()
                current = is_known and loader.does_the_same(each.program_id, self._programs.get(each.name))
                twice = (index, each.direction) in found
                found[index, each.direction] = each.name if current and not twice else ""
        return found
