"""What a measurement says, as values. Nothing here judges whether it is good enough: a goal is shown next to
the figure, and people compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`spread` says how the value was got and how much it varied; `goal` is in words, empty for none."""

    name: str
    value: float
    unit: str
    spread: str = ""
    goal: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def percentile(values: Sequence[float], percent: int) -> float:
    """By linear interpolation between the values on either side. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values, no percentile")
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def percentiles(
    name: str, seconds: Sequence[float], percents: Sequence[int] = (50, 95), *, goal: str = ""
) -> list[Figure]:
    """Figures of one series of times; the goal is that of the first. Of fewer than a hundred, p99 lies
    between the two slowest."""
    spread = f"of {len(seconds)}, {min(seconds):.2f} to {max(seconds):.2f}"
    return [
        Figure(
            name=f"{name}, p{percent}",
            value=percentile(seconds, percent),
            unit="s",
            spread=spread,
            goal=goal if number == 0 else "",
        )
        for number, percent in enumerate(percents)
    ]


def ratio(name: str, pairs: Sequence[tuple[float, float]], *, goal: str = "") -> Figure:
    """The median of one to the other, each pair measured one right after the other."""
    ratios = [one / other for one, other in pairs]
    return Figure(
        name=name,
        value=percentile(ratios, 50),
        unit="ratio",
        spread=f"median of {len(ratios)} pairs, middle half {percentile(ratios, 25):.3f} to "
        f"{percentile(ratios, 75):.3f}",
        goal=goal,
    )
