"""Rankings of sampled outputs: ties, held-out prompts, the ceiling that noise sets."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import Mock

import pytest

from tasks.datasets import PromptTicket, Ranking, Samples, prompt_id, read_rows, write_rows
from tasks.labels.checks import run_checks
from tasks.labels.simulated import demonstrate
from tasks.lineage import load_stages
from tasks.params import Params, load_params
from tasks.rank import Marks, agreement, mean_utilities, rank_samples, run
from tasks.stage import Stage, UserError
from tasks.tickets import generate

PARAMS = load_params(Path("params.yaml"))
ROWS = generate(seed=4, count=300)
TICKETS = {prompt_id(row.prompt): row.ticket for row in ROWS}


def samples_of(number: int) -> Samples:
    """Four replies of four labelers stand in for a model's outputs."""
    row = ROWS[number]
    replies = [
        demonstrate(row.ticket, PARAMS.labelers[(number + k) % 5], random.Random(f"{number} {k}"), 63)[0]
        for k in range(4)
    ]
    return Samples(id=prompt_id(row.prompt), prompt=row.prompt, responses=replies, ended=[True] * 4)


SAMPLES = [samples_of(number) for number in range(len(ROWS))]


def run_stage(root: Path, samples: list[Samples], params: Params = PARAMS) -> tuple[list[Ranking], dict[str, Any]]:
    write_rows(root / "data/collected/samples/samples.jsonl", samples)
    write_rows(root / "data/prepared/tickets.jsonl", [PromptTicket(id=id, ticket=t) for id, t in TICKETS.items()])
    stage = Stage(load_stages()["rank"], params, Mock(), root=root)
    run(stage)
    stage.commit()
    rows = read_rows(root / "data/collected/rankings/rankings.jsonl", Ranking)
    return rows, json.loads((root / "data/reports/rank/metrics.json").read_text())["rank"]


def marks_of(row: Samples | Ranking) -> Marks:
    return [run_checks(response, TICKETS[row.id]) for response in row.responses]


def ranking(ranks: list[int]) -> Ranking:
    n = len(ranks)
    return Ranking(
        id="p", prompt="?", responses=["r"] * n, ended=[True] * n, ranks=ranks, labeler="ada", held_out=False
    )


def test_rankings_and_their_report(tmp_path: Path) -> None:
    rows, metrics = run_stage(tmp_path, SAMPLES)
    assert [(row.id, row.responses, row.ended) for row in rows] == [(s.id, s.responses, s.ended) for s in SAMPLES]
    assert metrics["prompts"] == 300
    assert metrics["pairs"] == 300 * 6
    assert metrics["ties"] == sum(a == b for row in rows for a, b in combinations(row.ranks, 2))
    assert metrics["held_out_prompts"] / 300 == pytest.approx(0.2, abs=0.07)
    assert 0.94 < metrics["noise_ceiling_train"] < 0.99
    assert 0.9 < metrics["noise_ceiling"] <= 1


def test_noisy_rankings_agree_with_the_marks_in_19_of_20_pairs(tmp_path: Path) -> None:
    """The sum of the checks stands for the gold order; equal sums are left out."""
    rows, _ = run_stage(tmp_path, SAMPLES)
    agreed = []
    for row in rows:
        marks = [sum(mark.values()) for mark in marks_of(row)]
        for a, b in combinations(range(4), 2):
            if row.ranks[a] != row.ranks[b] and abs(marks[a] - marks[b]) > 1e-9:
                agreed.append((row.ranks[a] < row.ranks[b]) == (marks[a] > marks[b]))
    assert 0.94 < mean(agreed) < 0.99


def test_a_subset_is_ranked_as_in_the_whole(tmp_path: Path) -> None:
    whole, _ = run_stage(tmp_path / "whole", SAMPLES)
    some, _ = run_stage(tmp_path / "some", SAMPLES[50:150])
    assert some == whole[50:150]


def test_identical_responses_tie_for_every_labeler() -> None:
    for sample in SAMPLES[:50]:
        same = sample.model_copy(update={"responses": [sample.responses[k] for k in (0, 1, 0, 0)]})
        ranks = rank_samples(same, marks_of(same), PARAMS.labelers, 1, 0.2).ranks
        assert ranks[0] == ranks[2] == ranks[3]


def test_a_response_that_was_cut_off_is_ranked_below_the_same_that_ended() -> None:
    calm = [labeler.model_copy(update={"temperature": 0.0}) for labeler in PARAMS.labelers]
    for sample in SAMPLES[:50]:
        cut = sample.model_copy(update={"responses": [sample.responses[0]] * 2, "ended": [False, True]})
        assert rank_samples(cut, marks_of(cut), calm, 1, 0.2).ranks == [2, 1]


def test_mean_utilities_are_of_all_labelers() -> None:
    sample = SAMPLES[0]
    together = mean_utilities(sample, marks_of(sample), PARAMS.labelers)
    alone = [mean_utilities(sample, marks_of(sample), [labeler]) for labeler in PARAMS.labelers]
    assert together == pytest.approx([mean(column) for column in zip(*alone, strict=True)])


def test_agreement_by_hand() -> None:
    # ranked pairs: (a, b) right, (a, c) right, (b, c) a tie of the ranks, left out
    assert agreement([ranking([1, 2, 2])], {"p": [0.9, 0.1, 0.5]}) == 1.0
    # (a, b) wrong, (a, c) equal scores count half, (b, c) right
    assert agreement([ranking([1, 2, 3])], {"p": [0.5, 0.9, 0.5]}) == pytest.approx(0.5)
    assert agreement([ranking([1, 1])], {"p": [0.5, 0.9]}) is None


def test_nothing_held_out_is_an_error_and_names_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"rank\.held_out_share = 0\.2 of 1 ranked prompts leaves no prompt on one side"
    ):
        run_stage(tmp_path, SAMPLES[:1])


def test_held_out_share_of_zero(tmp_path: Path) -> None:
    params = PARAMS.model_copy(update={"rank": PARAMS.rank.model_copy(update={"held_out_share": 0.0})})
    rows, metrics = run_stage(tmp_path, SAMPLES[:20], params)
    assert not any(row.held_out for row in rows)
    assert metrics["noise_ceiling"] is None
