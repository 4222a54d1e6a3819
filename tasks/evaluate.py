"""Stage `evaluate`: did it help? The policy answers the held-out prompts that base and SFT model have answered (stage
`baseline`); each figure with an interval.

`python -m tasks.run evaluate`. This is the only stage that knows the gold score, which there is for prompts with a
ticket: what goes by it is over those prompts, and left out where there are none. All three models answer a prompt with
the same random numbers. Intervals are 95 % percentile bootstrap over prompts, paired: a resample takes the same prompts
for every model (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tasks.conversations import text_of
from tasks.datasets import (
    Answer,
    HeldOutAnswer,
    Prompt,
    PromptFacts,
    SideBySide,
    Ticket,
    flat,
    read_figures,
    read_rows,
    write_csv,
    write_figures,
    write_rows,
)
from tasks.intervals import length_thirds, measured, resamples, versus, wins, with_interval
from tasks.labels.gold import WEIGHTS, gold_parts, gold_score
from tasks.overoptimisation import curve_of_best_of_n, curve_of_ppo, turning_point
from tasks.panel import Panel
from tasks.stage import Stage

MODELS = ("base", "sft", "policy")
SHOWN = ("gold.policy", "kl", "length.policy")  # by DVC
INTERVALS = ("gold.gain", "win_rate", "score.gain", "score_win_rate")


class Answers(NamedTuple):
    """One model's answers to N prompts, and how each was judged. Tensors are (N,) but for `parts`."""

    texts: list[str]
    parts: dict[str, Tensor]  # the gold score's parts, each in [0, 1]; NaN where the prompt has no ticket
    gold: Tensor  # in [0, 1]; NaN likewise
    score: Tensor  # the reward model's, centred
    fluency: Tensor  # mean log-probability of a token under the frozen base model, nats
    kl: Tensor  # the policy's log pi(answer) - log pi_sft(answer), nats: the mean estimates KL(pi, pi_sft); else NaN
    length: Tensor  # tokens, with the end token
    ended: Tensor  # 1 where the answer ends with the end token, else 0
    repetition: Tensor  # in [0, 1]: `repetition` below
    relevance: Tensor  # in [0, 1]: the share of `own_words` of the prompt that the answer takes up


def run(stage: Stage) -> None:
    params = stage.params
    times = params.evaluate.bootstrap_samples
    folders = {name: stage.dep(f"data/models/{name}") for name in (*MODELS, "reward")}
    baseline = stage.dep("data/collected/baseline")
    given = {name: read_rows(baseline / f"{name}.jsonl", Answer) for name in ("base", "sft")}
    several = read_rows(baseline / "sft_several.jsonl", Answer)
    held_out = stage.dep("data/collected/held_out") / "answers.jsonl"
    on_the_way = read_rows(held_out, HeldOutAnswer, may_be_empty=True)  # `ppo.eval_every` may be 0
    prompts = [Prompt(id=row.id, prompt=row.prompt) for row in given["sft"]]
    texts = [text_of(row.prompt) for row in prompts]
    facts = {row.id: row for row in read_rows(stage.dep("data/prepared/facts.jsonl"), PromptFacts)}
    tickets = {id: row.ticket for id, row in facts.items()}

    panel = Panel(folders, params.baseline, params.text.max_response_tokens, params.seed)
    with tqdm(total=len(prompts) + len(on_the_way), desc="evaluate", unit="answer") as bar:
        given["policy"] = panel.answer("policy", prompts, bar)
        under_base = panel.base_logprobs(on_the_way, bar)
    answers = {name: judge(given[name], tickets) for name in MODELS}

    figures = summarize(answers, params.seed, times)
    kept = read_figures(stage.dep("data/reports/ppo/metrics.json").read_text(encoding="utf-8"))["ppo"]["kept_update"]
    curve, turn = over_optimisation(
        on_the_way, under_base, several, tickets, params.baseline.best_of, times, params.seed
    )
    figures["overoptimisation"] = {"kept_update": kept, **turn}
    slices: dict[str, list[str | None]] = {
        "kind": [ticket.kind if (ticket := tickets[prompt.id]) else None for prompt in prompts],
        "source": [facts[prompt.id].source for prompt in prompts],
        "prompt length": [*length_thirds(texts)],
    }
    rows = side_by_side(texts, answers)
    write_csv(
        stage.out("data/reports/evaluation/slices.csv"),
        by_slice(answers, slices, params.seed, times),
    )
    write_csv(stage.out("data/reports/evaluation/overoptimisation.csv"), curve)
    write_figures(stage.out("data/reports/evaluation/metrics.json"), figures, SHOWN, INTERVALS)
    write_rows(stage.out("data/reports/evaluation/samples.jsonl"), rows)
    stage.tracker.metrics({f"eval/{name}": value for name, value in flat(figures).items()})
    # MLflow shows the sections of its charts by the alphabet: these come first
    compared = ("win_rate", "score_win_rate") if kept else ()  # else the policy is the SFT model: nothing won
    glance = {name: figures[name]["policy"] for name in ("gold", "score") if name in figures} | {
        name: figures[name] for name in ("kl", *compared) if name in figures
    }
    stage.tracker.metrics({f"all/{name}": value for name, value in glance.items()})
    for point in curve:
        if point["source"] == "ppo":
            known = [name for name in ("gold", "score", "kl") if name in point]
            stage.tracker.metrics({f"held_out/{name}": point[name] for name in known}, point["point"])
    stage.tracker.table("evaluation", [row.model_dump(exclude={"scores"}) | row.scores for row in rows[:50]])


