"""Single pod addresses as slices tell of them, against a count of all that they hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshwire.encryption.pods import NOBODY, PodAddresses, Pods

Content = list[tuple[str, tuple[bytes, ...]]]

addresses = st.sampled_from([bytes([10, 0, 0, number]) for number in range(6)])
contents: st.SearchStrategy[Content] = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.lists(addresses, max_size=2, unique=True).map(tuple),
    ),
    max_size=4,
)


def expected(slices: dict[str, Content]) -> dict[str, set[bytes]]:
    owners: dict[bytes, set[str]] = {}
    for content in slices.values():
        for node, addresses in content:
            for address in addresses:
                owners.setdefault(address, set()).add(node)
    found: dict[str, set[bytes]] = {}
    for address, nodes in owners.items():
        found.setdefault(nodes.pop() if len(nodes) == 1 else NOBODY, set()).add(address)
    return found


@given(st.lists(st.tuples(st.sampled_from(["s", "t", "u"]), st.none() | contents, st.booleans())))
def test_every_address_is_its_nodes(history: list[tuple[str, Content | None, bool]]) -> None:
    pods = PodAddresses()
    slices: dict[str, Content] = {}
    seen: list[tuple[Pods, dict[str, set[bytes]]]] = []
    for name, content, look in history:
        if content is None:
            slices.pop(name, None)
            pods.remove_slice(name)
        else:
            slices[name] = content
            pods.put_slice(name, content)
        if look:
            assert pods.snapshot() == expected(slices)
            seen.append((pods.snapshot(), expected(slices)))
    assert pods.snapshot() == expected(slices)
    for before, what_it_was in seen:
        assert before == what_it_was, "a snapshot never changes"


def test_what_does_not_change_stays_the_same_object() -> None:
    """Thousands of nodes are compared by that."""
    pods = PodAddresses()
    pods.put_slice("s", [("a", (b"1234",)), ("b", (b"1235",))])
    before = pods.snapshot()
    assert pods.snapshot() is before
    pods.put_slice("s", [("a", (b"1234",)), ("b", (b"1235",)), ("b", (b"1236",))])
    after = pods.snapshot()
    assert after["a"] is before["a"] and after["b"] == {b"1235", b"1236"}


def test_a_pod_that_moves_to_another_slice_stays_known() -> None:
    pods = PodAddresses()
    pods.put_slice("s", [("a", (b"1234",))])
    before = pods.snapshot()
    pods.put_slice("t", [("a", (b"1234",))])
    pods.remove_slice("s")
    assert pods.snapshot() == before
