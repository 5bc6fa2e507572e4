"""`meshwire endpoints` and `meshwire identities`: whom policies know, and by which labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click

from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshendpointslice import Endpoint, MeshEndpointSlice
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import NAMESPACE_LABEL, NAMESPACE_LABELS_PREFIX, SERVICE_ACCOUNT_LABEL
from meshwire.cli import cluster
from meshwire.cli.cluster import API, ClusterUnavailable
from meshwire.cli.findings import make_console
from meshwire.policy.identity import NAMES, Labels

if TYPE_CHECKING:
    from rich.table import Table

Parsed = TypeVar("Parsed")

WORLDWIDE: Final = "an identity of no labels: entities and CIDR blocks name it"


def read_endpoints(reader: cluster.Reader) -> list[Endpoint]:
    """Sorted by pod. Raises ClusterUnavailable."""
    slices = _read(reader, names.MESHENDPOINTSLICES, MeshEndpointSlice.from_object)
    return sorted((each for found in slices for each in found.endpoints), key=lambda each: each.pod)


def read_identities(reader: cluster.Reader) -> dict[int, Labels]:
    """By number. Raises ClusterUnavailable."""
    found = _read(reader, names.MESHIDENTITIES, MeshIdentity.from_object)
    return {each.number: each.labels for each in sorted(found, key=lambda each: each.number)}


def _read(reader: cluster.Reader, plural: str, parse: Callable[[cluster.Object], Parsed]) -> list[Parsed]:
    try:
        return [parse(item) for item in reader.items(f"{API}/{plural}")]
    except cluster.NotFound:
        raise ClusterUnavailable(
            f"Meshwire's policy isn't installed in this cluster: {reader.server} knows no {plural}"
        ) from None
    except InvalidSpec as error:
        raise ClusterUnavailable(
            f"the cluster holds an object this client does not understand ({error}); is the client too old?"
        ) from None


def short_labels(labels: Iterable[tuple[str, str]]) -> str:
    """The pods' own labels; the namespace is told elsewhere, its labels hardly ever matter."""
    own = {
        key: value
        for key, value in labels
        if key not in (NAMESPACE_LABEL, SERVICE_ACCOUNT_LABEL)
        and not key.startswith(NAMESPACE_LABELS_PREFIX)
    }
    return ", ".join(f"{key}={value}" for key, value in sorted(own.items())) or "none"


def _unavailable(error: ClusterUnavailable) -> NoReturn:
    click.echo(f"meshwire: {error}", err=True)
    raise SystemExit(2)


@click.command()
@click.option("-n", "--namespace", help="Pods of this namespace only.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@cluster.options
def endpoints(namespace: str | None, output: str, kubeconfig: str | None, context: str | None) -> None:
    """List pods as every node's policies know them: address, node, identity and labels.

    A pod that is missing here matches no label selector on other nodes than its own.

    Exit code: 0; 2 where the cluster can't be asked or policy isn't installed in it.
    """
    try:
        reader = cluster.Reader(cluster.Choice(kubeconfig, context))
        found, labels = read_endpoints(reader), read_identities(reader)
    except ClusterUnavailable as error:
        _unavailable(error)
    found = [each for each in found if namespace in (None, each.pod.namespace)]
    if output == "json":
        answer = [{**each.to_dict(), "labels": dict(labels.get(each.identity, ()))} for each in found]
        click.echo(json.dumps(answer, indent=2))
        return
    rows = [
        (
            f"{each.pod.namespace}/{each.pod.name}",
            ", ".join(map(str, each.addresses)),
            each.node,
            str(each.identity),
            short_labels(labels[each.identity])
            if each.identity in labels
            else "not known: no such identity",
        )
        for each in found
    ]
    _print(("Pod", "Addresses", "Node", "Identity", "Labels"), rows)


@click.command()
@click.argument("number", type=int, required=False)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@cluster.options
def identities(number: int | None, output: str, kubeconfig: str | None, context: str | None) -> None:
    """List identities: the labels that pods are told apart by, and how many pods have them.

    With NUMBER, every label of that one, and its pods.

    Exit code: 0; 1 where there is no identity NUMBER; 2 where the cluster can't be asked or policy isn't
    installed in it.
    """
    if number is not None and number in NAMES:
        if output == "json":
            click.echo(json.dumps({**_as_json(number, (), 0), "name": NAMES[number]}, indent=2))
        else:
            click.echo(f"{number} is {NAMES[number]}, {WORLDWIDE}")
        return
    try:
        reader = cluster.Reader(cluster.Choice(kubeconfig, context))
        labels, found = read_identities(reader), read_endpoints(reader)
    except ClusterUnavailable as error:
        _unavailable(error)
    counts = Counter(each.identity for each in found)
    if number is not None:
        if number not in labels:
            click.echo(f"meshwire: there is no identity {number}", err=True)
            raise SystemExit(1)
        _show(number, labels[number], [each for each in found if each.identity == number], output)
    elif output == "json":
        click.echo(
            json.dumps([_as_json(each, pairs, counts[each]) for each, pairs in labels.items()], indent=2)
        )
    else:
        rows = [
            (str(each), dict(pairs).get(NAMESPACE_LABEL, ""), short_labels(pairs), str(counts[each]))
            for each, pairs in labels.items()
        ]
        _print(("Identity", "Namespace", "Labels", "Endpoints"), rows)


def _as_json(number: int, labels: Labels, count: int) -> dict[str, Any]:
    return {"number": number, "labels": dict(labels), "endpoints": count}


def _show(number: int, labels: Labels, found: Sequence[Endpoint], output: str) -> None:
    pods = [f"{each.pod.namespace}/{each.pod.name}" for each in found]
    if output == "json":
        click.echo(json.dumps({**_as_json(number, labels, len(found)), "pods": pods}, indent=2))
        return
    click.echo(f"identity {number}")
    for key, value in labels:
        click.echo(f"  {key}={value}")
    click.echo(f"endpoints: {len(found)}")
    for pod in pods:
        click.echo(f"  {pod}")


def _print(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table: Table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        # The last one may be long, whoever is first is looked for.
        table.add_column(column, no_wrap=column in columns[:1], overflow="fold")
    for row in rows:
        # Text, never markup: labels come from the cluster.
        table.add_row(*map(Text, row))
    make_console().print(table)
