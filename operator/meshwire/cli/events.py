"""Events of the datapath as agents print them, one JSON object a line: read, chosen, put in order, put in
words. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from fnmatch import fnmatchcase
from heapq import heappop, heappush
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

from meshwire.api import fields
from meshwire.api.fields import InvalidSpec
from meshwire.policy.identity import NAMES

AUDIT: Final = "AUDIT"
DROP: Final = "DROP"
POLICY_REASONS: Final = frozenset({"DROP_POLICY_INGRESS", "DROP_POLICY_EGRESS"})
REASONS: Final[Mapping[str, str]] = {
    "DROP_SPOOFED_SOURCE": "the sending pod doesn't have this address",
    "DROP_WRONG_POD": "the receiving pod doesn't have this address",
    "DROP_FRAGMENT_UNKNOWN": "a fragment whose first one was not seen, or not let through",
    "DROP_MALFORMED": "its header is truncated or impossible",
    "DROP_NO_TUNNEL": "there is no proven tunnel to its node",
    "DROP_UNKNOWN_NODE": "its address is in the cluster, and of no known node",
    "DROP_CLEAR_ARRIVED": "it came in clear and should have come through a tunnel",
    "DROP_BAD_SOURCE": "it came through a tunnel from an address that is not its node's",
    "DROP_TOO_BIG": "it does not fit the tunnel",
    "DROP_ENCAPSULATED": "pod traffic in another tunnel, on its way out in clear",
    "DROP_BAD_DESTINATION": "it came through a tunnel for an address that is not this node's",
    "DROP_NO_SUCH_POD": "no pod of this node has its address",
    "DROP_UNKNOWN_POD": "its address is this node's, of no pod that is known (yet)",
    "DROP_QUARANTINED": "the node at its other end is quarantined, or this one is",
    "DROP_PORTS_IN_USE": "a service leads it to where the pod has a connection with the same ports",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`pod`: NAMESPACE/NAME, empty for none or one not known; `port` 0: none."""

    address: str
    port: int = 0
    identity: int = 0
    pod: str = ""

    @property
    def words(self) -> str:
        if not self.pod:
            name = NAMES.get(self.identity, f"identity {self.identity}")
            return f"{name} {self.endpoint}"
        return f"{self.pod}:{self.port}" if self.port else self.pod

    @property
    def endpoint(self) -> str:
        if not self.port:
            return self.address
        try:
            is_long = isinstance(ip_address(self.address), IPv6Address)
        except ValueError:
            is_long = False
        return f"[{self.address}]:{self.port}" if is_long else f"{self.address}:{self.port}"

    def is_meant(self, pattern: str) -> bool:
        """By a pod's name, in which * and ? stand for others, or an address."""
        return fnmatchcase(self.pod, pattern) if "/" in pattern else self.address == pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`rule`: kind, namespace, name and path of what decided; empty: no rule allowed it. `count`: as many
    packets are told of at once."""

    time: datetime
    node: str
    verdict: str
    reason: str
    direction: str
    protocol: str
    source: Peer
    destination: Peer
    rule: str = ""
    isolated_by: tuple[str, ...] = ()
    count: int = 1
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)


def parse(line: str) -> Event:
    """Raises InvalidSpec."""
    try:
        source = json.loads(line)
    except ValueError:
        source = None
    if not isinstance(source, dict):
        raise InvalidSpec("event", "must be an object in JSON")
    try:
        time = datetime.fromisoformat(fields.text(source, "time", ""))
    except ValueError:
        raise InvalidSpec("time", "must be a date and time as in RFC 3339") from None
    if time.tzinfo is None:
        raise InvalidSpec("time", "must say its distance from UTC")
    return Event(
        time=time,
        node=fields.text(source, "node", ""),
        verdict=fields.text(source, "verdict", ""),
        reason=fields.text(source, "reason", ""),
        direction=fields.text(source, "direction", ""),
        protocol=fields.text(source, "protocol", ""),
        source=_peer(fields.child(source, "source", ""), "source"),
        destination=_peer(fields.child(source, "destination", ""), "destination"),
        rule=_rule(fields.child(source, "policy", "")),
        isolated_by=fields.listed(source, "isolatedBy", "", lambda item, path: str(item)),
        count=fields.integer(source, "count", "", default=1),
        raw=source,
    )


def _peer(source: Mapping[str, Any], path: str) -> Peer:
    return Peer(
        address=fields.text(source, "address", path),
        port=fields.integer(source, "port", path, default=0, high=65535),
        identity=fields.integer(source, "identity", path, default=0),
        pod=fields.text(source, "pod", path),
    )


def _rule(source: Mapping[str, Any]) -> str:
    if not source:
        return ""
    namespace, name = (fields.text(source, key, "policy") for key in ("namespace", "name"))
    path = fields.text(source, "path", "policy")
    title = f"{namespace}/{name}" if namespace else name
    return f"{fields.text(source, 'kind', 'policy')} {title} {path}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What of all events is shown; what is empty lets everything through."""

    verdict: str = ""
    nodes: frozenset[str] = frozenset()
    source: str = ""
    destination: str = ""

    def takes(self, event: Event) -> bool:
        return (
            self.verdict in ("", event.verdict)
            and (not self.nodes or event.node in self.nodes)
            and (not self.source or event.source.is_meant(self.source))
            and (not self.destination or event.destination.is_meant(self.destination))
        )


def words(event: Event, zone: tzinfo | None = None) -> str:
    """The event on one line; `zone` None: the local time."""
    time = event.time.astimezone(zone).isoformat(timespec="milliseconds")[11:23]
    source = f"{event.source.pod} {event.source.endpoint}" if event.source.pod else event.source.words
    flow = f"{source} -> {event.destination.words} {event.protocol}"
    times = f" ({event.count} times)" if event.count > 1 else ""
    return f"{time} {event.node} {event.verdict} {event.direction} {flow}: {_why(event)}{times}"


def _why(event: Event) -> str:
    would = event.verdict == AUDIT
    if event.rule:
        return f"{'would be ' if would else ''}denied by {event.rule}"
    if event.reason not in POLICY_REASONS:
        return REASONS.get(event.reason, event.reason)
    isolating = f" (isolated by {', '.join(event.isolated_by)})" if event.isolated_by else ""
    return f"no rule {'would allow' if would else 'allows'} it{isolating}"


class Merger:
    """Puts events of many nodes in the order of their times, as far as they arrive within `patience`
    seconds; `now` is a clock in seconds."""

    def __init__(self, now: Callable[[], float], patience: float) -> None:
        self._now = now
        self._patience = patience
        self._waiting: list[tuple[datetime, int, float, Event]] = []
        self._count = 0

    def put(self, event: Event) -> None:
        self._count += 1
        heappush(self._waiting, (event.time, self._count, self._now(), event))

    def take(self) -> list[Event]:
        """Those that have waited long enough, and those before them."""
        until = self._now() - self._patience
        due = [time for time, _, arrived, _ in self._waiting if arrived <= until]
        found: list[Event] = []
        while due and self._waiting and self._waiting[0][0] <= max(due):
            found.append(heappop(self._waiting)[3])
        return found
