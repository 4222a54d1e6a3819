"""To Label Studio and back: what was shown is what is judged, and everything that cannot be taken is told.

label_studio_rank.json and label_studio_demonstrate.json are what Label Studio 1.23.2 exported (JSON) of tasks and pages
that `export` had written and a person had clicked through in a browser, with a tie, a flag, a rating and skips.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.conversations import Conversation, single
from tasks.datasets import read_rows
from tasks.labels import __main__ as program
from tasks.labels.judgments import DEMONSTRATIONS, RANKINGS, JudgedRanking, WrittenDemonstration, item_id
from tasks.labels.label_file import append
from tasks.labels.label_studio import NO_REASON, export, read_exports, save
from tasks.labels.queue import Item, Job, Queue, open_queue
from tasks.stage import UserError

SHORT = single("Where is my <b>order</b>?\nIt is late.")
LONG: Conversation = [
    {"role": "system", "content": "We are a shop."},
    {"role": "user", "content": "Can I return *this*?"},
]
OUTPUTS = ["It is on its way.", "<script>alert(1)</script>", "Dear Ann,\nsorry. שלום"]
ENDED = [True, False, True]
REAL = {job: Path(__file__).parent / f"label_studio_{job}.json" for job in ("rank", "demonstrate")}


def item(prompt: Conversation, responses: list[str], ended: list[bool], labels: int = 1) -> Item:
    name = item_id(prompt, responses, ended)
    return Item(item=name, prompt=prompt, responses=responses, ended=ended, labels=labels)


def queue(job: Job, items: list[Item]) -> Queue:
    limit = 63 if job == "demonstrate" else None
    return Queue(job=job, seed=1, max_tokens=limit, leave_out=[], set_aside_after=2, items=items)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository with the two queues whose tasks the real exports hold."""
    monkeypatch.chdir(tmp_path)
    open_queue(
        queue("demonstrate", [item(prompt, [], []) for prompt in (SHORT, LONG, single("Say nothing"))]), tmp_path
    )
    ranked = [item(SHORT, OUTPUTS, ENDED, labels=2), item(LONG, ["Yes.", "No."], [True, True])]
    open_queue(queue("rank", ranked), tmp_path)
    return tmp_path


