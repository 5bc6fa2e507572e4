"""`meshwire status`: whether traffic between nodes is encrypted, and if not, why."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import click

from meshwire.api import conditions, names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import BootGuard, MeshConfig, Mode
from meshwire.api.meshnode import MeshNode
from meshwire.api.meshstatus import MeshStatus
from meshwire.cli import cluster, matrix
from meshwire.cli.cluster import API, ClusterUnavailable
from meshwire.cli.diagnosis import Snapshot, age, as_json, diagnose, is_ready, key_age
from meshwire.cli.findings import make_console, print_findings

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REFRESH_SECONDS: Final = 2.0
POLL_SECONDS: Final = 0.5


def read_snapshot(reader: cluster.Reader) -> Snapshot:
    """Raises ClusterUnavailable, also where Meshwire is not installed or speaks another version."""
    try:
        meshnodes = reader.items(f"{API}/{names.MESHNODES}")
    except cluster.NotFound:
        raise ClusterUnavailable(
            f"Meshwire isn't installed in this cluster: {reader.server} knows no {names.GROUP}"
        ) from None
    config = reader.find(f"{API}/{names.MESHCONFIGS}/{names.CONFIG_NAME}")
    status = reader.find(f"{API}/{names.MESHSTATUSES}/{names.STATUS_NAME}")
    try:
        return Snapshot(
            config=None if config is None else MeshConfig.from_object(config),
            status=None if status is None else MeshStatus.from_object(status),
            meshnodes=[MeshNode.from_object(meshnode) for meshnode in meshnodes],
            alive=_read_alive(reader),
        )
    except InvalidSpec as error:
        raise ClusterUnavailable(
            f"the cluster holds an object this client does not understand ({error}); is the client too old?"
        ) from None


def _read_alive(reader: cluster.Reader) -> dict[str, bool] | None:
    try:
        nodes = reader.items("/api/v1/nodes")
    except cluster.Forbidden:
        return None
    return {
        node["metadata"]["name"]: conditions.is_true(
            conditions.parse(node.get("status", {})), conditions.READY, generation=0
        )
        for node in nodes
    }


@click.command()
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-w", "--watch", is_flag=True, help="Show it again every 2 seconds until interrupted.")
@click.option("--wait", is_flag=True, help="First wait until the cluster is as the MeshConfig asks.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=120, show_default=True, help="Seconds of --wait."
)
@click.option("--matrix", "with_matrix", is_flag=True, help="Show which node hears which, node by node.")
@cluster.options
def status(
    output: str,
    watch: bool,
    wait: bool,
    timeout: float,
    with_matrix: bool,
    kubeconfig: str | None,
    context: str | None,
) -> None:
    """Show whether traffic between nodes is encrypted, node by node, and explain what is wrong.

    Exit code: 0 where the cluster is in the state the MeshConfig asks for, 1 where it is not (yet),
    2 where the cluster can't be asked or Meshwire isn't installed in it.
    """
    if watch and (wait or output == "json"):
        raise click.UsageError("--watch is for people at a terminal: not with --wait or -o json")
    try:
        reader = cluster.Reader(cluster.Choice(kubeconfig, context))
        if watch:
            _watch(reader, with_matrix=with_matrix)
        snapshot = _wait(reader, timeout) if wait else read_snapshot(reader)
    except ClusterUnavailable as error:
        click.echo(f"meshwire: {error}", err=True)
        raise SystemExit(2) from None
    if output == "json":
        shown = as_json(snapshot, datetime.now(UTC))
        if with_matrix:
            shown["matrix"] = matrix.as_json(matrix.make_matrix(snapshot))
        click.echo(json.dumps(shown, indent=2))
    else:
        _print(make_console(), snapshot, with_matrix=with_matrix)
    raise SystemExit(0 if is_ready(snapshot) else 1)


def _wait(reader: cluster.Reader, timeout: float) -> Snapshot:
    """The first snapshot that is ready, or the last one before `timeout` seconds are over."""
    deadline = time.monotonic() + timeout
    while not is_ready(snapshot := read_snapshot(reader)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return snapshot


def _print(console: Console, snapshot: Snapshot, *, with_matrix: bool) -> None:
    """The matrix takes the place of the rest: of many nodes it fills the screen."""
    if with_matrix:
        matrix.print_matrix(console, matrix.make_matrix(snapshot))
    else:
        print_status(console, snapshot)


def _watch(reader: cluster.Reader, *, with_matrix: bool) -> None:
    """Ends with the user's interrupt, or ClusterUnavailable."""
    console = make_console()
    while True:
        snapshot = read_snapshot(reader)
        console.clear()
        _print(console, snapshot, with_matrix=with_matrix)
        time.sleep(REFRESH_SECONDS)


