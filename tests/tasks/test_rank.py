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

from tasks.conversations import Conversation, single
from tasks.datasets import (
    PromptFacts,
    Ranking,
    RecordedRanking,
    Samples,
    Vote,
    prompt_id,
    read_figures,
    read_rows,
    write_rows,
)
from tasks.labels.agreement import Agreement, measure
from tasks.labels.checks import run_checks
from tasks.labels.judgments import JudgedRanking
from tasks.labels.label_file import append
from tasks.labels.queue import queue_files, read_queue
from tasks.labels.simulated import demonstrate
from tasks.lineage import load_stages
from tasks.params import Params, load_params
from tasks.rank import Marks, agreement, agreement_among, mean_utilities, rank_samples, run, second_opinions
from tasks.stage import Stage, UserError, WaitsForPeopleError
from tasks.tickets import generate
from tests.judged import ranked
from tests.tiny import CONVERSATION

PARAMS = load_params(Path("params.yaml"))
ROWS = generate(seed=4, count=300)
TICKETS = {prompt_id(single(row.prompt)): row.ticket for row in ROWS}


def samples_of(number: int) -> Samples:
    """Four replies of four labelers stand in for a model's outputs."""
    row = ROWS[number]
    replies = [
        demonstrate(row.ticket, PARAMS.labelers[(number + k) % 5], random.Random(f"{number} {k}"), 63)[0]
        for k in range(4)
    ]
    prompt = single(row.prompt)
    return Samples(id=prompt_id(prompt), prompt=prompt, responses=replies, ended=[True] * 4)


SAMPLES = [samples_of(number) for number in range(len(ROWS))]


def run_stage(
    root: Path,
    samples: list[Samples],
    params: Params = PARAMS,
    votes: list[Vote] | None = None,
    recorded: list[RecordedRanking] | None = None,
    apart: list[RecordedRanking] | None = None,
    judged: list[JudgedRanking] | None = None,
) -> tuple[list[Ranking], dict[str, Any]]:
    write_rows(root / "data/labels/arena.jsonl", votes or [])
    write_rows(root / "data/labels/rankings.jsonl", judged or [])
    write_rows(root / "data/collected/samples/samples.jsonl", samples)
    write_rows(root / "data/prepared/rankings/reward.jsonl", recorded or [])
    write_rows(root / "data/prepared/rankings/eval.jsonl", apart or [])
    write_rows(
        root / "data/prepared/facts.jsonl",
        [PromptFacts(id=id, source="tickets", ticket=t) for id, t in TICKETS.items()],
    )
    stage = Stage(load_stages()["rank"], params, Mock(), root=root)
    run(stage)
    stage.commit()
    rows = read_rows(root / "data/collected/rankings/rankings.jsonl", Ranking)
    return rows, read_figures((root / "data/reports/rank/metrics.json").read_text(encoding="utf-8"))["rank"]


def marks_of(row: Samples | Ranking) -> Marks:
    return [run_checks(response, TICKETS[row.id]) for response in row.responses]


def test_a_second_opinion_is_another_labelers() -> None:
    """Two labelers without noise who see the same agree always; one alone has nobody to agree with."""
    exact = PARAMS.labelers[0].model_copy(update={"temperature": 0.0, "just_noticeable": 0.0})
    twins = [exact, exact.model_copy(update={"id": "twin"})]
    marks = {row.id: marks_of(row) for row in SAMPLES[:40]}
    opinions = second_opinions(SAMPLES[:40], marks, twins, seed=1)
    rankings = [rank_samples(row, marks[row.id], twins, 1, 0.0) for row in SAMPLES[:40]]
    assert agreement(rankings, opinions) == 1.0
    contrary = {id: [-score for score in scores] for id, scores in opinions.items()}
    assert agreement(rankings, contrary) == 0.0


def test_one_labeler_agrees_with_nobody(tmp_path: Path) -> None:
    _, metrics = run_stage(tmp_path, SAMPLES, PARAMS.model_copy(update={"labelers": PARAMS.labelers[:1]}))
    assert metrics["labelers_agreement"] is None


