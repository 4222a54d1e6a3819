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
    "win_rate_low": ("judged.win_rate_low", "at least"),
    "champion_win_rate_low": ("champion.win_rate_low", "at least"),
    "kl": ("kl", "at most"),
    "fluency_loss": ("fluency_loss", "at most"),
    "length_ratio_low": ("length.ratio", "at least"),
    "length_ratio_high": ("length.ratio", "at most"),
    "ended": ("ended.policy", "at least"),
    "relevance_ratio": ("relevance.ratio", "at least"),
    "repetition": ("repetition.policy", "at most"),
    "reward_hacking": ("hacking.overrated", "at most"),
}


class Judge(NamedTuple):
    """Who can say whether the policy's answers are better than the SFT model's, if it judged enough of the prompts."""

    who: str
    rate: str  # the key of its win rate
    prompts: str  # and of how many prompts that is over
    share: float = 0  # of the compared prompts that it needs: one kind of them does not speak for the rest
    fewest: int = 0  # prompts that it needs: of fewer the bootstrap makes its interval too narrow

    def lacks(self, judged: float, compared: float) -> str:
        """What it would need to be heard; "" where it is. judged, compared: numbers of prompts."""
        needed = max(self.fewest, math.ceil(self.share * compared))
        return "" if judged >= needed else f"{self.who} has {judged:g} of the {needed} prompts that it needs"

    def told(self, judged: float, lacking: str) -> str:
        """lacking: what those who would have proved more would need."""
        return f"{self.who} on {judged:g} prompts" + (f" ({lacking})" if lacking else "")


GOLD = Judge("the gold score", "win_rate", "gold.prompts", share=0.5)
MODEL = Judge("the judge", "judge.versus.sft.win_rate", "judge.versus.sft.pairs", fewest=20)  # as of labelled pairs
ITSELF = Judge(
    "the reward model (which proves little: the policy was trained to please it)", "score_win_rate", "prompts"
)
JUDGES = (GOLD, MODEL, ITSELF)  # from the one that proves most to the one that proves least
NO_DIFFERENCE = "definition, as the policy is the SFT model"
NOBODY = "there is neither a gold score nor a judge to hold the reward model against; judge.endpoint would name one"
MORE = "judge.endpoint and judge.pairs can bring more verdicts"


class Gate(NamedTuple):
    """One limit and what was measured. `missed_by` is 0 where it holds; a figure that is missing or NaN does not hold.

    Where nothing could measure it, `open` says why: it neither holds nor fails, and a person decides.
    """

    name: str
    side: Literal["at least", "at most"]
    limit: float
    value: float | None
    by: str = ""  # who judged, where somebody has to
    open: str = ""

    @property
    def missed_by(self) -> float:
        if self.value is None:
            return float("inf")
        return max(0.0, self.limit - self.value if self.side == "at least" else self.value - self.limit)

    @property
    def passed(self) -> bool:
        return self.missed_by == 0

    @property
    def failed(self) -> bool:
        return not self.passed and not self.open

    def __str__(self) -> str:
        if self.open:
            return f"{self.name}: not measured ({self.open}), {self.side} {self.limit:g} asked: a person decides"
        if self.value is None:
            return f"{self.name}: not measured, {self.side} {self.limit:g} asked: failed"
        verdict = "passed" if self.passed else f"failed by {self.missed_by:.3g}"
        by = f" by {self.by}" if self.by else ""
        return f"{self.name}: {self.value:.3g}{by}, {self.side} {self.limit:g} asked: {verdict}"


def evaluate(limits: Gates, reports: Iterable[Mapping[str, Any]]) -> list[Gate]:
    """Each limit that is set, against its figure in the stages' reports."""
    figures = with_ratios(together(reports))
    gates = []
    for name, (key, side) in FIGURES.items():
        limit = getattr(limits, name)
        if limit is not None:
            by, unjudged = (word_at(figures, key, word) for word in ("by", "open"))
            gates.append(Gate(name, side, float(limit), figure_at(figures, key), by, unjudged))
    return gates


def together(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: figure for report in reports for name, figure in report.items()}


def nothing_gained(report: Mapping[str, Any]) -> bool:
    """Whether PPO kept the weights that it began with: then the policy is the SFT model."""
    return figure_at(report, "ppo.kept_update") == 0


def judged(report: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's win rate over the SFT model, by whoever proves most of those who judged enough. {} where nobody did.

    report: all of them together. `by` says who it was, on how many prompts, and what the others would need.
    """
    if nothing_gained(report):
        return {**dict.fromkeys(("win_rate", "win_rate_low", "win_rate_high"), 0.5), "by": NO_DIFFERENCE}
    compared = figure_at(report, "prompts") or 0
    lacking: list[str] = []
    for judge in JUDGES:
        rate = {f"win_rate{end}": figure_at(report, f"{judge.rate}{end}") for end in ("", "_low", "_high")}
        count = figure_at(report, judge.prompts)
        if rate["win_rate"] is None or count is None:
            continue
        if lack := judge.lacks(count, compared):
            lacking.append(lack)
        else:
            told = "; ".join(lacking)
            return {**rate, "who": judge.who, "by": judge.told(count, told), "lacking": told}
    return {}


def in_short(judged: Iterable[Gate]) -> str:
    """`passed`, or which are not: `failed: kl; open: win_rate_low`."""
    gates = list(judged)
    named = {"failed": [gate.name for gate in gates if gate.failed], "open": [gate.name for gate in gates if gate.open]}
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in named.items() if names) or "passed"


def with_ratios(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with what the limits need beside its own figures: the policy relative to the SFT model."""
    found = judged(report)
    more: dict[str, Any] = {"judged": found, "hacking": hacking(report, found)}
    if "fluency" in report:
        more["fluency_loss"] = report["fluency"]["sft"] - report["fluency"]["policy"]  # nats a token
    for name in ("length", "relevance"):
        if name in report:
            more[name] = report[name] | ratio(report[name]["policy"], report[name]["sft"])
    return {**report, **more}


def ratio(policy: float, sft: float) -> dict[str, Any]:
    if sft == 0:
        return {"open": "it is 0 for the SFT model's answers, so there is nothing to compare with"}
    return {"ratio": policy / sft}


def hacking(report: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What the reward model sees in the policy and who judged does not; `open` where that is the reward model itself.

    found: `judged` of the report; where nobody judged nothing was measured, and that is no question for a person.
    """
    if nothing_gained(report):
        return {"overrated": 0.0, "by": NO_DIFFERENCE}
    match found.get("who"):
        case GOLD.who:
            return {"overrated": report["overrated"], "by": found["by"]}
        case MODEL.who:  # its prompts are drawn from those of the reward model
            return {"overrated": report["score_win_rate"] - found["win_rate"], "by": found["by"]}
        case ITSELF.who:
            return {"open": f"{found['lacking']}; {MORE}" if found["lacking"] else NOBODY}
        case _:
            return {}


def word_at(report: Mapping[str, Any], key: str, word: str) -> str:
    """What stands beside the figure under a dotted key, in words; "" where nothing does."""
    section = report.get(key.partition(".")[0])
    return str(section.get(word, "")) if isinstance(section, Mapping) else ""


def figure_at(report: Mapping[str, Any], key: str) -> float | None:
    """The number under a dotted key; None where there is none, or one that is not finite: it passes no gate."""
    value: Any = report
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None or not math.isfinite(value) else float(value)
