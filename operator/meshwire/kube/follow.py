"""List, then watch, then again: the objects behind one API path, for ever. For what kopf can't do: it has no
field selectors, and doesn't say when a list is whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

import aiohttp

from meshwire.kube.client import ApiError, Client, Object

RETRY_SECONDS: Final = 0.3
PAGE: Final = 100
"""Objects a page: what is kept of them is small, they are not."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


async def follow(
    client: Client, path: str, parse: Callable[[Object], T], **params: str
) -> AsyncIterator[tuple[str, list[T]]]:
    """("LISTED", all objects) after every list, then (ADDED, MODIFIED or DELETED, [object]), each through
    `parse`; a `limit` among `params` is how many to ask for at a time. An API server that is away is waited
    for."""
    while True:
        try:
            listed, version = await _list(client, path, parse, params)
            yield "LISTED", listed
            del listed
            while True:
                async for kind, item in client.watch(path, resourceVersion=version, **params):
                    version = item["metadata"]["resourceVersion"]
                    if kind != "BOOKMARK":
                        yield kind, [parse(item)]
        except ApiError as error:
            # 410: the version is too old, which is no more than a reason to list again.
            if error.status != 410:
                logger.warning("%s: %s", path, error)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.info("%s: API server unreachable: %s", path, error or type(error).__name__)
        await asyncio.sleep(RETRY_SECONDS)


async def _list(
    client: Client, path: str, parse: Callable[[Object], T], params: dict[str, str]
) -> tuple[list[T], str]:
    """Every object, page by page, and the list's version."""
    found: list[T] = []
    token = ""
    while True:
        more = {"continue": token} if token else {}
        page = await client.get(path, **{"limit": str(PAGE)} | params | more)
        # Items of a list don't say what they are.
        found += [parse({"kind": page["kind"].removesuffix("List"), **item}) for item in page["items"]]
        if not (token := page["metadata"].get("continue", "")):
            return found, page["metadata"]["resourceVersion"]
