"""Intervals of means: 95 % percentile bootstrap, paired (Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

import torch
from torch import Tensor


def resamples(count: int, times: int, seed: int) -> Tensor:
    """(times, count) row numbers, drawn with replacement: the same rows for everything that is compared."""
    return torch.randint(count, (times, count), generator=torch.Generator().manual_seed(seed))


def with_interval(name: str, values: Tensor, picks: Tensor) -> dict[str, float]:
    """Mean of values (N,) with its interval, as name, name_low, name_high; picks from `resamples`."""
    means = values[picks].mean(1)
    return {
        name: values.mean().item(),
        f"{name}_low": means.quantile(0.025).item(),
        f"{name}_high": means.quantile(0.975).item(),
    }


def wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 where ours is better, 1/2 where they are equal (to rounding), else 0. (N,)"""
    difference = ours - theirs
    return (difference > 1e-6).float() + 0.5 * (difference.abs() <= 1e-6).float()
