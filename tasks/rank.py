"""Labelers rank the outputs best to worst, with ties. `python -m tasks.run rank`.

The noise ceiling in the report is how often a scorer that knows the labelers' mean opinion without noise agrees with
their noisy rankings: the most that a reward model can be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from tasks.datasets import PromptTicket, Ranking, Samples, read_rows, stable_share, write_json, write_rows
from tasks.labels.checks import run_checks
from tasks.labels.simulated import choose_labeler, generator, opinion, rank
from tasks.params import Labeler
from tasks.stage import Stage, UserError


def run(stage: Stage) -> None:
    params = stage.params
    samples = read_rows(stage.dep("data/collected/samples") / "samples.jsonl", Samples)
    tickets = {row.id: row.ticket for row in read_rows(stage.dep("data/prepared/tickets.jsonl"), PromptTicket)}
    marks = {row.id: [run_checks(response, tickets[row.id]) for response in row.responses] for row in samples}
    rankings = [
        rank_samples(row, marks[row.id], params.labelers, params.seed, params.rank.held_out_share) for row in samples
    ]
    if params.rank.held_out_share > 0 and len({row.held_out for row in rankings}) < 2:
        raise UserError(
            f"rank.held_out_share = {params.rank.held_out_share:g} of {len(rankings)} ranked prompts leaves no prompt "
            "on one side. Raise sample.prompts or change the share in params.yaml."
        )
    write_rows(stage.out("data/collected/rankings") / "rankings.jsonl", rankings)

    opinions = {row.id: mean_utilities(row, marks[row.id], params.labelers) for row in samples}
    metrics = {
        "prompts": len(rankings),
        "held_out_prompts": sum(row.held_out for row in rankings),
        "pairs": sum(len(row.ranks) * (len(row.ranks) - 1) // 2 for row in rankings),
        "ties": sum(a == b for row in rankings for a, b in combinations(row.ranks, 2)),
        "noise_ceiling": agreement([row for row in rankings if row.held_out], opinions),
        "noise_ceiling_train": agreement([row for row in rankings if not row.held_out], opinions),
    }
    write_json(stage.out("data/reports/rank/metrics.json"), {"rank": metrics})
    stage.tracker.metrics({f"rank/{name}": float(value) for name, value in metrics.items() if value is not None})
    stage.tracker.table(
        "rankings",
        [
            {"prompt": row.prompt, "labeler": row.labeler, "rank": place, "response": response}
            for row in rankings[:10]
            for place, response in sorted(zip(row.ranks, row.responses, strict=True))
        ],
    )


Marks = list[dict[str, float]]  # of each response of one prompt, by check


def rank_samples(row: Samples, marks: Marks, labelers: Sequence[Labeler], seed: int, held_out_share: float) -> Ranking:
    """One prompt's outputs as one labeler ranks them."""
    labeler = choose_labeler(labelers, seed, "rank", row.id)
    utilities = [opinion(mark, labeler, ended=ended) for mark, ended in zip(marks, row.ended, strict=True)]
    return Ranking(
        **row.model_dump(),
        ranks=rank(utilities, labeler, generator(seed, "rank", row.id, labeler)),
        labeler=labeler.id,
        held_out=stable_share(seed, "held out", row.id) < held_out_share,
    )


def mean_utilities(row: Samples, marks: Marks, labelers: Sequence[Labeler]) -> list[float]:
    """What all labelers think of each response on average, without noise."""
    return [
        sum(opinion(mark, labeler, ended=ended) for labeler in labelers) / len(labelers)
        for mark, ended in zip(marks, row.ended, strict=True)
    ]


def agreement(rankings: Sequence[Ranking], scores: Mapping[str, Sequence[float]]) -> float | None:
    """The share of the pairs ranked without a tie that the scores order alike; equal scores count half.

    scores: by prompt id, one score a response. None where there is no such pair.
    """
    marks = []
    for row in rankings:
        for (rank_a, score_a), (rank_b, score_b) in combinations(zip(row.ranks, scores[row.id], strict=True), 2):
            if rank_a != rank_b:
                marks.append(0.5 if score_a == score_b else float((rank_a < rank_b) == (score_a > score_b)))
    return round(sum(marks) / len(marks), 4) if marks else None
