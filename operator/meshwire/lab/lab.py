"""The lab as a whole: what `meshwire lab ...` and tests call. Needs root.

A lab is what its state directory says; every object of this class is only a view of it, so commands in
different processes work on the same lab."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp

from meshwire.api import names
from meshwire.kube.client import ApiError, Client, Object, read_kubeconfig
from meshwire.lab import binaries, cni, controlplane, init, network, processes
from meshwire.lab.capture import Capture
from meshwire.lab.files import write_private
from meshwire.lab.model import (
    CONTROL,
    CONTROL_NETNS,
    PATIENCE,
    PODS,
    UNDERLAY_NETNS,
    LabError,
    Node,
    Paths,
    Settings,
    State,
    check_node_name,
    free_index,
)
from meshwire.lab.node import boot_id
from meshwire.lab.pods import is_ready

DEFAULT_DIRECTORY: Final = Path("/var/lib/meshwire-lab")
FIRST_PORT: Final = 16443
SOURCE: Final = Path(__file__).resolve().parents[3]
"""Where crds/ and config/ are: the lab applies what a real cluster gets, not copies."""

Report = Callable[[str], None]
Result = TypeVar("Result")


def lab_directory(environ: Mapping[str, str] = os.environ) -> Path:
    return Path(environ.get("MESHWIRE_LAB_DIR") or DEFAULT_DIRECTORY)


@dataclass(frozen=True, slots=True)
class Component:
    """One line of `status`."""

    name: str
    pid: int
    running: bool
    resident_kib: int


@dataclass(frozen=True, slots=True)
class PodRecord:
    """Where a running pod is, known without the API server."""

    namespace: str
    name: str
    node: str
    netns: str
    addresses: tuple[str, ...]
    pid: int


class Lab:
    """All methods raise LabError where something is not as it has to be."""

    def __init__(self, directory: Path | None = None, *, report: Report = lambda message: None) -> None:
        self.paths = Paths((directory or lab_directory()).absolute())
        self._report = report

    # What there is

    @property
    def state(self) -> State:
        try:
            return State.from_json(self.paths.state.read_text())
        except FileNotFoundError:
            raise LabError("no lab is up: `meshwire lab up` brings one up") from None

    @property
    def is_up(self) -> bool:
        return self.paths.state.exists()

    @property
    def kubeconfig(self) -> Path:
        """Of the cluster's administrator, for use in the namespace `up` was called in."""
        if not self.paths.kubeconfig.exists():
            raise LabError("no lab is up: `meshwire lab up` brings one up")
        return self.paths.kubeconfig

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.state.nodes)

    def components(self) -> tuple[Component, ...]:
        return tuple(
            Component(
                process.component, process.pid, process.is_running(), processes.resident_kib(process.pid)
            )
            for process in processes.find_all(self.paths)
        )

    def pid(self, component: str) -> int | None:
        """Of a component that runs, e.g. `node1.agent`."""
        process = processes.find(self.paths, component)
        return process.pid if process and process.is_running() else None

    def logs(self) -> tuple[str, ...]:
        """Names that `log` takes."""
        return tuple(
            sorted(
                str(p.relative_to(self.paths.logs).with_suffix("")) for p in self.paths.logs.rglob("*.log")
            )
        )

    def log(self, component: str) -> Path:
        path = self.paths.log(component)
        if not path.exists():
            raise LabError(f"no log of {component!r}; there are: {', '.join(self.logs())}")
        return path

    # The whole

    def up(self, settings: Settings, *, wait_seconds: float = 180) -> None:
        """Brings a lab up, after taking down whatever is left of one in the same state directory."""
        check_tools()
        programs = binaries.ensure_binaries(report=self._report)
        if self.is_up:
            self._report("taking down what was there")
            self.down()
        self._check_names_are_free(settings)
        if settings.mesh and not (SOURCE / "config/access").is_dir():
            raise LabError(
                f"no config/access in {SOURCE}: the lab runs from a source tree (or with --no-mesh)"
            )
        with self._locked(new=True):
            state = self._begin(settings)
            self._report("control plane")
            self._start_control_plane(programs, state)
            # Namespaces are made while the API server starts.
            for node in state.nodes:
                self._make_node(node, state)
            self._wait_for_api(wait_seconds)
            self._start_controllers(programs, state)
            self._apply_bootstrap(state)
            if settings.mesh:
                self._report("custom resources and access rules")
                self._apply_manifests(programs)
                self._start_operator(state)
            self._report(f"{len(state.nodes)} nodes")
            self._start_nodes(programs, state.nodes, state)
        self.wait_ready(seconds=wait_seconds)

    def down(self) -> None:
        """Removes everything the lab made, finished or not. No lab is no error."""
        if not self.paths.root.exists():
            return
        if not self.is_up:
            self._remove_state(State(lab_id="", settings=Settings(), api_port=0, nodes=()))
            return
        with self._locked():
            state = self.state
            processes.kill_marked(state.lab_id)
            for record in self.paths.root.glob("machines/*/pods/*.json"):
                pod = json.loads(record.read_text())
                if not pod["hostNetwork"]:
                    network.delete_netns(pod["netns"])
            for node in state.nodes:
                network.delete_netns(node.netns)
            for netns in (CONTROL_NETNS, UNDERLAY_NETNS):
                network.delete_netns(netns)
            self._remove_state(state)

    def wait_ready(self, *, seconds: float = 180) -> None:
        """Until every node is Ready (and its agent has taken the start-up taint off), pods can be made, and
        nothing of the lab has died meanwhile."""
        state = self.state
        self._report("waiting for the nodes to become ready")

        async def is_done(client: Client) -> str:
            nodes = {node["metadata"]["name"]: node for node in (await client.get("/api/v1/nodes"))["items"]}
            for node in state.nodes:
                found = nodes.get(node.name)
                # After a reboot its Node says for a while what was true before.
                if found is None or not is_ready(found) or _boot_id(found) != boot_id(self.paths, node):
                    return f"{node.name} is not ready"
                if state.settings.node_cidr and not found["spec"].get("podCIDRs"):
                    return f"{node.name} has no pod CIDR"
                if any(taint["key"] == names.NOT_READY_TAINT for taint in found["spec"].get("taints", ())):
                    return f"{node.name}'s agent is not ready"
            if await client.find("/api/v1/namespaces/default/serviceaccounts/default") is None:
                return "namespace default has no service account yet"
            return ""

        self._wait(is_done, seconds)

    # Nodes

    def add_node(self, name: str, *, wait: bool = True) -> None:
        check_node_name(name)
        programs = binaries.ensure_binaries(report=self._report)
        with self._locked():
            state = self.state
            if name in self.nodes:
                raise LabError(f"there is a node {name!r} already")
            node = Node(name, free_index(state.nodes))
            state = replace(state, nodes=(*state.nodes, node))
            self._write_state(state)
            self._make_node(node, state)
            self._start_nodes(programs, [node], state)
        if wait:
            self.wait_ready()

    def remove_node(self, name: str) -> None:
        """Takes the machine away and deletes its Node, as a cloud does; its pods go with it."""
        with self._locked():
            state = self.state
            node = state.node(name)
            self._destroy_node(node, state)
            shutil.rmtree(self.paths.root / "machines" / name, ignore_errors=True)
            self._write_state(replace(state, nodes=tuple(other for other in state.nodes if other != node)))

            async def delete(client: Client) -> None:
                await client.delete(f"/api/v1/nodes/{name}")
                # The garbage collector would do so too, a minute later.
                pods = await client.get("/api/v1/pods", fieldSelector=f"spec.nodeName={name}")
                for pod in pods["items"]:
                    path = (
                        f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
                    )
                    await client.delete(path, gracePeriodSeconds="0")

            self.call(delete)

    def reboot_node(self, name: str, *, wait: bool = True, agent: bool = True) -> None:
        """Power off and on: processes, namespaces, bpffs and /run are gone, /var/lib/meshwire and
        /etc/systemd/system stay. Without `agent`, the node's agent is as if it couldn't start: `start_agent`
        does it."""
        programs = binaries.ensure_binaries(report=self._report)
        with self._locked():
            state = self.state
            node = state.node(name)
            self._destroy_node(node, state)
            self._make_node(node, state)
            self._start_nodes(programs, [node], state, agents=agent)
        if wait:
            self.wait_ready()

    # Parts

    def start_agent(self, node: str, **environment: str) -> None:
        """The agent and, where it doesn't run, the userspace WireGuard beside it. With a PYTHONPATH in its
        environment it can be another version than the rest."""
        with self._locked():
            state = self.state
            self._start_mesh(state.node(node), state, **environment)

    def stop_agent(self, node: str, *, kill: bool = False) -> bool:
        """The agent alone, with SIGTERM or SIGKILL; nothing starts it again. Tells whether it ran."""
        return processes.stop(self.paths, f"{self.state.node(node).name}.agent", kill=kill)

    def restart_agent(self, node: str) -> None:
        self.stop_agent(node)
        self.start_agent(node)

    def start_operator(self) -> None:
        with self._locked():
            self._start_operator(self.state)

    def stop_operator(self, *, kill: bool = False) -> bool:
        return processes.stop(self.paths, "operator", kill=kill)

    def stop_apiserver(self) -> bool:
        """At once: it would take a minute to say goodbye to everybody who watches."""
        return processes.stop(self.paths, "apiserver", kill=True)

    def start_apiserver(self, *, wait_seconds: float = 60) -> None:
        programs = binaries.ensure_binaries(report=self._report)
        state = self.state
        self._spawn_control(
            state, "apiserver", controlplane.apiserver_command(programs, self.paths, state.settings)
        )
        self._wait_for_api(wait_seconds)

    # Use

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """What kubectl prints."""
        programs = binaries.ensure_binaries(report=self._report)
        return self._kubectl(programs, *arguments, stdin=stdin, check=check)

    def apply(self, *objects: Object) -> None:
        """kubectl apply."""
        self.kubectl("apply", "-f", "-", stdin=documents(objects))

    def get(self, *arguments: str) -> Object:
        """kubectl get ... as an object."""
        answer: Object = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return answer

    def find_pod(self, pod: str, namespace: str = "default") -> PodRecord:
        """Works without the API server."""
        for path in self.paths.root.glob(f"machines/*/pods/{namespace}_{pod}.json"):
            with contextlib.suppress(FileNotFoundError):
                raw = json.loads(path.read_text())
                if raw["pid"]:
                    addresses = tuple(raw["addresses"])
                    return PodRecord(namespace, pod, raw["node"], raw["netns"], addresses, raw["pid"])
        raise LabError(f"no pod {namespace}/{pod} runs in the lab")

    def exec_command(self, pod: str, command: Sequence[str], namespace: str = "default") -> list[str]:
        """What to run to have `command` run inside of a pod."""
        record = self.find_pod(pod, namespace)
        return ["nsenter", f"--target={record.pid}", "--net", "--mount", "--uts", "--", *command]

    def exec(
        self,
        pod: str,
        *command: str,
        namespace: str = "default",
        check: bool = True,
        timeout: float | None = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in a pod and waits for it (`timeout` seconds)."""
        env = self.pod_environment(pod, namespace)
        return _run(self.exec_command(pod, command, namespace), env, check=check, timeout=timeout)

    def popen(self, pod: str, *command: str, namespace: str = "default") -> subprocess.Popen[str]:
        """Starts a command in a pod; its output can be read from the result."""
        return subprocess.Popen(
            self.exec_command(pod, command, namespace),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.pod_environment(pod, namespace),
        )

    def node_command(self, node: str, command: Sequence[str]) -> list[str]:
        """What to run to have `command` run on a node, in its network and mount namespace."""
        return [*self._enter_node(self.state.node(node)), *command]

    def on_node(
        self, node: str, *command: str, check: bool = True, timeout: float | None = 60
    ) -> subprocess.CompletedProcess[str]:
        return _run(self.node_command(node, command), self.environment(), check=check, timeout=timeout)

    def pod_environment(self, pod: str, namespace: str = "default") -> dict[str, str]:
        """For a command in a pod: that of its container."""
        pid = self.find_pod(pod, namespace).pid
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
        env = dict(line.split("=", 1) for line in lines if "=" in line)
        # `down` ends what carries it; this command belongs to whoever runs it.
        env.pop(processes.MARK, None)
        return env

    def environment(self) -> dict[str, str]:
        """For a command on a node."""
        env = processes.environment("")
        del env[processes.MARK]
        return env

    def call(self, function: Callable[[Client], Coroutine[Any, Any, Result]]) -> Result:
        """Runs `function` with an administrator's client, on an event loop of its own: callers may have one
        too."""

        async def run() -> Result:
            async with Client(read_kubeconfig(self.kubeconfig)) as client:
                return await function(client)

        results: list[Result] = []
        errors: list[BaseException] = []

        def target() -> None:
            try:
                results.append(asyncio.run(run()))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def capture(self, path: Path) -> Capture:
        """A recording of everything on the wire, to be used as a context manager."""
        networks = [PODS[family] for family in self.state.settings.families]
        return Capture(path, lab_id=self.state.lab_id, pods=networks)

    # How

    def _check_names_are_free(self, settings: Settings) -> None:
        wanted = {CONTROL_NETNS, UNDERLAY_NETNS, *(f"mw-node{i}" for i in range(1, settings.nodes + 1))}
        if taken := wanted & set(network.list_netns()):
            raise LabError(
                f"network namespaces {', '.join(sorted(taken))} are there, but no lab is in"
                f" {self.paths.root}: is another one up? (MESHWIRE_LAB_DIR)"
            )

    def _begin(self, settings: Settings) -> State:
        made_mount = not network.is_mount_point(network.NETNS_DIRECTORY)
        state = State(
            lab_id=secrets.token_hex(8),
            settings=settings,
            api_port=_free_port(),
            nodes=tuple(Node(f"node{index}", index) for index in range(1, settings.nodes + 1)),
            made_directories=_missing(network.NETNS_DIRECTORY, network.NODE_STATE, init.SYSTEMD),
            made_netns_mount=made_mount,
        )
        self._write_state(state)
        # It may have been there, empty, with other rights; private keys are going to be in it.
        self.paths.root.chmod(0o700)
        for directory in (self.paths.pki, self.paths.logs, self.paths.processes):
            directory.mkdir()
        for directory in (network.NODE_STATE, init.SYSTEMD):
            directory.mkdir(parents=True, exist_ok=True)
        return state

    def _start_control_plane(self, programs: Path, state: State) -> None:
        settings = state.settings
        controlplane.make_credentials(self.paths, settings, state.api_port)
        network.make_underlay(settings)
        network.make_control(settings)
        if settings.audit:
            self.paths.audit_policy.write_text(controlplane.audit_policy())
        self._spawn_control(state, "etcd", controlplane.etcd_command(programs, self.paths))
        self._spawn_control(
            state, "apiserver", controlplane.apiserver_command(programs, self.paths, settings)
        )
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", state.api_port))
            listener.listen(128)
            command = [
                *_python("meshwire.lab.control"),
                f"--state={self.paths.root}",
                f"--fd={listener.fileno()}",
            ]
            self._spawn_control(state, "control", command, pass_fds=(listener.fileno(),))

    def _start_controllers(self, programs: Path, state: State) -> None:
        for component, command in (
            (
                "controller-manager",
                controlplane.controller_manager_command(programs, self.paths, state.settings),
            ),
            ("scheduler", controlplane.scheduler_command(programs, self.paths)),
        ):
            if not self.pid(component):
                self._spawn_control(state, component, command)

    def _spawn_control(
        self, state: State, component: str, command: Sequence[str], pass_fds: Sequence[int] = (), **env: str
    ) -> None:
        processes.start(
            self.paths,
            component,
            command,
            env=processes.environment(state.lab_id, **env),
            prefix=processes.in_namespaces(CONTROL_NETNS),
            pass_fds=pass_fds,
        )

    def _make_node(self, node: Node, state: State) -> None:
        controlplane.make_node_credentials(self.paths, state.settings, node)
        network.make_node(node, state.settings, self.paths, state.lab_id)
        ran = init.boot(self.paths.units(node.name), self._enter_node(node), self.environment())
        if ran:
            self._report(f"{node.name} booted: {', '.join(ran)}")

    def _start_nodes(
        self, programs: Path, nodes: Sequence[Node], state: State, *, agents: bool = True
    ) -> None:
        tainted = ["--tainted"] if state.settings.mesh else []
        for node in nodes:
            env = processes.environment(state.lab_id)
            command = [*_python("meshwire.lab.node"), f"--state={self.paths.root}", *tainted, node.name]
            enter = processes.in_namespaces(node.netns)
            processes.start(self.paths, f"{node.name}.node", command, env=env, prefix=enter)
            configuration = self.paths.root / "machines" / node.name / "kube-proxy.yaml"
            configuration.write_text(controlplane.proxy_configuration(self.paths, state.settings, node))
            proxy = controlplane.proxy_command(programs, configuration)
            processes.start(self.paths, f"{node.name}.proxy", proxy, env=env, prefix=self._enter_node(node))
        if state.settings.mesh and agents:
            # Each waits for its node's token: by now all nodes are on their way to one.
            for node in nodes:
                self._start_mesh(node, state)

    def _enter_node(self, node: Node) -> list[str]:
        holder = self.pid(f"{node.name}.holder")
        if holder is None:
            raise LabError(
                f"{node.name} is down: its namespaces are gone (`meshwire lab node reboot {node.name}`)"
            )
        return processes.in_namespaces(node.netns, mounts_of=holder)

    def _start_mesh(self, node: Node, state: State, **environment: str) -> None:
        token = self.paths.token_directory(node.name) / "token"
        _wait_for_file(token, f"{node.name} gets no token; see `meshwire lab logs {node.name}.node`")
        on_node = self._enter_node(node)
        env = controlplane.pod_environment(
            state.settings,
            NODE_NAME=node.name,
            POD_NAME=f"agent-{node.name}",
            # What the component `bootguard` mounts.
            MESHWIRE_SYSTEMD_DIR=str(init.SYSTEMD),
            MESHWIRE_HOST_USR="/usr",
        )
        env = processes.environment(state.lab_id, **env) | environment
        if not self.pid(f"{node.name}.wireguard"):
            command = _python("meshwire.agent.userspace")
            processes.start(self.paths, f"{node.name}.wireguard", command, env=env, prefix=on_node)
        processes.start(self.paths, f"{node.name}.agent", _python("meshwire.agent"), env=env, prefix=on_node)

    def _start_operator(self, state: State) -> None:
        token = self.paths.token_directory(CONTROL) / "token"
        _wait_for_file(token, "the operator gets no token; see `meshwire lab logs control`")
        enter = processes.in_namespaces(CONTROL_NETNS)
        # A /run of its own, where the service account is.
        script = 'mount --bind "$1" /run && shift && exec "$@"'
        run = str(self.paths.run(CONTROL))
        enter += [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "--",
            "sh",
            "-c",
            script,
            "operator",
            run,
        ]
        env = controlplane.pod_environment(state.settings, POD_NAME=f"operator-{secrets.token_hex(4)}")
        env = processes.environment(state.lab_id, **env)
        processes.start(self.paths, "operator", _python("meshwire.operator"), env=env, prefix=enter)

    def _destroy_node(self, node: Node, state: State) -> None:
        for part in ("node", "agent", "wireguard", "proxy"):
            processes.stop(self.paths, f"{node.name}.{part}", kill=True)
        for record in self.paths.pods(node.name).glob("*.json"):
            pod = json.loads(record.read_text())
            processes.kill_all(network.pids_in(pod["netns"]))
            if not pod["hostNetwork"]:
                network.delete_netns(pod["netns"])
            record.unlink()
        processes.stop(self.paths, f"{node.name}.holder", kill=True)
        processes.kill_all(network.pids_in(node.netns))
        network.unplug(node.name)
        network.delete_netns(node.netns)
        shutil.rmtree(self.paths.run(node.name), ignore_errors=True)
        if not state.settings.node_cidr:
            cni.ClusterPool(self.paths.pool, state.settings.families).release_all(node.name)

    def _apply_manifests(self, programs: Path) -> None:
        for directory in (SOURCE / "crds", SOURCE / "config/access"):
            self._kubectl(programs, "apply", "-k", str(directory))
        self._kubectl(
            programs,
            "wait",
            "--for=condition=Established",
            f"--timeout={60 * PATIENCE:.0f}s",
            "crd",
            "--all",
        )

    def _apply_bootstrap(self, state: State) -> None:
        async def create(client: Client) -> None:
            for item in controlplane.bootstrap_objects(state.settings):
                metadata = item["metadata"]
                group = "/api/v1" if item["apiVersion"] == "v1" else f"/apis/{item['apiVersion']}"
                scope = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
                path = f"{group}{scope}/{item['kind'].lower()}s/{metadata['name'].replace(':', '%3A')}"
                await client.apply(path, item, manager="meshwire-lab")

        async def is_done(client: Client) -> str:
            # kube-system is made by the API server itself, soon after it has become ready.
            try:
                await create(client)
            except ApiError as error:
                return str(error)
            return ""

        self._wait(is_done, 30)

    def _kubectl(self, programs: Path, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        command = [str(programs / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        return _run(command, None, check=check, stdin=stdin).stdout

    def _wait_for_api(self, seconds: float) -> None:
        self._report("waiting for the API server")

        async def is_done(client: Client) -> str:
            # Ready is 200 and the text "ok"; not ready is a refusal.
            with contextlib.suppress(json.JSONDecodeError):
                await client.get("/readyz")
            return ""

        self._wait(is_done, seconds)

    def _wait(self, is_done: Callable[[Client], Coroutine[Any, Any, str]], seconds: float) -> None:
        """Until `is_done` gives no reason to wait any longer."""

        async def wait(client: Client) -> None:
            deadline = time.monotonic() + seconds * PATIENCE
            while True:
                try:
                    problem = await is_done(client)
                except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                    problem = f"the API server doesn't answer: {error or type(error).__name__}"
                if not problem:
                    return
                dead = [component.name for component in self.components() if not component.running]
                if dead:
                    raise LabError(f"{', '.join(dead)} ended: {self._tails(dead)}")
                if time.monotonic() > deadline:
                    raise LabError(
                        f"after {seconds * PATIENCE:.0f} s {problem}; logs are in {self.paths.logs}"
                    )
                await asyncio.sleep(0.1)

        self.call(wait)

    def _tails(self, components: Sequence[str]) -> str:
        return "\n".join(self.paths.log(name).read_text(errors="replace")[-1500:] for name in components)

    def _write_state(self, state: State) -> None:
        write_private(self.paths.state, state.to_json().encode())

    def _remove_state(self, state: State) -> None:
        for entry in self.paths.root.iterdir():
            # The directory itself may be a mount point, and the lock is ours until the end.
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != self.paths.lock:
                entry.unlink()
        self.paths.lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.paths.root.rmdir()
        if state.made_netns_mount:
            network.unmount_netns_directory()
        network.remove_directories(state.made_directories)

    @contextmanager
    def _locked(self, *, new: bool = False) -> Iterator[None]:
        """One command at a time changes a lab."""
        if new:
            self.paths.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        elif not self.is_up:
            raise LabError("no lab is up: `meshwire lab up` brings one up")
        with self.paths.lock.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LabError("another command is changing this lab") from None
            yield


def check_tools() -> None:
    """Raises LabError naming what the lab needs and this machine hasn't."""
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces and devices: run it as root")
    needed = {
        "ip": "iproute2",
        "bridge": "iproute2",
        "nft": "nftables",
        "nsenter": "util-linux",
        "unshare": "util-linux",
    }
    path = processes.environment("")["PATH"]
    if missing := sorted({package for tool, package in needed.items() if not shutil.which(tool, path=path)}):
        raise LabError(f"the lab needs {', '.join(missing)}: install with your package manager")


def _run(
    command: Sequence[str],
    env: Mapping[str, str] | None,
    *,
    check: bool,
    stdin: str | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    try:
        result = subprocess.run(
            command, input=stdin or "", capture_output=True, text=True, env=env, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(command)}: no end after {timeout:.0f} s\n{error.stderr!r}") from None
    if check and result.returncode:
        raise LabError(
            f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr.strip()}\n{result.stdout}"
        )
    return result


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _boot_id(node: Object) -> str:
    return str(node.get("status", {}).get("nodeInfo", {}).get("bootID", ""))


def _free_port() -> int:
    """The first from FIRST_PORT on that nobody listens on."""
    for port in range(FIRST_PORT, FIRST_PORT + 1000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise LabError(f"no free port on 127.0.0.1 from {FIRST_PORT} on")


def _missing(*directories: Path) -> tuple[str, ...]:
    """Those of the directories and their parents that don't exist, parents first."""
    found = [
        path for directory in directories for path in (directory, *directory.parents) if not path.exists()
    ]
    return tuple(sorted({str(path) for path in found}))


def _wait_for_file(path: Path, problem: str, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds * PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise LabError(problem)
        time.sleep(0.05)


def documents(objects: Iterable[Object]) -> str:
    """What kubectl reads. Each is JSON: readers of YAML differ in what is a string, `y` is one to PyYAML and
    true to kubectl."""
    return "\n---\n".join(json.dumps(item) for item in objects)
