"""The lab's own process in the control plane's namespace: relays the API server's port to the namespace of
whoever ran `up`, without adding a device there, and keeps the operator's token fresh.

The listening socket comes from outside as a file descriptor: a socket stays in the network namespace it was
made in."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
from pathlib import Path
from typing import Final

from meshwire.api import names
from meshwire.kube.client import Client, read_kubeconfig
from meshwire.lab.model import API_PORT, CONTROL, OPERATOR_ACCOUNT, Paths
from meshwire.lab.tokens import keep_token

CHUNK: Final = 64 * 1024


async def serve(listener: socket.socket, host: str, port: int) -> None:
    """Relays every connection to HOST:PORT as seen from here, for ever."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, upstream_writer), _pump(upstream_reader, writer))

    server = await asyncio.start_server(handle, sock=listener)
    await server.serve_forever()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        # TLS ends a direction by a message of its own, so nobody here relies on half-open connections.
    writer.close()


async def run(paths: Paths, listener: socket.socket) -> None:
    cluster = read_kubeconfig(paths.kubeconfig_of("control"))
    loopback = "::1" if "[" in cluster.server else "127.0.0.1"
    async with Client(cluster) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(listener, loopback, API_PORT))
        tasks.create_task(
            keep_token(
                client,
                paths.token_directory(CONTROL),
                account=OPERATOR_ACCOUNT,
                namespace=names.NAMESPACE,
                authority=paths.pki / "ca.crt",
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True, help="a bound listening socket")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(run(Paths(arguments.state), socket.socket(fileno=arguments.fd)))


if __name__ == "__main__":
    main()
