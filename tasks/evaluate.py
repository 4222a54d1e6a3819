"""Stage `evaluate`: did it help? Base, SFT and policy answer held-out prompts; each figure with an interval.

`python -m tasks.run evaluate`. This is the only stage that knows the gold score. All three models answer a prompt with
the same random numbers. Intervals are 95 % percentile bootstrap over prompts, paired: a resample takes the same prompts
for every model (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tasks.datasets import Prompt, PromptTicket, SideBySide, Ticket, read_rows, write_json, write_rows
from tasks.intervals import resamples, wins, with_interval
from tasks.labels.gold import WEIGHTS, gold_parts
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
from tasks.ppo.rollout import generate, response_logprobs, score_last_token, uniforms_for
from tasks.stage import Stage, UserError

if TYPE_CHECKING:
    from tasks.params import Params

MODELS = ("base", "sft", "policy")


class Answers(NamedTuple):
    """One model's answers to N prompts, and how each was judged. Tensors are (N,) but for `parts`."""

    texts: list[str]
    parts: dict[str, Tensor]  # the gold score's parts, each in [0, 1]
    gold: Tensor  # in [0, 1]
    score: Tensor  # the reward model's, centred
    fluency: Tensor  # mean log-probability of a token under the frozen base model, nats
    kl: Tensor  # the policy's log pi(answer) - log pi_sft(answer), nats: the mean estimates KL(pi, pi_sft); else NaN
    length: Tensor  # tokens, with the end token
    ended: Tensor  # 1 where the answer ends with the end token, else 0


def run(stage: Stage) -> None:
    params = stage.params
    folders = {name: stage.dep(f"data/models/{name}") for name in (*MODELS, "reward")}
    require_same_tokenizer(*folders.values())
    prompts = read_rows(stage.dep("data/prepared/prompts/eval.jsonl"), Prompt)
    if len(prompts) < params.evaluate.prompts:
        raise UserError(
            f"evaluate.prompts is {params.evaluate.prompts}, and the eval split has {len(prompts)} prompts."
        )
    prompts = prompts[: params.evaluate.prompts]
    facts = {row.id: row.ticket for row in read_rows(stage.dep("data/prepared/tickets.jsonl"), PromptTicket)}

    answers = answer_all(folders, prompts, [facts[prompt.id] for prompt in prompts], params)

    figures = summarize(answers, params.seed, params.evaluate.bootstrap_samples)
    rows = side_by_side(prompts, answers)
    write_json(stage.out("data/reports/evaluation/metrics.json"), figures)
    write_rows(stage.out("data/reports/evaluation/samples.jsonl"), rows)
    stage.tracker.metrics({f"eval/{name}": value for name, value in flatten(figures).items()})
    stage.tracker.table("evaluation", [row.model_dump() for row in rows[:50]])


