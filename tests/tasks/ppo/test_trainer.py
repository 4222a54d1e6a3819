"""The PPO trainer on a tiny model: what a step changes, what it does not depend on, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tasks.models import (
    load_language_model,
    load_scalar_model,
    load_tokenizer,
    save_model,
    shared_depth,
)
from tasks.ppo.advantages import gae, token_rewards, whiten
from tasks.ppo.kl import token_kl
from tasks.ppo.rollout import Rollout, as_rollout, generate
from tests.tasks.ppo.toy import (
    PROMPTS,
    Folders,
    gradients,
    judged,
    liked_share,
    make_trainer,
    trained_weights,
    value_branch,
    weights,
    without_times,
)


@pytest.mark.parametrize(("samples", "sizes"), [(1, (8, 3, 1)), (4, (2, 1))])
def test_a_step_does_not_depend_on_the_micro_batch_size(folders: Folders, samples: int, sizes: tuple[int, ...]) -> None:
    """The gradients themselves, before Adam takes their scale away, and then everything after two updates."""
    found, after = [], []
    for size in sizes:
        trainer = make_trainer(folders, micro_batch_size=size * samples, samples_per_prompt=samples)
        own, figures = gradients(trainer, judged(trainer), torch.arange(8))
        found.append(own)
        whole = make_trainer(folders, micro_batch_size=size * samples, samples_per_prompt=samples)
        history = [without_times(row) for row in whole]
        after.append((figures, history, trained_weights(whole)))
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-4, atol=1e-6)
    for figures, history, weights_after in after[1:]:
        assert figures == pytest.approx(after[0][0], rel=1e-4, abs=1e-6)
        for row, expected in zip(history, after[0][1], strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert_close(weights_after, after[0][2], rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_episodes_that_go_through_one_by_one(folders: Folders) -> None:
    """Four samples share the forward pass of their prompt."""
    together = make_trainer(folders)
    rollout, _ = together.sample(0)
    alone = make_trainer(folders, samples_per_prompt=1)
    one, _ = gradients(together, judged(together), torch.arange(8))
    other, _ = gradients(alone, judged(alone, rollout._replace(samples=1)), torch.arange(8))
    assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_gradients_do_not_depend_on_padding(folders: Folders) -> None:
    trainer, padded = make_trainer(folders), make_trainer(folders)
    rollout, _ = trainer.sample(0)
    wider = rollout.padded(rollout.responses.shape[1] + 5)
    left = [torch.zeros_like(part[:, :3]) for part in (wider.tokens, wider.mask, wider.states)]
    wider = wider._replace(
        tokens=torch.cat([left[0], wider.tokens], dim=1),
        mask=torch.cat([left[1], wider.mask], dim=1),
        states=torch.cat([left[2], wider.states], dim=1),
        prompt_length=rollout.prompt_length + 3,
    )
    one, figures = gradients(trainer, judged(trainer), torch.arange(8))
    other, of_padded = gradients(padded, judged(padded, wider), torch.arange(8))
    assert of_padded == pytest.approx(figures, rel=1e-5, abs=1e-6)
    assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_do_not_change_and_the_trained_ones_all_do(folders: Folders) -> None:
    trainer = make_trainer(folders, depth=0)
    roles = trainer.roles
    reference, trunk = weights(roles.reference), weights(roles.trunk)
    before = {"policy": weights(roles.policy), "value": weights(value_branch(trainer))}
    list(trainer)
    for name, branch in (("policy", roles.policy), ("value", value_branch(trainer))):
        for weight_name, weight in branch.named_parameters():
            changed = not torch.equal(weight, before[name][weight_name])
            top = weight_name.startswith(("backbone.layers.1.", "backbone.norm."))
            assert changed == (top or (name == "value" and weight_name == "head.weight")), f"{name} {weight_name}"
    assert all(torch.equal(weight, reference[name]) for name, weight in roles.reference.named_parameters())
    assert all(torch.equal(weight, trunk[name]) for name, weight in roles.trunk.named_parameters())


def test_a_shared_trunk_changes_no_number(folders: Folders) -> None:
    """Depth 1: the trunk's states are captured in generation. 0: the lowest block runs in every branch. None: whole
    models from the ids. The top block is trained each time."""
    runs = {}
    for depth in (1, 0, None):
        trainer = make_trainer(folders, depth)
        history = [without_times(row) for row in trainer]
        runs[depth] = (history, trained_weights(trainer))
    for depth in (0, None):
        for row, expected in zip(runs[depth][0], runs[1][0], strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert_close(runs[depth][1], runs[1][1], rtol=1e-3, atol=1e-4)


def test_the_models_of_these_tests_share_a_trunk(folders: Folders) -> None:
    assert shared_depth(load_language_model(folders.sft), load_scalar_model(folders.reward), 2) == 1


def test_everything_is_trained_with_all(folders: Folders) -> None:
    trainer = make_trainer(folders, trainable_layers="all", updates=1)
    roles = trainer.roles
    before, reference = weights(roles.policy), weights(roles.reference)
    list(trainer)
    assert all(not torch.equal(weight, before[name]) for name, weight in roles.policy.named_parameters())
    assert all(torch.equal(weight, reference[name]) for name, weight in roles.reference.named_parameters())


def test_the_same_seed_gives_the_same_bits(folders: Folders) -> None:
    def history(seed: int = 1) -> tuple[list[dict[str, float]], Any]:
        trainer = make_trainer(folders, value_warmup_epochs=1, arguments={"seed": seed})
        return [without_times(row) for row in trainer], trainer

    (one, first), (two, second) = history(), history()
    assert one == two
    assert all(map(torch.equal, trained_weights(first), trained_weights(second)))
    assert history(seed=2)[0] != one


def test_judge_puts_the_pieces_together(folders: Folders) -> None:
    trainer = make_trainer(folders)
    # a reference that is not the policy, so that there is a KL penalty
    trainer.roles.policy.backbone.norm.weight.data *= 1.1
    batch = judged(trainer)
    rollout = batch.rollout
    assert 0 < rollout.ended.sum() < len(rollout.ended)
    mask = rollout.response_mask
    # a response that does not end gets the fixed score
    assert_close(batch.scores, liked_share(rollout))
    assert_close(batch.shaped, torch.where(rollout.ended, liked_share(rollout), -1.0))
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
    rewards = token_rewards(batch.shaped, kl, mask, 0.1)
    assert_close(batch.rewards, rewards)
    advantages, returns = gae(rewards, batch.values, mask, 0.95, 0.95)
    assert_close(batch.advantages, whiten(advantages, mask))
    assert_close(batch.returns, returns)


def test_the_first_minibatch_starts_from_ratio_one(folders: Folders) -> None:
    trainer = make_trainer(folders)
    batch = judged(trainer)
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
        rollout, places = trainer.sample(update)
        assert places == [places[0]] * 8 + [places[8]] * 8
        width = rollout.prompt_length
        rows = [row[:width][keep[:width]].tolist() for row, keep in zip(rollout.tokens, rollout.mask, strict=True)]
        assert rows == [PROMPTS[place] for place in places]
        assert rows == [rows[0]] * 8 + [rows[8]] * 8
        seen += [rows[0], rows[8]]
    assert sorted(seen[:6]) == sorted(PROMPTS)
    assert seen[6:] == seen[:2]
    assert seen[:6] != PROMPTS


def test_value_warm_up_changes_the_value_model_alone(folders: Folders) -> None:
    trainer = make_trainer(folders, value_warmup_epochs=4)
    batch = judged(trainer)
    policy, value = weights(trainer.roles.policy), weights(value_branch(trainer))
    warm = trainer.warm_up_value(batch, torch.Generator().manual_seed(0))
    assert all(torch.equal(weight, policy[name]) for name, weight in trainer.roles.policy.named_parameters())
    assert any(not torch.equal(weight, value[name]) for name, weight in value_branch(trainer).named_parameters())
    mask = batch.rollout.response_mask
    before = (batch.returns - batch.values)[mask].square().mean().item()
    assert (batch.returns - warm.values)[mask].square().mean().item() < 0.8 * before
    assert torch.equal(warm.scores, batch.scores)


def test_a_value_warm_up_that_blows_up_stops_training(folders: Folders) -> None:
    trainer = make_trainer(folders, value_warmup_epochs=4, value_learning_rate=1e30)
    policy = weights(trainer.roles.policy)
    list(trainer)
    assert trainer.watch.stopped is not None
    assert trainer.watch.stopped.startswith("update 1: ")
    assert all(torch.equal(weight, policy[name]) for name, weight in trainer.roles.policy.named_parameters())


def test_value_warm_up_is_at_the_full_rate(folders: Folders) -> None:
    """The schedule, here still at 0, is that of the policy's steps; the warm-up hands it back as it was."""
    trainer = make_trainer(folders, value_warmup_epochs=1, warmup_share=0.5)
    value = weights(value_branch(trainer))
    trainer.warm_up_value(judged(trainer), torch.Generator().manual_seed(0))
    assert any(not torch.equal(weight, value[name]) for name, weight in value_branch(trainer).named_parameters())
    assert trainer.value_learner is not None
    assert trainer.value_learner.optimizer.param_groups[0]["lr"] == 0.0


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
    batch = judged(trainer)
    rollout = batch.rollout
    assert 0 < rollout.ended.sum() < len(rollout.ended)
    raw = liked_share(rollout)
    assert_close(batch.scores, raw)
    shaped = ((raw - raw.mean()) / raw.std(correction=0)).clamp(-0.5, 0.5)
    assert_close(batch.shaped, torch.where(rollout.ended, shaped, shaped - 2.0))


