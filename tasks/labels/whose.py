"""Who made the labels of a run, in words: people, simulated labelers, or whoever made those that came with the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTS = {"demonstrate": ("demonstrations", "count"), "rank": ("rankings", "rankings")}


def whose_labels(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """reports: of the stages `demonstrate` and `rank`, among others."""
    return "; ".join(whose(reports[stage][stage], *COUNTS[stage]) for stage in COUNTS)


def whose(figures: Mapping[str, Any], what: str, total: str) -> str:
    """`128 rankings: 100 by people, 28 simulated`."""
    count, people, simulated = (int(figures[name]) for name in (total, "by_people", "by_simulated"))
    makers = {"by people": people, "simulated": simulated, "that came with the data": count - people - simulated}
    told = [f"{number:,} {maker}" for maker, number in makers.items() if number]
    if len(told) == 1:
        (maker,) = (maker for maker, number in makers.items() if number)
        return f"{count:,} {what}, all {maker}"
    return f"{count:,} {what}: {', '.join(told)}"
