from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from meshwire.cli.lab import lab


@pytest.mark.parametrize(
    "arguments",
    [
        ["kubeconfig"],
        ["status"],
        ["node", "add", "a"],
        ["node", "reboot", "a"],
        ["agent", "start", "a"],
        ["operator", "start"],
        ["exec", "pod", "--", "true"],
        ["capture", "file"],
    ],
)
def test_without_a_lab_every_command_says_how_to_get_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # No build of the control plane on the way to the error.
    for program in (
        "etcd",
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kube-proxy",
        "kubectl",
    ):
        (tmp_path / program).symlink_to("/bin/true")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    monkeypatch.setenv("MESHWIRE_LAB_DIR", str(tmp_path / "lab"))
    result = CliRunner().invoke(lab, arguments)
    assert result.exit_code == 1
    assert "lab up" in result.output or "no pod default/pod" in result.output
    assert not (tmp_path / "lab").exists()


def test_settings_that_make_no_lab_are_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWIRE_LAB_DIR", str(tmp_path / "lab"))
    result = CliRunner().invoke(lab, ["up", "--families", "v5"])
    assert result.exit_code == 1 and "families 'v5'" in result.output
    assert not (tmp_path / "lab").exists()


def test_taking_down_nothing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWIRE_LAB_DIR", str(tmp_path / "lab"))
    assert CliRunner().invoke(lab, ["down"]).exit_code == 0
