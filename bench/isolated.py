"""Runs a measurement in namespaces of its own (network, mounts, processes): it collides with nothing on the
machine, and whatever it leaves behind goes with it, however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Final

SETUP: Final = """
set -e
mount -t sysfs sysfs /sys
mount -t bpf bpf /sys/fs/bpf
for directory in /run/netns /run/wireguard /var/run/wireguard; do
    mkdir -p "$directory"
    mount -t tmpfs tmpfs "$directory"
done
ip link set lo up
exec "$@"
"""

REPOSITORY: Final = Path(__file__).resolve().parent.parent


class Failed(Exception):
    """A measurement did not come to its end; the text ends with the last it said."""


def measure(module: str, *, seconds: float, function: str = "measure") -> Any:
    """What the module's measure(), or another `function` of it, returns, as JSON can say it. It is ended
    after `seconds`. Raises Failed; needs root."""
    command = [
        *("unshare", "--mount", "--propagation", "private", "--net"),
        *("--pid", "--fork", "--kill-child", "--mount-proc"),
        *("sh", "-c", SETUP, "isolated", sys.executable, "-m", "bench.isolated", module, function),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{module} took longer than {seconds:.0f} s: {_tail(error.stderr)}") from None
    if done.returncode:
        raise Failed(f"{module} ended with {done.returncode}: {_tail(done.stderr)}")
    return json.loads(done.stdout)


def _tail(text: str | bytes | None) -> str:
    words = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return words.strip()[-1500:]


if __name__ == "__main__":
    # Whatever a library prints to stdout must not get into the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    module, function = sys.argv[1:]
    json.dump(getattr(import_module(module), function)(), answer, default=asdict)
