"""`meshwire monitor`: what policies drop, or would drop, on all nodes, as it happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final, Protocol

import click

from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.cli import cluster
from meshwire.cli.cluster import ClusterUnavailable
from meshwire.cli.events import AUDIT, DROP, Event, Filter, Merger, parse, words

AGENTS: Final = "app.kubernetes.io/name=meshwire-agent"
CONTAINER: Final = "agent"
EVENTS: Final = ("-m", "meshwire.agent", "events")
RETRY_SECONDS: Final = 3.0
REFRESH_SECONDS: Final = 10.0
"""How often nodes are looked for that have come or gone."""
PATIENCE_SECONDS: Final = 0.25
"""How long an event waits for an earlier one of another node."""
STYLES: Final = {DROP: "red", AUDIT: "yellow"}


@dataclass(frozen=True, slots=True)
class Command:
    """What prints a node's events; `env` None: this process's environment."""

    arguments: tuple[str, ...]
    env: Mapping[str, str] | None = None


class Transport(Protocol):
    def commands(self) -> dict[str, Command]:
        """By node. Raises ClusterUnavailable."""


class ClusterTransport:
    """By kubectl, which has to be there, in each node's agent."""

    def __init__(self, choice: cluster.Choice) -> None:
        """Raises ClusterUnavailable."""
        self._choice = choice
        self._reader = cluster.Reader(choice)

    def commands(self) -> dict[str, Command]:
        try:
            pods = self._reader.items(f"/api/v1/namespaces/{names.NAMESPACE}/pods", labelSelector=AGENTS)
        except cluster.NotFound as error:
            raise ClusterUnavailable(f"no agents: {error}") from None
        return {
            pod["spec"]["nodeName"]: Command(self._command(pod["metadata"]["name"]))
            for pod in pods
            if pod["spec"].get("nodeName") and pod.get("status", {}).get("phase") == "Running"
        }

    def _command(self, pod: str) -> tuple[str, ...]:
        where = []
        if self._choice.kubeconfig:
            where.append(f"--kubeconfig={self._choice.kubeconfig}")
        if self._choice.context:
            where.append(f"--context={self._choice.context}")
        # Standard input ends there when this process does; without it nobody there would know.
        run = ("exec", "-i", "-n", names.NAMESPACE, pod, "-c", CONTAINER, "--", "python", *EVENTS)
        return ("kubectl", *where, *run)


class LabTransport:
    """In the namespaces of the lab's nodes."""

    def __init__(self) -> None:
        from meshwire.lab.lab import Lab

        self._lab = Lab()

    def commands(self) -> dict[str, Command]:
        from meshwire.lab.controlplane import pod_environment
        from meshwire.lab.model import LabError

        found = {}
        with suppress(LabError):
            settings = self._lab.state.settings
            for node in self._lab.nodes:
                env = pod_environment(settings, NODE_NAME=node, POD_NAME=f"monitor-{node}")
                # A node that is down has no namespaces to run anything in.
                with suppress(LabError):
                    command = self._lab.node_command(node, [sys.executable, *EVENTS])
                    found[node] = Command(tuple(command), {**self._lab.environment(), **env})
        return found


def is_lab(choice: cluster.Choice) -> bool:
    """Whether the kubeconfig in use is that of a lab that is up on this machine."""
    path = choice.kubeconfig or os.environ.get("KUBECONFIG")
    if not path or choice.context:
        return False
    try:
        from meshwire.lab.lab import Lab
        from meshwire.lab.model import LabError
    except ModuleNotFoundError:
        # Without the extra `lab` there is none.
        return False
    try:
        return os.path.samefile(path, Lab().kubeconfig)
    except (LabError, OSError):
        return False


@dataclass(frozen=True, slots=True)
class Line:
    node: str
    text: str


@dataclass(frozen=True, slots=True)
class Away:
    """A node's events have ended, or can't be had."""

    node: str
    why: str


News = Line | Away


class Follower:
    """Runs one node's command, again and again, in a thread of its own, until `stop`."""

    def __init__(
        self,
        node: str,
        find: Callable[[str], Command | None],
        news: SimpleQueue[News],
        retry_seconds: float,
    ) -> None:
        self.node = node
        self._find = find
        self._news = news
        self._retry_seconds = retry_seconds
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"events of {node}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopping.set()
            if self._process is not None:
                self._process.terminate()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        told = ""
        while not self._stopping.is_set():
            command = self._find(self.node)
            why, seen = ("no agent runs there", False) if command is None else self._follow(command)
            # The same again and again is one piece of news.
            if (why != told or seen) and not self._stopping.is_set():
                self._news.put(Away(self.node, why))
            told = why
            self._stopping.wait(self._retry_seconds)

    def _follow(self, command: Command) -> tuple[str, bool]:
        """Until the command ends: why it did, and whether it had printed anything."""
        with self._lock:
            if self._stopping.is_set():
                return "", False
            try:
                process = self._process = subprocess.Popen(
                    command.arguments,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    env=command.env,
                )
            except OSError as error:
                return f"{command.arguments[0]}: {error.strerror}", False
        errors: list[str] = []
        assert process.stdout is not None and process.stderr is not None and process.stdin is not None
        drain = threading.Thread(target=_last_line, args=(process.stderr, errors), daemon=True)
        drain.start()
        seen = False
        with process:
            for text in process.stdout:
                seen = True
                self._news.put(Line(self.node, text))
        drain.join(1)
        return (errors[-1] if errors else f"its events ended with {process.returncode}"), seen


