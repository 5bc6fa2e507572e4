"""`meshwire lab`: a cluster on this machine, for trying, developing and testing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from meshwire.lab import binaries
from meshwire.lab.lab import Lab, lab_directory
from meshwire.lab.model import LabError, Settings

console = Console(stderr=True, highlight=False)
"""Progress goes to stderr: stdout is for what a command was asked for."""


class LabGroup(click.Group):
    """Turns what a person has to know into a message and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LabError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LabGroup)
def lab() -> None:
    """A real Kubernetes control plane and nodes of network namespaces, on this machine. Needs root.

    A pod runs its first container's `command` from this machine's file system, in a network namespace of its
    own; images, volumes, `kubectl logs` and `kubectl exec` are not there: see `meshwire lab logs` and
    `exec`."""


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str], None]]:
    """Shows what is going on and for how long; without a terminal, one line per step."""
    began = time.monotonic()

    def elapsed() -> str:
        return f"{time.monotonic() - began:4.1f} s"

    if console.is_terminal:
        with console.status(title) as status:

            def show(message: str) -> None:
                console.print(f"[dim]{elapsed()}[/]  {message}")
                status.update(f"{title}: {message}")

            yield show
    else:
        yield lambda message: console.print(f"{elapsed()}  {message}")
    console.print(f"{elapsed()}  done")


@lab.command()
@click.option("--nodes", default=3, show_default=True, help="How many nodes, named node1, node2, ...")
@click.option(
    "--families", default="v4,v6", show_default=True, help="IP families; the first one is preferred."
)
@click.option(
    "--underlay-mtu", default=1500, show_default=True, help="MTU of the wire between the nodes, in bytes."
)
@click.option(
    "--overlay", type=click.Choice(["vxlan"]), help="Pod traffic in VXLAN, as flannel does; default: routes."
)
@click.option(
    "--no-node-cidr", is_flag=True, help="Nodes have no pod CIDR: addresses from a pool, a route per pod."
)
@click.option("--mesh/--no-mesh", default=True, help="Whether Meshwire's operator and agents run.")
def up(
    nodes: int, families: str, underlay_mtu: int, overlay: str | None, no_node_cidr: bool, mesh: bool
) -> None:
    """Bring a lab up (taking down one that is there).

    The control plane's programs are taken from the first of $KUBEBUILDER_ASSETS, the directories of $PATH
    and the cache in ~/.cache/meshwire that has all six; else they are built with Go, once, from
    tests/controlplane. The lab lives in /var/lib/meshwire-lab, or $MESHWIRE_LAB_DIR."""
    settings = Settings(
        nodes=nodes,
        families=tuple(families.split(",")),
        underlay_mtu=underlay_mtu,
        overlay=overlay or "",
        node_cidr=not no_node_cidr,
        mesh=mesh,
    )
    with _progress("bringing the lab up") as report:
        the_lab = Lab(report=report)
        the_lab.up(settings)
    console.print(
        "\nThe lab is up. Look around:\n"
        f"  export KUBECONFIG={the_lab.kubeconfig}\n"
        "  kubectl get nodes -o wide        (or: meshwire lab kubectl get nodes -o wide)\n"
        "  meshwire lab status              what runs\n"
        "  meshwire lab logs                what it says\n"
        "Take it down:\n"
        "  meshwire lab down"
    )


@lab.command()
def down() -> None:
    """Remove everything the lab made."""
    with _progress("taking the lab down") as report:
        Lab(report=report).down()


@lab.command()
def programs() -> None:
    """Print where the control plane's programs are, kubectl among them; builds them where `up` would."""
    with _progress("control plane") as report:
        directory = binaries.ensure_binaries(report=report)
    click.echo(directory)


@lab.command()
def kubeconfig() -> None:
    """Print the path of the administrator's kubeconfig."""
    click.echo(Lab().kubeconfig)


@lab.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def kubectl(arguments: tuple[str, ...]) -> None:
    """Run the lab's own kubectl."""
    program = binaries.ensure_binaries(report=console.print) / "kubectl"
    _become([str(program), f"--kubeconfig={Lab().kubeconfig}", *arguments], dict(os.environ))


@lab.group()
def node() -> None:
    """Add, remove, reboot nodes."""


@node.command("add")
@click.argument("name")
def node_add(name: str) -> None:
    """Add a node and wait until it is ready."""
    with _progress(f"adding {name}") as report:
        Lab(report=report).add_node(name)


