"""Gates: what must have been measured before a policy becomes the champion. Limits stand in params.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from tasks.params import Gates

# what each limit is held against: the key of a figure in the stages' reports, and which side of the limit is right
FIGURES: dict[str, tuple[str, Literal["at least", "at most"]]] = {
    "failed_data_checks": ("prepare.failed_checks", "at most"),
    "reward_accuracy": ("reward.accuracy", "at least"),
    "reward_calibration_error": ("reward.calibration_error", "at most"),
    "win_rate_low": ("win_rate_low", "at least"),
    "champion_win_rate_low": ("champion.win_rate_low", "at least"),
    "kl": ("kl", "at most"),
    "fluency_loss": ("fluency_loss", "at most"),
    "length_ratio_low": ("length_ratio", "at least"),
    "length_ratio_high": ("length_ratio", "at most"),
    "ended": ("ended.policy", "at least"),
}


class Gate(NamedTuple):
    """One limit and what was measured. `missed_by` is 0 where it holds; a figure that is not there does not hold."""

    name: str
    side: Literal["at least", "at most"]
    limit: float
    value: float | None

    @property
    def missed_by(self) -> float:
        if self.value is None:
            return float("inf")
        return max(0.0, self.limit - self.value if self.side == "at least" else self.value - self.limit)

    @property
    def passed(self) -> bool:
        return self.missed_by == 0

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: not measured, {self.side} {self.limit:g} asked: failed"
        verdict = "passed" if self.passed else f"failed by {self.missed_by:.3g}"
        return f"{self.name}: {self.value:.3g}, {self.side} {self.limit:g} asked: {verdict}"


def evaluate(limits: Gates, reports: Iterable[Mapping[str, Any]]) -> list[Gate]:
    """Each limit that is set, against the first report that has its figure."""
    figures = [with_ratios(report) for report in reports]
    gates = []
    for name, (key, side) in FIGURES.items():
        limit = getattr(limits, name)
        if limit is not None:
            found = (figure_at(report, key) for report in figures)
            gates.append(Gate(name, side, float(limit), next((one for one in found if one is not None), None)))
    return gates


def with_ratios(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with what the limits need beside its own figures: the policy relative to the SFT model."""
    more: dict[str, float] = {}
    if "fluency" in report:
        more["fluency_loss"] = report["fluency"]["sft"] - report["fluency"]["policy"]  # nats a token
    if "length" in report:
        more["length_ratio"] = report["length"]["policy"] / (report["length"]["sft"] or math.nan)
    return {**report, **more}


def figure_at(report: Mapping[str, Any], key: str) -> float | None:
    """The number under a dotted key; None where there is none, or one that is not finite: it passes no gate."""
    value: Any = report
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None or not math.isfinite(value) else float(value)
