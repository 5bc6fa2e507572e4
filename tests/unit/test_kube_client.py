"""The thin client, against answers as API servers give them."""

from __future__ import annotations

from typing import Any

import pytest

from meshwire.kube.client import Client, Cluster


async def test_uids_are_read_page_by_page_and_an_empty_list_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages: list[dict[str, Any]] = [
        {
            "metadata": {"continue": "more"},
            "items": [{"metadata": {"uid": "a"}}, {"metadata": {"uid": "b"}}],
        },
        {"metadata": {}, "items": [{"metadata": {"uid": "c"}}]},
        # As PartialObjectMetadataList spells it where there is nothing.
        {"metadata": {}, "items": None},
    ]

    async def request(*_: object, **__: object) -> dict[str, Any]:
        return pages.pop(0)

    async with Client(Cluster(server="https://127.0.0.1:1")) as client:
        monkeypatch.setattr(client, "request", request)
        assert await client.uids("/api/v1/nodes") == {"a", "b", "c"}
        assert await client.uids("/api/v1/nodes") == frozenset()
