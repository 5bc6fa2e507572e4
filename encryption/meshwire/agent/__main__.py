"""The agent of one node: `python -m meshwire.agent`. Stopping it leaves the datapath in force."""

from __future__ import annotations

import argparse
import asyncio
import sys

from meshwire.agent import memory


def main() -> int:
    parser = argparse.ArgumentParser(prog="meshwire-agent", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument(
        "command",
        nargs="?",
        choices=["events"],
        help="events: print what the running agent's policies drop, one JSON object a line",
    )
    arguments = parser.parse_args()
    memory.import_parts_only()
    from meshwire.agent import daemon, logs
    from meshwire.agent.policy import events
    from meshwire.agent.settings import InvalidEnvironment, read_settings
    from meshwire.encryption.keys import KeyRefused
    from meshwire.kube.client import NoCluster, find_cluster

    logs.configure()
    memory.configure()
    if arguments.command == "events":
        return events.print_events(read_settings().run_directory)
    try:
        work = daemon.preview if arguments.dry_run else daemon.run
        asyncio.run(work(read_settings(), find_cluster()))
    except (InvalidEnvironment, NoCluster, KeyRefused, OSError) as error:
        print(f"meshwire-agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
