"""Whether a label selector selects a set of labels. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from meshwire.api.meshpolicy import Operator, Selector


def matches(selector: Selector, labels: Mapping[str, str]) -> bool:
    """As Kubernetes reads selectors: a label that is absent is in no list, so that NotIn holds for it."""
    for requirement in selector.requirements:
        # No list holds None: an absent key falls out of In and into NotIn by itself.
        value = labels.get(requirement.key)
        operator = requirement.operator
        if operator is Operator.IN:
            if value not in requirement.values:
                return False
        elif operator is Operator.NOT_IN:
            if value in requirement.values:
                return False
        elif (value is None) is (operator is Operator.EXISTS):
            return False
    return True
