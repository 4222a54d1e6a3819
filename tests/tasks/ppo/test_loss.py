"""PPO's losses, worked by hand, and their gradients over micro-batches."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tasks.ppo.loss import PolicyLoss, policy_loss, value_loss

RATIOS = [0.5, 0.9, 1.1, 1.5]


def losses_of(ratios: list[float], advantage: float, clip_range: float = 0.2) -> tuple[PolicyLoss, Tensor]:
    """The policy loss of one row in which every token has this advantage, and the log-probabilities it is of."""
    old = torch.tensor([[-1.0, -2.0, -0.5, -3.0][: len(ratios)]])
    logprobs = (old + torch.tensor([ratios]).log()).requires_grad_()
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    loss = policy_loss(logprobs, old, torch.full_like(old, advantage), mask, clip_range, float(len(ratios)))
    return loss, logprobs


# The larger of -A * ratio and -A * clip(ratio, 0.8, 1.2); where the clipped one is the larger the gradient is 0.
# Otherwise the gradient of -A * ratio with respect to log pi is -A * ratio.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (0.5, 2.0, -1.0, -1.0, 0.0),  # max(-1.0, -1.6)
        (0.9, 2.0, -1.8, -1.8, 0.0),
        (1.1, 2.0, -2.2, -2.2, 0.0),
        (1.5, 2.0, -2.4, 0.0, 1.0),  # max(-3.0, -2.4)
        (0.5, -2.0, 1.6, 0.0, 1.0),  # max(1.0, 1.6)
        (0.9, -2.0, 1.8, 1.8, 0.0),
        (1.1, -2.0, 2.2, 2.2, 0.0),
        (1.5, -2.0, 3.0, 3.0, 0.0),  # max(3.0, 2.4)
    ],
)
def test_policy_loss_of_one_token(ratio: float, advantage: float, loss: float, gradient: float, clipped: float) -> None:
    result, logprobs = losses_of([ratio], advantage)
    result.loss.backward()
    assert logprobs.grad is not None
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert result.clip_fraction.item() == clipped


def test_policy_loss_is_the_mean_over_tokens() -> None:
    # (-1.0 - 1.8 - 2.2 - 2.4) / 4 and (1.6 + 1.8 + 2.2 + 3.0) / 4, from the table above
    assert losses_of(RATIOS, 2.0)[0].loss.item() == pytest.approx(-1.85, abs=1e-6)
    assert losses_of(RATIOS, -2.0)[0].loss.item() == pytest.approx(2.15, abs=1e-6)


def test_what_is_said_of_the_ratios() -> None:
    result, _ = losses_of(RATIOS, 2.0)
    assert result.clip_fraction.item() == 0.25  # the last alone: at 0.5 the clip does not matter
    assert result.ratio.item() == pytest.approx(1.0, abs=1e-6)
    # mean of ratio - 1 - log ratio: (0.1931472 + 0.0053605 + 0.0046898 + 0.0945349) / 4
    assert result.approx_kl.item() == pytest.approx(0.0744331, abs=1e-6)
    by_hand = sum(ratio - 1 - log(ratio) for ratio in RATIOS) / 4
    assert result.approx_kl.item() == pytest.approx(by_hand, abs=1e-6)


def test_policy_loss_ignores_padding() -> None:
    old, mask = torch.tensor([[-1.0, 0.0]]), torch.tensor([[True, False]])
    logprobs = torch.tensor([[-1.0 + log(1.1), -50.0]], requires_grad=True)
    result = policy_loss(logprobs, old, torch.tensor([[1.0, 1000.0]]), mask, 0.2, 1.0)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-1.1, abs=1e-6)
    assert result.ratio.item() == pytest.approx(1.1, abs=1e-6)
    assert result.clip_fraction.item() == 0
    assert logprobs.grad is not None
    assert logprobs.grad[0, 1] == 0


# Old value 1, clip range 0.5: the clipped value lies in [0.5, 1.5].
@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (1.2, 2.0, 0.32, -0.8),  # within the range: (1.2 - 2)^2 / 2, slope 1.2 - 2
        (3.0, 2.0, 0.5, 1.0),  # clipped to 1.5: errors 1 and 0.25, the worse counts
        (2.0, 2.0, 0.125, 0.0),  # right, but clipped to 1.5: error 0.25, and no slope
        (0.0, -1.0, 1.125, 0.0),  # clipped to 0.5: errors 1 and 2.25
        (0.0, 4.0, 8.0, -4.0),  # clipped to 0.5: errors 16 and 12.25
    ],
)
def test_value_loss_of_one_token(value: float, target: float, loss: float, gradient: float) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = value_loss(values, torch.tensor([[1.0]]), torch.tensor([[target]]), mask, 0.5, 1.0)
    result.backward()
    assert values.grad is not None
    assert result.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_value_loss_is_the_mean_over_kept_tokens() -> None:
    values, old = torch.tensor([[1.2, 3.0, 77.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    returns, mask = torch.tensor([[2.0, 2.0, -5.0]]), torch.tensor([[True, True, False]])
    assert value_loss(values, old, returns, mask, 0.5, 2.0).item() == pytest.approx((0.32 + 0.5) / 2, abs=1e-6)


def test_micro_batches_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    logprobs, old, advantages, returns = torch.randn(4, 5, 4).double()
    count = float(mask.sum())

    def gradient(*parts: Tensor) -> tuple[Tensor, list[float]]:
        new = logprobs.clone().requires_grad_()
        figures = torch.zeros(5, dtype=torch.double)
        for rows in parts:
            policy = policy_loss(new[rows], old[rows], advantages[rows], mask[rows], 0.2, count)
            value = value_loss(new[rows], old[rows], returns[rows], mask[rows], 0.3, count)
            (policy.loss + value).backward()
            figures += torch.stack([*policy, value]).detach()
        assert new.grad is not None
        return new.grad, figures.tolist()

    whole, whole_figures = gradient(torch.arange(5))
    parts, part_figures = gradient(torch.tensor([3]), torch.tensor([0, 2]), torch.tensor([4, 1]))
    assert whole.abs().sum() > 0.1
    assert_close(parts, whole, rtol=0, atol=1e-12)
    assert part_figures == pytest.approx(whole_figures, abs=1e-7)  # the counts are worked out in single precision
