"""Stock Debian kernels with a WireGuard of their own, under QEMU: what a user's node runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.vm.kernel import SUITES, Kernel, KernelUnavailable, fetch
from tests.vm.machine import run

from meshwire.lab.binaries import ensure_binaries

ROOT = Path(__file__).parents[2]
VERDICTS_IN_TEN = 1
"""How many of ten cases of tests/bpf run here: emulated, all of them take half an hour."""

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module", params=SUITES)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if os.geteuid() != 0:
        pytest.skip("the guest runs on this machine's files as root")
    try:
        return fetch(request.param)
    except KernelUnavailable as error:
        pytest.skip(f"no stock Linux {request.param}: {error}")


def passes(kernel: Kernel, logs: Path, *tests: str, timeout: float, options: Sequence[str] = ()) -> str:
    """Runs tests in a virtual machine; the answer is what pytest printed."""
    completed = run(
        kernel,
        [
            *(sys.executable, "-m", "pytest", "-v", "-s", "-p", "no:cacheprovider", "--durations=10"),
            *(f"--timeout={timeout:.0f}", f"--rootdir={ROOT}", *options, *tests),
        ],
        logs=logs,
        timeout=timeout,
        folder=ROOT,
        environment={"MESHWIRE_VM_RELEASE": kernel.release, "KUBEBUILDER_ASSETS": str(ensure_binaries())},
    )
    assert completed.returncode == 0, completed.output[-12_000:]
    # A guest in which everything is skipped proves nothing.
    assert " passed" in completed.output and " skipped" not in completed.output, completed.output[-3000:]
    print(completed.output)
    return completed.output


@pytest.mark.timeout(1200)
def test_kernel_wireguard_is_driven(kernel: Kernel, tmp_path: Path) -> None:
    passes(kernel, tmp_path, "tests/vm/guest_wireguard.py", timeout=1100)


@pytest.mark.timeout(1500)
def test_the_whole_lab(kernel: Kernel, tmp_path: Path) -> None:
    passes(kernel, tmp_path, "tests/vm/guest_lab.py", timeout=1400)
