"""Models that answer the same prompts with the same random numbers, and judge each other's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.datasets import Answer, HeldOutAnswer, Prompt
from tasks.models import (
    Branch,
    Trunk,
    decode_response,
    encode_prompt,
    load_language_model,
    load_scalar_model,
    load_tokenizer,
    require_same_tokenizer,
    shared_depth,
    split_model,
)
from tasks.ppo.rollout import Rollout, as_rollout, generate, response_logprobs, score_last_token, uniforms_for

if TYPE_CHECKING:
    from tasks.params import Baseline


class Panel:
    """The models of a comparison on the frozen trunk that they share, which sees each answer once."""

    def __init__(self, folders: Mapping[str, Path], settings: Baseline, max_new_tokens: int, seed: int) -> None:
        """folders: of base, sft, reward, and whichever else is to answer. UserError where a tokenizer differs."""
        require_same_tokenizer(*folders.values())
        self.settings, self.max_new_tokens, self.seed = settings, max_new_tokens, seed
        self.tokenizer: Any = load_tokenizer(folders["base"])
        models = {name: load_language_model(folder) for name, folder in folders.items() if name != "reward"}
        reward = load_scalar_model(folders["reward"])
        depth: int | None = models["base"].config.num_hidden_layers
        for model in (*models.values(), reward):
            depth = shared_depth(models["base"], model, depth)
        self.trunk = Trunk(models["base"], depth)
        self.branches = {name: Branch(model, depth) for name, model in models.items()}
        _, self.reward_branch = split_model(reward, depth)
        self.score_bias = reward.config.score_bias

    @torch.no_grad()
    def answer(self, name: str, prompts: Sequence[Prompt], bar: Any, times: int = 1) -> list[Answer]:
        """A model's answers, those to one prompt one after the other. Once: with the random numbers that every model
        is given; several times: with others."""
        answers = []
        size = max(1, self.settings.batch_size // times)
        for at in range(0, len(prompts), size):
            chosen = prompts[at : at + size]
            names = [f"evaluate {row.id}" for row in chosen]
            if times > 1:
                names = [f"{name} {place}" for name in names for place in range(times)]
            rollout = generate(
                self.trunk,
                self.branches[name],
                [encode_prompt(self.tokenizer, row.prompt) for row in chosen],
                uniforms_for(self.seed, names, self.max_new_tokens),
                max_new_tokens=self.max_new_tokens,
                end_token=self.tokenizer.eos_token_id,
                pad_token=self.tokenizer.pad_token_id,
                temperature=self.settings.temperature,
                samples_per_prompt=times,
            )
            answers += self._judged(name, rollout, [row for row in chosen for _ in range(times)])
            bar.update(len(names))
        return answers

    def _judged(self, name: str, rollout: Rollout, prompts: Sequence[Prompt]) -> list[Answer]:
        temperature = self.settings.temperature
        own = rollout.logprobs.sum(-1)
        known = name == "base" and temperature == 1.0
        under_base = own if known else response_logprobs(self.branches["base"], rollout, 1.0).sum(-1)
        kl: list[float | None] = [None] * len(own)
        if name == "policy":
            kl = (own - response_logprobs(self.branches["sft"], rollout, temperature).sum(-1)).tolist()
        scores = score_last_token(self.reward_branch, rollout) - self.score_bias
        return [
            Answer(
                id=prompt.id,
                prompt=prompt.prompt,
                response=decode_response(self.tokenizer, tokens),
                length=len(tokens),
                ended=bool(rollout.ended[row]),
                score=scores[row].item(),
                base_logprob=under_base[row].item(),
                kl=kl[row],
            )
            for row, (prompt, tokens) in enumerate(zip(prompts, rollout.response_ids(), strict=True))
        ]

    @torch.no_grad()
    def base_logprobs(self, answers: Sequence[HeldOutAnswer], bar: Any) -> list[float]:
        """Of each answer under the base model, in nats."""
        found: list[float] = []
        for at in range(0, len(answers), self.settings.batch_size):
            rows = answers[at : at + self.settings.batch_size]
            rollout = as_rollout(
                self.trunk,
                self.branches["base"],
                [encode_prompt(self.tokenizer, row.prompt) for row in rows],
                [row.tokens for row in rows],
                end_token=self.tokenizer.eos_token_id,
                pad_token=self.tokenizer.pad_token_id,
            )
            found += rollout.logprobs.sum(-1).tolist()
            bar.update(len(rows))
        return found
