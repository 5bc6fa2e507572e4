"""`meshwire version`: of this client and of the agents a cluster runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version as distribution_version

import click

from meshwire.api import names
from meshwire.cli import cluster
from meshwire.cli.cluster import API, ClusterUnavailable


def client_version() -> str:
    return distribution_version("meshwire")


def agent_versions(meshnodes: Iterable[cluster.Object]) -> dict[str, int]:
    """Agent version -> how many nodes run it; nodes whose agent has not reported yet are left out."""
    found = (meshnode.get("status", {}).get("agentVersion") for meshnode in meshnodes)
    return dict(sorted(Counter(version for version in found if version).items()))


@click.command()
@click.option(
    "--cluster/--no-cluster",
    "ask",
    default=None,
    help="Ask the cluster which versions its agents run; default: where there is a kubeconfig.",
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@cluster.options
def version(ask: bool | None, output: str, kubeconfig: str | None, context: str | None) -> None:
    """Print the version of this client and, where a cluster answers, of its agents.

    Exit code: 0; 2 where --cluster was given and the cluster can't be asked.
    """
    agents: dict[str, int] | None = None
    problem = ""
    choice = cluster.Choice(kubeconfig, context)
    if ask or (ask is None and choice.is_configured()):
        try:
            agents = agent_versions(cluster.Reader(choice).items(f"{API}/{names.MESHNODES}"))
        except ClusterUnavailable as error:
            problem = str(error)
        except cluster.NotFound:
            problem = "Meshwire isn't installed in this cluster"
    if output == "json":
        click.echo(json.dumps({"client": client_version(), "agents": agents}, indent=2))
    else:
        click.echo(f"client  {client_version()}")
        for agent, nodes in (agents or {}).items():
            click.echo(f"agent   {agent}  on {nodes} {'node' if nodes == 1 else 'nodes'}")
    if problem:
        click.echo(f"meshwire: {problem}", err=True)
        if ask:
            raise SystemExit(2)
