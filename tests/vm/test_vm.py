"""Stock Debian kernels with a WireGuard of their own, under QEMU: what a user's node runs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest
from tests.vm.kernel import SUITES, Kernel, KernelUnavailable, fetch
from tests.vm.machine import Completed, run

from meshwire.lab.binaries import ensure_binaries

ROOT = Path(__file__).parents[2]
SAMPLE = 20
"""Of how many cases of tests/bpf one runs here."""
PATIENCE = 8
"""How many times slower than this machine the guest may be."""
PROCESSORS = min(2, max(1, (os.cpu_count() or 1) // len(SUITES)))
"""Of each guest. Several of them that share one of this machine's would wait for each other."""
TESTS = ("tests/vm/guest_wireguard.py", "tests/bpf", "tests/vm/guest_lab.py")
SECONDS = 2400.0

pytestmark = pytest.mark.vm


def start(kernel: Kernel, logs: Path) -> Future[Completed]:
    """Boots a machine that runs TESTS."""
    programs = ensure_binaries()
    command = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "no:cacheprovider", "--durations=10"]
    future: Future[Completed] = Future()

    def body() -> None:
        try:
            completed = run(
                kernel,
                [*command, f"--timeout={SECONDS:.0f}", *TESTS],
                logs=logs,
                timeout=SECONDS,
                folder=ROOT,
                processors=PROCESSORS,
                environment={
                    "MESHWIRE_VM_RELEASE": kernel.release,
                    "MESHWIRE_SAMPLE": str(SAMPLE),
                    "MESHWIRE_LAB_PATIENCE": str(PATIENCE),
                    "KUBEBUILDER_ASSETS": str(programs),
                },
            )
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(completed)

    # A daemon's QEMU ends with it: nobody waits for it when these tests are interrupted.
    threading.Thread(target=body, daemon=True).start()
    return future


@pytest.fixture(scope="module")
def machines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Future[Completed] | KernelUnavailable]:
    """By series of those that are asked for. All at once: emulated, each is busy with one processor, and
    waits now and then."""
    if os.geteuid() != 0:
        pytest.skip("the guest runs on this machine's files as root")
    wanted = {
        item.callspec.params["series"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    }
    found: dict[str, Future[Completed] | KernelUnavailable] = {}
    for series in SUITES:
        if series in wanted:
            try:
                found[series] = start(fetch(series), tmp_path_factory.mktemp(series))
            except KernelUnavailable as error:
                found[series] = error
    return found


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("series", SUITES)
def test_a_stock_kernel_carries_it_all(
    machines: Mapping[str, Future[Completed] | KernelUnavailable], series: str
) -> None:
    """Kernel WireGuard, the programs' verdicts and the whole lab in one virtual machine: see TESTS."""
    machine = machines[series]
    if isinstance(machine, KernelUnavailable):
        pytest.skip(f"no stock Linux {series}: {machine}")
    completed = machine.result()
    print(completed.output)
    assert completed.returncode == 0, completed.output[-12_000:]
    # A guest in which something is skipped proves nothing.
    summary = completed.output.rstrip().splitlines()[-1]
    assert " passed" in summary and " skipped" not in summary, completed.output[-12_000:]
