"""When training stops before its last update, and which update's policy is kept."""

from __future__ import annotations

from typing import Any, NamedTuple

from tasks.ppo.params import PPOParams


class HeldOut(NamedTuple):
    """The policy after so many updates, on held-out prompts."""

    update: int
    score: float  # mean
    kl: float  # nats a response, mean


class Watch:
    """Held-out evaluations so far, and the reason to stop once there is one.

    The best policy is the one with the highest held-out score among those whose held-out KL stays within the limit:
    further from the SFT model the reward model is asked about text that it was not trained on (Gao et al. 2023).
    """

    def __init__(self, params: PPOParams) -> None:
        self.params = params
        self.best: HeldOut | None = None
        self.stopped: str | None = None
        self.without_gain = 0

    def evaluated(self, result: HeldOut) -> bool:
        """Take note of an evaluation; True when it is the best so far."""
        bounded = self.params.kl_limit is None or result.kl <= self.params.kl_limit
        if bounded and (self.best is None or result.score > self.best.score):
            self.best, self.without_gain = result, 0
            return True
        self.without_gain += 1
        if self.params.patience is not None and self.without_gain >= self.params.patience:
            best = f"{self.best.score:.4g} at update {self.best.update}" if self.best else "none within the KL limit"
            self.stop(f"the held-out score has not improved in {self.without_gain} evaluations (best: {best})")
        return False

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
        return {"best": self.best, "stopped": self.stopped, "without_gain": self.without_gain}

    def load_state(self, facts: dict[str, Any]) -> None:
        self.best = HeldOut(*facts["best"]) if facts["best"] else None
        self.stopped, self.without_gain = facts["stopped"], facts["without_gain"]
