"""`meshwire policy`: policies looked at before they are applied, and asked why."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from meshwire.api.meshpolicy import Kind, Policy
from meshwire.cli import cluster
from meshwire.cli.cluster import ClusterUnavailable, Object
from meshwire.cli.clusterview import (
    End,
    NoSuchEnd,
    View,
    find_policies,
    find_view,
    policies_of,
    view_of,
)
from meshwire.cli.explaining import Origins, as_json, explain, lines
from meshwire.cli.linting import PLURALS, Level, check_bundle, lint
from meshwire.cli.policyfiles import Sources, read
from meshwire.cli.schema import SchemaNotFound, schema_of
from meshwire.policy.evaluate import Packet
from meshwire.policy.identity import PROVISIONAL
from meshwire.policy.model import ICMP, ICMPV6, SCTP, TCP, UDP

DENIED: Final = 3
NUMBERS: Final = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
ECHO_REQUEST: Final = {4: 8, 6: 128}
LEVEL_STYLES: Final = {Level.ERROR: "bold red", Level.WARNING: "yellow"}
SNAPSHOT_HELP: Final = (
    "Output of `kubectl get pods,namespaces,services,nodes -A -o json`, of which pods and namespaces are "
    "needed; may be given several times."
)


class Unusable(Exception):
    """What the command was given can't be used; one line for the person at the terminal."""


@click.group()
def policy() -> None:
    """Look at policies before they are applied, and ask why they do what they do.

    Exit code: see each command.
    """


