"""A trainer of tiny models with a toy reward, for the tests of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from tasks.models import Branch, Trunk, load_language_model, load_scalar_model, load_tokenizer, save_model, shared_depth
from tasks.ppo.batch import Batch, Episodes
from tasks.ppo.params import PPOParams
from tasks.ppo.rollout import Rollout
from tasks.ppo.trainer import PPOTrainer
from tests.tiny import tiny_model_dir

PAD, END = 0, 2
LIKED = range(3, 150)  # the tokens that the toy reward is for, of 330
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [20, 21, 22, 23, 24, 25, 26], [30], [31, 40, 41], [9, 9, 12]]
SETTINGS: dict[str, Any] = {
    "trainable_layers": 1,
    "updates": 2,
    "batch_size": 16,
    "samples_per_prompt": 4,
    "minibatch_size": 8,
    "micro_batch_size": 8,
    "learning_rate": 3e-3,
    "value_learning_rate": 3e-3,
    "value_clip_range": 5.0,
    "kl_coef": 0.1,
    "gamma": 0.95,
    "missing_end_score": -1.0,
}


class Folders(NamedTuple):
    sft: Path
    reward: Path


def make_folders(root: Path) -> Folders:
    """An SFT model that often ends, and a reward model on the same lowest block, as if trained from it."""
    sft = load_language_model(tiny_model_dir(root / "start", seed=3))
    tokenizer = load_tokenizer(root / "start")
    sft.model.embed_tokens.weight.data[END] *= 2.5
    reward = load_scalar_model(tiny_model_dir(root / "other", reward=True, seed=4))
    reward.model.embed_tokens.load_state_dict(sft.model.embed_tokens.state_dict())
    reward.model.layers[0].load_state_dict(sft.model.layers[0].state_dict())
    save_model(sft, tokenizer, root / "sft")
    save_model(reward, tokenizer, root / "reward")
    return Folders(root / "sft", root / "reward")


def liked(prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
    """The share of a response's tokens that are liked ones, times 4."""
    return [4 * sum(token in LIKED for token in response) / len(response) for response in responses]


def liked_share(rollout: Rollout) -> Tensor:
    return torch.tensor(liked([], rollout.response_ids()))


def make_trainer(
    folders: Folders,
    depth: int | Literal["shared"] | None = "shared",
    *,
    reward: Any = liked,
    arguments: dict[str, Any] | None = None,
    **changes: Any,
) -> PPOTrainer:
    """depth: of the trunk, in place of the depth to which the models are alike."""
    params = PPOParams(**{**SETTINGS, **changes})
    policy, value_model = load_language_model(folders.sft), load_scalar_model(folders.reward)
    with patch("tasks.ppo.roles.shared_depth", shared_depth if depth == "shared" else lambda *_, **__: depth):
        return PPOTrainer(
            policy,
            None,
            value_model if reward == "model" else reward,
            value_model if params.value == "separate" else None,
            PROMPTS,
            params,
            **{"max_new_tokens": 8, **(arguments or {})},
        )


def judged(trainer: PPOTrainer, rollout: Rollout | None = None) -> Batch:
    """The first update's episodes."""
    own, prompts = trainer.sample(0)
    rollout = own if rollout is None else rollout
    return trainer.judge(Episodes(rollout, prompts, trainer.score(rollout, prompts)))


def gradients(trainer: PPOTrainer, batch: Batch, rows: Tensor) -> tuple[list[Tensor], dict[str, float]]:
    """Those of a minibatch, as they add up before clipping and the step."""
    learners = [learner for learner in (trainer.policy_learner, trainer.value_learner) if learner is not None]
    for learner in learners:
        learner.optimizer.zero_grad = lambda **_: None  # type: ignore[method-assign]
        learner.max_grad_norm = 1e9
    figures = trainer.train_minibatch(batch, rows)
    found = [weight.grad for learner in learners for weight in learner.weights]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None], figures


def weights(part: Branch | Trunk) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in part.named_parameters()}


def value_branch(trainer: PPOTrainer) -> Branch:
    assert trainer.roles.value.model is not None
    return trainer.roles.value.model


def trained_weights(trainer: PPOTrainer) -> list[Tensor]:
    branches = [trainer.roles.policy, *([trainer.roles.value.model] if trainer.roles.value.model else [])]
    return [weight.detach().clone() for branch in branches for weight in branch.trained()]


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}
