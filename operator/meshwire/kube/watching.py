"""kopf's settings where it only watches, and what has to be there before it can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any, Final

import aiohttp
import kopf

from meshwire.api import names
from meshwire.kube.client import ApiError, Client

PAGE: Final = 100
"""Objects a page of the first list: Nodes are large, and a thousand of them at once would stay in our
memory."""


class _Backoffs:
    """Seconds between attempts at a request, without end: kopf ends the process where they end, but an API
    server that is away comes back."""

    def __iter__(self) -> Iterator[float]:
        return chain((0.5, 1, 2), repeat(4))


class _NoDiffBase(kopf.DiffBaseStorage):
    """kopf copies every object of every event, to find out what handlers that we don't have would have to
    do: most of its processor time on a Node of 15 KB."""

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        pass


def make_settings() -> kopf.OperatorSettings:
    """For handlers that only index and listen: kopf writes nothing."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.persistence.diffbase_storage = _NoDiffBase()
    # By default the process is killed ten minutes after it was told to end.
    settings.process.ultimate_exiting_timeout = None
    # Resources and namespaces are known: no rights to list either are needed.
    settings.scanning.disabled = True
    settings.watching.chunk_size = PAGE
    # A worker that idles keeps the last event of its object.
    settings.queueing.idle_timeout = 0.1
    settings.watching.connect_timeout = 5
    # The server ends a watch after a while, and a watch that died in silence is noticed by the bookmarks
    # that stay away; this is for the server that neither ends it nor says a word.
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.networking.connect_timeout = 5
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _Backoffs()
    return settings


async def missing_kinds(client: Client, kinds: frozenset[str]) -> frozenset[str]:
    """Which of our resources the API server doesn't serve yet: kopf watches only what exists when it starts.
    Raises ConnectionError where the server does not answer, and ApiError."""
    try:
        found = await client.get(f"/apis/{names.API_VERSION}")
    except ApiError as error:
        if error.status != 404:
            raise
        return kinds
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ConnectionError(f"the API server does not answer: {error}") from None
    return kinds - {resource["name"] for resource in found["resources"]}
