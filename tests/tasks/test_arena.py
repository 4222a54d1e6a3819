"""The arena: sides, pace and votes; and the page, started as a user does and driven in a browser."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import Mock

import pytest

from tasks.arena import EQUAL, FIRST, SECOND, Contestant, Round, contestants, in_step, main, tally
from tasks.conversations import single, text_of
from tasks.datasets import (
    Prompt,
    PromptFacts,
    Ranking,
    RecordedRanking,
    Samples,
    Vote,
    prompt_id,
    read_rows,
    write_rows,
)
from tasks.labels.judgments import JudgedRanking
from tasks.labels.label_file import append, recorded, take_back
from tasks.lineage import load_stages
from tasks.params import load_params
from tasks.rank import run as run_rank
from tasks.stage import Stage, UserError
from tasks.tickets import generate
from tests.tiny import CONVERSATION, tiny_model_dir

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and prompts to draw, one of them a conversation."""
    folder = tmp_path_factory.mktemp("arena")
    for seed, name in enumerate(("sft", "policy")):
        tiny_model_dir(folder / "data/models" / name, seed=seed)
    prompts = [single("hello ticket"), single("where is my order"), CONVERSATION]
    write_rows(
        folder / "data/prepared/prompts/reward.jsonl", [Prompt(id=prompt_id(one), prompt=one) for one in prompts]
    )
    return folder


def vote(number: int = 0, ranks: list[int] = FIRST, models: tuple[str, str] = ("policy/3", "sft/3")) -> Vote:
    return Vote(
        id=prompt_id(single(f"prompt {number}")),
        prompt=single(f"prompt {number}"),
        responses=["däar\nAnn", "no"],
        ended=[True, False],
        ranks=ranks,
        labeler="Ann",
        held_out=False,
        models=list(models),
        seed=number,
        shown_at="2026-11-22T23:23:38+00:00",
    )


# ---- a round ----


def round_of(seed: int, pair: list[Contestant]) -> Round:
    return Round(single("hello"), pair, seed, max_new_tokens=6, temperature=0)


def test_the_seed_says_who_stands_where_and_both_stand_everywhere() -> None:
    pair = [Contestant("policy/3", Mock(), Mock()), Contestant("sft/3", Mock(), Mock())]
    sides = [round_of(seed, pair).models for seed in range(100)]
    assert sides == [round_of(seed, pair).models for seed in range(100)]
    counts = Counter(map(tuple, sides))
    assert set(counts) == {("policy/3", "sft/3"), ("sft/3", "policy/3")}
    assert min(counts.values()) > 35


def test_a_vote_holds_what_each_model_answered(workspace: Path) -> None:
    pair, _ = contestants(str(workspace / "data/models/sft"), str(workspace / "data/models/policy"))
    for seed in range(4):
        current = round_of(seed, pair)
        seen = list(current.answers())
        assert seen[-1] == current.responses
        assert len(seen) > 2, "they are streamed"
        row = current.vote(SECOND, "Ann")
        assert (row.prompt, row.id, row.seed, row.ranks) == (single("hello"), prompt_id(single("hello")), seed, [2, 1])
        for model, response, ended in zip(row.models, row.responses, row.ended, strict=True):
            alone = round_of(0, [one for one in pair if one.name == model] * 2)
            list(alone.answers())
            assert (response, ended) == (alone.responses[0], alone.chats[0].ended)


def test_both_models_see_all_turns(workspace: Path) -> None:
    pair, _ = contestants(str(workspace / "data/models/sft"), str(workspace / "data/models/policy"))
    current = Round(CONVERSATION, pair, 1, max_new_tokens=6, temperature=0)
    list(current.answers())
    assert [chat.history[:-1] for chat in current.chats] == [CONVERSATION] * 2
    assert current.vote(FIRST, "Ann").prompt == CONVERSATION


def test_a_folder_is_named_with_its_hash_and_one_model_may_stand_against_itself(workspace: Path) -> None:
    sft, policy = (str(workspace / "data/models" / name) for name in ("sft", "policy"))
    (one, other), _ = contestants(sft, policy)
    assert re.fullmatch(re.escape(sft) + "@[0-9a-f]{8}", one.name)
    assert one.name.partition("@")[2] != other.name.partition("@")[2]
    (one, same), _ = contestants(sft, sft)
    assert one.name == same.name