def test_whitened_rewards_keep_their_mean(folders: Folders) -> None:
    trainer = make_trainer(folders, whiten_rewards=True, whiten_advantages=False, gae_lambda=1.0, gamma=1.0)
    batch = judged(trainer)
    rollout, mask = batch.rollout, batch.mask
    kl = token_kl(rollout.logprobs, batch.ref_logprobs, mask, "k1")
    rewards = whiten(token_rewards(batch.shaped, kl, mask, 0.1), mask, shift_mean=False)
    # with lambda and gamma 1 the first return is the sum of the rewards, and the advantage lacks the value alone
    assert_close(batch.returns[:, 0], rewards.sum(-1), rtol=1e-4, atol=1e-4)
    assert_close(batch.advantages, (batch.returns - batch.values) * mask)


def test_the_metrics_of_an_update(folders: Folders) -> None:
    trainer = make_trainer(folders, value_warmup_epochs=1)
    first, second = list(trainer)
    assert set(without_times(first)) == {
        *("learning_rate", "kl_coef"),
        *(
            "score",
            "score_std",
            "reward",
            "kl",
            "entropy",
            "value_explained_variance",
            "ended_share",
            "response_length",
        ),
        *("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio", "policy_grad_norm", "value_grad_norm"),
    }
    assert first["kl"] == pytest.approx(0, abs=1e-4)  # the policy starts as its reference
    assert abs(second["kl"]) > 1e-3
    seconds = ("generate", "score", "train")
    names = {"episodes_per_second", "tokens_per_second", *(f"{name}_seconds" for name in seconds)}
    assert {name.removeprefix("time/") for name in second if name.startswith("time/")} == names
    assert first["time/value_warmup_seconds"] > 0
    assert trainer.last is not None
    rollout = trainer.last.rollout
    assert second["ended_share"] == rollout.ended.float().mean().item()
    assert second["response_length"] == rollout.response_mask.sum().item() / 16
    assert second["score"] == trainer.last.scores.mean().item()
    # the KL penalty is off where its coefficient is 0: then the reward is the shaped score
    batch = judged(make_trainer(folders, kl_coef=0.0))
    assert_close(batch.rewards.sum(-1), batch.shaped)


