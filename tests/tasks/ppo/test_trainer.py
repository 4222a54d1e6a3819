"""The PPO trainer on a tiny model: what a step changes, what it does not depend on, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tasks.models import (
    Branch,
    Trunk,
    load_language_model,
    load_scalar_model,
    load_tokenizer,
    save_model,
    shared_depth,
    split_model,
)
from tasks.params import load_params
from tasks.ppo.advantages import gae, token_rewards, whiten
from tasks.ppo.kl import token_kl
from tasks.ppo.rollout import Rollout
from tasks.ppo.trainer import Batch, PPOTrainer
from tests.tiny import tiny_model_dir

PAD, END = 0, 2
LIKED = range(3, 150)  # the tokens that the toy reward is for, of 330
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [20, 21, 22, 23, 24, 25, 26], [30], [31, 40, 41], [9, 9, 12]]
PARAMS = load_params(Path("params.yaml")).ppo.model_copy(
    update={
        "trainable_layers": 1,
        "updates": 2,
        "batch_size": 16,
        "samples_per_prompt": 4,
        "minibatch_size": 8,
        "micro_batch_size": 8,
        "epochs": 1,
        "learning_rate": 3e-3,
        "value_learning_rate": 3e-3,
        "value_warmup_epochs": 0,
        "kl_coef": 0.1,
        "gamma": 0.95,
        "missing_end_score": -1.0,
    }
)


class Folders(NamedTuple):
    sft: Path
    reward: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """An SFT model that often ends, and a reward model on the same lowest block, as if trained from it."""
    root = tmp_path_factory.mktemp("trainer")
    sft = load_language_model(tiny_model_dir(root / "start", seed=3))
    tokenizer = load_tokenizer(root / "start")
    sft.model.embed_tokens.weight.data[END] *= 2.5
    reward = load_scalar_model(tiny_model_dir(root / "other", reward=True, seed=4))
    reward.model.embed_tokens.load_state_dict(sft.model.embed_tokens.state_dict())
    reward.model.layers[0].load_state_dict(sft.model.layers[0].state_dict())
    save_model(sft, tokenizer, root / "sft")
    save_model(reward, tokenizer, root / "reward")
    return Folders(root / "sft", root / "reward")


def liked_share(rollout: Rollout) -> Tensor:
    """(B,) the share of a response's tokens that are liked ones, times 4."""
    liked = (rollout.responses >= LIKED.start) & (rollout.responses < LIKED.stop) & rollout.response_mask
    return 4 * liked.sum(-1) / rollout.response_mask.sum(-1)


def make_trainer(
    folders: Folders, depth: int | None = 1, trainable_layers: Literal["all"] | int = 1, **changes: Any
) -> PPOTrainer:
    sft, reward = load_language_model(folders.sft), load_scalar_model(folders.reward)
    trunk, reference = split_model(sft, depth)
    _, reward_branch = split_model(reward, depth)
    return PPOTrainer(
        trunk,
        reference.trainable_copy(trainable_layers),
        reference,
        reward_branch.trainable_copy(trainable_layers),
        liked_share,
        PROMPTS,
        PARAMS.model_copy(update=changes),
        seed=1,
        max_new_tokens=8,
        end_token=END,
        pad_token=PAD,
        value_bias=0.25,
    )


def judged(trainer: PPOTrainer, rollout: Rollout) -> Batch:
    return trainer.judge(rollout, trainer.score(rollout))


def weights(branch: Branch | Trunk) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in branch.named_parameters()}


def trained_weights(branch: Branch) -> list[Tensor]:
    return [weight.detach().clone() for weight in branch.parameters() if weight.requires_grad]