def test_both_answers_come_in_step() -> None:
    assert list(in_step([iter(["a", "b", "c"]), iter(["x"])])) == [["a", "x"], ["ab", "x"], ["abc", "x"]]


def test_the_faster_model_does_not_rush_on_when_the_slower_one_has_ended() -> None:
    def slow() -> Iterator[str]:
        for _ in range(4):
            time.sleep(0.05)
            yield "slow "

    started = time.monotonic()
    list(in_step([slow(), iter(["fast "] * 8)]))
    assert time.monotonic() - started > 0.35, "8 steps of 0.05 s"


# ---- votes on disk ----


def test_two_voters_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data/labels/arena.jsonl"
    assert recorded(path, Vote) == []
    with ThreadPoolExecutor(8) as voters:
        list(voters.map(lambda number: append(vote(number), path), range(100)))
    assert sorted(row.seed for row in read_rows(path, Vote)) == list(range(100))


@pytest.mark.parametrize("reopened", [True, False])
def test_a_torn_last_line_harms_no_later_vote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reopened: bool
) -> None:
    path = tmp_path / "arena.jsonl"
    append(vote(1), path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-40])
    if reopened:
        assert recorded(path, Vote) == [vote(1)]
    append(vote(2), path)
    assert recorded(path, Vote) == [vote(1), vote(2)]
    assert "ended in a torn line, which was removed" in capsys.readouterr().err


def test_the_last_of_equal_votes_is_taken_back_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "arena.jsonl"
    for number in (1, 2, 1, 3):
        append(vote(number), path)
    assert take_back(vote(1), path)
    assert not take_back(vote(9), path)
    assert [row.seed for row in recorded(path, Vote)] == [1, 2, 3]


def test_a_vote_that_lacks_its_line_end_alone_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "arena.jsonl"
    append(vote(1), path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append(vote(2), path)
    assert recorded(path, Vote) == [vote(1), vote(2)]


def test_a_damaged_line_and_a_file_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    path = tmp_path / "arena.jsonl"
    append(vote(1), path)
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"arena\.jsonl, line 1: "):
        recorded(path, Vote)
    with pytest.raises(UserError, match=r"arena\.jsonl/votes\.jsonl cannot be written: .*--file"):
        recorded(path / "votes.jsonl", Vote, "Name another file with --file.")


def test_the_tally_by_hand() -> None:
    swapped = ("sft/3", "policy/3")
    votes = [vote(ranks=FIRST), vote(ranks=FIRST, models=swapped), vote(ranks=SECOND, models=swapped)]
    votes += [vote(ranks=EQUAL), vote(ranks=FIRST, models=("policy/2", "sft/3"))]
    assert tally(votes, ["policy/3", "sft/3"]) == ({"policy/3": 2, "sft/3": 1}, 1)
    itself = [vote(ranks=SECOND, models=("sft/3", "sft/3")), vote(ranks=EQUAL, models=("sft/3", "sft/3"))]
    assert tally(itself, ["sft/3", "sft/3"]) == ({"sft/3": 1}, 1)


