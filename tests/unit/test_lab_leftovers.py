"""What counts as left over on a node."""

from __future__ import annotations

import pytest

from meshwire.lab.exercise import find_leftovers

ON = {"encryption": {"phase": "Enforcing", "epoch": 2}, "keys": [{"epoch": 2, "publicKey": "k"}]}
OFF = {"encryption": {"phase": "Off", "epoch": 2}}
OUT = {**ON, "keys": [], "quarantined": True}
SHOWN = """device meshwire_wg0
pins meshwire
keys {"2": "secret"}
filter eth0 egress mw_to_netdev
filter meshwire_wg0 ingress mw_from_wireguard
"""


def test_what_an_order_asks_for_is_none() -> None:
    assert find_leftovers(ON, SHOWN) == []
    assert find_leftovers(OFF, "") == []


@pytest.mark.parametrize("spec", [OFF, {}])
def test_with_encryption_off_everything_is(spec: dict[str, object]) -> None:
    found = find_leftovers(spec, SHOWN)
    assert len(found) == 5 and "secret" not in str(found)


@pytest.mark.parametrize(
    "line",
    [
        "device meshwire_wg1",
        "pins meshwire_next",
        'keys {"1": "secret", "2": "secret"}',
        "route dev meshwire_wg0 proto static",
        "filter meshwire_wg1 ingress mw_from_wireguard",
    ],
)
def test_what_is_of_another_epoch_or_way_is(line: str) -> None:
    (found,) = find_leftovers(ON, SHOWN + line)
    assert "secret" not in found


def test_in_quarantine_the_guard_stays_and_keys_and_devices_go() -> None:
    assert [each.split()[0] for each in find_leftovers(OUT, SHOWN)] == ["device", "keys", "filter"]


GUARD = """guard /var/lib/meshwire/boot.nft
guard /etc/systemd/system/meshwire-boot.service
guard /etc/systemd/system/multi-user.target.wants/meshwire-boot.service
"""


def test_a_boot_guard_on_the_disk_is_left_over_where_nobody_asks_for_it() -> None:
    assert find_leftovers(ON, SHOWN + GUARD, boot_guard=True) == []
    assert len(find_leftovers(ON, SHOWN + GUARD)) == 3
    assert len(find_leftovers(OFF, GUARD, boot_guard=True)) == 3


def test_a_boot_guard_in_force_is_left_over_anywhere() -> None:
    assert find_leftovers(ON, "table meshwire_boot\n", boot_guard=True) == ["table meshwire_boot"]


def test_what_policy_needs_is_left_over_without_it() -> None:
    shown = "pins meshwire-policy\nfilter veth0 ingress mw_from_pod\n"
    assert find_leftovers(OFF, shown, policy=True) == []
    assert find_leftovers(OFF, shown) == shown.splitlines()
    assert find_leftovers(ON, SHOWN + "pins meshwire-policy\n") == ["pins meshwire-policy"]
