"""Keeps, or waits for, the Lease by which one replica acts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import aiohttp
import structlog

from meshwire.kube.client import ApiError, Client, Object
from meshwire.operator.lease import RENEW_DEADLINE, RETRY, Move, Record, decide, released, taken

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Leader:
    """`changed` is called whenever this replica begins or ceases to be the leader."""

    client: Client
    namespace: str
    name: str
    identity: str
    changed: Callable[[], None] = lambda: None
    _record: Record | None = None
    _seen_since: float = 0.0
    _renewed: float = float("-inf")
    _led: bool = False
    _path: str = field(init=False)

    def __post_init__(self) -> None:
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases"

    @property
    def leads(self) -> bool:
        """This replica may act, now."""
        return time.monotonic() < self._renewed + RENEW_DEADLINE

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                async with asyncio.timeout(RENEW_DEADLINE / 2):
                    await self._attempt()
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                # Another replica's write in between (409) is one of these: look again next time.
                log.warning("could not attend to the leader lease", error=str(error))
            if self.leads != self._led:
                self._led = self.leads
                log.info("leading" if self._led else "following", identity=self.identity)
                self.changed()
            await asyncio.sleep(RETRY)

    async def release(self) -> None:
        """Lets go of the lease, so that another replica takes it at once. To be called when nothing acts
        any more; failing is no matter."""
        if not self.leads or self._record is None:
            return
        self._renewed = float("-inf")
        try:
            async with asyncio.timeout(RETRY):
                await self._put(released(self._record, now=datetime.now(UTC)), self._record.version)
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("could not release the leader lease", error=str(error))

    async def _attempt(self) -> None:
        found = await self.client.find(f"{self._path}/{self.name}")
        # From before the write: the others count from when they see it.
        started = time.monotonic()
        record = Record.from_object(found) if found else None
        if record is None or self._record is None or record.version != self._record.version:
            self._record, self._seen_since = record, started
        move = decide(record, me=self.identity, unchanged_for=started - self._seen_since)
        if move is Move.WAIT:
            self._renewed = float("-inf")
            return
        spec = taken(record, me=self.identity, now=datetime.now(UTC))
        if record is None:
            body = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self.name},
                "spec": spec,
            }
            answer = await self.client.create(self._path, body)
        else:
            answer = await self._put(spec, record.version)
        self._record, self._seen_since = Record.from_object(answer), started
        self._renewed = started

    async def _put(self, spec: Object, version: str) -> Object:
        return await self.client.request(
            "PUT",
            f"{self._path}/{self.name}",
            body={
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self.name, "resourceVersion": version},
                "spec": spec,
            },
        )