def test_without_a_model_it_does_not_start(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    assert main(["sft", "base"]) == 2
    assert "error: data/models/base is no model folder" in capsys.readouterr().err


# ---- the page ----


class Server(NamedTuple):
    address: str
    labels: Path

    def votes(self) -> list[Vote]:
        return recorded(self.labels, Vote)


@pytest.fixture(scope="module")
def server(workspace: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = workspace / "arena.log"
    command = [sys.executable, "-m", "tasks.arena", "sft", "policy", f"--port={port}", "--name=Ann"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*command, "--max-new-tokens=12"],
            cwd=workspace,
            env=os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}", log.read_text()
        yield Server(address, workspace / "data/labels/arena.jsonl")
    finally:
        process.send_signal(signal.SIGINT)
        _, code = process.communicate(timeout=30), process.returncode
    assert code == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def page(server: Server, browser: Browser) -> Iterator[Page]:
    one = browser.new_page(viewport={"width": 1200, "height": 900})
    one.goto(server.address)
    one.wait_for_selector("#prompt textarea")
    yield one
    one.close()


def enter(page: Page, prompt: str) -> None:
    page.fill("#prompt textarea", prompt)
    page.click("#ask")


def wait_for_answers(page: Page) -> list[str]:
    page.wait_for_selector("#first:enabled")
    return [page.input_value(f"#answer{side} textarea") for side in "AB"]


def outcome(page: Page) -> str:
    page.wait_for_selector("#verdict b")
    return page.inner_text("#verdict")


def choices_open(page: Page) -> list[bool]:
    return [page.is_enabled(f"#{id}") for id in ("first", "equal", "second")]


def test_a_vote_from_the_prompt_to_the_rankings(page: Page, server: Server, tmp_path: Path) -> None:
    """Blind until it is cast; then on the disk, and taken by the stage `rank`."""
    done: list[Request] = []
    page.on("requestfinished", lambda request: done.append(request))  # noqa: PLW0108  # playwright marks what it is given
    page.reload()
    before = len(server.votes())
    assert choices_open(page) == [False] * 3, "before there are answers"
    text = "hello <script>document.title = 'taken'</script> <b>order</b> **late**"
    enter(page, text)
    answers = wait_for_answers(page)
    blind = [page.content(), *(body_of(request) for request in done)]
    assert any("process_generating" in text for text in blind), "the stream that brought the answers is among them"
    assert not any(re.search(r"data/models|sft@|policy@", text) for text in blind)
    assert page.title() == "Arena"
    assert page.input_value("#prompt textarea") == text
    page.click("#second")
    said = outcome(page)

    *_, row = server.votes()
    assert len(server.votes()) == before + 1
    assert (row.prompt, row.responses, row.ranks, row.labeler) == (single(text), answers, [2, 1], "Ann")
    assert f"Answer A was {row.models[0]}, answer B {row.models[1]}." in said
    assert {model.partition("@")[0] for model in row.models} == {"data/models/sft", "data/models/policy"}
    assert ranking_of_stage(tmp_path, server.labels)[-1].model_dump(exclude={"held_out"}) == row.model_dump(
        exclude={"held_out", "models", "seed", "shown_at"}
    )


def body_of(request: Request) -> str:
    response = request.response()
    return response.body().decode(errors="replace") if response else ""


def ranking_of_stage(root: Path, labels: Path) -> list[Ranking]:
    """What the stage makes of the votes, beside ten simulated rankings."""
    tickets = generate(seed=4, count=10)
    ids = [prompt_id(single(row.prompt)) for row in tickets]
    samples = [
        Samples(id=id, prompt=single(row.prompt), responses=["dear", "no"], ended=[True, True])
        for id, row in zip(ids, tickets, strict=True)
    ]
    write_rows(root / "data/collected/samples/samples.jsonl", samples)
    rows = [PromptFacts(id=id, source="tickets", ticket=row.ticket) for id, row in zip(ids, tickets, strict=True)]
    write_rows(root / "data/prepared/facts.jsonl", rows)
    write_rows(root / "data/prepared/rankings/reward.jsonl", list[RecordedRanking]())
    write_rows(root / "data/labels/arena.jsonl", read_rows(labels, Vote))
    write_rows(root / "data/labels/rankings.jsonl", list[JudgedRanking]())
    stage = Stage(load_stages()["rank"], load_params(Path("params.yaml")), Mock(), root=root)
    run_rank(stage)
    stage.commit()
    return read_rows(root / "data/collected/rankings/rankings.jsonl", Ranking)


def test_one_click_or_key_a_pair(page: Page, server: Server) -> None:
    """Each vote brings the next pair, and what was voted on is voted on once."""
    before = len(server.votes())
    page.click("#draw")
    for key, ranks in {"a": FIRST, "2": SECOND, "t": EQUAL, "=": EQUAL}.items():
        wait_for_answers(page)
        page.keyboard.press(key)
        page.wait_for_selector("#first:disabled")
        before += 1
        assert (len(server.votes()), server.votes()[-1].ranks) == (before, ranks)
    wait_for_answers(page)
    page.dblclick("#second")
    page.wait_for_selector("#first:disabled")
    wait_for_answers(page)
    *kept, wrong = server.votes()
    assert len(kept) == before, "a double click votes once"
    assert {row.id for row in server.votes()[before - 4 :]} <= {
        prompt_id(one) for one in (single("hello ticket"), single("where is my order"), CONVERSATION)
    }

    page.keyboard.press("u")
    page.wait_for_selector("text=Your last vote is removed.")
    assert server.votes() == kept
    assert page.is_disabled("#undo")
    assert page.is_enabled("#first"), "and the next pair stays"
    page.fill("#prompt textarea", "")
    page.focus("#prompt textarea")
    page.keyboard.type("abtu1")
    assert page.input_value("#prompt textarea") == "abtu1"
    assert server.votes() == kept, "keys do not vote while a prompt is written"
    page.click("#first")
    page.wait_for_selector("#undo:enabled")
    assert page.input_value("#prompt textarea") == "abtu1", "nor is it drawn over"
    assert choices_open(page) == [False] * 3
    assert wrong not in server.votes()


def test_a_conversation_is_answered_and_recorded_with_all_its_turns(page: Page, server: Server) -> None:
    enter(page, text_of(CONVERSATION))
    wait_for_answers(page)
    page.click("#first")
    outcome(page)
    assert server.votes()[-1].prompt == CONVERSATION
    assert server.votes()[-1].id == prompt_id(CONVERSATION)


def test_the_tally_grows_and_two_browsers_keep_apart(server: Server, page: Page, browser: Browser) -> None:
    other = browser.new_page()
    other.goto(server.address)
    other.wait_for_selector("#prompt textarea")
    other.fill("#name input, #name textarea", "Bo")
    before = len(server.votes())
    enter(page, "hello from Ann")
    enter(other, "hello from Bo")
    wait_for_answers(other)
    wait_for_answers(page)
    other.click("#equal")
    ties = int(outcome(other).rpartition("ties: ")[2].rstrip("."))
    page.click("#equal")
    assert f"ties: {ties + 1}." in outcome(page)
    new = {(row.labeler, text_of(row.prompt)) for row in server.votes()[before:]}
    assert new == {("Bo", "hello from Bo"), ("Ann", "hello from Ann")}
    other.close()


def test_what_cannot_be_asked_or_voted_is_told(page: Page, server: Server) -> None:
    before = len(server.votes())
    page.fill("#prompt textarea", "  ")
    page.click("#ask")
    page.wait_for_selector("text=Write a prompt, or take the next pair.")
    enter(page, "<b>late</b> " * 1000)
    page.wait_for_selector("text=/that is \\d+ tokens, and the model takes 244/")
    assert choices_open(page) == [False] * 3
    assert page.input_value("#prompt textarea") == "<b>late</b> " * 1000
    page.fill("#name input, #name textarea", " ")
    enter(page, "hello")
    wait_for_answers(page)
    page.click("#first")
    page.wait_for_selector("text=Your name is empty")
    assert len(server.votes()) == before


def test_the_page_fits_a_phone_and_asks_nobody_else(server: Server, browser: Browser) -> None:
    phone = browser.new_page(viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    addresses: list[str] = []
    phone.on("request", lambda request: addresses.append(request.url))
    phone.goto(server.address)
    phone.wait_for_selector("#prompt textarea")
    enter(phone, "hello")
    wait_for_answers(phone)
    assert phone.is_hidden(".by-key")
    votes = [phone.locator(f"#{id}").bounding_box() for id in ("first", "equal", "second")]
    assert all(box and box["height"] >= 44 and box["y"] + box["height"] <= 740 for box in votes), "under the thumb"
    phone.tap("#first")
    outcome(phone)
    assert phone.evaluate("document.documentElement.scrollWidth") == 375
    assert len(addresses) > 5
    assert [url for url in addresses if not url.startswith(server.address) and not url.startswith("data:")] == []
    phone.close()


def test_a_port_that_is_taken_is_told(workspace: Path, server: Server) -> None:
    port = server.address.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "tasks.arena", "sft", "sft", "--port", port, "--file", "other.jsonl"],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"error: port {port} is taken; give another with --port." in done.stderr
    assert "note: both are data/models/sft@" in done.stderr
    assert "Traceback" not in done.stderr
