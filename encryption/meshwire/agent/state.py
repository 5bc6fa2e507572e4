"""What survives a restart in MESHWIRE_STATE_DIR besides keys: the last good MeshConfig, and, while the drop
is in force, whose addresses to guard: a rebooted node has pods before it has an API server to ask."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from meshwire.agent.watch import parse_member
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig
from meshwire.encryption.model import Member


def read_config(path: Path) -> MeshConfig | None:
    """None where nothing was kept, or nothing that this version understands. Raises OSError."""
    try:
        return MeshConfig.from_object({"spec": json.loads(path.read_text())})
    except (FileNotFoundError, ValueError, AttributeError, InvalidSpec):
        return None


def write_config(path: Path, spec: Mapping[str, Any]) -> None:
    """Replaces the file in one step; writes nothing where it holds this already. Raises OSError."""
    text = json.dumps(spec, sort_keys=True)
    if not path.exists() or path.read_text() != text:
        replace_file(path, text)


def read_guard(path: Path) -> dict[str, Member]:
    """Members by name, without keys; empty where nothing was kept, or nothing that this version understands.
    Raises OSError."""
    try:
        members = [parse_member(body) for body in json.loads(path.read_text())]
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError, InvalidSpec):
        return {}
    return {member.name: member for member in members}


def write_guard(path: Path, members: Iterable[Member]) -> None:
    """Replaces the file in one step. Raises OSError."""
    bodies = [
        {
            "metadata": {"name": member.name, "uid": member.uid, "creationTimestamp": member.created},
            # A key may be another's by the time this is read: guarding takes none.
            "spec": {**member.spec.to_dict(), "keys": [], "quarantined": member.spec.quarantined},
        }
        for member in members
    ]
    replace_file(path, json.dumps(bodies))


def replace_file(path: Path, text: str, mode: int = 0o600) -> None:
    """In one step, and on the disk when this returns. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as stream:
        stream.write(text)
        stream.flush()
        os.fchmod(stream.fileno(), mode)
        os.fsync(stream.fileno())
    temporary.rename(path)
    sync(path.parent)


def sync(directory: Path) -> None:
    """What was renamed there or linked outlasts a loss of power. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
