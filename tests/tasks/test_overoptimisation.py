"""Best of n against every draw, and where gold turns down."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from tasks.overoptimisation import best_of_n, curve_of_best_of_n, kl_of_best_of_n, turning_point


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_draws(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    scores, values = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    for row, found in enumerate(best_of_n(scores, values, n).tolist()):
        best = [max((scores[row, place].item(), place) for place in draw)[1] for draw in combinations(range(5), n)]
        assert found == pytest.approx(values[row, best].mean().item(), abs=1e-5)


def test_its_kl_is_that_of_the_order_statistic() -> None:
    """Of n uniform numbers the largest has the density n x^(n-1): its KL from the uniform one, by integration."""
    for n in (1, 2, 4, 16):
        x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        density = n * x ** (n - 1)
        assert kl_of_best_of_n(n) == pytest.approx((density * density.log()).mean().item(), abs=1e-4)


def test_the_curve_of_best_of_n() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(3, 1)
    rows = curve_of_best_of_n(scores, -scores, times=10, seed=1)
    assert [row["point"] for row in rows] == [1, 2, 4]
    assert [row["score"] for row in rows] == pytest.approx([2.5, 10 / 3, 4.0])
    assert [row["gold"] for row in rows] == pytest.approx([-2.5, -10 / 3, -4.0])
    assert rows[-1]["root_kl"] == pytest.approx(math.sqrt(math.log(4) - 3 / 4))


def test_gold_that_falls_for_certain_has_turned_down() -> None:
    start = torch.linspace(0.2, 0.6, 20)
    noise = 0.2 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    rising = {0: start, 4: start + 0.1, 8: start + 0.2}
    found = turning_point(rising, times=500, seed=1)
    assert (found["gold_peak_update"], found["turned_down"]) == (8, 0.0)
    assert turning_point({**rising, 12: start + 0.05}, 500, 1) == pytest.approx(
        {"gold_peak_update": 8, "gold_at_peak": 0.6, "turned_down": 1.0}
    )
    # down by less than the noise: not for certain
    assert turning_point({**rising, 12: rising[8] - 0.01 + noise - noise.mean()}, 500, 1)["turned_down"] == 0.0
