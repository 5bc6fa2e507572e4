"""A node's process: stands in for kubelet (registration, lease, pods) and CNI (routes, pod devices), and
keeps the agent's token. It runs in the node's network namespace and the host's mount namespace.

The kubelet part acts under the node's own identity and within its rights, the network part under one of its
own."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import logging
import platform
from pathlib import Path
from typing import Final

import aiohttp

from meshwire.api import names
from meshwire.kube.client import ApiError, Client, Object, read_kubeconfig
from meshwire.kube.follow import RETRY_SECONDS, follow
from meshwire.lab import cni, network, processes
from meshwire.lab.model import (
    AGENT_ACCOUNT,
    LEASE_RENEWAL_SECONDS,
    NODE_MONITOR_GRACE_SECONDS,
    OVERLAY_DEVICE,
    LabError,
    Node,
    Paths,
    Settings,
    State,
)
from meshwire.lab.pods import Machine, Pool, Worker, is_ready, pod_key
from meshwire.lab.tokens import keep_token

LEASES: Final = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"

logger = logging.getLogger(__name__)


def node_object(node: Node, *, tainted: bool) -> Object:
    """What a kubelet registers."""
    taints = [{"key": names.NOT_READY_TAINT, "effect": "NoSchedule"}] if tainted else []
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": _architecture(),
            },
        },
        "spec": {"taints": taints},
    }


def node_status(node: Node, settings: Settings, version: str, boot: str, now: str) -> Object:
    """What it reports; `version` is the cluster's, `boot` another one after every reboot."""
    size = {"cpu": "32", "memory": "64Gi", "pods": "250", "ephemeral-storage": "100Gi"}
    healthy = {"lastHeartbeatTime": now, "lastTransitionTime": now}
    pressures = ("MemoryPressure", "DiskPressure", "PIDPressure")
    return {
        "addresses": [
            *(
                {"type": "InternalIP", "address": str(address)}
                for address in node.addresses(settings.families)
            ),
            {"type": "Hostname", "address": node.name},
        ],
        "capacity": size,
        "allocatable": size,
        "conditions": [
            *({"type": kind, "status": "False", "reason": "Lab", **healthy} for kind in pressures),
            {"type": "Ready", "status": "True", "reason": "KubeletReady", **healthy},
        ],
        "nodeInfo": {
            "architecture": _architecture(),
            "operatingSystem": "linux",
            "kernelVersion": platform.release(),
            "osImage": "Meshwire lab",
            "kubeletVersion": version,
            "containerRuntimeVersion": "lab://0",
            "machineID": node.name,
            "systemUUID": node.name,
            "bootID": boot,
            "kubeProxyVersion": "",
        },
    }


def boot_id(paths: Paths, node: Node) -> str:
    """Empty where the node is down."""
    holder = processes.find(paths, f"{node.name}.holder")
    return f"{holder.pid}-{holder.started}" if holder else ""


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


