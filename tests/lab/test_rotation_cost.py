"""What one change of keys asks of the API server, with the real operator among nodes that are played."""

from __future__ import annotations

from bench import isolated


def test_a_change_of_keys_costs_each_node_the_same_few_writes() -> None:
    """In a control plane of its own. More would be paid by every agent, for each hears of every write."""
    found = isolated.measure("bench.rotation", function="short", seconds=170)
    nodes, writes, others = found["nodes"], found["writes"], found["others"]
    # The order, the order with its key, the end of the old one.
    assert writes.pop("operator: patch meshnodes") == 3 * nodes, found
    # The new key, the end of the old one.
    assert writes.pop("operator: patch secrets") == 2 * nodes, found
    # An answer to each order and, once all have moved, that; whom it still waited for may come between.
    assert 4 * nodes <= writes.pop("agents: patch meshnodes/status") <= 5 * nodes, found
    # A key's Event each, and those of the change itself.
    assert nodes < writes.pop("operator: create events") <= nodes + 5, found
    # The rest doesn't grow with the nodes.
    assert writes.pop("operator: create secrets (epoch)") == 1, found
    assert writes.pop("operator: delete secrets (epoch)") == 1, found
    assert 4 <= writes.pop("operator: patch meshstatuses/status") <= 25, found
    assert not writes, found
    assert others.pop("agents: get secrets") == nodes, found
    assert others.pop("operator: get secrets (epoch)") == nodes, found
    assert sum(others.values()) <= 5, found
