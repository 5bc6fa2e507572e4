"""Finds the programs of a Kubernetes control plane, or builds them from the pinned Go module
tests/controlplane."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from meshwire.lab.model import LabError

PROGRAMS: Final = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubectl",
)
MULTI_CALL: Final = "controlplane"

SOURCE: Final = Path(__file__).resolve().parents[3] / "tests/controlplane"


def find_binaries(environ: Mapping[str, str] = os.environ, *, source: Path = SOURCE) -> Path | None:
    """The first directory that holds all six programs: $KUBEBUILDER_ASSETS, those of $PATH, the cache.

    All from one place, because a control plane put together from several versions fails in ways nobody wants
    to debug: a kubectl alone in $PATH is therefore not used."""
    return next((directory for directory in _candidates(environ, source) if _is_complete(directory)), None)


def _candidates(environ: Mapping[str, str], source: Path) -> Iterator[Path]:
    if assets := environ.get("KUBEBUILDER_ASSETS"):
        yield Path(assets)
    yield from (Path(entry) for entry in environ.get("PATH", "").split(os.pathsep) if entry)
    if source.is_dir():
        yield cache_directory(environ, source=source)


def _is_complete(directory: Path) -> bool:
    return all(os.access(directory / program, os.X_OK) for program in PROGRAMS)


def cache_directory(environ: Mapping[str, str] = os.environ, *, source: Path = SOURCE) -> Path:
    """Where a build of `source` is kept; another version of the sources has another name."""
    digest = hashlib.sha256((source / "go.mod").read_bytes() + (source / "main.go").read_bytes()).hexdigest()
    cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/root") / ".cache")
    return cache / "meshwire" / f"controlplane-{digest[:16]}"


def pinned_version(go_mod: str) -> str:
    """The version of k8s.io/kubernetes a go.mod requires. Raises LabError."""
    if match := re.search(r"^\s*k8s\.io/kubernetes (v\d+\.\d+\.\d+)\s*$", go_mod, re.MULTILINE):
        return match[1]
    raise LabError("tests/controlplane/go.mod requires no k8s.io/kubernetes")


def build_command(version: str, target: Path) -> list[str]:
    major, minor = version.removeprefix("v").split(".")[:2]
    stamps = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    flags = ["-s", "-w"]
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
        flags += [f"-X {package}.{name}={value}" for name, value in stamps.items()]
    return [
        "go",
        "build",
        "-trimpath",
        "-buildvcs=false",
        "-ldflags",
        " ".join(flags),
        "-o",
        str(target),
        ".",
    ]


def ensure_binaries(
    environ: Mapping[str, str] = os.environ,
    *,
    source: Path = SOURCE,
    report: Callable[[str], None] = lambda message: None,
) -> Path:
    """A directory with all six programs, built if there is none: minutes and about 2 GB of memory. `report`
    is told before a build. Raises LabError."""
    if found := find_binaries(environ, source=source):
        return found
    if not (source / "go.mod").exists():
        raise LabError(_advice(f"the sources to build them from ({source}) are not there either"))
    if not shutil.which("go", path=environ.get("PATH")):
        raise LabError(_advice("there is no Go (1.25 or newer) to build them with either"))
    version = pinned_version((source / "go.mod").read_text())
    directory = cache_directory(environ, source=source)
    directory.mkdir(parents=True, exist_ok=True)
    report(f"building Kubernetes {version} (once; about 5 minutes on two cores)")
    unfinished = directory / f"{MULTI_CALL}.{os.getpid()}"
    build = subprocess.run(
        build_command(version, unfinished), cwd=source, env=dict(environ), capture_output=True, text=True
    )
    if build.returncode:
        unfinished.unlink(missing_ok=True)
        raise LabError(_advice(f"building them failed:\n{build.stderr.strip()[-2000:]}"))
    # The links come last: a directory counts as complete only by them.
    unfinished.rename(directory / MULTI_CALL)
    for program in PROGRAMS:
        link = directory / program
        link.unlink(missing_ok=True)
        link.symlink_to(MULTI_CALL)
    return directory


def _advice(problem: str) -> str:
    return (
        f"no directory with all of {', '.join(PROGRAMS)} in $KUBEBUILDER_ASSETS or $PATH, and {problem}.\n"
        "Install Go and let the lab build them from tests/controlplane, or put all six (of one version,"
        " 1.33 or newer) in one directory and name it in KUBEBUILDER_ASSETS."
    )
