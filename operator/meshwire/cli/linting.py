"""What is wrong with policies in files: refused by the API server, refused by Meshwire, or without effect.
Pure."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    Kind,
    Operator,
    Peer,
    Policy,
    PolicyMode,
    Rule,
    Selector,
    ServicePeer,
)
from meshwire.cli.clusterview import GROUPS, View, policy_of
from meshwire.cli.covering import is_contradiction, rule_covers, selector_covers
from meshwire.cli.policyfiles import Bundle, Document, Item, Sources
from meshwire.cli.schema import METADATA, refusals
from meshwire.policy.model import names_service
from meshwire.policy.selectors import matches

VERSIONS: Final[Mapping[Kind, str]] = {
    Kind.MESH_POLICY: names.API_VERSION,
    Kind.CLUSTER_MESH_POLICY: names.API_VERSION,
    Kind.NETWORK_POLICY: "networking.k8s.io/v1",
}
PLURALS: Final[Mapping[Kind, str]] = {
    Kind.MESH_POLICY: names.MESHPOLICIES,
    Kind.CLUSTER_MESH_POLICY: names.CLUSTERMESHPOLICIES,
}
"""Of those whose schema is a custom resource's."""
IMPLICIT: Final = "spec.policyTypes"
"""Path of the rule that a NetworkPolicy gets without writing it."""

_FIELD: Final = re.compile(r"spec\.(?P<field>\w+)(\[(?P<index>\d+)\])?")


class Level(StrEnum):
    WARNING = "warning"
    ERROR = "error"


