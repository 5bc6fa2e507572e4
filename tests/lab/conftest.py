"""One lab for the whole session: three nodes, both families. Tests leave it as they found it, but for
encryption, which each asks for on or off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwire.lab.exercise import Exercise
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="the lab needs root"))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab in a directory of its own: one that a person has up stays as it is, and is refused beside."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.up(Settings())
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="session")
def exercise(lab: Lab) -> Exercise:
    """The lab with a probe on every node."""
    exercise = Exercise(lab)
    exercise.deploy()
    return exercise


@pytest.fixture
def encrypted(exercise: Exercise) -> Exercise:
    """The same with encryption on. It stays on: turning it off takes longer than most tests."""
    exercise.set_encryption(True)
    return exercise


@pytest.fixture
def plain(exercise: Exercise) -> Exercise:
    """The same with encryption off."""
    exercise.set_encryption(False)
    return exercise
