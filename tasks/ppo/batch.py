"""An update's episodes, and what is told of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tasks.ppo.rollout import Rollout


class Episodes(NamedTuple):
    """What this process sampled, b episodes, scored."""

    rollout: Rollout
    prompts: list[int]  # b places in the trainer's prompts
    scores: Tensor  # (b,) as the reward gave them


class Batch(NamedTuple):
    """An update's episodes with what the losses need of them: B over all processes, R response tokens."""

    rollout: Rollout  # this process's own, B / processes
    first: int  # the place of its first among the B
    mask: Tensor  # (B, R) bool
    ended: Tensor  # (B,) bool
    scores: Tensor  # (B,) as the reward gave them
    shaped: Tensor  # (B,) as they enter the rewards
    logprobs: Tensor  # (B, R) of the policy that sampled
    ref_logprobs: Tensor  # (B, R)
    rewards: Tensor  # (B, R)
    values: Tensor  # (B, R) before the update
    advantages: Tensor  # (B, R) whitened where asked for
    returns: Tensor  # (B, R)
    own_values: Tensor | None = None  # (b, R) of this process with gradients, where the first step takes all of them


def describe(batch: Batch) -> dict[str, float]:
    """What an update's episodes were like, before the policy learned from them."""
    mask = batch.mask
    difference = (batch.logprobs - batch.ref_logprobs) * mask
    errors = (batch.returns - batch.values)[mask]
    return {
        "score": batch.scores.mean().item(),
        "score_std": batch.scores.std(correction=0).item(),
        "reward": batch.rewards.sum(-1).mean().item(),
        "kl": difference.sum(-1).mean().item(),
        # of samples at the policy's temperature, -log pi is an unbiased estimate of the entropy
        "entropy": -batch.logprobs[mask].mean().item(),
        "value_explained_variance": 1 - (errors.var() / batch.returns[mask].var()).item(),
        "ended_share": batch.ended.float().mean().item(),
        "response_length": mask.sum(-1).float().mean().item(),
    }


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}