def annotation(result: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    """As Label Studio writes it."""
    return {
        "id": 7,
        "completed_by": 1,
        "result": result,
        "was_cancelled": False,
        "created_at": "2026-11-23T10:00:30.500000Z",
        "updated_at": "2026-11-23T10:00:30.600000Z",
        "lead_time": 30.25,
        **other,
    }


def written(text: str) -> list[dict[str, Any]]:
    return [{"from_name": "response", "to_name": "prompt", "type": "textarea", "value": {"text": [text]}}]


def places(*given: int) -> list[dict[str, Any]]:
    return [
        {"from_name": f"place_{at}", "to_name": f"output_{at}", "type": "choices", "value": {"choices": [str(place)]}}
        for at, place in enumerate(given)
    ]


def exported(home: Path, job: Job, *annotations: list[dict[str, Any]], name: str = "out.json") -> Path:
    """What Label Studio would export: our tasks with these annotations, in their order."""
    export(home, home / "ls", [job])
    tasks = json.loads((home / f"ls/{job}.json").read_text())
    given = [*annotations, *[[]] * (len(tasks) - len(annotations))]
    rows = [
        {"id": at, **task, "annotations": own, "drafts": [], "predictions": []}
        for at, (task, own) in enumerate(zip(tasks, given, strict=True), start=1)
    ]
    (home / name).write_text(json.dumps(rows))
    return home / name


def test_rankings_that_label_studio_really_exported(home: Path) -> None:
    found = read_exports([REAL["rank"]], home, {"1": "ann"}, None)
    assert found.dropped == []
    save(found, home)
    tie, skip = read_rows(home / RANKINGS, JudgedRanking)
    # shown were the script, the letter and the short answer, in this order: second, first, first
    assert tie.responses == OUTPUTS
    assert tie.order == [1, 2, 0]
    assert tie.ended == ENDED
    assert tie.ranks == [1, 3, 1]
    assert tie.flags == [[], ["broken"], []]
    assert tie.ratings == [None, None, 5]
    assert (tie.labeler, tie.skipped, tie.item) == ("ann", None, item_id(SHORT, OUTPUTS, ENDED))
    assert tie.ended_at == "2026-11-23T06:27:35.906+00:00"
    assert tie.started_at == "2026-11-23T06:27:24.842+00:00", "11.064 s before"
    assert (skip.skipped, skip.ranks, skip.flags, skip.ratings) == ("both are fine", [], [], [])
    assert skip.prompt == LONG


def test_demonstrations_that_label_studio_really_exported(home: Path) -> None:
    found = read_exports([REAL["demonstrate"]], home, {"1": "ann"}, len)
    save(found, home)
    answer, skip = read_rows(home / DEMONSTRATIONS, WrittenDemonstration)
    assert (answer.prompt, answer.response) == (SHORT, "Dear Ann,\nit comes on Monday.")
    assert (skip.prompt, skip.response, skip.skipped) == (LONG, None, NO_REASON)
    assert found.unlabelled == 1


def test_the_same_file_again_adds_nothing(home: Path) -> None:
    for expected in (2, 0, 0):
        found = read_exports([REAL["rank"], REAL["rank"]], home, {"1": "ann"}, None)
        assert len(found.new["rank"]) == expected
        assert found.known == 4 - expected
        save(found, home)
    assert len((home / RANKINGS).read_text().splitlines()) == 2


def test_round_trip_of_both_jobs_through_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_mail = annotation(places(1, 2, 2), id=9, completed_by={"id": 4, "email": "bo@example.com"})
    rank = exported(home, "rank", [annotation(places(3, 1, 1)), by_mail], name="rank.json")
    demonstrate = exported(home, "demonstrate", [annotation(written("It comes.\n<i>שלום"))], name="demonstrate.json")
    assert program.main(["status"]) == 0
    assert "rank" in capsys.readouterr().out
    command = ["import", str(rank), str(demonstrate), "--labeler", "1=ann"]
    assert program.main([*command, "--dry-run"]) == 0
    assert "2 judgments by ann, bo@example.com, 0 of them skips, not written" in capsys.readouterr().out
    assert not (home / RANKINGS).exists()
    assert program.main(command) == 0
    told = capsys.readouterr().out
    assert "3 new; 0 imported before; 0 dropped; 0 drafts, not taken; 3 tasks without an annotation" in told
    assert "nobody checked that the answers are short enough" in told
    ann, bo = read_rows(home / RANKINGS, JudgedRanking)
    assert (ann.labeler, ann.ranks, bo.labeler, bo.ranks) == ("ann", [1, 3, 1], "bo@example.com", [2, 1, 2])
    assert read_rows(home / DEMONSTRATIONS, WrittenDemonstration)[0].response == "It comes.\n<i>שלום"
    # both people that the first item asked for have been, and the second is still to do
    assert program.main(["export", "--to", str(home / "again")]) == 0
    assert [task["data"]["text"] for task in json.loads((home / "again/rank.json").read_text())] == [
        "System: We are a shop.\n\nUser: Can I return *this*?"
    ]
    assert len(json.loads((home / "again/demonstrate.json").read_text())) == 2


def test_the_pages_give_the_names_that_import_reads(home: Path) -> None:
    export(home, home / "ls", ["rank", "demonstrate"])
    page = ET.fromstring((home / "ls/rank.xml").read_text())
    named = {element.get("name"): element for element in page.iter() if element.get("name")}
    assert set(named) == {
        *("prompt", "output_{{idx}}", "place_{{idx}}", "flags_{{idx}}", "rating_{{idx}}", "why_skipped"),
    }
    assert [choice.get("value") for choice in named["place_{{idx}}"]] == ["1", "2", "3"]
    assert [choice.get("value") for choice in named["flags_{{idx}}"]] == ["harmful", "broken", "not an answer"]
    assert named["rating_{{idx}}"].get("maxRating") == "7"
    writing = ET.fromstring((home / "ls/demonstrate.xml").read_text())
    assert {element.get("name") for element in writing.iter() if element.get("name")} == {
        *("prompt", "response", "why_skipped"),
    }


def test_outputs_are_blind_and_shuffled_by_the_seed(home: Path) -> None:
    many = [item(single(f"prompt {number}"), ["a", "b", "c", "d"], [True] * 4) for number in range(40)]
    open_queue(queue("rank", many), home)
    texts = []
    for folder in ("one", "two"):
        export(home, home / folder, ["rank"])
        texts.append((home / f"{folder}/rank.json").read_text())
    assert texts[0] == texts[1]
    data = [task["data"] for task in json.loads(texts[0])]
    orders = {tuple(one["order"]) for one in data}
    assert len(orders) > 10
    for one in data:
        assert [output["text"] for output in one["outputs"]] == ["abcd"[index] for index in one["order"]]
        assert [output["name"] for output in one["outputs"]] == ["Answer 1", "Answer 2", "Answer 3", "Answer 4"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda task: task["data"]["outputs"][0].update(text="other"), "they were changed"),
        (lambda task: task["data"].update(prompt=LONG), "they were changed"),
        (lambda task: task["data"]["ended"].reverse(), "they were changed"),
        (lambda task: task["data"].update(order=[0, 0, 1]), "do not go together"),
        (lambda task: task["data"].update(order=[0]), "do not go together"),
        (lambda task: task["data"].pop("item"), "not a task of ours: `data.item`"),
        (lambda task: task.update(data={"text": "of another project"}), "not a task of ours"),
        (lambda task: task["annotations"][0]["result"].pop(), "1 of 3 answers have no place"),
        (lambda task: task["annotations"][0].update(result=None), "3 of 3 answers have no place"),
        (lambda task: task["annotations"][0]["result"][0]["value"].update(choices=["best"]), "a place is not a number"),
        (lambda task: task["annotations"][0].update(completed_by=None), "does not say who made it"),
        (lambda task: task["annotations"][0].update(updated_at="soon"), "it has no time"),
        (lambda task: task["annotations"][0].update(lead_time="long"), "it has no time"),
        (
            lambda task: task["annotations"][0]["result"].append({"from_name": "rating_0", "value": {"rating": 8}}),
            "ratings",
        ),
    ],
)
def test_what_cannot_be_taken_is_dropped_and_told(
    home: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    file = exported(home, "rank", [annotation(places(1, 2, 3))])
    tasks = json.loads(file.read_text())
    change(tasks[0])
    file.write_text(json.dumps(tasks))
    found = read_exports([file], home, {"1": "ann"}, None)
    assert not any(found.new.values())
    (line,) = found.dropped
    assert line.startswith(f"{file}, task 1, annotation 7: ")
    assert told in line


def test_answers_that_are_too_long_or_empty_are_refused(home: Path) -> None:
    rows = [[annotation(written("x" * 64))], [annotation(written("x" * 63))], [annotation(written("  "))]]
    found = read_exports([exported(home, "demonstrate", *rows)], home, {"1": "ann"}, len)
    assert [row.prompt for row in found.new["demonstrate"]] == [LONG]
    long, empty = found.dropped
    assert "the answer has 64 tokens, more than 63" in long
    assert "no answer was written" in empty


def test_a_changed_annotation_holds_and_an_old_export_does_not_take_it_back(home: Path) -> None:
    old = exported(home, "rank", [annotation(places(1, 2, 3))], name="old.json")
    later = {"updated_at": "2026-11-23T11:00:00Z", "lead_time": 60}
    new = exported(home, "rank", [annotation(places(3, 2, 1), **later)], name="new.json")
    save(read_exports([new], home, {"1": "ann"}, None), home)
    found = read_exports([old], home, {"1": "ann"}, None)
    assert not found.new["rank"]
    assert "said something else later, which stands" in found.dropped[0]


def test_what_is_later_does_not_hang_on_the_time_zone(home: Path) -> None:
    new = exported(home, "rank", [annotation(places(3, 2, 1), updated_at="2026-11-23T11:00:00Z")])
    (row,) = read_exports([new], home, {"1": "ann"}, None).new["rank"]
    earlier = row.model_copy(
        update={"started_at": "2026-11-23T11:59:00+02:00", "ended_at": "2026-11-23T12:00:00+02:00"}
    )
    (home / RANKINGS).parent.mkdir(parents=True)
    append(earlier, home / RANKINGS)
    assert read_exports([new], home, {"1": "ann"}, None).new["rank"] == [row]
    (row,) = read_rows(home / RANKINGS, JudgedRanking)
    assert [row.ranks[index] for index in row.order] == [3, 2, 1]


def paths_in(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from paths_in(one, (*here, key))


@pytest.mark.parametrize("job", ["rank", "demonstrate"])
def test_whatever_stands_in_an_export_it_is_taken_or_told(home: Path, job: Job) -> None:
    """Each value of a real export in turn is something else; nothing but a UserError may come of it."""
    text = REAL[job].read_text()
    file = home / "out.json"
    known = 0
    for place in paths_in(json.loads(text)):
        others: tuple[Any, ...] = (None, 0, "x", [None], {})
        for other in others:
            whole = {"tasks": json.loads(text)}
            inner: Any = whole
            for key in ("tasks", *place)[:-1]:
                inner = inner[key]
            inner[("tasks", *place)[-1]] = other
            file.write_text(json.dumps(whole["tasks"]))
            try:
                found = read_exports([file], home, {"1": "ann"}, len)
            except UserError:
                continue
            known += 1
            rows = found.new["rank"] + found.new["demonstrate"]
            there = len([one for task in whole["tasks"] for one in task["annotations"]])
            assert len(rows) + len(found.dropped) == there, f"{place}: {other!r}"
    assert known > 50


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[{"id": 1, "data": {', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b'{"tasks": []}', "export as JSON, not as JSON-MIN"),
        (b'[{"id": 1, "text": "x", "place_0": "1"}]', "export as JSON, not as JSON-MIN"),
    ],
)
def test_a_damaged_file_writes_nothing_not_even_of_the_others(
    home: Path, content: bytes, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = exported(home, "rank", [annotation(places(1, 2, 3))])
    (home / "bad.json").write_bytes(content)
    assert program.main(["import", str(good), str(home / "bad.json"), "--labeler", "1=ann"]) == 2
    assert told in capsys.readouterr().err
    assert not (home / RANKINGS).exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["import", "out.json"], "the annotator 1 has no name here. Say who it is, with --labeler 1=NAME"),
        (["import", "out.json", "--labeler", "ann"], "write it as 1=ann"),
        (["import", "out.json", "--labeler", "1=simulated:ann"], "write it as 1=ann"),
        (["import", "nowhere.json"], "nowhere.json is missing"),
    ],
)
def test_mistakes_are_told(home: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    exported(home, "rank", [annotation(places(1, 2, 3))])
    assert program.main(arguments) == 2
    assert told in capsys.readouterr().err
    assert not (home / RANKINGS).exists()


@pytest.mark.parametrize("command", ["status", "export"])
def test_without_a_queue_it_says_how_one_is_opened(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main([command]) == 2
    assert "set demonstrate.labeler or rank.labeler to `human`" in capsys.readouterr().err
