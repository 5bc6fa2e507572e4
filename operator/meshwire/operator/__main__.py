"""The operator: `python -m meshwire.operator`. Stopping it stops no traffic."""

from __future__ import annotations

import argparse
import asyncio
import sys


def main() -> int:
    argparse.ArgumentParser(
        prog="meshwire-operator",
        description=__doc__,
        epilog="Environment: POD_NAMESPACE, POD_NAME, MESHWIRE_METRICS_ADDRESS (0.0.0.0:9872), KUBECONFIG.",
    ).parse_args()

    # kopf imports the official client to recognise its classes, wherever that is installed: 20 MB we do
    # without. So this comes before anything imports kopf.
    sys.modules["kubernetes"] = None  # type: ignore[assignment]
    from meshwire.kube.client import NoCluster, find_cluster
    from meshwire.operator import daemon, logs
    from meshwire.operator.settings import InvalidEnvironment, read_settings

    logs.configure()
    try:
        asyncio.run(daemon.run(read_settings(), find_cluster()))
    except (InvalidEnvironment, NoCluster, OSError) as error:
        print(f"meshwire-operator: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
