"""A thin asynchronous client of the Kubernetes API: JSON in, JSON out.

The agent runs on every node, so it can't afford the official client (about 40 MB of resident memory)."""

from __future__ import annotations

import base64
import json
import os
import ssl
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp
import yaml

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")

MERGE_PATCH: Final = "application/merge-patch+json"
JSON_PATCH: Final = "application/json-patch+json"
APPLY_PATCH: Final = "application/apply-patch+yaml"

METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
WATCH_SECONDS: Final = 300
"""After which the server ends a watch. It says a word about once a minute: one that is silent for longer
than that is gone."""

Object = dict[str, Any]


class ApiError(Exception):
    """The API server refused a request; `status` is the HTTP code, `reason` its Status.reason."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class NoCluster(Exception):
    """Neither a kubeconfig nor a service account was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where the API server is and who we are. `token_file` is read anew for every request: tokens rotate."""

    server: str
    ca_file: Path | None = None
    token: str | None = None
    token_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None

    def bearer(self) -> str | None:
        """The bearer token to send now, if any."""
        return self.token_file.read_text().strip() if self.token_file else self.token


def find_cluster(environ: Mapping[str, str] = os.environ) -> Cluster:
    """$KUBECONFIG if set, else the pod's service account. Raises NoCluster."""
    if kubeconfig := environ.get("KUBECONFIG"):
        return read_kubeconfig(Path(kubeconfig))
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if not host or not (SERVICE_ACCOUNT / "token").exists():
        raise NoCluster("neither $KUBECONFIG nor a service account: run in a pod, or set KUBECONFIG")
    host = f"[{host}]" if ":" in host else host
    return Cluster(
        server=f"https://{host}:{environ.get('KUBERNETES_SERVICE_PORT', '443')}",
        ca_file=SERVICE_ACCOUNT / "ca.crt",
        token_file=SERVICE_ACCOUNT / "token",
    )


def read_kubeconfig(path: Path) -> Cluster:
    """The current context of a kubeconfig whose user has a token or a client certificate, by file or
    inline."""
    config = yaml.safe_load(path.read_text())

    def named(kind: str, name: str) -> Object:
        return next(item[kind] for item in config[f"{kind}s"] if item["name"] == name)

    context = named("context", config["current-context"])
    cluster, user = named("cluster", context["cluster"]), named("user", context["user"])

    def file(source: Object, field: str) -> Path | None:
        if name := source.get(field):
            return path.parent / str(name)
        if data := source.get(f"{field}-data"):
            # ssl reads certificates from files only; mkstemp makes them 0600.
            handle, temporary = tempfile.mkstemp(prefix="meshwire-")
            with os.fdopen(handle, "wb") as stream:
                stream.write(base64.b64decode(data))
            return Path(temporary)
        return None

    return Cluster(
        server=cluster["server"],
        ca_file=file(cluster, "certificate-authority"),
        token=user.get("token"),
        token_file=path.parent / user["tokenFile"] if "tokenFile" in user else None,
        certificate_file=file(user, "client-certificate"),
        key_file=file(user, "client-key"),
    )


class Client:
    """Requests to one API server. Paths are as in the API reference, e.g. `/api/v1/nodes/a`. Raises ApiError
    for refusals and aiohttp.ClientError or TimeoutError where the server can't be reached."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        context = ssl.create_default_context(cafile=str(cluster.ca_file) if cluster.ca_file else None)
        if cluster.certificate_file:
            context.load_cert_chain(cluster.certificate_file, cluster.key_file)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context),
            timeout=aiohttp.ClientTimeout(total=30, sock_connect=5),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        """One request, its JSON answer."""
        async with self._session.request(
            method,
            self.cluster.server + path,
            data=None if body is None else json.dumps(body),
            params=params,
            headers={**self._headers(content_type), "Accept": accept},
        ) as response:
            await _raise_for_status(response)
            answer: Object = await response.json(content_type=None)
            return answer

    async def get(self, path: str, **params: str) -> Object:
        return await self.request("GET", path, params=params)

    async def find(self, path: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def uids(self, path: str) -> frozenset[str]:
        """Of all objects of a resource, in pages of metadata alone."""
        found: set[str] = set()
        params = {"limit": "500"}
        while True:
            page = await self.request("GET", path, params=params, accept=METADATA_LIST)
            # An empty list of metadata alone has null for its items.
            found.update(item["metadata"]["uid"] for item in page["items"] or ())
            if not (token := page["metadata"].get("continue")):
                return frozenset(found)
            params["continue"] = token

    async def create(self, path: str, body: Object, **params: str) -> Object:
        return await self.request("POST", path, body=body, params=params)

    async def patch(self, path: str, body: Any, *, content_type: str = MERGE_PATCH, **params: str) -> Object:
        return await self.request("PATCH", path, body=body, params=params, content_type=content_type)

    async def apply(self, path: str, body: Object, *, manager: str) -> Object:
        """Server-side apply with `force`, as field manager `manager`."""
        return await self.patch(path, body, content_type=APPLY_PATCH, fieldManager=manager, force="true")

    async def delete(self, path: str, **params: str) -> None:
        """Deletes the object; one that is already gone is no error."""
        try:
            await self.request("DELETE", path, params=params)
        except ApiError as error:
            if error.status != 404:
                raise

    async def watch(self, path: str, **params: str) -> AsyncIterator[tuple[str, Object]]:
        """(ADDED, MODIFIED, DELETED or BOOKMARK; object), from `resourceVersion` on until the server ends
        the watch. Raises ApiError 410 where the version is too old: list again; TimeoutError where the
        server has fallen silent."""
        async with self._session.get(
            self.cluster.server + path,
            params={
                "watch": "true",
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(WATCH_SECONDS),
                **params,
            },
            headers=self._headers("application/json"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=WATCH_SECONDS + 30),
        ) as response:
            await _raise_for_status(response)
            buffer = b""
            async for chunk in response.content.iter_any():
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        problem = event["object"]
                        raise ApiError(
                            problem.get("code", 0), problem.get("reason", ""), problem.get("message", "")
                        )
                    yield event["type"], event["object"]

    def _headers(self, content_type: str) -> dict[str, str]:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        if token := self.cluster.bearer():
            headers["Authorization"] = f"Bearer {token}"
        return headers


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    text = await response.text()
    try:
        status = json.loads(text)
        raise ApiError(response.status, status.get("reason", ""), status.get("message", text))
    except json.JSONDecodeError:
        raise ApiError(response.status, response.reason or "", text[:500]) from None
