"""Stock Debian kernels with a WireGuard of their own, under QEMU: what a user's node runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.vm.kernel import SUITES, Kernel, KernelUnavailable, fetch
from tests.vm.machine import run

from meshwire.lab.binaries import ensure_binaries

ROOT = Path(__file__).parents[2]
SAMPLE = 20
"""Of how many cases of tests/bpf one runs here."""
PATIENCE = 6
"""How many times slower than this machine the guest may be."""
TESTS = ("tests/vm/guest_wireguard.py", "tests/bpf")
LAB = "tests/vm/guest_lab.py"
LAB_IN = "6.1"
"""The oldest kernel has the whole lab too. What that needs of a kernel, TESTS try in each."""
UNPROVEN = "test_keys_change_and_nothing_is_lost_or_in_clear"
"""Of the lab: has not been seen to come to its end here, so that its failure would say nothing yet."""
SECONDS = 2700.0

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module", params=SUITES)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if os.geteuid() != 0:
        pytest.skip("the guest runs on this machine's files as root")
    try:
        return fetch(request.param)
    except KernelUnavailable as error:
        pytest.skip(f"no stock Linux {request.param}: {error}")


@pytest.mark.timeout(SECONDS + 60)
def test_a_stock_kernel_carries_it_all(kernel: Kernel, tmp_path: Path) -> None:
    """Kernel WireGuard, the programs' verdicts and, in one, the whole lab in a virtual machine."""
    programs = ensure_binaries()
    is_oldest = kernel.release.startswith(f"{LAB_IN}.")
    command = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "no:cacheprovider", "--durations=10"]
    completed = run(
        kernel,
        [
            *command,
            f"--timeout={SECONDS:.0f}",
            *TESTS,
            *([LAB, f"--deselect={LAB}::{UNPROVEN}"] if is_oldest else []),
        ],
        logs=tmp_path,
        timeout=SECONDS,
        folder=ROOT,
        environment={
            "MESHWIRE_VM_RELEASE": kernel.release,
            "MESHWIRE_SAMPLE": str(SAMPLE),
            "MESHWIRE_LAB_PATIENCE": str(PATIENCE),
            "KUBEBUILDER_ASSETS": str(programs),
        },
    )
    print(completed.output)
    assert completed.returncode == 0, completed.output[-12_000:]
    # A guest in which something is skipped proves nothing.
    summary = completed.output.rstrip().splitlines()[-1]
    assert " passed" in summary and " skipped" not in summary, completed.output[-12_000:]
