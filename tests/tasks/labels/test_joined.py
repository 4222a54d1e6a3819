"""People's judgments and the items of today: joined by content, and what is not used is counted."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import ValidationError

from tasks.conversations import single
from tasks.datasets import Ranking, Samples, prompt_id
from tasks.labels.judgments import JudgedRanking
from tasks.labels.people import Joined, ask_people, join, rankings_of
from tasks.labels.queue import Job, Queue, open_queue, queue_files
from tasks.lineage import load_stages
from tasks.params import HumanRankings, Params, load_params
from tasks.rank import queue_of
from tasks.stage import Stage, UserError, WaitsForPeopleError
from tests.judged import ranked, wrote

DEFAULTS = load_params(Path("params.yaml"))


def sample(number: int, *responses: str) -> Samples:
    prompt = single(f"prompt {number}")
    texts = list(responses or ("good", "fair", "bad"))
    return Samples(id=prompt_id(prompt), prompt=prompt, responses=texts, ended=[True] * len(texts))


def params_with(**human: Any) -> Params:
    changed = DEFAULTS.rank.human.model_copy(update={"shared_share": 0.0, **human})
    return DEFAULTS.model_copy(update={"rank": DEFAULTS.rank.model_copy(update={"human": changed})})


def joined(samples: Sequence[Samples], rows: Sequence[JudgedRanking], **human: Any) -> Joined[JudgedRanking]:
    return join(queue_of(samples, params_with(**human)), rows)


def given(
    samples: Sequence[Samples], rows: Sequence[JudgedRanking], **human: Any
) -> tuple[list[Ranking], list[Ranking]]:
    settings: HumanRankings = params_with(**human).rank.human
    return rankings_of(joined(samples, rows, **human), settings, lambda id: id == prompt_id(single("prompt 2")))


# ---- joining ----


def test_samples_that_have_not_changed_keep_their_labels_wherever_they_stand() -> None:
    rows = [ranked(sample(number), "ann", [1, 2, 3]) for number in range(3)]
    turned = [sample(2), sample(0), sample(1)]
    rankings, _ = given(turned, rows)
    assert [row.prompt for row in rankings] == [row.prompt for row in turned]
    assert [row.held_out for row in rankings] == [True, False, False]


def test_new_samples_inherit_nothing() -> None:
    """Another output, an output less, another end, another prompt: none of them was judged."""
    old = sample(0)
    changed = [
        sample(0, "good", "fair", "worse"),
        sample(0, "good", "fair"),
        old.model_copy(update={"ended": [True, True, False]}),
        sample(1),
    ]
    for new in changed:
        found = joined([new], [ranked(old, "ann", [1, 2, 3])])
        assert list(found.labelled.values()) == [[]]
        assert (found.counts["judgments"], found.counts["other_judgments"]) == (0, 1)


def test_outputs_in_another_order_keep_their_ranks() -> None:
    """A judgment that was imported may have them in any order."""
    (row,), _ = given([sample(0, "a", "b", "c")], [ranked(sample(0, "c", "a", "b"), "ann", [3, 1, 2])])
    assert (row.responses, row.ranks) == (["a", "b", "c"], [1, 2, 3])
    cut = Samples(id="p", prompt=single("p"), responses=["a", "a"], ended=[True, False])
    other = cut.model_copy(update={"ended": [False, True]})
    (row,), _ = given([cut], [ranked(other, "ann", [2, 1])])
    assert (row.ended, row.ranks) == ([True, False], [1, 2])


def test_every_judgment_is_used_a_skip_or_counted() -> None:
    here, gone = sample(0), sample(9)
    rows = [
        ranked(here, "ann", [3, 2, 1]),
        ranked(here, "ann", [1, 2, 3]),  # in place of the first
        ranked(here, "bo", None),
        ranked(gone, "ann", [1, 2, 3]),
        ranked(here, "cy", [2, 1, 3]),
        ranked(gone, "cy", [2, 1, 3]),
    ]
    found = joined([here, sample(1)], rows, leave_out=["cy"])
    assert found.counts == {
        "items": 2,
        "judgments": 1,
        "labelers": 1,
        "skipped": 1,
        "set_aside_items": 0,
        "missing_judgments": 1,
        "other_judgments": 1,
        "left_out_judgments": 2,
        "replaced_judgments": 1,
    }
    parts = ("judgments", "skipped", "other_judgments", "left_out_judgments", "replaced_judgments")
    assert sum(found.counts[part] for part in parts) == len(rows)
    assert [row.ranks for row in found.labelled[rows[0].item]] == [[1, 2, 3]]


def test_a_skip_after_a_label_takes_it_back_and_the_other_way_round() -> None:
    here = sample(0)
    assert joined([here], [ranked(here, "ann", [1, 2, 3]), ranked(here, "ann", None)]).counts["judgments"] == 0
    assert joined([here], [ranked(here, "ann", None), ranked(here, "ann", [1, 2, 3])]).counts["judgments"] == 1


def test_items_that_are_set_aside_are_not_there_to_be_filled_in() -> None:
    samples = [sample(number) for number in range(3)]
    rows = [ranked(samples[0], name, None) for name in ("ann", "bo")]
    rows += [ranked(samples[1], "ann", None)]
    found = joined(samples, rows, set_aside_after=2)
    assert [one.prompt for one in found.unlabelled] == [samples[1].prompt, samples[2].prompt]
    assert found.counts["set_aside_items"] == 1


# ---- asking ----


def test_people_are_asked_and_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample(number) for number in range(3)]
    params = params_with()
    queue = queue_of(samples, params)
    with pytest.raises(WaitsForPeopleError, match="2 rankings by people are missing: 1 of 3 items are done"):
        ask_people(queue, [ranked(samples[0], "ann", [1, 2, 3])], params.rank.human, tmp_path)
    assert len(queue_files(tmp_path)) == 1
    found = ask_people(queue, [ranked(row, "ann", [1, 2, 3]) for row in samples], params.rank.human, tmp_path)
    assert found.counts["judgments"] == 3
    assert "rank: 3 judgments by 1 person on 3 items\n" in capsys.readouterr().out


def test_it_says_when_nobody_of_those_who_label_can_go_on(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(2)]
    params = params_with(labels=2)
    rows = [ranked(row, "ann", [1, 2, 3]) for row in samples]
    for more, stuck in ([], "ann"), ([ranked(samples[0], "bo", [1, 2, 3])], ""), ([ranked(samples[1], "bo", None)], ""):
        with pytest.raises(WaitsForPeopleError) as raised:
            ask_people(queue_of(samples, params), [*rows, *more], params.rank.human, tmp_path)
        assert ("somebody else: ann labelled" in str(raised.value)) == bool(stuck)
    rows += [ranked(samples[0], "bo", [1, 2, 3]), ranked(samples[1], "bo", None)]
    with pytest.raises(WaitsForPeopleError, match="needs somebody else: ann, bo labelled or skipped it already"):
        ask_people(queue_of(samples, params), rows, params.rank.human, tmp_path)


def test_with_fill_in_nobody_waits_and_the_queue_is_open_all_the_same(tmp_path: Path) -> None:
    params = params_with(fill_in=True)
    nothing: list[JudgedRanking] = []
    found = ask_people(queue_of([sample(0)], params), nothing, params.rank.human, tmp_path)
    assert Queue.model_validate_json(queue_files(tmp_path)[0].read_text()).items == found.unlabelled
    assert found.counts["missing_judgments"] == 1


def test_names_of_nobody_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = params_with(leave_out=["An"], held_out_labelers=["bo", "cy"])
    rows = [ranked(sample(0), "Ann", [1, 2, 3]), ranked(sample(9), "bo", [1, 2, 3])]
    ask_people(queue_of([sample(0)], params), rows, params.rank.human, tmp_path)
    said = capsys.readouterr().out
    assert "rank.human.leave_out names 'An', of whom there is no judgment; there are some of Ann, bo" in said
    assert "rank.human.held_out_labelers names 'cy'" in said
    assert "'bo'" not in said


# ---- aggregating ----

THREE = {"ann": [1, 2, 3], "bo": [2, 1, 3], "cy": [1, 3, 2]}


def by_three(**more: Any) -> list[JudgedRanking]:
    return [ranked(sample(0), name, ranks, **more) for name, ranks in THREE.items()]


def test_each_judgment_counts() -> None:
    rankings, apart = given([sample(0)], by_three())
    assert [(row.labeler, row.ranks) for row in rankings] == list(THREE.items())
    assert apart == []


@pytest.mark.parametrize(("way", "labeler"), [("majority", "majority of 3"), ("bradley_terry", "Bradley-Terry of 3")])
def test_aggregates_say_what_they_are(way: str, labeler: str) -> None:
    """a before b 2:1, a before c 3:0, b before c 2:1."""
    (row,), _ = given([sample(0)], by_three(), aggregation=way)
    assert (row.labeler, row.ranks) == (labeler, [1, 2, 3])


def test_one_judgment_keeps_its_labeler_in_every_way() -> None:
    (row,), _ = given([sample(0)], [ranked(sample(0), "ann", [1, 1, 3])], aggregation="majority")
    assert (row.labeler, row.ranks) == ("ann", [1, 1, 3])


def test_held_out_labelers_stand_apart_and_are_in_no_aggregate() -> None:
    rankings, apart = given([sample(0)], by_three(), aggregation="majority", held_out_labelers=["cy"])
    # ann and bo split a and b
    assert [(row.labeler, row.ranks) for row in rankings] == [("majority of 2", [1, 1, 3])]
    assert [(row.labeler, row.ranks) for row in apart] == [("cy", [1, 3, 2])]


def test_flagged_outputs_go_last() -> None:
    flags = [["broken"], [], []]
    rankings, _ = given([sample(0)], [ranked(sample(0), "ann", [1, 2, 3], flags=flags), *by_three()[1:]])
    assert [row.ranks for row in rankings] == [[3, 1, 2], [2, 1, 3], [1, 3, 2]], "ann's flag is ann's alone"

    def together(flagging: int) -> list[int]:
        rows = by_three()
        marked = [row.model_copy(update={"flags": flags}) for row in rows[:flagging]]
        (row,), _ = given([sample(0)], [*marked, *rows[flagging:]], aggregation="majority")
        return row.ranks

    assert [together(count) for count in range(4)] == [[1, 2, 3], [1, 2, 3], [3, 1, 2], [3, 1, 2]]


# ---- what a line may hold ----


def test_a_judgment_names_what_it_judged() -> None:
    with pytest.raises(ValidationError, match="`item` is the name of another prompt or other outputs"):
        ranked(sample(0), "ann", [1, 2, 3], item="0123456789abcdef")
    with pytest.raises(ValidationError, match="`item` is the name of another prompt"):
        wrote(single("p"), "ann", "text", item="0123456789abcdef")


@pytest.mark.parametrize("time", ["yesterday", "2026-11-23T08:00:00"])
def test_times_say_their_zone(time: str) -> None:
    with pytest.raises(ValidationError, match="started_at"):
        wrote(single("p"), "ann", "text", started_at=time)


@pytest.mark.parametrize("name", ["demonstrate", "rank"])
def test_nobody_is_asked_once_the_labels_come_from_elsewhere(tmp_path: Path, name: Job) -> None:
    for job in ("demonstrate", "rank"):
        open_queue(Queue(job=job, seed=1, max_tokens=None, leave_out=[], set_aside_after=2, items=[]), tmp_path)
    params = load_params(Path("params.yaml"))
    simulated = {
        job: getattr(params, job).model_copy(update={"labeler": "simulated"}) for job in ("demonstrate", "rank")
    }
    stage = Stage(load_stages()[name], params.model_copy(update=simulated), Mock(), root=tmp_path)
    with pytest.raises(UserError, match="is missing"):  # the labeler is simulated, and has nothing to work on
        import_module(f"tasks.{name}").run(stage)
    assert [file.stem for file in queue_files(tmp_path)] == [{"demonstrate": "rank", "rank": "demonstrate"}[name]]
