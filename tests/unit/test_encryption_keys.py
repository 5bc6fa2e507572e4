"""Keys at rest and on the way."""

from __future__ import annotations

import base64
import copy
import pickle
import stat
from pathlib import Path

import pytest
from nacl.public import PrivateKey, SealedBox

from meshwire.encryption.keys import (
    KeyRefused,
    find_or_create_sealing_key,
    open_sealed,
    public_key,
    read_held,
    write_held,
)
from meshwire.encryption.model import HeldKey, SecretKey
from meshwire.operator.keys import issue

RAW = bytes(range(32))


def test_a_secret_key_does_not_show() -> None:
    key = SecretKey(RAW)
    for shown in (repr(key), str(key), f"{key}", f"{HeldKey(1, 'public', key)}", repr({"key": key})):
        assert RAW.hex() not in shown
        assert base64.b64encode(RAW).decode() not in shown
        assert "hidden" in shown
    for escape in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            escape(key)
    assert not hasattr(key, "__dict__")


def test_secret_keys_compare_by_value() -> None:
    assert SecretKey(RAW) == SecretKey(RAW)
    assert SecretKey(RAW) != SecretKey(bytes(32))
    assert SecretKey(RAW) != RAW


def test_the_public_half_is_wireguards() -> None:
    # By `wg pubkey`.
    assert public_key(SecretKey(RAW)) == "j0DFrbaPJWJK5bIU6nZ6bslNgp09e14a0bpvPiE4KF8="


def test_the_sealing_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "sealing.key"
    key = find_or_create_sealing_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert find_or_create_sealing_key(path) == key
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "sealing.key"
    find_or_create_sealing_key(path)
    path.chmod(mode)
    with pytest.raises(KeyRefused, match="can be read by others"):
        find_or_create_sealing_key(path)


def test_a_key_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "sealing.key").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match="symbolic links"):
        find_or_create_sealing_key(tmp_path / "sealing.key")


@pytest.mark.parametrize("content", ["", "rubbish", base64.b64encode(b"short").decode()])
def test_a_damaged_sealing_key_is_not_replaced_in_silence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sealing.key"
    path.touch(0o600)
    path.write_text(content)
    if not content:
        assert find_or_create_sealing_key(path), (
            "an empty file is what a crash before the first write leaves"
        )
        return
    with pytest.raises(KeyRefused, match="holds no key"):
        find_or_create_sealing_key(path)


def test_what_the_operator_seals_opens_here(tmp_path: Path) -> None:
    sealing = find_or_create_sealing_key(tmp_path / "sealing.key")
    issued = issue(node="a", epoch=3, sealing_key=public_key(sealing))
    held = open_sealed(issued.sealed, sealing, node="a", epoch=3, expected=issued.public_key)
    assert (held.epoch, held.public_key) == (3, issued.public_key)
    assert public_key(held.private_key) == issued.public_key


@pytest.mark.parametrize(
    ("node", "epoch", "expected", "message"),
    [
        ("b", 3, None, "another node or epoch"),
        ("a", 4, None, "another node or epoch"),
        ("a", 3, "x", "not the one the operator published"),
    ],
)
def test_a_key_moved_to_another_place_is_refused(
    node: str, epoch: int, expected: str | None, message: str
) -> None:
    sealing = SecretKey(bytes(PrivateKey.generate()))
    issued = issue(node="a", epoch=3, sealing_key=public_key(sealing))
    with pytest.raises(KeyRefused, match=message):
        open_sealed(issued.sealed, sealing, node=node, epoch=epoch, expected=expected or issued.public_key)


def test_a_key_sealed_to_another_node_is_refused() -> None:
    ours, theirs = (SecretKey(bytes(PrivateKey.generate())) for _ in range(2))
    issued = issue(node="a", epoch=1, sealing_key=public_key(theirs))
    with pytest.raises(KeyRefused, match="not sealed to this node"):
        open_sealed(issued.sealed, ours, node="a", epoch=1, expected=issued.public_key)


@pytest.mark.parametrize(
    "content", [b"", b"no base64 \xff", base64.b64encode(b"a\0001\0short"), base64.b64encode(b"a")]
)
def test_malformed_content_is_refused_without_showing_it(content: bytes) -> None:
    sealing = PrivateKey.generate()
    sealed = SealedBox(sealing.public_key).encrypt(content)
    with pytest.raises(KeyRefused, match="malformed") as refused:
        open_sealed(sealed, SecretKey(bytes(sealing)), node="a", epoch=1, expected="x")
    assert refused.value.__cause__ is None


def test_held_keys_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = SecretKey(RAW)
    held = {epoch: HeldKey(epoch, public_key(key), key) for epoch in (1, 2)}
    assert read_held(path) == {}
    write_held(path, held)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_held(path) == held
    path.write_text("[1]")
    with pytest.raises(KeyRefused, match="damaged"):
        read_held(path)
