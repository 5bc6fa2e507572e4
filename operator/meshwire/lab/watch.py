"""List, then watch, then again: the objects behind one API path, for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import aiohttp

from meshwire.kube.client import ApiError, Client, Object

RETRY_SECONDS = 0.3

logger = logging.getLogger(__name__)


async def follow(client: Client, path: str, **params: str) -> AsyncIterator[tuple[str, list[Object]]]:
    """("LISTED", all objects) after every list, then (ADDED, MODIFIED or DELETED, [object]). An API server
    that is away is waited for."""
    while True:
        try:
            listed = await client.get(path, **params)
            yield "LISTED", listed["items"]
            version = listed["metadata"]["resourceVersion"]
            while True:
                async for kind, item in client.watch(path, resourceVersion=version, **params):
                    version = item["metadata"]["resourceVersion"]
                    if kind != "BOOKMARK":
                        yield kind, [item]
        except ApiError as error:
            # 410: the version is too old, which is no more than a reason to list again.
            if error.status != 410:
                logger.warning("%s: %s", path, error)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.info("%s: API server unreachable: %s", path, error or type(error).__name__)
        await asyncio.sleep(RETRY_SECONDS)
