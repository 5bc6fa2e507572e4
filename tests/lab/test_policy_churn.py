"""Policy while everything changes: pods and policies come and go as fast as the API takes them, and agents
are killed. Who is forbidden never gets through once; who is allowed is never refused after the first
success."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from meshwire.kube.client import ApiError, Client, Object
from meshwire.lab import reach
from meshwire.lab.exercise import Exercise

NAMESPACE: Final = "churn"
NODES: Final = ("node1", "node2", "node3")
SECONDS: Final = 45.0
PODS_ALIVE: Final = 20
POLICIES_ALIVE: Final = 5
LIFE: Final = 5.0
"""Seconds that a pod is given at least: enough to start, and to be known to an agent that was away."""
PODS: Final = f"/api/v1/namespaces/{NAMESPACE}/pods"
POLICIES: Final = f"/apis/meshwire.dev/v1alpha1/namespaces/{NAMESPACE}/meshpolicies"
HOSTS: Final = range(2, 60)
"""Last parts of the addresses that pods of the lab get first."""
PATIENCE: Final = 4.0
"""Seconds that a watcher waits for an answer: a packet or two may be lost on a busy machine, and TCP sends
them again."""


def pod(name: str, node: str, role: str, *command: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"role": role}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [
                {"name": "it", "image": "host", "command": ["python", "-m", "meshwire.lab.reach", *command]}
            ],
        },
    }


def policy(name: str, role: str, **sections: Any) -> Object:
    return {
        "apiVersion": "meshwire.dev/v1alpha1",
        "kind": "MeshPolicy",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"endpointSelector": {"matchLabels": {"role": role}}, **sections},
    }


def peers(role: str, port: str) -> list[Object]:
    return [
        {
            "fromEndpoints": [{"matchLabels": {"role": role}}],
            "toPorts": [{"ports": [{"port": port, "protocol": "TCP"}]}],
        }
    ]


class Watcher:
    """A pod's `reach watch`, from outside of its life: what it was answered."""

    def __init__(self, exercise: Exercise, name: str, targets: list[str], patience: float) -> None:
        options = (f"--timeout={patience}", "--attempts=1")
        command = ("python", "-m", "meshwire.lab.reach", "watch", *options, *targets)
        self.process = exercise.lab.popen(name, *command, namespace=NAMESPACE)
        self.answers: list[Object] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.append(json.loads(line))

    def end(self) -> list[Object]:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        return self.answers


