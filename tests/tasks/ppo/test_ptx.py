"""PPO-ptx: the language-model loss, and its gradient beside PPO's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tasks.models import load_language_model, split_model
from tasks.ppo.ptx import Text, losses, texts_of_step, token_count
from tests.tasks.ppo.toy import END, Folders, gradients, judged, make_trainer

TEXTS = [
    Text([5, 6, 7], [8, 9, END]),
    Text([10], [11, 12, 13, 14, 15]),  # a plain text: what follows its first token
    Text([20, 21, 22, 23], [END]),
    Text([30, 31], [40, 41, 42, END]),
]


def plain_nll(folders: Folders, texts: list[Text]) -> Tensor:
    """Summed over the predicted tokens, one text at a time through the whole model."""
    model = load_language_model(folders.sft)
    total = torch.zeros(())
    for text in texts:
        logits = model(input_ids=torch.tensor([text.given + text.predicted])).logits[0, len(text.given) - 1 : -1]
        total -= logits.log_softmax(-1)[torch.arange(len(text.predicted)), text.predicted].sum()
    return total.detach()


@pytest.mark.parametrize("depth", [None, 0, 1, 2])
@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_the_loss_is_the_mean_over_predicted_tokens(folders: Folders, depth: int | None, at_once: int) -> None:
    model = load_language_model(folders.sft)
    parts = list(losses(*split_model(model, depth), TEXTS, at_once, token_count(TEXTS)))
    assert len(parts) == -(-4 // at_once)
    assert token_count(TEXTS) == 13
    assert_close(torch.stack(parts).sum().detach(), plain_nll(folders, TEXTS) / 13, rtol=1e-5, atol=1e-6)


def test_texts_come_in_order_each_before_any_comes_again() -> None:
    assert texts_of_step(TEXTS, [2, 0, 3, 1], 0, 3) == [TEXTS[2], TEXTS[0], TEXTS[3]]
    assert texts_of_step(TEXTS, [2, 0, 3, 1], 1, 3) == [TEXTS[1], TEXTS[2], TEXTS[0]]


@pytest.mark.parametrize("layers", [1, "all"])
def test_the_gradient_is_ppos_and_gamma_times_the_language_models(folders: Folders, layers: object) -> None:
    """Equation 2 of InstructGPT, in its proportion: 8 texts for each of the minibatch's 8 episodes."""
    options: dict[str, Any] = {"ptx_coef": 27.8, "ptx_examples_per_episode": 8, "trainable_layers": layers}
    arguments = {"pretraining": TEXTS}
    rows = torch.arange(8)
    mixed = make_trainer(folders, arguments=arguments, **options)
    found, figures = gradients(mixed, judged(mixed), rows)
    alone = make_trainer(folders, trainable_layers=layers)
    of_ppo, _ = gradients(alone, judged(alone), rows)

    own = make_trainer(folders, arguments=arguments, **options)
    texts = [TEXTS[own.ptx_order[place % 4]] for place in range(64)]
    assert figures["ptx_loss"] == pytest.approx(plain_nll(folders, texts).item() / token_count(texts), rel=1e-5)
    for loss in losses(own.roles.trunk, own.roles.policy, texts, 64, token_count(texts)):
        loss.backward()
    of_language_model = [weight.grad for weight in own.policy_learner.weights]
    for gradient, ppo, language_model in zip(found, of_ppo, of_language_model, strict=False):  # the policy's come first
        assert language_model is not None
        assert_close(gradient, ppo + 27.8 * language_model, rtol=1e-3, atol=1e-4)
    assert_close(found[len(of_language_model) :], of_ppo[len(of_language_model) :])


def test_the_texts_go_on_from_step_to_step(folders: Folders) -> None:
    trainer = make_trainer(folders, arguments={"pretraining": TEXTS}, ptx_coef=1.0, ptx_examples_per_episode=1)
    losses_of_steps = [row["ptx_loss"] for row in trainer]
    assert trainer.steps == 4
    assert losses_of_steps[1] < losses_of_steps[0], "it learns them"
