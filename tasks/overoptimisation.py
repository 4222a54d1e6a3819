"""How far optimisation against the reward model goes before it stops to help (Gao et al. 2023).

Gold and reward-model score over the square root of the KL divergence from the SFT model, of the policy on its way
through PPO and of the best of n answers of the SFT model. Gold is over the prompts that have it (elsewhere it is NaN),
and left out where none has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tasks.intervals import measured, resamples, with_interval


def best_of_n(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """The mean value of whichever answer scores highest among n drawn from N, over all such draws.

    scores, values (P, N) of P prompts -> (P,). Unbiased (Nakano et al. 2021, appendix I): of the answers in order of
    score, the i-th from below is the best of C(i - 1, n - 1) of the C(N, n) draws.
    """
    count = scores.shape[1]
    weights = torch.tensor([math.comb(place, n - 1) / math.comb(count, n) for place in range(count)])
    return (values.gather(1, scores.argsort(dim=1, stable=True)) * weights).sum(1)


def kl_of_best_of_n(n: int) -> float:
    """From a single answer's distribution, in nats: at most log n - (n - 1) / n (Stiennon et al. 2020, G.3)."""
    return math.log(n) - (n - 1) / n


def curve_of_ppo(updates: dict[int, dict[str, Tensor]], times: int, seed: int) -> list[dict[str, Any]]:
    """updates: after how many, the gold, score and kl (P,) of the answers to the same prompts."""
    rows = []
    for update, answers in sorted(updates.items()):
        kl = max(0.0, answers["kl"].mean().item())  # an estimate, which may fall below 0
        rows.append(point("ppo", update, kl, answers, updates[min(updates)], times, seed))
    return rows


def curve_of_best_of_n(scores: Tensor, gold: Tensor, times: int, seed: int) -> list[dict[str, Any]]:
    """scores, gold (P, N): of N answers to each of P prompts; n = 1, 2, 4 ... N."""
    sizes = [2**power for power in range(scores.shape[1].bit_length()) if 2**power <= scores.shape[1]]
    found = {n: {"score": best_of_n(scores, scores, n), "gold": best_of_n(scores, gold, n)} for n in sizes}
    return [point("best of n", n, kl_of_best_of_n(n), answers, found[1], times, seed) for n, answers in found.items()]


def point(
    source: str, size: int, kl: float, answers: dict[str, Tensor], start: dict[str, Tensor], times: int, seed: int
) -> dict[str, Any]:
    """The means, and what they have gained over the SFT model's answers to the same prompts, `start`."""
    known = {"score": torch.arange(len(answers["score"]))}
    if len(places := measured(answers["gold"])):
        known["gold"] = places
    gains = [
        with_interval(f"{name}_gain", (answers[name] - start[name])[places], resamples(len(places), times, seed))
        for name, places in known.items()
    ]
    return {
        "source": source,
        "point": size,  # updates, or n
        "kl": kl,
        "root_kl": math.sqrt(kl),
        **{name: answers[name][places].mean().item() for name, places in known.items()},
        **{name: figure for gain in gains for name, figure in gain.items()},
    }


def turning_point(updates: dict[int, Tensor], times: int, seed: int) -> dict[str, float]:
    """Where gold is highest, and whether it has come down since. updates: gold (P,) of the same prompts.

    It has turned down where a later evaluation is lower than the highest one by more than the 95 % interval of their
    paired difference.
    """
    peak = max(updates, key=lambda update: updates[update].mean().item())
    picks = resamples(len(updates[peak]), times, seed)
    later = [with_interval("fall", updates[peak] - gold, picks) for update, gold in updates.items() if update > peak]
    return {
        "gold_peak_update": peak,
        "gold_at_peak": updates[peak].mean().item(),
        "turned_down": float(any(fall["fall_low"] > 0 for fall in later)),
    }
