"""How long until the policy is as good as TRL gets it? The default data and reward model; the gold score decides.

Both sides train from the same SFT model, against the same reward model, with the same search over learning rates, a
factor of three apart (TRL's has one more, for its best of three was the highest); the best rate then runs with more
seeds. After each update 64 held-out prompts are answered, off the clock. The target is the gold score that TRL's best
rate reaches within the budget, a seed at a time: the ratio is the time that it took over the time that we took to reach
the same.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.peer import peer_python

ROOT = Path(__file__).parent.parent
RUNS = Path(__file__).parent / ".runs"
RATES = {"trl": (3e-6, 1e-5, 3e-5, 1e-4), "ours": (5e-5, 1.5e-4, 4.5e-4)}
BUDGET = {"trl": 600.0, "ours": 300.0}  # seconds of training; ours reaches TRL's best long before
SEEDS = (1, 2, 3)
HELD_OUT = 64


def run(quick: bool, threads: int, console: Console) -> Iterator[dict[str, Any]]:
    """A record a run: its curve of gold scores over training time. QUICK: one rate, one seed, a third of the time."""
    peer = peer_python()
    work = write_work()
    for side in ("trl", "ours"):
        rates = RATES[side][1:2] if quick else RATES[side]
        records = {rate: learn(side, rate, SEEDS[0], work, peer, threads, quick, console) for rate in rates}
        yield from records.values()
        best = best_rate(list(records.values()), side)[0]["learning_rate"]
        for seed in () if quick else SEEDS[1:]:
            yield learn(side, best, seed, work, peer, threads, quick, console)


def write_work() -> Path:
    """What both sides are handed, as JSON: prompts as tokens, folders, settings."""
    needed = [ROOT / "data/models" / name for name in ("base", "sft", "reward")]
    missing = [path.name for path in needed if not path.exists()]
    if missing:
        sys.exit(f"data/models/{missing[0]} is missing: run `make run` first; this trains from what it makes.")
    code = (
        "import json, sys; from pathlib import Path;"
        "from tasks.datasets import Prompt, read_rows; from tasks.models import encode_prompt, load_tokenizer;"
        "tokenizer = load_tokenizer(Path('data/models/sft'));"
        "ids = lambda name: [encode_prompt(tokenizer, row.prompt) for row in"
        " read_rows(Path(f'data/prepared/prompts/{name}.jsonl'), Prompt)];"
        "print(json.dumps([ids('ppo'), ids('eval'), tokenizer.eos_token_id, tokenizer.pad_token_id]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    prompts, held_out, end_token, pad_token = json.loads(done.stdout)
    RUNS.mkdir(exist_ok=True)
    path = RUNS / "work.json"
    path.write_text(
        json.dumps(
            {
                "model": str(ROOT / "data/models/sft"),
                "reward": str(ROOT / "data/models/reward"),
                "prompts": prompts,
                "held_out": held_out[:HELD_OUT],
                "end_token": end_token,
                "pad_token": pad_token,
                "response_length": 64,
                "batch": 64,
                "minibatch": 16,
                "missing_end_penalty": 4.0,
                "kl_coef": 0.02,
                "gae_lambda": 1.0,
                "value_clip_range": 5.0,
            }
        )
    )
    return path


def learn(
    side: str, rate: float, seed: int, work: Path, peer: Path, threads: int, quick: bool, console: Console
) -> dict[str, Any]:
    budget = BUDGET[side] / 3 if quick else BUDGET[side]
    console.print(f"[dim]time to reward: {side}, rate {rate:g}, seed {seed}: {budget / 60:.0f} min of training ...[/]")
    out = RUNS / f"{side}-{rate:g}-{seed}.jsonl"
    command = [str(peer), "bench/trl_learn.py"] if side == "trl" else [sys.executable, "-m", "bench.ours_learn"]
    options = {"--learning-rate": rate, "--seed": seed, "--budget": budget, "--threads": threads}
    command += [str(work), str(out), *(str(part) for pair in options.items() for part in pair)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    scores = gold_scores([row["answers"] for row in rows])
    curve = [
        {"seconds": row["seconds"], "episodes": row["episodes"], "gold": score}
        for row, score in zip(rows, scores, strict=True)
    ]
    return {
        "bench": "time_to_reward",
        "mode": side,
        "learning_rate": rate,
        "seed": seed,
        "budget_s": budget,
        "curve": curve,
    }


def gold_scores(sets: list[list[list[int]]]) -> list[float]:
    """The mean gold score of each set of answers (token ids) to the held-out prompts."""
    import torch

    from tasks.datasets import Prompt, PromptFacts, read_rows
    from tasks.labels.gold import gold_score
    from tasks.models import decode_response, encode_prompt, load_language_model, load_tokenizer, split_model
    from tasks.ppo.rollout import as_rollout

    rows = read_rows(ROOT / "data/prepared/prompts/eval.jsonl", Prompt)[:HELD_OUT]
    facts = read_rows(ROOT / "data/prepared/facts.jsonl", PromptFacts)
    tickets = {row.id: row.ticket for row in facts if row.ticket}
    tokenizer = load_tokenizer(ROOT / "data/models/base")
    trunk, branch = split_model(load_language_model(ROOT / "data/models/base"), 0)
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    means = []
    for answers in sets:
        rollout = as_rollout(
            trunk, branch, prompts, answers, end_token=tokenizer.eos_token_id, pad_token=tokenizer.pad_token_id
        )
        fluency = rollout.logprobs.sum(-1) / rollout.response_mask.sum(-1)
        texts = [decode_response(tokenizer, ids) for ids in rollout.response_ids()]
        golds = [
            gold_score(text, tickets[row.id], logprob)
            for text, row, logprob in zip(texts, rows, fluency.tolist(), strict=True)
        ]
        means.append(torch.tensor(golds).mean().item())
    return means


def table(records: list[dict[str, Any]]) -> Table:
    """TRL's best score of each seed, when it had it, when we had it; and the same for the mean of the seeds' curves,
    update by update, in which less of the noise of 64 answers is left."""
    shown = Table(title="Time to reward", caption="the gold score that TRL's best rate reaches in its budget")
    for column in ("seed", "trl: rate", "best gold", "after s", "ours: rate", "as good after s", "best gold", "ratio"):
        shown.add_column(column, justify="right")
    best = {side: best_rate(records, side) for side in ("trl", "ours")}
    curves = {side: {row["seed"]: row["curve"] for row in runs} for side, runs in best.items()}
    seeds = [seed for seed in SEEDS if all(seed in curves[side] for side in curves)]
    if not seeds:
        return shown
    for name, of in [*((str(seed), [seed]) for seed in seeds), ("mean", seeds)]:
        theirs, ours = (mean_curve([curves[side][seed] for seed in of]) for side in ("trl", "ours"))
        target = max(theirs, key=lambda point: point["gold"])
        reached = next((point["seconds"] for point in ours if point["gold"] >= target["gold"]), None)
        shown.add_row(
            name,
            f"{best['trl'][0]['learning_rate']:g}",
            f"{target['gold']:.3f}",
            f"{target['seconds']:.0f}",
            f"{best['ours'][0]['learning_rate']:g}",
            f"{reached:.0f}" if reached else "never",
            f"{max(point['gold'] for point in ours):.3f}",
            f"{target['seconds'] / reached:.1f}x" if reached else "-",
            end_section=name == str(seeds[-1]),
        )
    return shown


def best_rate(records: list[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """A side's runs at the rate that was best with the first seed, which all rates were tried with."""
    own = [row for row in records if row["mode"] == side]
    first = [row for row in own if row["seed"] == SEEDS[0]]
    if not first:
        return []
    rate = max(first, key=lambda row: max(point["gold"] for point in row["curve"]))["learning_rate"]
    return [row for row in own if row["learning_rate"] == rate]


def mean_curve(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The mean over runs after each update that all of them reached."""
    return [
        {name: statistics.mean(point[name] for point in points) for name in ("seconds", "gold")}
        for points in zip(*curves, strict=False)
    ]
