"""Keeps a service account's directory as a pod finds it: token (refreshed before it expires), ca.crt,
namespace."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp

from meshwire.kube.client import ApiError, Client
from meshwire.lab.files import write_private

LIFETIME_SECONDS: Final = 3600
REFRESH_AFTER: Final = 0.8
"""Of the lifetime, as kubelet does."""
RETRY_SECONDS: Final = 0.5

logger = logging.getLogger(__name__)


async def write_token(
    client: Client,
    directory: Path,
    *,
    account: str,
    namespace: str,
    authority: Path,
    bound_to: Mapping[str, Any] | None = None,
) -> None:
    """Fetches a token once, bound to the life of an object (kind, apiVersion, name, uid) if one is given.
    Raises what Client raises."""
    spec: dict[str, Any] = {"expirationSeconds": LIFETIME_SECONDS}
    if bound_to:
        spec["boundObjectRef"] = dict(bound_to)
    answer = await client.create(
        f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
        {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
    )
    # The token last: where it is, the rest is.
    write_private(directory / "ca.crt", authority.read_bytes())
    write_private(directory / "namespace", namespace.encode())
    write_private(directory / "token", answer["status"]["token"].encode())


async def keep_token(
    client: Client,
    directory: Path,
    *,
    account: str,
    namespace: str,
    authority: Path,
    bound_to: Mapping[str, Any] | None = None,
) -> None:
    """Does so for ever. An account that isn't there yet is waited for."""
    complaint = ""
    while True:
        try:
            await write_token(
                client,
                directory,
                account=account,
                namespace=namespace,
                authority=authority,
                bound_to=bound_to,
            )
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            if str(error) != complaint:
                logger.info("no token for %s/%s yet: %s", namespace, account, error)
            complaint = str(error)
            await asyncio.sleep(RETRY_SECONDS)
        else:
            complaint = ""
            await asyncio.sleep(LIFETIME_SECONDS * REFRESH_AFTER)
