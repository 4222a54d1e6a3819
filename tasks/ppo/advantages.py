"""From scores to advantages: pure functions of tensors. B episodes, R response tokens; masks: True means keep."""

from __future__ import annotations

import torch
from torch import Tensor


def last_token(mask: Tensor) -> Tensor:
    """Index (B,) of the last kept token of each row; mask (B, R), right-padded, at least one token a row."""
    return mask.sum(-1) - 1


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, R): at each token -kl_coef * kl (B, R), at the last one the score (B,) is added.

    InstructGPT, equation 2, without the pretraining term; per token as in Ziegler et al. 2019, section 2.
    """
    rewards = -kl_coef * kl * mask
    rewards[torch.arange(len(scores), device=scores.device), last_token(mask)] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each (B, R), 0 on padding. Schulman et al. 2016, equations 11, 12 and 16.

    delta_t = r_t + gamma * V(s_t+1) - V(s_t);  A_t = delta_t + gamma * lambda * A_t+1;  return_t = A_t + V(s_t).
    After the last token the episode is over: value and advantage beyond it are 0.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(next_advantage)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Variance 1 and mean 0 over the kept entries, 0 on padding. (Ziegler et al. 2019, lm-human-preferences.)

    Without shift_mean the mean stays what it was: so rewards are whitened there, whose sign means something.
    """
    kept = values[mask]
    mean = kept.mean()
    whitened = (values - mean) / (kept.var(correction=0) + 1e-8).sqrt()
    return (whitened if shift_mean else whitened + mean) * mask
