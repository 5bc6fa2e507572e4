"""The metrics page and the liveness probe. Prometheus' text format is five lines of code, its client 5
MiB."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from aiohttp import web

from meshwire.agent.loop import RESYNC, Health
from meshwire.agent.pairs import Counts

STUCK: Final = 4 * RESYNC
"""Seconds without a run of the loop after which the agent should be restarted."""


async def serve(health: Health, host: str, port: int) -> web.AppRunner:
    """Listens until the runner is cleaned up. Raises OSError where the port is taken."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text="".join(f"{line}\n" for line in format_metrics(health, time.time())))

    async def healthz(_: web.Request) -> web.Response:
        stuck = health.last_run and time.monotonic() - health.last_run > STUCK
        return web.Response(status=503 if stuck else 200, text="stuck\n" if stuck else "ok\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


def format_metrics(health: Health, now: float) -> Iterator[str]:
    """Lines of the text exposition format; `now` is Unix time in seconds."""
    yield from _counter("meshwire_loop_runs_total", "Runs of the agent's loop.", health.runs)
    yield from _counter("meshwire_apply_errors_total", "Runs that failed.", health.errors)
    yield from _head("meshwire_loop_seconds", "gauge", "How long the last run took.")
    yield f"meshwire_loop_seconds {health.seconds:.6f}"
    for unit in ("packets", "bytes"):
        for part, what, found in (
            ("datapath", "what encryption made of them", health.metrics),
            ("policy", "what policies made of them", health.policy_metrics),
        ):
            name = f"meshwire_{part}_{unit}_total"
            yield from _head(name, "counter", f"{unit.capitalize()} by {what}.")
            for (reason, direction), counter in sorted(found.items()):
                if part == "datapath" and reason.of_policy:
                    continue
                labels = f'reason="{reason.name.lower()}",direction="{direction.name.lower()}"'
                yield f"{name}{{{labels}}} {counter.packets if unit == 'packets' else counter.bytes}"
    for name, text in (
        ("entries", "Entries of the policy programs' maps."),
        ("capacity", "Entries that there is room for."),
        ("left_out", "Entries that there is no room for."),
    ):
        yield from _head(f"meshwire_policy_map_{name}", "gauge", text)
        for map_name, fill in sorted(health.policy_maps.items()):
            yield f'meshwire_policy_map_{name}{{map="{map_name}"}} {getattr(fill, name)}'
    yield from _head(
        "meshwire_policy_closed_pods", "gauge", "Pods that get and send nothing, for want of room."
    )
    yield f"meshwire_policy_closed_pods {health.policy_closed_pods}"
    yield from _format_pairs(health.pairs)
    if health.boot_guard is not None:
        yield from _head(
            "meshwire_boot_guard", "gauge", "Whether the next boot holds pods back until the agent is there."
        )
        yield f"meshwire_boot_guard {int(health.boot_guard)}"
    if health.desired is None or health.observed is None:
        return
    yield from _head("meshwire_peers", "gauge", "Peers by device.")
    for name, state in sorted(health.observed.wireguard.items()):
        yield f'meshwire_peers{{device="{name}"}} {len(state.peers)}'
    yield from _head(
        "meshwire_handshake_age_seconds", "gauge", "Since the latest handshake; none: no sample."
    )
    for device in health.desired.devices:
        observed = health.observed.wireguard.get(device.name)
        for peer in device.peers:
            state_of_peer = observed.peers.get(peer.public_key) if observed else None
            if state_of_peer and state_of_peer.handshake:
                labels = f'device="{device.name}",node="{peer.node}"'
                yield f"meshwire_handshake_age_seconds{{{labels}}} {now - state_of_peer.handshake:.1f}"


def _format_pairs(counts: Counts) -> Iterator[str]:
    yield from _head("meshwire_pairs", "gauge", "Peers that traffic goes to, by what is known of them.")
    for state, number in counts.states.items():
        yield f'meshwire_pairs{{state="{state.lower()}"}} {number}'
    yield from _head("meshwire_pairs_dead", "gauge", "Live nodes from which nothing comes.")
    yield f"meshwire_pairs_dead {counts.dead}"
    yield from _head("meshwire_pair_repairs_total", "counter", "Attempts to bring a peer back.")
    for repair, number in counts.repairs.items():
        yield f'meshwire_pair_repairs_total{{step="{repair.lower()}"}} {number}'
    for name, text, sample in (
        ("detect", "From the last packet of a peer to the verdict that the pair is dead.", counts.detect),
        ("repair", "From that verdict to the next packet.", counts.repair),
    ):
        yield from _head(f"meshwire_pair_{name}_seconds", "summary", text)
        yield f"meshwire_pair_{name}_seconds_sum {sample.total:.3f}"
        yield f"meshwire_pair_{name}_seconds_count {sample.count}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _counter(name: str, text: str, value: int) -> Iterator[str]:
    yield from _head(name, "counter", text)
    yield f"{name} {value}"
