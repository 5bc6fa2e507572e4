"""The runtime part of a node: one worker per pod gives it a network namespace, runs its first container's
command from the host's file system, reports, and cleans up."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import os
import re
import secrets
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp

from meshwire.kube.client import ApiError, Client, Object
from meshwire.lab import cni, network, processes, tokens
from meshwire.lab.files import write_private
from meshwire.lab.model import Address, LabError, Node, Paths, Settings, api_service_address, pod_netns

STRATEGIC_MERGE_PATCH: Final = "application/strategic-merge-patch+json"
FIRST_BACKOFF_SECONDS: Final = 0.2
LAST_BACKOFF_SECONDS: Final = 10.0
RETRY_SECONDS: Final = 0.5
PROBE_SECONDS: Final = 0.1
MAX_GRACE_SECONDS: Final = 30.0

logger = logging.getLogger(__name__)


class InvalidPod(Exception):
    """The lab can't run this pod; `reason` is for its container's status."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Pool(Protocol):
    def allocate(self, owner: str) -> tuple[Address, ...]: ...

    def release(self, addresses: Sequence[Address]) -> None: ...


@dataclass(frozen=True, slots=True)
class Machine:
    """What the workers of one node share."""

    node: Node
    settings: Settings
    paths: Paths
    lab_id: str
    client: Client
    """Acts as the node's kubelet."""
    pool: Callable[[], Awaitable[Pool]]
    """Waits until the node has a pod CIDR."""
    holder_pid: int

    @property
    def addresses(self) -> tuple[Address, ...]:
        return self.node.addresses(self.settings.families)


def pod_key(pod: Object) -> str:
    """Also the name of the pod's files: no namespace has an underscore."""
    return f"{pod['metadata']['namespace']}_{pod['metadata']['name']}"


def expand(text: str, env: Mapping[str, str]) -> str:
    """$(NAME) as in a container's command: unknown names stay, $$ is a dollar."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)", value, text)


def container_environment(
    pod: Object, node: Node, addresses: Sequence[Address], host: Address
) -> dict[str, str]:
    """The container's own `env`. Raises InvalidPod for sources the lab doesn't have."""
    metadata = pod["metadata"]
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": node.name,
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.hostIP": str(host),
        "status.podIP": str(addresses[0]),
        "status.podIPs": ",".join(map(str, addresses)),
    }
    env: dict[str, str] = {}
    for item in pod["spec"]["containers"][0].get("env", ()):
        if "valueFrom" not in item:
            env[item["name"]] = expand(item.get("value", ""), env)
            continue
        path = item["valueFrom"].get("fieldRef", {}).get("fieldPath")
        if path not in fields:
            raise InvalidPod(
                "CreateContainerConfigError",
                f"env {item['name']}: the lab knows fieldRef only, not this one",
            )
        env[item["name"]] = fields[path]
    return env


def container_command(pod: Object, env: Mapping[str, str]) -> list[str]:
    """Raises InvalidPod."""
    container = pod["spec"]["containers"][0]
    command = [*container.get("command", ()), *container.get("args", ())]
    if not container.get("command"):
        raise InvalidPod(
            "CreateContainerError", "the lab runs commands of the host, not images: give it a `command`"
        )
    return [expand(part, env) for part in command]


def hosts_file(name: str, addresses: Sequence[Address]) -> str:
    """As kubelet writes it."""
    lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{address} {name}" for address in addresses)]
    return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a pod has come."""

    phase: str = "Pending"
    addresses: tuple[Address, ...] = ()
    ready: bool = False
    restarts: int = 0
    state: Mapping[str, Any] = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last_state: Mapping[str, Any] = field(default_factory=dict)


def pod_status(
    pod: Object, progress: Progress, host_addresses: Sequence[Address], started: str, now: str
) -> Object:
    """The status a kubelet would report. Times are RFC 3339."""
    old = {item["type"]: item for item in pod.get("status", {}).get("conditions", ())}
    finished = progress.phase in ("Succeeded", "Failed")

    def condition(kind: str, holds: bool) -> Object:
        status = str(holds)
        changed = (
            now if old.get(kind, {}).get("status") != status else old[kind].get("lastTransitionTime", now)
        )
        reason = {"reason": "PodCompleted"} if finished and not holds else {}
        return {"type": kind, "status": status, "lastTransitionTime": changed, **reason}

    status: Object = {
        "phase": progress.phase,
        "startTime": started,
        "hostIP": str(host_addresses[0]),
        "hostIPs": [{"ip": str(address)} for address in host_addresses],
        "conditions": [
            condition("PodReadyToStartContainers", bool(progress.addresses) and not finished),
            condition("Initialized", True),
            condition("ContainersReady", progress.ready),
            condition("Ready", progress.ready),
        ],
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container.get("image", ""),
                "imageID": "",
                "ready": progress.ready and number == 0,
                "started": "running" in progress.state and number == 0,
                "restartCount": progress.restarts if number == 0 else 0,
                # The lab runs a pod's first container.
                "state": dict(progress.state) if number == 0 else {"waiting": {"reason": "NotRunInLab"}},
                "lastState": dict(progress.last_state) if number == 0 else {},
            }
            for number, container in enumerate(pod["spec"]["containers"])
        ],
    }
    if progress.addresses:
        status["podIP"] = str(progress.addresses[0])
        status["podIPs"] = [{"ip": str(address)} for address in progress.addresses]
    return status


