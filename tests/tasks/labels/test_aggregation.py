"""Several rankings made one, by hand."""

from __future__ import annotations

import math
import random

import pytest
from scipy.optimize import minimize

from tasks.labels.aggregation import (
    PRIOR,
    bradley_terry,
    flagged_by_half,
    flagged_last,
    majority,
    places,
    strengths,
)


def test_equal_keys_share_a_rank() -> None:
    assert places([0.3, 0.1, 0.3, 0.9]) == [2, 1, 2, 4]


def test_flagged_outputs_go_below_all_others_and_keep_their_order() -> None:
    # the best and the third are flagged: they come last, in their order; the two others stay a tie
    assert flagged_last([1, 2, 3, 2], [True, False, True, False]) == [3, 1, 4, 1]
    assert flagged_last([1, 2, 2], [False, False, False]) == [1, 2, 2]
    assert flagged_last([2, 1, 2], [True, True, True]) == [2, 1, 2]


def test_half_of_the_judgments_flag() -> None:
    assert flagged_by_half([[True, True, False], [False, True, False]]) == [True, True, False]
    assert flagged_by_half([[True], [False], [False]]) == [False]


def test_majority_by_hand() -> None:
    # a before b 2:1, a before c 2:1, b before c 3:0: scores 2, 1, 0
    assert majority([[1, 2, 3], [1, 2, 3], [3, 1, 2]]) == [1, 2, 3]
    # a and b split 1:1, both before c: scores 1.5, 1.5, 0
    assert majority([[1, 2, 3], [2, 1, 3]]) == [1, 1, 3]
    # the second ties a and b, so the first alone decides there
    assert majority([[2, 1, 3], [1, 1, 3]]) == [2, 1, 3]
    # a before b before c before a, each 2:1
    assert majority([[1, 2, 3], [3, 1, 2], [2, 3, 1]]) == [1, 1, 1]


@pytest.mark.parametrize("aggregate", [majority, bradley_terry])
def test_one_judgment_stays_as_it_is(aggregate: object) -> None:
    assert callable(aggregate)
    assert aggregate([[2, 4, 1, 2]]) == [2, 4, 1, 2]


def test_majority_and_bradley_terry_can_differ() -> None:
    """Two find a best, barely; one finds it worst of four: by wins b comes first, by majority a."""
    rankings = [[1, 2, 3, 4], [1, 2, 3, 4], [4, 1, 2, 3]]
    assert majority(rankings) == [1, 2, 3, 4]
    # wins of a: 3 + 3 + 0, of b: 2 + 2 + 3
    assert bradley_terry(rankings) == [2, 1, 3, 4]


def test_strengths_by_hand() -> None:
    """Two outputs, a won 3 of 4; without a prior the odds would be 3. By symmetry the strengths are s and 1 / s:
    what a is expected to win, 4 s^2 / (s^2 + 1) + 2 p s / (s + 1), is what it won, 3 + p."""
    s, other = strengths([[1, 2], [1, 2], [1, 2], [2, 1]])
    assert other == pytest.approx(1 / s)
    assert 4 * s**2 / (s**2 + 1) + 2 * PRIOR * s / (s + 1) == pytest.approx(3 + PRIOR, abs=1e-6)
    assert 2.6 < s * s < 3


def test_who_wins_always_has_a_finite_strength_and_ties_are_half_wins() -> None:
    found = strengths([[1, 2, 3]] * 3)
    assert all(math.isfinite(strength) and strength > 0 for strength in found)
    assert found[0] > found[1] > found[2]
    assert strengths([[1, 1], [1, 1]]) == pytest.approx([1, 1])
    assert bradley_terry([[1, 2, 2], [2, 1, 2]]) == [1, 1, 3]


def test_the_strengths_are_the_likeliest() -> None:
    """Against scipy's minimum of the written-out likelihood."""
    rankings = [[1, 2, 3, 4], [2, 1, 3, 3], [4, 1, 2, 3]]

    def loss(logs: list[float]) -> float:
        found = 0.0
        for one in range(4):
            found += PRIOR * (math.log1p(math.exp(-logs[one])) + math.log1p(math.exp(logs[one])))
            for other in range(4):
                wins = sum((r[one] < r[other]) + 0.5 * (r[one] == r[other]) for r in rankings if one != other)
                found += wins * math.log1p(math.exp(logs[other] - logs[one]))
        return found

    best = minimize(loss, [0.0] * 4, tol=1e-10).x
    assert [math.log(s) for s in strengths(rankings)] == pytest.approx(list(best), abs=1e-4)


def test_the_order_is_that_of_the_wins() -> None:
    """All judgments compare all pairs: with equal numbers of comparisons more wins are a greater strength."""
    draw = random.Random(1)
    for _ in range(100):
        count = draw.randint(2, 6)
        rankings = [[draw.randint(1, count) for _ in range(count)] for _ in range(draw.randint(1, 5))]
        wins = [
            sum((r[one] < r[other]) + 0.5 * (r[one] == r[other]) for r in rankings for other in range(count))
            for one in range(count)
        ]
        assert bradley_terry(rankings) == places([-won for won in wins])
