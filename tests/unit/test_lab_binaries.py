from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshwire.lab import binaries
from meshwire.lab.binaries import (
    PROGRAMS,
    build_command,
    cache_directory,
    ensure_binaries,
    find_binaries,
    pinned_version,
)
from meshwire.lab.model import LabError


def install(directory: Path, *programs: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for program in programs or PROGRAMS:
        (directory / program).write_text("#!/bin/sh\n")
        (directory / program).chmod(0o755)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "go.mod").write_text("module m\n\nrequire (\n\tk8s.io/kubernetes v1.35.4\n)\n")
    (directory / "main.go").write_text("package main\n")
    return directory


def test_assets_come_before_path_and_path_before_the_cache(tmp_path: Path, source: Path) -> None:
    environ = {"PATH": f"/nowhere:{tmp_path / 'path'}", "HOME": str(tmp_path)}
    assert find_binaries(environ, source=source) is None
    cache = install(cache_directory(environ, source=source))
    assert find_binaries(environ, source=source) == cache
    path = install(tmp_path / "path")
    assert find_binaries(environ, source=source) == path
    assets = install(tmp_path / "assets")
    environ["KUBEBUILDER_ASSETS"] = str(assets)
    assert find_binaries(environ, source=source) == assets


def test_a_directory_with_some_of_them_is_passed_over(tmp_path: Path, source: Path) -> None:
    environ = {"PATH": str(install(tmp_path / "path", "kubectl")), "HOME": str(tmp_path)}
    environ["KUBEBUILDER_ASSETS"] = str(install(tmp_path / "assets", "etcd", "kube-apiserver", "kubectl"))
    cache = install(cache_directory(environ, source=source))
    assert find_binaries(environ, source=source) == cache
    os.chmod(cache / "etcd", 0o644)
    assert find_binaries(environ, source=source) is None


def test_other_sources_have_another_cache(tmp_path: Path, source: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    before = cache_directory(environ, source=source)
    assert before.parent == tmp_path / "cache/meshwire"
    (source / "main.go").write_text("package main // changed\n")
    assert cache_directory(environ, source=source) != before


def test_the_pinned_version_is_stamped_into_the_build(source: Path) -> None:
    version = pinned_version((source / "go.mod").read_text())
    assert version == "v1.35.4"
    command = " ".join(build_command(version, Path("/t")))
    for stamp in ("gitVersion=v1.35.4", "gitMajor=1", "gitMinor=35"):
        assert f"-X k8s.io/component-base/version.{stamp}" in command
        assert f"-X k8s.io/client-go/pkg/version.{stamp}" in command


def test_the_sources_of_this_repository_name_a_version() -> None:
    assert pinned_version((binaries.SOURCE / "go.mod").read_text()).startswith("v1.")


def test_without_a_version_that_is_said() -> None:
    with pytest.raises(LabError, match="requires no k8s.io/kubernetes"):
        pinned_version("module m\nreplace k8s.io/kubernetes => v1.2.3\n")


def test_without_go_or_sources_the_error_says_what_to_do(tmp_path: Path, source: Path) -> None:
    environ = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    with pytest.raises(LabError, match="no Go .* Install Go|KUBEBUILDER_ASSETS"):
        ensure_binaries(environ, source=source)
    with pytest.raises(LabError, match="are not there either"):
        ensure_binaries(environ, source=tmp_path / "none")


def go(tmp_path: Path, script: str) -> dict[str, str]:
    """An environment whose `go` is a script."""
    directory = install(tmp_path / "go", "go")
    (directory / "go").write_text(f"#!/bin/sh\n{script}\n")
    return {"PATH": f"{directory}:/usr/bin:/bin", "HOME": str(tmp_path)}


def test_a_build_is_kept_and_not_repeated(tmp_path: Path, source: Path) -> None:
    environ = go(
        tmp_path, 'while [ "$1" != -o ]; do shift; done; echo x >> log; echo "#!" > "$2"; chmod +x "$2"'
    )
    reports: list[str] = []
    built = ensure_binaries(environ, source=source, report=reports.append)
    assert built == cache_directory(environ, source=source)
    assert "building Kubernetes v1.35.4" in reports[0]
    assert ensure_binaries(environ, source=source, report=reports.append) == built
    assert len(reports) == 1 and (source / "log").read_text() == "x\n"


def test_a_failed_build_shows_the_compilers_words_and_leaves_nothing_that_counts(
    tmp_path: Path, source: Path
) -> None:
    environ = go(tmp_path, "echo no space left >&2; exit 1")
    with pytest.raises(LabError, match="no space left"):
        ensure_binaries(environ, source=source)
    assert find_binaries(environ, source=source) is None