@node.command("remove")
@click.argument("name")
def node_remove(name: str) -> None:
    """Take a node away, its Node object too."""
    with _progress(f"removing {name}") as report:
        Lab(report=report).remove_node(name)


@node.command("reboot")
@click.argument("name")
def node_reboot(name: str) -> None:
    """Power a node off and on; only its disk stays."""
    with _progress(f"rebooting {name}") as report:
        Lab(report=report).reboot_node(name)


@lab.command()
@click.argument("action", type=click.Choice(["start", "stop", "kill", "restart"]))
@click.argument("node")
def agent(action: str, node: str) -> None:
    """Start, stop (SIGTERM), kill (SIGKILL) or restart a node's agent. Nothing else restarts it."""
    the_lab = Lab()
    match action:
        case "start":
            the_lab.start_agent(node)
        case "restart":
            the_lab.restart_agent(node)
        case _:
            if not the_lab.stop_agent(node, kill=action == "kill"):
                raise LabError(f"no agent runs on {node}")


@lab.command()
@click.argument("action", type=click.Choice(["start", "stop", "kill"]))
def operator(action: str) -> None:
    """Start, stop (SIGTERM) or kill (SIGKILL) the operator. Nothing else restarts it."""
    the_lab = Lab()
    if action == "start":
        the_lab.start_operator()
    elif not the_lab.stop_operator(kill=action == "kill"):
        raise LabError("no operator runs")


@lab.command()
@click.argument("action", type=click.Choice(["stop", "start"]))
def apiserver(action: str) -> None:
    """Stop or start the API server."""
    the_lab = Lab()
    if action == "start":
        the_lab.start_apiserver()
    elif not the_lab.stop_apiserver():
        raise LabError("no API server runs")


@lab.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-n", "--namespace", default="default", show_default=True)
@click.argument("pod")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(namespace: str, pod: str, command: tuple[str, ...]) -> None:
    """Run a command in a pod. Works without the API server."""
    command = command[1:] if command[0] == "--" else command
    the_lab = Lab()
    _become(the_lab.exec_command(pod, command, namespace), the_lab.pod_environment(pod, namespace))


@lab.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def ssh(node: str, command: tuple[str, ...]) -> None:
    """Run a command on a node, in its network and mount namespace."""
    command = command[1:] if command[0] == "--" else command
    the_lab = Lab()
    _become(the_lab.node_command(node, command), the_lab.environment())


@lab.command()
def status() -> None:
    """Show what runs, and in how much memory."""
    the_lab = Lab()
    state = the_lab.state
    table = Table(box=None, header_style="bold")
    for column in ("COMPONENT", "STATE"):
        table.add_column(column)
    for column in ("PID", "RSS"):
        table.add_column(column, justify="right")
    for component in the_lab.components():
        running = "running" if component.running else "[red]ended[/]"
        table.add_row(
            component.name, running, str(component.pid), f"{component.resident_kib / 1024:.0f} MiB"
        )
    output = Console(highlight=False)
    output.print(
        f"{', '.join(the_lab.nodes)}; {'+'.join(state.settings.families)}; state in {lab_directory()}"
    )
    output.print(table)


@lab.command()
@click.argument("component", required=False)
@click.option("-f", "--follow", is_flag=True, help="Keep printing what is added.")
def logs(component: str | None, follow: bool) -> None:
    """Print a component's log; without an argument, list the logs there are."""
    the_lab = Lab()
    if component is None:
        for name in the_lab.logs():
            click.echo(name)
        return
    path: Path = the_lab.log(component)
    if follow:
        _become(["tail", "-n", "+1", "-F", str(path)], dict(os.environ))
    click.echo(path.read_bytes(), nl=False)


@lab.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seconds", type=float, help="How long; default: until Ctrl-C.")
def capture(file: Path, seconds: float | None) -> None:
    """Record the wire between the nodes to a pcap FILE, then say what was on it.

    Ends with 1 where a pod's address was seen in clear or packets were missed."""
    recording = Lab().capture(file)
    recording.start()
    console.print(f"recording to {file}" + ("; Ctrl-C ends it" if seconds is None else ""))
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(seconds if seconds is not None else 10**9)
    report = recording.stop()
    click.echo(report)
    raise SystemExit(0 if report.clear == 0 and report.is_complete else 1)


def _become(command: list[str], env: dict[str, str]) -> NoReturn:
    """Runs a command in our place: its exit code and the terminal are its own."""
    raise SystemExit(subprocess.run(command, env=env).returncode)
