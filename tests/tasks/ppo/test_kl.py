"""The KL penalty's estimators and controller, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tasks.ppo.kl import KLController, token_kl

MASK = torch.tensor([[True, True, False]])


def test_estimators_by_hand() -> None:
    # probabilities under the policy 0.5 and 0.2, under the reference 0.25 and 0.4: r = 1/2 and 2
    logprobs, ref_logprobs = torch.tensor([[0.5, 0.2, 0.9]]).log(), torch.tensor([[0.25, 0.4, 0.1]]).log()
    # k1 = -log r
    k1 = torch.tensor([[math.log(2), -math.log(2), 0.0]])
    assert_close(token_kl(logprobs, ref_logprobs, MASK, "k1"), k1)
    # k3 = r - 1 - log r: 1/2 - 1 + log 2 and 2 - 1 - log 2
    k3 = torch.tensor([[math.log(2) - 0.5, 1 - math.log(2), 0.0]])
    assert_close(token_kl(logprobs, ref_logprobs, MASK, "k3"), k3)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_both_are_unbiased(estimator: str) -> None:
    """Their mean under the policy is the KL itself: three tokens with their exact probabilities as weights."""
    policy, reference = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0.2, 0.5, 0.3]])
    estimates = token_kl(policy.log(), reference.log(), torch.ones(1, 3, dtype=torch.bool), estimator)  # type: ignore[arg-type]
    expected = 0.6 * math.log(0.6 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.1 * math.log(0.1 / 0.3)
    assert (policy * estimates).sum().item() == pytest.approx(expected, abs=1e-6)


def test_a_fixed_coefficient_stays() -> None:
    controller = KLController(0.02, None, 1000)
    controller.update(1000.0, 64)
    assert controller.coefficient == 0.02


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 64 / 1000),  # a tenth over
        (5.4, 1 - 0.1 * 64 / 1000),
        (60.0, 1 + 0.2 * 64 / 1000),  # the error is clipped at 0.2 both ways
        (0.0, 1 - 0.2 * 64 / 1000),
    ],
)
def test_the_adaptive_controller_by_hand(kl: float, factor: float) -> None:
    controller = KLController(0.1, 6.0, 1000)
    controller.update(kl, 64)
    assert controller.coefficient == pytest.approx(0.1 * factor, rel=1e-9)
