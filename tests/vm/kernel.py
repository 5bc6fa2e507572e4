"""Stock Debian kernels to boot in a virtual machine: fetched by apt, unpacked into a cache, not installed.

The packages come from the mirror this machine's own apt uses, but through an apt state of their own, so that
neither its package lists nor its sources change."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SUITES: Final = {"6.1": "bookworm", "6.12": "trixie"}
"""The Debian release whose kernel each series is."""

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
META_PACKAGE: Final = "linux-image-amd64"
"""The generic flavour: `cloud` is a third of its size, but has no 9p to share a root file system by."""


class KernelUnavailable(Exception):
    """The kernel is neither in the cache nor to be had from this machine's package mirror."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An unpacked kernel. `tree` holds `lib/modules/RELEASE` with its dependency index."""

    release: str
    image: Path
    tree: Path
    busybox: Path

    @property
    def modules(self) -> Path:
        return self.tree / "lib/modules" / self.release


def cache_folder() -> Path:
    """Where unpacked kernels are kept; safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meshwire/kernels"


def fetch(series: str, cache: Path | None = None) -> Kernel:
    """The kernel of `series` ("6.1" or "6.12"), from the cache if it is there. Raises KernelUnavailable."""
    cache = cache or cache_folder()
    if found := _find(cache / series):
        return found
    if series not in SUITES:
        raise KernelUnavailable(f"Linux {series} is in no Debian release; known: {', '.join(SUITES)}")
    if platform.machine() != "x86_64":
        raise KernelUnavailable(f"only amd64 kernels are known here, this machine is {platform.machine()}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{series}-", dir=cache) as name:
        work = Path(name)
        _unpack(_download(series, work), work / "tree")
        # Two processes may fetch at once: the first to finish wins, the other's copy goes with its folder.
        try:
            os.rename(work / "tree", cache / series)
        except OSError:
            if not _find(cache / series):
                raise
    kernel = _find(cache / series)
    if not kernel:
        raise KernelUnavailable(f"{cache / series} holds no Linux {series}; delete it to fetch that again")
    return kernel


def _find(tree: Path) -> Kernel | None:
    for image in tree.glob(f"boot/vmlinuz-{tree.name}.*"):
        kernel = Kernel(
            release=image.name.removeprefix("vmlinuz-"), image=image, tree=tree, busybox=tree / "bin/busybox"
        )
        if (kernel.modules / "modules.dep").exists() and kernel.busybox.exists():
            return kernel
    return None


def _download(series: str, work: Path) -> list[Path]:
    """The packages of the kernel and of a static busybox for its initial RAM disk."""
    suite = SUITES[series]
    problems = []
    for mirror in _mirrors():
        try:
            apt = _private_apt(work / "apt", mirror, suite)
            _run(["apt-get", *apt, "update"])
            # The name has no version: the package behind it is its one dependency.
            depends = _run(["apt-cache", *apt, "depends", META_PACKAGE])
            image = re.search(r"Depends: (linux-image-\S+)", depends)
            if not image:
                raise KernelUnavailable(f"{META_PACKAGE} in {suite} depends on no kernel")
            _run(["apt-get", *apt, "download", image[1], "busybox-static"], cwd=work)
            return sorted(work.glob("*.deb"))
        except KernelUnavailable as error:
            problems.append(str(error))
    raise KernelUnavailable(f"Linux {series} (Debian {suite}): " + "; ".join(problems))


def _mirrors() -> list[str]:
    """The archives this machine's apt takes its own release from."""
    if not KEYRING.exists():
        raise KernelUnavailable(f"no {KEYRING}: only a Debian machine can verify Debian's kernels")
    release = _run(["sh", "-c", ". /etc/os-release; echo $VERSION_CODENAME"]).strip()
    targets = _run(["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)"])
    prefix = f"{release} main "
    mirrors = dict.fromkeys(
        line.removeprefix(prefix) for line in targets.splitlines() if line.startswith(prefix)
    )
    if not mirrors:
        raise KernelUnavailable(f"apt has no source for {release} main to derive a mirror from")
    return list(mirrors)


def _private_apt(folder: Path, mirror: str, suite: str) -> list[str]:
    """Options that make apt work below `folder` with one source; proxies and credentials still hold."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "state/lists/partial").mkdir(parents=True)
    (folder / "cache/archives/partial").mkdir(parents=True)
    (folder / "status").touch()
    sources = folder / "sources.list"
    sources.write_text(f"deb [arch=amd64 target=Packages signed-by={KEYRING}] {mirror} {suite} main\n")
    settings = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Architecture": "amd64",
        "APT::Update::Error-Mode": "any",
        # apt's own user may not enter a home folder.
        "APT::Sandbox::User": "root",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _unpack(packages: Sequence[Path], tree: Path) -> None:
    for package in packages:
        _run(["dpkg-deb", "--extract", str(package), str(tree)])
    # Releases differ in what lives below /usr, and builds of kmod in where they look for modules.
    for path in ("lib/modules", "bin/busybox"):
        if (tree / "usr" / path).exists():
            (tree / path).parent.mkdir(exist_ok=True)
            (tree / "usr" / path).rename(tree / path)
    shutil.rmtree(tree / "usr")
    (tree / "usr").mkdir()
    (tree / "usr/lib").symlink_to("../lib")
    for release in (tree / "lib/modules").iterdir():
        _run(["depmod", "--basedir", str(tree), release.name])


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    """What the command printed. Raises KernelUnavailable with its complaint."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise KernelUnavailable(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise KernelUnavailable(f"{command[0]} took longer than 10 minutes") from None
    if done.returncode:
        tool = f"{command[0]} {command[-1]}"
        raise KernelUnavailable(f"{tool}: {done.stderr.strip()[-500:] or done.stdout.strip()[-500:]}")
    return done.stdout


def main() -> None:
    """Fills the cache ahead of the tests. One that is not to be had is no error: its tests are skipped."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("series", nargs="*", default=list(SUITES), help=f"default: {' '.join(SUITES)}")
    for series in arguments.parse_args().series:
        try:
            kernel = fetch(series)
        except KernelUnavailable as error:
            print(f"{series}: NOT AVAILABLE, its tests will be skipped: {error}")
        else:
            print(f"{series}: {kernel.release} in {kernel.tree}")


if __name__ == "__main__":
    main()