@pytest.mark.parametrize(("samples", "sizes"), [(1, (8, 3, 1)), (4, (8, 4))])
def test_a_step_does_not_depend_on_the_micro_batch_size(folders: Folders, samples: int, sizes: tuple[int]) -> None:
    """The gradients themselves, before Adam takes their scale away, and then everything after two updates."""
    gradients, after = [], []
    for size in sizes:
        trainer = make_trainer(folders, micro_batch_size=size, samples_per_prompt=samples)
        batch = judged(trainer, trainer.sample(0))
        trainer.policy_optimizer.zero_grad = trainer.value_optimizer.zero_grad = lambda: None  # type: ignore[assignment, method-assign, misc]
        figures = trainer.train_minibatch(batch, torch.arange(8))
        branches = (trainer.policy, trainer.value_model)
        gradients.append([weight.grad for branch in branches for weight in branch.parameters() if weight.requires_grad])
        whole = make_trainer(folders, micro_batch_size=size, samples_per_prompt=samples)
        history = list(whole)
        after.append((figures, history, [*trained_weights(whole.policy), *trained_weights(whole.value_model)]))
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0])
    for other in gradients[1:]:
        assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)
    for figures, history, weights_after in after[1:]:
        assert figures == pytest.approx(after[0][0], rel=1e-4, abs=1e-6)
        for row, expected in zip(history, after[0][1], strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert_close(weights_after, after[0][2], rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_episodes_that_go_through_one_by_one(folders: Folders) -> None:
    """Four samples share the forward pass of their prompt."""
    gradients = []
    for samples in (4, 1):
        trainer = make_trainer(folders)
        batch = judged(trainer, trainer.sample(0)._replace(samples=samples))
        trainer.policy_optimizer.zero_grad = trainer.value_optimizer.zero_grad = lambda: None  # type: ignore[assignment, method-assign, misc]
        trainer.train_minibatch(batch, torch.arange(8))
        branches = (trainer.policy, trainer.value_model)
        gradients.append([weight.grad for branch in branches for weight in branch.parameters() if weight.requires_grad])
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0])
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_frozen_parameters_do_not_change_and_the_trained_ones_all_do(folders: Folders) -> None:
    trainer = make_trainer(folders, depth=0)
    reference, trunk = weights(trainer.reference), weights(trainer.trunk)
    before = {"policy": weights(trainer.policy), "value": weights(trainer.value_model)}
    list(trainer)
    for name, branch in (("policy", trainer.policy), ("value", trainer.value_model)):
        for weight_name, weight in branch.named_parameters():
            changed = not torch.equal(weight, before[name][weight_name])
            top = weight_name.startswith(("backbone.layers.1.", "backbone.norm."))
            assert changed == (top or (name == "value" and weight_name == "head.weight")), f"{name} {weight_name}"
    assert all(torch.equal(weight, reference[name]) for name, weight in trainer.reference.named_parameters())
    assert all(torch.equal(weight, trunk[name]) for name, weight in trainer.trunk.named_parameters())


def test_a_shared_trunk_changes_no_number(folders: Folders) -> None:
    """Depth 1: the trunk's states are captured in generation. 0: the lowest block runs in every branch. None: whole
    models from the ids. The top block is trained each time."""
    runs = {}
    for depth in (1, 0, None):
        trainer = make_trainer(folders, depth)
        history = list(trainer)
        runs[depth] = (history, [*trained_weights(trainer.policy), *trained_weights(trainer.value_model)])
    for depth in (0, None):
        for row, expected in zip(runs[depth][0], runs[1][0], strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert_close(runs[depth][1], runs[1][1], rtol=1e-3, atol=1e-4)


def test_the_models_of_these_tests_share_a_trunk(folders: Folders) -> None:
    assert shared_depth(load_language_model(folders.sft), load_scalar_model(folders.reward), 2) == 1


def test_everything_is_trained_with_all(folders: Folders) -> None:
    trainer = make_trainer(folders, depth=None, trainable_layers="all", updates=1)
    before = weights(trainer.policy)
    reference = weights(trainer.reference)
    list(trainer)
    assert all(not torch.equal(weight, before[name]) for name, weight in trainer.policy.named_parameters())
    assert all(torch.equal(weight, reference[name]) for name, weight in trainer.reference.named_parameters())


def test_the_same_seed_gives_the_same_bits(folders: Folders) -> None:
    one, two = make_trainer(folders, value_warmup_epochs=1), make_trainer(folders, value_warmup_epochs=1)
    assert list(one) == list(two)
    for first, second in ((one.policy, two.policy), (one.value_model, two.value_model)):
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)
    other = make_trainer(folders, value_warmup_epochs=1)
    other.seed = 2
    assert list(other) != list(make_trainer(folders, value_warmup_epochs=1))


