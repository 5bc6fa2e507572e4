"""Why policies let a packet through or not: a packet in, reasons out. The judge is meshwire.policy.evaluate,
the same that the datapath's tables are tested against. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshwire.api.meshpolicy import Direction, Kind, Policy, PolicyMode, Rule
from meshwire.cli.clusterview import End
from meshwire.cli.policyfiles import Document
from meshwire.policy.evaluate import Decision, NearMiss, Packet, Reason, judge, near_misses
from meshwire.policy.selectors import matches

Origins = Mapping[tuple[Kind, str, str], Document]
"""Kind, namespace and name of a policy -> where it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One pod's rules. `isolated_by`: the policies for which what no rule allows is denied; `nearest`: the
    allow rule that missed the packet by least, where none matched."""

    direction: Direction
    pod: str
    decision: Decision
    isolated_by: tuple[Policy, ...]
    nearest: NearMiss | None
    audit: Side | None = None
    """What it would be if policies in mode Audit were enforced; None: the same."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """None: that end is no pod, no rules are asked."""

    egress: Side | None
    ingress: Side | None

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(side for side in (self.egress, self.ingress) if side is not None)

    @property
    def allowed(self) -> bool:
        return all(side.decision.allowed for side in self.sides)


def explain(policies: Iterable[Policy], source: End, destination: End, packet: Packet) -> Explanation:
    policies = tuple(policies)

    def side(direction: Direction, end: End) -> Side | None:
        if not end.party.is_pod:
            return None
        found = _side(policies, packet, direction, end, audit=False)
        audited = _side(policies, packet, direction, end, audit=True)
        if audited.decision.allowed is found.decision.allowed:
            return found
        return Side(
            direction=direction,
            pod=found.pod,
            decision=found.decision,
            isolated_by=found.isolated_by,
            nearest=found.nearest,
            audit=audited,
        )

    return Explanation(side(Direction.EGRESS, source), side(Direction.INGRESS, destination))


def _side(
    policies: Sequence[Policy], packet: Packet, direction: Direction, end: End, *, audit: bool
) -> Side:
    decision = judge(policies, packet, direction, audit=audit)
    missed = (
        near_misses(policies, packet, direction, audit=audit)
        if decision.reason is Reason.DEFAULT_DENY
        else []
    )
    return Side(
        direction=direction,
        pod=end.title,
        decision=decision,
        isolated_by=tuple(
            policy
            for policy in policies
            if (audit or policy.mode is PolicyMode.ENFORCE)
            and direction in policy.default_deny
            and matches(policy.selector, end.party.labels)
        ),
        nearest=missed[0] if missed else None,
    )


def place(origins: Origins, policy: Policy, path: str = "") -> str:
    """`FILE:LINE` of a policy's field; empty for a policy that comes from no file."""
    document = origins.get((policy.kind, policy.namespace, policy.name))
    return f"{document.file}:{document.line(path)}" if document else ""


def lines(explanation: Explanation, origins: Origins, ends: Sequence[End]) -> list[str]:
    """The reasons in words, a line each."""
    found = []
    for side in explanation.sides:
        verdict = "allowed" if side.decision.allowed else "denied"
        found.append(f"{side.direction} of {side.pod}: {verdict}")
        found += _reasons(side, origins, ends)
        if side.audit is not None:
            verdict = "allowed" if side.audit.decision.allowed else "denied"
            found.append(f"  with policies in mode Audit enforced it would be {verdict}:")
            found += [f"  {line}" for line in _reasons(side.audit, origins, ends)]
    if not explanation.sides:
        found.append("neither end is a pod: no policy is asked")
    return found


def _reasons(side: Side, origins: Origins, ends: Sequence[End]) -> list[str]:
    match side.decision.reason:
        case Reason.OWN_NODE:
            return ["  what comes from the pod's own node is always let in"]
        case Reason.NOT_ISOLATED:
            return [f"  no policy isolates the pod's {side.direction}"]
        case Reason.DEFAULT_DENY:
            isolating = ", ".join(_policy_words(policy, origins) for policy in side.isolated_by)
            return [f"  no rule allows it; isolated by {isolating}", *_near(side, origins, ends)]
    assert side.decision.rule is not None
    verb = "allowed" if side.decision.allowed else "denied"
    return [f"  {verb} by {_rule_words(*side.decision.rule, origins)}"]


def _near(side: Side, origins: Origins, ends: Sequence[End]) -> list[str]:
    if side.nearest is None:
        return ["  none of these policies has a rule that allows anything"]
    return [
        f"  nearest: {_rule_words(side.nearest.policy, side.nearest.rule, origins)}",
        *(f"    {text}" for text in misses(side.nearest, ends)),
    ]


def misses(near: NearMiss, ends: Sequence[End]) -> list[str]:
    """Why the rule missed, with the ends called as the person who asks called them."""
    texts = [miss.text for miss in near.misses]
    for end in ends:
        if end.party.is_pod:
            texts = [text.replace(end.party.name, end.title) for text in texts]
    return texts


def _rule_words(policy: Policy, rule: Rule, origins: Origins) -> str:
    where = place(origins, policy, rule.path)
    return f"{policy.title} {rule.path}" + (f" ({where})" if where else "")


def _policy_words(policy: Policy, origins: Origins) -> str:
    where = place(origins, policy)
    return f"{policy.title} ({where})" if where else policy.title


def as_json(explanation: Explanation, origins: Origins, ends: Sequence[End]) -> dict[str, Any]:
    """Documented in docs/cli.md."""
    return {
        "allowed": explanation.allowed,
        "egress": _side_json(explanation.egress, origins, ends),
        "ingress": _side_json(explanation.ingress, origins, ends),
    }


def _side_json(side: Side | None, origins: Origins, ends: Sequence[End]) -> dict[str, Any] | None:
    if side is None:
        return None
    near = side.nearest
    return {
        "allowed": side.decision.allowed,
        "reason": str(side.decision.reason),
        "rule": _rule_json(*side.decision.rule, origins) if side.decision.rule else None,
        "isolatedBy": [policy.title for policy in side.isolated_by],
        "nearest": (
            {**_rule_json(near.policy, near.rule, origins), "misses": misses(near, ends)} if near else None
        ),
        "audit": _side_json(side.audit, origins, ends),
    }


def _rule_json(policy: Policy, rule: Rule, origins: Origins) -> dict[str, Any]:
    file, _, line = place(origins, policy, rule.path).rpartition(":")
    return {
        "kind": str(policy.kind),
        "namespace": policy.namespace,
        "name": policy.name,
        "path": rule.path,
        **({"file": file, "line": int(line)} if file else {}),
    }
