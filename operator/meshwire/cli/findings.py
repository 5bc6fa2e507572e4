"""What a check found, in words a person can act on. Pure, except for `print_findings`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console


class Level(StrEnum):
    PASS = "pass"
    SKIP = "skip"
    """Could not be examined: from here, as this user, or because something else is missing."""
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`check` names what was examined and `what` says what was found; `why` it matters and `todo` are empty
    where all is well."""

    check: str
    level: Level
    what: str
    why: str = ""
    todo: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "level": str(self.level)}


def passed(check: str, what: str) -> Finding:
    return Finding(check=check, level=Level.PASS, what=what)


def skipped(check: str, what: str, *, todo: str = "") -> Finding:
    return Finding(check=check, level=Level.SKIP, what=what, todo=todo)


def warning(check: str, what: str, *, why: str, todo: str) -> Finding:
    return Finding(check=check, level=Level.WARN, what=what, why=why, todo=todo)


def failure(check: str, what: str, *, why: str, todo: str) -> Finding:
    return Finding(check=check, level=Level.FAIL, what=what, why=why, todo=todo)


def worst(findings: Iterable[Finding]) -> Level:
    """The highest level among the findings; PASS for none."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.PASS)


UNGUARDED_BOOT: Final = (
    "When the node boots, what its pods send to other nodes before the agent is there leaves in clear"
)

PIPE_COLUMNS: Final = 200
STYLES: Final = {Level.PASS: "green", Level.SKIP: "dim", Level.WARN: "yellow", Level.FAIL: "bold red"}


def make_console() -> Console:
    """As wide as the terminal; wide enough for any line where the output goes to a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """One row per finding: level, check, and what/why/todo on lines of their own."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        # Text, never markup: messages come from the cluster and may hold square brackets.
        words = Text(finding.what)
        if finding.why:
            words.append(f"\nwhy: {finding.why}", style="dim")
        if finding.todo:
            words.append(f"\ndo:  {finding.todo}", style="cyan")
        table.add_row(Text(finding.level, style=STYLES[finding.level]), Text(finding.check), words)
    console.print(table)
