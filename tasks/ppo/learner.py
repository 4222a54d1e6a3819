"""A branch that is being trained: its optimizer, its schedule, the moving average of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import get_scheduler

from tasks.checkpoints import load_optimizer_state, nest, optimizer_state, pick
from tasks.ppo.params import PPOParams


class NotFinite(Exception):
    """A gradient that is NaN or infinite. No weight was changed."""


class Learner:
    def __init__(
        self, groups: list[tuple[list[nn.Parameter], float]], params: PPOParams, steps: int, ema_decay: float | None
    ) -> None:
        """groups: weights and their learning rate. steps: over which the schedule runs.

        AdamW without weight decay, betas (0.9, 0.95) in InstructGPT (appendix C.4), eps 1e-5 in Huang et al. 2024.
        """
        self.weights = [weight for weights, _ in groups for weight in weights]
        self.rates = [rate for _, rate in groups]
        self.max_grad_norm = params.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "lr": rate} for weights, rate in groups],
            betas=params.adam_betas,
            eps=params.adam_eps,
            weight_decay=0.0,
            fused=True,
        )
        name = "constant_with_warmup" if params.schedule == "constant" else params.schedule
        self.schedule = get_scheduler(name, self.optimizer, round(params.warmup_share * steps), steps)
        self.average = None if ema_decay is None else [weight.detach().clone() for weight in self.weights]
        self._move_average = None if ema_decay is None else get_ema_multi_avg_fn(ema_decay)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self, add_up: Callable[[Tensor], Tensor]) -> float:
        """Add up the processes' gradients, clip, step, clear, average. Returns the norm before clipping.

        A missing gradient counts as 0. NotFinite where the norm is NaN or infinite.
        """
        for weight in self.weights:
            weight.grad = add_up(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        total = nn.utils.get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])
        norm = float(total)
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NotFinite(f"the gradient's norm is {norm}")
        if norm > self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.weights, self.max_grad_norm, total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None and self._move_average is not None:
            self._move_average(self.average, [weight.data for weight in self.weights], 0)
        return norm

    def copy_weights(self) -> list[Tensor]:
        """What is kept of the weights as they are now: their moving average where there is one."""
        return [weight.detach().clone() for weight in self.average or self.weights]

    @torch.no_grad()
    def set_weights(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) from which `load_state` goes on with the same bits."""
        tensors, optimizer = optimizer_state(self.optimizer)
        named = {str(number): weight.detach() for number, weight in enumerate(self.weights)}
        average = {str(number): value for number, value in enumerate(self.average or [])}
        return (
            {**nest("optimizer", tensors), **nest("weights", named), **nest("average", average)},
            {"optimizer": optimizer, "schedule": self.schedule.state_dict()},
        )

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        load_optimizer_state(self.optimizer, pick("optimizer", tensors), facts["optimizer"])
        self.schedule.load_state_dict(facts["schedule"])
        weights = pick("weights", tensors)
        self.set_weights([weights[str(number)] for number in range(len(self.weights))])
        for number, value in enumerate(self.average or []):
            value.copy_(pick("average", tensors)[str(number)])
