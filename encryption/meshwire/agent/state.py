"""What survives a restart in MESHWIRE_STATE_DIR besides keys: the last good MeshConfig."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig


def read_config(path: Path) -> MeshConfig | None:
    """None where nothing was kept, or nothing that this version understands. Raises OSError."""
    try:
        return MeshConfig.from_object({"spec": json.loads(path.read_text())})
    except (FileNotFoundError, ValueError, AttributeError, InvalidSpec):
        return None


def write_config(path: Path, spec: Mapping[str, Any]) -> None:
    """Replaces the file in one step; writes nothing where it holds this already. Raises OSError."""
    text = json.dumps(spec, sort_keys=True)
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
