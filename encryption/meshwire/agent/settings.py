"""Where the agent runs and keeps things, from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshwire.api import names


class InvalidEnvironment(Exception):
    """A variable is missing or malformed; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`metrics_address` is (host, port); port 0 serves none."""

    node: str
    namespace: str
    state_directory: Path
    pin_directory: Path
    run_directory: Path
    proc_sys: Path
    metrics_address: tuple[str, int]
    systemd_directory: Path = Path("/host/etc/systemd/system")
    """The host's /etc/systemd/system; it isn't there where nobody has given it to the agent."""
    host_usr: Path = Path("/host/usr")
    """The host's /usr."""

    @property
    def policy_pin_directory(self) -> Path:
        """The policy programs' maps come and go by themselves."""
        return self.pin_directory.with_name(f"{self.pin_directory.name}-policy")

    @property
    def sealing_key_file(self) -> Path:
        return self.state_directory / "sealing.key"

    @property
    def held_keys_file(self) -> Path:
        return self.state_directory / "keys.json"

    @property
    def config_file(self) -> Path:
        return self.state_directory / "config.json"

    @property
    def guard_file(self) -> Path:
        return self.state_directory / "guard.json"

    @property
    def boot_rules_file(self) -> Path:
        """Has to have the same path on the host."""
        return self.state_directory / "boot.nft"


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Raises InvalidEnvironment."""
    node = environ.get("NODE_NAME") or os.uname().nodename
    address = environ.get("MESHWIRE_METRICS_ADDRESS", "127.0.0.1:9871")
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise InvalidEnvironment(f"MESHWIRE_METRICS_ADDRESS is {address!r}, not HOST:PORT")
    return Settings(
        node=node,
        namespace=environ.get("POD_NAMESPACE", names.NAMESPACE),
        state_directory=Path(environ.get("MESHWIRE_STATE_DIR", "/var/lib/meshwire")),
        pin_directory=Path(environ.get("MESHWIRE_BPFFS", "/sys/fs/bpf/meshwire")),
        run_directory=Path(environ.get("MESHWIRE_RUN_DIR", "/run/meshwire")),
        proc_sys=Path(environ.get("MESHWIRE_PROC_SYS", "/proc/sys")),
        metrics_address=(host.strip("[]"), int(port)),
        systemd_directory=Path(environ.get("MESHWIRE_SYSTEMD_DIR", "/host/etc/systemd/system")),
        host_usr=Path(environ.get("MESHWIRE_HOST_USR", "/host/usr")),
    )
