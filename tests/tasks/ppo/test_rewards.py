"""Rewards: models, functions and mixes, and what is said of functions that go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tasks.models import load_scalar_model
from tasks.ppo.rewards import call, weighted
from tasks.stage import UserError
from tests.tasks.ppo.toy import PROMPTS, Folders, judged, liked, liked_share, make_trainer

RESPONSES = [[1, 2], [3], [4]]


def constant(given: Any) -> Any:
    def reward(prompts: list[Any], responses: list[Any]) -> Any:
        return given

    return reward


def raising(prompts: list[Any], responses: list[Any]) -> list[float]:
    raise KeyError("length")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0], r"shape \(2,\) for 3 responses; it must give one number for each: shape \(3,\)"),
        (1.0, r"shape \(\)"),
        (torch.zeros(3, 1), r"shape \(3, 1\)"),
        ([1.0, float("nan"), float("nan")], r"gave nan for 2 of 3 responses, first for \[3\] to \[9\]"),
        ([1.0, 2.0, float("-inf")], r"gave -inf for 1 of 3 responses, first for \[4\]"),
        (None, "gave NoneType, not numbers"),
        (["good", "bad", "bad"], "gave list, not numbers"),
    ],
)
def test_what_is_wrong_with_scores_is_said(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"the reward function `reward` .*{message}"):
        call(constant(given), [[8], [9], [9]], RESPONSES)


def test_a_function_that_raises_is_named_with_the_line() -> None:
    with pytest.raises(
        UserError, match=r"`raising` raised KeyError: 'length' \(.*test_rewards\.py, line \d+\)"
    ) as error:
        call(raising, [[8]] * 3, RESPONSES)
    assert isinstance(error.value.__cause__, KeyError)


def test_scores_may_be_a_list_a_tensor_or_integers() -> None:
    for given in ([1, 2, 3], [1.0, 2.0, 3.0], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)):
        scores = call(constant(given), [[8]] * 3, RESPONSES)
        assert scores.tolist() == [1.0, 2.0, 3.0]
        assert (scores.dtype, scores.requires_grad) == (torch.float32, False)


def test_one_reward_is_a_mix_of_one() -> None:
    assert weighted(liked) == [(liked, 1.0)]
    assert weighted([(liked, 2), (raising, 0.5)]) == [(liked, 2.0), (raising, 0.5)]
    with pytest.raises(UserError, match="no reward was handed in"):
        weighted([])


def test_a_reward_model_is_its_logit_less_its_bias(folders: Folders) -> None:
    trainer = make_trainer(folders, reward="model")
    batch = judged(trainer)
    model = load_scalar_model(folders.reward)
    with torch.no_grad():
        expected = [
            model(input_ids=tokens[keep][None]).logits[0, 0] - 0.25
            for tokens, keep in zip(batch.rollout.tokens, batch.rollout.mask, strict=True)
        ]
    assert_close(batch.scores, torch.stack(expected), rtol=0, atol=1e-5)


def test_it_still_scores_as_before_when_the_value_model_that_began_as_it_has_moved(folders: Folders) -> None:
    """Reward and value model were handed in as one object, and the value model is trained in place."""
    trainer = make_trainer(folders, reward="model", value_warmup_epochs=3)
    rollout, prompts = trainer.sample(0)
    before = trainer.score(rollout, prompts)
    list(trainer)
    assert torch.equal(trainer.score(rollout, prompts), before)


def test_a_mix_adds_up_with_its_weights(folders: Folders) -> None:
    model = load_scalar_model(folders.reward)
    seen: list[tuple[list[Any], list[Any]]] = []

    def minus_length(prompts: list[Any], responses: list[Any]) -> list[float]:
        seen.append((prompts, responses))
        return [-len(response) for response in responses]

    mixed = make_trainer(folders, reward=[(model, 0.5), (liked, 2.0), (minus_length, 0.1)])
    of_model = make_trainer(folders, reward="model")
    batch = judged(mixed)
    lengths = batch.mask.sum(-1)
    expected = 0.5 * judged(of_model).scores + 2 * liked_share(batch.rollout) - 0.1 * lengths
    assert_close(batch.scores, expected, rtol=1e-5, atol=1e-5)
    prompts, responses = seen[0]
    assert responses == batch.rollout.response_ids()
    assert prompts == [PROMPTS[place] for place in mixed.sample(0)[1]], "as they were handed in"


def test_a_bad_function_stops_before_anything_is_learned(folders: Folders) -> None:
    trainer = make_trainer(folders, reward=constant([float("nan")] * 16))
    with pytest.raises(UserError, match="gave nan for 16 of 16 responses"):
        next(iter(trainer))
    assert trainer.steps == 0
