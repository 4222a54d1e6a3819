"""What happens to the reward function's scores before they become rewards: pure functions and running statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RunningMoments:
    """Mean and standard deviation of all scores so far, in one pass (Chan, Golub and LeVeque 1979, equation 2.1)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: the sum of squared deviations from the mean

    def update(self, values: Tensor) -> None:
        count, mean = len(values), values.mean().item()
        squares = (values - mean).square().sum().item()
        total, difference = self.count + count, mean - self.mean
        self.squares += squares + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Of the population; 1 as long as there is no spread to divide by."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0

    def normalise(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """Scores (B,) within [-limit, limit]."""
    return scores if limit is None else scores.clamp(-limit, limit)


def score_missing_end(scores: Tensor, ended: Tensor, replacement: float | None, penalty: float) -> Tensor:
    """Scores (B,) of responses that do not end with the end token: replaced, or reduced by a penalty. ended (B,) bool.

    Replaced by -1 in Stiennon et al. 2020 and in Huang et al. 2024 ("N+", 2403.17031); reduced in
    TRL's `missing_eos_penalty`.
    """
    missing = scores - penalty if replacement is None else torch.full_like(scores, replacement)
    return torch.where(ended, scores, missing)