def test_the_policy_learns_a_toy_reward(folders: Folders) -> None:
    trainer = make_trainer(
        folders, updates=15, batch_size=48, minibatch_size=16, micro_batch_size=16, kl_coef=0.01, value_warmup_epochs=2
    )
    history = list(trainer)

    def rise(name: str) -> float:
        return sum(last[name] - first[name] for first, last in zip(history[:3], history[-3:], strict=True)) / 3

    assert rise("reward") > 0.8
    assert rise("ended_share") > 0.3  # a response that does not end costs 1


def test_a_large_kl_coef_holds_the_policy_near_its_reference(folders: Folders) -> None:
    options: dict[str, Any] = {"updates": 8, "batch_size": 48, "minibatch_size": 16, "micro_batch_size": 16}
    free = list(make_trainer(folders, kl_coef=0.0, **options))[-1]["kl"]
    held = list(make_trainer(folders, kl_coef=2.0, **options))[-1]["kl"]
    assert held < 0.5 * free


@pytest.mark.parametrize("depth", [1, 0, None])
def test_the_models_that_were_handed_in_are_the_trained_ones(
    folders: Folders, tmp_path: Path, depth: int | None
) -> None:
    trainer = make_trainer(folders, depth, trainable_layers="all" if depth is None else 1, updates=1)
    list(trainer)
    policy, value = trainer.policy_model, trainer.value_model
    save_model(policy, load_tokenizer(folders.sft), tmp_path / "policy")
    save_model(value, load_tokenizer(folders.sft), tmp_path / "value")
    start, saved = load_language_model(folders.sft).model, load_language_model(tmp_path / "policy").model
    own = trainer.roles.policy.backbone.layers[-1].mlp.up_proj.weight
    assert torch.equal(saved.layers[1].mlp.up_proj.weight, own)
    assert not torch.equal(saved.layers[1].mlp.up_proj.weight, start.layers[1].mlp.up_proj.weight)
    # and below the trained layers it is the model that training started from
    assert torch.equal(saved.layers[0].mlp.up_proj.weight, start.layers[0].mlp.up_proj.weight) == (depth is not None)
    loaded = load_scalar_model(tmp_path / "value")
    assert torch.equal(loaded.score.weight, value_branch(trainer).get_parameter("head.weight"))
    assert not torch.equal(loaded.score.weight, load_scalar_model(folders.reward).score.weight)


