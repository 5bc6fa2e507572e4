"""What becomes of each policy: whether it is understood, on how many of the nodes that have pods of it it
is in force, and what it would drop. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from meshwire.api import conditions
from meshwire.api.conditions import Condition
from meshwire.api.meshconfig import PolicySettings
from meshwire.api.meshpolicy import PolicyMode, Selector
from meshwire.api.meshpolicyreport import MAP_FULL, Failure, MeshPolicyReport
from meshwire.operator.objects import Namespace, Node, Pod, PolicyObject, PolicyStatus
from meshwire.operator.policyreconcile import pod_labels
from meshwire.operator.summary import listed
from meshwire.policy.identity import Labels
from meshwire.policy.selectors import matches

ENFORCED: Final = "Enforced"
MAX_COUNT: Final = 2**63 - 1
"""What the API can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Nodes and reports by node, pods by uid, policies by uid. `settings` None: what is wanted can't be
    told. `counters`: it is time for numbers too; they change all the time."""

    settings: PolicySettings | None
    nodes: Mapping[str, Node]
    namespaces: Mapping[str, Namespace]
    pods: Mapping[str, Pod]
    policies: Mapping[str, PolicyObject]
    reports: Mapping[str, MeshPolicyReport]
    counters: bool
    now: datetime


@dataclass(frozen=True, slots=True)
class WritePolicyStatus:
    policy: PolicyObject
    status: PolicyStatus


@dataclass(slots=True)
class Selections:
    """Which of the label sets that pods have each selector selects. It remembers: policies times
    identities are many."""

    _known: frozenset[Labels] = frozenset()
    _selected: dict[Selector, frozenset[Labels]] = field(default_factory=dict)

    def update(
        self, selectors: Iterable[Selector], labels: frozenset[Labels]
    ) -> Mapping[Selector, frozenset[Labels]]:
        gone = self._known - labels
        new = [(each, dict(each)) for each in labels - self._known]
        everything: list[tuple[Labels, dict[str, str]]] = []
        result: dict[Selector, frozenset[Labels]] = {}
        for selector in selectors:
            before = self._selected.get(selector)
            if before is None and not everything:
                everything = [(each, dict(each)) for each in labels]
            candidates = everything if before is None else new
            found = [each for each, pairs in candidates if matches(selector, pairs)]
            if before is None:
                result[selector] = frozenset(found)
            else:
                result[selector] = (before - gone).union(found) if gone or found else before
        self._known, self._selected = labels, result
        return result


def plan(inputs: Inputs, selections: Selections) -> list[WritePolicyStatus]:
    """The statuses that are to be written."""
    if inputs.settings is None:
        return []
    nodes_of: dict[Labels, set[str]] = defaultdict(set)
    if inputs.settings.enabled:
        for pod in inputs.pods.values():
            namespace = inputs.namespaces.get(pod.namespace)
            node = inputs.nodes.get(pod.node)
            if namespace and node and node.live and pod.addresses:
                nodes_of[pod_labels(pod, namespace, inputs.settings.excluded_labels)].add(pod.node)
    selected = selections.update(
        (policy.selector for policy in inputs.policies.values() if policy.selector is not None),
        frozenset(nodes_of),
    )
    answers = _answers(inputs.reports)
    actions: list[WritePolicyStatus] = []
    for uid, policy in sorted(inputs.policies.items()):
        concerned: set[str] = set()
        if policy.selector is not None:
            concerned.update(*(nodes_of[labels] for labels in selected[policy.selector]))
        status = _status(policy, inputs, concerned, answers.get(uid, _Answers()))
        if status != policy.status and (inputs.counters or _urgent(policy.status, status)):
            actions.append(WritePolicyStatus(policy, status))
    return actions


@dataclass(slots=True)
class _Answers:
    """Of the nodes about one policy: in which generation it is in force, and what failed."""

    generations: dict[str, int] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    would_deny: int = 0


def _answers(reports: Mapping[str, MeshPolicyReport]) -> Mapping[str, _Answers]:
    result: dict[str, _Answers] = defaultdict(_Answers)
    for node, report in reports.items():
        if report.enabled:
            for item in report.policies:
                answers = result[item.uid]
                answers.generations[node] = item.generation
                answers.would_deny += item.would_deny
            for failure in report.failed:
                result[failure.uid].failures[node] = failure
    return result


def _status(
    policy: PolicyObject, inputs: Inputs, concerned: Collection[str], answers: _Answers
) -> PolicyStatus:
    enabled = bool(inputs.settings and inputs.settings.enabled)
    done = [node for node in concerned if answers.generations.get(node, -1) >= policy.generation]
    failed = {
        node: failure
        for node, failure in answers.failures.items()
        if node in concerned and node not in done and failure.generation >= policy.generation
    }
    pending = [node for node in concerned if node not in done and node not in failed]
    audit = policy.mode is PolicyMode.AUDIT

    in_force, reason, message = (
        True,
        ENFORCED,
        f"in force on all {len(concerned)} nodes that have pods of it",
    )
    if policy.selector is None:
        in_force, reason, message = False, "Invalid", policy.problem
    elif not enabled:
        in_force, reason, message = False, "PolicyDisabled", "spec.policy.enabled of the MeshConfig is false"
    elif failed:
        # Where it is pods that are closed, whoever is alarmed wants to know that first.
        is_full = any(failure.reason == MAP_FULL for failure in failed.values())
        in_force, reason = False, MAP_FULL if is_full else "NodesFailed"
        message = listed(failed, lambda node: f"{failed[node].reason}: {failed[node].message}")
    elif pending:
        in_force, reason = False, "NodesPending"
        message = f"in force on {len(done)} of {len(concerned)} nodes, waiting for {listed(pending)}"
    elif not concerned:
        reason, message = "NoPodsSelected", "it selects no pod that runs"
    elif audit:
        message = f"audited on all {len(concerned)} nodes that have pods of it"

    accepted = policy.selector is not None
    stalled = not accepted or bool(failed)
    result = policy.status.conditions
    for type, state, why, text in (
        (
            conditions.ACCEPTED,
            accepted,
            "Accepted" if accepted else "Invalid",
            policy.problem,
        ),
        # In mode Audit nothing is dropped, however far the nodes are.
        (ENFORCED, False, "Audit", message) if in_force and audit else (ENFORCED, in_force, reason, message),
        (conditions.READY, in_force, "Audited" if in_force and audit else reason, message),
        (
            (conditions.RECONCILING, True, "Progressing", message)
            if reason == "NodesPending"
            else (conditions.RECONCILING, False, "Stalled" if stalled else "UpToDate", "")
        ),
        (
            (conditions.STALLED, True, reason, message)
            if stalled
            else (conditions.STALLED, False, "Working", "")
        ),
    ):
        result = conditions.set_condition(
            result,
            type=type,
            status=state,
            reason=why,
            message=text,
            observed_generation=policy.generation,
            now=inputs.now,
        )
    return PolicyStatus(
        observed_generation=policy.generation,
        nodes=f"{len(done)}/{len(concerned)}",
        would_deny=min(answers.would_deny, MAX_COUNT),
        conditions=result,
    )


def _urgent(old: PolicyStatus, new: PolicyStatus) -> bool:
    """Something that people wait for, not only numbers. A pod that comes to a node on which a policy is
    not in force yet is no news: it is by the time that numbers are written, or then it is news."""
    if old.observed_generation != new.observed_generation:
        return True

    def state(all: Iterable[Condition]) -> frozenset[tuple[str, bool | None, str]]:
        return frozenset((each.type, each.status, each.reason) for each in all)

    ready = conditions.find(new.conditions, conditions.READY)
    pending = ready is not None and ready.reason == "NodesPending"
    return not pending and state(old.conditions) != state(new.conditions)
