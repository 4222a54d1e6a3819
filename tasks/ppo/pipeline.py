"""Stage `ppo`: optimise the policy against the reward model (InstructGPT, step 3).

`python -m tasks.run ppo`. The policy starts from the SFT model and the value model from the reward model. Killed, it
goes on from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks.datasets import Demonstration, HeldOutAnswer, Prompt, read_rows, write_csv, write_figures, write_rows
from tasks.demands import require, reward_function
from tasks.models import (
    decode_response,
    encode_prompt,
    encode_response,
    load_language_model,
    load_scalar_model,
    load_tokenizer,
    require_same_tokenizer,
    save_model,
)
from tasks.ppo.ptx import Text
from tasks.ppo.rewards import Reward, RewardFunction
from tasks.ppo.trainer import PPOTrainer
from tasks.stage import Stage, UserError


def train_policy(stage: Stage) -> None:
    params = stage.params.ppo
    sft_folder, reward_folder = stage.dep("data/models/sft"), stage.dep("data/models/reward")
    prepared = stage.dep("data/prepared/tokenizer_fingerprint.txt").parent
    collected = stage.dep("data/collected/demonstrations")
    require_same_tokenizer(prepared, collected, sft_folder, reward_folder)
    tokenizer = load_tokenizer(sft_folder)
    policy, reward_model = load_language_model(sft_folder), load_scalar_model(reward_folder)
    demonstrations = read_rows(collected / "demonstrations.jsonl", Demonstration)
    prompts = read_rows(stage.dep("data/prepared/prompts/ppo.jsonl"), Prompt)
    trainer = PPOTrainer(
        policy,
        None,
        [(reward_named(name, reward_model, stage.spec.deps), weight) for name, weight in params.rewards.items()],
        reward_model if params.value == "separate" else None,
        [row.prompt for row in prompts],
        params,
        tokenizer=tokenizer,
        pretraining=[
            Text(encode_prompt(tokenizer, row.prompt), encode_response(tokenizer, row.response))
            for row in demonstrations
        ],
        max_new_tokens=stage.params.text.max_response_tokens,
        seed=stage.params.seed,
    )
    history = train(trainer, stage)

    save_model(policy, tokenizer, stage.out("data/models/policy"))
    if params.value == "head":
        reward_model.model.load_state_dict(policy.model.state_dict())
        reward_model.score.load_state_dict(trainer.roles.value.head.state_dict())
        reward_model.config.score_bias = 0.0
    save_model(reward_model, tokenizer, stage.out("data/models/value"))
    write_csv(stage.out("data/reports/ppo/history.csv"), history)
    write_rows(
        stage.out("data/collected/held_out") / "answers.jsonl",
        [
            HeldOutAnswer(
                **row
                | {"id": prompts[row["prompt"]].id, "prompt": prompts[row["prompt"]].prompt}
                | {"response": decode_response(tokenizer, row["tokens"])}
            )
            for row in trainer.held_out_answers
        ],
    )
    last = {name: value for name, value in history[-1].items() if name != "update"}
    held_out = trainer.watch.kept  # without it the last update is kept
    kept: dict[str, Any] = {
        "updates": trainer.update,
        "kept_update": trainer.kept_update,
        "stopped_early": int(bool(trainer.watch.stopped)),
        "kept_score": held_out.score if held_out else last["score"],
        "kept_kl": held_out.kl if held_out else last["kl"],
    }
    stage.tracker.metrics({f"ppo/{name}": kept[name] for name in ("kept_update", "kept_score", "kept_kl")})
    start = {} if trainer.held_out_start is None else {"held_out_start": trainer.held_out_start.score}
    best = {} if trainer.watch.best is None else {"held_out_best": trainer.watch.best.score}
    # of weights that are not kept, history.csv tells
    rest = last if trainer.kept_update == trainer.update else {}
    figures = {**kept, **start, **best, **rest}
    write_figures(stage.out("data/reports/ppo/metrics.json"), {"ppo": figures}, ["ppo.kept_update", "ppo.kept_score"])
    print(f"ppo: the policy after update {trainer.kept_update} of {trainer.update} is kept")


def train(trainer: PPOTrainer, stage: Stage) -> list[dict[str, Any]]:
    """Train from the newest checkpoint on, or from the start; returns a row an update."""
    params = stage.params.ppo
    history: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    if checkpoint := stage.checkpoints.latest():
        checkpoint.announce("ppo", "update", params.updates)
        trainer.load_state(checkpoint.tensors, checkpoint.facts["trainer"])
        history, samples = checkpoint.facts["history"], checkpoint.facts["samples"]
        for row in history:
            log(stage, row)
    with tqdm(total=params.updates, initial=trainer.update, desc="ppo", unit="update") as bar:
        figures = ""

        def show(doing: str, done: int, total: int) -> None:
            bar.set_postfix_str(f"{doing} {done / total:.0%}{figures}")

        trainer.progress = show
        for metrics in trainer:
            row = {"update": len(history) + 1, **metrics}
            log(stage, row)
            history.append({name: value for name, value in row.items() if not name.startswith("time/")})
            figures = f", score={metrics['score']:.2f}, kl={metrics['kl']:.2f}"
            bar.update()
            done = trainer.update == params.updates or bool(trainer.watch.stopped)
            if trainer.update % params.sample_every == 0 or done:
                samples += sample_rows(trainer)
                stage.tracker.table("ppo_samples", samples)
            if trainer.update % params.checkpoint_every == 0 and not done:
                tensors, facts = trainer.state()
                stage.checkpoints.save(
                    trainer.update, tensors, {"trainer": facts, "history": history, "samples": samples}
                )
    if trainer.watch.stopped:
        tqdm.write(f"ppo: stopped early: {trainer.watch.stopped}. Kept: the policy after update {trainer.kept_update}.")
        stage.tracker.tags({"ppo.stopped": trainer.watch.stopped})
    return history


def log(stage: Stage, row: dict[str, Any]) -> None:
    figures = {name if name.startswith("time/") else f"ppo/{name}": value for name, value in row.items()}
    stage.tracker.metrics({name: value for name, value in figures.items() if name != "ppo/update"}, row["update"])


def sample_rows(trainer: PPOTrainer) -> list[dict[str, Any]]:
    """The first episodes of the update as text, with their scores."""
    if trainer.last is None:
        return []
    rollout, prompts, scores = trainer.last
    rows = zip(prompts, trainer.responses(rollout), scores.tolist(), rollout.ended.tolist(), strict=True)
    return [
        {
            "update": trainer.update,
            "prompt": trainer.prompt_texts[place],
            "response": response,
            "score": round(score, 4),
            "ended": ended,
        }
        for place, response, score, ended in list(rows)[:8]
    ]


def reward_named(name: str, reward_model: Any, deps: tuple[str, ...]) -> Reward:
    """What `ppo.rewards` names: `model`, or `FILE.py:FUNCTION`, a file in the repository and among the stage's deps."""
    if name == "model":
        return reward_model
    file, _, function = name.partition(":")
    where = f"ppo.rewards: `{name}`"
    require(reward_function(name, deps, Path()))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{where}: {file} cannot be imported: {type(error).__name__}: {error}") from error
    found: RewardFunction | None = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{where}: {file} has no function `{function}`.")
    return found
