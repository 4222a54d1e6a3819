"""Trains with trl 1.12.0's PPOTrainer for some minutes and writes, after each update, its answers to held-out prompts.

Runs in the peer's environment; bench/time_to_reward.py calls it. The clock stands still while it answers. The setting
is TRL's best for this work: as many optimizer steps an update as on our side, whole batches in generation and scoring.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read at import
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench.workload import learning_options


class OutOfTime(Exception):
    pass


def load(work: dict[str, Any], kind: Any, name: str) -> Any:
    options = {"num_labels": 1} if kind is AutoModelForSequenceClassification else {}
    return kind.from_pretrained(work[name], dtype=torch.float32, **options)


def make_trainer(work: dict[str, Any], arguments: argparse.Namespace, output: str) -> PPOTrainer:
    policy = load(work, AutoModelForCausalLM, "model")
    policy.generation_config = GenerationConfig(pad_token_id=work["pad_token"], eos_token_id=work["end_token"])
    settings = PPOConfig(
        output_dir=output,
        seed=arguments.seed,
        per_device_train_batch_size=work["batch"],
        num_mini_batches=work["batch"] // work["minibatch"],
        local_rollout_forward_batch_size=work["batch"],
        total_episodes=work["batch"] * 1000,
        num_ppo_epochs=1,
        response_length=work["response_length"],
        stop_token_id=work["end_token"],
        missing_eos_penalty=work["missing_end_penalty"],
        temperature=1.0,
        kl_coef=work["kl_coef"],
        lam=work["gae_lambda"],
        cliprange_value=work["value_clip_range"],
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    width, pad = max(map(len, work["prompts"])), work["pad_token"]
    padded = [[pad] * (width - len(prompt)) + prompt for prompt in work["prompts"]]
    return PPOTrainer(
        args=settings,
        processing_class=SimpleNamespace(pad_token_id=pad, eos_token_id=work["end_token"]),
        model=policy,
        ref_model=load(work, AutoModelForCausalLM, "model"),
        reward_model=load(work, AutoModelForSequenceClassification, "reward"),
        value_model=load(work, AutoModelForSequenceClassification, "reward"),
        train_dataset=Dataset.from_dict({"input_ids": padded}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
    )


@torch.no_grad()
def answers(policy: Any, work: dict[str, Any]) -> list[list[int]]:
    """One sampled response to each held-out prompt, always from the same seed."""
    width, pad = max(map(len, work["held_out"])), work["pad_token"]
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in work["held_out"]])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    tokens = policy.generate(
        input_ids=ids,
        attention_mask=(ids != pad).long(),
        do_sample=True,
        top_k=0,
        max_new_tokens=work["response_length"],
    )[:, width:]
    torch.set_rng_state(state)
    return [row[row != pad].tolist() for row in tokens]


def main() -> None:
    arguments = learning_options(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    work = json.loads(arguments.work.read_text())
    with tempfile.TemporaryDirectory() as output, redirect_stdout(sys.stderr), arguments.out.open("w") as out:
        trainer = make_trainer(work, arguments, output)
        spent, episodes, started = 0.0, 0, time.perf_counter()

        def after_update(metrics: dict[str, float]) -> None:
            """train() calls this as `log` after each update."""
            nonlocal spent, episodes, started
            spent += time.perf_counter() - started
            episodes += work["batch"]
            row = {"seconds": spent, "episodes": episodes, "answers": answers(trainer.policy_model, work)}
            out.write(json.dumps(row) + "\n")
            out.flush()
            if spent >= arguments.budget:
                raise OutOfTime
            started = time.perf_counter()

        trainer.log = after_update
        with suppress(OutOfTime):
            trainer.train()


if __name__ == "__main__":
    main()
