"""Stage `ppo`: optimise the policy against the reward model (InstructGPT, step 3).

`python -m tasks.run ppo`. The policy starts from the SFT model and the value model from the reward model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from tqdm import tqdm

from tasks.datasets import Prompt, read_rows, write_csv, write_json
from tasks.models import (
    decode_response,
    encode_prompt,
    load_language_model,
    load_scalar_model,
    load_tokenizer,
    require_same_tokenizer,
    save_model,
    shared_depth,
    split_model,
    trunk_depth,
)
from tasks.ppo.rollout import Rollout, score_last_token
from tasks.ppo.trainer import PPOTrainer
from tasks.stage import Stage, UserError


def train_policy(stage: Stage) -> None:
    params = stage.params.ppo
    sft_folder, reward_folder = stage.dep("data/models/sft"), stage.dep("data/models/reward")
    require_same_tokenizer(sft_folder, reward_folder)
    prompts = read_rows(stage.dep("data/prepared/prompts/ppo.jsonl"), Prompt)
    for name in ("batch_size", "minibatch_size", "micro_batch_size"):
        if getattr(params, name) % params.samples_per_prompt:
            raise UserError(
                f"ppo.{name} {getattr(params, name)} is not a multiple of "
                f"ppo.samples_per_prompt {params.samples_per_prompt}: the samples of a prompt go through together."
            )
    if params.minibatch_size > params.batch_size:
        raise UserError(
            f"ppo.minibatch_size {params.minibatch_size} is larger than ppo.batch_size {params.batch_size}."
        )
    tokenizer = load_tokenizer(sft_folder)
    sft, reward_model = load_language_model(sft_folder), load_scalar_model(reward_folder)
    depth = shared_depth(sft, reward_model, at_most=trunk_depth(sft, params.trainable_layers))
    trunk, reference = split_model(sft, depth)
    _, reward_branch = split_model(reward_model, depth)
    policy = reference.trainable_copy(params.trainable_layers)
    value_model = reward_branch.trainable_copy(params.trainable_layers)

    def score(rollout: Rollout) -> Tensor:
        return score_last_token(reward_branch, rollout) - float(reward_model.config.score_bias)

    trainer = PPOTrainer(
        trunk,
        policy,
        reference,
        value_model,
        score,
        [encode_prompt(tokenizer, row.prompt) for row in prompts],
        params,
        seed=stage.params.seed,
        max_new_tokens=stage.params.text.max_response_tokens,
        end_token=tokenizer.eos_token_id,
        pad_token=tokenizer.pad_token_id,
        value_bias=reward_model.config.score_bias,
    )
    history: list[dict[str, float]] = []
    with tqdm(total=params.updates, desc="ppo", unit="update") as bar:
        for metrics in trainer:
            history.append({"update": len(history) + 1, **metrics})
            stage.tracker.metrics({f"ppo/{name}": value for name, value in metrics.items()}, len(history))
            seconds = {f"time/{name}_seconds": value for name, value in trainer.seconds.items()}
            stage.tracker.metrics(seconds, len(history))
            bar.set_postfix(score=f"{metrics['score']:.2f}", kl=f"{metrics['kl']:.2f}")
            bar.update()

    if trainer.last_rollout is not None:
        stage.tracker.table("ppo_samples", sample_table(trainer.last_rollout, tokenizer))
    policy.write_into(sft)
    value_model.write_into(reward_model)
    save_model(sft, tokenizer, stage.out("data/models/policy"))
    save_model(reward_model, tokenizer, stage.out("data/models/value"))
    write_csv(stage.out("data/reports/ppo/history.csv"), history)
    final = {name: value for name, value in history[-1].items() if name != "update"}
    write_json(stage.out("data/reports/ppo/metrics.json"), {"ppo": {"updates": len(history), **final}})


def sample_table(rollout: Rollout, tokenizer: Any) -> list[dict[str, str]]:
    """The first episodes of an update as text; the prompt as the policy saw it, with the chat template."""
    width = rollout.prompt_length
    episodes = zip(rollout.tokens, rollout.mask, rollout.response_ids(), strict=True)
    return [
        {"prompt": tokenizer.decode(tokens[:width][mask[:width]]), "response": decode_response(tokenizer, response)}
        for tokens, mask, response in list(episodes)[:8]
    ]