def test_judge_puts_the_pieces_together(folders: Folders) -> None:
    trainer = make_trainer(folders)
    # a reference that is not the policy, so that there is a KL penalty
    trainer.policy.backbone.norm.weight.data *= 1.1
    rollout = trainer.sample(0)
    assert 0 < rollout.ended.sum() < len(rollout.ended)
    batch = judged(trainer, rollout)
    mask = rollout.response_mask
    # a response that does not end gets the fixed score
    assert_close(batch.scores, torch.where(rollout.ended, liked_share(rollout), -1.0))
    # value of the state before each token: the reward model's logit there, less its bias
    reward = load_scalar_model(folders.reward)
    sft = load_language_model(folders.sft)
    for row, (tokens, keep, response) in enumerate(zip(rollout.tokens, rollout.mask, mask, strict=True)):
        ids, length = tokens[keep][None], int(response.sum())
        with torch.no_grad():
            values = reward.score(reward.model(input_ids=ids).last_hidden_state)[0, -length - 1 : -1, 0] - 0.25
            logprobs = sft(input_ids=ids).logits[0, -length - 1 : -1].log_softmax(-1)
        assert_close(batch.values[row, :length], values, rtol=0, atol=1e-5)
        assert_close(
            batch.ref_logprobs[row, :length], logprobs.gather(-1, ids[0, -length:, None])[:, 0], rtol=0, atol=1e-5
        )
    assert not batch.values[~mask].any()
    assert (rollout.logprobs - batch.ref_logprobs)[mask].abs().max() > 0.01
    kl = token_kl(rollout.logprobs, batch.ref_logprobs, mask, "k1")
    rewards = token_rewards(batch.scores, kl, mask, 0.1)
    advantages, returns = gae(rewards, batch.values, mask, 0.95, PARAMS.gae_lambda)
    assert_close(batch.advantages, whiten(advantages, mask))
    assert_close(batch.returns, returns)


