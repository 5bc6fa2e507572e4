"""The boot guard on the host's disk: its ruleset and the unit that loads it, kept and taken away. What is in
them and why is meshwire.encryption.bootguard's."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from meshwire.agent import state
from meshwire.agent.settings import Settings
from meshwire.api import conditions
from meshwire.api.meshnode import Status
from meshwire.encryption import bootguard
from meshwire.encryption.bootguard import Scope

log = logging.getLogger("meshwire.agent")

_VOLATILE: Final = frozenset({"tmpfs", "ramfs"})
_PROGRAMS: Final = ("sbin", "bin", "local/sbin", "local/bin")
"""Folders of /usr where units find programs."""


@dataclass(frozen=True, slots=True)
class Kept:
    """How far it came: the condition BootGuard. `reason` is bootguard.IN_PLACE or says what is missing."""

    reason: str
    message: str

    @property
    def in_place(self) -> bool:
        return self.reason == bootguard.IN_PLACE


class BootGuard:
    """Keeps what is on the disk as it should be. Files are read again where asked for; in between, what was
    written last counts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._text = bootguard.unit(str(settings.boot_rules_file))
        # Programs don't outlast a boot, and this file doesn't outlast Strict.
        self._expected = not settings.pin_directory.exists() and is_loaded_at_boot(settings)
        self._missed = False
        self._scope: Scope | None = None
        self._known = False
        self.kept: Kept | None = None
        """None: nothing is to be kept."""

    def find_missed(self, *, loaded: bool) -> None:
        """The first look at the kernel tells whether the node's init did in this boot what it should have.
        `loaded`: there is the table."""
        if self._expected and not loaded:
            self._missed = True
            log.warning("the boot guard was on the disk and was not loaded in this boot")
        self._expected = False

    def keep(self, scope: Scope | None, *, again: bool) -> None:
        """None takes everything away. `again`: reads what is there, whatever is known of it. What fails is
        told by `kept`, and tried again with the next look."""
        if self._known and not again and scope == self._scope:
            return
        self._scope, self._known = scope, True
        if scope is None:
            self.kept, self._missed = None, False
            try:
                remove(self._settings)
            except OSError as error:
                self._known = False
                log.warning("the boot guard can't be taken off the disk: %s", error)
            return
        before, self.kept = self.kept, self._judge(scope)
        if self.kept != before:
            log.info("boot guard: %s, %s", self.kept.reason, self.kept.message)

    def _judge(self, scope: Scope) -> Kept:
        settings = self._settings
        try:
            # Without a unit of ours too: somebody's own may load it.
            _write(settings.boot_rules_file, bootguard.render(scope), 0o600)
        except OSError as error:
            return Kept(bootguard.NOT_KEPT, f"{settings.boot_rules_file} can't be written: {error.strerror}")
        if problem := install(settings, self._text):
            return problem
        if not has_nft(settings):
            return Kept(bootguard.NO_NFT, "the node has no nft, which is to load the rules")
        if self._missed:
            message = "it was on the disk, but at the last boot nobody loaded it: see `systemctl status"
            return Kept(bootguard.NOT_LOADED, f"{message} {bootguard.UNIT}` on the node")
        message = f"at the next boot {bootguard.UNIT} holds pods back until the agent is there"
        return Kept(bootguard.IN_PLACE, message)

    def add_to(self, status: Status, now: datetime) -> Status:
        """The status with the condition BootGuard; without it where nothing is to be kept."""
        if (kept := self.kept) is None:
            return replace(status, conditions=conditions.without(status.conditions, conditions.BOOT_GUARD))
        return replace(
            status,
            conditions=conditions.set_condition(
                status.conditions,
                type=conditions.BOOT_GUARD,
                status=kept.in_place,
                reason=kept.reason,
                message=kept.message,
                observed_generation=status.observed_generation,
                now=now,
            ),
        )


def is_loaded_at_boot(settings: Settings) -> bool:
    """The rules are on the disk, and a unit that is to load them."""
    return settings.boot_rules_file.exists() and any(_wants(settings.systemd_directory))


def install(settings: Settings, text: str) -> Kept | None:
    """Writes and enables the unit where it isn't; None: it is there. A unit that somebody else has put there
    and enabled will do where the agent may not write."""
    directory = settings.systemd_directory
    if not directory.is_dir():
        return Kept(
            bootguard.NOT_MOUNTED,
            "the agent can't see the node's /etc/systemd/system: the component `bootguard` isn't installed",
        )
    if not any(directory.iterdir()):
        # Made for the agent's mount.
        return Kept(bootguard.NO_SYSTEMD, "the node has no systemd, which is to load the rules")
    kind = file_system(directory)
    if kind in _VOLATILE and kind != file_system(settings.state_directory):
        return Kept(
            bootguard.NOT_WRITABLE, f"the node's /etc/systemd/system ({kind}) doesn't outlast a boot"
        )
    unit, link = directory / bootguard.UNIT, directory / f"{bootguard.WANTED_BY}.wants" / bootguard.UNIT
    try:
        _write(unit, text, 0o644)
        if not link.is_symlink() or os.readlink(link) != _target(unit):
            link.parent.mkdir(mode=0o755, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(_target(unit))
            state.sync(link.parent)
            state.sync(directory)
    except OSError as error:
        if unit.exists() and any(_wants(directory)):
            return None
        message = f"the node's /etc/systemd/system can't be written: {error.strerror}"
        return Kept(bootguard.NOT_WRITABLE, message)
    return None


def remove(settings: Settings) -> None:
    """The rules, without which the unit does nothing, then the unit; what isn't there is no error. A unit
    that the agent may not remove it has not made. Raises OSError."""
    settings.boot_rules_file.unlink(missing_ok=True)
    directory = settings.systemd_directory
    try:
        for link in _wants(directory):
            link.unlink(missing_ok=True)
        (directory / bootguard.UNIT).unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def has_nft(settings: Settings) -> bool:
    """The node has it where units look for programs."""
    return any((settings.host_usr / folder / "nft").exists() for folder in _PROGRAMS)


def file_system(path: Path) -> str:
    """Kind of the file system that a path lies in, of this process's mounts; empty where that can't be
    told."""
    found, kind = -1, ""
    wanted = os.path.realpath(path)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            point = before.split()[4].replace("\\040", " ")
            # Of mounts on one another the last one counts.
            if len(point) >= found and (point == "/" or f"{wanted}/".startswith(f"{point}/")):
                found, kind = len(point), after.split()[0]
    return kind


def _target(unit: Path) -> str:
    """As `systemctl enable` links it, and wherever the directory is mounted."""
    return f"/etc/systemd/system/{unit.name}"


def _wants(directory: Path) -> Iterator[Path]:
    """What enables the unit."""
    for folder in sorted(directory.glob("*.wants")):
        if (folder / bootguard.UNIT).is_symlink():
            yield folder / bootguard.UNIT


def _write(path: Path, text: str, mode: int) -> None:
    """Writes nothing where it holds this already. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if path.read_text() == text:
            return
    state.replace_file(path, text, mode)
