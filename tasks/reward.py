"""Stage `reward`: train the reward model on the rankings (InstructGPT, step 2, section 3.5).

`python -m tasks.run reward`. The model starts from the SFT model with a new scalar head. All pairs of a prompt are
one batch element; each response goes through the model once, and so does the prompt that they share. TRL's
RewardTrainer is not used here: it forwards a response, with its prompt, once for every pair that it stands in, K - 1
times, and through all blocks at every step; here the frozen trunk's states are computed once and serve every epoch.
A run that was killed goes on from its last checkpoint; the trunk's states are computed anew.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tasks import reward_report
from tasks.checkpoints import (
    Checkpoints,
    load_optimizer_state,
    nest,
    optimizer_state,
    pick,
    restore_rng,
    rng_state,
)
from tasks.datasets import Demonstration, Ranking, read_figures, read_rows, stable_share, write_csv, write_figures
from tasks.demands import rankings_with_an_order, require
from tasks.models import (
    Packed,
    centred_scores,
    encode_prompt,
    encode_response,
    load_scalar_model,
    load_tokenizer,
    pack,
    require_same_tokenizer,
    save_model,
    score_packed,
    split_model,
    through_trunk,
    trunk_depth,
)
from tasks.stage import Stage

if TYPE_CHECKING:
    from tasks.params import Reward

PROBED = 16  # held-out prompts whose best response is asked about again, changed


def run(stage: Stage) -> None:
    params = stage.params.reward
    folder = stage.dep("data/models/sft")
    rankings = read_rows(stage.dep("data/collected/rankings") / "rankings.jsonl", Ranking)
    apart = read_rows(stage.dep("data/collected/rankings") / "held_out_labelers.jsonl", Ranking, may_be_empty=True)
    collected = stage.dep("data/collected/demonstrations")
    require_same_tokenizer(collected, folder)
    demonstrations = read_rows(collected / "demonstrations.jsonl", Demonstration)
    ceiling = read_figures(stage.dep("data/reports/rank/metrics.json").read_text(encoding="utf-8"))["rank"][
        "noise_ceiling"
    ]
    training = [row for row in rankings if not row.held_out and has_order(row)]
    training = [row for row in training if stable_share(stage.params.seed, "labels", row.id) < params.label_share]
    held_out = [row for row in rankings if row.held_out and has_order(row)]
    require(rankings_with_an_order(len(training), len(held_out)))
    tokenizer = load_tokenizer(folder)
    model = load_scalar_model(folder)
    init_head(model, stage.params.seed)

    history = train(model, tokenizer, training, params, stage.params.seed, stage.tracker, stage.checkpoints)

    centre_on = [
        pack(encode_prompt(tokenizer, row.prompt), [encode_response(tokenizer, row.response)])
        for row in demonstrations[: params.centre_on]
    ]
    model.config.score_bias = 0.0
    with tqdm(total=len(centre_on), desc="reward: centring", unit="reply") as bar:
        of_demonstrations = torch.cat(centred_scores(model, centre_on, 32, bar))
    model.config.score_bias = of_demonstrations.mean().item()
    measured, tables = measure(model, tokenizer, held_out, stage.params.seed)
    of_held_out_labelers, their_slices = measure_held_out_labelers(
        model, tokenizer, [row for row in apart if has_order(row)], {row.id for row in training}, stage.params.seed
    )
    last_epoch = history[-(len(history) // params.epochs) :]
    figures = {
        **measured,
        **of_held_out_labelers,
        "noise_ceiling": ceiling,
        "train_accuracy": sum(row["accuracy"] for row in last_epoch) / len(last_epoch),
        "score_bias": model.config.score_bias,
        "train_prompts": len({row.id for row in training}),
        "all_tied_prompts": len({row.id for row in rankings if not has_order(row)}),
        "tied_pairs": sum(map(tied_pairs, rankings)),
    }
    save_model(model, tokenizer, stage.out("data/models/reward"))
    write_csv(stage.out("data/reports/reward/history.csv"), history)
    write_csv(stage.out("data/reports/reward/slices.csv"), tables.slices + their_slices)
    write_csv(stage.out("data/reports/reward/reliability.csv"), tables.reliability)
    write_csv(stage.out("data/reports/reward/probes.csv"), tables.probes)
    by_source = {"demonstrations": of_demonstrations - model.config.score_bias, "samples": tables.scores}
    write_csv(
        stage.out("data/reports/reward/scores.csv"),
        [{"source": source, "score": score} for source, scores in by_source.items() for score in scores.tolist()],
    )
    stage.tracker.metrics({f"reward/{name}": value for name, value in figures.items() if value is not None})
    write_figures(
        stage.out("data/reports/reward/metrics.json"),
        {"reward": figures},
        ["reward.calibration_error"],
        intervals=["reward.accuracy"],
    )


def kwise_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """InstructGPT, equation 1, for one prompt: mean over its pairs of -log sigmoid(score of better - score of worse).

    scores (K,), ranks (K,) where 1 is best. Pairs that are tied say nothing about an order; the mean leaves them out.
    """
    better, worse = ordered_pairs(ranks)
    return -F.logsigmoid(scores[better] - scores[worse]).mean()


def ordered_pairs(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (N,) of the better and of the worse response of each pair that is not tied."""
    pairs = (ranks[:, None] < ranks[None, :]).nonzero()
    return pairs[:, 0], pairs[:, 1]


