"""Token rewards, advantages and whitening, worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tasks.ppo.advantages import gae, last_token, token_rewards, whiten

RAGGED = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


def close(actual: Tensor, expected: list[list[float]]) -> None:
    assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-6)


def test_last_token() -> None:
    assert last_token(RAGGED).tolist() == [2, 1, 0]


def test_token_rewards_penalise_each_token_and_score_the_last() -> None:
    kl = torch.tensor([[1.0, -1.0, 0.0], [0.5, 1.0, 0.0]])
    # row 1: -0.1 * (1, -1, 0), then + 2 on the third; row 2: -0.1 * (0.5, 1), then - 1 on the second
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, RAGGED[:2], 0.1)
    close(rewards, [[-0.1, 0.1, 2.0], [-0.05, -1.1, 0.0]])


def test_token_rewards_ignore_what_stands_on_padding() -> None:
    close(token_rewards(torch.tensor([1.0]), torch.tensor([[0.0, 0.0, 7.0]]), RAGGED[1:2], 0.5), [[0.0, 1.0, 0.0]])


def test_token_rewards_leave_their_arguments_alone() -> None:
    kl = torch.zeros(1, 3)
    token_rewards(torch.tensor([1.0]), kl, RAGGED[:1], 1.0)
    assert not kl.any()


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0], [3.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 0.2], [0.4, 0.6, 0.0], [1.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, RAGGED, gamma=0.9, gae_lambda=0.5)
    # gamma * lambda = 0.45
    # row 1: delta_3 = 2 - 0.2 = 1.8;              A_3 = 1.8
    #        delta_2 = 0 + 0.9 * 0.2 - 1 = -0.82;  A_2 = -0.82 + 0.45 * 1.8 = -0.01
    #        delta_1 = 1 + 0.9 * 1 - 0.5 = 1.4;    A_1 = 1.4 + 0.45 * -0.01 = 1.3955
    # row 2: delta_2 = -1 - 0.6 = -1.6;            A_2 = -1.6
    #        delta_1 = 0.5 + 0.9 * 0.6 - 0.4 = 0.64; A_1 = 0.64 + 0.45 * -1.6 = -0.08
    # row 3: A_1 = 3 - 1 = 2
    close(advantages, [[1.3955, -0.01, 1.8], [-0.08, -1.6, 0.0], [2.0, 0.0, 0.0]])
    # A + V
    close(returns, [[1.8955, 0.99, 2.0], [0.32, -1.0, 0.0], [3.0, 0.0, 0.0]])


def test_gae_ignores_what_stands_on_padding() -> None:
    rewards, values = torch.tensor([[1.0, 5.0]]), torch.tensor([[0.25, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[True, False]]), gamma=1.0, gae_lambda=1.0)
    close(advantages, [[0.75, 0.0]])
    close(returns, [[1.0, 0.0]])


def test_gae_with_lambda_one_is_the_discounted_return_less_the_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.3, -0.4, 0.9]])
    advantages, returns = gae(rewards, values, RAGGED[:1], gamma=0.5, gae_lambda=1.0)
    # 1 + 0.5 * 2 + 0.25 * 3 = 2.75; 2 + 0.5 * 3 = 3.5; 3
    close(returns, [[2.75, 3.5, 3.0]])
    close(advantages, [[2.45, 3.9, 2.1]])


def test_gae_with_lambda_zero_looks_one_step_ahead() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.3, -0.4, 0.9]])
    advantages, _ = gae(rewards, values, RAGGED[:1], gamma=0.5, gae_lambda=0.0)
    # 1 + 0.5 * -0.4 - 0.3; 2 + 0.5 * 0.9 + 0.4; 3 - 0.9
    close(advantages, [[0.5, 2.85, 2.1]])


def test_whiten_by_hand() -> None:
    # kept: 1, 3, 5, 7; mean 4, variance (9 + 1 + 1 + 9) / 4 = 5, standard deviation 2.2360680
    values = torch.tensor([[1.0, 3.0, 5.0], [7.0, 100.0, 100.0]])
    whitened = whiten(values, torch.tensor([[True, True, True], [True, False, False]]))
    close(whitened, [[-1.3416408, -0.4472136, 0.4472136], [1.3416408, 0.0, 0.0]])


def test_whiten_without_a_shift_keeps_the_mean() -> None:
    # as above, plus the mean of 4
    values = torch.tensor([[1.0, 3.0, 5.0], [7.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    close(whiten(values, mask, shift_mean=False), [[2.6583592, 3.5527864, 4.4472136], [5.3416408, 0.0, 0.0]])


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_whiten_of_equal_values_is_zero(value: float) -> None:
    close(whiten(torch.full((1, 3), value), RAGGED[:1]), [[0.0, 0.0, 0.0]])