@torch.no_grad()
def answer_all(
    folders: dict[str, Path], prompts: list[Prompt], tickets: list[Ticket], params: Params
) -> dict[str, Answers]:
    """Every model's answers, judged. The models' common frozen trunk runs once for each answer."""
    tokenizer = load_tokenizer(folders["base"])
    models = {name: load_language_model(folders[name]) for name in MODELS}
    reward_model = load_scalar_model(folders["reward"])
    depth: int | None = models["base"].config.num_hidden_layers
    for model in (models["sft"], models["policy"], reward_model):
        depth = shared_depth(models["base"], model, depth)
    trunk = Trunk(models["base"], depth)
    branches = {name: Branch(model, depth) for name, model in models.items()}
    _, reward_branch = split_model(reward_model, depth)
    encoded = [encode_prompt(tokenizer, prompt.prompt) for prompt in prompts]
    uniforms = uniforms_for(params.seed, [f"evaluate {row.id}" for row in prompts], params.text.max_response_tokens)
    answers = {}
    with tqdm(total=len(MODELS) * len(prompts), desc="evaluate", unit="answer") as bar:
        for name in MODELS:
            parts = []
            for rows in torch.arange(len(prompts)).split(params.evaluate.batch_size):
                rollout = generate(
                    trunk,
                    branches[name],
                    [encoded[row] for row in rows],
                    uniforms[rows],
                    max_new_tokens=params.text.max_response_tokens,
                    end_token=tokenizer.eos_token_id,
                    pad_token=tokenizer.pad_token_id,
                    temperature=params.evaluate.temperature,
                )
                length = rollout.response_mask.sum(-1)
                own = rollout.logprobs.sum(-1)
                known = name == "base" and params.evaluate.temperature == 1.0
                under_base = own if known else response_logprobs(branches["base"], rollout, 1.0).sum(-1)
                fluency = under_base / length
                kl = torch.full_like(own, torch.nan)
                if name == "policy":
                    kl = own - response_logprobs(branches["sft"], rollout, params.evaluate.temperature).sum(-1)
                score = score_last_token(reward_branch, rollout) - reward_model.config.score_bias
                texts = [decode_response(tokenizer, ids) for ids in rollout.response_ids()]
                parts.append(judge(texts, [tickets[row] for row in rows], score, fluency, kl, length, rollout.ended))
                bar.update(len(rows))
            answers[name] = join(parts)
    return answers


def judge(
    texts: list[str], tickets: list[Ticket], score: Tensor, fluency: Tensor, kl: Tensor, length: Tensor, ended: Tensor
) -> Answers:
    """Add the gold score to what the models say of the answers."""
    judged = [gold_parts(*row) for row in zip(texts, tickets, fluency.tolist(), strict=True)]
    parts = {part: torch.tensor([row[part] for row in judged]) for part in WEIGHTS}
    gold = torch.stack([weight * parts[part] for part, weight in WEIGHTS.items()]).sum(0)
    return Answers(texts, parts, gold, score, fluency, kl, length.float(), ended.float())


def join(batches: list[Answers]) -> Answers:
    parts = {part: torch.cat([batch.parts[part] for batch in batches]) for part in WEIGHTS}
    tensors = [torch.cat(columns) for columns in zip(*(batch[2:] for batch in batches), strict=True)]
    return Answers([text for batch in batches for text in batch.texts], parts, *tensors)


def summarize(answers: dict[str, Answers], seed: int, times: int) -> dict[str, Any]:
    """The figures of the report, nested. `x_low` and `x_high` bound the 95 % interval of `x`."""
    count = len(answers["sft"].texts)
    picks = resamples(count, times, seed)
    sft, policy = answers["sft"], answers["policy"]
    figures: dict[str, Any] = {"prompts": count}
    for name in ("gold", "score", "fluency"):
        column = {model: getattr(answers[model], name) for model in MODELS}
        section: dict[str, float] = {}
        for model in MODELS:
            section |= with_interval(model, column[model], picks)
        figures[name] = section | with_interval("gain", column["policy"] - column["sft"], picks)
    figures |= with_interval("win_rate", wins(policy.gold, sft.gold), picks)
    figures |= with_interval("score_win_rate", wins(policy.score, sft.score), picks)
    figures |= with_interval("kl", policy.kl, picks)
    figures["length"] = {model: answers[model].length.mean().item() for model in MODELS}
    figures["ended"] = {model: answers[model].ended.mean().item() for model in MODELS}
    figures["checks"] = {
        part: {model: answers[model].parts[part].mean().item() for model in MODELS} for part in WEIGHTS
    }
    return figures


def side_by_side(prompts: list[Prompt], answers: dict[str, Answers]) -> list[SideBySide]:
    return [
        SideBySide(
            prompt=prompt.prompt,
            **{model: answers[model].texts[row] for model in MODELS},
            scores={
                f"{judge}.{model}": round(getattr(answers[model], judge)[row].item(), 4)
                for judge in ("gold", "score")
                for model in MODELS
            },
        )
        for row, prompt in enumerate(prompts)
    ]


def flatten(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"gold": {"sft": 1}} -> {"gold.sft": 1}"""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