def _last_line(stream: Iterable[str], found: list[str]) -> None:
    for line in stream:
        if line.strip():
            found[:] = [line.strip()]


class Watch:
    """Followers of all nodes, those that come later too."""

    def __init__(
        self, transport: Transport, nodes: frozenset[str], *, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        """Raises ClusterUnavailable where there is nobody to ask from the start."""
        self.news: SimpleQueue[News] = SimpleQueue()
        self._transport = transport
        self._wanted = nodes
        self._retry_seconds = retry_seconds
        self._commands: dict[str, Command] = {}
        self._followers: dict[str, Follower] = {}
        self.refresh()

    def refresh(self) -> None:
        """Raises ClusterUnavailable."""
        self._commands = self._transport.commands()
        for node in self._wanted or self._commands:
            if node not in self._followers:
                self._followers[node] = Follower(node, self._find, self.news, self._retry_seconds)
        for node in [node for node in self._followers if node not in (self._wanted or self._commands)]:
            self._followers.pop(node).stop()

    def _find(self, node: str) -> Command | None:
        return self._commands.get(node)

    @property
    def is_busy(self) -> bool:
        return bool(self._followers)

    def stop(self) -> None:
        for follower in self._followers.values():
            follower.stop()
        for follower in self._followers.values():
            follower.join(1)


def follow(
    watch: Watch,
    wanted: Filter,
    show: Callable[[Event], None],
    tell: Callable[[str], None],
    *,
    refresh_seconds: float = REFRESH_SECONDS,
) -> None:
    """Until interrupted: `show` gets the events, `tell` what a person should know besides."""
    merger = Merger(time.monotonic, PATIENCE_SECONDS)
    puzzling: set[str] = set()
    problem = ""
    next_refresh = time.monotonic() + refresh_seconds
    while True:
        with suppress(Empty):
            news = watch.news.get(timeout=PATIENCE_SECONDS / 2)
            if isinstance(news, Away):
                tell(f"{news.node} is away: {news.why}; trying again")
            else:
                try:
                    event = parse(news.text)
                except InvalidSpec as error:
                    if news.node not in puzzling:
                        tell(f"{news.node} says what this client can't read; is it too old? ({error})")
                    puzzling.add(news.node)
                else:
                    if wanted.takes(event):
                        merger.put(event)
        for event in merger.take():
            show(event)
        if time.monotonic() >= next_refresh:
            try:
                watch.refresh()
                problem = ""
            except ClusterUnavailable as error:
                # The nodes that are known go on.
                if str(error) != problem:
                    tell(problem := str(error))
            next_refresh = time.monotonic() + refresh_seconds


@click.command()
@click.option("--node", "nodes", multiple=True, help="Of this node only; may be given several times.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["drop", "audit", "all"]),
    default="all",
    show_default=True,
    help="drop: what was dropped; audit: what policies in mode Audit would have dropped.",
)
@click.option("--from", "source", default="", metavar="NS/POD|IP", help="Sender; * and ? stand for others.")
@click.option("--to", "destination", default="", metavar="NS/POD|IP", help="Receiver; * and ? likewise.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@cluster.options
def monitor(
    nodes: tuple[str, ...],
    kind: str,
    source: str,
    destination: str,
    output: str,
    kubeconfig: str | None,
    context: str | None,
) -> None:
    """Follow what policies drop, or would drop, on all nodes, and why, until Ctrl-C.

    Needs kubectl and the right to `exec` into Meshwire's agents, as their events don't leave the nodes by
    themselves; in a lab of this machine, root. Nodes whose agent is away are named on stderr and tried
    again. With -o json, one object a line.

    Exit code: 0 after Ctrl-C, 2 where the cluster can't be asked.
    """
    choice = cluster.Choice(kubeconfig, context)
    wanted = Filter(
        verdict={"drop": DROP, "audit": AUDIT, "all": ""}[kind],
        nodes=frozenset(nodes),
        source=source,
        destination=destination,
    )

    def show(event: Event) -> None:
        if output == "json":
            click.echo(json.dumps(event.raw, separators=(",", ":")))
        else:
            click.echo(paint(event))

    def tell(text: str) -> None:
        click.echo(f"meshwire: {text}", err=True)

    try:
        transport: Transport = LabTransport() if is_lab(choice) else ClusterTransport(choice)
        watch = Watch(transport, wanted.nodes)
    except ClusterUnavailable as error:
        tell(str(error))
        raise SystemExit(2) from None
    # Whoever ends us ends what we started, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not watch.is_busy:
            tell("no agent runs; waiting for one")
        with suppress(KeyboardInterrupt):
            follow(watch, wanted, show, tell)
    finally:
        watch.stop()


def paint(event: Event) -> str:
    """In words, with the verdict in colour; click takes that out where there is no terminal."""
    style = click.style(event.verdict, fg=STYLES.get(event.verdict), bold=True)
    return words(event).replace(f" {event.verdict} ", f" {style} ", 1)
