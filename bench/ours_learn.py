"""Trains with this project's PPOTrainer as bench/trl_learn.py does with TRL's: the same work, clock and answers."""

from __future__ import annotations

from tasks.run import tune_process

tune_process()  # before torch is imported

import json
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bench.workload import learning_options
from tasks.params import load_params
from tasks.ppo.params import PPOParams
from tasks.ppo.rollout import generate, uniforms_for
from tasks.ppo.trainer import PPOTrainer


def main() -> None:
    arguments = learning_options(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    work = json.loads(arguments.work.read_text())
    defaults = load_params(Path("params.yaml")).ppo
    params = replace(
        PPOParams(**{one.name: getattr(defaults, one.name) for one in fields(PPOParams)}),
        updates=1000,
        eval_every=0,
        learning_rate=arguments.learning_rate,
        value_learning_rate=2 * arguments.learning_rate,
    )
    policy = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    reward = AutoModelForSequenceClassification.from_pretrained(work["reward"], dtype=torch.float32, num_labels=1)
    options = {"end_token": work["end_token"], "pad_token": work["pad_token"]}
    trainer = PPOTrainer(
        policy,
        None,
        reward,
        reward,
        work["prompts"],
        params,
        max_new_tokens=work["response_length"],
        seed=arguments.seed,
        **options,
    )
    uniforms = uniforms_for(0, map(str, range(len(work["held_out"]))), work["response_length"])
    spent = 0.0
    with arguments.out.open("w") as out:
        while spent < arguments.budget:
            started = time.perf_counter()
            trainer.step()
            spent += time.perf_counter() - started
            rollout = generate(
                trainer.roles.trunk,
                trainer.roles.policy,
                work["held_out"],
                uniforms,
                max_new_tokens=work["response_length"],
                **options,
            )
            row = {
                "seconds": spent,
                "episodes": trainer.update * params.batch_size,
                "answers": rollout.response_ids(),
            }
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