NO_PARTS = dict.fromkeys(WEIGHTS, math.nan)


def judge(rows: Sequence[Answer], tickets: Mapping[str, Ticket | None]) -> Answers:
    """Add the gold score to what the models say of the answers. tickets: by the prompt's id."""
    fluency = [row.base_logprob / row.length for row in rows]
    parts = [
        gold_parts(row.response, ticket, mark) if (ticket := tickets[row.id]) else NO_PARTS
        for row, mark in zip(rows, fluency, strict=True)
    ]
    columns = {part: torch.tensor([marks[part] for marks in parts]) for part in WEIGHTS}
    return Answers(
        texts=[row.response for row in rows],
        parts=columns,
        gold=torch.stack([weight * columns[part] for part, weight in WEIGHTS.items()]).sum(0),
        score=torch.tensor([row.score for row in rows]),
        fluency=torch.tensor(fluency),
        kl=torch.tensor([torch.nan if row.kl is None else row.kl for row in rows]),
        length=torch.tensor([float(row.length) for row in rows]),
        ended=torch.tensor([float(row.ended) for row in rows]),
        repetition=torch.tensor([repetition(row.response) for row in rows]),
        relevance=torch.tensor(
            [
                len(own & words_of(row.response)) / max(1, len(own))
                for row, own in zip(rows, own_words([text_of(row.prompt) for row in rows]), strict=True)
            ]
        ),
    )