@policy.command("lint")
@click.argument("paths", nargs=-1, required=True, metavar="FILE|DIR|- ...")
@click.option("-n", "--namespace", default="default", help="Of policies that name none.", show_default=True)
@click.option(
    "--snapshot",
    "snapshots",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help=SNAPSHOT_HELP,
)
@click.option("--cluster", "ask", is_flag=True, help="Try selectors on the pods of the cluster.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@cluster.options
def lint_(
    paths: tuple[str, ...],
    namespace: str,
    snapshots: tuple[str, ...],
    ask: bool,
    output: str,
    kubeconfig: str | None,
    context: str | None,
) -> None:
    """Find what is wrong with MeshPolicies, ClusterMeshPolicies and NetworkPolicies in YAML files.

    Errors: what the API server or Meshwire would refuse, and policies that are there twice. Warnings: rules
    and selectors that do nothing; with --snapshot or --cluster also selectors that match none of the pods
    there are. Kustomizations are followed, their patches are not applied: for what they make,
    `kubectl kustomize DIR | meshwire policy lint -`.

    Exit code: 0 without errors, 1 with errors, 2 where the cluster or a snapshot can't be read.
    """
    if ask and snapshots:
        raise click.UsageError("--snapshot and --cluster: give one of them")
    try:
        schemas = _schemas()
        view = None
        if ask:
            view = find_view(cluster.Reader(cluster.Choice(kubeconfig, context)))
        elif snapshots:
            view = view_of(read_snapshots(snapshots))
    except (ClusterUnavailable, Unusable) as error:
        click.echo(f"meshwire: {error}", err=True)
        raise SystemExit(2) from None
    sources = read(paths, sys.stdin.read)
    result = lint(sources, schemas, namespace=namespace, view=view)
    errors, warnings = result.count(Level.ERROR), result.count(Level.WARNING)
    if output == "json":
        answer = {
            "ok": not errors,
            "files": sources.files,
            "policies": result.policies,
            "otherObjects": result.others,
            "patchesNotApplied": sources.patches,
            "problems": [problem.as_json() for problem in result.problems],
        }
        click.echo(json.dumps(answer, indent=2))
    else:
        for problem in result.problems:
            click.echo(str(problem))
        _notes([*(view.notes if view else ()), *_patch_note(sources)])
        others = f", {_count(result.others, 'other object')} not looked at" if result.others else ""
        click.echo(
            f"{_count(result.policies, 'policy', 'policies')} in {_count(sources.files, 'file')}{others}: "
            f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
        )
    raise SystemExit(1 if errors else 0)


@policy.command("explain")
@click.option("--from", "source", required=True, metavar="NS/POD|IP|ENTITY", help="Who sends.")
@click.option("--to", "destination", required=True, metavar="NS/POD|IP|ENTITY", help="Who receives.")
@click.option(
    "--port", metavar="NUMBER|NAME", help="Of the receiver; a name is one that its containers give."
)
@click.option(
    "--protocol",
    type=click.Choice(["TCP", "UDP", "SCTP", "ICMP"], case_sensitive=False),
    metavar="TCP|UDP|SCTP|ICMP",
    default="TCP",
    show_default=True,
)
@click.option(
    "--icmp-type", type=click.IntRange(0, 255), help="With --protocol ICMP; default: echo request."
)
@click.option(
    "--ip", "version", type=click.Choice(["4", "6"]), help="IP version; default: one both ends have."
)
@click.option(
    "--files",
    "paths",
    multiple=True,
    metavar="FILE|DIR|-",
    help="Policies from YAML files, not the cluster's.",
)
@click.option(
    "--snapshot",
    "snapshots",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Without a cluster. " + SNAPSHOT_HELP,
)
@click.option("-n", "--namespace", default="default", help="Of policies in files that name none.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@cluster.options
def explain_(
    source: str,
    destination: str,
    port: str | None,
    protocol: str,
    icmp_type: int | None,
    version: str | None,
    paths: tuple[str, ...],
    snapshots: tuple[str, ...],
    namespace: str,
    output: str,
    kubeconfig: str | None,
    context: str | None,
) -> None:
    """Say whether policies let a packet through, which rule decides, or which one nearly would have.

    The egress rules of the sending pod and the ingress rules of the receiving pod both have to allow it.
    ENTITY is world, host (the pod's own node), remote-node or kube-apiserver. Where a Service's address is
    used, name the pod behind it. Policies and pods are those of the cluster; --files says what other
    policies would do to its pods, with --snapshot too no cluster is asked.

    Exit code: 0 allowed, 3 denied, 2 where that can't be said.
    """
    if protocol == "ICMP" and port is not None:
        raise click.UsageError("ICMP has no ports: --icmp-type")
    if protocol != "ICMP" and (port is None or icmp_type is not None):
        raise click.UsageError("give --port; --icmp-type goes with --protocol ICMP")
    try:
        view, policies, origins, notes = _gather(
            paths, snapshots, namespace, cluster.Choice(kubeconfig, context)
        )
        ends = view.find_ends(source, destination, version=int(version or 0))
        packet = packet_of(
            *ends, protocol=protocol, port=port, icmp_type=icmp_type, version=int(version or 0)
        )
    except (ClusterUnavailable, NoSuchEnd, Unusable) as error:
        click.echo(f"meshwire: {error}", err=True)
        raise SystemExit(2) from None
    explanation = explain(policies, *ends, packet)
    if output == "json":
        answer = {
            "from": _end_json(ends[0]),
            "to": _end_json(ends[1]),
            "protocol": protocol,
            "port": packet.port or None,
            "icmpType": packet.icmp_type,
            **as_json(explanation, origins, ends),
            "notes": notes,
        }
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(_headline(ends, packet, protocol) + ("allowed" if explanation.allowed else "DENIED"))
        for line in lines(explanation, origins, ends):
            click.echo(line)
        _notes(notes)
    raise SystemExit(0 if explanation.allowed else DENIED)


def packet_of(
    source: End,
    destination: End,
    *,
    protocol: str,
    port: str | None,
    icmp_type: int | None,
    version: int = 0,
) -> Packet:
    """The first packet of a flow. Raises NoSuchEnd where the receiver has no port of that name."""
    address = destination.party.address or source.party.address
    version = version or (address.version if address else 4)
    if protocol == "ICMP":
        number, to_port = (ICMP if version == 4 else ICMPV6), 0
        icmp_type = ECHO_REQUEST[version] if icmp_type is None else icmp_type
    else:
        number, to_port = NUMBERS[protocol], _port(port or "", destination, NUMBERS[protocol])
    return Packet(
        source=source.party,
        destination=destination.party,
        protocol=number,
        port=to_port,
        icmp_type=icmp_type,
    )


def _port(text: str, destination: End, protocol: int) -> int:
    if text.isascii() and text.isdecimal():
        if not 1 <= int(text) <= 65535:
            raise NoSuchEnd(f"{text} is no port: 1 to 65535")
        return int(text)
    named = destination.party.named_ports
    numbers = sorted(port for number, port in named.get(text, ()) if number == protocol)
    if not numbers:
        known = f"; it names {', '.join(sorted(named))}" if named else ""
        raise NoSuchEnd(f"{destination.title} has no port of the name {text!r} for this protocol{known}")
    return numbers[0]


def _gather(
    paths: Sequence[str], snapshots: Sequence[str], namespace: str, choice: cluster.Choice
) -> tuple[View, list[Policy], Origins, list[str]]:
    """What to judge by. Raises ClusterUnavailable and Unusable."""
    if snapshots:
        objects = list(read_snapshots(snapshots))
        view = view_of(objects)
        if paths:
            policies, origins, notes = _from_files(paths, namespace)
        elif any(each["kind"] in list(Kind) for each in objects):
            policies, notes = policies_of(objects)
            origins = {}
        else:
            raise Unusable(
                f"no policies: give --files, or add {', '.join(PLURALS.values())} to the snapshot"
            )
        return view, policies, origins, notes
    reader = cluster.Reader(choice)
    view = find_view(reader)
    notes = list(view.notes)
    if not view.config.policy.enabled:
        notes.append(
            "policy is off in this cluster (spec.policy.enabled of the MeshConfig): all of this passes"
        )
    if paths:
        policies, origins, more = _from_files(paths, namespace)
    else:
        policies, more = find_policies(reader, view.config)
        origins = {}
    return view, policies, origins, [*notes, *more]


def _from_files(paths: Sequence[str], namespace: str) -> tuple[list[Policy], Origins, list[str]]:
    sources = read(paths, sys.stdin.read)
    if len(sources.bundles) > 1:
        names = ", ".join(bundle.name or "files of none" for bundle in sources.bundles)
        raise Unusable(f"these files are of several kustomizations, name one of them: {names}")
    checked = check_bundle(sources.bundles[0], _schemas(), namespace)
    wrong = sum(mistake.is_error for mistake in sources.mistakes) + sum(
        bool(each.problems) for each in checked
    )
    if wrong:
        raise Unusable(
            f"{_count(wrong, 'mistake')} in these files: `meshwire policy lint {' '.join(paths)}`"
        )
    origins = {(each.kind, each.namespace, each.document.name): each.document for each in checked}
    # Of two with one name the one applied last is in force.
    by_name = {(p.kind, p.namespace, p.name): p for each in checked if (p := each.policy) is not None}
    return list(by_name.values()), origins, _patch_note(sources)


def read_snapshots(paths: Iterable[str]) -> Iterable[Object]:
    """The objects of lists in JSON. Raises Unusable."""
    for path in paths:
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            items = content["items"] if content["kind"].endswith("List") else [content]
            found = [item for item in items if item["metadata"]["name"] and item["kind"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Unusable(f"{path} is no list of objects as `kubectl get ... -o json` prints it") from None
        yield from found


def _schemas() -> dict[Kind, Any]:
    try:
        return {kind: schema_of(plural) for kind, plural in PLURALS.items()}
    except SchemaNotFound as error:
        raise Unusable(str(error)) from None


def _headline(ends: Sequence[End], packet: Packet, protocol: str) -> str:
    source, destination = (_end_words(end) for end in ends)
    if protocol == "ICMP":
        return f"{source} -> {destination} ICMP type {packet.icmp_type}: "
    return f"{source} -> {destination} {protocol} port {packet.port}: "


def _end_words(end: End) -> str:
    address = end.party.address
    return f"{end.title} {address}" if end.party.is_pod and address else end.title


def _end_json(end: End) -> dict[str, Any]:
    return {
        "name": end.title.partition(" (")[0],
        # Provisional numbers are ours alone.
        "identity": end.party.identity if end.party.identity < PROVISIONAL else None,
        "address": str(end.party.address) if end.party.address else None,
        "node": end.node or None,
        "labels": dict(end.party.labels),
    }


def _patch_note(sources: Sources) -> list[str]:
    if not sources.patches:
        return []
    return [
        f"{_count(sources.patches, 'patch', 'patches')} of kustomizations not applied: "
        "for what they make, use `kubectl kustomize DIR | ...` and the file -"
    ]


def _notes(notes: Iterable[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
