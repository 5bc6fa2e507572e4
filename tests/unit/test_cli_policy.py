"""`meshwire policy`, `endpoints`, `identities` and `monitor`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_cli_commands import Cluster

from meshwire.api.fields import InvalidSpec
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    CidrPeer,
    Direction,
    Entity,
    IcmpType,
    Kind,
    Operator,
    Peer,
    Policy,
    PolicyMode,
    PortRange,
    Protocol,
    Requirement,
    Rule,
    Selector,
    ServicePeer,
)
from meshwire.cli import schema
from meshwire.cli.__main__ import main
from meshwire.cli.cluster import Choice
from meshwire.cli.clusterview import End, NoSuchEnd, View, view_of
from meshwire.cli.covering import is_contradiction, rule_covers, selector_covers
from meshwire.cli.events import Event, Filter, Merger, parse, words
from meshwire.cli.explaining import explain
from meshwire.cli.linting import PLURALS, lint
from meshwire.cli.linting import Result as LintResult
from meshwire.cli.monitor import Command, Watch, follow, is_lab
from meshwire.cli.policyfiles import Unreadable, read
from meshwire.cli.policyfiles import parse as parse_yaml
from meshwire.cli.schema import refusals
from meshwire.policy import identity
from meshwire.policy.evaluate import Packet, Party, Reason, decide, holds, judge, near_misses
from meshwire.policy.model import ICMP, SCTP, TCP, UDP, ServiceInfo
from meshwire.policy.selectors import matches

ROOT = Path(__file__).parents[2]
API = "/apis/meshwire.dev/v1alpha1"
SCHEMAS = {kind: schema.schema_of(plural) for kind, plural in PLURALS.items()}


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(
        main, [str(argument) for argument in arguments], input=stdin, catch_exceptions=False
    )


# YAML


def test_every_field_has_its_line() -> None:
    text = textwrap.dedent(
        """\
        # a comment
        kind: A
        spec:
          list:
            - one: 1
              two: {three: 3}
            -
              - deep
          a.b/c: x
        ---
        kind: B
        """
    )
    first, second = parse_yaml(text, "f")
    assert {
        path: first.line(path)
        for path in ("", "kind", "spec", "spec.list[0]", "spec.list[0].two.three", "spec.list[1][0]")
    } == {"": 2, "kind": 2, "spec": 3, "spec.list[0]": 5, "spec.list[0].two.three": 6, "spec.list[1][0]": 8}
    assert first.line("spec.a.b/c") == 9
    assert first.line("spec.list[0].two.absent.deeper[3]") == 6
    assert second.line("spec.nothing") == 11


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-0x10", -16), ("010", 8), ("1.5", 1.5), ("yes", True), ("off", False), ("~", None),
        ("'1'", "1"), ("2026-01-01", "2026-01-01"), ("1.2.3", "1.2.3"), ("[a, 2]", ["a", 2]), ("09", "09"),
    ],
)  # fmt: skip
def test_yaml_means_what_the_api_server_gets_to_see(text: str, value: Any) -> None:
    [document] = parse_yaml(f"v: {text}", "f")
    assert document.body == {"v": value}


def test_anchors_and_merges_are_written_out_with_the_lines_they_come_from() -> None:
    [document] = parse_yaml("a: &a\n  x: 1\nb:\n  <<: *a\n  y: 2\n", "f")
    assert document.body["b"] == {"x": 1, "y": 2}
    assert document.line("b.x") == 2


def test_the_items_of_a_list_are_objects_of_their_own() -> None:
    text = "kind: List\nitems:\n- kind: A\n  metadata:\n    name: a\n- kind: B\n"
    first, second = parse_yaml(text, "f")
    assert (first.name, first.line("metadata.name"), second.kind, second.line()) == ("a", 5, "B", 6)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: c: d\n", 2, "no YAML"),
        ("a: 1\n---\n- x\n", 3, "no object"),
        ("a: &a [*a]\n", 1, "nested too deeply"),
        ("? [a]\n: 1\n", 1, "key that is no string"),
        ("a: \x07\n", 0, "no YAML"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(Unreadable) as caught:
        list(parse_yaml(text, "f"))
    assert (caught.value.line, words in caught.value.text) == (line, True)


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(Unreadable, match="stand for too much"):
        list(parse_yaml("\n".join(lines), "f"))


# The API server's schema


@pytest.mark.parametrize(
    ("rules", "value", "expected"),
    [
        ({"type": "object", "properties": {"a": {}}}, {"a": 1, "b": 2}, [("b", "there is no such field")]),
        ({"type": "object", "properties": {"port": {}}}, {"Ports": 2}, [("Ports", "did you mean port?")]),
        ({"type": "object", "required": ["a"], "properties": {"a": {}}}, {"a": None},
         [("a", "must be given")]),
        ({"type": "object", "x-kubernetes-preserve-unknown-fields": True}, {"b": 2}, []),
        ({"type": "object", "additionalProperties": {"type": "string"}}, {"b": 2},
         [("b", "write it in quotes")]),
        ({"type": "object", "minProperties": 1}, {}, [("", "at least 1 fields")]),
        ({"type": "array", "items": {"type": "integer"}}, [1, True, "x"],
         [("[1]", "whole number"), ("[2]", "whole number")]),
        ({"type": "array", "maxItems": 1}, [1, 2], [("", "at most 1 items")]),
        ({"type": "array"}, "x", [("", "must be a list")]),
        ({"type": "string", "enum": ["a", "b"]}, "c", [("", "one of a, b")]),
        ({"type": "string", "maxLength": 2}, "abc", [("", "at most 2 characters")]),
        ({"type": "string", "pattern": "^a*$"}, "b", [("", "does not match")]),
        ({"type": "integer", "minimum": 1, "maximum": 3}, 4, [("", "must be at most 3")]),
        ({"type": "boolean"}, "true", [("", "true or false")]),
        ({"x-kubernetes-int-or-string": True, "maximum": 9}, 10, [("", "at most 9")]),
        ({"x-kubernetes-int-or-string": True, "pattern": "^[0-9]$"}, "x", [("", "does not match")]),
        ({"x-kubernetes-int-or-string": True}, [], [("", "a whole number or a string")]),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "object"}}}},
         {"a": [{}, {"x": 1}]}, [("a[1].x", "no such field")]),
    ],
)  # fmt: skip
def test_a_schema_refuses(rules: Mapping[str, Any], value: Any, expected: list[tuple[str, str]]) -> None:
    found = list(refusals(rules, value))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (_, text), (_, part) in zip(found, expected, strict=True):
        assert part in text


def test_our_own_samples_pass_their_schemas() -> None:
    for path in (*sorted((ROOT / "config/samples").glob("*.yaml")), ROOT / "examples/base/meshconfig.yaml"):
        for document in parse_yaml(path.read_text(), str(path)):
            assert list(refusals(schema.schema_of("meshconfigs"), document.body)) == []


def test_a_missing_definition_is_said() -> None:
    with pytest.raises(schema.SchemaNotFound):
        schema.schema_of("nonsense")


# lint


def policy_yaml(spec: str, *, kind: str = "MeshPolicy", name: str = "p", namespace: str = "shop") -> str:
    version = "networking.k8s.io/v1" if kind == "NetworkPolicy" else "meshwire.dev/v1alpha1"
    place = f", namespace: {namespace}" if namespace else ""
    head = f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}{place}}}\nspec:\n"
    return head + textwrap.indent(textwrap.dedent(spec).strip("\n"), "  ") + "\n"


def lint_text(text: str, view: View | None = None) -> LintResult:
    return lint(read(["-"], lambda: text), SCHEMAS, view=view)


ALLOW_ALL = "endpointSelector: {}\ningress:\n- fromEntities: [all]\n"

LINT_CASES: tuple[tuple[str, str, tuple[tuple[int, str], ...]], ...] = (
    ("a policy that is right", policy_yaml(ALLOW_ALL), ()),
    (
        "a field of a wrong type, and one that is unknown, in one go",
        policy_yaml("endpointSelector: {}\nmode: [x]\ningres:\n- {}\ningress: []"),
        (
            (6, "spec.mode: must be a string"),
            (7, "spec.ingres: there is no such field: did you mean ingress?"),
        ),
    ),
    (
        "a port that is not in quotes",
        policy_yaml("endpointSelector: {}\ningress:\n- toPorts:\n  - ports:\n    - port: 80"),
        ((9, "spec.ingress[0].toPorts[0].ports[0].port: must be a string: write it in quotes"),),
    ),
    (
        "without endpointSelector: the line is that of spec",
        policy_yaml("ingress: []"),
        ((4, "spec.endpointSelector: must be given"),),
    ),
    (
        "what only Meshwire refuses, in every rule",
        policy_yaml(
            """
            endpointSelector: {}
            ingress:
            - fromEntities: [world]
              fromCIDR: [10.0.0.0/8]
            egress:
            - toCIDR: [10.0.0.1/8]
            - toPorts:
              - ports: [{port: "80"}]
                rules: {http: [{method: GET}]}
            """
        ),
        (
            (7, "spec.ingress[0].fromEntities: can't be in one item with fromCIDR"),
            (10, "spec.egress[0].toCIDR[0]: '10.0.0.1/8' has address bits set"),
            (13, "spec.egress[1].toPorts[0].rules: HTTP rules are not supported yet"),
        ),
    ),
    (
        "a mistake in a field hides none in the rules, and none is told twice",
        policy_yaml(
            """
            endpointSelector: {matchLabels: {"reserved:host": ""}}
            ingres: []
            ingress: x
            egress:
            - toCIDR: [10.0.0.1/8]
            """
        ),
        (
            (5, "spec.endpointSelector.matchLabels: 'reserved:host': labels are written with k8s: or any:"),
            (6, "spec.ingres: there is no such field"),
            (7, "spec.ingress: must be a list"),
            (9, "spec.egress[0].toCIDR[0]: '10.0.0.1/8' has address bits set"),
        ),
    ),
    ("a spec that is none", policy_yaml("- x"), ((4, "spec: must be an object"),)),
    (
        "a policy that says nothing",
        policy_yaml("endpointSelector: {}"),
        ((4, "spec: says nothing"),),
    ),
    (
        "a NetworkPolicy's mistake",
        policy_yaml("podSelector: {}\ningress:\n- from:\n  - ipBlock: {cidr: x}", kind="NetworkPolicy"),
        ((8, "spec.ingress[0].from[0].ipBlock.cidr: 'x' is not a CIDR block"),),
    ),
    (
        "a name no object can have, and a field given twice",
        policy_yaml("endpointSelector: {}\ningress: []\ningress: []", name="Not_A_Name"),
        ((3, "metadata.name: 'Not_A_Name' does not match"), (7, "spec.ingress: is given twice")),
    ),
    (
        "a version nobody serves",
        policy_yaml(ALLOW_ALL).replace("v1alpha1", "v1"),
        ((1, "apiVersion: must be meshwire.dev/v1alpha1"),),
    ),
    (
        "one policy twice; another namespace's is another policy",
        "---\n".join([policy_yaml(ALLOW_ALL)] * 2 + [policy_yaml(ALLOW_ALL, namespace="blog")]),
        ((11, "metadata.name: is in -:1 already"),),
    ),
    (
        "without a namespace it is in the default one",
        "---\n".join(
            [policy_yaml(ALLOW_ALL, namespace=""), policy_yaml(ALLOW_ALL, namespace="default")]
        ),
        ((11, "MeshPolicy default/p metadata.name: is in -:1 already"),),
    ),
    (
        "other kinds are none of our business",
        "kind: Deployment\nspec: {nonsense: 1}\n---\n" + policy_yaml(ALLOW_ALL),
        (),
    ),
    (
        "of others' kinds with our name, too",
        "apiVersion: cilium.io/v2\nkind: NetworkPolicy\nspec: {nonsense: 1}\n",
        (),
    ),
    (
        "an empty list of peers",
        policy_yaml("endpointSelector: {}\ningress:\n- fromEndpoints: []"),
        ((7, "spec.ingress[0]: matches nothing: its list of peers is empty"),),
    ),
    (
        "a rule twice, its peers in another order",
        policy_yaml("endpointSelector: {}\negress:\n- toEntities: [all, host]\n- toEntities: [host, all]"),
        ((8, "spec.egress[1]: says the same as spec.egress[0]"),),
    ),
    (
        "an allow rule that a deny rule of the policy covers",
        policy_yaml(
            """
            endpointSelector: {}
            ingress:
            - fromEndpoints: [{matchLabels: {app: web, tier: front}}]
              toPorts: [{ports: [{port: "80", protocol: TCP}]}]
            - fromEndpoints: [{matchLabels: {app: db}}]
            ingressDeny:
            - fromEndpoints: [{matchLabels: {app: web}}]
              toPorts: [{ports: [{port: "1", endPort: 1024}]}]
            """
        ),
        ((7, "spec.ingress[0]: allows nothing: spec.ingressDeny[0] (-:11) denies all of it"),),
    ),
    (
        "an allow rule that another policy covers, for all namespaces",
        policy_yaml(ALLOW_ALL.replace("all", "world"))
        + "---\n"
        + policy_yaml(
            "endpointSelector: {}\ningressDeny:\n- {fromEntities: [all]}",
            kind="ClusterMeshPolicy", namespace="", name="shut",
        ),
        ((7, "allows nothing: ClusterMeshPolicy shut spec.ingressDeny[0] (-:15) denies all of it"),),
    ),
    (
        "what is only audited denies nothing yet",
        policy_yaml(ALLOW_ALL)
        + "---\n"
        + policy_yaml(
            "endpointSelector: {}\nmode: Audit\ningressDeny:\n- {fromEntities: [all]}",
            kind="ClusterMeshPolicy", namespace="", name="shut",
        ),
        (),
    ),
    (
        "a deny rule for fewer pods leaves the others",
        policy_yaml(ALLOW_ALL)
        + "---\n"
        + policy_yaml(
            "endpointSelector: {matchLabels: {app: web}}\ningressDeny:\n- {fromEntities: [all]}", name="shut"
        ),
        (),
    ),
    (
        "requirements that exclude each other",
        policy_yaml(
            """
            endpointSelector:
              matchLabels: {app: web}
              matchExpressions: [{key: app, operator: NotIn, values: [web]}]
            ingress:
            - fromEndpoints:
              - {}
              - matchExpressions: [{key: a, operator: Exists}, {key: a, operator: DoesNotExist}]
            """
        ),
        (
            (5, "spec.endpointSelector: selects no pod: its requirements exclude each other"),
            (11, "spec.ingress[0].fromEndpoints[1]: selects no pod: its requirements exclude each other"),
        ),
    ),
    (
        "a label that identities leave out",
        policy_yaml("endpointSelector: {matchLabels: {pod-template-hash: x}}\ningress: []"),
        ((5, "spec.endpointSelector: selects no pod: label pod-template-hash is no part of identities"),),
    ),
    (
        "a label that identities leave out by default, and not here",
        policy_yaml("endpointSelector: {matchLabels: {pod-template-hash: x}}\ningress: []")
        + "---\napiVersion: meshwire.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\n"
        "spec: {policy: {excludedLabels: []}}\n",
        (),
    ),
    ("YAML that is none", policy_yaml(ALLOW_ALL) + "---\na: b: c\n", ((9, "is no YAML"),)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in LINT_CASES], ids=[case[0] for case in LINT_CASES]
)
def test_lint_finds(text: str, expected: tuple[tuple[int, str], ...]) -> None:
    problems = lint_text(text).problems
    assert [problem.line for problem in problems] == [line for line, _ in expected], problems
    for problem, (_, part) in zip(problems, expected, strict=True):
        assert part in str(problem)


def pod(namespace: str, name: str, address: str = "", node: str = "node1", **more: Any) -> dict[str, Any]:
    """`labels`, `ports` (name -> number), `spec`."""
    containers = [
        {"ports": [{"name": key, "containerPort": port} for key, port in more.get("ports", {}).items()]}
    ]
    return {
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": more.get("labels", {})},
        "spec": {"nodeName": node, "containers": containers, **more.get("spec", {})},
        "status": {
            "hostIP": {"node1": "192.0.2.1", "node2": "192.0.2.2"}[node],
            "podIPs": [{"ip": ip} for ip in address.split()],
        },
    }


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"kind": "Namespace", "metadata": {"name": name, "labels": labels}}


OBJECTS: list[dict[str, Any]] = [
    namespace("shop", team="shop"),
    namespace("kube-system"),
    pod("shop", "web-5b", "10.1.1.5 fd00::5", labels={"app": "web", "pod-template-hash": "5b"}),
    pod("shop", "web-5c", "10.1.2.6", "node2", labels={"app": "web"}, ports={"http": 81}),
    pod("shop", "db-0", "10.1.2.5", "node2", labels={"app": "db"}, ports={"pg": 5432}),
    pod("shop", "job-1", "", labels={"app": "job"}),
    pod("kube-system", "proxy", "192.0.2.1", spec={"hostNetwork": True}),
    {
        "kind": "Service",
        "metadata": {"namespace": "shop", "name": "db"},
        "spec": {"clusterIP": "10.96.0.9", "selector": {"app": "db"}},
    },
    {
        "kind": "Node",
        "metadata": {"name": "node2"},
        "spec": {"podCIDRs": ["10.1.2.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.2"}]},
    },
    {
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": "kubernetes",
            "labels": {"kubernetes.io/service-name": "kubernetes"},
        },
        "endpoints": [{"addresses": ["192.0.2.2", "203.0.113.6"]}],
    },
    {
        "kind": "MeshIdentity",
        "metadata": {"name": "300"},
        "spec": {
            "labels": {
                "app": "web",
                "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": "shop",
                "io.cilium.k8s.namespace.labels.team": "shop",
                "io.cilium.k8s.policy.serviceaccount": "default",
                "io.kubernetes.pod.namespace": "shop",
            }
        },
    },
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("endpointSelector: {matchLabels: {app: web}}\ningress: []", []),
        ("endpointSelector: {matchLabels: {app: wbe}}\ningress: []", ["selects no pod of namespace shop"]),
        (
            "endpointSelector: {}\ningress:\n"
            "- fromEndpoints: [{matchLabels: {io.kubernetes.pod.namespace: blog}}]",
            ["selects no pod: there is no namespace blog"],
        ),
        (
            "endpointSelector: {}\ningress:\n- fromEndpoints:\n"
            "  - matchLabels: {io.cilium.k8s.namespace.labels.team: shop}\n"
            "  - matchLabels: {io.cilium.k8s.namespace.labels.team: blog}\n",
            ["spec.ingress[0].fromEndpoints[1]: selects no pod"],
        ),
        (
            "endpointSelector: {}\negress:\n- toServices:\n  - k8sService: {serviceName: db}\n"
            "  - k8sService: {serviceName: db, namespace: blog}",
            ["spec.egress[0].toServices[1]: there is no such Service"],
        ),
    ],
)
def test_selectors_are_tried_on_a_snapshots_pods(spec: str, expected: list[str]) -> None:
    problems = lint_text(policy_yaml(spec), view_of(OBJECTS)).problems
    assert [problem.level for problem in problems] == ["warning"] * len(expected)
    for problem, part in zip(problems, expected, strict=True):
        assert part in str(problem)


def test_a_policy_of_a_namespace_that_is_not_there_is_one_warning() -> None:
    text = policy_yaml("endpointSelector: {matchLabels: {app: wbe}}\ningress: []", namespace="blog")
    assert [p.text for p in lint_text(text, view_of(OBJECTS)).problems] == [
        "there is no namespace blog: nothing more is tried"
    ]


def write(directory: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def test_overlays_are_taken_one_by_one_and_their_patches_are_no_policies(tmp_path: Path) -> None:
    overlay = (
        "resources: [../base, more.yaml]\nnamespace: {}\npatches: [{{path: patch.yaml}}, {{patch: x}}]\n"
    )
    tree = write(
        tmp_path,
        {
            "base/kustomization.yaml": "resources: [p.yaml]\n",
            "base/p.yaml": policy_yaml(ALLOW_ALL, namespace=""),
            "one/kustomization.yaml": overlay.format("one"),
            "one/more.yaml": policy_yaml(ALLOW_ALL, name="more", namespace=""),
            "one/patch.yaml": "kind: MeshPolicy\nmetadata: {name: p}\nspec: {mode: Audit}\n",
            "two/kustomization.yaml": overlay.format("two").replace("more.yaml", "again.yaml"),
            "two/again.yaml": policy_yaml(ALLOW_ALL, namespace=""),
            "two/patch.yaml": "kind: MeshPolicy\n",
            "alone.yaml": policy_yaml(ALLOW_ALL, namespace=""),
            ".hidden/x.yaml": "a: [",
            "notes.txt": "a: [",
        },
    )
    sources = read([str(tree)], str)
    assert sorted(Path(bundle.name).name for bundle in sources.bundles) == ["", "one", "two"]
    assert (sources.patches, sources.mistakes) == (4, ())
    result = lint(sources, SCHEMAS)
    assert [str(problem).replace(str(tree), "") for problem in result.problems] == [
        "/two/again.yaml:3: error: MeshPolicy two/p metadata.name: is in "
        f"{tree}/base/p.yaml:1 already; the one applied last is in force".replace(str(tree), "")
    ]
    assert (result.policies, result.others) == (4, 0)


def test_an_overlay_alone_brings_its_base(tmp_path: Path) -> None:
    tree = write(
        tmp_path,
        {
            "base/kustomization.yaml": "resources: [p.yaml, gone.yaml, 'https://example.com/x']\n",
            "base/p.yaml": policy_yaml(ALLOW_ALL),
            "over/kustomization.yaml": "resources: [../base]\nnamespace: over\n",
        },
    )
    sources = read([str(tree / "over")], str)
    [bundle] = sources.bundles
    assert [(item.document.name, item.namespace) for item in bundle.items] == [("p", "over")]
    assert [mistake.text for mistake in sources.mistakes] == ["gone.yaml is not there"]


def test_a_kustomization_that_includes_itself_is_a_mistake(tmp_path: Path) -> None:
    write(
        tmp_path, {"a/kustomization.yaml": "resources: [../b]", "b/kustomization.yaml": "resources: [../a]"}
    )
    sources = read([str(tmp_path / "a")], str)
    assert ["../a includes this kustomization"] == [mistake.text for mistake in sources.mistakes]


def test_files_that_can_not_be_read_are_errors(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff")
    result = run("policy", "lint", tmp_path / "x.yaml", tmp_path / "gone.yaml")
    assert result.exit_code == 1
    assert "x.yaml: error: is no text in UTF-8" in result.stdout
    assert "gone.yaml: error: can't be read: No such file" in result.stdout


def test_what_is_no_yaml_matters_where_it_is_named_or_has_policies(tmp_path: Path) -> None:
    template = "{{ if x }}\nkind: Deployment\n{{ end }}\n"
    write(tmp_path, {"a.yaml": template, "b.yaml": template.replace("Deployment", "MeshPolicy")})
    mistakes = [read([str(tmp_path / path)], str).mistakes for path in ("", "a.yaml")]
    assert [[mistake.is_error for mistake in each] for each in mistakes] == [[False, True], [True]]


def test_the_examples_are_clean_with_and_without_their_overlays_patch() -> None:
    for argument in ("examples", "examples/overlays/production", "examples/overlays/staging"):
        result = run("policy", "lint", ROOT / argument, "-o", "json")
        answer = json.loads(result.stdout)
        assert (result.exit_code, answer["problems"], answer["policies"]) == (0, [], 7)


def test_lint_ends_with_0_for_warnings_and_1_for_errors(tmp_path: Path) -> None:
    warned = run("policy", "lint", "-", stdin=policy_yaml("endpointSelector: {}\ningress: [{fromCIDR: []}]"))
    assert (warned.exit_code, "1 policy in 1 file: 0 errors, 1 warning\n" in warned.stdout) == (0, True)
    failed = run("policy", "lint", "-", "-o", "json", stdin=policy_yaml("endpointSelector: {}"))
    answer = json.loads(failed.stdout)
    assert (failed.exit_code, answer["ok"]) == (1, False)
    assert answer["problems"] == [
        {
            "level": "error",
            "check": "meaning",
            "file": "-",
            "line": 4,
            "object": "MeshPolicy shop/p",
            "path": "spec",
            "text": "says nothing: give it ingress, ingressDeny, egress or egressDeny",
        }
    ]


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "List"}', '{"kind": "List", "items": [1]}'])
def test_a_snapshot_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "snapshot.json"
    path.write_text(content)
    result = run("policy", "lint", "-", "--snapshot", path, stdin=policy_yaml(ALLOW_ALL))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "kubectl get" in result.stderr


# Covering, and explain against the judge


VALUES = ("x", "y")
label_sets = st.fixed_dictionaries(
    {NAMESPACE_LABEL: st.sampled_from(("a", "b"))}, optional={"app": st.sampled_from(VALUES)}
)
requirements = st.one_of(
    st.builds(
        lambda key, operator, values: Requirement(key, operator, tuple(sorted(values))),
        st.sampled_from((NAMESPACE_LABEL, "app")),
        st.sampled_from((Operator.IN, Operator.NOT_IN)),
        st.sets(st.sampled_from((*VALUES, "a")), min_size=1, max_size=2),
    ),
    st.builds(Requirement, st.just("app"), st.sampled_from((Operator.EXISTS, Operator.DOES_NOT_EXIST))),
)
selectors = st.builds(lambda found: Selector(tuple(sorted(found))), st.sets(requirements, max_size=3))
NETWORKS = tuple(map(ip_network, ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "::/0")))
peers: st.SearchStrategy[Peer] = st.one_of(
    selectors,
    st.builds(
        CidrPeer,
        st.sampled_from(NETWORKS),
        st.lists(st.sampled_from(NETWORKS), max_size=2).map(tuple),
        st.booleans(),
    ),
    st.sampled_from(Entity),
    st.builds(ServicePeer, st.sampled_from(("", "a")), st.sampled_from(("s", "t"))),
)
ports: st.SearchStrategy[PortRange | IcmpType] = st.one_of(
    st.builds(
        lambda protocol, ends: PortRange(protocol, *sorted(ends)),
        st.sampled_from(Protocol),
        st.tuples(st.sampled_from((0, 80, 443, 65535)), st.sampled_from((0, 80, 443, 65535))),
    ),
    st.builds(
        PortRange, st.sampled_from(Protocol), st.just(0), st.just(0), st.sampled_from(("http", "dns"))
    ),
    st.builds(IcmpType, st.sampled_from((4, 6)), st.sampled_from((0, 8))),
)


def rules(direction: st.SearchStrategy[Direction]) -> st.SearchStrategy[Rule]:
    return st.builds(
        Rule,
        direction=direction,
        path=st.sampled_from(("p", "q", "r")),
        deny=st.booleans(),
        peers=st.none() | st.lists(peers, max_size=2).map(tuple),
        ports=st.none() | st.lists(ports, max_size=2).map(tuple),
    )


policies = st.builds(
    Policy,
    kind=st.sampled_from(Kind),
    namespace=st.sampled_from(("", "a")),
    name=st.sampled_from("mno"),
    mode=st.sampled_from(PolicyMode),
    selector=st.just(Selector()) | selectors,
    default_deny=st.frozensets(st.sampled_from(Direction)),
    rules=st.lists(rules(st.sampled_from(Direction)), max_size=4).map(tuple),
)
RESERVED = (identity.UNKNOWN, identity.HOST, identity.WORLD, identity.REMOTE_NODE, identity.APISERVER)
SERVICES = {
    ("a", "s"): ServiceInfo(),
    ("b", "s"): ServiceInfo(),
    ("a", "t"): ServiceInfo(selector={"app": "x"}),
}
addresses = st.sampled_from(
    tuple(map(ip_address, ("10.1.1.1", "10.1.2.1", "10.2.0.1", "192.0.2.9", "fd00::1")))
)
services = st.sets(st.sampled_from(sorted(SERVICES))).map(lambda keys: {key: SERVICES[key] for key in keys})
parties = st.one_of(
    st.builds(
        Party,
        identity=st.sampled_from((300, 301)),
        labels=label_sets,
        address=addresses,
        named_ports=st.just({"http": frozenset({(TCP, 80)}), "dns": frozenset({(UDP, 443)})}),
        services=services,
    ),
    st.builds(Party, identity=st.sampled_from(RESERVED), address=addresses, services=services),
)
packets = st.builds(
    Packet,
    source=parties,
    destination=parties,
    protocol=st.sampled_from((TCP, UDP, SCTP, ICMP)),
    port=st.sampled_from((80, 81, 443)),
    icmp_type=st.sampled_from((0, 8)),
)


@settings(max_examples=400)
@given(selectors, selectors, label_sets)
def test_a_selector_that_covers_another_selects_all_that_it_does(
    wide: Selector, narrow: Selector, labels: Mapping[str, str]
) -> None:
    if matches(narrow, labels):
        assert not is_contradiction(narrow)
        assert matches(wide, labels) or not selector_covers(wide, narrow)


@settings(max_examples=300)
@given(
    rules(st.just(Direction.INGRESS)),
    rules(st.just(Direction.INGRESS)),
    st.lists(packets, min_size=2, max_size=4),
)
def test_a_rule_that_covers_another_holds_whenever_it_does(
    wide: Rule, narrow: Rule, found: list[Packet]
) -> None:
    if rule_covers(wide, narrow):
        assert all(holds(wide, packet) for packet in found if holds(narrow, packet))


def test_covering_is_found_where_people_mean_it() -> None:
    def selector(**labels: str) -> Selector:
        return Selector(tuple(Requirement(key, Operator.IN, (labels[key],)) for key in sorted(labels)))

    def rule(*peers: Peer, ports: Any = None) -> Rule:
        return Rule(direction=Direction.INGRESS, path="p", peers=peers or None, ports=ports)

    web = PortRange(Protocol.TCP, 80, 80)
    block = CidrPeer(ip_network("10.0.0.0/8"))
    for wide, narrow in (
        (rule(), rule(selector(app="web"))),
        (rule(Entity.CLUSTER), rule(selector(app="web"), Entity.HOST)),
        (rule(Entity.WORLD), rule(block)),
        (rule(selector(app="web")), rule(selector(app="web", tier="front"))),
        (rule(block), rule(CidrPeer(ip_network("10.1.0.0/16")))),
        (rule(ports=(PortRange(),)), rule(ports=(web, PortRange(Protocol.UDP, 0, 0, "dns")))),
        (rule(ServicePeer("", "db")), rule(ServicePeer("shop", "db"))),
    ):
        assert rule_covers(wide, narrow)
        assert not rule_covers(narrow, wide)


@settings(max_examples=200)
@given(st.lists(policies, max_size=4), packets)
def test_explain_agrees_with_the_judge(found: list[Policy], packet: Packet) -> None:
    explanation = explain(found, End(packet.source, "from"), End(packet.destination, "to"), packet)
    assert explanation.allowed is decide(found, packet).allowed
    assert [side.direction for side in explanation.sides] == [
        direction
        for direction, party in ((Direction.EGRESS, packet.source), (Direction.INGRESS, packet.destination))
        if party.is_pod
    ]
    for side in explanation.sides:
        assert side.decision == judge(found, packet, side.direction)
        audited = judge(found, packet, side.direction, audit=True)
        assert (side.audit is None) is (audited.allowed is side.decision.allowed)
        assert side.audit is None or side.audit.decision == audited
        if side.decision.reason is Reason.DEFAULT_DENY:
            assert side.isolated_by
            assert side.nearest in (*near_misses(found, packet, side.direction)[:1], None)
        else:
            assert side.nearest is None


# explain


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("shop/web-5b", "shop/db-0", ("shop/web-5b (identity 300) 10.1.1.5", "shop/db-0 10.1.2.5")),
        ("10.1.1.5", "shop/db-0", ("shop/web-5b (identity 300) 10.1.1.5", "shop/db-0 10.1.2.5")),
        ("shop/web-5b", "fd00::99", ("shop/web-5b (identity 300) fd00::5", "fd00::99 (world) fd00::99")),
        ("world", "shop/web-5b", ("world None", "shop/web-5b (identity 300) 10.1.1.5")),
        ("kube-apiserver", "shop/db-0", ("kube-apiserver (world) None", "shop/db-0 10.1.2.5")),
        ("192.0.2.1", "shop/web-5b", ("192.0.2.1 (host) 192.0.2.1", "shop/web-5b (identity 300) 10.1.1.5")),
        ("192.0.2.1", "shop/db-0", ("192.0.2.1 (remote-node) 192.0.2.1", "shop/db-0 10.1.2.5")),
        ("192.0.2.2", "shop/db-0", ("192.0.2.2 (kube-apiserver (host)) 192.0.2.2", "shop/db-0 10.1.2.5")),
        (
            "shop/db-0",
            "203.0.113.6",
            ("shop/db-0 10.1.2.5", "203.0.113.6 (kube-apiserver (world)) 203.0.113.6"),
        ),
        ("shop/db-0", "10.1.2.77", ("shop/db-0 10.1.2.5", "10.1.2.77 (unknown) 10.1.2.77")),
        ("shop/db-0", "198.51.100.1", ("shop/db-0 10.1.2.5", "198.51.100.1 (world) 198.51.100.1")),
        (
            "kube-system/proxy",
            "shop/db-0",
            ("kube-system/proxy (remote-node) 192.0.2.1", "shop/db-0 10.1.2.5"),
        ),
    ],
)
def test_ends_are_found_by_pod_address_and_entity(
    source: str, destination: str, expected: tuple[str, str]
) -> None:
    ends = view_of(OBJECTS).find_ends(source, destination)
    assert tuple(f"{end.title} {end.party.address}" for end in ends) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shop/web", "there is no pod shop/web; did you mean shop/web-5b or shop/web-5c?"),
        ("shop/dv-0", "did you mean shop/db-0?"),
        ("nonsense", "is no NAMESPACE/POD, no IP address and none of world"),
        ("shop/job-1", "has no address yet"),
        ("cluster", "more than one end"),
        (
            "10.96.0.9",
            "the address of Service shop/db: policies judge the pod behind it, so name one: shop/db-0",
        ),
        ("fd00::1", "no address of one IP version"),
    ],
)
def test_an_end_nobody_knows_is_explained(text: str, words: str) -> None:
    with pytest.raises(NoSuchEnd) as caught:
        view_of(OBJECTS).find_ends(text, "shop/db-0")
    assert words in str(caught.value)


def test_pods_of_one_identity_share_the_names_of_their_ports() -> None:
    view = view_of(OBJECTS)
    source, destination = view.find_ends("shop/db-0", "shop/web-5b")
    assert destination.party.named_ports == {"http": frozenset({(TCP, 81)})}
    assert set(source.party.services) == {("shop", "db")} and not destination.party.services


def test_a_pod_without_its_namespaces_object_still_has_the_namespaces_name() -> None:
    view = view_of([each for each in OBJECTS if each["kind"] == "Pod"])
    _, end = view.find_ends("world", "shop/db-0")
    assert end.party.labels["io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name"] == "shop"
    assert view.services is None


@dataclass(frozen=True, kw_only=True)
class Asked:
    name: str
    policies: str
    arguments: str
    code: int
    expected: tuple[str, ...]


WEB_TO_DB = """
    endpointSelector: {matchLabels: {app: db}}
    ingress:
    - fromEndpoints: [{matchLabels: {app: web}}]
      toPorts: [{ports: [{port: pg, protocol: TCP}]}]
    """

ASKED = (
    Asked(
        name="allowed, by the rule of one side and for want of isolation on the other",
        policies=policy_yaml(WEB_TO_DB),
        arguments="--from shop/web-5b --to shop/db-0 --port pg",
        code=0,
        expected=(
            "shop/web-5b (identity 300) 10.1.1.5 -> shop/db-0 10.1.2.5 TCP port 5432: allowed",
            "egress of shop/web-5b (identity 300): allowed",
            "  no policy isolates the pod's egress",
            "ingress of shop/db-0: allowed",
            "  allowed by MeshPolicy shop/p spec.ingress[0] (FILE:7)",
        ),
    ),
    Asked(
        name="denied by default: who isolates, and what came nearest",
        policies=policy_yaml(WEB_TO_DB),
        arguments="--from shop/db-0 --to shop/db-0 --port 5433",
        code=3,
        expected=(
            "shop/db-0 10.1.2.5 -> shop/db-0 10.1.2.5 TCP port 5433: DENIED",
            "egress of shop/db-0: allowed",
            "  no policy isolates the pod's egress",
            "ingress of shop/db-0: denied",
            "  no rule allows it; isolated by MeshPolicy shop/p (FILE:1)",
            "  nearest: MeshPolicy shop/p spec.ingress[0] (FILE:7)",
            "    label app is db, not web",
            "    port is 5433, not pg (5432)",
        ),
    ),
    Asked(
        name="denied by a rule",
        policies=policy_yaml("endpointSelector: {}\negressDeny:\n- toEntities: [world]"),
        arguments="--from shop/db-0 --to 198.51.100.1 --port 443",
        code=3,
        expected=(
            "shop/db-0 10.1.2.5 -> 198.51.100.1 (world) TCP port 443: DENIED",
            "egress of shop/db-0: denied",
            "  denied by MeshPolicy shop/p spec.egressDeny[0] (FILE:7)",
        ),
    ),
    Asked(
        name="what is audited decides nothing, and is told",
        policies=policy_yaml("endpointSelector: {}\nmode: Audit\ningress: []"),
        arguments="--from world --to shop/db-0 --protocol icmp",
        code=0,
        expected=(
            "world -> shop/db-0 10.1.2.5 ICMP type 8: allowed",
            "ingress of shop/db-0: allowed",
            "  no policy isolates the pod's ingress",
            "  with policies in mode Audit enforced it would be denied:",
            "    no rule allows it; isolated by MeshPolicy shop/p (FILE:1)",
            "    none of these policies has a rule that allows anything",
        ),
    ),
    Asked(
        name="no pod, no policy",
        policies=policy_yaml(ALLOW_ALL),
        arguments="--from world --to 192.0.2.1 --port 22",
        code=0,
        expected=(
            "world -> 192.0.2.1 (remote-node) TCP port 22: allowed",
            "neither end is a pod: no policy is asked",
        ),
    ),
    Asked(
        name="the own node is let in",
        policies=policy_yaml("endpointSelector: {}\ningressDeny:\n- fromEntities: [all]"),
        arguments="--from host --to shop/db-0 --port 22",
        code=0,
        expected=(
            "host -> shop/db-0 10.1.2.5 TCP port 22: allowed",
            "ingress of shop/db-0: allowed",
            "  what comes from the pod's own node is always let in",
        ),
    ),
)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "snapshot.json"
    path.write_text(json.dumps({"kind": "List", "items": OBJECTS}))
    return path


@pytest.mark.parametrize("asked", ASKED, ids=[asked.name for asked in ASKED])
def test_explain_says(asked: Asked, snapshot: Path, tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text(asked.policies)
    result = run(
        "policy", "explain", "--files", file, "--snapshot", snapshot, *asked.arguments.split()
    )  # fmt: skip
    assert result.stdout.replace(str(file), "FILE").splitlines() == list(asked.expected)
    assert result.exit_code == asked.code


def test_explain_as_json(snapshot: Path) -> None:
    arguments = ("--from", "shop/db-0", "--to", "shop/db-0", "--port", "5433", "-o", "json")
    result = run(
        "policy", "explain", "--files", "-", "--snapshot", snapshot, *arguments, stdin=policy_yaml(WEB_TO_DB)
    )
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["allowed"], answer["port"], answer["notes"]) == (3, False, 5433, [])
    assert answer["from"]["name"] == "shop/db-0" and answer["from"]["identity"] is None
    assert answer["egress"]["reason"] == "NotIsolated"
    assert answer["ingress"] == {
        "allowed": False,
        "reason": "DefaultDeny",
        "rule": None,
        "isolatedBy": ["MeshPolicy shop/p"],
        "nearest": {
            "kind": "MeshPolicy",
            "namespace": "shop",
            "name": "p",
            "path": "spec.ingress[0]",
            "file": "-",
            "line": 7,
            "misses": ["label app is db, not web", "port is 5433, not pg (5432)"],
        },
        "audit": None,
    }


def test_a_snapshot_may_bring_the_policies(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.json"
    items = [
        *OBJECTS,
        yaml.safe_load(policy_yaml(WEB_TO_DB)),
        yaml.safe_load(policy_yaml("x: 1", name="bad")),
    ]
    path.write_text(json.dumps({"kind": "List", "items": items}))
    ends = ("--from", "world", "--to", "shop/db-0", "--port", "pg")
    result = run("policy", "explain", "--snapshot", path, *ends)
    assert result.exit_code == 3
    assert "note: MeshPolicy shop/bad can't be carried out and is left out" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--from world --to shop/gone --port 1", "there is no pod shop/gone"),
        ("--from world --to shop/db-0 --port htp", "shop/db-0 has no port of the name 'htp'"),
        ("--from world --to shop/db-0 --port 70000", "70000 is no port"),
        ("--from world --to shop/db-0", "give --port"),
        ("--from world --to shop/db-0 --port 1 --protocol ICMP", "--icmp-type"),
    ],
)
def test_a_question_without_an_answer_ends_with_2(snapshot: Path, arguments: str, words: str) -> None:
    command = ("policy", "explain", "--files", "-", "--snapshot", snapshot, *arguments.split())
    result = run(*command, stdin=policy_yaml(ALLOW_ALL))
    assert (result.exit_code, words in result.stderr) == (2, True)


def test_wrong_files_are_not_explained(snapshot: Path) -> None:
    ends = ("--from", "world", "--to", "shop/db-0", "--port", "1")
    wrong = run(
        "policy", "explain", "--files", "-", "--snapshot", snapshot, *ends, stdin=policy_yaml("x: 1")
    )
    assert (wrong.exit_code, "meshwire policy lint -" in wrong.stderr) == (2, True)
    several = run("policy", "explain", "--files", ROOT / "examples", "--snapshot", snapshot, *ends)
    assert (several.exit_code, "several kustomizations" in several.stderr) == (2, True)
    none = run("policy", "explain", "--snapshot", snapshot, *ends)
    assert (none.exit_code, "no policies" in none.stderr) == (2, True)


# Against an API server


IDENTITY = next(each for each in OBJECTS if each["kind"] == "MeshIdentity")
SLICE = {
    "metadata": {"name": "a"},
    "spec": {
        "endpoints": [
            {
                "addresses": ["10.1.1.5", "fd00::5"],
                "identity": number,
                "node": "node1",
                "pod": {"namespace": "shop", "name": name, "uid": name},
            }
            for name, number in (("web-5b", 300), ("odd", 301))
        ]
    },
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    def of_kind(kind: str) -> list[dict[str, Any]]:
        return [{**each, "kind": None} for each in OBJECTS if each["kind"] == kind]

    cluster = Cluster(
        {
            "/api/v1/pods": of_kind("Pod"),
            "/api/v1/namespaces": of_kind("Namespace"),
            "/api/v1/nodes": 403,
            "/api/v1/services": of_kind("Service"),
            "/apis/discovery.k8s.io/v1/endpointslices": of_kind("EndpointSlice"),
            f"{API}/meshidentities": [IDENTITY],
            f"{API}/meshendpointslices": [SLICE],
            f"{API}/meshconfigs": [{"metadata": {"name": "default"}, "spec": {"policy": {"enabled": True}}}],
            f"{API}/meshpolicies": [yaml.safe_load(policy_yaml(WEB_TO_DB))],
            f"{API}/clustermeshpolicies": [],
            "/apis/networking.k8s.io/v1/networkpolicies": [],
        },
        tmp_path,
    )
    yield cluster
    cluster.close()


def ask(cluster: Cluster, *arguments: object, stdin: str | None = None) -> Result:
    return run(*arguments, "--kubeconfig", cluster.kubeconfig, stdin=stdin)


ENDS = ("--from", "shop/web-5b", "--to", "shop/db-0", "--port", "5432")


def test_explain_of_a_cluster(cluster: Cluster) -> None:
    result = ask(cluster, "policy", "explain", *ENDS)
    assert result.exit_code == 0
    assert "  allowed by MeshPolicy shop/p spec.ingress[0]" in result.stdout.splitlines()
    assert result.stderr.splitlines() == [
        f"note: {cluster.url} does not let you GET /api/v1/nodes",
    ]


def test_explain_of_a_cluster_says_that_policy_is_off(cluster: Cluster) -> None:
    cluster.answers[f"{API}/meshconfigs"] = []
    result = ask(cluster, "policy", "explain", *ENDS)
    assert (result.exit_code, "policy is off in this cluster" in result.stderr) == (0, True)


def test_explain_leaves_out_what_the_cluster_leaves_out(cluster: Cluster) -> None:
    shut = policy_yaml("podSelector: {}\npolicyTypes: [Ingress]", kind="NetworkPolicy")
    cluster.answers["/apis/networking.k8s.io/v1/networkpolicies"] = [yaml.safe_load(shut)]
    cluster.answers[f"{API}/meshpolicies"] = []
    assert ask(cluster, "policy", "explain", *ENDS).exit_code == 3
    spec = {"policy": {"enabled": True, "networkPolicies": False}}
    cluster.answers[f"{API}/meshconfigs"] = [{"metadata": {"name": "default"}, "spec": spec}]
    result = ask(cluster, "policy", "explain", *ENDS)
    assert (result.exit_code, "NetworkPolicies are left out" in result.stderr) == (0, True)


def test_files_are_tried_on_the_clusters_pods(cluster: Cluster) -> None:
    text = policy_yaml("endpointSelector: {matchLabels: {app: db}}\ningress: []")
    result = ask(cluster, "policy", "explain", "--files", "-", *ENDS, stdin=text)
    assert (result.exit_code, "(-:1)" in result.stdout) == (3, True)
    linted = ask(cluster, "policy", "lint", "--cluster", "-", stdin=text.replace("db", "dp"))
    assert (linted.exit_code, "selects no pod of namespace shop" in linted.stdout) == (0, True)


@pytest.mark.parametrize("command", [("policy", "explain", *ENDS), ("policy", "lint", "-", "--cluster")])
def test_a_cluster_that_can_not_be_asked_is_one_line(cluster: Cluster, command: tuple[str, ...]) -> None:
    cluster.answers["/api/v1/pods"] = 403
    result = ask(cluster, *command)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_endpoints(cluster: Cluster) -> None:
    result = ask(cluster, "endpoints")
    assert result.exit_code == 0
    header, odd, web = [line.split("  ") for line in result.stdout.splitlines()]
    assert [cell.strip() for cell in web if cell.strip()] == [
        "shop/web-5b", "10.1.1.5, fd00::5", "node1", "300", "app=web",
    ]  # fmt: skip
    assert "no such identity" in " ".join(odd) and header[0] == "Pod"
    assert ask(cluster, "endpoints", "-n", "blog", "-o", "json").stdout == "[]\n"
    answer = json.loads(ask(cluster, "endpoints", "-o", "json").stdout)
    assert (answer[1]["pod"]["name"], answer[1]["labels"]["app"]) == ("web-5b", "web")


def test_identities(cluster: Cluster) -> None:
    line = ask(cluster, "identities").stdout.splitlines()[1].split()
    assert line == ["300", "shop", "app=web", "1"]
    assert json.loads(ask(cluster, "identities", "-o", "json").stdout)[0]["endpoints"] == 1
    one = ask(cluster, "identities", "300").stdout.splitlines()
    assert one[0] == "identity 300" and "  app=web" in one and one[-2:] == ["endpoints: 1", "  shop/web-5b"]
    assert json.loads(ask(cluster, "identities", "300", "-o", "json").stdout)["pods"] == ["shop/web-5b"]
    assert ask(cluster, "identities", "999").exit_code == 1
    assert ask(cluster, "identities", "2").stdout.startswith("2 is world")


@pytest.mark.parametrize("command", ["endpoints", "identities"])
def test_a_cluster_without_policy_is_one_line(cluster: Cluster, command: str) -> None:
    del cluster.answers[f"{API}/meshendpointslices"]
    result = ask(cluster, command)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "policy isn't installed" in result.stderr


# monitor


def event(**more: Any) -> dict[str, Any]:
    return {
        "time": "2026-01-01T12:00:01.123456Z",
        "node": "node1",
        "verdict": "DROP",
        "reason": "DROP_POLICY_INGRESS",
        "direction": "ingress",
        "protocol": "TCP",
        "source": {
            "address": "10.1.1.5",
            "port": 4711,
            "identity": 300,
            "pod": "shop/dev-tool",
            "labels": {},
        },
        "destination": {
            "address": "10.1.2.5",
            "port": 8080,
            "identity": 301,
            "pod": "shop/api",
            "labels": {},
        },
        "policy": None,
        "isolatedBy": [],
        "count": 1,
        **more,
    }


def peer(address: str, port: int = 0, number: int = identity.WORLD, pod: str = "") -> dict[str, Any]:
    return {"address": address, "port": port, "identity": number, "pod": pod, "labels": {}}


RULE = {"kind": "MeshPolicy", "namespace": "shop", "name": "x", "path": "spec.ingressDeny[0]"}
HEAD = "12:00:01.123 node1 DROP ingress"
FLOW = "shop/dev-tool 10.1.1.5:4711 -> shop/api:8080 TCP"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"isolatedBy": ["MeshPolicy shop/billing"]},
            f"{HEAD} {FLOW}: no rule allows it (isolated by MeshPolicy shop/billing)",
        ),
        (
            {"policy": RULE},
            f"{HEAD} {FLOW}: denied by MeshPolicy shop/x spec.ingressDeny[0]",
        ),
        (
            {
                "policy": {**RULE, "kind": "ClusterMeshPolicy", "namespace": ""},
                "verdict": "AUDIT",
                "count": 7,
            },
            f"12:00:01.123 node1 AUDIT ingress {FLOW}: "
            "would be denied by ClusterMeshPolicy x spec.ingressDeny[0] (7 times)",
        ),
        (
            {"verdict": "AUDIT", "isolatedBy": ["a", "b"]},
            f"12:00:01.123 node1 AUDIT ingress {FLOW}: no rule would allow it (isolated by a, b)",
        ),
        (
            {"reason": "DROP_POLICY_EGRESS", "direction": "egress", "destination": peer("2001:db8::1", 443)},
            "12:00:01.123 node1 DROP egress shop/dev-tool 10.1.1.5:4711 -> world [2001:db8::1]:443 TCP: "
            "no rule allows it",
        ),
        (
            {"protocol": "ICMP", "source": peer("192.0.2.1", 0, 6), "destination": peer("10.1.2.5", 0, 301)},
            f"{HEAD} remote-node 192.0.2.1 -> identity 301 10.1.2.5 ICMP: no rule allows it",
        ),
        (
            {"reason": "DROP_SPOOFED_SOURCE", "time": "2026-01-01T14:00:01.5+02:00"},
            f"12:00:01.500 node1 DROP ingress {FLOW}: the sending pod doesn't have this address",
        ),
        (
            {"reason": "DROP_NEW_KIND"},
            f"{HEAD} {FLOW}: DROP_NEW_KIND",
        ),
    ],
)
def test_an_event_is_one_line(more: dict[str, Any], expected: str) -> None:
    assert words(parse(json.dumps(event(**more))), UTC) == expected


@pytest.mark.parametrize(
    "line", ["", "[]", "{}", json.dumps(event(time="12:00")), json.dumps(event(source={"port": "x"}))]
)
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(InvalidSpec):
        parse(line)


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        (Filter(), True),
        (Filter(verdict="DROP"), True),
        (Filter(verdict="AUDIT"), False),
        (Filter(nodes=frozenset({"node1", "node2"})), True),
        (Filter(nodes=frozenset({"node2"})), False),
        (Filter(source="shop/dev-tool"), True),
        (Filter(source="shop/dev"), False),
        (Filter(source="shop/*", destination="10.1.2.5"), True),
        (Filter(destination="10.1.1.5"), False),
    ],
)
def test_events_are_chosen(wanted: Filter, taken: bool) -> None:
    assert wanted.takes(parse(json.dumps(event()))) is taken


def test_events_of_two_nodes_come_in_the_order_of_their_times() -> None:
    clock = [0.0]
    merger = Merger(lambda: clock[0], patience=1.0)
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def put(seconds: float, arrives: float) -> None:
        clock[0] = arrives
        time = (start + timedelta(seconds=seconds)).isoformat()
        merger.put(parse(json.dumps(event(time=time))))

    def take(now: float) -> list[float]:
        clock[0] = now
        return [(each.time - start).total_seconds() for each in merger.take()]

    put(5, 0.0)
    put(3, 0.5)
    assert take(0.9) == []
    put(9, 0.95)
    assert take(1.1) == [3, 5]
    put(1, 1.2)
    assert take(2.0) == [1, 9]
    assert take(9.0) == []


@dataclass
class Nodes:
    """A transport of scripts that this Python runs."""

    scripts: dict[str, str] = field(default_factory=dict)

    def commands(self) -> dict[str, Command]:
        return {node: Command((sys.executable, "-c", text)) for node, text in self.scripts.items()}


def printing(*lines: str) -> str:
    return f"import time\nfor line in {lines!r}: print(line, flush=True)\ntime.sleep(600)"


def watch_until(
    transport: Nodes, done: int, wanted: Filter | None = None, **more: Any
) -> tuple[list[Event], list[str]]:
    """Until there are `done` events and pieces of news together, or 20 seconds have passed."""
    events: list[Event] = []
    told: list[str] = []
    deadline = time.monotonic() + 20

    def check() -> None:
        if len(events) + len(told) >= done or time.monotonic() > deadline:
            raise KeyboardInterrupt

    def show(event: Event) -> None:
        events.append(event)
        check()

    def tell(text: str) -> None:
        told.append(text)
        check()

    watch = Watch(transport, more.pop("nodes", frozenset()), retry_seconds=0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            follow(watch, wanted or Filter(), show, tell, **more)
    finally:
        watch.stop()
    return events, told


def test_events_of_all_nodes_are_followed() -> None:
    nodes = Nodes({n: printing(json.dumps(event(node=n)), json.dumps(event(node=n))) for n in ("a", "b")})
    events, told = watch_until(nodes, 4)
    assert sorted(event.node for event in events) == ["a", "a", "b", "b"] and not told


def test_a_node_that_is_away_is_told_of_once_and_tried_again() -> None:
    script = "import sys; sys.exit('error: container agent is not running')"
    nodes = Nodes({"a": script, "b": printing("nonsense", "nonsense", json.dumps(event(node="b")))})
    events, told = watch_until(nodes, 3)
    assert [event.node for event in events] == ["b"]
    assert sorted(told)[0] == "a is away: error: container agent is not running; trying again"
    assert "b says what this client can't read" in sorted(told)[1]


def test_a_node_that_comes_back_is_followed_again(tmp_path: Path) -> None:
    flag = tmp_path / "been here"
    script = (
        f"import os, sys, time\nif not os.path.exists({str(flag)!r}):\n"
        f"    open({str(flag)!r}, 'w').close()\n    sys.exit('gone')\n"
        f"print({json.dumps(event())!r}, flush=True)\ntime.sleep(600)"
    )
    events, told = watch_until(Nodes({"a": script}), 2)
    assert (len(events), told) == (1, ["a is away: gone; trying again"])


def test_nodes_that_come_later_are_followed_too() -> None:
    def printer(node: str) -> dict[str, str]:
        return {node: printing(json.dumps(event(node=node)))}

    class Growing(Nodes):
        def commands(self) -> dict[str, Command]:
            found = super().commands()
            self.scripts |= printer("late")
            return found

    events, _ = watch_until(Growing(printer("early")), 2, refresh_seconds=0.2)
    assert [event.node for event in events] == ["early", "late"]


def test_a_node_that_was_asked_for_and_is_not_there_is_told() -> None:
    _, told = watch_until(Nodes(), 1, nodes=frozenset({"gone"}))
    assert told == ["gone is away: no agent runs there; trying again"]


def test_without_a_lab_a_kubeconfig_is_a_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWIRE_LAB_DIR", str(tmp_path / "lab"))
    path = tmp_path / "lab/kubeconfig"
    assert not is_lab(Choice(str(path)))
    path.parent.mkdir()
    path.write_text("")
    assert is_lab(Choice(str(path))) and not is_lab(Choice(str(tmp_path / "other")))
    monkeypatch.setenv("KUBECONFIG", str(path))
    assert is_lab(Choice()) and not is_lab(Choice(context="other"))


def test_monitor_asks_every_agent_and_ends_with_an_interrupt(cluster: Cluster, tmp_path: Path) -> None:
    agent = {
        "metadata": {"name": "agent-x"},
        "spec": {"nodeName": "node1"},
        "status": {"phase": "Running"},
    }
    cluster.answers["/api/v1/namespaces/meshwire-system/pods"] = [agent]
    kubectl = tmp_path / "bin/kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(
        f"#!{sys.executable}\nimport json, sys, time\n"
        f"line = json.loads({json.dumps(event())!r}); line['arguments'] = sys.argv[1:]\n"
        "print(json.dumps(line), flush=True)\ntime.sleep(600)\n"
    )
    kubectl.chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "meshwire.cli",
        "monitor",
        "-o",
        "json",
        "--kubeconfig",
        str(cluster.kubeconfig),
    ]
    env = {**os.environ, "PATH": f"{kubectl.parent}:{os.environ['PATH']}", "PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert line["arguments"] == [
        f"--kubeconfig={cluster.kubeconfig}", "exec", "-i", "-n", "meshwire-system", "agent-x",
        "-c", "agent", "--", "python", "-m", "meshwire.agent", "events",
    ]  # fmt: skip


def test_monitor_without_a_cluster_ends_with_2(cluster: Cluster) -> None:
    cluster.answers["/api/v1/namespaces/meshwire-system/pods"] = 403
    result = ask(cluster, "monitor")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
