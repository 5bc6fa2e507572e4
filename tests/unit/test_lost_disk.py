"""A node whose host has lost its disk: its old key goes before a new one is made, and both are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network

from meshwire.api.meshconfig import Encryption, MeshConfig
from meshwire.api.meshnode import Key, MeshNode, Phase, Spec, Status
from meshwire.api.meshstatus import MeshStatus
from meshwire.operator.apply import why_renewed
from meshwire.operator.objects import Config, KeySecret, Node
from meshwire.operator.reconcile import Inputs, IssueKey, PatchSpec, reconcile

OLD, NEW = f"1{0:041d}A=", f"2{0:041d}A="
SEALS_OLD, SEALS_NEW = f"3{0:041d}A=", f"4{0:041d}A="


def cluster() -> Inputs:
    """One node in Enforcing, whose agent has made another sealing key."""
    return Inputs(
        nodes={
            "a": Node(
                name="a",
                uid="node",
                live=True,
                addresses=(ip_address("192.0.2.1"),),
                pod_cidrs=(ip_network("10.0.1.0/24"),),
            )
        },
        mesh_nodes={
            "a": MeshNode(
                name="a",
                uid="mesh",
                owner="node",
                generation=1,
                spec=Spec(
                    id=1,
                    addresses=(ip_address("192.0.2.1"),),
                    pod_cidrs=(ip_network("10.0.1.0/24"),),
                    cluster_cidrs=(ip_network("10.0.0.0/16"),),
                    keys=(Key(epoch=1, public_key=OLD),),
                    phase=Phase.ENFORCING,
                    epoch=1,
                ),
                status=Status(observed_generation=1, sealing_key=SEALS_NEW),
            )
        },
        secrets={
            "a": KeySecret(
                node="a",
                uid="secret",
                owner="mesh",
                sealed_to=SEALS_OLD,
                keys=(Key(epoch=1, public_key=OLD),),
            )
        },
        config=Config(
            uid="config",
            resource_version="1",
            generation=1,
            config=MeshConfig(generation=1, encryption=Encryption(enabled=True)),
        ),
        status=MeshStatus(phase=Phase.ENFORCING, epoch=1),
        found_cidrs=(ip_network("10.0.0.0/16"),),
        recent_ids=(),
        now=datetime(2026, 1, 1, tzinfo=UTC),
    )


def rounds(inputs: Inputs) -> Iterator[PatchSpec | IssueKey]:
    """What is done about the node, one write each round."""
    for _ in range(10):
        actions = [each for each in reconcile(inputs).actions if isinstance(each, PatchSpec | IssueKey)]
        if not actions:
            return
        action = actions[0]
        yield action
        match action:
            case PatchSpec():
                node = replace(inputs.mesh_nodes["a"], spec=action.spec)
                inputs = replace(inputs, mesh_nodes={"a": node})
            case IssueKey():
                key = Key(epoch=action.epoch, public_key=NEW)
                secret = replace(inputs.secrets["a"], sealed_to=action.sealing_key, keys=(key,))
                inputs = replace(inputs, secrets={"a": secret})
    raise AssertionError("never at rest")


def test_the_old_key_goes_before_the_new_one_is_made_and_both_say_why() -> None:
    withdrawn, issued, published = rounds(cluster())
    assert isinstance(withdrawn, PatchSpec) and withdrawn.stolen and not withdrawn.spec.keys
    assert isinstance(issued, IssueKey) and issued.renewed and issued.sealing_key == SEALS_NEW
    assert "sealing key is another" in why_renewed(issued) and "withdrawn" in why_renewed(issued)
    assert isinstance(published, PatchSpec) and not published.stolen
    assert [key.public_key for key in published.spec.keys] == [NEW]


def test_a_secret_that_is_gone_is_no_stolen_disk() -> None:
    inputs = replace(cluster(), secrets={})
    issued = next(rounds(inputs))
    assert isinstance(issued, IssueKey) and issued.renewed
    assert why_renewed(issued) == ": its Secret was gone"