def ranking(ranks: list[int]) -> Ranking:
    n = len(ranks)
    return Ranking(
        id="p", prompt=single("?"), responses=["r"] * n, ended=[True] * n, ranks=ranks, labeler="ada", held_out=False
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
    assert 0.7 < metrics["labelers_agreement"] < metrics["noise_ceiling_train"], "two noisy opinions, not one"


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


# ---- votes of the arena ----


def vote(prompt: Conversation, ranks: list[int]) -> Vote:
    return Vote(
        id=prompt_id(prompt),
        prompt=prompt,
        responses=["dear Ann", "no"],
        ended=[True, False],
        ranks=ranks,
        labeler="Ann",
        held_out=False,
        models=["policy/3", "sft/3"],
        seed=7,
        shown_at="2026-11-22T23:23:38+00:00",
    )


def test_votes_are_further_rankings_on_the_side_of_their_prompt(tmp_path: Path) -> None:
    without, before = run_stage(tmp_path / "without", SAMPLES[:20])
    simulated = (tmp_path / "without/data/collected/rankings/rankings.jsonl").read_bytes()
    votes = [vote(row.prompt, [1, 2]) for row in SAMPLES[:20]] + [vote(single(f"mine {n}"), [1, 1]) for n in range(20)]
    rows, metrics = run_stage(tmp_path / "with", SAMPLES[:20], votes=votes)

    assert (tmp_path / "with/data/collected/rankings/rankings.jsonl").read_bytes().startswith(simulated)
    taken = rows[20:]
    assert [row.held_out for row in taken[:20]] == [row.held_out for row in without]
    assert {row.held_out for row in taken[20:]} == {True, False}
    assert all(
        row.model_dump(exclude={"held_out"}) == own.model_dump(exclude={"held_out", "models", "seed", "shown_at"})
        for row, own in zip(taken, votes, strict=True)
    )
    assert (before["votes"], metrics["votes"]) == (0, 40)
    assert {**metrics, "votes": 0} == before, "the other figures are of the simulated labelers"


def test_a_torn_vote_is_named_by_file_and_line(tmp_path: Path) -> None:
    run_stage(tmp_path, SAMPLES[:20], votes=[vote(single("mine"), [1, 2])])
    with (tmp_path / "data/labels/arena.jsonl").open("a") as file:
        file.write('{"id": "0123')
    with pytest.raises(UserError, match=r"arena\.jsonl, line 2"):
        run(Stage(load_stages()["rank"], PARAMS, Mock(), root=tmp_path))


def test_a_vote_on_a_text_as_it_was_recorded_before_conversations(tmp_path: Path) -> None:
    run_stage(tmp_path, SAMPLES[:20])
    old = vote(single("mine"), [1, 2]).model_dump() | {"prompt": "mine"}
    (tmp_path / "data/labels/arena.jsonl").write_text(json.dumps(old) + "\n")
    assert read_rows(tmp_path / "data/labels/arena.jsonl", Vote) == [vote(single("mine"), [1, 2])]


def test_samples_without_a_ticket_are_left_out_and_counted(tmp_path: Path) -> None:
    """Simulated people know support tickets alone."""
    foreign = [SAMPLES[0].model_copy(update={"id": "foreign"})]
    alone, _ = run_stage(tmp_path / "alone", SAMPLES[:20])
    rows, metrics = run_stage(tmp_path / "both", foreign + SAMPLES[:20])
    assert rows == alone
    assert (metrics["without_ticket"], metrics["prompts"]) == (1, 20)
    with pytest.raises(UserError, match=r"rank\.labeler is `simulated`, and none of the 1 sampled prompts"):
        run_stage(tmp_path / "none", foreign)


# ---- recorded rankings ----

RECORDED_PARAMS = PARAMS.model_copy(update={"rank": PARAMS.rank.model_copy(update={"labeler": "recorded"})})


def of_person(labeler: str, responses: list[str], ranks: list[int], prompt: Conversation) -> RecordedRanking:
    return RecordedRanking(id=prompt_id(prompt), prompt=prompt, responses=responses, ranks=ranks, labeler=labeler)


def test_recorded_rankings_are_held_out_by_the_split_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Near-duplicates are within a split: all of reward is trained on, all of eval held out, whatever the share."""

    def of_one(user: str, count: int) -> list[RecordedRanking]:
        return [of_person("ann", ["a", "b"], [1, 2], single(f"{user}, {n}. time")) for n in range(count)]

    training, apart = of_one("ann", 20), of_one("bo", 3)
    votes = [vote(row.prompt, [1, 2]) for row in (*training, *apart)] + [
        vote(single(f"mine {n}"), [1, 1]) for n in range(20)
    ]
    for share in (0.0, 0.5):
        settings = RECORDED_PARAMS.rank.model_copy(update={"held_out_share": share})
        rows, metrics = run_stage(
            tmp_path / str(share), [], PARAMS.model_copy(update={"rank": settings}), votes, training, apart
        )
        assert [row.held_out for row in rows[:23]] == [False] * 20 + [True] * 3
        assert [row.prompt for row in rows[:23]] == [row.prompt for row in (*training, *apart)]
        # a vote goes with the rankings of its prompt; of others nobody knows what they are near to
        assert [row.held_out for row in rows[23:]] == [False] * 20 + [True] * 3 + [False] * 20
        assert (metrics["prompts"], metrics["held_out_prompts"], metrics["rankings"]) == (23, 3, 23)
    assert "held_out_share" not in capsys.readouterr().out


def test_recorded_rankings_of_one_split_are_all_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conversations, another number of responses for each, one row twice, two rankings of a prompt; and a vote.

    The split eval has none, so they are held out by the share, and that is said.
    """
    given = [of_person("ann", ["a", "b", "c"][: 2 + n % 2], [1, 2, 2][: 2 + n % 2], single(f"p{n}")) for n in range(30)]
    given += [
        given[0],
        of_person("bo", ["x", "y"], [2, 1], single("p0")),
        of_person("bo", ["b", "a"], [1, 2], CONVERSATION),
    ]
    rows, metrics = run_stage(tmp_path, [], RECORDED_PARAMS, [vote(single("p0"), [1, 2])], given)
    assert [RecordedRanking(**row.model_dump(include=set(RecordedRanking.model_fields))) for row in rows[:-1]] == given
    assert all(row.ended == [True] * len(row.responses) for row in rows[:-1])
    sides = {row.id: {other.held_out for other in rows if other.id == row.id} for row in rows}
    assert all(len(side) == 1 for side in sides.values()), "all rankings of a prompt are on one side"
    held_out = [id for id, side in sides.items() if side == {True}]
    assert metrics == {
        "prompts": 31,
        "held_out_prompts": len(held_out),
        "rankings": 33,
        "pairs": 15 * 1 + 15 * 3 + 3,
        "ties": 15,
        "votes": 1,
        "held_out_labelers_rankings": 0,
        "by_people": 0,
        "by_simulated": 0,
        "people": {},
        "labelers_agreement": None,
        "noise_ceiling": None,
        "noise_ceiling_train": None,
        "without_ticket": 0,
    }
    assert 0 < len(held_out) < 31
    assert "the split eval has no rankings, so rank.held_out_share of the prompts" in capsys.readouterr().out


def test_agreement_among_labelers_by_hand() -> None:
    def row(labeler: str, responses: list[str], ranks: list[int]) -> Ranking:
        return Ranking(
            **of_person(labeler, responses, ranks, single("p")).model_dump(), ended=[True] * len(ranks), held_out=False
        )

    ann = row("ann", ["a", "b", "c"], [1, 2, 3])
    # (a, b) and (a, c) alike; ann's (b, c) is bo's tie, which is half; bo's own pairs are two, both alike
    bo = row("bo", ["c", "a", "b"], [2, 1, 2])
    assert agreement_among([ann, bo]) == pytest.approx((2 + 0.5 + 2) / 5)
    assert agreement_among([bo, ann]) == agreement_among([ann, bo])
    assert agreement_among([ann, row("bo", ["c", "b", "a"], [1, 2, 3])]) == 0.0
    assert agreement_among([ann, ann, row("bo", ["a", "b"], [1, 2])]) is None, (
        "herself, and another choice of responses"
    )


def test_without_recorded_rankings_it_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`recorded`, and .*reward\.jsonl holds no rankings.*data\.sources"):
        run_stage(tmp_path, [], RECORDED_PARAMS)
    rows = [of_person("ann", ["a", "b"], [1, 2], CONVERSATION)] * 3
    with pytest.raises(UserError, match=r"reward\.jsonl holds no rankings; eval\.jsonl beside it holds 3\. .*`splits`"):
        run_stage(tmp_path, [], RECORDED_PARAMS, apart=rows)
    with pytest.raises(UserError, match=r"of 1 ranked prompts leaves no prompt on one side\. Give the split eval"):
        run_stage(tmp_path, [], RECORDED_PARAMS, recorded=rows)


# ---- people ----


def with_people(**human: Any) -> Params:
    changed = PARAMS.rank.human.model_copy(update=human)
    return PARAMS.model_copy(update={"rank": PARAMS.rank.model_copy(update={"labeler": "human", "human": changed})})


def by(labeler: str, samples: list[Samples], ranks: tuple[int, ...] | None = (1, 2, 3, 4)) -> list[JudgedRanking]:
    return [ranked(row, labeler, ranks) for row in samples]


def test_it_waits_until_people_have_ranked_and_goes_on(tmp_path: Path) -> None:
    params = with_people(shared_share=0.0)
    with pytest.raises(WaitsForPeopleError, match="5 rankings by people are missing: 15 of 20 items are done"):
        run_stage(tmp_path / "some", SAMPLES[:20], params, judged=by("ann", SAMPLES[:15]))
    assert not (tmp_path / "some/data/collected/rankings").exists()
    (queue,) = map(read_queue, queue_files(tmp_path / "some"))
    assert queue.follows_from["sample.temperature"] == params.sample.temperature
    assert {key for key, value in queue.follows_from.items() if key.startswith("data/") and value} == {
        "data/collected/samples"
    }, "there is no data/raw"
    run_stage(tmp_path / "some", SAMPLES[:20])
    assert queue_files(tmp_path / "some") == [], "nobody should rank for simulated labelers"
    rows, metrics = run_stage(tmp_path / "all", SAMPLES[:20], params, judged=by("ann", SAMPLES[:25]))
    assert [(row.id, row.responses, row.ranks, row.labeler) for row in rows] == [
        (row.id, row.responses, [1, 2, 3, 4], "ann") for row in SAMPLES[:20]
    ]
    # the same prompts are held out, whoever ranks
    simulated, _ = run_stage(tmp_path / "simulated", SAMPLES[:20])
    assert [row.held_out for row in rows] == [row.held_out for row in simulated]
    assert (metrics["by_people"], metrics["by_simulated"], metrics["other_judgments"]) == (20, 0, 5)
    assert (metrics["noise_ceiling"], metrics["labelers_agreement"], metrics["shared_items"]) == (None, None, 0)
    assert metrics["people"]["by_labeler"]["ann"]["rankings"] == 20


def test_people_who_agree_and_the_report_of_it(tmp_path: Path) -> None:
    """Ann and bo alike on all; cy turns each ranking round."""
    some = SAMPLES[:20]
    judged = by("ann", some) + by("bo", some) + by("cy", some, (4, 3, 2, 1)) + by("dee", some[:2], None)
    _, metrics = run_stage(tmp_path, some, with_people(), judged=judged)
    assert metrics["labelers_agreement"] == metrics["agreement"] == pytest.approx(1 / 3, abs=1e-4)
    assert (metrics["far_labelers"], metrics["skipped"]) == (1, 2)
    assert metrics["people"]["by_labeler"]["cy"]["far"]
    page = (tmp_path / "data/reports/rank/agreement.md").read_text()
    assert "**cy**" in page
    assert "72.6 %" in page
    assert "None is simulated." in page


def test_agreement_is_of_what_people_said_and_not_of_aggregates(tmp_path: Path) -> None:
    some = SAMPLES[:20]
    judged = by("ann", some) + by("bo", some) + by("cy", some, (4, 3, 2, 1))
    rows, metrics = run_stage(tmp_path, some, with_people(aggregation="majority"), judged=judged)
    assert {row.labeler for row in rows} == {"majority of 3"}
    assert (metrics["by_people"], metrics["judgments"]) == (20, 60)
    assert metrics["agreement"] == pytest.approx(1 / 3, abs=1e-4)


def test_held_out_labelers_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    """With their votes; the votes of those who are left out are not used."""
    some = SAMPLES[:20]
    judged = by("ann", some) + by("bo", some, (4, 3, 2, 1)) + by("cy", some)
    votes = [vote(some[0].prompt, [1, 2]).model_copy(update={"labeler": name}) for name in ("ann", "bo", "cy")]
    params = with_people(held_out_labelers=["bo"], leave_out=["cy"], shared_share=0.0)
    rows, metrics = run_stage(tmp_path, some, params, votes, judged=judged)
    assert {row.labeler for row in rows} == {"ann"}
    assert len(rows) == 21
    apart = read_rows(tmp_path / "data/collected/rankings/held_out_labelers.jsonl", Ranking)
    assert [row.labeler for row in apart] == ["bo"] * 21
    assert [row.ranks for row in apart] == [[4, 3, 2, 1]] * 20 + [[1, 2]]
    assert (metrics["rankings"], metrics["held_out_labelers_rankings"], metrics["votes"]) == (20, 21, 1)
    assert metrics["agreement"] == 0.0, "they are people like the others"


def test_simulated_labelers_fill_in_and_are_called_so(tmp_path: Path) -> None:
    some = SAMPLES[:20]
    simulated, _ = run_stage(tmp_path / "simulated", some)
    rows, metrics = run_stage(tmp_path / "filled", some, with_people(fill_in=True), judged=by("ann", some[:5]))
    assert [row.labeler for row in rows[:5]] == ["ann"] * 5
    assert rows[5:] == [row.model_copy(update={"labeler": f"simulated:{row.labeler}"}) for row in simulated[5:]]
    assert (metrics["by_people"], metrics["by_simulated"], metrics["judgments"]) == (5, 15, 5)
    assert "**15 of 20 rankings are simulated**" in (tmp_path / "filled/data/reports/rank/agreement.md").read_text()
    assert metrics["people"]["by_labeler"].keys() == {"ann"}


def test_what_cannot_be_filled_in_is_counted(tmp_path: Path) -> None:
    foreign = [
        Samples(id=prompt_id(single(f"poem {n}")), prompt=single(f"poem {n}"), responses=["a", "b"], ended=[True] * 2)
        for n in range(3)
    ]
    rows, metrics = run_stage(tmp_path / "some", foreign + SAMPLES[:20], with_people(fill_in=True))
    assert (len(rows), metrics["without_ticket"], metrics["by_people"]) == (20, 3, 0)
    with pytest.raises(UserError, match=r"no ranking to train on\. Of 3 prompts people ranked the outputs of none"):
        run_stage(tmp_path / "none", foreign, with_people(fill_in=True))


def test_with_nobody_but_held_out_labelers_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    params = with_people(held_out_labelers=["ann"], shared_share=0.0)
    with pytest.raises(UserError, match=r"held-out labelers aside \(20 rankings\)"):
        run_stage(tmp_path, SAMPLES[:20], params, judged=by("ann", SAMPLES[:20]))


def test_peoples_work_that_is_not_used_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = SAMPLES[:20]
    run_stage(tmp_path / "simulated", some, judged=by("ann", some))
    assert "20 lines of data/labels/rankings.jsonl are not used, for rank.labeler is simulated" in (
        capsys.readouterr().out
    )
    assert "Nobody ranked here" in (tmp_path / "simulated/data/reports/rank/agreement.md").read_text()
    brought = [of_person("zoe", ["a", "b"], [1, 2], single(f"p{n}")) for n in range(30)]
    run_stage(tmp_path / "recorded", [], RECORDED_PARAMS, recorded=brought, judged=by("ann", some))
    assert "are not used, for rank.labeler is recorded" in capsys.readouterr().out
    run_stage(tmp_path / "human", some, with_people(shared_share=0.0), recorded=brought, judged=by("ann", some))
    assert "30 rankings came with the data and are not used, for rank.labeler is human" in capsys.readouterr().out


def test_the_same_judgments_give_the_same_bytes(tmp_path: Path) -> None:
    some = SAMPLES[:20]
    judged = by("ann", some) + by("bo", some, (1, 2, 2, 4)) + by("cy", some[::-1], (4, 3, 2, 1))
    for name in ("a", "b"):
        run_stage(tmp_path / name, some, with_people(aggregation="bradley_terry"), judged=judged)
    outs = ("collected/rankings/rankings.jsonl", "reports/rank/metrics.json", "reports/rank/agreement.md")
    for out in outs:
        assert (tmp_path / "a/data" / out).read_bytes() == (tmp_path / "b/data" / out).read_bytes()


def test_a_label_that_comes_while_it_runs_is_not_taken_for_one_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC hashes what a stage read when it has ended, and would never run it again for that label."""
    some = SAMPLES[:20]
    first, later = by("ann", some), by("ann", some[:1], (4, 3, 2, 1))

    def measured(*arguments: Any) -> Agreement:
        append(later[0], tmp_path / "data/labels/rankings.jsonl")
        return measure(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("tasks.rank.measure", measured)
        with pytest.raises(UserError, match=r"rankings\.jsonl changed while the stage read it"):
            run_stage(tmp_path, some, with_people(shared_share=0.0), judged=first)
    assert not (tmp_path / "data/collected/rankings").exists()
    rows, _ = run_stage(tmp_path, some, with_people(shared_share=0.0), judged=first + later)
    assert next(row.ranks for row in rows if row.id == some[0].id) == [4, 3, 2, 1]
