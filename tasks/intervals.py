"""Means with 95 % intervals by percentile bootstrap, paired (Efron and Tibshirani 1993, chapter 13); what is compared,
and on which parts of the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESAMPLES = 2000


def measured(values: Tensor) -> Tensor:
    """The places (P,) at which values (N,) are not NaN."""
    return (~values.isnan()).nonzero()[:, 0]


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


def with_interval_by_group(
    name: str, values: Tensor, groups: Sequence[object], times: int, seed: int
) -> dict[str, float]:
    """The same where several values (N,) come of one prompt: groups (N), its names, are resampled as wholes."""
    order = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    rows = torch.tensor([order[group] for group in groups])
    sums = torch.zeros(len(order)).index_add(0, rows, values)
    counts = torch.zeros(len(order)).index_add(0, rows, torch.ones(len(values)))
    picks = resamples(len(order), times, seed)
    shares = sums[picks].sum(1) / counts[picks].sum(1)
    return {
        name: (sums.sum() / counts.sum()).item(),
        f"{name}_low": shares.quantile(0.025).item(),
        f"{name}_high": shares.quantile(0.975).item(),
    }


def wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 where ours is better, 1/2 where they are equal (to rounding), else 0. (N,)"""
    difference = ours - theirs
    return (difference > 1e-6).float() + 0.5 * (difference.abs() <= 1e-6).float()


def versus(ours: Tensor, theirs: Tensor, picks: Tensor) -> dict[str, float]:
    """Shares of wins, ties and losses, and the win rate, in which a tie is half a win, with its interval."""
    marks = wins(ours, theirs)
    shares = {name: (marks == mark).float().mean().item() for name, mark in (("win", 1.0), ("tie", 0.5), ("loss", 0.0))}
    return shares | with_interval("win_rate", marks, picks)


def length_thirds(texts: list[str]) -> list[str]:
    """Which third of the texts each is in, by its number of words: short, middling or long."""
    lengths = torch.tensor([float(len(text.split())) for text in texts])
    low, high = lengths.quantile(torch.tensor([1 / 3, 2 / 3])).tolist()
    return ["short" if length <= low else "middling" if length <= high else "long" for length in lengths.tolist()]