@pytest.fixture
def guarded(exercise: Exercise) -> Iterator[Exercise]:
    """Policy on, and servers that only role `friend` may reach."""
    lab = exercise.lab
    exercise.set_policy(True)
    lab.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})

    def has_account() -> bool:
        return bool(lab.kubectl("get", "serviceaccount", "default", "-n", NAMESPACE, check=False))

    try:
        exercise.wait_until(has_account, "the namespace has its service account")
        lab.apply(policy("servers", "server", ingress=peers("friend", "80")))
        lab.apply(
            pod("fixed", "node1", "server", "serve", "--tcp=80"),
            pod("friend", "node2", "friend", "serve", "--tcp=81"),
            pod("stranger", "node3", "stranger", "serve", "--tcp=81"),
            # On the servers' own nodes, too: packets between pods of a node take another way.
            pod("near-stranger", "node1", "stranger", "serve", "--tcp=81"),
        )
        lab.kubectl("wait", "pod", "--all", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=60s")
        exercise.wait_for_policies()
        yield exercise
    finally:
        lab.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s")
        exercise.set_policy(False)


@contextmanager
def killing_agents(exercise: Exercise, chance: random.Random) -> Iterator[list[str]]:
    """One at a time, at random, for a second or so, while the body runs."""
    killed: list[str] = []
    over = threading.Event()

    def work() -> None:
        while not over.wait(chance.uniform(1, 3)):
            node = chance.choice(NODES)
            exercise.lab.stop_agent(node, kill=True)
            killed.append(node)
            over.wait(chance.uniform(0.2, 2))
            exercise.lab.start_agent(node)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def churn(exercise: Exercise, chance: random.Random, targets: list[str]) -> dict[str, tuple[float, float]]:
    """Makes and deletes for SECONDS. Name of each pod made -> from when to when it was meant to be."""
    lives: dict[str, tuple[float, float]] = {}
    client_options = ("watch", f"--timeout={PATIENCE}", "--attempts=1", *targets)

    async def work(client: Client) -> None:
        alive: list[str] = []
        policies: list[str] = []
        number = 0
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            number += 1
            kind = chance.choice(["server", "server", "friend", "stranger"])
            command = ("serve", "--tcp=80") if kind == "server" else client_options
            name, node = f"{kind}-{number}", chance.choice(NODES)
            lives[name] = (time.time(), float("inf"))
            await client.create(PODS, pod(name, node, kind, *command))
            alive.append(name)
            # They add to what friends may, or say again what is so: nothing of it opens the servers.
            ingress = chance.choice([peers("friend", "80"), peers("nobody", "80"), []])
            added = policy(f"policy-{number}", chance.choice(["server", "friend"]), ingress=ingress)
            await client.create(POLICIES, added)
            policies.append(added["metadata"]["name"])
            while len(policies) > POLICIES_ALIVE:
                await client.delete(f"{POLICIES}/{policies.pop(0)}")
            while len(alive) > PODS_ALIVE:
                grown = [name for name in alive if time.time() - lives[name][0] > LIFE]
                if not grown:
                    await asyncio.sleep(0.05)
                    continue
                gone = chance.choice(grown)
                alive.remove(gone)
                lives[gone] = (lives[gone][0], time.time())
                try:
                    await client.delete(f"{PODS}/{gone}", gracePeriodSeconds="0")
                except ApiError as error:
                    if error.status not in (404, 409):
                        raise

    exercise.lab.call(work)
    return lives


def test_churn_lets_nobody_through_and_cuts_nobody_off(guarded: Exercise) -> None:
    lab = guarded.lab
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    fixed = lab.find_pod("fixed", NAMESPACE).addresses
    of_fixed = [reach.format_target("tcp", address, 80) for address in fixed]
    blocks = [cidr for node in lab.get("nodes")["items"] for cidr in node["spec"]["podCIDRs"]]
    # Every address that a server may get, long before there is one.
    ahead = [
        reach.format_target("tcp", cidr.replace(".0/24", f".{host}"), 80)
        for cidr in blocks
        if "." in cidr
        for host in HOSTS
    ]
    watchers = {
        "stranger": Watcher(guarded, "stranger", [*of_fixed, *ahead], 0.5),
        "near-stranger": Watcher(guarded, "near-stranger", [*of_fixed, *ahead], 0.5),
        "friend": Watcher(guarded, "friend", of_fixed, PATIENCE),
    }
    try:
        with killing_agents(guarded, chance) as killed:
            lives = churn(guarded, chance, of_fixed)
    finally:
        found = {name: watcher.end() for name, watcher in watchers.items()}
    logs = {
        path.stem.partition("_")[2]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (lab.paths.logs / "pods").glob(f"{NAMESPACE}_*.log")
        if path.stem.partition("_")[2].startswith(("friend-", "stranger-"))
    }
    assert killed and len(lives) > 20, f"seed {seed}"
    assert found["friend"] and any(answer["reached"] for answer in found["friend"]), f"seed {seed}"
    assert any(answer["reached"] for name in logs if name.startswith("friend-") for answer in logs[name])

    through = [
        (name, answer)
        for name, answers in (found | logs).items()
        if "stranger" in name
        for answer in answers
        if answer["by"] == "fixed" or str(answer["by"]).startswith("server-")
    ]
    assert not through, f"seed {seed}: {through}"
    cut = [
        (name, answer)
        for name, answers in (found | logs).items()
        if name.startswith("friend")
        for answer in after_success(answers)
        if answer["time"] + PATIENCE < lives.get(name, (0, float("inf")))[1]
    ]
    assert not cut, f"seed {seed}: {cut}"


def after_success(answers: list[Object]) -> list[Object]:
    """Refusals of targets that had been reached."""
    reached: set[str] = set()
    refused = []
    for answer in answers:
        if answer["reached"]:
            reached.add(answer["target"])
        elif answer["target"] in reached:
            refused.append(answer)
    return refused


def test_the_watch_sees_what_it_is_there_to_see(guarded: Exercise) -> None:
    """Without the policy strangers get through, and are seen to."""
    fixed = guarded.lab.find_pod("fixed", NAMESPACE).addresses
    watcher = Watcher(
        guarded, "stranger", [reach.format_target("tcp", address, 80) for address in fixed], 0.5
    )
    guarded.wait_until(lambda: bool(watcher.answers), "the stranger has asked")
    guarded.lab.kubectl("delete", "meshpolicy", "servers", "-n", NAMESPACE)
    guarded.wait_until(
        lambda: any(answer["by"] == "fixed" for answer in watcher.answers), "the stranger gets through"
    )
    assert watcher.end()[0]["error"] == "timeout"
