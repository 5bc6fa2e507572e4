"""A node for test_agent_node.py: the real agent, in a network and mount namespace of its own, with an API
server that is the test. Reads one JSON object a line from standard input, answers each with one.

{"say": {...}}    what the API server has now: {"phase", "mode", "others": [[name, number, octet, has_key]],
"uplinks"} {"tell": null}    {"applied": actions since the last question, "status": MeshNode.status, "looks":
number} {"see": null}     what the kernel has, read anew {"restart": null} ends the agent and starts another,
as a new process would"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from hashlib import sha256
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from meshwire.agent.daemon import woken_by_kernel
from meshwire.agent.kernel import Kernel
from meshwire.agent.loop import Agent
from meshwire.agent.settings import Settings
from meshwire.agent.watch import World
from meshwire.api import preshared
from meshwire.api.meshconfig import Encryption, MeshConfig, Mode, NetworkSettings, Userspace
from meshwire.api.meshnode import Key, MeshNode, Phase, Spec
from meshwire.encryption import keys
from meshwire.encryption import plan as plans
from meshwire.encryption.model import ClusterNode, HeldKey, Member, SecretKey


def secret(name: str) -> SecretKey:
    return SecretKey(sha256(name.encode()).digest())


EPOCH_SECRET = secret("epoch")


def member(name: str, number: int, octet: int, *, has_key: bool, phase: Phase) -> Member:
    digest = preshared.digest(EPOCH_SECRET.reveal(), 1)
    key = Key(epoch=1, public_key=keys.public_key(secret(name)), secret_digest=digest)
    return Member(
        name=name,
        uid=name,
        created=f"2026-01-01T00:00:{number:02}Z",
        generation=1,
        spec=Spec(
            id=number,
            addresses=(ip_address(f"198.18.0.{number}"),),
            pod_cidrs=(ip_network(f"10.244.{octet}.0/24"), ip_network(f"fd00:10:244:{octet}::/64")),
            keys=(key,) if has_key and phase is not Phase.OFF else (),
            phase=phase,
            epoch=1,
        ),
    )


class RecordingKernel(Kernel):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.applied: list[str] = []
        self.looks = 0

    def apply(self, action: plans.Action) -> None:
        super().apply(action)
        self.applied.append(f"{type(action).__name__}: {action}")

    def observe(self, *arguments: Any, **keywords: Any) -> Any:
        self.looks += 1
        return super().observe(*arguments, **keywords)


class Api:
    """Takes status writes, and gives the last one back as the API server's."""

    def __init__(self) -> None:
        self.status: dict[str, Any] | None = None

    async def find(self, path: str) -> None:
        return None

    async def create(self, path: str, body: Any) -> None:
        pass

    async def patch(self, path: str, body: Any) -> None:
        self.status = body["status"]


class Node:
    def __init__(self, name: str, number: int, directory: Path) -> None:
        self.name, self.number = name, number
        self.settings = Settings(
            node=name,
            namespace="",
            state_directory=directory,
            pin_directory=Path("/sys/fs/bpf/meshwire"),
            run_directory=directory,
            proc_sys=Path("/proc/sys"),
            metrics_address=("127.0.0.1", 0),
        )
        self.world = World()
        self.api = Api()
        self._running = AsyncExitStack()
        own = secret(name)
        held = HeldKey(1, keys.public_key(own), own, EPOCH_SECRET)
        keys.write_held(self.settings.held_keys_file, {1: held})

    async def start(self) -> None:
        self.kernel = RecordingKernel(self.settings)
        self.agent = Agent(self.settings, self.kernel, self.api, secret("sealing"))  # type: ignore[arg-type]
        self._running.callback(self.agent.close)
        task = asyncio.create_task(self.agent.run("test"))

        async def stop() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._running.push_async_callback(stop)
        self._running.enter_context(woken_by_kernel(self.agent.wake))

    async def answer(self, request: dict[str, Any]) -> Any:
        [(verb, what)] = request.items()
        match verb:
            case "say":
                self._say(**what)
                return {}
            case "tell":
                applied, self.kernel.applied = self.kernel.applied, []
                return {"applied": applied, "status": self.api.status, "looks": self.kernel.looks}
            case "see":
                return await asyncio.get_running_loop().run_in_executor(None, self._see)
            case "stop":
                await self._running.aclose()
                return {}
            case "start":
                await self.start()
                if what:
                    self.agent.follow(self._snapshot)
                return {}

    def _say(
        self,
        phase: str,
        others: Iterable[tuple[str, int, int, bool]],
        mode: str = "Strict",
        uplinks: Iterable[str] = (),
        keepalive: int = 25,
    ) -> None:
        order = Phase(phase)
        own = member(self.name, self.number, self.number, has_key=True, phase=order)
        members = [own, *(member(*other[:3], has_key=other[3], phase=order) for other in others)]
        encryption = Encryption(
            enabled=True, mode=Mode(mode), userspace=Userspace.ALWAYS, keepalive=keepalive
        )
        self.world = World(
            members={each.name: each for each in members},
            nodes={each.name: ClusterNode(name=each.name, ready=True) for each in members},
            config=MeshConfig(encryption=encryption, network=NetworkSettings(uplinks=tuple(uplinks))),
            config_spec={},
        )
        self.agent.follow(self._snapshot)

    def _snapshot(self) -> World:
        if self.api.status is None:
            return self.world
        parsed = MeshNode.from_object({"metadata": {"name": self.name}, "status": self.api.status})
        return replace(self.world, status=parsed.status)

    def _see(self) -> Any:
        kernel = Kernel(self.settings)
        try:
            seen = kernel.observe(Userspace.ALWAYS)
        finally:
            kernel.close()
        return {
            "links": {name: link.index for name, link in seen.links.items()},
            "filters": sorted(f"{each.device} {each.direction}" for each in seen.attachments),
            "devices": {
                name: {
                    peer.public_key: {
                        "endpoint": str(peer.endpoint),
                        "allowed": sorted(map(str, peer.networks)),
                        "keepalive": peer.keepalive,
                        "handshake": peer.handshake,
                        "preshared": peer.preshared_key.reveal().hex() if peer.preshared_key else "",
                    }
                    for peer in state.peers.values()
                }
                for name, state in seen.wireguard.items()
            },
            "pinned": seen.pinned,
            "counters": {
                f"{reason.name} {direction.name}": counter.packets
                for (reason, direction), counter in self.agent.health.metrics.items()
                if counter.packets
            },
        }


def mount_own() -> None:
    """What would be shared with other nodes of this machine."""
    Path("/run/wireguard").mkdir(exist_ok=True)
    for command in (
        "mount -t tmpfs tmpfs /run/wireguard",
        "mount -t sysfs sysfs /sys",
        "mount -t bpf bpf /sys/fs/bpf",
        "ip link set lo up",
    ):
        subprocess.run(command.split(), check=True)


async def serve(name: str, number: int, directory: Path) -> None:
    node = Node(name, number, directory)
    await node.start()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    print(json.dumps({"pid": os.getpid(), "key": keys.public_key(secret(name))}), flush=True)
    while line := await reader.readline():
        print(json.dumps(await node.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    mount_own()
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
