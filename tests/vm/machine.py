"""A virtual machine that runs one command, as root, on the host's root file system under another kernel.

It needs QEMU alone: no KVM, no disk image, nothing prepared for the guest. The host's files are read-only to
it; what it writes stays in its memory and is gone afterwards. Emulated, all takes 10 to 25 times as long."""

from __future__ import annotations

import argparse
import lzma
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.vm.kernel import Kernel, KernelUnavailable, fetch

QEMU: Final = "qemu-system-x86_64"
HERE: Final = Path(__file__).parent
ACCELERATOR: Final = "MESHWIRE_VM_ACCELERATOR"
"""Environment variable: `kvm` makes it fast where KVM works. Not tried unasked: there are machines that
offer a KVM on which the guest hangs without a word."""

BOOT_MODULES: Final = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
"""What reaching the root file system and reporting takes; everything else is loaded on demand from there."""

KERNEL_ARGUMENTS: Final = (
    "console=ttyS0",
    "panic=-1",
    "reboot=t",
    # What only costs time under emulation, or takes slowness for a fault.
    "mitigations=off",
    "nokaslr",
    "nowatchdog",
    "rcupdate.rcu_cpu_stall_suppress=1",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    "no_timer_check",
    "tsc=reliable",
)


class MachineFailed(Exception):
    """The machine did not get as far as an exit code; the message ends with what its kernel said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """How the command ended; `output` is its standard output and error, interleaved."""

    returncode: int
    output: str


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    logs: Path,
    timeout: float,
    folder: Path = Path("/"),
    environment: Mapping[str, str] | None = None,
    memory: str = "3G",
    processors: int = 2,
) -> Completed:
    """Boots `kernel`, runs `command` in `folder`, stops; `timeout` (seconds) is for all of it. In the folder
    `logs`, `output` and `console` (the kernel's messages) grow meanwhile. Raises MachineFailed."""
    qemu = shutil.which(QEMU)
    if not qemu:
        raise MachineFailed(f"{QEMU} is not installed")
    logs.mkdir(parents=True, exist_ok=True)
    output, status, console = (logs / name for name in ("output", "status", "console"))
    status.write_text("")
    with tempfile.TemporaryDirectory(prefix="meshwire-vm-") as work:
        initrd = Path(work) / "initrd"
        initrd.write_bytes(_initrd(kernel, _script(command, folder, environment or {}), timeout))
        hardware = [
            ["-machine", f"q35,accel={os.environ.get(ACCELERATOR, 'tcg')}", "-cpu", "max"],
            ["-smp", str(processors), "-m", memory, "-nodefaults", "-no-user-config", "-no-reboot"],
            ["-display", "none", "-nic", "none", "-serial", f"file:{_escaped(console)}"],
            ["-kernel", str(kernel.image), "-initrd", str(initrd), "-append", " ".join(KERNEL_ARGUMENTS)],
            ["-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"],
            ["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"],
            ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"],
            ["-chardev", f"file,id=output,path={_escaped(output)}"],
            ["-device", "virtserialport,chardev=output,name=output"],
            ["-chardev", f"file,id=status,path={_escaped(status)}"],
            ["-device", "virtserialport,chardev=status,name=status"],
        ]
        machine = subprocess.Popen(
            # Whatever ends us, also ends QEMU.
            ["setpriv", "--pdeathsig=KILL", qemu, *(word for words in hardware for word in words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            complaint, _ = machine.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise MachineFailed(
                f"no end after {timeout:.0f} s:\n{_tail(output)}\n{_tail(console)}"
            ) from None
        finally:
            machine.kill()
            machine.wait()
    if not (code := status.read_text().strip()):
        raise MachineFailed(f"QEMU ended with {machine.returncode}: {complaint}\n{_tail(console)}")
    return Completed(returncode=int(code), output=output.read_text(errors="replace"))


def _escaped(path: Path) -> str:
    """As a value in one of QEMU's comma-separated lists."""
    return str(path).replace(",", ",,")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:] if log.exists() else f"no {log}"


def _script(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    variables = {
        "PATH": _search_path(),
        "HOME": str(Path.home()),
        "LANG": "C.UTF-8",
        **environment,
    }
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*exports, f"cd {shlex.quote(str(folder))}", f"exec {shlex.join(command)}"])


def _initrd(kernel: Kernel, script: str, timeout: float) -> bytes:
    settings = {"GUEST_MODULES": str(kernel.modules.resolve()), "GUEST_TIMEOUT": f"{timeout:.0f}"}
    files = {
        "init": (HERE / "guest-initramfs.sh").read_bytes(),
        "bin/busybox": kernel.busybox.read_bytes(),
        "guest/boot": (HERE / "guest-boot.sh").read_bytes(),
        "guest/settings": "\n".join(f"{k}={shlex.quote(v)}" for k, v in settings.items()).encode(),
        "guest/command": script.encode(),
    }
    for number, module in enumerate(_boot_modules(kernel)):
        # insmod goes through them in alphabetical order.
        files[f"modules/{number:02}-{module.name.removesuffix('.xz')}"] = _plain(module)
    return b"".join(_cpio(files))


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"


def _boot_modules(kernel: Kernel) -> list[Path]:
    """The module files in an order in which each finds what it needs; built-in ones are left out."""
    depends = subprocess.run(
        ["modprobe", "--dirname", str(kernel.tree), "--set-version", kernel.release]
        + ["--config", "/dev/null", "--show-depends", "--all", *BOOT_MODULES],
        env={**os.environ, "PATH": _search_path()},
        capture_output=True,
        text=True,
    )
    if depends.returncode:
        raise MachineFailed(f"{kernel.release} lacks modules: {depends.stderr.strip()}")
    paths = re.findall(r"^insmod (\S+)", depends.stdout, re.MULTILINE)
    return [Path(path) for path in dict.fromkeys(paths)]


def _plain(module: Path) -> bytes:
    return lzma.decompress(module.read_bytes()) if module.suffix == ".xz" else module.read_bytes()


def _cpio(files: Mapping[str, bytes]) -> Iterator[bytes]:
    """The files, and the folders above them, as an archive in the kernel's `newc` format, all executable."""
    folders = {str(parent): b"" for name in files for parent in reversed(Path(name).parents[:-1])}
    entries = [
        *((name, 0o040755, data) for name, data in folders.items()),
        *((name, 0o100755, data) for name, data in files.items()),
        ("TRAILER!!!", 0, b""),
    ]
    for number, (name, mode, data) in enumerate(entries, start=1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        yield header + bytes(-len(header) % 4)
        yield data + bytes(-len(data) % 4)


def main() -> None:
    """Runs one command under another kernel, e.g. `python -m tests.vm.machine 6.1 uname -a`."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--timeout", type=float, default=600, help="seconds (%(default)s)")
    arguments.add_argument("--logs", type=Path, default=Path(".build/vm"), help="folder (%(default)s)")
    arguments.add_argument("series")
    arguments.add_argument("command", nargs=argparse.REMAINDER)
    options = arguments.parse_args()
    try:
        done = run(
            fetch(options.series),
            options.command,
            logs=options.logs,
            timeout=options.timeout,
            folder=Path.cwd(),
        )
    except (KernelUnavailable, MachineFailed) as error:
        raise SystemExit(f"{options.series}: {error}") from None
    print(done.output, end="")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