class NodeProcess:
    """The node's loops, and what they tell each other."""

    def __init__(
        self, node: Node, state: State, paths: Paths, *, tainted: bool, kubelet: Client, cni_client: Client
    ):
        self._node = node
        self._state = state
        self._settings = state.settings
        self._paths = paths
        self._tainted = tainted
        self._kubelet = kubelet
        self._cni = cni_client
        self._pool: asyncio.Future[Pool] = asyncio.get_running_loop().create_future()
        self._uid: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._nodes: dict[str, Object] = {}
        self._pods: dict[str, Object] = {}
        self._unready = asyncio.Event()
        self._routes_changed = asyncio.Event()

    async def run(self) -> None:
        await self._clean_up()
        await cni.run(["nft", "-f", "-"], cni.masquerade_rules(self._settings.families))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_registered())
            tasks.create_task(self._keep_routes())
            tasks.create_task(self._renew_lease())
            tasks.create_task(self._follow_nodes())
            tasks.create_task(self._follow_own_pods())
            if not self._settings.node_cidr:
                tasks.create_task(self._follow_all_pods())
            if self._settings.mesh:
                tasks.create_task(self._keep_agent_token())

    async def _clean_up(self) -> None:
        """What an earlier process of this node left: its pods are started anew."""
        for record in self._paths.pods(self._node.name).glob("*.json"):
            pod = json.loads(record.read_text())
            if pod["hostNetwork"]:
                processes.kill_all(
                    [pod["pid"]] if pod["pid"] in processes.marked(self._state.lab_id) else []
                )
            else:
                processes.kill_all(network.pids_in(pod["netns"]))
                await cni.run(["ip", "netns", "delete", pod["netns"]], check=False)
            record.unlink()
        if not self._settings.node_cidr:
            pool = cni.ClusterPool(self._paths.pool, self._settings.families)
            pool.release_all(self._node.name)
            self._pool.set_result(pool)
        for family in ("-4", "-6"):
            await cni.run(["ip", family, "route", "flush", "proto", str(cni.ROUTE_PROTOCOL)], check=False)
        await cni.run(["ip", "link", "delete", OVERLAY_DEVICE], check=False)

    async def _keep_registered(self) -> None:
        """Registers the Node, and says that it is ready whenever somebody says it isn't: the node controller
        marks a node whose lease was late, and only its kubelet can take that back."""
        while True:
            try:
                if not self._uid.done():
                    self._uid.set_result(await self._register())
                    logger.info("registered")
                await self._report_status()
                self._unready.clear()
                await self._unready.wait()
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.info("status not reported: %s", error or type(error).__name__)
                await asyncio.sleep(RETRY_SECONDS)

    async def _register(self) -> str:
        """The Node's uid."""
        try:
            node = await self._kubelet.create(
                "/api/v1/nodes", node_object(self._node, tainted=self._tainted)
            )
        except ApiError as error:
            if error.status != 409:
                raise
            node = await self._kubelet.get(f"/api/v1/nodes/{self._node.name}")
        return str(node["metadata"]["uid"])

    async def _report_status(self) -> None:
        version = (await self._kubelet.get("/version"))["gitVersion"]
        await self._kubelet.patch(
            f"/api/v1/nodes/{self._node.name}/status",
            # Not a strategic merge: that takes addresses of one type for one address.
            {
                "status": node_status(
                    self._node, self._settings, version, boot_id(self._paths, self._node), _now()
                )
            },
        )

    async def _renew_lease(self) -> None:
        name = self._node.name
        while True:
            spec = {
                "holderIdentity": name,
                "leaseDurationSeconds": NODE_MONITOR_GRACE_SECONDS,
                "renewTime": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            }
            try:
                async with asyncio.timeout(NODE_MONITOR_GRACE_SECONDS / 2):
                    try:
                        await self._kubelet.patch(f"{LEASES}/{name}", {"spec": spec})
                    except ApiError as error:
                        if error.status != 404:
                            raise
                        metadata = {"name": name, "namespace": "kube-node-lease"}
                        await self._kubelet.create(LEASES, {"metadata": metadata, "spec": spec})
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.info("lease not renewed: %s", error or type(error).__name__)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await asyncio.sleep(LEASE_RENEWAL_SECONDS)

    async def _keep_agent_token(self) -> None:
        await keep_token(
            self._cni,
            self._paths.token_directory(self._node.name),
            account=AGENT_ACCOUNT,
            namespace=names.NAMESPACE,
            authority=self._paths.pki / "ca.crt",
            bound_to={"kind": "Node", "apiVersion": "v1", "name": self._node.name, "uid": await self._uid},
        )

    async def _follow_nodes(self) -> None:
        async for kind, items in follow(self._cni, "/api/v1/nodes", dict):
            if kind == "LISTED":
                self._nodes.clear()
            for item in items:
                name = item["metadata"]["name"]
                self._nodes.pop(name, None)
                if kind != "DELETED":
                    self._nodes[name] = item
            if own := self._nodes.get(self._node.name):
                self._take_own(own)
            self._routes_changed.set()

    def _take_own(self, own: Object) -> None:
        if self._settings.node_cidr and not self._pool.done() and (cidrs := cni.parse_remote(own).pod_cidrs):
            self._pool.set_result(cni.NodePool(cidrs))
        if not is_ready(own):
            self._unready.set()

    async def _follow_all_pods(self) -> None:
        async for kind, items in follow(self._cni, "/api/v1/pods", dict):
            if kind == "LISTED":
                self._pods.clear()
            for item in items:
                self._pods.pop(item["metadata"]["uid"], None)
                if kind != "DELETED":
                    self._pods[item["metadata"]["uid"]] = item
            self._routes_changed.set()

    async def _keep_routes(self) -> None:
        if self._settings.overlay:
            pool = await asyncio.shield(self._pool)
            assert isinstance(pool, cni.NodePool)
            local = self._node.addresses(self._settings.families)[0]
            await cni.batch(cni.overlay_commands(self._node.name, local, pool.cidrs, self._settings))
        applied: tuple[cni.Entry, ...] = ()
        while True:
            await self._routes_changed.wait()
            self._routes_changed.clear()
            wanted = self._plan_routes()
            try:
                await cni.apply(applied, wanted)
                applied = wanted
            except LabError as error:
                # All of it again: what is there already is replaced by itself.
                logger.warning("routes not applied: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                self._routes_changed.set()

    def _plan_routes(self) -> tuple[cni.Entry, ...]:
        others = [cni.parse_remote(node) for name, node in self._nodes.items() if name != self._node.name]
        if self._settings.node_cidr:
            return cni.plan_routes(others, self._settings)
        return cni.plan_pod_routes(cni.pods_elsewhere(self._pods, self._node.name), others)

    async def _follow_own_pods(self) -> None:
        holder = processes.find(self._paths, f"{self._node.name}.holder")
        assert holder
        machine = Machine(
            node=self._node,
            settings=self._settings,
            paths=self._paths,
            lab_id=self._state.lab_id,
            client=self._kubelet,
            pool=lambda: asyncio.shield(self._pool),
            holder_pid=holder.pid,
        )
        workers: dict[str, Worker] = {}
        selector = f"spec.nodeName={self._node.name}"
        async for kind, items in follow(self._kubelet, "/api/v1/pods", dict, fieldSelector=selector):
            if kind == "LISTED":
                listed = {pod["metadata"]["uid"] for pod in items}
                for worker in workers.values():
                    if worker.uid not in listed:
                        worker.forget()
            for pod in items:
                key = pod_key(pod)
                worker_now = workers.get(key)
                is_same = worker_now is not None and worker_now.uid == pod["metadata"]["uid"]
                if kind == "DELETED":
                    if is_same and worker_now:
                        worker_now.forget()
                elif is_same and worker_now:
                    worker_now.update(pod)
                else:
                    if worker_now:
                        worker_now.forget()
                    workers[key] = Worker(machine, pod, worker_now.task if worker_now else None)
                    workers[key].task.add_done_callback(_complain)
            workers = {key: worker for key, worker in workers.items() if not worker.task.done()}


def _complain(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("a pod's worker failed", exc_info=error)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def run(name: str, paths: Paths, *, tainted: bool) -> None:
    state = State.from_json(paths.state.read_text())
    own = read_kubeconfig(paths.kubeconfig_of(f"node-{name}"))
    async with Client(own) as kubelet, Client(read_kubeconfig(paths.kubeconfig_of("cni"))) as cni_client:
        process = NodeProcess(
            state.node(name), state, paths, tainted=tainted, kubelet=kubelet, cni_client=cni_client
        )
        await process.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--tainted", action="store_true", help="register as a node whose agent is not ready")
    parser.add_argument("name")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(run(arguments.name, Paths(arguments.state), tainted=arguments.tainted))


if __name__ == "__main__":
    main()