class Check(StrEnum):
    YAML = "yaml"
    SCHEMA = "schema"
    """The API server refuses it."""
    MEANING = "meaning"
    """Meshwire can't carry it out; of what has a CEL rule, the API server says so first."""
    DUPLICATE = "duplicate"
    UNREACHABLE = "unreachable"
    """A rule that changes nothing, because of another one."""
    NOTHING = "nothing"
    """Something that matches nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`object` like `MeshPolicy shop/frontend`; `path` of the field in it. Lines count from 1; 0: the
    whole file."""

    level: Level
    check: Check
    file: str
    line: int
    object: str = ""
    path: str = ""
    text: str

    def __str__(self) -> str:
        """As compilers print it, so that editors find the place."""
        where = f"{self.file}:{self.line}" if self.line else self.file
        subject = " ".join(filter(None, (self.object, self.path)))
        return f"{where}: {self.level}: {subject + ': ' if subject else ''}{self.text}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "level": str(self.level), "check": str(self.check)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A policy as it is written in `document`; `policy` None: it is refused."""

    document: Document
    kind: Kind
    namespace: str
    policy: Policy | None
    problems: tuple[Problem, ...]

    @property
    def title(self) -> str:
        return title_of(self.kind, self.namespace, self.document.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`policies` and `others`: how many objects are policies, and how many are not. Problems are sorted by
    place."""

    problems: tuple[Problem, ...]
    policies: int
    others: int

    def count(self, level: Level) -> int:
        return sum(problem.level is level for problem in self.problems)


def title_of(kind: Kind, namespace: str, name: str) -> str:
    name = name or "without a name"
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def kind_of(document: Document) -> Kind | None:
    """None: the object is no policy of ours."""
    return next(
        (kind for kind in Kind if kind == document.kind and document.group in (GROUPS[kind], "")), None
    )


def lint(
    sources: Sources,
    schemas: Mapping[Kind, Mapping[str, Any]],
    *,
    namespace: str = "default",
    view: View | None = None,
) -> Result:
    """`namespace`: of policies that say none. With `view`, selectors are tried on its pods."""
    found = [
        Problem(
            level=Level.ERROR if each.is_error else Level.WARNING,
            check=Check.YAML,
            file=each.file,
            line=each.line,
            text=each.text,
        )
        for each in sources.mistakes
    ]
    items = [item for bundle in sources.bundles for item in bundle.items]
    documents = {id(item.document): item.document for item in items}
    for bundle in sources.bundles:
        checked = check_bundle(bundle, schemas, namespace)
        found += [problem for each in checked for problem in each.problems]
        found += duplicates(checked)
        excluded = excluded_labels(bundle, view)
        found += effects(checked, excluded)
        if view is not None:
            found += [problem for each in checked for problem in without_match(each, view)]
    policies = sum(kind_of(document) is not None for document in documents.values())
    return Result(
        # A file that several kustomizations take has the same problems in each of them.
        problems=tuple(sorted(dict.fromkeys(found), key=lambda each: (each.file, each.line, each.path))),
        policies=policies,
        others=len(documents) - policies,
    )


def excluded_labels(bundle: Bundle, view: View | None) -> Collection[str]:
    """Labels that are no part of identities, by the bundle's MeshConfig, or the cluster's, or by default."""
    for item in bundle.items:
        if item.document.kind == "MeshConfig" and item.document.group == names.GROUP:
            try:
                return MeshConfig.from_object(item.document.body).policy.excluded_labels
            except InvalidSpec:
                break
    return (view.config if view else MeshConfig()).policy.excluded_labels


def check_bundle(
    bundle: Bundle, schemas: Mapping[Kind, Mapping[str, Any]], namespace: str = "default"
) -> list[Checked]:
    found = []
    for item in bundle.items:
        kind = kind_of(item.document)
        if kind is not None:
            found.append(check(item, kind, schemas, namespace))
    return found


def check(item: Item, kind: Kind, schemas: Mapping[Kind, Mapping[str, Any]], namespace: str) -> Checked:
    """What the API server and the operator would refuse."""
    document = item.document
    own = "" if kind is Kind.CLUSTER_MESH_POLICY else item.namespace or document.namespace or namespace
    title = title_of(kind, own, document.name)
    problems = [
        _error(document, title, Check.SCHEMA, path, "is given twice; only the last one counts")
        for path in document.repeated
    ]
    problems += [
        _error(document, title, Check.SCHEMA, path, text)
        for path, text in _schema_refusals(document, kind, schemas)
    ]
    policy = None
    # What is known to be wrong is blanked out, and the next mistake shows.
    body = copy.deepcopy(dict(document.body))
    if isinstance(body.get("metadata"), dict) and own:
        body["metadata"]["namespace"] = own
    known = {problem.path for problem in problems}
    for path in sorted(known):
        _blank(body, path)
    while True:
        try:
            policy = policy_of(body, kind)
        except InvalidSpec as error:
            if not any(_is_about(error.path, path) for path in known):
                problems.append(_error(document, title, Check.MEANING, error.path, error.problem))
            known.add(error.path)
            if _blank(body, error.path):
                continue
        break
    return Checked(
        document=document,
        kind=kind,
        namespace=own,
        policy=None if problems else policy,
        problems=tuple(problems),
    )


def _schema_refusals(
    document: Document, kind: Kind, schemas: Mapping[Kind, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    version = document.body.get("apiVersion")
    if version != VERSIONS[kind]:
        yield "apiVersion", f"must be {VERSIONS[kind]}"
    if kind in schemas:
        yield from refusals(schemas[kind], document.body)
    else:
        yield from refusals(METADATA, document.body.get("metadata") or {}, "metadata")


def _error(document: Document, title: str, check: Check, path: str, text: str) -> Problem:
    return Problem(
        level=Level.ERROR,
        check=check,
        file=document.file,
        line=document.line(path),
        object=title,
        path=path,
        text=text,
    )


def _blank(body: dict[str, Any], path: str) -> bool:
    """Takes what `path` is in out of the policy, a rule or a whole field; whether there was anything."""
    spec, found = body.get("spec"), _FIELD.match(path)
    if not isinstance(spec, dict) or not found or found["field"] not in spec:
        return False
    value = spec[found["field"]]
    if found["index"] and isinstance(value, list):
        index = int(found["index"])
        if index >= len(value) or value[index] == {}:
            return False
        value[index] = {}
    elif value and isinstance(value, dict):
        spec[found["field"]] = {}
    else:
        del spec[found["field"]]
    return True


def _is_about(one: str, other: str) -> bool:
    """Whether two paths name one field, or one of them what the other is in."""
    return one == other or any(
        inner.startswith(outer) and inner[len(outer)] in ".["
        for inner, outer in ((one, other), (other, one))
    )


def duplicates(checked: Iterable[Checked]) -> Iterator[Problem]:
    first: dict[tuple[Kind, str, str], Document] = {}
    for each in checked:
        document = each.document
        earlier = first.setdefault((each.kind, each.namespace, document.name), document)
        if earlier is not document and document.name:
            text = f"is in {earlier.file}:{earlier.line()} already; the one applied last is in force"
            yield _error(document, each.title, Check.DUPLICATE, "metadata.name", text)


# Rules without effect


def effects(checked: Sequence[Checked], excluded: Collection[str] = ()) -> Iterator[Problem]:
    """Rules and selectors that do nothing, as far as the policies alone show."""
    pairs = [(each, each.policy) for each in checked if each.policy is not None]
    denying = [
        (each, policy, rule)
        for each, policy in pairs
        for rule in policy.rules
        if rule.deny and rule.peers != ()
    ]
    for each, policy in pairs:
        yield from _selector_problems(each, _subject_path(policy), policy.selector, excluded)
        earlier: dict[tuple[Any, ...], Rule] = {}
        for rule in policy.rules:
            if rule.path == IMPLICIT:
                continue
            if rule.peers == ():
                yield _warn(each, Check.NOTHING, rule.path, "matches nothing: its list of peers is empty")
                continue
            for path, peer in _peers(each, rule):
                if isinstance(peer, Selector):
                    yield from _selector_problems(each, path, peer, excluded)
            same = earlier.setdefault(_meaning(rule), rule)
            if same is not rule:
                yield _warn(each, Check.UNREACHABLE, rule.path, f"says the same as {same.path}")
            elif not rule.deny:
                yield from _denied(each, policy, rule, denying)


def _denied(
    each: Checked, policy: Policy, rule: Rule, denying: Sequence[tuple[Checked, Policy, Rule]]
) -> Iterator[Problem]:
    for other, denier, deny in denying:
        if (
            # Quick to tell, and so for nearly all of many policies.
            (not denier.namespace or denier.namespace == policy.namespace)
            and deny.direction is rule.direction
            and (denier.mode is PolicyMode.ENFORCE or policy.mode is PolicyMode.AUDIT)
            and rule_covers(deny, rule)
            and selector_covers(denier.selector, policy.selector)
        ):
            where = f"{other.document.file}:{other.document.line(deny.path)}"
            what = deny.path if other is each else f"{denier.title} {deny.path}"
            yield _warn(
                each, Check.UNREACHABLE, rule.path, f"allows nothing: {what} ({where}) denies all of it"
            )
            return


def _selector_problems(
    each: Checked, path: str, selector: Selector, excluded: Collection[str]
) -> Iterator[Problem]:
    if is_contradiction(selector):
        yield _warn(each, Check.NOTHING, path, "selects no pod: its requirements exclude each other")
    for requirement in selector.requirements:
        if requirement.key in excluded and requirement.operator in (Operator.IN, Operator.EXISTS):
            text = (
                f"selects no pod: label {requirement.key} is no part of identities "
                "(spec.policy.excludedLabels of the MeshConfig)"
            )
            yield _warn(each, Check.NOTHING, path, text)


def _meaning(rule: Rule) -> tuple[Any, ...]:
    return (
        rule.direction,
        rule.deny,
        None if rule.peers is None else frozenset(rule.peers),
        None if rule.ports is None else frozenset(rule.ports),
    )


def _subject_path(policy: Policy) -> str:
    return "spec.podSelector" if policy.kind is Kind.NETWORK_POLICY else "spec.endpointSelector"


def _peers(each: Checked, rule: Rule) -> Iterator[tuple[str, Peer]]:
    """The peers of a rule, with the path of each."""
    found = _FIELD.fullmatch(rule.path)
    if found and found["index"] and rule.peers:
        item = each.document.body["spec"][found["field"]][int(found["index"])]
        field = next(
            name
            for name, value in item.items()
            if name.startswith(("from", "to")) and name != "toPorts" and value
        )
        for index, peer in enumerate(rule.peers):
            yield f"{rule.path}.{field}[{index}]", peer


def _warn(each: Checked, check: Check, path: str, text: str) -> Problem:
    return Problem(
        level=Level.WARNING,
        check=check,
        file=each.document.file,
        line=each.document.line(path),
        object=each.title,
        path=path,
        text=text,
    )


# Against a cluster's pods


def without_match(each: Checked, view: View) -> Iterator[Problem]:
    """Selectors of a policy that match nothing of a cluster."""
    policy = each.policy
    if policy is None:
        return
    if policy.namespace and policy.namespace not in view.namespaces:
        text = f"there is no namespace {policy.namespace}: nothing more is tried"
        yield _warn(each, Check.NOTHING, "metadata.namespace", text)
        return
    sets = view.label_sets()

    def selects(selector: Selector) -> bool:
        return is_contradiction(selector) or any(matches(selector, labels) for labels in sets)

    if not selects(policy.selector):
        yield _warn(
            each, Check.NOTHING, _subject_path(policy), "selects no pod" + _why(policy.selector, view)
        )
    for rule in policy.rules:
        for path, peer in _peers(each, rule):
            if isinstance(peer, Selector) and not selects(peer):
                yield _warn(each, Check.NOTHING, path, "selects no pod" + _why(peer, view))
            if isinstance(peer, ServicePeer) and view.services is not None and not _is_served(peer, view):
                yield _warn(each, Check.NOTHING, path, "there is no such Service")


def _is_served(peer: ServicePeer, view: View) -> bool:
    return any(
        names_service(peer, namespace, name, service.labels)
        for (namespace, name), service in (view.services or {}).items()
    )


def _why(selector: Selector, view: View) -> str:
    for each in selector.requirements:
        if each.key == NAMESPACE_LABEL and each.operator is Operator.IN:
            if not set(each.values) & view.namespaces.keys():
                return f": there is no namespace {' or '.join(each.values)}"
            return f" of namespace {' or '.join(each.values)}"
    return ""
