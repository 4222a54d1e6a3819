"""Against trl 1.12.0's PPOTrainer: the same weights, the same episodes, the numbers it had (bench/trl_reference.py).

Where it is right, ours are its numbers to fp32 rounding. Three things it does otherwise, and a test each says why ours
are right: the score of a response that ends counts one position after its last token; the value loss is a mean over
that position too; with gradient accumulation the loss is a mean of the micro-batches' means.

Its whitening divides by the unbiased standard deviation, ours by the population's, as Ziegler et al. did: that is a
factor of sqrt((n - 1) / n) over n tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tasks.ppo.advantages import gae
from tasks.ppo.batch import Batch, Episodes
from tasks.ppo.params import PPOParams
from tasks.ppo.rollout import as_rollout
from tasks.ppo.trainer import PPOTrainer

FIXTURE = Path(__file__).with_name("trl_1_12.json")
FACTS = json.loads(FIXTURE.read_text())
TENSORS = load_file(FIXTURE.with_suffix(".safetensors"))
PAD, END = 0, 2
CASES: dict[str, Any] = FACTS["cases"]
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-6}


def named(lengths: str, epochs: int, accumulation: int, gae_lambda: float, minibatches: int = 1) -> str:
    return f"{lengths}-epochs{epochs}-accumulation{accumulation}-lambda{gae_lambda}-minibatches{minibatches}"


# of fixed length, or with lambda and gamma 1, the late score makes no difference to the advantages
RIGHT = [name for name, case in CASES.items() if case["lengths"] == "fixed" or case["gae_lambda"] == 1.0]


def model(name: str) -> Any:
    kind = LlamaForCausalLM if name in ("policy", "reference") else LlamaForSequenceClassification
    built = kind(LlamaConfig(**FACTS["model_config"], num_labels=1))
    start = f"models/{name}/"
    weights = {key.removeprefix(start): value for key, value in TENSORS.items() if key.startswith(start)}
    missing = built.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}, "tied to the embedding"
    return built


@dataclass
class Ours:
    trainer: PPOTrainer
    batch: Batch


def ours(name: str, micro_batch_size: int = 8) -> Ours:
    case, settings = CASES[name], FACTS["settings"]
    queries, responses = TENSORS[f"{case['lengths']}/queries"], TENSORS[f"{case['lengths']}/responses"]
    prompts = [row[row != PAD].tolist() for row in queries]
    trainer = PPOTrainer(
        model("policy"),
        model("reference"),
        model("reward"),
        model("value"),
        prompts,
        PPOParams(
            batch_size=8,
            minibatch_size=8 // case["minibatches"],
            micro_batch_size=micro_batch_size,
            epochs=case["epochs"],
            learning_rate=settings["learning_rate"],
            value_learning_rate=settings["learning_rate"],
            adam_betas=(0.9, 0.999),
            adam_eps=1e-8,
            max_grad_norm=1e9,  # it does not clip, whatever it is told
            temperature=settings["temperature"],
            kl_coef=settings["kl_coef"],
            gae_lambda=case["gae_lambda"],
            clip_range=settings["cliprange"],
            value_clip_range=settings["cliprange_value"],
            missing_end_penalty=case["missing_eos_penalty"] or 0.0,
        ),
        max_new_tokens=6,
    )
    rollout = as_rollout(
        trainer.roles.trunk,
        trainer.roles.policy,
        prompts,
        [row[row != PAD].tolist() for row in responses],
        end_token=END,
        pad_token=PAD,
        temperature=settings["temperature"],
    )
    places = list(range(8))
    batch = trainer.judge(Episodes(rollout, places, trainer.score(rollout, places)))
    count = int(batch.mask.sum())
    return Ours(trainer, batch._replace(advantages=batch.advantages * math.sqrt((count - 1) / count)))


def train(one: Ours, rows: Tensor) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """A step; the gradients that the optimizers saw, and the metrics."""
    kept: dict[str, dict[str, Tensor]] = {}
    models = {"policy": one.trainer.policy_model, "value": one.trainer.value_model}
    assert one.trainer.value_learner is not None

    def keep(*_: Any) -> None:
        for name, of in models.items():
            assert of is not None
            found = {key: weight.grad.clone() for key, weight in of.named_parameters() if weight.grad is not None}
            kept.setdefault(name, found)

    hook = one.trainer.policy_learner.optimizer.register_step_pre_hook(keep)
    figures = one.trainer.train_minibatch(one.batch, rows)
    one.batch = one.batch._replace(own_values=None)  # as `learn` does
    hook.remove()
    return kept, figures


def theirs(name: str, step: int, role: str) -> dict[str, Tensor]:
    start = f"{name}/step{step}/{role}_grad/"
    found = {key.removeprefix(start): value for key, value in TENSORS.items() if key.startswith(start)}
    assert len(found) >= 4
    return found


def rows_of(step: dict[str, Any]) -> Tensor:
    return torch.tensor([row for micro in step["micro"] for row in micro["rows"]])


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, gradient in expected.items():
        assert_close(found[key], gradient, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_what_is_known_of_the_episodes(name: str) -> None:
    batch = ours(name).batch
    mask = batch.mask
    assert torch.equal(mask, TENSORS[f"{name}/response_mask"])
    close: dict[str, Any] = {"rtol": 0, "atol": 5e-6}
    assert_close(batch.shaped, TENSORS[f"{name}/scores"], **close)
    for key, found in (("logprobs", batch.logprobs), ("ref_logprobs", batch.ref_logprobs), ("values", batch.values)):
        assert_close(found, torch.where(mask, TENSORS[f"{name}/{key}"], 0.0), **close)
    if name in RIGHT:
        assert_close(batch.advantages, TENSORS[f"{name}/advantages"], **close)
        assert_close(batch.returns, torch.where(mask, TENSORS[f"{name}/returns"], 0.0), **close)


@pytest.mark.parametrize("micro_batch_size", [8, 4, 3])
@pytest.mark.parametrize("name", [name for name in RIGHT if CASES[name]["lengths"] == "fixed"])
def test_losses_and_gradients_of_every_step(name: str, micro_batch_size: int) -> None:
    """Of fixed length all micro-batches have as many tokens, so that TRL's mean of means is the mean."""
    one, case = ours(name, micro_batch_size), CASES[name]
    clipped = 0.0
    for number, step in enumerate(case["steps"]):
        found, figures = train(one, rows_of(step))
        same_gradients(found["policy"], theirs(name, number, "policy"))
        same_gradients(found["value"], theirs(name, number, "value"))
        for ours_is, theirs_is in (
            ("policy_loss", "pg_loss"),
            ("value_loss", "vf_loss"),
            ("clip_fraction", "clip_fraction"),
            ("ratio", "mean_ratio"),
        ):
            expected = sum(micro[theirs_is] for micro in step["micro"]) / len(step["micro"])
            assert figures[ours_is] == pytest.approx(expected, rel=1e-4, abs=2e-6), ours_is
        clipped = max(clipped, figures["clip_fraction"])
    assert len(case["steps"]) == case["epochs"] * case["minibatches"]
    assert (clipped > 0.1) == (case["epochs"] == 4), "the later epochs do leave the clip range"
    if case["epochs"] == 4:
        for role, of in (("policy", one.trainer.policy_model), ("value", one.trainer.value_model)):
            assert of is not None
            start = f"{name}/final/{role}/"
            final = {key.removeprefix(start): value for key, value in TENSORS.items() if key.startswith(start)}
            assert final
            for key, weight in final.items():
                assert_close(of.get_parameter(key).detach(), weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("epochs", [1, 4])
def test_ragged_policy_gradients(epochs: int) -> None:
    """Without accumulation and with lambda 1 TRL's are right, in every epoch."""
    name = named("ragged", epochs, 1, 1.0)
    one = ours(name, micro_batch_size=3)
    for number, step in enumerate(CASES[name]["steps"]):
        found, figures = train(one, rows_of(step))
        same_gradients(found["policy"], theirs(name, number, "policy"))
        assert figures["policy_loss"] == pytest.approx(step["micro"][0]["pg_loss"], rel=1e-4, abs=2e-6)
        assert figures["clip_fraction"] == pytest.approx(step["micro"][0]["clip_fraction"], abs=1e-6)


def test_accumulation_is_no_mean_of_means_here() -> None:
    """TRL divides each micro-batch by its own tokens: the same minibatch gives other gradients in two parts than whole.

    Ours are the gradients of the whole minibatch, in whichever parts it goes through.
    """
    whole, parted = named("ragged", 1, 1, 1.0), named("ragged", 1, 2, 1.0)
    tokens = [
        int(TENSORS[f"{parted}/response_mask"][micro["rows"]].sum()) for micro in CASES[parted]["steps"][0]["micro"]
    ]
    assert tokens[0] != tokens[1]
    difference = {
        key: (gradient - theirs(whole, 0, "policy")[key]).abs().max() / gradient.abs().max()
        for key, gradient in theirs(parted, 0, "policy").items()
    }
    assert all(share > 0.05 for share in difference.values()), "theirs depend on it"
    for micro_batch_size in (8, 4, 3, 1):
        found, _ = train(ours(parted, micro_batch_size), torch.arange(8))
        same_gradients(found["policy"], theirs(whole, 0, "policy"))


def test_the_score_comes_with_the_last_token_here() -> None:
    """TRL adds the score of a response that ended one position after its end token, with a value of its own there.

    After the end token nothing is chosen any more: the end token is what earned the score. With lambda < 1 the late
    position puts another value estimate between the two, and the advantages of all tokens before change with it.
    """
    name = named("ragged", 1, 1, 0.95)
    one = ours(name)
    batch, mask = one.batch, one.batch.mask
    ended, last = batch.ended, mask.sum(-1) - 1
    assert not torch.allclose(batch.returns, torch.where(mask, TENSORS[f"{name}/returns"], 0.0), atol=0.01)
    # our own function gives TRL's returns once the score stands one position later and has the value there
    late = (last + 1).clamp(max=mask.shape[1] - 1)
    rewards = batch.rewards.clone()
    rows = torch.arange(8)
    rewards[rows, last] -= batch.shaped
    rewards[rows, late] += batch.shaped
    values, value_mask = TENSORS[f"{name}/values"], TENSORS[f"{name}/value_mask"]
    assert torch.equal(value_mask.sum(-1) - mask.sum(-1), (ended & (last < mask.shape[1] - 1)).long())
    _, returns = gae(rewards, values, value_mask, 1.0, 0.95)
    assert_close(returns, torch.where(value_mask, TENSORS[f"{name}/returns"], 0.0), rtol=0, atol=5e-6)
    # and of rows that did not end early, all is the same
    full = last == mask.shape[1] - 1
    assert full.any()
    assert_close(batch.returns[full], TENSORS[f"{name}/returns"][full], rtol=0, atol=5e-6)


def test_the_value_loss_is_a_mean_over_real_tokens_here() -> None:
    """TRL's is over one position of padding a row as well, where it asks the value model what the end token was worth.

    Less that position's terms, and over the real tokens alone, TRL's loss is ours.
    """
    name = named("ragged", 1, 1, 1.0)
    one = ours(name)
    mask, value_mask = one.batch.mask, TENSORS[f"{name}/value_mask"]
    extra = value_mask & ~mask
    assert extra.sum() == 6 or extra.any()
    values, returns = TENSORS[f"{name}/values"], TENSORS[f"{name}/returns"]
    of_padding = 0.5 * ((values - returns) ** 2)[extra].sum().item()
    their_sum = CASES[name]["steps"][0]["micro"][0]["vf_loss"] * int(value_mask.sum())
    _, figures = train(one, torch.arange(8))
    assert of_padding > 0.01
    assert figures["value_loss"] == pytest.approx((their_sum - of_padding) / int(mask.sum()), rel=1e-4)
