"""The PPO trainer: sample, score, work out advantages, update. Models, reward and sampler are handed in.

    trainer = PPOTrainer(policy, reference, reward_fn, value_model, prompts, params)
    for metrics in trainer:
        ...

(Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022, section 3.5 and appendix C.4.) The policy, its
reference, the value model and a reward model are branches on one frozen trunk, whose states are computed once, while
the responses are generated. With trainable_layers "all" the branches are whole models.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.checkpoints import nest, pick, restore_rng, rng_state
from tasks.conversations import Turn, text_of
from tasks.models import decode_response, encode_prompt
from tasks.ppo import checks, ptx
from tasks.ppo.advantages import gae, token_rewards, whiten
from tasks.ppo.batch import Batch, Episodes, describe, mean_of
from tasks.ppo.kl import KLController, token_kl
from tasks.ppo.learner import Learner, NotFinite
from tasks.ppo.loss import policy_loss, value_loss
from tasks.ppo.params import PPOParams
from tasks.ppo.processes import Processes
from tasks.ppo.rewards import Reward, RewardModel, call, weighted
from tasks.ppo.roles import assign_roles
from tasks.ppo.rollout import Rollout, Sampler, final_states, generate, response_logprobs, token_logprobs, uniforms_for
from tasks.ppo.scores import RunningMoments, clip_scores, score_missing_end
from tasks.ppo.stopping import HeldOut, Watch
from tasks.stage import UserError


class PPOTrainer:
    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        reward_fn: Reward | Sequence[tuple[Reward, float]],
        value_model: PreTrainedModel | None,
        prompts: Sequence[str] | Sequence[Sequence[Turn]] | Sequence[list[int]],
        params: PPOParams,
        *,
        tokenizer: Any = None,
        pretraining: Sequence[ptx.Text] = (),
        max_new_tokens: int = 64,
        end_token: int | None = None,
        pad_token: int | None = None,
        seed: int = 1,
        sampler: Sampler = generate,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """UserError where something does not fit, before anything is trained.

        policy, value_model: trained in place. value_model None with params.value "head".
        reference, or a reward model: where it is None or one of these two, a frozen copy of what is trained stands in.
        reward_fn: a scalar model, a function (prompts, responses) -> scores, or several with their weights. A function
        gets texts where there is a tokenizer (of a conversation, `text_of` it), else token ids.
        prompts: texts or conversations with a tokenizer, which go through its chat template; or token ids.
        pretraining: what PPO-ptx mixes in.
        end_token, pad_token: the policy's own where None.
        progress: is called while an update or an evaluation is at work, with what it does, how much of that is done,
        and how much there is: ("generate", 12, 64).
        """
        self.params, self.seed, self.sampler = params, seed, sampler
        self.progress = progress or (lambda *_: None)
        self.processes = Processes()
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.end_token = checks.special_token(policy, "eos_token_id", end_token)
        self.pad_token = checks.special_token(policy, "pad_token_id", pad_token)
        checks.texts(prompts, tokenizer)
        given: list[Any] = list(prompts)
        self.prompt_texts = [text_of(one) if checks.is_conversation(one) else one for one in given]
        self.prompts = [encode_prompt(tokenizer, one) if checks.is_text(one) else list(one) for one in given]
        self.pretraining = list(pretraining)
        rewards = weighted(reward_fn)
        checks.check(
            checks.of_kinds(policy, reference, [value_model, *(one for one, _ in rewards)]),
            checks.of_models(policy, [reference, value_model, *(one for one, _ in rewards)]),
            checks.of_prompts(policy, self.prompts, params, max_new_tokens),
            checks.of_params(
                params, value_model, self.pretraining, self.end_token, self.pad_token, self.processes.count
            ),
        )

        self.policy_model, self.value_model = policy, value_model
        self.device = self.processes.accelerator.device
        self.roles = roles = assign_roles(policy, reference, rewards, value_model, params, self.device)

        steps = params.epochs * math.ceil(params.batch_size / params.minibatch_size) * params.updates
        groups = [(roles.policy.trained(), params.learning_rate)]
        if roles.value.model is None:
            groups.append((roles.value.own_weights, params.value_learning_rate))
        self.policy_learner = Learner(groups, params, steps, params.ema_decay)
        self.value_learner = None
        if roles.value.model is not None:
            own = [(roles.value.own_weights, params.value_learning_rate)]
            self.value_learner = Learner(own, params, steps, None)

        self.kl_controller = KLController(params.kl_coef, params.kl_target, params.kl_horizon)
        self.moments = RunningMoments()
        self.watch = Watch(params)
        self.update = 0  # how many are done
        self.steps = 0  # of the optimizers
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = params.eval_prompts if params.eval_every else 0
        self.order, self.held_out = order[: len(order) - held_out], order[len(order) - held_out :]
        self.ptx_order = torch.randperm(
            len(self.pretraining), generator=torch.Generator().manual_seed(seed + 1)
        ).tolist()
        self.kept_weights: dict[str, list[Tensor]] = {}
        self.held_out_start: HeldOut | None = None  # before the first update
        self.held_out_answers: list[dict[str, Any]] = []  # of every evaluation, for whoever wants to judge them
        self.kept_update: int | None = None  # whose policy is kept, once training is over
        self.last: Episodes | None = None
        self.seconds: dict[str, float] = defaultdict(float)

    # ---- the algorithm ----

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Train; yields the metrics of each update, and puts the policy to be kept in its place at the end."""
        if self.update == 0 and self.params.eval_every:
            self.held_out_start = self.evaluate()
        while self.update < self.params.updates and not self.watch.stopped:
            yield self.step()
        self.finish()

    def step(self) -> dict[str, float]:
        """One update. The metrics whose names begin with time/ are the only ones that differ from run to run."""
        started = time.monotonic()
        self.seconds = defaultdict(float)
        with self._timed("generate"):
            rollout, prompts = self.sample(self.update)
        self.progress("score", 0, 1)
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + self.update)
        with self._timed("score"):
            self.last = Episodes(rollout, prompts, self.score(rollout, prompts))
            batch = self.judge(self.last)
        metrics = {**describe(batch), "kl_coef": self.kl_controller.coefficient}
        self.watch.sampled(self.update + 1, metrics["kl"], metrics["entropy"])
        if not self.watch.stopped:
            metrics |= self.learn(batch, shuffle)
        if not self.watch.stopped:
            self.kl_controller.update(metrics["kl"], len(batch.scores))
            self.update += 1
            metrics |= self._evaluate_when_due()
        elapsed = time.monotonic() - started
        speed = {
            "episodes_per_second": len(batch.scores) / elapsed,
            "tokens_per_second": int(batch.mask.sum()) / elapsed,  # of responses
        }
        seconds = {f"{name}_seconds": value for name, value in self.seconds.items()}
        return {**metrics, **{f"time/{name}": value for name, value in {**speed, **seconds}.items()}}

    def learn(self, batch: Batch, shuffle: torch.Generator) -> dict[str, float]:
        """The optimizer steps of one update; the metrics are means over them."""
        figures = []
        try:
            if self.update == 0 and self.params.value_warmup_epochs:
                with self._timed("value_warmup"):
                    batch = self.warm_up_value(batch, shuffle)
            with self._timed("train"):
                for rows in self._epochs(self.params.epochs, shuffle, "train"):
                    figures.append(self.train_minibatch(batch, rows))
                    batch = batch._replace(own_values=None)  # their gradients are used up
        except NotFinite as error:
            self.watch.stop(f"update {self.update + 1}: {error}")
        return mean_of(figures)

    def sample(self, update: int) -> tuple[Rollout, list[int]]:
        """This process's responses to the update's prompts, which come in shuffled order, each before any comes again.

        Returns the rollout and each row's place in the prompts.
        """
        params = self.params
        first, count = self.processes.own_rows(params.batch_size)
        start = (update * params.batch_size + first) // params.samples_per_prompt
        chosen = [self.order[(start + place) % len(self.order)] for place in range(count // params.samples_per_prompt)]
        names = [f"ppo {update} {row}" for row in range(first, first + count)]
        rollout = self._generate(chosen, names, params.samples_per_prompt, "generate")
        longest = self.processes.together(
            torch.tensor([rollout.responses.shape[1]], device=rollout.tokens.device)
        ).max()
        return rollout.padded(int(longest)), [place for place in chosen for _ in range(params.samples_per_prompt)]

    @torch.no_grad()
    def score(self, rollout: Rollout, prompts: list[int]) -> Tensor:
        """The weighted sum of the rewards (b,)."""
        total = torch.zeros(len(prompts), device=rollout.tokens.device)
        for reward, weight in self.roles.rewards:
            if isinstance(reward, RewardModel):
                with self._autocast():
                    part = reward.score(rollout)
            else:
                part = call(reward, [self.prompt_texts[place] for place in prompts], self.responses(rollout))
            total += weight * part.to(total.device)
        if not torch.isfinite(total).all():
            raise UserError(
                f"the reward model gave NaN or infinity for {int((~torch.isfinite(total)).sum())} episodes."
            )
        return total

    def judge(self, episodes: Episodes) -> Batch:
        """Shaped scores, KL penalty, values, advantages."""
        params, rollout = self.params, episodes.rollout
        scores, ended = self.processes.together(episodes.scores), self.processes.together(rollout.ended)
        shaped = scores
        if params.normalise_scores:
            self.moments.update(scores)
            shaped = self.moments.normalise(scores)
        shaped = clip_scores(shaped, params.score_clip)
        shaped = score_missing_end(shaped, ended, params.missing_end_score, params.missing_end_penalty)
        with torch.no_grad(), self._autocast():
            ref_logprobs = response_logprobs(self.roles.reference, rollout, params.temperature)
        own, _ = self.processes.own_rows(params.batch_size)
        mask, logprobs = self.processes.together(rollout.response_mask), self.processes.together(rollout.logprobs)
        nothing = torch.zeros_like(logprobs)
        batch = Batch(
            rollout,
            own,
            mask,
            ended,
            scores,
            shaped,
            logprobs,
            self.processes.together(ref_logprobs),
            *(nothing,) * 4,
        )
        return self.with_advantages(batch)

    def with_advantages(self, batch: Batch) -> Batch:
        """The batch with rewards, values, advantages and returns as the value model now has them."""
        params, mask = self.params, batch.mask
        learns_from_these = self._first_step_takes_all(batch)
        parts = [batch.rollout] if learns_from_these else batch.rollout.chunks()
        with self._autocast(), torch.set_grad_enabled(learns_from_these):
            own_values = torch.cat([self.roles.value.of_states(part) for part in parts])
        values = self.processes.together(own_values.detach())
        kl = token_kl(batch.logprobs, batch.ref_logprobs, mask, params.kl_estimator)
        rewards = token_rewards(batch.shaped, kl, mask, self.kl_controller.coefficient)
        if params.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, params.gamma, params.gae_lambda)
        if params.whiten_advantages:
            advantages = whiten(advantages, mask)
        return batch._replace(
            rewards=rewards,
            values=values,
            advantages=advantages,
            returns=returns,
            own_values=own_values if learns_from_these else None,
        )

    def _first_step_takes_all(self, batch: Batch) -> bool:
        """Whether it needs the very values that advantages are made from, so that one forward pass serves both."""
        params, own = self.params, len(batch.rollout.tokens)
        warms_up = self.update == 0 and params.value_warmup_epochs > 0
        whole = params.minibatch_size == params.batch_size and own <= params.micro_batch_size
        return whole and not warms_up and self.roles.value.model is not None

    def minibatches(self, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Row numbers of an epoch's minibatches. The samples of one prompt stay together: they share its forward."""
        samples = self.params.samples_per_prompt
        prompts = torch.randperm(self.params.batch_size // samples, generator=shuffle)
        for chosen in prompts.split(self.params.minibatch_size // samples):
            yield (chosen[:, None] * samples + torch.arange(samples)).flatten()

    def train_minibatch(self, batch: Batch, rows: Tensor) -> dict[str, float]:
        """One step of each optimizer. Gradients add up over micro-batches, divided by the minibatch's token count."""
        params = self.params
        count = float(batch.mask[rows].sum())
        totals: dict[str, float] = defaultdict(float)
        for part in self._micro_batches(batch, rows):
            episodes, here = batch.rollout.rows(part), part + batch.first
            if self.value_learner is not None:
                value = self._value_loss(batch, part, count)
                (params.value_coef * value).backward()
            with self._autocast():
                final = final_states(self.roles.policy, episodes)
                policy = policy_loss(
                    token_logprobs(self.roles.policy, final, episodes, params.temperature),
                    episodes.logprobs,
                    batch.advantages[here],
                    episodes.response_mask,
                    params.clip_range,
                    count,
                )
            if self.value_learner is None:
                value = self._value_loss(batch, part, count, final)
                (policy.loss + params.value_coef * value).backward()
            else:
                policy.loss.backward()
            for name, figure in {**policy._asdict(), "value_loss": value}.items():
                totals["policy_loss" if name == "loss" else name] += figure.item()
        if params.ptx_coef:
            totals["ptx_loss"] = self._add_ptx_gradient(len(rows))
        totals = self._add_up_figures(totals)
        if not all(map(math.isfinite, totals.values())):
            raise NotFinite(
                "; ".join(f"{name} is {value}" for name, value in totals.items() if not math.isfinite(value))
            )
        totals["learning_rate"] = self.policy_learner.learning_rate
        totals["policy_grad_norm"] = self.policy_learner.step(self.processes.add_up)
        self.policy_learner.schedule.step()
        if self.value_learner is not None:
            totals["value_grad_norm"] = self.value_learner.step(self.processes.add_up)
            self.value_learner.schedule.step()
        self.steps += 1
        return dict(totals)

    def warm_up_value(self, batch: Batch, shuffle: torch.Generator) -> Batch:
        """Fit the value model to the first episodes before the policy moves; returns them judged anew.

        The reward model was trained on whole responses alone. What it says of half a response is far off at first, and
        with gae_lambda < 1 that error would be the policy's first lesson.
        """
        learner = self.value_learner or Learner(
            [(self.roles.value.own_weights, self.params.value_learning_rate)], self.params, 1, None
        )
        rates = [group["lr"] for group in learner.optimizer.param_groups]
        for group in learner.optimizer.param_groups:
            group["lr"] = self.params.value_learning_rate  # the schedule is of the policy's steps
        for rows in self._epochs(self.params.value_warmup_epochs, shuffle, "fit the values"):
            count = float(batch.mask[rows].sum())
            for part in self._micro_batches(batch, rows):
                self._value_loss(batch, part, count, policy_learns=False).backward()
            learner.step(self.processes.add_up)
        for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return self.with_advantages(batch)

    # ---- held-out evaluation, and what is kept ----

    @torch.no_grad()
    def evaluate(self) -> HeldOut:
        """Responses to the held-out prompts, always from the same random numbers; scored as in training, less
        normalisation and clipping. With a moving average of the weights, it is what answers."""
        params = self.params
        trained = None
        if self.policy_learner.average is not None:
            trained = [weight.detach().clone() for weight in self.policy_learner.weights]
            self.policy_learner.set_weights(self.policy_learner.average)
        names = [f"held out {place}" for place in range(len(self.held_out))]
        rollout = self._generate(self.held_out, names, 1, "evaluate")
        if trained is not None:
            self.policy_learner.set_weights(trained)
        given = self.score(rollout, self.held_out)
        scores = score_missing_end(given, rollout.ended, params.missing_end_score, params.missing_end_penalty)
        with self._autocast():
            ref_logprobs = response_logprobs(self.roles.reference, rollout, params.temperature)
        kl = ((rollout.logprobs - ref_logprobs) * rollout.response_mask).sum(-1)
        result = HeldOut(self.update, scores.tolist(), kl.mean().item())
        answers = zip(self.held_out, rollout.response_ids(), given.tolist(), kl.tolist(), strict=True)
        self.held_out_answers += [
            {"update": self.update, "prompt": place, "tokens": tokens, "score": score, "kl": nats}
            for place, tokens, score, nats in answers
        ]
        if self.watch.evaluated(result):
            self.kept_weights = {name: learner.copy_weights() for name, learner in self._learners().items()}
        return result

    def finish(self) -> None:
        """Put the policy that is kept in its place: by held-out prompts (`Watch`); without these, the last."""
        self.kept_update = self.update
        if self.watch.kept is not None:
            self.kept_update = self.watch.kept.update
            for name, learner in self._learners().items():
                learner.set_weights(self.kept_weights[name])
        elif self.policy_learner.average is not None:
            self.policy_learner.set_weights(self.policy_learner.average)

    def _evaluate_when_due(self) -> dict[str, float]:
        every = self.params.eval_every
        if not every or self.watch.stopped or (self.update % every and self.update < self.params.updates):
            return {}
        with self._timed("evaluate"):
            result = self.evaluate()
        return {"held_out_score": result.score, "held_out_kl": result.kl}

    # ---- checkpoints ----

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts that JSON holds) after an update, from which `load_state` goes on with the same bits."""
        tensors, generators = rng_state()
        tensors = nest("rng", tensors)
        facts: dict[str, Any] = {
            "update": self.update,
            "steps": self.steps,
            "kl_coef": self.kl_controller.coefficient,
            "moments": vars(self.moments),
            "watch": self.watch.state(),
            "held_out_start": self.held_out_start,
            "held_out_answers": self.held_out_answers,
            "rng": generators,
            "learners": {},
        }
        for name, learner in self._learners().items():
            learned, facts["learners"][name] = learner.state()
            tensors |= nest(name, learned)
            kept = {str(number): weight for number, weight in enumerate(self.kept_weights.get(name, []))}
            tensors |= nest(f"kept/{name}", kept)
        return tensors, facts

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Into a trainer that was made from the same models, prompts and parameters."""
        self.update, self.steps = facts["update"], facts["steps"]
        self.kl_controller.coefficient = facts["kl_coef"]
        vars(self.moments).update(facts["moments"])
        self.watch.load_state(facts["watch"])
        self.held_out_start = HeldOut(*facts["held_out_start"]) if facts["held_out_start"] else None
        self.held_out_answers = facts["held_out_answers"]
        for name, learner in self._learners().items():
            learner.load_state(pick(name, tensors), facts["learners"][name])
            kept = pick(f"kept/{name}", tensors)
            if kept:
                self.kept_weights[name] = [kept[str(number)].to(self.device) for number in range(len(kept))]
        restore_rng(pick("rng", tensors), facts["rng"])

    def _learners(self) -> dict[str, Learner]:
        learners = {"policy": self.policy_learner}
        return learners if self.value_learner is None else {**learners, "value": self.value_learner}

    # ---- helpers ----

    def responses(self, rollout: Rollout) -> list[Any]:
        """As texts where there is a tokenizer, else as token ids."""
        ids = rollout.response_ids()
        return ids if self.tokenizer is None else [decode_response(self.tokenizer, row) for row in ids]

    def _epochs(self, count: int, shuffle: torch.Generator, doing: str) -> Iterator[Tensor]:
        """The minibatches of `count` epochs; tells how far they are."""
        total = count * (self.params.batch_size // self.params.minibatch_size)
        every = (rows for _ in range(count) for rows in self.minibatches(shuffle))
        for done, rows in enumerate(every):
            self.progress(doing, done, total)
            yield rows

    def _generate(self, prompts: list[int], names: list[str], samples: int, doing: str) -> Rollout:
        self.progress(doing, 0, self.max_new_tokens)  # the prompts go through first
        ours: dict[str, Any] = {}
        if self.sampler is generate:  # another engine need not know of it
            ours["after_token"] = lambda done: self.progress(doing, done, self.max_new_tokens)
        with self._autocast():
            return self.sampler(
                self.roles.trunk,
                self.roles.policy,
                [self.prompts[place] for place in prompts],
                uniforms_for(self.seed, names, self.max_new_tokens),
                max_new_tokens=self.max_new_tokens,
                end_token=self.end_token,
                pad_token=self.pad_token,
                temperature=self.params.temperature,
                top_p=self.params.top_p,
                samples_per_prompt=samples,
                **ours,
            )

    def _micro_batches(self, batch: Batch, rows: Tensor) -> Iterator[Tensor]:
        """Of some rows this process's own, as places in its rollout: episodes of like length go through together."""
        samples, own = self.params.samples_per_prompt, len(batch.rollout.tokens)
        groups = rows[(rows >= batch.first) & (rows < batch.first + own)].view(-1, samples) - batch.first
        lengths = batch.rollout.mask.sum(-1)[groups].sum(-1)
        groups = groups[lengths.argsort(stable=True).cpu()]
        parts = groups.split(max(1, self.params.micro_batch_size // samples))
        return (part.flatten() for part in parts if len(part))

    def _value_loss(
        self, batch: Batch, rows: Tensor, count: float, final: Tensor | None = None, *, policy_learns: bool = True
    ) -> Tensor:
        """The value loss of some of this process's episodes, as a share of a minibatch of `count` tokens."""
        episodes, here = batch.rollout.rows(rows), rows + batch.first
        with self._autocast():
            if self.roles.value.model is None and not policy_learns:
                with torch.no_grad():
                    final = final_states(self.roles.policy, episodes)
            values = self.roles.value.of_states(episodes, final) if batch.own_values is None else batch.own_values[rows]
        return value_loss(
            values,
            batch.values[here],
            batch.returns[here],
            episodes.response_mask,
            self.params.value_clip_range,
            count,
        )

    def _add_ptx_gradient(self, episodes: int) -> float:
        """Returns this process's share of the language-model loss."""
        count = episodes * self.params.ptx_examples_per_episode
        texts = ptx.texts_of_step(self.pretraining, self.ptx_order, self.steps, count)
        own = texts[self.processes.index :: self.processes.count]
        total = 0.0
        with self._autocast():
            for loss in ptx.losses(
                self.roles.trunk, self.roles.policy, own, self.params.micro_batch_size, ptx.token_count(texts)
            ):
                (self.params.ptx_coef * loss).backward()
                total += loss.item()
        return total

    def _add_up_figures(self, figures: dict[str, float]) -> dict[str, float]:
        """Each process has its share of them; one that had no row of the minibatch has none."""
        if self.processes.count == 1:
            return figures
        names = ["policy_loss", "clip_fraction", "approx_kl", "ratio", "value_loss"]
        names += ["ptx_loss"] if self.params.ptx_coef else []
        own = torch.tensor([figures.get(name, 0.0) for name in names], device=self.device)
        return dict(zip(names, self.processes.add_up(own).tolist(), strict=True))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.params.precision == "bf16")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.monotonic() - started
