"""Logging kopf in to the same API server, as the same user, as our own Client."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Final

import kopf

from meshwire.kube.client import Cluster

TOKEN_LIFE: Final = timedelta(minutes=10)
"""Kubelet renews a service account's token when a fifth of its life is left, by default twelve minutes."""
RETRY_DELAY: Final = 2.0
"""Seconds between logins. kopf logs in again after every 401, at once."""

_last_login = float("-inf")


async def login(cluster: Cluster) -> kopf.ConnectionInfo:
    """What a `kopf.on.login` handler returns. Waits out RETRY_DELAY if it was called a moment ago."""
    global _last_login
    await asyncio.sleep(max(0.0, _last_login + RETRY_DELAY - time.monotonic()))
    _last_login = time.monotonic()
    return connection_info(cluster, now=datetime.now(UTC))


def connection_info(cluster: Cluster, *, now: datetime) -> kopf.ConnectionInfo:
    """The cluster as kopf wants it, good until `now` plus TOKEN_LIFE; kopf then logs in again, which reads
    the token file anew. Credentials that never change expire too: kopf drops for good what has met one
    401, comparing all of it, and an API server that is just starting answers 401 to anybody."""
    return kopf.ConnectionInfo(
        server=cluster.server,
        ca_path=cluster.ca_file,
        token=cluster.bearer(),
        certificate_path=cluster.certificate_file,
        private_key_path=cluster.key_file,
        expiration=now + TOKEN_LIFE,
    )
