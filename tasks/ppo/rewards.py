"""What scores an episode: a reward model, any function of prompts and responses, or a weighted sum of several."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.models import Branch
from tasks.ppo.rollout import Rollout, score_last_token
from tasks.stage import UserError

RewardFunction: TypeAlias = Callable[[list[Any], list[Any]], "Tensor | Sequence[float]"]
Reward: TypeAlias = PreTrainedModel | RewardFunction


class RewardModel:
    """A scalar model as a branch on the policy's trunk: it reads the states that generation left behind."""

    def __init__(self, branch: Branch, bias: float) -> None:
        self.branch, self.bias = branch, bias

    def score(self, rollout: Rollout) -> Tensor:
        return score_last_token(self.branch, rollout) - self.bias


def call(function: RewardFunction, prompts: list[Any], responses: list[Any]) -> Tensor:
    """A function's scores (B,), checked. UserError where it raises, or gives another shape, or NaN or infinity."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        given = function(prompts, responses)
    except UserError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"the reward function `{name}` raised {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})"
        ) from error
    try:
        scores = torch.as_tensor(given, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the reward function `{name}` gave {type(given).__name__}, not numbers: {error}") from error
    if scores.shape != (len(responses),):
        raise UserError(
            f"the reward function `{name}` gave scores of shape {tuple(scores.shape)} for {len(responses)} responses; "
            f"it must give one number for each: shape ({len(responses)},)."
        )
    wrong = (~torch.isfinite(scores)).nonzero()[:, 0].tolist()
    if wrong:
        raise UserError(
            f"the reward function `{name}` gave {scores[wrong[0]].item()} for {len(wrong)} of {len(responses)} "
            f"responses, first for {responses[wrong[0]]!r:.200} to {prompts[wrong[0]]!r:.200}."
        )
    return scores


def weighted(reward: Reward | Sequence[tuple[Reward, float]]) -> list[tuple[Reward, float]]:
    """One reward, or a mix of several, as a list with weights."""
    if isinstance(reward, Sequence):
        if not reward:
            raise UserError("no reward was handed in: give a reward model, a function, or a list of (reward, weight).")
        return [(one, float(weight)) for one, weight in reward]
    return [(reward, 1.0)]
