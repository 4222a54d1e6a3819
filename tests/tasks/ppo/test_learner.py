"""One optimizer step by hand: clipping, AdamW, schedule, moving average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tasks.ppo.learner import Learner, NotFinite
from tasks.ppo.params import PPOParams


def learner(start: list[float], ema_decay: float | None = None, steps: int = 10, **changes: Any) -> Learner:
    weight = nn.Parameter(torch.tensor(start))
    return Learner([([weight], 0.1)], PPOParams(**changes), steps, ema_decay)


def step(one: Learner, gradient: list[float]) -> float:
    one.weights[0].grad = torch.tensor(gradient)
    norm = one.step(lambda tensor: tensor)
    one.schedule.step()
    return norm


def values(one: Learner) -> list[float]:
    return one.weights[0].tolist()


def test_adam_by_hand() -> None:
    one = learner([1.0, 2.0], max_grad_norm=100.0, adam_betas=(0.9, 0.95), adam_eps=1e-8)
    assert step(one, [3.0, -4.0]) == pytest.approx(5.0)
    # the first step: m / (1 - 0.9) = g, v / (1 - 0.95) = g^2: the rate times the sign of the gradient; no weight decay
    assert values(one) == pytest.approx([0.9, 2.1])
    step(one, [1.0, 0.0])
    # m = 0.9 * 0.3 + 0.1 = 0.37, / (1 - 0.81) = 1.947368; v = 0.95 * 0.45 + 0.05 = 0.4775, / (1 - 0.9025) = 4.897436
    # m = 0.9 * -0.4 = -0.36 -> -1.894737;                 v = 0.95 * 0.8 = 0.76 -> 7.794872
    expected = [0.9 - 0.1 * 1.947368 / 4.897436**0.5, 2.1 + 0.1 * 1.894737 / 7.794872**0.5]
    assert values(one) == pytest.approx(expected, abs=1e-6)


def test_clipping_really_clips() -> None:
    """A first step of Adam hides the gradient's scale; its second moment does not."""
    clipped, small = learner([0.0, 0.0], max_grad_norm=0.5), learner([0.0, 0.0], max_grad_norm=0.5)
    assert step(clipped, [30.0, -40.0]) == pytest.approx(50.0), "the norm before"
    # 0.5 / 50 of (30, -40)
    assert step(small, [0.3, -0.4]) == pytest.approx(0.5)
    moments = [one.optimizer.state[one.weights[0]]["exp_avg_sq"].tolist() for one in (clipped, small)]
    assert moments[0] == pytest.approx([0.05 * 0.09, 0.05 * 0.16], rel=1e-4)
    assert moments[0] == pytest.approx(moments[1], rel=1e-4)


def test_the_moving_average_by_hand() -> None:
    one = learner([1.0], ema_decay=0.992)
    step(one, [1.0])
    step(one, [1.0])
    # the weights are 1, 0.9, 0.8: 0.992 * 1 + 0.008 * 0.9 = 0.9992; 0.992 * 0.9992 + 0.008 * 0.8 = 0.9976064
    assert values(one) == pytest.approx([0.8], abs=1e-6)
    assert one.copy_weights()[0].tolist() == pytest.approx([0.9976064], abs=1e-6)
    assert learner([1.0]).copy_weights()[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),  # to 0 over the four steps after the warm-up
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),  # (1 + cos(pi * k / 4)) / 2
    ],
)
def test_schedules_by_hand(schedule: str, shares: list[float]) -> None:
    one = learner([1.0], steps=6, schedule=schedule, warmup_share=1 / 3)
    rates = []
    for _ in shares:
        rates.append(one.learning_rate)
        step(one, [1.0])
    assert rates == pytest.approx([0.1 * share for share in shares], abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    one = learner([1.0, 2.0], ema_decay=0.5)
    with pytest.raises(NotFinite, match=r"norm is (nan|inf)"):
        step(one, [1.0, bad])
    assert values(one) == [1.0, 2.0]
    assert one.weights[0].grad is None
    assert step(one, [1.0, 1.0]) == pytest.approx(2**0.5), "and what follows is as if it had not been"
    assert values(one) == pytest.approx([0.9, 1.9])


def test_processes_gradients_are_added_up_and_a_missing_one_is_zero() -> None:
    one = learner([1.0, 2.0], max_grad_norm=100.0)
    seen = []

    def double(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.tolist())
        return 2 * tensor

    assert one.step(double) == 0
    one.weights[0].grad = torch.tensor([3.0, -4.0])
    assert one.step(double) == pytest.approx(10)
    assert seen == [[0.0, 0.0], [3.0, -4.0]]
