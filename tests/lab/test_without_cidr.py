"""A cluster whose nodes have no pod CIDR: addresses come one by one. A lab in namespaces of its own, beside
the other tests' lab, goes through everything once; each test looks at a part of what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("without_cidr.py")

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    directory = tmp_path_factory.mktemp("without-cidr")
    command = ["unshare", "--mount", "--net", "--propagation", "private", sys.executable, str(SCRIPT)]
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result: Found = json.loads(done.stdout.splitlines()[-1])
    return result


def test_nodes_have_no_cidr(found: Found) -> None:
    """What the others take for granted."""
    assert found["cidrs"] == [None, None, None]


def test_without_cluster_cidrs_strictness_does_not_claim_what_it_cannot_keep(found: Found) -> None:
    missing = found["missing"]
    assert (missing["scope"]["status"], missing["scope"]["reason"]) == ("False", "ClusterCIDRMissing")
    assert "spec.network.clusterCIDRs" in missing["scope"]["message"]
    assert missing["ready"]["status"] == "False"
    assert missing["strict"] == [False, False, False]
    assert missing["reasons"] == ["ClusterCIDRMissing"] * 3
    assert "ClusterCIDRMissing" in missing["shown"]


def test_with_cluster_cidrs_all_is_well(found: Found) -> None:
    given = found["given"]
    assert (given["scope"]["status"], given["scope"]["reason"]) == ("True", "ClusterCIDRsKnown")
    assert given["ready"]["status"] == "True"
    assert given["strict"] == [True, True, True]


def test_off_and_on_under_traffic_lose_nothing(found: Found) -> None:
    flows = found["off and on"]
    assert flows["packets"] > 5000
    assert flows["lost"] == 0 and not flows["broken"], flows["broken"]


def test_pods_are_published_while_encryption_is_on(found: Found) -> None:
    assert found["published"]["on"] > 0
    assert found["published"]["off"] == 0


def test_nothing_is_in_clear_whatever_happens(found: Found) -> None:
    """New pods that talk with their first breath, addresses used again, agents that are killed."""
    wire = found["wire"]
    assert wire["complete"]
    assert wire["clear"] == 0, wire["examples"]
    assert wire["data"] > 100
    assert found["leaked"] == 0
    # The same kind of capture sees what is there to be seen.
    assert found["wire, off"]["clear"] > 0


def test_running_traffic_loses_nothing_meanwhile(found: Found) -> None:
    flows = found["meanwhile"]
    assert flows["lost"] == 0 and not flows["broken"], flows["broken"]


def test_without_agents_connections_begin_as_before(found: Found) -> None:
    assert found["without agents"] and all(found["without agents"])


def test_a_new_pod_is_reached(found: Found) -> None:
    assert found["new"] == {"node1": True, "node3": True}


def test_an_address_that_is_used_again_on_another_node_is_reached_there(found: Found) -> None:
    again = found["again"]
    assert again["addresses"][0] == again["addresses"][1]
    assert again["nodes"] == ["node2", "node3"]
    assert again["answers"] == {"node1": "second", "node2": "second"}


@pytest.mark.parametrize(
    ("who", "reaches"),
    [("friend", True), ("near-friend", True), ("stranger", False), ("near-stranger", False)],
)
def test_policy_knows_pods_by_their_labels(found: Found, who: str, reaches: bool) -> None:
    assert found["policy"][who] and set(found["policy"][who]) == {reaches}


def test_a_pod_that_nobody_guards_yet_reaches_nobody(found: Found) -> None:
    """It started while its node's agent was away. Nothing selects the pod that it talks to."""
    late = found["late"]
    assert late["without agent"] and set(late["without agent"]) == {False}
    assert late["with agent"] and set(late["with agent"]) == {True}


def test_policy_off_leaves_encryption_its_addresses(found: Found) -> None:
    after = found["policy off"]
    assert after["slices"] > 0 and after["reports"] == 0
    assert after["reached"]


def test_a_node_that_boots_holds_its_pods_back(found: Found) -> None:
    assert len(found["boot"]) == 2 and min(found["boot"]) > 50
    wire = found["wire, boot"]
    assert wire["clear"] == 0, wire["examples"]
