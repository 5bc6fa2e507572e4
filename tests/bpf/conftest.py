"""A datapath of one's own for each test module: programs and maps pinned in a private bpffs."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyroute2 import netns

from meshwire.bpf.loader import OBJECTS, POLICY_OBJECTS, Programs
from meshwire.bpf.maps import Maps
from meshwire.bpf.policymaps import PolicyMaps

ROOT = Path(__file__).parents[2]
CHAIN = "test_policy_chain.py"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With $MESHWIRE_SAMPLE=n only every n-th case: emulated, all of them take more than ten minutes. The
    chain, which is one test with many, has fewer of its own."""
    every = int(os.environ.get("MESHWIRE_SAMPLE", "1"))
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    fewer = [item for item in ours if item.path.name != CHAIN]
    left_out = {item.nodeid for number, item in enumerate(fewer) if number % every}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


@pytest.fixture(scope="session")
def objects() -> Path:
    """The compiled programs, brought up to date."""
    if os.geteuid() != 0:
        pytest.skip("needs root: loads eBPF programs and mounts a bpffs")
    subprocess.run(["make", "-s", "-C", ROOT / "bpf"], check=True)
    return OBJECTS


@pytest.fixture(scope="module")
def bpffs(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bpffs of its own: every mount is a new one."""
    path = tmp_path_factory.mktemp("bpffs")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, None):
        raise OSError(ctypes.get_errno(), f"can't mount a bpffs at {path}")
    yield path
    libc.umount2(os.fsencode(path), 2)  # MNT_DETACH


@pytest.fixture(scope="module")
def pins(bpffs: Path) -> Path:
    return bpffs / "meshwire"


@pytest.fixture(scope="module")
def programs(pins: Path, objects: Path) -> Iterator[Programs]:
    with Programs.load(pins, objects=objects) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def maps(pins: Path, programs: Programs) -> Iterator[Maps]:
    with Maps.open(pins) as opened:
        yield opened


@pytest.fixture(scope="module")
def policy_pins(bpffs: Path) -> Path:
    return bpffs / "policy"


@pytest.fixture(scope="module")
def policy_programs(policy_pins: Path, objects: Path) -> Iterator[Programs]:
    with Programs.load(policy_pins, objects=POLICY_OBJECTS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def policy_maps(policy_pins: Path, policy_programs: Programs) -> Iterator[PolicyMaps]:
    with PolicyMaps.open(policy_pins) as opened:
        yield opened


@pytest.fixture
def compiled(objects: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Compiles a program with the project's own flags; answers with the folder the object is in."""

    def compile(text: str) -> Path:
        folder = tmp_path / "src"
        folder.mkdir()
        (folder / "given.bpf.c").write_text(text)
        subprocess.run(
            [
                "make",
                "-s",
                "-C",
                ROOT / "bpf",
                f"OBJECTS={tmp_path}/objects",
                f"SOURCES={folder}",
                "programs",
            ],
            check=True,
        )
        return tmp_path / "objects"

    return compile


@pytest.fixture
def namespaces() -> Iterator[Callable[[str], str]]:
    """Makes network namespaces; answers with their names. They go with the test."""
    if os.geteuid() != 0:
        pytest.skip("needs root: creates network namespaces")
    made: list[str] = []

    def make(label: str) -> str:
        name = f"mwt-{os.getpid()}-{label}"
        netns.create(name)
        made.append(name)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        return name

    yield make
    for name in made:
        netns.remove(name)