def pair_accuracy(scores: Tensor, ranks: Tensor) -> Tensor:
    """For each pair that is not tied: 1 where the scores agree, 0 where not, 1/2 where they are equal. (N,)"""
    better, worse = ordered_pairs(ranks)
    return (scores[better] > scores[worse]).float() + 0.5 * (scores[better] == scores[worse]).float()


def has_order(row: Ranking) -> bool:
    return len(set(row.ranks)) > 1


def tied_pairs(row: Ranking) -> int:
    return sum(math.comb(row.ranks.count(rank), 2) for rank in set(row.ranks))


def init_head(model: Any, seed: int) -> None:
    """Weights from N(0, 1 / (d + 1)), d the width of the final states (Stiennon et al. 2020, appendix C)."""
    weight = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1))


def pack_ranking(tokenizer: Any, row: Ranking) -> Packed:
    responses = zip(row.responses, row.ended, strict=True)
    return pack(
        encode_prompt(tokenizer, row.prompt),
        [encode_response(tokenizer, response, ended=ended) for response, ended in responses],
    )


def train(
    model: Any,
    tokenizer: Any,
    rankings: list[Ranking],
    params: Reward,
    seed: int,
    tracker: Any,
    checkpoints: Checkpoints,
) -> list[dict[str, float]]:
    """Train in place, from the last checkpoint where there is one. The curve: step, loss and accuracy of the batch
    before its step."""
    depth = trunk_depth(model, params.trainable_layers)
    trunk, branch = split_model(model, depth)
    packs = [pack_ranking(tokenizer, row) for row in rankings]
    with tqdm(total=sum(len(row.responses) for row in rankings), desc="reward: trunk", unit="response") as bar:
        packs = through_trunk(trunk, packs, 8, bar)
    ranks = [torch.tensor(row.ranks) for row in rankings]

    branch.requires_grad_(True)
    batches = shuffled_batches(len(rankings), params.batch_prompts, params.epochs, seed)
    steps = len(batches)
    optimizer = torch.optim.AdamW(
        branch.parameters(), lr=params.learning_rate, betas=(0.9, 0.95), weight_decay=params.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, steps, round(steps * params.warmup_share))
    )
    history: list[dict[str, float]] = []

    def log(row: dict[str, float]) -> None:
        history.append(row)
        tracker.metrics({"reward/batch_loss": row["loss"], "reward/batch_accuracy": row["accuracy"]}, len(history))

    def save_checkpoint() -> None:
        optimizer_tensors, optimizer_facts = optimizer_state(optimizer)
        rng, rng_facts = rng_state()
        tensors = nest("branch", branch.state_dict()) | nest("optimizer", optimizer_tensors) | nest("rng", rng)
        facts = {
            "optimizer": optimizer_facts,
            "rng": rng_facts,
            "schedule": schedule.state_dict(),
            "history": history,
        }
        checkpoints.save(len(history), tensors, facts)

    if checkpoint := checkpoints.latest():
        checkpoint.announce("reward", "step", steps)
        branch.load_state_dict(pick("branch", checkpoint.tensors))
        load_optimizer_state(optimizer, pick("optimizer", checkpoint.tensors), checkpoint.facts["optimizer"])
        schedule.load_state_dict(checkpoint.facts["schedule"])
        restore_rng(pick("rng", checkpoint.tensors), checkpoint.facts["rng"])
        for row in checkpoint.facts["history"]:
            log(row)

    with tqdm(total=steps, initial=len(history), desc="reward", unit="step") as bar:
        for chosen in batches[len(history) :]:
            scores = score_packed(branch, [packs[index] for index in chosen])
            loss = torch.stack(
                [kwise_loss(group, ranks[index]) for group, index in zip(scores, chosen, strict=True)]
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(branch.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            right = torch.cat([pair_accuracy(s, ranks[i]) for s, i in zip(scores, chosen, strict=True)]).mean()
            log({"step": len(history) + 1, "loss": loss.item(), "accuracy": right.item()})
            if len(history) % params.checkpoint_every == 0:
                save_checkpoint()
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{right.item():.2f}")
            bar.update()
    model.requires_grad_(False)
    return history


def shuffled_batches(rows: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """The places of the rows in each batch of the whole training: every row once an epoch, in a new order each."""
    shuffle = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(rows, generator=shuffle).tolist() for _ in range(epochs)]
    return [order[start : start + size] for order in orders for start in range(0, rows, size)]


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at a step: up in a line, then down in half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Tables(NamedTuple):
    """Of the held-out rankings."""

    scores: Tensor  # (N,) of every response, centred
    slices: list[dict[str, Any]]
    reliability: list[dict[str, float]]
    probes: list[dict[str, Any]]


def measure(model: Any, tokenizer: Any, rankings: list[Ranking], seed: int) -> tuple[dict[str, float], Tables]:
    """Loss, pair accuracy with its interval and calibration error on rankings; and the tables behind them."""
    packs = [pack_ranking(tokenizer, row) for row in rankings]
    probes = [pack_probes(tokenizer, row) for row in rankings[:PROBED]]
    total = sum(len(row.responses) for row in rankings) + len(probes) * (1 + len(reward_report.PROBES))
    with tqdm(total=total, desc="reward: held out", unit="response") as bar:
        scores = centred_scores(model, packs, 8, bar)
        probed = torch.stack(centred_scores(model, probes, 4, bar))
    pairs = reward_report.pairs_of(rankings, scores)
    curve = reward_report.reliability(pairs)
    losses = [kwise_loss(group, torch.tensor(row.ranks)).item() for group, row in zip(scores, rankings, strict=True)]
    figures = {
        **reward_report.accuracy(pairs, seed),
        "calibration_error": reward_report.calibration_error(curve),
        "loss": sum(losses) / len(losses),
        "held_out_prompts": len({row.id for row in rankings}),
        "held_out_pairs": len(pairs),
    }
    slices = reward_report.by_slice(pairs, rankings, seed)
    return figures, Tables(torch.cat(scores), slices, curve, reward_report.probed(probed, seed))


def measure_held_out_labelers(
    model: Any, tokenizer: Any, rankings: list[Ranking], trained_on: set[str], seed: int
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Pair accuracy on the rankings of labelers whom the model has learned nothing from (InstructGPT, section 3.5), and
    slices of it.

    The figure is of prompts that were not trained on. Where others' rankings of a prompt were, the model knows its
    outputs: those are a slice of their own. trained_on: ids of prompts.
    """
    if not rankings:
        return {"held_out_labelers_accuracy": None, "held_out_labelers_pairs": 0}, []
    packs = [pack_ranking(tokenizer, row) for row in rankings]
    responses = sum(len(row.responses) for row in rankings)
    with tqdm(total=responses, desc="reward: held-out labelers", unit="response") as bar:
        pairs = reward_report.pairs_of(rankings, centred_scores(model, packs, 8, bar))
    fresh = [pair for pair in pairs if pair.prompt not in trained_on]
    slices = {
        "held-out labelers: prompts not trained on": fresh,
        "held-out labelers: prompts trained on": [pair for pair in pairs if pair.prompt in trained_on],
        **{
            f"held-out labeler: {labeler}": [pair for pair in fresh if rankings[pair.ranking].labeler == labeler]
            for labeler in sorted({row.labeler for row in rankings})
        },
    }
    told = reward_report.accuracy(fresh, seed) if fresh else {"accuracy": None}
    return (
        {f"held_out_labelers_{key}": value for key, value in told.items()} | {"held_out_labelers_pairs": len(fresh)},
        [reward_report.slice_of(label, own, seed) for label, own in slices.items() if own],
    )


def pack_probes(tokenizer: Any, row: Ranking) -> Packed:
    """The response that the labeler ranked best, as it is and as each probe makes it."""
    best = row.responses[row.ranks.index(min(row.ranks))]
    texts = [best, *(probe(best) for probe in reward_report.PROBES.values())]
    return pack(encode_prompt(tokenizer, row.prompt), [encode_response(tokenizer, text) for text in texts])
