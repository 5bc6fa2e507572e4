"""The command line tool `meshwire`."""

from __future__ import annotations

from importlib import import_module
from typing import Final

try:
    import click
except ModuleNotFoundError:
    # The base package is the agent's, which has no use for it.
    raise SystemExit("meshwire: the command line needs more: pip install 'meshwire[cli]'") from None

COMMANDS: Final = {
    "status": ("meshwire.cli.status", "status", "Is traffic between nodes encrypted, and if not, why."),
    "rotate": ("meshwire.cli.rotate", "rotate", "New WireGuard keys for all nodes, now."),
    "policy": ("meshwire.cli.policy", "policy", "Look at policies before they are applied; ask them why."),
    "monitor": ("meshwire.cli.monitor", "monitor", "What policies drop, or would drop, as it happens."),
    "endpoints": ("meshwire.cli.endpoints", "endpoints", "Pods as policies know them."),
    "identities": ("meshwire.cli.endpoints", "identities", "Identity numbers and their labels."),
    "preflight": ("meshwire.cli.preflight", "preflight", "What this node and cluster lack for Meshwire."),
    "version": ("meshwire.cli.version", "version", "Versions of this client and of the cluster's agents."),
    "lab": ("meshwire.cli.lab", "lab", "A whole cluster on this machine, to try, develop and test with."),
}
"""Name -> module, attribute, one line of help. Modules are imported when their command is asked for:
`meshwire version` needs neither the libraries of the others nor the time to load them."""


class LazyGroup(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        try:
            command: click.Command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"`meshwire {name}` needs the Python package {error.name!r}: "
                f"pip install 'meshwire[{'lab' if name == 'lab' else 'cli'}]'"
            ) from None
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog='Completion: eval "$(_MESHWIRE_COMPLETE=bash_source meshwire)"; also zsh_source, fish_source.',
)
def main() -> None:
    """Encryption between the nodes of a Kubernetes cluster, and policy between its pods.

    Clusters are found as kubectl finds them: $KUBECONFIG, ~/.kube/config, or --kubeconfig and --context.
    """


if __name__ == "__main__":
    main(prog_name="meshwire")