def test_another_engine_can_generate(folders: Folders) -> None:
    """It hands back tokens alone, as vLLM would; the rest of the update is the same."""
    asked: list[dict[str, Any]] = []

    def engine(trunk: Any, branch: Any, prompts: Any, uniforms: Any, **options: Any) -> Rollout:
        asked.append(options)
        responses = generate(trunk, branch, prompts, uniforms, **options).response_ids()
        names = ("end_token", "pad_token", "temperature", "samples_per_prompt")
        return as_rollout(trunk, branch, prompts, responses, **{name: options[name] for name in names})

    own = [without_times(row) for row in make_trainer(folders)]
    trainer = make_trainer(folders, arguments={"sampler": engine})
    for row, expected in zip(trainer, own, strict=True):
        assert without_times(row) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert len(asked) == 2
    assert asked[0]["max_new_tokens"] == 8


def test_bf16_is_near_fp32_and_leaves_the_weights_in_fp32(folders: Folders) -> None:
    plain, mixed = make_trainer(folders), make_trainer(folders, precision="bf16")
    rollout, _ = plain.sample(0)
    one, two = judged(plain, rollout), judged(mixed, rollout)
    assert two.values.dtype == two.advantages.dtype == torch.float32
    assert_close(two.values, one.values, rtol=0.05, atol=0.05)
    assert_close(two.ref_logprobs, one.ref_logprobs, rtol=0.05, atol=0.05)
    rows = torch.arange(16)
    found, expected = gradients(mixed, two, rows)[0], gradients(plain, one, rows)[0]
    for gradient, exact in zip(found, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.95
    trained = make_trainer(folders, precision="bf16")
    history = list(trained)
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert all(weight.dtype == torch.float32 for weight in trained_weights(trained))


@pytest.mark.parametrize("warm_up", [0, 1])
def test_a_first_step_over_the_whole_batch_runs_the_value_model_once_and_learns_the_same(
    folders: Folders, warm_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "minibatch_size": 16,
        "epochs": 3,
        "value_warmup_epochs": warm_up,
        "whiten_rewards": True,
    }
    seen, after = [], []
    for size in (16, 8):
        trainer = make_trainer(folders, micro_batch_size=size, **options)
        passes = 0

        def count(*arguments: Any, of_states: Any = trainer.roles.value.of_states) -> Any:
            nonlocal passes
            passes += 1
            return of_states(*arguments)

        monkeypatch.setattr(trainer.roles.value, "of_states", count)
        history = [without_times(row) for row in trainer]
        seen.append(passes)
        after.append((history, trained_weights(trainer)))
    # two updates: one pass for the advantages, and in three epochs two or, in halves, six; the warm-up adds its own
    assert seen == [2 * (1 + 2) + warm_up * 3, 2 * (1 + 6) + warm_up * 3]
    for row, expected in zip(after[0][0], after[1][0], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert_close(after[0][1], after[1][1], rtol=1e-3, atol=1e-4)


def test_progress_tells_what_is_at_work_from_the_first_evaluation_on(folders: Folders) -> None:
    told: list[tuple[str, int, int]] = []
    trainer = make_trainer(
        folders,
        arguments={"progress": lambda *state: told.append(state)},
        updates=1,
        eval_every=1,
        eval_prompts=4,
        value_warmup_epochs=2,
    )
    watched = [without_times(row) for row in trainer]
    steps = [doing for place, (doing, _, _) in enumerate(told) if place == 0 or told[place - 1][0] != doing]
    assert steps == ["evaluate", "generate", "score", "fit the values", "train", "evaluate"]
    assert told[0] == ("evaluate", 0, 8), "told before the first token"
    assert all(0 <= done <= total for _, done, total in told)
    assert max(done for doing, done, _ in told if doing == "generate") > 4
    silent = make_trainer(folders, updates=1, eval_every=1, eval_prompts=4, value_warmup_epochs=2)
    assert [without_times(row) for row in silent] == watched
