"""What the API server refuses by the schema of a custom resource, its CEL rules aside. Structural schemas
only, which is all that custom resources may have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from meshwire.cli.policyfiles import LOADER

DIRECTORIES: Final = (Path(__file__).parent / "crds", Path(__file__).resolve().parents[3] / "crds")
"""Of the installed package, and of a source tree."""

_NAME: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_TEXTS: Final = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA: Final[Mapping[str, Any]] = {
    "type": "object",
    "x-kubernetes-preserve-unknown-fields": True,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "maxLength": 253, "pattern": rf"^{_NAME}(\.{_NAME})*$"},
        "namespace": {"type": "string", "maxLength": 63, "pattern": rf"^({_NAME})?$"},
        "labels": _TEXTS,
        "annotations": _TEXTS,
    },
}
"""Of every object: what people get wrong in it."""

TYPES: Final[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "object": ("an object", lambda value: isinstance(value, dict)),
    "array": ("a list", lambda value: isinstance(value, list)),
    "string": ("a string", lambda value: isinstance(value, str)),
    "boolean": ("true or false", lambda value: isinstance(value, bool)),
    "integer": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "number": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
}


class SchemaNotFound(Exception):
    """The custom resource definitions are not where this program is."""


@cache
def schema_of(plural: str) -> Mapping[str, Any]:
    """The schema of the version that is stored; `plural` as in `meshpolicies`. Raises SchemaNotFound."""
    for directory in DIRECTORIES:
        for path in sorted(directory.glob("*.yaml")):
            definition = yaml.load(path.read_text(), Loader=LOADER)
            if definition.get("metadata", {}).get("name", "").partition(".")[0] == plural:
                [version] = [each for each in definition["spec"]["versions"] if each["storage"]]
                schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
                return {**schema, "properties": {**schema["properties"], "metadata": METADATA}}
    raise SchemaNotFound(f"no definition of {plural} in {' or '.join(map(str, DIRECTORIES))}")


def refusals(schema: Mapping[str, Any], value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and problem of whatever in `value` the schema doesn't take."""
    if schema.get("x-kubernetes-int-or-string"):
        if not (TYPES["integer"][1](value) or TYPES["string"][1](value)):
            yield path, "must be a whole number or a string"
            return
    elif (name := schema.get("type", "")) in TYPES:
        words, is_one = TYPES[name]
        if not is_one(value):
            yield path, f"must be {words}" + (": write it in quotes" if _needs_quotes(name, value) else "")
            return
    if "enum" in schema and value not in schema["enum"]:
        yield path, f"must be one of {', '.join(map(str, schema['enum']))}"
        return
    match value:
        case dict():
            yield from _object_refusals(schema, value, path)
        case list():
            yield from _bounds(schema, len(value), path, "Items", "items")
            for index, item in enumerate(value):
                yield from refusals(schema.get("items", {}), item, f"{path}[{index}]")
        case str():
            yield from _bounds(schema, len(value), path, "Length", "characters")
            if (pattern := schema.get("pattern")) and not re.search(pattern, value):
                yield path, f"{value!r} does not match {pattern}"
        case int() | float() if not isinstance(value, bool):
            yield from _bounds(schema, value, path, "imum", "")


def _object_refusals(
    schema: Mapping[str, Any], value: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str]]:
    # A field that is null counts as absent: the API server takes it out first.
    given = {name: field for name, field in value.items() if field is not None}
    properties: Mapping[str, Any] = schema.get("properties", {})
    more = schema.get("additionalProperties")
    yield from _bounds(schema, len(given), path, "Properties", "fields")
    for name in schema.get("required", ()):
        if name not in given:
            yield f"{path}.{name}".lstrip("."), "must be given"
    for name, field in given.items():
        below = f"{path}.{name}".lstrip(".")
        if name in properties:
            yield from refusals(properties[name], field, below)
        elif isinstance(more, Mapping):
            yield from refusals(more, field, below)
        elif not more and not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield below, f"there is no such field{_meant(name, properties)}"


def _bounds(
    schema: Mapping[str, Any], value: float, path: str, suffix: str, unit: str
) -> Iterator[tuple[str, str]]:
    low, high = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    verb = "must have" if unit else "must be"
    if low is not None and value < low:
        yield path, f"{verb} at least {low} {unit}".rstrip()
    if high is not None and value > high:
        yield path, f"{verb} at most {high} {unit}".rstrip()


def _needs_quotes(wanted: str, value: Any) -> bool:
    return wanted == "string" and isinstance(value, int | float)


def _meant(name: str, properties: Mapping[str, Any]) -> str:
    """The field that differs in case or by its last letters only, such as a plural."""
    for known in properties:
        if known.lower().rstrip("s") == name.lower().rstrip("s"):
            return f": did you mean {known}?"
    return ""
