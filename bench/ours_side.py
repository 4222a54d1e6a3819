"""Times this project's PPOTrainer and prints one line of JSON: `python -m bench.ours_side`, as bench/trl_side.py does.

The same work as the peer's from the same seeds (bench/workload.py), in one of two modes: `full` trains all layers of
policy and value model, as TRL does; `frozen_trunk` trains the top `--layers`. The process is tuned as a stage's is.
"""

from __future__ import annotations

from tasks.run import tune_process

tune_process()  # before torch is imported

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from bench.workload import (
    force_lengths,
    make_prompts,
    model_config,
    peak_rss_bytes,
    response_lengths,
    timing_options,
)
from tasks.ppo import rollout
from tasks.ppo.params import PPOParams
from tasks.ppo.trainer import PPOTrainer

END_HERE = 2.0  # as the random number of a token: the workload ends the response with it


def load_models(arguments: argparse.Namespace) -> tuple[Any, Any]:
    if arguments.shape:
        torch.manual_seed(arguments.seed)
        config = LlamaConfig(**model_config(arguments.shape), num_labels=1)
        policy, reward = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
        reward.model.load_state_dict(policy.model.state_dict())  # one trunk, as in a reward model trained from it
        return policy, reward
    return (
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        AutoModelForSequenceClassification.from_pretrained(arguments.reward, dtype=torch.float32, num_labels=1),
    )


def forced_sampler(arguments: argparse.Namespace, end_token: int, pad_token: int) -> Any:
    """`generate` with the workload's response lengths: they go in with the random numbers."""
    sample_tokens = rollout.sample_tokens
    updates = iter(range(arguments.warmup + arguments.updates))

    def forced_tokens(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
        last = torch.where(draws == END_HERE, 1, 0)  # its own step is 0: `last` is its length where it ends here
        return sample_tokens(force_lengths(logits, 0, last, end_token, pad_token), draws % 1, temperature, top_p)

    rollout.sample_tokens = forced_tokens  # type: ignore[assignment]

    def sampler(trunk: Any, branch: Any, prompts: Any, uniforms: Tensor, **options: Any) -> rollout.Rollout:
        update = next(updates)
        if arguments.ragged:
            lengths = response_lengths(arguments.seed, update, arguments.batch, arguments.response_length)
            uniforms[torch.arange(arguments.batch), lengths - 1] = END_HERE
        return rollout.generate(trunk, branch, prompts, uniforms, **options)

    return sampler


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    policy, reward = load_models(arguments)
    end_token, pad_token = policy.config.eos_token_id, policy.config.pad_token_id
    updates = arguments.warmup + arguments.updates
    prompts = [
        make_prompts(
            arguments.seed, update, arguments.batch, arguments.prompt_length, policy.config.vocab_size, arguments.ragged
        )
        for update in range(updates)
    ]
    params = PPOParams(
        trainable_layers="all" if arguments.mode == "full" else arguments.layers,
        value=arguments.value,
        updates=updates,
        batch_size=arguments.batch,
        minibatch_size=arguments.batch,
        micro_batch_size=min(arguments.micro_batch, arguments.batch),
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        value_learning_rate=arguments.learning_rate,
        kl_coef=0.05,
    )
    trainer = PPOTrainer(
        policy,
        None,
        reward,
        reward if arguments.value == "separate" else None,
        [prompt for update in prompts for prompt in update],
        params,
        max_new_tokens=arguments.response_length,
        sampler=forced_sampler(arguments, end_token, pad_token),
    )
    trainer.order = list(range(len(trainer.prompts)))  # each update its own prompts, as the peer's
    rows, tokens, response_tokens = [], 0, 0
    for metrics in trainer:
        rows.append(metrics)
        assert trainer.last is not None
        if len(rows) > arguments.warmup:
            tokens += int(trainer.last.rollout.mask.sum())
            response_tokens += int(trainer.last.rollout.response_mask.sum())
    seconds = [arguments.batch / row["time/episodes_per_second"] for row in rows[arguments.warmup :]]
    phases = {
        name: sum(row[f"time/{name}_seconds"] for row in rows[arguments.warmup :])
        for name in ("generate", "score", "train")
    }
    total = sum(seconds)
    return {
        "side": "ours",
        "device": trainer.device.type,
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        "episodes_per_s": arguments.batch * len(seconds) / total,
        "tokens_per_s": tokens / total,
        "response_tokens_per_s": response_tokens / total,
        "seconds": {**phases, "total": total},
        "update_seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = timing_options("Time this project's PPOTrainer.")
    parser.add_argument("--mode", choices=("full", "frozen_trunk"), default="full")
    parser.add_argument("--layers", type=int, default=6, help="trained from the top, with frozen_trunk")
    parser.add_argument("--value", choices=("separate", "head"), default="separate")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
