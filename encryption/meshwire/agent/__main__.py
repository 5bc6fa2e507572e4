"""The agent of one node: `python -m meshwire.agent`. Stopping it leaves the datapath in force."""

from __future__ import annotations

import argparse
import asyncio
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="meshwire-agent", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    arguments = parser.parse_args()
    # kopf imports the official client to recognise its classes, wherever that is installed: 20 MB which an
    # agent on every node does without. So this comes before anything imports kopf.
    sys.modules["kubernetes"] = None  # type: ignore[assignment]
    from meshwire.agent import daemon, logs, memory
    from meshwire.agent.settings import InvalidEnvironment, read_settings
    from meshwire.encryption.keys import KeyRefused
    from meshwire.kube.client import NoCluster, find_cluster

    logs.configure()
    memory.configure()
    try:
        work = daemon.preview if arguments.dry_run else daemon.run
        asyncio.run(work(read_settings(), find_cluster()))
    except (InvalidEnvironment, NoCluster, KeyRefused, OSError) as error:
        print(f"meshwire-agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
