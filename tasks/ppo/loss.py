"""PPO's losses as pure functions. B episodes, R response tokens; masks: True means keep.

Each loss is a sum over tokens divided by `count`, the number of tokens of the whole minibatch: adding up the gradients
of its micro-batches gives the minibatch's gradient, whatever the micro-batches' sizes and lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    loss: Tensor  # () with gradient
    clip_fraction: Tensor  # () share of tokens whose ratio was clipped and mattered
    approx_kl: Tensor  # () KL from the policy that sampled to this one, k3 estimator
    ratio: Tensor  # () mean probability ratio


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, count: float
) -> PolicyLoss:
    """Clipped surrogate objective, negated (Schulman et al. 2017, equation 7). All tensors (B, R)."""
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        clip_fraction = ((clipped > unclipped) & mask).sum() / count
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum() / count
        mean_ratio = (ratio * mask).sum() / count
    loss = (torch.maximum(unclipped, clipped) * mask).sum() / count
    return PolicyLoss(loss, clip_fraction, approx_kl, mean_ratio)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float, count: float
) -> Tensor:
    """Half the squared error, the value kept within clip_range of the old one, the worse of both taken.

    Schulman et al.'s baselines code, as in Ziegler et al. 2019 and InstructGPT. All tensors (B, R); result ().
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum() / count
