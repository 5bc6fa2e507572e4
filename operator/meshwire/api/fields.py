"""Reading typed values out of Kubernetes objects; what doesn't fit raises InvalidSpec with its path."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any, Final, TypeVar

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

# The last character of 32 bytes carries four bits: only these sixteen are canonical, so that equal keys are
# equal strings.
_KEY: Final = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
_DURATION: Final = re.compile(r"(?:(\d{1,5})h)?(?:(\d{1,5})m)?(?:(\d{1,5})s)?", re.ASCII)
_DEVICE: Final = re.compile(r"[^/:\s]{1,15}")
_LABEL_PART: Final = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_LABEL_KEY: Final = re.compile(rf"{_LABEL_PART}(/{_LABEL_PART})?")
_LABEL_VALUE: Final = re.compile(rf"({_LABEL_PART})?")


class InvalidSpec(Exception):
    """An object holds something its schema, or Meshwire, can't accept; `path` names the field."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


def child(source: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    """The object in field `name`; an absent one reads as empty."""
    value = source.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidSpec(f"{path}.{name}".lstrip("."), "must be an object")
    return value


def boolean(source: Mapping[str, Any], name: str, path: str, *, default: bool) -> bool:
    value = source.get(name, default)
    if not isinstance(value, bool):
        raise InvalidSpec(f"{path}.{name}", "must be true or false")
    return value


def integer(
    source: Mapping[str, Any], name: str, path: str, *, default: int, low: int = 0, high: int = 2**63 - 1
) -> int:
    value = source.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidSpec(f"{path}.{name}", f"must be a whole number from {low} to {high}")
    return value


def duration(source: Mapping[str, Any], name: str, path: str, *, default: timedelta) -> timedelta:
    """Hours, minutes and seconds as Go writes them, in this order: 24h, 1h30m, 90s."""
    if (value := source.get(name)) is None:
        return default
    if not (match := _DURATION.fullmatch(_string(value, f"{path}.{name}"))) or not value:
        raise InvalidSpec(f"{path}.{name}", f"{value!r} is no duration such as 24h, 1h30m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


def text(source: Mapping[str, Any], name: str, path: str, *, default: str = "") -> str:
    value = source.get(name, default)
    if not isinstance(value, str):
        raise InvalidSpec(f"{path}.{name}", "must be a string")
    return value


def choice(source: Mapping[str, Any], name: str, path: str, *, default: E) -> E:
    value = source.get(name, default)
    try:
        return type(default)(value)
    except ValueError:
        raise InvalidSpec(f"{path}.{name}", f"must be one of {', '.join(type(default))}") from None


def listed(source: Mapping[str, Any], name: str, path: str, parse: Callable[[Any, str], T]) -> tuple[T, ...]:
    """Every item of a list field through `parse(item, path)`; an absent list is empty."""
    value = source.get(name)
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidSpec(f"{path}.{name}", "must be a list")
    return tuple(parse(item, f"{path}.{name}[{index}]") for index, item in enumerate(value))


def address(value: Any, path: str) -> Address:
    text = _string(value, path)
    # The C library reads them several times faster, and a cluster has as many as it has pods.
    with suppress(OSError, ValueError):
        if ":" in text:
            return IPv6Address(inet_pton(AF_INET6, text))
        return IPv4Address(inet_pton(AF_INET, text))
    try:
        return ip_address(text)
    except ValueError:
        raise InvalidSpec(path, f"{value!r} is not an IP address") from None


def network(value: Any, path: str) -> Network:
    """A CIDR block without host bits."""
    try:
        return ip_network(_string(value, path))
    except ValueError:
        raise InvalidSpec(path, f"{value!r} is not a CIDR block such as 10.244.0.0/16") from None


def device(value: Any, path: str) -> str:
    """A network device's name, as the kernel accepts it."""
    if not _DEVICE.fullmatch(_string(value, path)) or value in {".", ".."}:
        raise InvalidSpec(path, f"{value!r} is no device name (1 to 15 characters, no slash or space)")
    return str(value)


def label_key(value: Any, path: str) -> str:
    """The key of a label, with or without a prefix before a slash."""
    if not _LABEL_KEY.fullmatch(_string(value, path)):
        raise InvalidSpec(path, f"{value!r} is not a label's key")
    return str(value)


def label_value(value: Any, path: str) -> str:
    if len(_string(value, path)) > 63 or not _LABEL_VALUE.fullmatch(value):
        raise InvalidSpec(path, f"{value!r} is not a label's value")
    return str(value)


def key(value: Any, path: str) -> str:
    """An X25519 public key: canonical base64 of 32 bytes."""
    if not _KEY.fullmatch(_string(value, path)):
        raise InvalidSpec(path, "is not a public key (base64 of 32 bytes, 44 characters)")
    return str(value)


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise InvalidSpec(path, "must be a string")
    return value
