"""What `kubectl apply -k config` gives to whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwire.agent.loop import Health
from meshwire.agent.metrics import format_metrics
from meshwire.agent.policy.room import Fill
from meshwire.api.names import NAMESPACE, OPERATOR_NAMESPACE
from meshwire.operator.metrics import Metrics

ROOT = Path(__file__).parents[2]


def manifests() -> Iterator[dict[str, Any]]:
    for path in sorted((ROOT / "config").rglob("*.yaml")) + sorted((ROOT / "crds").glob("*.yaml")):
        yield from (each for each in yaml.safe_load_all(path.read_text()) if each)


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    found = [each for each in manifests() if each["kind"] in kinds]
    assert found
    return found


def test_no_account_has_wildcards() -> None:
    for role in of_kind("Role", "ClusterRole"):
        for rule in role["rules"]:
            for field, values in rule.items():
                assert "*" not in "".join(values), (role["metadata"]["name"], field)


def test_no_account_may_bind_roles_or_impersonate() -> None:
    for role in of_kind("Role", "ClusterRole"):
        for rule in role["rules"]:
            assert not {"bind", "escalate", "impersonate"} & set(rule["verbs"])


def test_only_the_operator_may_write_secrets_and_only_in_its_namespace() -> None:
    for role in of_kind("ClusterRole"):
        assert not [rule for rule in role["rules"] if "secrets" in rule.get("resources", ())]
    for role in of_kind("Role"):
        writes = [
            rule
            for rule in role["rules"]
            if "secrets" in rule["resources"] and set(rule["verbs"]) - {"get", "list", "watch"}
        ]
        if writes:
            assert role["metadata"]["name"] == "meshwire-operator"
            assert role["metadata"]["namespace"] in (NAMESPACE, OPERATOR_NAMESPACE)


def test_agents_may_read_nothing_where_epoch_secrets_are() -> None:
    bound = [
        binding
        for binding in of_kind("RoleBinding")
        if binding["metadata"]["namespace"] == OPERATOR_NAMESPACE
    ]
    assert [subject["name"] for binding in bound for subject in binding["subjects"]] == ["meshwire-operator"]
    [role] = [role for role in of_kind("Role") if role["metadata"]["namespace"] == OPERATOR_NAMESPACE]
    assert [rule["verbs"] for rule in role["rules"]] == [["get", "list", "create", "delete"]]
    assert OPERATOR_NAMESPACE in {each["metadata"]["name"] for each in of_kind("Namespace")}


def containers() -> list[Any]:
    return [
        pytest.param(container, id=container["name"])
        for workload in of_kind("Deployment", "DaemonSet")
        for container in workload["spec"]["template"]["spec"]["containers"]
    ]


@pytest.mark.parametrize("container", containers())
def test_containers_are_confined(container: dict[str, Any]) -> None:
    context = container["securityContext"]
    assert not context.get("privileged") and context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"]["drop"] == ["ALL"]
    assert set(context["capabilities"].get("add", [])) <= {
        "NET_ADMIN",
        "BPF",
        "PERFMON",
        "NET_RAW",
        "SYS_NICE",
    }
    assert {"memory"} <= container["resources"]["limits"].keys()


def test_alerts_are_on_metrics_that_there_are() -> None:
    health = Health(policy_maps={"policy": Fill(1, 2)}, boot_guard=True)
    there = {line.partition("{")[0].split()[0] for line in format_metrics(health, 0.0)}
    there |= {sample.name for metric in Metrics().registry.collect() for sample in metric.samples}
    (rules,) = of_kind("PrometheusRule")
    asked = [
        name
        for group in rules["spec"]["groups"]
        for rule in group["rules"]
        for name in re.findall(r"meshwire_[a-z_]+", rule["expr"])
    ]
    assert len(asked) >= 3 and set(asked) <= there


def test_source_roots_hide_no_standard_module() -> None:
    """operator/__init__.py would shadow `operator` for every Python started from the repository's root."""
    for folder in ("operator", "encryption", "bpf"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert not (ROOT / folder / "meshwire/__init__.py").exists()
