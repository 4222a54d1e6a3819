"""The desk: who gets what, what is held, what is saved. And the door: tokens and the waiting after failures."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ruamel.yaml import YAML

from tasks.conversations import single
from tasks.datasets import read_rows
from tasks.labels.__main__ import main as labels_main
from tasks.labels.desk import KEEP, LEASES, LEAVING, Desk, RefusedError, Visit
from tasks.labels.judgments import (
    DEMONSTRATIONS,
    GUIDELINES,
    RANKINGS,
    JudgedRanking,
    WrittenDemonstration,
    item_id,
    labeler_name,
)
from tasks.labels.label_file import append
from tasks.labels.queue import (
    QUEUES,
    WAIT_FILE,
    WORKSPACES,
    Item,
    Job,
    Queue,
    open_queue,
    progress,
    with_origin,
)
from tasks.labels.sign_in import (
    LONGEST_WAIT,
    TOKEN_FILE,
    TOKENS,
    Door,
    read_tokens,
    require_strong,
    secret_file,
    wait_after,
)
from tasks.lineage import load_stages
from tasks.params import load_params
from tasks.stage import Stage, UserError

HOLD = 1800.0


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / GUIDELINES).parent.mkdir(parents=True)
    (tmp_path / GUIDELINES).write_text("be kind\n")
    return tmp_path


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ranking(number: int, labels: int = 1) -> Item:
    prompt, responses, ended = single(f"prompt {number}"), [f"{number} {one}" for one in "abcd"], [True] * 3 + [False]
    return Item(item=item_id(prompt, responses, ended), prompt=prompt, responses=responses, ended=ended, labels=labels)


def writing(number: int, labels: int = 1) -> Item:
    prompt = single(f"prompt {number}")
    return Item(item=item_id(prompt), prompt=prompt, responses=[], ended=[], labels=labels)


def queue(items: list[Item], job: Job = "rank", **settings: Any) -> Queue:
    usual: dict[str, Any] = {"seed": 7, "max_tokens": None, "leave_out": [], "set_aside_after": 2}
    return Queue(job=job, items=items, **usual | settings)


def desk_of(home: Path, clock: Callable[[], float]) -> Desk:
    return Desk(home, HOLD, lambda _folder, text: len(text.split()), clock)


def visit(view: dict[str, Any]) -> Visit:
    return Visit(view["item"], view["started_at"], view["guidelines"])


def get(desk: Desk, labeler: str, job: Job = "rank") -> dict[str, Any]:
    found = desk.next(labeler, job)
    assert not isinstance(found, str), found
    return found


def rank(desk: Desk, labeler: str, view: dict[str, Any], ranks: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    desk.save_ranking(labeler, visit(view), ranks, [[]] * 4, [None] * 4)


def judged(home: Path) -> list[JudgedRanking]:
    return read_rows(home / RANKINGS, JudgedRanking, may_be_empty=True)


# ---- handing out ----


def test_items_come_in_order_and_nobody_gets_what_another_holds(home: Path, clock: Clock) -> None:
    items = [ranking(number) for number in range(3)]
    open_queue(queue(items), home)
    desk = desk_of(home, clock)
    views = [get(desk, name) for name in ("ann", "bob", "cy")]
    assert [view["item"] for view in views] == [one.item for one in items]
    assert "lies with other people" in str(desk.next("dee", "rank"))
    assert get(desk, "ann")["item"] == items[0].item, "their own stays theirs, as after a reload"
    rank(desk, "ann", views[0])
    desk.release("bob", "rank", items[1].item)
    assert get(desk, "dee")["item"] == items[1].item
    assert "lies with other people" in str(desk.next("ann", "rank"))
    rank(desk, "dee", get(desk, "dee"))
    rank(desk, "cy", views[2])
    assert "All items have the labels" in str(desk.next("ann", "rank"))


def test_an_item_for_several_is_finished_first_and_each_judges_it_once(home: Path, clock: Clock) -> None:
    items = [ranking(0), ranking(1, labels=2), ranking(2)]
    open_queue(queue(items), home)
    desk = desk_of(home, clock)
    assert get(desk, "ann")["item"] == items[0].item
    rank(desk, "bob", get(desk, "bob"))
    assert judged(home)[0].item == items[1].item
    assert get(desk, "bob")["item"] == items[2].item, "not again what bob has judged"
    assert get(desk, "cy")["item"] == items[1].item
    assert "lies with other people" in str(desk.next("dee", "rank")), "no third person for two labels"


def test_what_is_skipped_goes_to_somebody_else_and_is_set_aside_after_two(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0)]), home)
    desk = desk_of(home, clock)
    desk.skip("ann", "rank", visit(get(desk, "ann")), " unclear ")
    assert "needs somebody who has not judged it" in str(desk.next("ann", "rank"))
    desk.skip("bob", "rank", visit(get(desk, "bob")), "unclear")
    assert "All items" in str(desk.next("cy", "rank"))
    assert [row.skipped for row in judged(home)] == ["unclear", "unclear"]
    with pytest.raises(RefusedError, match="say why"):
        desk.skip("ann", "rank", visit(desk.again("ann", "rank", ranking(0).item)), "  ")


def test_labelers_who_are_left_out_get_nothing_and_do_not_count(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0)], leave_out=["mallory"]), home)
    desk = desk_of(home, clock)
    assert "Labels by mallory are not used" in str(desk.next("mallory", "rank"))
    assert "No queue is open" in str(desk.next("mallory", "demonstrate"))
    assert desk.progress("mallory")["rank"]["missing"] == 1


def test_one_item_in_two_runs_is_one_item_and_new_queues_appear(home: Path, clock: Clock) -> None:
    desk = desk_of(home, clock)
    assert "No queue is open" in str(desk.next("ann", "rank"))
    open_queue(queue([ranking(0), ranking(1)]), home)
    run = home / WORKSPACES / "run-1"
    open_queue(queue([ranking(1), ranking(2)]), run)
    assert desk.progress("ann")["rank"] == {
        "items": 3, "done": 0, "missing": 3, "mine": 0, "mine_today": 0, "mine_skipped": 0,
    }  # fmt: skip
    seen = [get(desk, name)["item"] for name in ("ann", "bob", "cy")]
    assert seen == [ranking(number).item for number in range(3)]
    rank(desk, "bob", get(desk, "bob"))
    assert desk.progress("bob")["rank"]["done"] == 1
    (run / QUEUES / "rank.json").unlink()
    assert desk.progress("bob")["rank"]["items"] == 2
    rank(desk, "cy", {"item": seen[2], "started_at": iso(clock), "guidelines": "0" * 12})
    assert judged(home)[-1].responses == ranking(2).responses, "work on a run that is over is not lost"


def iso(clock: Clock) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(clock.now, UTC).isoformat()


def test_labels_that_others_append_count_at_once(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0), ranking(1)]), home)
    desk = desk_of(home, clock)
    view = get(desk, "ann")
    rank(desk, "ann", view)
    row = judged(home)[0]
    one = ranking(1)
    content = {"item": one.item, "prompt": one.prompt, "responses": one.responses, "ended": one.ended}
    imported = row.model_copy(update={**content, "labeler": "studio"})
    append(imported, home / RANKINGS)
    assert "All items" in str(desk.next("bob", "rank"))
    replacement = home / "data/labels/.tmp-new"
    replacement.write_text("")
    replacement.replace(home / RANKINGS)
    assert get(desk, "bob")["item"] == ranking(0).item, "another file stands there now"


def test_a_damaged_line_is_named_and_nothing_is_handed_out(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0)]), home)
    desk = desk_of(home, clock)
    rank(desk, "ann", get(desk, "ann"))
    with (home / RANKINGS).open("a") as file:
        file.write('{"item": 3}\n')
    with pytest.raises(UserError, match=r"rankings\.jsonl, line 2: "):
        desk.next("bob", "rank")


# ---- a queue that nobody asks for any more ----


@pytest.fixture
def asked(home: Path) -> Path:
    """The queue of `rank` as the stage opens it, in a folder with its own params.yaml."""
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(file, home / file)
    change_params(home, "rank.labeler", "human")
    for file in ("data/raw/tickets.jsonl", "data/collected/samples/samples.jsonl"):
        (home / file).parent.mkdir(parents=True)
        (home / file).write_text("{}\n")
    stage = Stage(load_stages()["rank"], load_params(home / "params.yaml"), Mock(), root=home)
    open_queue(with_origin(queue([ranking(0), ranking(1)]), stage), home)
    return home


def change_params(home: Path, key: str, value: Any) -> None:
    yaml, path = YAML(), home / "params.yaml"
    everything = yaml.load(path)
    *sections, last = key.split(".")
    reduce(getitem, sections, everything)[last] = value
    yaml.dump(everything, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank.labeler", "simulated"),
        ("rank.human.labels", 4),
        ("rank.human.leave_out", ["eve"]),
        ("sample.temperature", 0.123),
        ("sft.epochs", 77),
        ("demonstrate.prompts", 7),
        ("seed", 77),
    ],
)
def test_it_closes_when_a_parameter_of_its_items_changes_and_opens_when_it_is_put_back(
    asked: Path, clock: Clock, key: str, value: Any
) -> None:
    desk = desk_of(asked, clock)
    view = get(desk, "ann")
    rank(desk, "bob", get(desk, "bob"))
    before = (asked / "params.yaml").read_text()
    change_params(asked, key, value)
    said = str(desk.next("ann", "rank"))
    assert said == desk.closed()["rank"]
    assert "nobody asks" in said
    assert f"{key} (" in said
    assert json.dumps(value) in said
    assert not desk.alive("ann", "rank", view["item"])
    assert desk.progress("ann") == {}
    rank(desk, "ann", view)
    assert [row.labeler for row in judged(asked)] == ["bob", "ann"], "what was begun is taken, what was given is kept"
    (asked / "params.yaml").write_text(before)
    assert desk.closed() == {}
    assert desk.progress("ann")["rank"]["done"] == 2


@pytest.mark.parametrize("key", ["rank.held_out_share", "ppo.kl_coef", "reward.learning_rate"])
def test_it_stays_open_when_only_what_comes_after_it_changes(asked: Path, clock: Clock, key: str) -> None:
    change_params(asked, key, 0.123)
    (asked / "data/labels/demonstrations.jsonl").write_text("")
    get(desk_of(asked, clock), "ann")


@pytest.mark.parametrize("file", ["data/raw/tickets.jsonl", "data/collected/samples/samples.jsonl"])
def test_it_closes_when_its_data_change_or_are_gone(asked: Path, clock: Clock, file: str) -> None:
    desk = desk_of(asked, clock)
    (asked / file).write_text('{"other": 1}\n')
    folder = "data/raw" if "raw" in file else "data/collected/samples"
    assert f": {folder}." in str(desk.next("ann", "rank"))
    (asked / file).unlink()
    assert f"{folder}, which is not there now" in str(desk.next("ann", "rank"))
    (asked / file).write_text("{}\n")
    get(desk, "ann")


def test_while_params_yaml_is_being_written_nothing_closes(asked: Path, clock: Clock) -> None:
    for text in ("seed: [", "seed: x\n"):
        (asked / "params.yaml").write_text(text)
        get(desk_of(asked, clock), "ann")


def test_a_run_that_waited_too_long_asks_no_more_and_another_may(home: Path, clock: Clock) -> None:
    run, other = home / WORKSPACES / "run-1", home / WORKSPACES / "run-2"
    for folder, until in ((run, clock.now - 1), (other, clock.now + 10)):
        open_queue(queue([ranking(0)] if folder == run else [ranking(1)]), folder)
        (folder / WAIT_FILE).write_text(json.dumps({"until": until}))
    desk = desk_of(home, clock)
    assert get(desk, "ann")["item"] == ranking(1).item
    assert desk.closed() == {}
    clock.now += 20
    assert "given up" in str(desk.next("bob", "rank"))


def test_status_and_export_leave_a_closed_queue_out(
    asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(asked)
    change_params(asked, "sample.temperature", 0.123)
    assert labels_main(["status"]) == 0
    out = capsys.readouterr().out
    assert "rank.json is closed" in out
    assert "sample.temperature" in out
    assert labels_main(["export", "--to", str(asked / "out")]) == 0
    assert "rank: nothing is missing" in capsys.readouterr().out


# ---- leases ----


def test_a_lease_ends_without_signs_of_life_and_the_work_is_still_taken(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0)]), home)
    desk = desk_of(home, clock)
    mine = get(desk, "ann")
    clock.now += HOLD - 1
    assert desk.alive("ann", "rank", mine["item"])
    clock.now += HOLD - 1
    assert "lies with other people" in str(desk.next("bob", "rank"))
    clock.now += 2
    theirs = get(desk, "bob")
    assert theirs["item"] == mine["item"]
    assert not desk.alive("ann", "rank", mine["item"]), "it lies with bob"
    rank(desk, "ann", mine)
    rank(desk, "bob", theirs)
    assert Counter(row.labeler for row in judged(home)) == {"ann": 1, "bob": 1}


def test_a_closed_tab_gives_its_item_back_and_a_reload_does_not(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0)]), home)
    desk = desk_of(home, clock)
    item = get(desk, "ann")["item"]
    desk.release("ann", "rank", item, leaving=True)
    clock.now += LEAVING - 1
    assert get(desk, "ann")["item"] == item
    clock.now += LEAVING + 1
    assert "lies with other people" in str(desk.next("bob", "rank"))
    desk.release("ann", "rank", item, leaving=True)
    clock.now += LEAVING + 1
    assert get(desk, "bob")["item"] == item
    desk.release_all("bob")
    assert get(desk, "ann")["item"] == item


def test_who_holds_what_outlives_the_server(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0), ranking(1)]), home)
    first = get(desk_of(home, clock), "ann")
    again = desk_of(home, clock)
    assert get(again, "bob")["item"] == ranking(1).item
    assert get(again, "ann") == first, "the same item, in the same order, begun when it was begun"
    open_queue(queue([ranking(1)]), home)
    clock.now += HOLD + 1
    rank(desk_of(home, clock), "ann", first)
    assert judged(home)[0].item == ranking(0).item, "saved, though its queue and its lease are over"
    clock.now += KEEP
    get(desk_of(home, clock), "cy")
    assert [lease["labeler"] for lease in json.loads((home / LEASES).read_text())["leases"]] == ["cy"]


def test_damaged_leases_are_told_and_lose_no_label(
    home: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    open_queue(queue([ranking(0), ranking(1)]), home)
    rank(desk := desk_of(home, clock), "ann", get(desk, "ann"))
    (home / LEASES).write_text("{")
    assert desk_of(home, clock).progress("ann")["rank"]["done"] == 1
    assert "who holds which item is forgotten" in capsys.readouterr().err


# ---- taking in ----


def test_the_order_shown_is_drawn_by_the_seed_and_recorded(home: Path, clock: Clock) -> None:
    one = ranking(0, labels=30)
    open_queue(queue([one], seed=11), home)
    desk = desk_of(home, clock)
    for number in range(30):
        name = f"labeler {number}"
        view = get(desk, name)
        texts = [output["text"] for output in view["outputs"]]
        desk.save_ranking(name, visit(view), [3, 1, 3, 9], [["harmful", "broken"], [], [], []], [7, None, 2, 1])
        row = judged(home)[-1]
        assert texts == [row.responses[index] for index in row.order]
        assert row.responses == one.responses, "as the queue has them, whatever was shown"
        order = list(range(4))
        random.Random(f"{row.seed}|{row.item}|{row.labeler}").shuffle(order)
        assert (row.seed, row.order) == (11, order)
        by_text = dict(zip(row.responses, zip(row.ranks, row.flags, row.ratings, strict=True), strict=True))
        assert [by_text[text] for text in texts] == [
            (2, ["broken", "harmful"], 7), (1, [], None), (2, [], 2), (4, [], 1),
        ]  # fmt: skip
        assert desk.again(name, "rank", one.item)["said"]["ranks"] == [2, 1, 2, 4]
        assert [output["ended"] for output in view["outputs"]] == [row.ended[index] for index in row.order]
    firsts = Counter(row.order[0] for row in judged(home))
    assert len(firsts) == 4


def test_a_save_sent_twice_is_one_line_and_a_change_is_another(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0)]), home)
    view = get(desk := desk_of(home, clock), "ann")
    for ranks in ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4, 9)):
        clock.now += 5
        rank(desk, "ann", view, ranks)  # 1, 2, 4, 9 are the ranks 1, 2, 3, 4
    rank(desk_of(home, clock), "ann", view)
    assert len(judged(home)) == 1
    clock.now += 5
    changed = desk.again("ann", "rank", view["item"])
    assert changed["outputs"] == view["outputs"]
    rank(desk, "ann", changed, (4, 3, 2, 1))
    rank(desk, "ann", view)  # a retry that was on its way all the time
    assert len(judged(home)) == 2
    assert desk.again("ann", "rank", view["item"])["said"]["ranks"] == [4, 3, 2, 1]
    assert progress(queue([ranking(0)]), judged(home)).judgments == 1


def test_a_save_that_the_disk_refuses_is_not_told_as_saved(
    home: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_queue(queue([ranking(0)]), home)
    view = get(desk := desk_of(home, clock), "ann")
    synced: list[int] = []

    def refuse(_file: int) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        for _ in range(2):  # the line may be in the file by now; it is not on the disk
            with pytest.raises(OSError, match="the disk is gone"):
                rank(desk, "ann", view)
        patch.setattr("os.fsync", synced.append)
        rank(desk, "ann", view)
    assert (len(synced), len(judged(home))) == (1, 1)


def test_what_a_demonstration_must_be(home: Path, clock: Clock) -> None:
    open_queue(queue([writing(0), writing(1)], "demonstrate", max_tokens=3), home)
    desk = desk_of(home, clock)
    view = get(desk, "ann", "demonstrate")
    for response, problem in ((" \n", "empty"), ("one two three four", "has 4 tokens, and at most 3")):
        with pytest.raises(RefusedError, match=problem):
            desk.save_demonstration("ann", visit(view), response)
    assert desk.count("ann", view["item"], " one two ") == 2
    desk.save_demonstration("ann", visit(view), "one two three\n")
    (row,) = read_rows(home / DEMONSTRATIONS, WrittenDemonstration)
    assert (row.response, row.labeler, row.item) == ("one two three", "ann", writing(0).item)
    assert row.started_at == view["started_at"] <= row.ended_at
    assert desk.mine("ann", "demonstrate") == [writing(0).item]
    told = desk.progress("ann")["demonstrate"]
    assert (told["mine"], told["mine_today"], told["done"], told["missing"]) == (1, 1, 1, 1)
    clock.now += 2 * 24 * 3600
    assert desk.progress("ann")["demonstrate"]["mine_today"] == 0


def test_what_no_page_sends_is_refused(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0)]), home)
    desk = desk_of(home, clock)
    view = get(desk, "ann")
    with pytest.raises(RefusedError, match="one entry for each of the 4 outputs"):
        rank(desk, "ann", view, (1, 2))
    for started, problem in (
        ("soon", "is no time"),
        ("2026-11-23T00:00:00", "which time zone"),
        ("2999-01-01T00:00:00+00:00", "lies in the future"),
    ):
        with pytest.raises(RefusedError, match=problem):
            rank(desk, "ann", view | {"started_at": started})
    with pytest.raises(RefusedError, match="in no queue any more"):
        rank(desk, "ann", view | {"item": "0" * 16})
    with pytest.raises(RefusedError, match="have not judged"):
        desk.again("bob", "rank", view["item"])
    assert judged(home) == []


def test_ten_labelers_at_once_lose_and_double_nothing(home: Path) -> None:
    """1,000 items, a tenth of them for three people; what the labelers were told is saved is what is in the file."""
    items = [ranking(number, labels=3 if number % 10 == 0 else 1) for number in range(1000)]
    open_queue(queue(items), home)
    desk = Desk(home, HOLD, lambda _folder, _text: None)

    def work(labeler: str) -> list[str]:
        done = []
        while not isinstance(view := desk.next(labeler, "rank"), str):
            rank(desk, labeler, view)
            done.append(view["item"])
        return done

    names = [f"labeler {number}" for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        told = dict(zip(names, pool.map(work, names), strict=True))
    rows = judged(home)
    assert sorted((row.labeler, row.item) for row in rows) == sorted(
        (name, item) for name, done in told.items() for item in done
    )
    assert len({(row.labeler, row.item) for row in rows}) == len(rows) == 1200
    assert Counter(row.item for row in rows) == {one.item: one.labels for one in items}


# ---- the door ----


def test_waiting_grows_to_half_a_minute() -> None:
    assert [wait_after(failures, 2) for failures in range(10)] == [0, 0, 0, 1, 2, 4, 8, 16, 30, 30]
    assert wait_after(5000, 2) == LONGEST_WAIT


def test_a_guesser_waits_and_other_people_do_not() -> None:
    clock = Clock()
    door = Door({"ann": "right", "bob": "other"}, None, clock)
    assert door.try_token("ann", "right", "home")
    for _ in range(4):
        assert not door.try_token("ann", "guess", "elsewhere")
    assert door.wait("ann", "elsewhere") == 2
    assert door.wait("ann", "a third place") == 2, "guesses at one name from many places"
    assert door.wait("ann", "home") == 0, "ann is known there"
    assert door.wait("bob", "elsewhere") == 0
    for number in range(20):
        assert not door.try_token(f"name {number}", "guess", "elsewhere")
    assert door.wait("bob", "elsewhere") == LONGEST_WAIT, "guesses at many names from one place"
    assert door.wait("bob", "home") == 0
    clock.now += LONGEST_WAIT
    assert door.wait("bob", "elsewhere") == 0
    assert door.try_token("bob", "other", "elsewhere")


def test_guesses_at_once_wait_too_and_a_new_token_ends_sessions() -> None:
    door = Door({"ann": "right"}, None, Clock())
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: door.knock("ann", "guess", "elsewhere"), range(40)))
    assert Counter(answers) == {(False, 0.0): 3, (False, 1.0): 37}
    assert door.mark("ann") not in (None, Door({"ann": "new"}, None).mark("ann"))
    assert door.mark("bob") is None
    assert Door({}, "for all").mark("bob") != Door({}, "for all").mark("ann")


def test_tokens_come_from_the_environment_or_the_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_tokens(home, {}) == {}
    path = home / TOKEN_FILE
    path.parent.mkdir(parents=True)
    path.write_text("# labelers\nann: a:b\n\nBö : c\n")
    path.chmod(0o644)
    assert read_tokens(home, {}) == {"ann": "a:b", "Bö": "c"}
    assert f"`chmod 600 {path}`" in capsys.readouterr().err
    path.chmod(0o600)
    assert read_tokens(home, {TOKENS: "cy:x, dee:y"}) == {"cy": "x", "dee": "y"}
    assert capsys.readouterr().err == ""
    for text in ("ann", "ann:", ":token", "ann:1\nann:2"):
        path.write_text(text)
        with pytest.raises(UserError, match="label_tokens, line"):
            read_tokens(home, {})


def test_for_other_machines_everybody_needs_a_strong_token() -> None:
    with pytest.raises(UserError, match="nobody has a token"):
        require_strong({}, "0.0.0.0")
    with pytest.raises(UserError, match=r"fewer than 12 characters: ann\."):
        require_strong({"ann": "short", "bob": "long-enough-to-use"}, "0.0.0.0")


def test_names_and_secrets(home: Path) -> None:
    assert labeler_name(" Ann Bö ") == "Ann Bö"
    for name in ("", "  ", "a" * 101, "a\nb", "a\u202eb"):
        with pytest.raises(ValueError, match="1 to 100 printable"):
            labeler_name(name)
    for name in ("simulated:ada", "majority of 3", "Bradley-Terry of 3"):
        with pytest.raises(ValueError, match="the pipeline's own"):
            labeler_name(name)
    secret = secret_file(home / "secret")
    assert secret_file(home / "secret") == secret
    assert len(secret) > 30
    assert (home / "secret").stat().st_mode & 0o777 == 0o600


def test_a_link_into_dvcs_cache_is_not_written_to(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(number) for number in range(4)]), home)
    desk = desk_of(home, clock)
    rank(desk, "ann", get(desk, "ann"))
    cached = home / "cached"
    for link in (os.link, os.symlink):  # as `dvc add` does beside a page that is open, by its cache.type
        (home / RANKINGS).rename(cached)
        cached.chmod(0o444)
        link(cached, home / RANKINGS)
        before = cached.read_bytes()
        rank(desk, "ann", get(desk, "ann"))
        assert cached.read_bytes() == before
        assert (home / RANKINGS).read_bytes().startswith(before)
        cached.unlink()
    assert len({row.item for row in judged(home)}) == 3


def test_what_was_read_beside_damage_is_not_forgotten(home: Path, clock: Clock) -> None:
    """Else items that have all their labels would be handed out again once the damage is mended."""
    items = [ranking(number) for number in range(2)]
    open_queue(queue(items), home)
    elsewhere = home.with_name("elsewhere")
    (elsewhere / GUIDELINES).parent.mkdir(parents=True)
    (elsewhere / GUIDELINES).write_text("be kind\n")
    open_queue(queue(items), elsewhere)
    desk, other = desk_of(home, clock), desk_of(elsewhere, clock)
    assert desk.progress("ann")["rank"]["missing"] == 2
    rank(other, "bob", get(other, "bob"))
    for row in judged(elsewhere):
        append(row, home / RANKINGS)
    broken = home / QUEUES / "demonstrate.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        desk.next("ann", "rank")
    broken.unlink()
    assert desk.progress("ann")["rank"]["missing"] == 1
    assert get(desk, "ann")["item"] == items[1].item


def test_an_import_while_an_item_is_open_does_not_move_its_outputs(home: Path, clock: Clock) -> None:
    open_queue(queue([ranking(0)]), home)
    desk = desk_of(home, clock)
    view = get(desk, "ann")
    shown = [output["text"] for output in view["outputs"]]
    responses = shown[::-1]  # what Label Studio showed stood otherwise
    ended = [not text.endswith("d") for text in responses]
    imported = JudgedRanking(
        item=view["item"],
        prompt=view["prompt"],
        labeler="ann",
        guidelines=view["guidelines"],
        started_at=view["started_at"],
        ended_at=view["started_at"],
        skipped=None,
        responses=responses,
        ended=ended,
        order=[2, 0, 3, 1],
        seed=5,
        ranks=[4, 3, 2, 1],
        flags=[[], [], [], ["broken"]],
        ratings=[None, None, 6, 7],
    )
    append(imported, home / RANKINGS)
    again = desk.again("ann", "rank", view["item"])
    assert [output["text"] for output in again["outputs"]] == shown
    said = again["said"]
    assert (said["ranks"], said["flags"], said["ratings"]) == (
        [1, 2, 3, 4],
        [["broken"], [], [], []],
        [7, 6, None, None],
    )
    rank(desk, "ann", view, (4, 3, 2, 1))
    row = judged(home)[-1]
    assert dict(zip(row.responses, row.ranks, strict=True)) == dict(zip(shown, (4, 3, 2, 1), strict=True))
