"""Drops and audit events as people read them, for whoever asks on this node."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from meshwire.agent.policy.model import Model
from meshwire.api.meshpolicy import Direction, Policy, PolicyMode
from meshwire.bpf.layouts import Direction as Side
from meshwire.bpf.layouts import Reason
from meshwire.bpf.policymaps import Event, Events
from meshwire.policy import identity

log = logging.getLogger("meshwire.agent")

SOCKET: Final = "events.sock"
"""In the run directory; root's alone. Whoever connects gets one JSON object a line."""
BACKLOG: Final = 1000
"""Events that wait for a reader who is slow; with more, the rest is counted and told of."""

_PROTOCOLS: Final[Mapping[int, str]] = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}


def describe_event(event: Event, model: Model, node: str, wall_offset_ns: int) -> dict[str, Any]:
    """`wall_offset_ns` is what CLOCK_REALTIME is ahead of CLOCK_MONOTONIC."""
    audit = event.reason is Reason.POLICY_WOULD_DENY
    direction = Direction.EGRESS if event.direction is Side.EGRESS else Direction.INGRESS
    found = model.rule(event.rule) if event.rule else None
    subject = event.src_identity if direction is Direction.EGRESS else event.dst_identity
    moment = datetime.fromtimestamp((event.time_ns + wall_offset_ns) / 1e9, UTC)
    return {
        "time": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "node": node,
        "verdict": "AUDIT" if audit else "DROP",
        "reason": event.reason.name,
        "direction": str(direction),
        "protocol": _PROTOCOLS.get(event.protocol, str(event.protocol)),
        "source": _end(model, event.src, event.sport, event.src_identity),
        "destination": _end(model, event.dst, event.dport, event.dst_identity),
        "policy": _named(*found) if found else None,
        "isolatedBy": []
        if found
        else [policy.title for policy in isolating(model, subject, direction, audit)],
        "count": 1,
    }


def isolating(model: Model, subject: int, direction: Direction, audit: bool) -> list[Policy]:
    """Policies by which a pod of this node is denied by default; with `audit`, those in mode Audit."""
    return [
        policy
        for policy in model.policies_of(subject)
        if direction in policy.default_deny and (policy.mode is PolicyMode.AUDIT) == audit
    ]


def _end(model: Model, address: Any, port: int, number: int) -> dict[str, Any]:
    pod = model.pod_name(address.packed) if address else None
    return {
        "address": str(address) if address else "",
        "port": port,
        "identity": number,
        "name": identity.NAMES.get(number, ""),
        "pod": "/".join(pod) if pod else "",
        "labels": dict(model.labels_of(number)),
    }


def _named(policy: Policy, path: str) -> dict[str, str]:
    return {"kind": policy.kind, "namespace": policy.namespace, "name": policy.name, "path": path}


class Hub:
    """Reads the ring buffer, counts what policies in mode Audit would deny, and tells those who listen."""

    def __init__(self, node: str, run_directory: Path, model: Callable[[], Model | None]) -> None:
        self._node = node
        self._path = run_directory / SOCKET
        self._model = model
        self._events: Events | None = None
        self._listeners: set[asyncio.Queue[bytes]] = set()
        self._missed: Counter[asyncio.Queue[bytes]] = Counter()
        self.would_deny: Counter[str] = Counter()
        """Packets by the uid of the policy."""

    def open(self, events: Events | None) -> None:
        """The buffer to read from now on; None: there is none (any more)."""
        loop = asyncio.get_running_loop()
        if self._events:
            loop.remove_reader(self._events.fileno())
            self._events.close()
        self._events = events
        if events:
            loop.add_reader(events.fileno(), self._read)

    @property
    def is_open(self) -> bool:
        return self._events is not None

    async def serve(self) -> None:
        """Until cancelled. Raises OSError where the socket can't be made."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._serve_one, self._path)
        finally:
            os.umask(before)
        async with server:
            await server.serve_forever()

    def _read(self) -> None:
        model = self._model()
        if self._events is None or model is None:
            return
        offset = time.time_ns() - time.monotonic_ns()
        for event in self._events.read():
            if event.reason is Reason.POLICY_WOULD_DENY:
                self._count(event, model)
            if self._listeners:
                line = json.dumps(describe_event(event, model, self._node, offset)).encode() + b"\n"
                for listener in self._listeners:
                    try:
                        listener.put_nowait(line)
                    except asyncio.QueueFull:
                        self._missed[listener] += 1

    def _count(self, event: Event, model: Model) -> None:
        if event.rule and (found := model.rule(event.rule)):
            self.would_deny[found[0].uid] += 1
            return
        direction = Direction.EGRESS if event.direction is Side.EGRESS else Direction.INGRESS
        subject = event.src_identity if direction is Direction.EGRESS else event.dst_identity
        for policy in isolating(model, subject, direction, audit=True):
            self.would_deny[policy.uid] += 1

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines: asyncio.Queue[bytes] = asyncio.Queue(BACKLOG)
        self._listeners.add(lines)
        ended = asyncio.ensure_future(reader.read())
        try:
            while not ended.done():
                waiting = asyncio.ensure_future(lines.get())
                await asyncio.wait([waiting, ended], return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    waiting.cancel()
                    break
                if missed := self._missed.pop(lines, 0):
                    writer.write(json.dumps({"node": self._node, "missed": missed}).encode() + b"\n")
                writer.write(waiting.result())
                await writer.drain()
        except (ConnectionError, OSError):
            return
        finally:
            ended.cancel()
            self._listeners.discard(lines)
            self._missed.pop(lines, None)
            writer.close()
            with suppress(ConnectionError, OSError):
                await writer.wait_closed()


def print_events(run_directory: Path) -> int:
    """What the agent of this node tells, to standard output, until it or standard input ends; the exit
    status."""

    async def follow() -> None:
        reader, _ = await asyncio.open_unix_connection(run_directory / SOCKET, limit=1 << 20)
        # Whoever asked may be gone without a word of it reaching us but this one.
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        # /dev/null can't be waited for, and says nothing of whoever asked.
        with suppress(PermissionError):
            loop.add_reader(sys.stdin, _end_with, sys.stdin.fileno(), over)
        ended = asyncio.create_task(over.wait())
        while True:
            reading = asyncio.create_task(reader.readline())
            await asyncio.wait([reading, ended], return_when=asyncio.FIRST_COMPLETED)
            if ended.done() or not (line := await reading):
                return
            print(line.decode(), end="", flush=True)

    try:
        asyncio.run(follow())
    except (ConnectionError, FileNotFoundError):
        print("the agent of this node is not running, or policy is not enabled", flush=True, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _end_with(stream: int, over: asyncio.Event) -> None:
    if not os.read(stream, 4096):
        over.set()