def is_ready(item: Object) -> bool:
    """Of a pod or a node."""
    conditions = item.get("status", {}).get("conditions", ())
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


START_POD: Final = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mkdir -p "$2" "$3"
mount --bind "$2" "$3"
if [ "$4" = pod ]; then
  mount -t sysfs sysfs /sys
  [ ! -f /etc/hosts ] || mount --bind /run/hosts /etc/hosts
  [ ! -f /etc/resolv.conf ] || mount --bind /run/resolv.conf /etc/resolv.conf
fi
cd "$5"
shift 5
exec "$@"
"""
"""A container of the lab has a host name, a /run and name resolution of its own; one on the host's network
only a host name and its service account."""


class Worker:
    """One pod's life, from the moment it is bound to the node to the confirmation of its deletion."""

    def __init__(self, machine: Machine, pod: Object, previous: asyncio.Task[None] | None) -> None:
        self._machine = machine
        self._pod = pod
        self._previous = previous
        self._changed = asyncio.Event()
        self._gone = False
        self._started = _now()
        self._progress: Progress | None = None
        self._reporting = asyncio.Lock()
        self._correction: asyncio.Task[None] | None = None
        self._metadata = pod["metadata"]
        self._path = f"/api/v1/namespaces/{self._metadata['namespace']}/pods/{self._metadata['name']}"
        self._host_network = bool(pod["spec"].get("hostNetwork"))
        self._netns = (
            machine.node.netns
            if self._host_network
            else pod_netns(machine.node.name, self._metadata["namespace"], self._metadata["name"])
        )
        self._record = machine.paths.pods(machine.node.name) / f"{pod_key(pod)}.json"
        self._run_directory = machine.paths.pod_run(machine.node.name) / pod_key(pod)
        self.task = asyncio.create_task(self._run())

    @property
    def uid(self) -> str:
        return str(self._metadata["uid"])

    def update(self, pod: Object) -> None:
        self._pod = pod
        self._changed.set()
        # The node controller marks all pods of a node whose lease was late, and only its kubelet can take
        # that back.
        if self._progress and not self._leaving and is_ready(pod) != self._progress.ready:
            if not self._correction or self._correction.done():
                self._correction = asyncio.create_task(self._report(self._progress))

    def forget(self) -> None:
        """The pod is gone from the API server: nothing is left to confirm."""
        self._gone = True
        self._changed.set()

    @property
    def _leaving(self) -> bool:
        return self._gone or "deletionTimestamp" in self._pod["metadata"]

    async def _run(self) -> None:
        # A StatefulSet's next pod has the name of the one that is just ending.
        if self._previous:
            await asyncio.wait([self._previous])
        if not self._leaving and self._pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
            await self._live()
        await self._until(lambda: self._leaving)
        if not self._gone:
            await self._confirm()

    async def _live(self) -> None:
        addresses: tuple[Address, ...] = ()
        pool: Pool | None = None
        try:
            while not self._leaving:
                try:
                    if self._host_network:
                        addresses = self._machine.addresses
                    else:
                        if not pool:
                            pool = await self._machine.pool()
                        addresses = addresses or pool.allocate(self._machine.node.name)
                        await self._attach(addresses)
                    break
                except LabError as error:
                    logger.warning("%s: no network: %s", pod_key(self._pod), error)
                    await self._report(Progress(state=_waiting("FailedCreatePodSandBox", str(error))))
                    await self._pause(RETRY_SECONDS)
            if not self._leaving:
                await self._run_container(addresses)
        finally:
            if not self._host_network:
                await self._detach()
            if pool and addresses:
                pool.release(addresses)
            shutil.rmtree(self._run_directory, ignore_errors=True)
            self._record.unlink(missing_ok=True)

    async def _attach(self, addresses: tuple[Address, ...]) -> None:
        # The record first: it is what a later process cleans up by.
        self._write_record(addresses, None)
        await self._detach()
        await cni.run(["ip", "netns", "add", self._netns])
        commands = cni.pod_device_commands(
            f"veth{secrets.token_hex(4)}",
            self._netns,
            f"{self._metadata['namespace']}/{self._metadata['name']}",
            addresses,
            self._machine.addresses,
            self._machine.settings.pod_mtu,
        )
        await cni.batch(commands)
        await cni.batch(cni.pod_commands(addresses), netns=self._netns)

    async def _detach(self) -> None:
        if not (network.NETNS_DIRECTORY / self._netns).exists():
            return
        processes.kill_all(network.pids_in(self._netns))
        # The device goes with the namespace, but only at the kernel's leisure; its routes shouldn't stay so
        # long.
        await cni.run(["ip", "-n", self._netns, "link", "delete", "eth0"], check=False)
        await cni.run(["ip", "netns", "delete", self._netns], check=False)

    async def _run_container(self, addresses: tuple[Address, ...]) -> None:
        progress = Progress(addresses=addresses)
        backoff = FIRST_BACKOFF_SECONDS
        while not self._leaving:
            try:
                process = await self._start(addresses)
            except InvalidPod as error:
                await self._report(Progress(addresses=addresses, state=_waiting(error.reason, str(error))))
                await self._until(lambda: self._leaving)
                return
            began, began_at = asyncio.get_running_loop().time(), _now()
            self._write_record(addresses, process.pid)
            progress = Progress(
                phase="Running",
                addresses=addresses,
                ready=not self._probed_port(),
                restarts=progress.restarts,
                state={"running": {"startedAt": began_at}},
                last_state=progress.last_state,
            )
            code = await self._supervise(process, progress)
            ended = {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}}
            ended["terminated"] |= {"startedAt": began_at, "finishedAt": _now()}
            policy = self._pod["spec"].get("restartPolicy", "Always")
            if self._leaving or policy == "Never" or (policy == "OnFailure" and code == 0):
                phase = "Succeeded" if code == 0 else "Failed"
                await self._report(
                    Progress(phase=phase, addresses=addresses, restarts=progress.restarts, state=ended)
                )
                return
            if asyncio.get_running_loop().time() - began > LAST_BACKOFF_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            progress = Progress(
                phase="Running",
                addresses=addresses,
                restarts=progress.restarts + 1,
                state=_waiting("CrashLoopBackOff", f"restarts in {backoff:g} s"),
                last_state=ended,
            )
            await self._report(progress)
            await self._pause(backoff)
            backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)

    async def _start(self, addresses: tuple[Address, ...]) -> asyncio.subprocess.Process:
        machine, spec = self._machine, self._pod["spec"]
        env = processes.environment(
            machine.lab_id,
            HOSTNAME=machine.node.name if self._host_network else self._metadata["name"],
            KUBERNETES_SERVICE_HOST=str(api_service_address(machine.settings.families[0])),
            KUBERNETES_SERVICE_PORT="443",
        )
        env |= container_environment(self._pod, machine.node, addresses, machine.addresses[0])
        command = container_command(self._pod, env)
        run = self._run_directory
        if spec.get("automountServiceAccountToken", True) is not False:
            await self._fetch_token(run / "secrets/kubernetes.io/serviceaccount")
        write_private(run / "hosts", hosts_file(self._metadata["name"], addresses).encode())
        # There is no name server, and asking none fails at once where asking the host's would take seconds.
        write_private(run / "resolv.conf", b"options attempts:1 timeout:1\n")
        log = machine.paths.logs / "pods" / f"{pod_key(self._pod)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # The holder's mounts for the host's network, our own (the host's) for the others.
        source, target = (run / "secrets", "/run/secrets") if self._host_network else (run, "/run")
        prefix = [
            *processes.in_namespaces(
                self._netns, mounts_of=machine.holder_pid if self._host_network else None
            ),
            *("unshare", "--mount", "--uts", "--propagation", "private", "--", "sh", "-c", START_POD, "pod"),
            *(env["HOSTNAME"], str(source), target, "host" if self._host_network else "pod"),
            spec["containers"][0].get("workingDir", "/"),
        ]
        with log.open("ab") as stream:
            return await asyncio.create_subprocess_exec(
                *prefix,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=env,
                cwd="/",
                start_new_session=True,
            )

    async def _fetch_token(self, directory: Path) -> None:
        reference = {"kind": "Pod", "apiVersion": "v1", "name": self._metadata["name"], "uid": self.uid}
        while not self._leaving:
            try:
                await tokens.write_token(
                    self._machine.client,
                    directory,
                    account=self._pod["spec"].get("serviceAccountName", "default"),
                    namespace=self._metadata["namespace"],
                    authority=self._machine.paths.pki / "ca.crt",
                    bound_to=reference,
                )
                return
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.info("%s: no token yet: %s", pod_key(self._pod), error)
                # A restarted container goes on with the token it had.
                if (directory / "token").exists():
                    return
                await self._pause(RETRY_SECONDS)

    async def _supervise(self, process: asyncio.subprocess.Process, progress: Progress) -> int:
        """Until the process ends, by itself or because the pod is deleted; its exit code as a shell would
        give it."""
        waiter = asyncio.create_task(process.wait())
        reporter = asyncio.create_task(self._report_running(progress))
        leaving = asyncio.create_task(self._until(lambda: self._leaving))
        try:
            await asyncio.wait([waiter, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not waiter.done():
                _signal_group(process.pid, signal.SIGTERM)
                await asyncio.wait([waiter], timeout=self._grace_seconds())
        finally:
            # What the command left behind ends with it, as in a container.
            _signal_group(process.pid, signal.SIGKILL)
            if not self._host_network:
                processes.kill_all(network.pids_in(self._netns))
            for task in (reporter, leaving):
                task.cancel()
        code = await waiter
        return 128 - code if code < 0 else code

    async def _report_running(self, progress: Progress) -> None:
        await self._report(progress)
        if not (port := self._probed_port()):
            return
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    _, writer = await asyncio.open_connection(str(progress.addresses[0]), port)
                writer.close()
                break
            await asyncio.sleep(PROBE_SECONDS)
        await self._report(
            Progress(
                phase="Running",
                addresses=progress.addresses,
                ready=True,
                restarts=progress.restarts,
                state=progress.state,
                last_state=progress.last_state,
            )
        )

    def _probed_port(self) -> int | None:
        """Of the readiness probe; the lab knows tcpSocket with a number."""
        probe = self._pod["spec"]["containers"][0].get("readinessProbe", {})
        port = probe.get("tcpSocket", {}).get("port")
        return port if isinstance(port, int) else None

    def _grace_seconds(self) -> float:
        if self._gone:
            return 0.0
        asked = self._pod["metadata"].get("deletionGracePeriodSeconds", MAX_GRACE_SECONDS)
        return min(float(asked), MAX_GRACE_SECONDS)

    async def _report(self, progress: Progress) -> None:
        """Until the API server has taken it, or the pod is gone."""
        self._progress = progress
        async with self._reporting:
            await self._report_latest()

    async def _report_latest(self) -> None:
        while not self._gone and self._progress:
            status = pod_status(self._pod, self._progress, self._machine.addresses, self._started, _now())
            if "podIPs" in status:
                # After a reboot it has others, which would be added to those it had.
                status["podIPs"] = [{"$patch": "replace"}, *status["podIPs"]]
            # Another pod of the same name is refused as a conflict.
            body = {"metadata": {"uid": self.uid}, "status": status}
            try:
                self._pod = await self._machine.client.patch(
                    f"{self._path}/status", body, content_type=STRATEGIC_MERGE_PATCH
                )
                return
            except ApiError as error:
                if error.status in (404, 409):
                    return
                logger.warning("%s: status refused: %s", pod_key(self._pod), error)
            except (aiohttp.ClientError, TimeoutError):
                pass
            await self._pause(RETRY_SECONDS)

    async def _confirm(self) -> None:
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        while not self._gone:
            try:
                await self._machine.client.request("DELETE", self._path, body=body)
                return
            except ApiError as error:
                if error.status in (404, 409):
                    return
                logger.warning("%s: deletion refused: %s", pod_key(self._pod), error)
            except (aiohttp.ClientError, TimeoutError):
                pass
            await self._pause(RETRY_SECONDS)

    def _write_record(self, addresses: tuple[Address, ...], pid: int | None) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "namespace": self._metadata["namespace"],
            "name": self._metadata["name"],
            "node": self._machine.node.name,
            "netns": self._netns,
            "addresses": [str(address) for address in addresses],
            "pid": pid,
            "hostNetwork": self._host_network,
        }
        unfinished = self._record.with_suffix(".new")
        unfinished.write_text(json.dumps(record))
        unfinished.rename(self._record)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _pause(self, seconds: float) -> None:
        """Ends early when the pod is to be deleted."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._until(lambda: self._leaving)


def _waiting(reason: str, message: str) -> Mapping[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
