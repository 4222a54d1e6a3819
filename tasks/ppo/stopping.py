"""When training stops before its last update, and which update's policy is kept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tasks.ppo.params import PPOParams


class HeldOut(NamedTuple):
    """The policy after so many updates, on held-out prompts."""

    update: int
    scores: list[float]  # of the answer to each prompt
    kl: float  # nats a response, mean

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)

    def beats(self, other: HeldOut) -> bool:
        """Whether more of its answers are scored higher than of those to the same prompts before than chance explains:
        sign test at 95 %, by the normal approximation. With fewer than 4 prompts nothing does."""
        signs = [(ours > theirs) - (ours < theirs) for ours, theirs in zip(self.scores, other.scores, strict=True)]
        return sum(signs) > 1.96 * math.sqrt(sum(map(abs, signs)))


class Watch:
    """Held-out evaluations so far, and the reason to stop once there is one.

    Kept is the earliest policy within the KL limit that no later one is shown to beat. The further from the SFT model,
    the more of a gain in score is the reward model's error (Gao et al. 2023): a policy that goes on without being
    scored higher on most prompts goes towards that.
    """

    def __init__(self, params: PPOParams) -> None:
        self.params = params
        self.kept: HeldOut | None = None
        self.best: HeldOut | None = None  # by mean score
        self.stopped: str | None = None
        self.without_gain = 0

    def evaluated(self, result: HeldOut) -> bool:
        """Take note of an evaluation; True when it is the one to keep."""
        bounded = self.params.kl_limit is None or result.kl <= self.params.kl_limit
        if bounded and (self.best is None or result.score > self.best.score):
            self.best, self.without_gain = result, 0
        else:
            self._without_gain()
        if bounded and (self.kept is None or result.beats(self.kept)):
            self.kept = result
            return True
        return False

    def _without_gain(self) -> None:
        self.without_gain += 1
        if self.params.patience is not None and self.without_gain >= self.params.patience:
            best = f"{self.best.score:.4g} at update {self.best.update}" if self.best else "none within the KL limit"
            self.stop(f"the held-out score has not improved in {self.without_gain} evaluations (best: {best})")

    def sampled(self, update: int, kl: float, entropy: float) -> None:
        """Stop where the policy that wrote this update's episodes has gone too far."""
        limit, floor = self.params.kl_limit, self.params.entropy_floor
        if limit is not None and kl > limit:
            self.stop(f"KL {kl:.4g} nats a response at update {update} is above kl_limit {limit:g}")
        elif floor is not None and entropy < floor:
            self.stop(f"entropy {entropy:.4g} nats a token at update {update} is below entropy_floor {floor:g}")

    def stop(self, reason: str) -> None:
        self.stopped = self.stopped or reason

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept, "best": self.best, "stopped": self.stopped, "without_gain": self.without_gain}

    def load_state(self, facts: dict[str, Any]) -> None:
        self.kept, self.best = (HeldOut(*facts[name]) if facts[name] else None for name in ("kept", "best"))
        self.stopped, self.without_gain = facts["stopped"], facts["without_gain"]
