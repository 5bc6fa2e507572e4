"""`meshwire rotate`: new WireGuard keys for all nodes, now."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Final

import click

from meshwire.api import conditions, names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import Phase
from meshwire.api.meshstatus import MeshStatus
from meshwire.cli import cluster
from meshwire.cli.cluster import API, ClusterUnavailable

CONFIG: Final = f"{API}/{names.MESHCONFIGS}/{names.CONFIG_NAME}"
STATUS: Final = f"{API}/{names.MESHSTATUSES}/{names.STATUS_NAME}"
POLL_SECONDS: Final = 0.5


@click.command()
@click.option("--wait", is_flag=True, help="Return when only the new keys are left.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=600, show_default=True, help="Seconds of --wait."
)
@cluster.options
def rotate(wait: bool, timeout: float, kubeconfig: str | None, context: str | None) -> None:
    """Give all nodes new WireGuard keys. No packet is lost by it, and none is in clear.

    Sets the annotation meshwire.dev/rotate of the MeshConfig; where that comes from git, change it there.
    What is asked for while keys change already is done after that.

    Exit code: 0 where it was asked for, with --wait where it is done; 1 where encryption is not in force, or
    it isn't done in time; 2 where the cluster can't be asked.
    """
    try:
        reader = cluster.Reader(cluster.Choice(kubeconfig, context))
        status = read_status(reader)
        if status.phase is not Phase.ENFORCING:
            click.echo(f"meshwire: encryption is not in force, but {status.phase}", err=True)
            raise SystemExit(1)
        value = datetime.now(UTC).isoformat()
        reader.patch(CONFIG, {"metadata": {"annotations": {names.ROTATE_ANNOTATION: value}}})
        if not wait:
            click.echo("asked for; `kubectl get meshstatus` shows how far it is")
            return
        status = _wait(reader, timeout)
    except cluster.NotFound:
        click.echo(f"meshwire: {reader.server} has no MeshConfig `{names.CONFIG_NAME}`", err=True)
        raise SystemExit(2) from None
    except ClusterUnavailable as error:
        click.echo(f"meshwire: {error}", err=True)
        raise SystemExit(2) from None
    if status.rotation or not status.last_rotation or status.phase is not Phase.ENFORCING:
        ready = conditions.find(status.conditions, conditions.READY)
        click.echo(f"meshwire: not done yet: {ready.message if ready else status.encryption}", err=True)
        raise SystemExit(1)
    click.echo(f"done in {status.last_rotation.seconds} s: epoch {status.last_rotation.epoch}")


def read_status(reader: cluster.Reader) -> MeshStatus:
    """As written by the operator; Off where it has written none. Raises what Reader raises."""
    try:
        return MeshStatus.from_object(reader.find(STATUS) or {"metadata": {}})
    except InvalidSpec as error:
        raise ClusterUnavailable(f"the MeshStatus can't be understood: {error}") from None


def is_done(status: MeshStatus, config: MeshConfig) -> bool:
    """Whatever was asked for until now has been done, or can't be."""
    return status.phase is not Phase.ENFORCING or (
        status.rotation is None and status.handled_request == config.rotate
    )


def _wait(reader: cluster.Reader, timeout: float) -> MeshStatus:
    """The first status that is done, or the last one before the time is over. Somebody else's request that
    came after ours takes its place."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            config = MeshConfig.from_object(reader.get(CONFIG))
        except InvalidSpec as error:
            raise ClusterUnavailable(f"the MeshConfig can't be understood: {error}") from None
        status = read_status(reader)
        if is_done(status, config) or time.monotonic() > deadline:
            return status
        time.sleep(POLL_SECONDS)