def over_optimisation(
    on_the_way: Sequence[HeldOutAnswer],
    under_base: Sequence[float],
    several: Sequence[Answer],
    tickets: Mapping[str, Ticket | None],
    best_of: int,
    times: int,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(the points of both curves, where gold turns down on PPO's: {} without a gold score or a curve).

    several: `best_of` answers to each prompt.
    """
    columns: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, logprob in zip(on_the_way, under_base, strict=True):
        ticket = tickets[row.id]
        mark = gold_score(row.response, ticket, logprob / len(row.tokens)) if ticket else math.nan
        for name, value in {"gold": mark, "score": row.score, "kl": row.kl}.items():
            columns[row.update][name].append(value)
    updates = {
        update: {name: torch.tensor(values) for name, values in marks.items()} for update, marks in columns.items()
    }
    judged = judge(several, tickets)
    scores, gold = (column.view(-1, best_of) for column in (judged.score, judged.gold))
    curve = [*curve_of_ppo(updates, times, seed), *curve_of_best_of_n(scores, gold, times, seed)]
    golds = {update: marks["gold"][measured(marks["gold"])] for update, marks in updates.items()}
    return curve, turning_point(golds, times, seed) if any(map(len, golds.values())) else {}


def repetition(text: str, n: int = 3) -> float:
    """The share of a text's n-grams of words that stood in it before: seq-rep-n of Welleck et al. 2020, section 3."""
    words = text.split()
    grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def own_words(prompts: Sequence[str]) -> list[set[str]]:
    """The words of each prompt that at most a tenth of the prompts have: what it is about and the others are not."""
    found = [words_of(prompt) for prompt in prompts]
    distinct = dict(zip(prompts, found, strict=True))
    counts = Counter(word for words in distinct.values() for word in words)
    return [{word for word in words if counts[word] <= max(1, len(distinct) / 10)} for words in found]


def summarize(answers: dict[str, Answers], seed: int, times: int) -> dict[str, Any]:
    """The figures of the report, nested. `x_low` and `x_high` bound the 95 % interval of `x`.

    Those by gold are over the `gold.prompts` that have it, and left out where none has.
    """
    sft, policy = answers["sft"], answers["policy"]
    count = len(sft.texts)
    everywhere = torch.arange(count)
    places = {"gold": measured(sft.gold), "score": everywhere, "fluency": everywhere}
    columns = {
        name: {model: getattr(answers[model], name)[own] for model in MODELS}
        for name, own in places.items()
        if len(own)
    }
    picks = {name: resamples(len(places[name]), times, seed) for name in columns}
    figures: dict[str, Any] = {"prompts": count}
    for name, column in columns.items():
        section: dict[str, float] = {}
        for model in MODELS:
            section |= with_interval(model, column[model], picks[name])
        figures[name] = section | with_interval("gain", column["policy"] - column["sft"], picks[name])
    liked = wins(policy.score, sft.score)
    figures |= with_interval("score_win_rate", liked, picks["score"])
    if "gold" in columns:
        own, column = places["gold"], columns["gold"]
        figures["gold"]["prompts"] = len(own)
        figures |= with_interval("win_rate", wins(column["policy"], column["sft"]), picks["gold"])
        # what the reward model sees and nobody else
        figures["overrated"] = liked[own].mean().item() - figures["win_rate"]
        figures["checks"] = {
            part: {model: answers[model].parts[part][own].mean().item() for model in MODELS} for part in WEIGHTS
        }
    figures |= with_interval("kl", policy.kl, picks["score"])
    figures["kl_standard_error"] = (policy.kl.std() / count**0.5).item()
    figures["versus"] = {
        rival: {
            judge: versus(columns[judge]["policy"], columns[judge][rival], picks[judge])
            for judge in ("gold", "score")
            if judge in columns
        }
        for rival in ("sft", "base")
    }
    for name in ("length", "ended", "repetition", "relevance"):
        figures[name] = {model: getattr(answers[model], name).mean().item() for model in MODELS}
    return figures


def by_slice(
    answers: dict[str, Answers], slices: Mapping[str, Sequence[str | None]], seed: int, times: int
) -> list[dict[str, Any]]:
    """The policy's gain over the SFT model on each part of the prompts: `gain` and `win_rate` by gold, over the
    `gold.prompts` of the part that have it, and `score_gain`.

    slices: {"kind": the kind of each prompt}; None: in no part.
    """
    sft, policy = answers["sft"], answers["policy"]
    rows = []
    for slicing, values in slices.items():
        for value in sorted({one for one in values if one is not None}):
            places = torch.tensor([place for place, one in enumerate(values) if one == value])
            picks = resamples(len(places), times, seed)
            rows.append(
                {
                    "slice": f"{slicing}: {value}",
                    "prompts": len(places),
                    **gold_of_slice(sft.gold[places], policy.gold[places], seed, times),
                    **with_interval("kl", policy.kl[places], picks),
                    **with_interval("score_gain", (policy.score - sft.score)[places], picks),
                }
            )
    return rows


def gold_of_slice(sft: Tensor, policy: Tensor, seed: int, times: int) -> dict[str, float]:
    """sft, policy (N,): gold, NaN where there is none."""
    places = measured(sft)
    if not len(places):
        return {}
    sft, policy = sft[places], policy[places]
    picks = resamples(len(places), times, seed)
    return {
        "gold.prompts": len(places),
        "gold.sft": sft.mean().item(),
        "gold.policy": policy.mean().item(),
        **with_interval("gain", policy - sft, picks),
        **with_interval("win_rate", wins(policy, sft), picks),
    }


def side_by_side(prompts: Sequence[str], answers: dict[str, Answers]) -> list[SideBySide]:
    return [
        SideBySide(
            prompt=prompt,
            **{model: answers[model].texts[row] for model in MODELS},
            scores={
                f"{judge}.{model}": round(mark, 4)
                for judge in ("gold", "score")
                for model in MODELS
                if not math.isnan(mark := getattr(answers[model], judge)[row].item())
            },
        )
        for row, prompt in enumerate(prompts)
    ]
