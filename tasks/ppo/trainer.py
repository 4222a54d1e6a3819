"""The PPO trainer: sample, score, work out advantages, update. Models and the reward function are handed in.

    trainer = PPOTrainer(trunk, policy, reference, value_model, reward_fn, prompts, params, ...)
    for metrics in trainer:
        ...

The policy, its reference and the value model are branches on one frozen trunk, whose states are computed once, while
the responses are generated. With a trunk of depth None the branches are whole models. (InstructGPT, section 3.5;
Schulman et al. 2017.)
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import get_scheduler

from tasks.models import Branch, Trunk
from tasks.ppo.advantages import gae, token_rewards, whiten
from tasks.ppo.kl import KLController, token_kl
from tasks.ppo.loss import policy_loss, value_loss
from tasks.ppo.rollout import Rollout, final_states, generate, response_logprobs, uniforms_for
from tasks.ppo.scores import RunningMoments, clip_scores, score_missing_end

if TYPE_CHECKING:
    from tasks.params import Ppo

RewardFunction = Callable[[Rollout], Tensor]


class Batch(NamedTuple):
    """The episodes of one update with what the losses need of them, B episodes, R response tokens."""

    rollout: Rollout
    scores: Tensor  # (B,)
    ref_logprobs: Tensor  # (B, R)
    values: Tensor  # (B, R) before the update
    advantages: Tensor  # (B, R) whitened where asked for
    returns: Tensor  # (B, R)


class PPOTrainer:
    def __init__(
        self,
        trunk: Trunk,
        policy: Branch,
        reference: Branch,
        value_model: Branch,
        reward_fn: RewardFunction,
        prompts: list[list[int]],
        params: Ppo,
        *,
        seed: int,
        max_new_tokens: int,
        end_token: int,
        pad_token: int,
        value_bias: float = 0.0,
    ) -> None:
        """reward_fn: Rollout -> scores (B,). prompts: tokens. value_bias is taken off the value model's output."""
        self.trunk, self.policy, self.reference, self.value_model = trunk, policy, reference, value_model
        self.reward_fn, self.prompts, self.params, self.seed = reward_fn, prompts, params, seed
        self.max_new_tokens, self.end_token, self.pad_token = max_new_tokens, end_token, pad_token
        self.value_bias = value_bias
        self.kl_controller = KLController(params.kl_coef, params.kl_target, params.kl_horizon)
        self.moments = RunningMoments()
        steps = params.epochs * math.ceil(params.batch_size / params.minibatch_size) * params.updates
        self.policy_optimizer, self.policy_schedule = _adam(policy, params.learning_rate, params, steps)
        self.value_optimizer, self.value_schedule = _adam(value_model, params.value_learning_rate, params, steps)
        self.order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        self.last_rollout: Rollout | None = None
        self.seconds: dict[str, float] = {}

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Train; yields the metrics of each update."""
        for update in range(self.params.updates):
            yield self.step(update)

    def step(self, update: int) -> dict[str, float]:
        self.seconds = defaultdict(float)
        with self._timed("generate"):
            rollout = self.last_rollout = self.sample(update)
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + update)
        with self._timed("score"):
            scores = self.score(rollout)
            batch = self.judge(rollout, scores)
        if update == 0:
            with self._timed("value_warmup"):
                batch = self.warm_up_value(batch, shuffle)
        losses = []
        with self._timed("train"):
            for _ in range(self.params.epochs):
                for rows in self.minibatches(shuffle):
                    losses.append(self.train_minibatch(batch, rows))
        figures = describe(batch)
        coefficient = self.kl_controller.coefficient
        self.kl_controller.update(figures["kl"], len(scores))
        return {**figures, "kl_coef": coefficient, **mean_of(losses)}

    def sample(self, update: int) -> Rollout:
        """Responses to this update's prompts. Prompts come in shuffled order, each before any comes again."""
        count = self.params.batch_size // self.params.samples_per_prompt
        chosen = [self.order[place % len(self.order)] for place in range(update * count, (update + 1) * count)]
        names = [f"ppo {update} {row}" for row in range(self.params.batch_size)]
        return generate(
            self.trunk,
            self.policy,
            [self.prompts[index] for index in chosen],
            uniforms_for(self.seed, names, self.max_new_tokens),
            max_new_tokens=self.max_new_tokens,
            end_token=self.end_token,
            pad_token=self.pad_token,
            temperature=self.params.temperature,
            top_p=self.params.top_p,
            samples_per_prompt=self.params.samples_per_prompt,
        )

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        """The reward function's scores (B,), shaped as the parameters say."""
        params = self.params
        scores = self.reward_fn(rollout)
        if params.normalise_scores:
            self.moments.update(scores)
            scores = self.moments.normalise(scores)
        scores = clip_scores(scores, params.score_clip)
        return score_missing_end(scores, rollout.ended, params.missing_end_score, params.missing_end_penalty)

    @torch.no_grad()
    def judge(self, rollout: Rollout, scores: Tensor) -> Batch:
        """KL penalty, values and advantages of scored episodes."""
        params, mask = self.params, rollout.response_mask
        ref_logprobs = response_logprobs(self.reference, rollout, params.temperature)
        values = torch.cat([self.values(part) for part in rollout.chunks()])
        kl = token_kl(rollout.logprobs, ref_logprobs, mask, params.kl_estimator)
        rewards = token_rewards(scores, kl, mask, self.kl_controller.coefficient)
        if params.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, params.gamma, params.gae_lambda)
        if params.whiten_advantages:
            advantages = whiten(advantages, mask)
        return Batch(rollout, scores, ref_logprobs, values, advantages, returns)

    def minibatches(self, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Row numbers of an epoch's minibatches. The samples of one prompt stay together: they share its forward."""
        samples = self.params.samples_per_prompt
        prompts = torch.randperm(self.params.batch_size // samples, generator=shuffle)
        for chosen in prompts.split(self.params.minibatch_size // samples):
            yield (chosen[:, None] * samples + torch.arange(samples)).flatten()

    def train_minibatch(self, batch: Batch, rows: Tensor) -> dict[str, float]:
        """One step of each optimizer. Gradients add up over micro-batches, divided by the minibatch's token count."""
        params, rollout = self.params, batch.rollout
        count = float(rollout.response_mask[rows].sum())
        totals: dict[str, float] = defaultdict(float)
        for part in rows.split(params.micro_batch_size):
            episodes = rollout.rows(part)
            mask = episodes.response_mask
            policy = policy_loss(
                response_logprobs(self.policy, episodes, params.temperature),
                episodes.logprobs,
                batch.advantages[part],
                mask,
                params.clip_range,
                count,
            )
            policy.loss.backward()
            value = self.value_loss(batch, part, count)
            value.backward()
            for name, figure in {**policy._asdict(), "value_loss": value}.items():
                totals["policy_loss" if name == "loss" else name] += figure.item()
        totals["learning_rate"] = float(self.policy_schedule.get_last_lr()[0])
        totals["policy_grad_norm"] = _clip_and_step(self.policy, self.policy_optimizer, params.max_grad_norm)
        totals["value_grad_norm"] = _clip_and_step(self.value_model, self.value_optimizer, params.max_grad_norm)
        self.policy_schedule.step()
        self.value_schedule.step()
        return dict(totals)

    def warm_up_value(self, batch: Batch, shuffle: torch.Generator) -> Batch:
        """Fit the value model to the first episodes before the policy moves; returns them judged anew.

        The reward model was trained on whole responses alone. What it says of half a response is far off at first, and
        with gae_lambda < 1 that error would be the policy's first lesson.
        """
        for group in self.value_optimizer.param_groups:
            group["lr"] = self.params.value_learning_rate  # the schedule is of the policy's updates
        for _ in range(self.params.value_warmup_epochs):
            for rows in self.minibatches(shuffle):
                count = float(batch.rollout.response_mask[rows].sum())
                for part in rows.split(self.params.micro_batch_size):
                    self.value_loss(batch, part, count).backward()
                _clip_and_step(self.value_model, self.value_optimizer, self.params.max_grad_norm)
        for group, rate in zip(self.value_optimizer.param_groups, self.value_schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        return self.judge(batch.rollout, batch.scores) if self.params.value_warmup_epochs else batch

    def value_loss(self, batch: Batch, rows: Tensor, count: float) -> Tensor:
        """The value loss of some episodes, as a share of a minibatch of `count` tokens."""
        episodes = batch.rollout.rows(rows)
        return value_loss(
            self.values(episodes),
            batch.values[rows],
            batch.returns[rows],
            episodes.response_mask,
            self.params.value_clip_range,
            count,
        )

    def values(self, rollout: Rollout) -> Tensor:
        """Values (B, R) of the states before each response token; 0 on padding."""
        output = self.value_model.head(final_states(self.value_model, rollout)[:, :-1])[..., 0] - self.value_bias
        return output * rollout.response_mask  # type: ignore[no-any-return]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - started


def describe(batch: Batch) -> dict[str, float]:
    """What an update's episodes were like, before the policy learned from them."""
    rollout, mask = batch.rollout, batch.rollout.response_mask
    difference = (rollout.logprobs - batch.ref_logprobs) * mask
    errors = (batch.returns - batch.values)[mask]
    return {
        "score": batch.scores.mean().item(),
        "score_std": batch.scores.std().item(),
        "kl": difference.sum(-1).mean().item(),
        # of samples at the policy's temperature, -log pi is an unbiased estimate of the entropy
        "entropy": -rollout.logprobs[mask].mean().item(),
        "value_explained_variance": 1 - (errors.var() / batch.returns[mask].var()).item(),
        "ended_share": rollout.ended.float().mean().item(),
        "response_length": mask.sum(-1).float().mean().item(),
    }


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _adam(
    branch: Branch, learning_rate: float, params: Ppo, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam on what is trained, and its schedule over so many steps."""
    trained = [weight for weight in branch.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=learning_rate, betas=params.adam_betas, eps=params.adam_eps, weight_decay=0.0
    )
    name = "constant_with_warmup" if params.schedule == "constant" else params.schedule
    return optimizer, get_scheduler(name, optimizer, round(params.warmup_share * steps), steps)


def _clip_and_step(branch: Branch, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Scale the gradient down to max_norm where it is longer, step, clear. Returns the norm before."""
    trained = [weight for weight in branch.parameters() if weight.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)
