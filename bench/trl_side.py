"""Times trl 1.12.0's PPOTrainer and prints one line of JSON. Runs in the peer's environment (`python -m bench.peer`).

    bench/.peer/bin/python bench/trl_side.py --model data/models/sft --reward data/models/reward --batch 16
    bench/.peer/bin/python bench/trl_side.py --shape 10M --ragged

fp32, on the GPU if there is one. Fixed: each prompt and response has full length. --ragged: both vary, in a way that
bench/workload.py draws from the seed. `--warmup` updates run first and are not counted.

The line: episodes_per_s; tokens_per_s (prompt and response tokens, no padding), response_tokens_per_s; seconds, summed
over the counted updates: generate (batch_generation), score (the rest of the rollout phase, up to the first
micro-batch), train (the optimizer phase), total (with what is between them); update_seconds, each one's total;
peak_rss_bytes of this process (VmHWM: getrusage's ru_maxrss would start from what the parent had).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read at import
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from bench.workload import (
    force_lengths,
    make_prompts,
    model_config,
    peak_rss_bytes,
    response_lengths,
    timing_options,
)


class Stopwatch:
    """When each phase of each update began, from the places where train() calls out."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.updates: list[dict[str, float]] = []
        self.tokens: list[Tensor] = []  # (B, P + R) of each update
        self.trainer, self.real_generation = trainer, ppo_trainer.batch_generation
        self.real_accumulate = trainer.accelerator.accumulate
        ppo_trainer.batch_generation = self.batch_generation
        trainer.accelerator.accumulate = self.accumulate
        trainer.log = self.log

    def mark(self, phase: str) -> None:
        """The phase is over now. Of several marks of one phase in an update the first counts."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.updates[-1].setdefault(phase, time.perf_counter())

    def batch_generation(self, *arguments: Any) -> Any:
        self.updates.append({})
        self.mark("start")
        tokens, logits = self.real_generation(*arguments)
        self.mark("generate")
        self.tokens.append(tokens)
        return tokens, logits

    def accumulate(self, *models: Any) -> Any:
        """train() enters this before each micro-batch."""
        self.mark("score")
        return self.real_accumulate(*models)

    def log(self, metrics: dict[str, float]) -> None:
        """train() calls this after the last epoch."""
        self.mark("train")

    def seconds(self, end: float) -> list[dict[str, float]]:
        """Each update's phases; the last update's total runs to `end`, the others' to the next one's start."""
        ends = [update["start"] for update in self.updates[1:]] + [end]
        return [
            {
                "generate": update["generate"] - update["start"],
                "score": update["score"] - update["generate"],
                "train": update["train"] - update["score"],
                "total": over - update["start"],
            }
            for update, over in zip(self.updates, ends, strict=True)
        ]


def load_pair(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A language model and a model with one number as its output, the same on each call."""
    if arguments.shape:
        torch.manual_seed(arguments.seed)
        config = LlamaConfig(**model_config(arguments.shape), num_labels=1)
        return LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    return (
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        AutoModelForSequenceClassification.from_pretrained(arguments.reward, dtype=torch.float32, num_labels=1),
    )


def load_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """PPOTrainer's four models. The reference starts as the policy, the value model as the reward model."""
    (policy, value), (reference, reward) = load_pair(arguments), load_pair(arguments)
    return {"model": policy, "ref_model": reference, "reward_model": reward, "value_model": value}


def pad_left(prompts: list[list[int]], width: int, pad_token: int) -> Tensor:
    return torch.tensor([[pad_token] * (width - len(prompt)) + prompt for prompt in prompts])


def make_trainer(arguments: argparse.Namespace, models: dict[str, Any], output: str) -> PPOTrainer:
    """One whole batch a step, generated and scored at once: TRL at its fastest. Logging and saving are off."""
    config = models["model"].config
    end_token, pad_token, width = config.eos_token_id, config.pad_token_id, arguments.prompt_length
    models["model"].generation_config = GenerationConfig(pad_token_id=pad_token)
    updates = arguments.warmup + arguments.updates
    settings = PPOConfig(
        output_dir=output,
        per_device_train_batch_size=min(arguments.micro_batch, arguments.batch),
        gradient_accumulation_steps=max(1, arguments.batch // arguments.micro_batch),
        local_rollout_forward_batch_size=arguments.batch,
        total_episodes=arguments.batch * updates,
        num_ppo_epochs=arguments.epochs,
        response_length=arguments.response_length,
        stop_token_id=end_token if arguments.ragged else None,
        learning_rate=arguments.learning_rate,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    batches = [
        pad_left(
            make_prompts(arguments.seed, update, arguments.batch, width, config.vocab_size, arguments.ragged),
            width,
            pad_token,
        )
        for update in range(updates)
    ]
    trainer = PPOTrainer(
        args=settings,
        processing_class=SimpleNamespace(pad_token_id=pad_token, eos_token_id=end_token),
        train_dataset=Dataset.from_dict({"input_ids": torch.cat(batches).tolist()}),
        **models,
    )
    trainer.dataloader = [{"input_ids": batch} for batch in batches]  # TRL's own would shuffle rows between updates
    return trainer


def force_response_lengths(trainer: PPOTrainer, arguments: argparse.Namespace) -> None:
    """Make the policy's `generate`, once an update, end each row where the workload says."""
    policy, width, updates = (
        trainer.policy_model,
        arguments.prompt_length,
        iter(range(arguments.warmup + arguments.updates)),
    )
    real_generate, config = policy.generate, policy.config

    def generate(**options: Any) -> Any:
        update, lengths = next(updates), None
        if arguments.ragged:
            lengths = response_lengths(arguments.seed, update, arguments.batch, arguments.response_length)

        def force(tokens: Tensor, logits: Tensor) -> Tensor:
            return force_lengths(logits, tokens.shape[1] - width, lengths, config.eos_token_id, config.pad_token_id)

        return real_generate(**options, logits_processor=[force])

    policy.generate = generate


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    models = load_models(arguments)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(arguments, models, output)
        force_response_lengths(trainer, arguments)
        stopwatch = Stopwatch(trainer)
        trainer.train()
        seconds = stopwatch.seconds(time.perf_counter())[arguments.warmup :]
    pad_token, width = models["model"].config.pad_token_id, arguments.prompt_length
    real = [tokens != pad_token for tokens in stopwatch.tokens[arguments.warmup :]]
    totals = {phase: sum(update[phase] for update in seconds) for phase in seconds[0]}
    total = totals["total"]
    return {
        "side": "trl",
        "device": trainer.accelerator.device.type,
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        "episodes_per_s": arguments.batch * len(seconds) / total,
        "tokens_per_s": sum(int(mask.sum()) for mask in real) / total,
        "response_tokens_per_s": sum(int(mask[:, width:].sum()) for mask in real) / total,
        "seconds": totals,
        "update_seconds": [update["total"] for update in seconds],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> None:
    arguments = timing_options("Time trl 1.12.0's PPOTrainer.").parse_args()
    torch.set_num_threads(arguments.threads)
    with redirect_stdout(sys.stderr):  # train() prints
        figures = measure(arguments)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
