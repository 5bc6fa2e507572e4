from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshwire.lab import processes
from meshwire.lab.model import LabError, Paths

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    paths.logs.mkdir()
    return paths


def test_a_process_is_started_found_and_stopped(paths: Paths) -> None:
    process = processes.start(paths, "x", SLEEP, env=processes.environment("id1"))
    assert process.is_running() and processes.find(paths, "x") == process
    assert processes.find_all(paths) == (process,)
    with pytest.raises(LabError, match="x runs already"):
        processes.start(paths, "x", SLEEP, env={})
    assert processes.stop(paths, "x")
    assert not process.is_running() and processes.find(paths, "x") is None
    assert not processes.stop(paths, "x")


def test_what_ignores_sigterm_is_killed(paths: Paths) -> None:
    script = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    process = processes.start(paths, "x", [sys.executable, "-c", script], env=processes.environment("id2"))
    while not paths.log("x").read_text():
        assert process.is_running()
    assert processes.stop(paths, "x", timeout=0.1)
    assert not process.is_running()


def test_another_process_of_the_same_pid_is_left_alone(paths: Paths) -> None:
    with subprocess.Popen(SLEEP, stdout=subprocess.PIPE) as other:
        real = processes.record(paths, "x", other.pid, SLEEP)
        stale = real.__class__("x", other.pid, real.started - 1, ())
        assert real.is_running() and not stale.is_running()
        file = paths.processes / "x.json"
        file.write_text(file.read_text().replace(str(real.started), str(stale.started)))
        assert not processes.stop(paths, "x")
        assert other.poll() is None
        other.kill()


def test_an_exited_child_does_not_count_as_running(paths: Paths) -> None:
    process = processes.start(paths, "x", ["true"], env=processes.environment("id3"))
    while process.is_running():
        pass
    # A zombie would be in /proc still: its status has been taken.
    assert not Path(f"/proc/{process.pid}").exists()


def test_the_mark_finds_grandchildren_in_other_sessions_and_no_others(paths: Paths) -> None:
    lab_id = f"test-{os.getpid()}"
    script = "setsid sleep 60 & sleep 60"
    processes.start(paths, "x", ["sh", "-c", script], env=processes.environment(lab_id))
    with subprocess.Popen(["sleep", "60"], env=processes.environment(f"{lab_id}-other")) as other:
        while len(list(processes.marked(lab_id))) < 3:
            pass
        assert processes.kill_marked(lab_id) >= 3
        assert not list(processes.marked(lab_id))
        assert other.poll() is None
        other.kill()


def test_the_persons_own_settings_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "HTTPS_PROXY", "NODE_NAME", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.setenv(name, "x")
    env = processes.environment("id", EXTRA="1")
    assert "x" not in env.values()
    assert (env[processes.MARK], env["EXTRA"]) == ("id", "1")
    assert env["PATH"].split(":")[0] == str(Path(sys.executable).parent)


def test_memory_of_a_process_that_is_gone_is_none() -> None:
    assert processes.resident_kib(os.getpid()) > 1000
    assert processes.resident_kib(2**22 + 1) == 0
