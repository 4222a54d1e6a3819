"""Several people's rankings of the same outputs made one, as pure functions of ranks. 1 is best; equal ranks are ties.

Flagged outputs go last, whoever ranks: below every output without a flag, among themselves in the order that they had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

PRIOR = 0.1  # wins and losses of each output against one of strength 1, beside those that people decided
SAME_STRENGTH = 1e-6  # differences in log strength below this are rounding
MAX_STEPS = 10_000


def places(keys: Sequence[Any]) -> list[int]:
    """The rank of each: one more than there are lower keys, so ties share a rank (1, 2, 2, 4)."""
    return [1 + sum(other < key for other in keys) for key in keys]


def flagged_last(ranks: Sequence[int], flagged: Sequence[bool]) -> list[int]:
    return places(list(zip(flagged, ranks, strict=True)))


def flagged_by_half(flags: Sequence[Sequence[bool]]) -> list[bool]:
    """flags (J, K), of each judgment and output -> (K,): at least half of the judgments flagged it."""
    return [2 * sum(column) >= len(column) for column in zip(*flags, strict=True)]


def majority(rankings: Sequence[Sequence[int]]) -> list[int]:
    """By Copeland's score: an output's wins against each other one by majority, where a split pair is half a win.

    A judgment that ties a pair has no vote on it. Equal scores are ties, a circle of three too (Copeland 1951; Brandt
    et al., Handbook of Computational Social Choice, 2016, section 3.2).
    """
    scores = [0.0] * len(rankings[0])
    for one, other in permutations(range(len(scores)), 2):
        lead = sum((ranks[one] < ranks[other]) - (ranks[one] > ranks[other]) for ranks in rankings)
        scores[one] += 1.0 if lead > 0 else 0.5 if lead == 0 else 0.0
    return places([-score for score in scores])


def bradley_terry(rankings: Sequence[Sequence[int]]) -> list[int]:
    """By the strengths under which P(i before j) = s_i / (s_i + s_j) makes the pairwise outcomes likeliest."""
    logs = [math.log(strength) for strength in strengths(rankings)]
    ranks = [0] * len(logs)
    above = math.inf
    for place, index in enumerate(sorted(range(len(logs)), key=lambda index: -logs[index])):
        if above - logs[index] > SAME_STRENGTH:
            rank = place + 1
        ranks[index], above = rank, logs[index]
    return ranks


def strengths(rankings: Sequence[Sequence[int]]) -> list[float]:
    """Fitted by the MM algorithm (Hunter 2004, equation 3); a tie is half a win for each.

    An output that wins always would have infinite strength, so each also has PRIOR wins and losses against an output of
    strength 1. As every judgment compares every pair, the order is that of the numbers of wins (Borda's).
    """
    count, judgments = len(rankings[0]), len(rankings)
    wins = [PRIOR] * count
    for ranks in rankings:
        for one, other in permutations(range(count), 2):
            wins[one] += (ranks[one] < ranks[other]) + 0.5 * (ranks[one] == ranks[other])
    found = [1.0] * count
    for _ in range(MAX_STEPS):
        before = found
        found = [
            wins[one]
            / (
                2 * PRIOR / (before[one] + 1)
                + sum(judgments / (before[one] + before[other]) for other in range(count) if other != one)
            )
            for one in range(count)
        ]
        if all(abs(math.log(new / old)) < SAME_STRENGTH / 1000 for new, old in zip(found, before, strict=True)):
            break
    return found