def test_the_first_minibatch_starts_from_ratio_one(folders: Folders) -> None:
    trainer = make_trainer(folders)
    batch = judged(trainer, trainer.sample(0))
    figures = trainer.train_minibatch(batch, torch.arange(16))
    assert figures["ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert figures["clip_fraction"] == 0
    # with ratio 1 the loss is minus the mean advantage, which is 0 after whitening
    assert figures["policy_loss"] == pytest.approx(0, abs=1e-5)
    again = trainer.train_minibatch(batch, torch.arange(16))
    assert again["approx_kl"] > 1e-4
    assert again["policy_loss"] < -1e-3


def test_prompts_come_in_shuffled_order_each_before_any_comes_again(folders: Folders) -> None:
    trainer = make_trainer(folders, samples_per_prompt=8)  # two prompts an update
    seen = []
    for update in range(4):
        rollout = trainer.sample(update)
        width = rollout.prompt_length
        rows = [row[:width][keep[:width]].tolist() for row, keep in zip(rollout.tokens, rollout.mask, strict=True)]
        assert rows == [rows[0]] * 8 + [rows[8]] * 8
        seen += [rows[0], rows[8]]
    assert sorted(seen[:6]) == sorted(PROMPTS)
    assert seen[6:] == seen[:2]
    assert seen[:6] != PROMPTS


def test_value_warm_up_changes_the_value_model_alone(folders: Folders) -> None:
    trainer = make_trainer(folders, value_warmup_epochs=4)
    batch = judged(trainer, trainer.sample(0))
    policy, value = weights(trainer.policy), weights(trainer.value_model)
    warm = trainer.warm_up_value(batch, torch.Generator().manual_seed(0))
    assert all(torch.equal(weight, policy[name]) for name, weight in trainer.policy.named_parameters())
    assert any(not torch.equal(weight, value[name]) for name, weight in trainer.value_model.named_parameters())
    mask = batch.rollout.response_mask
    before = (batch.returns - batch.values)[mask].square().mean().item()
    assert (batch.returns - warm.values)[mask].square().mean().item() < 0.8 * before
    assert torch.equal(warm.scores, batch.scores)
    # without warm-up nothing is judged anew
    none = make_trainer(folders, value_warmup_epochs=0)
    assert none.warm_up_value(batch, torch.Generator()) is batch


def test_value_warm_up_is_at_the_full_rate(folders: Folders) -> None:
    """The schedule, here still at 0, is that of the policy's steps; the warm-up hands it back as it was."""
    trainer = make_trainer(folders, value_warmup_epochs=1, warmup_share=0.5)
    value = weights(trainer.value_model)
    trainer.warm_up_value(judged(trainer, trainer.sample(0)), torch.Generator().manual_seed(0))
    assert any(not torch.equal(weight, value[name]) for name, weight in trainer.value_model.named_parameters())
    assert trainer.value_optimizer.param_groups[0]["lr"] == 0.0


def test_schedule_and_adaptive_kl_by_hand(folders: Folders) -> None:
    trainer = make_trainer(folders, schedule="linear", kl_target=5.0, kl_horizon=100)
    first, second = list(trainer)
    # two updates of two steps: 1, 3/4, 1/2 and 1/4 of 0.003; the metric is the mean over an update's steps
    assert [first["learning_rate"], second["learning_rate"]] == pytest.approx([0.003 * 7 / 8, 0.003 * 3 / 8])
    # the first KL is 0, an error of -1, clipped to -0.2: 1 - 0.2 * 16 / 100
    assert [first["kl_coef"], second["kl_coef"]] == pytest.approx([0.1, 0.1 * 0.968])


def test_scores_are_normalised_then_clipped_then_marked_down_for_a_missing_end(folders: Folders) -> None:
    trainer = make_trainer(
        folders, normalise_scores=True, score_clip=0.5, missing_end_score=None, missing_end_penalty=2.0
    )
    rollout = trainer.sample(0)
    assert 0 < rollout.ended.sum() < len(rollout.ended)
    raw = liked_share(rollout)
    shaped = ((raw - raw.mean()) / raw.std(correction=0)).clamp(-0.5, 0.5)
    assert_close(trainer.score(rollout), torch.where(rollout.ended, shaped, shaped - 2.0))


def test_whitened_rewards_keep_their_mean(folders: Folders) -> None:
    trainer = make_trainer(folders, whiten_rewards=True, whiten_advantages=False, gae_lambda=1.0, gamma=1.0)
    rollout = trainer.sample(0)
    batch = judged(trainer, rollout)
    mask = rollout.response_mask
    kl = token_kl(rollout.logprobs, batch.ref_logprobs, mask, "k1")
    rewards = whiten(token_rewards(batch.scores, kl, mask, 0.1), mask, shift_mean=False)
    # with lambda and gamma 1 the first return is the sum of the rewards, and the advantage lacks the value alone
    assert_close(batch.returns[:, 0], rewards.sum(-1), rtol=1e-4, atol=1e-4)
    assert_close(batch.advantages, (batch.returns - batch.values) * mask)


def test_the_metrics_of_an_update(folders: Folders) -> None:
    trainer = make_trainer(folders, value_warmup_epochs=1)
    first, second = list(trainer)
    assert set(first) == {
        *("learning_rate", "kl_coef"),
        *("score", "score_std", "kl", "entropy", "value_explained_variance", "ended_share", "response_length"),
        *("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio", "policy_grad_norm", "value_grad_norm"),
    }
    assert first["kl"] == pytest.approx(0, abs=1e-4)  # the policy starts as its reference
    assert abs(second["kl"]) > 1e-3
    assert set(trainer.seconds) == {"generate", "score", "train"}
    rollout = trainer.last_rollout
    assert rollout is not None
    assert second["ended_share"] == rollout.ended.float().mean().item()
    assert second["response_length"] == rollout.response_mask.sum().item() / 16


def test_the_policy_learns_a_toy_reward(folders: Folders) -> None:
    trainer = make_trainer(
        folders, updates=15, batch_size=48, minibatch_size=16, micro_batch_size=16, kl_coef=0.01, value_warmup_epochs=2
    )
    history = list(trainer)

    def rise(name: str) -> float:
        return sum(last[name] - first[name] for first, last in zip(history[:3], history[-3:], strict=True)) / 3

    assert rise("score") > 0.8
    assert rise("ended_share") > 0.3  # a response that does not end costs 1


def test_a_large_kl_coef_holds_the_policy_near_its_reference(folders: Folders) -> None:
    options: dict[str, Any] = {"updates": 8, "batch_size": 48, "minibatch_size": 16, "micro_batch_size": 16}
    free = list(make_trainer(folders, kl_coef=0.0, **options))[-1]["kl"]
    held = list(make_trainer(folders, kl_coef=2.0, **options))[-1]["kl"]
    assert held < 0.5 * free


def test_the_saved_model_is_the_trained_policy(folders: Folders, tmp_path: Path) -> None:
    for depth, layers in ((1, 1), (0, 1), (None, "all")):
        trainer = make_trainer(folders, depth, layers, updates=1)  # type: ignore[arg-type]
        list(trainer)
        sft, reward = load_language_model(folders.sft), load_scalar_model(folders.reward)
        trainer.policy.write_into(sft)
        trainer.value_model.write_into(reward)
        folder = tmp_path / f"{depth}"
        save_model(sft, load_tokenizer(folders.sft), folder / "policy")
        save_model(reward, load_tokenizer(folders.sft), folder / "value")
        for name, load, branch in (
            ("policy", load_language_model, trainer.policy),
            ("value", load_scalar_model, trainer.value_model),
        ):
            loaded = Branch(load(folder / name), depth)
            saved = dict(loaded.named_parameters())
            for weight_name, weight in branch.named_parameters():
                assert torch.equal(weight, saved[weight_name]), f"{depth} {name} {weight_name}"
        # and below the trained layers it is the model that training started from
        start = load_language_model(folders.sft).model
        same = torch.equal(
            load_language_model(folder / "policy").model.layers[0].mlp.up_proj.weight,
            start.layers[0].mlp.up_proj.weight,
        )
        assert same == (layers == 1)