def print_status(console: Console, snapshot: Snapshot) -> None:
    """The mesh, its nodes (peers: with a fresh handshake / all), and what is wrong."""
    console.print(_mesh_table(snapshot))
    if snapshot.meshnodes:
        console.print()
        console.print(_node_table(snapshot))
    if findings := diagnose(snapshot):
        console.print()
        print_findings(console, findings)


def _mesh_table(snapshot: Snapshot) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    status = snapshot.status or MeshStatus()
    age_of_keys = age(key_age(status, datetime.now(UTC)))
    style = "bold green" if status.encryption == "WireGuard" else "bold yellow"
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("Encryption", Text(status.encryption, style=style))
    table.add_row("Phase", status.phase)
    table.add_row("Epoch", f"{status.epoch}, keys {age_of_keys} old" if status.epoch else "none yet")
    table.add_row("Nodes", f"{status.nodes_ready} of {status.nodes} ready")
    table.add_row("Leaked", _count(status.leaked, "bold red"))
    if (row := boot_guard(snapshot)) is not None:
        table.add_row("Boot guard", row)
    table.add_row("Ready", _yes_no(is_ready(snapshot)))
    for condition in status.conditions:
        state = {True: "True", False: "False", None: "Unknown"}[condition.status]
        words = f"{state}, {condition.reason}" + (f": {condition.message}" if condition.message else "")
        table.add_row(Text(f"  {condition.type}"), Text(words))
    return table


def boot_guard(snapshot: Snapshot) -> str | None:
    """On how many nodes it is in place; None where there is nothing for it to hold back."""
    encryption = (snapshot.config or MeshConfig()).encryption
    if not encryption.enabled or encryption.mode is not Mode.STRICT:
        return None
    if encryption.boot_guard is BootGuard.OFF:
        return (
            "off (spec.encryption.bootGuard): what pods of a booting node send before its agent is in clear"
        )
    nodes = [node.status.conditions for node in snapshot.meshnodes]
    in_place = sum(conditions.is_true(each, conditions.BOOT_GUARD, generation=0) for each in nodes)
    return f"in place on {in_place} of {len(nodes)} nodes"


def _node_table(snapshot: Snapshot) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Node", no_wrap=True)
    table.add_column("WireGuard")
    table.add_column("Peers", justify="right")
    table.add_column("Epoch", justify="right")
    table.add_column("Strict")
    table.add_column("Leaked", justify="right")
    table.add_column("Dropped", justify="right")
    table.add_column("Ready")
    table.add_column("Reason", overflow="fold")
    for node in snapshot.meshnodes:
        reported = node.status
        ready = conditions.find(reported.conditions, conditions.READY)
        table.add_row(
            Text(node.name),
            reported.implementation,
            Text(
                f"{reported.handshakes}/{reported.peers}",
                style="yellow" if reported.handshakes < reported.peers else "",
            ),
            epochs(node),
            "yes" if reported.strict else "no",
            _count(reported.leaked, "bold red"),
            _count(reported.dropped, "yellow"),
            _yes_no(node.ready),
            Text((ready.reason if ready else "NeverReported") if snapshot.is_live(node) else "NodeNotReady"),
        )
    return table


def epochs(node: MeshNode) -> str:
    """`2`, or `1>2` while the node is prepared for an epoch that it does not send by yet."""
    prepared, active = node.status.prepared_epoch, node.status.active_epoch
    return str(active) if prepared == active else f"{active}>{prepared}"


def _count(value: int, style: str) -> RenderableType:
    from rich.text import Text

    return Text(str(value), style=style if value else "")


def _yes_no(value: bool) -> RenderableType:
    from rich.text import Text

    return Text("yes", style="green") if value else Text("no", style="bold red")
