"""The labelling page, started as a user does: its interface over HTTP, killed in the middle, and in a real browser."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest

from tasks.conversations import Conversation, single
from tasks.datasets import read_rows
from tasks.labels.desk import LEASES, LEAVING, Leases
from tasks.labels.judgments import (
    DEMONSTRATIONS,
    GUIDELINES,
    RANKINGS,
    JudgedRanking,
    WrittenDemonstration,
    item_id,
    version_of,
)
from tasks.labels.page import Reach, main
from tasks.labels.queue import WAIT_FILE, Item, Job, Queue, open_queue
from tests.tiny import CONVERSATION, tiny_model_dir

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

ROOT = Path(__file__).parents[3]
HOSTILE = [
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"><b>bold</b> &amp; &lt;",
    "# Heading\n\n**bold** [link](http://example.com) ![image](http://example.com/x.png) `code`\n| a | b |",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eoverridden to the left",
    "wide" * 2500,
]
MAX_TOKENS = 40
LABELS = 30  # an item: every labeler of these tests meets the same items in the same order


def item_of(prompt: Conversation, responses: list[str] | None = None, labels: int = LABELS) -> Item:
    outputs = responses or []
    ended = [True, True, False, True][: len(outputs)]
    return Item(item=item_id(prompt, outputs, ended), prompt=prompt, responses=outputs, ended=ended, labels=labels)


def queue_of(job: Job, items: list[Item]) -> Queue:
    limit = MAX_TOKENS if job == "demonstrate" else None
    return Queue(job=job, seed=3, max_tokens=limit, leave_out=["mallory"], set_aside_after=99, items=items)


def folder_with_guidelines(folder: Path) -> Path:
    (folder / GUIDELINES).parent.mkdir(parents=True)
    shutil.copy(ROOT / GUIDELINES, folder / GUIDELINES)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    token: str  # empty where the environment has tokens
    home: Path
    log: Path

    def rankings(self, labeler: str) -> list[JudgedRanking]:
        rows = read_rows(self.home / RANKINGS, JudgedRanking, may_be_empty=True)
        return [row for row in rows if row.labeler == labeler]

    def demonstrations(self, labeler: str) -> list[WrittenDemonstration]:
        rows = read_rows(self.home / DEMONSTRATIONS, WrittenDemonstration, may_be_empty=True)
        return [row for row in rows if row.labeler == labeler]


def start(home: Path, port: int, tokens: str = "") -> Server:
    log = home / "page.log"
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.labels.page", f"--port={port}"],
            cwd=home,
            env=os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "RLHF_LABEL_TOKENS": tokens},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout
    url, _, token = process.stdout.readline().strip().partition("#token=")
    assert url == f"http://127.0.0.1:{port}/", log.read_text()
    return Server(process, url, token, home, log)


def stop(server: Server) -> None:
    server.process.send_signal(signal.SIGINT)
    server.process.communicate(timeout=30)
    assert server.process.returncode == 0, server.log.read_text()
    assert server.log.read_text() == ""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = folder_with_guidelines(tmp_path_factory.mktemp("label"))
    tiny_model_dir(home / "data/models/base")
    prompts = [single(f"where is order {number}") for number in range(8)]
    open_queue(queue_of("demonstrate", [item_of(one) for one in [single("\n".join(HOSTILE)), *prompts]]), home)
    outputs = [[f"{word} {number}" for word in ("hello", "sorry", "dear", "late")] for number in range(8)]
    plain = [item_of(CONVERSATION, one) for one in outputs]
    open_queue(queue_of("rank", [item_of(single(HOSTILE[0]), HOSTILE), *plain]), home)
    started = start(home, free_port())
    yield started
    stop(started)


# ---- the interface ----


@contextlib.contextmanager
def client(server: Server, name: str, token: str = "") -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as one:
        ask(one, "sign-in", name=name, token=token or server.token)
        yield one


def ask(one: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = one.post(f"/api/{path}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def judged(view: dict[str, Any]) -> dict[str, Any]:
    return {name: view[name] for name in ("job", "item", "started_at", "guidelines")}


def test_what_a_script_needs_to_label(server: Server) -> None:
    with client(server, "script") as one:
        view = ask(one, "next", job="demonstrate")
        assert view["prompt"] == single("\n".join(HOSTILE))
        assert view["max_tokens"] == MAX_TOKENS
        tokens = ask(one, "count", item=view["item"], text="hello customer")["tokens"]
        assert 2 <= tokens <= MAX_TOKENS
        ask(one, "save", **judged(view), response="hello customer")
        assert [row.response for row in server.demonstrations("script")] == ["hello customer"]

        view = ask(one, "next", job="rank")
        assert sorted(output["text"] for output in view["outputs"]) == sorted(HOSTILE)
        assert set(view) == {
            "job", "item", "prompt", "outputs", "max_tokens", "started_at", "guidelines", "said",
        }, "and nothing that tells who wrote an output"  # fmt: skip
        flags = [["harmful"], [], [], []]
        ask(one, "save", **judged(view), ranks=[4, 1, 1, 3], flags=flags, ratings=[1, None, 6, 7])
        (row,) = server.rankings("script")
        assert [row.ranks[index] for index in row.order] == [4, 1, 1, 3]
        assert row.guidelines == version_of((server.home / GUIDELINES).read_text())
        ask(one, "skip", **judged(ask(one, "next", job="rank")), reason="unclear")
        assert server.rankings("script")[-1].skipped == "unclear"
        jobs = one.get("/api/queues").json()["jobs"]
        assert (jobs["rank"]["mine"], jobs["rank"]["mine_today"], jobs["rank"]["mine_skipped"]) == (1, 1, 1)
        assert ask(one, "sign-out") == {"signed_out": True}
        assert one.get("/api/queues").status_code == 401


def test_who_is_left_out_is_told(server: Server) -> None:
    with client(server, "mallory") as one:
        assert "Labels by mallory are not used" in ask(one, "next", job="rank")["why"]


def test_what_is_refused(server: Server) -> None:
    with client(server, "careful") as one:
        view = ask(one, "next", job="demonstrate")
        long = one.post("/api/save", json=judged(view) | {"response": "hello " * 100})
        assert long.status_code == 400
        assert re.search(rf"has \d+ tokens, and at most {MAX_TOKENS} are allowed", long.json()["error"])
        body = b'{"item": "%s", "text": "\\ud800"}' % view["item"].encode()
        headers = {"content-type": "application/json"}
        assert one.post("/api/count", content=body, headers=headers).status_code == 400
        for wrong in ({"job": "rank", "ranks": [1], "flags": [[]], "ratings": [None]}, {"response": None}, {"more": 1}):
            assert one.post("/api/save", json=judged(view) | wrong).status_code == 400
        assert server.demonstrations("careful") == []
        assert (
            one.post("/api/next", content=b'{"job": "rank"}', headers={"content-type": "text/plain"}).status_code == 415
        )
        assert one.post("/api/next", content=b"x" * 2_000_000, headers=headers).status_code == 413
        for path in ("gradio_api/upload", "gradio_api/queue/join", "login"):
            assert one.post(path, json={}).status_code == 404
        for path in (
            "config",
            "gradio_api/info",
            "gradio_api/file=page.log",
            "gradio_api/proxy=http://example.com",
            "docs",
        ):
            assert one.get(path).status_code == 404


def test_other_sites_are_refused(server: Server) -> None:
    with client(server, "victim") as one:
        for headers in (
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": server.url.rstrip("/") + "1"},
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
            {"host": "evil.example"},
        ):
            assert one.post("/api/next", json={"job": "rank"}, headers=headers).status_code == 403, headers
            assert one.get("/api/queues", headers=headers).status_code == 403, headers
        own = {"origin": server.url.rstrip("/"), "sec-fetch-site": "same-origin"}
        assert one.post("/api/next", json={"job": "rank"}, headers=own).status_code == 200
        answer = one.get("/")
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_a_page_for_others_is_known_by_numbers_and_its_own_names_alone() -> None:
    reach = Reach(frozenset({"localhost", "lab"}), any_number=True, public="label.example:8443")
    known = ["lab:7861", "LAB", "10.0.0.7:7861", "[fe80::1]:7861", "label.example:8443"]
    assert [host for host in known if not reach.knows(host)] == []
    assert [host for host in ["evil.example", "label.example", "", "lab.evil.example", "["] if reach.knows(host)] == []
    assert not Reach(frozenset({"localhost"}), any_number=False, public="").knows("10.0.0.7")


def test_sign_in_is_slowed_down_and_no_token_is_logged(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as one:
        assert one.post("/api/next", json={"job": "rank"}).status_code == 401
        guess = {"name": "guesser", "token": "a-guess-that-is-wrong"}
        assert [one.post("/api/sign-in", json=guess).status_code for _ in range(3)] == [403] * 3
        waiting = one.post("/api/sign-in", json=guess | {"token": server.token})
        assert waiting.status_code == 429
        assert waiting.json()["retry_after"] > 0
        assert int(waiting.headers["retry-after"]) <= 1
        welcome = one.post("/api/sign-in", json={"name": " someone else ", "token": server.token})
        assert welcome.json() == {"name": "someone else"}
        cookie = welcome.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert server.token not in cookie
        assert one.post("/api/sign-in", json={"name": "a\u202eb", "token": server.token}).status_code == 400
        assert server.log.read_text() == ""


def test_ten_at_once_with_the_server_killed_lose_and_double_nothing(tmp_path: Path) -> None:
    """As the page does, a client sends a save again until it is acknowledged."""
    home = folder_with_guidelines(tmp_path)
    items = [item_of(single(f"prompt {number}"), ["a", "b"], labels=1) for number in range(1000)]
    open_queue(queue_of("rank", items), home)
    names = [f"labeler {number}" for number in range(10)]
    tokens = ",".join(f"{name}:token of {name}" for name in names)
    port = free_port()
    started = restarted = start(home, port, tokens)

    def again(one: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
        while True:
            try:
                return ask(one, path, **body)
            except httpx.TransportError:
                time.sleep(0.1)

    def work(name: str) -> list[str]:
        acknowledged = []
        with client(started, name, f"token of {name}") as one:
            while "item" in (view := again(one, "next", job="rank")) and view["item"]:
                again(one, "save", **judged(view), ranks=[1, 2], flags=[[], []], ratings=[None, None])
                acknowledged.append(view["item"])
        return acknowledged

    try:
        with ThreadPoolExecutor(10) as pool:
            working = {name: pool.submit(work, name) for name in names}
            path = home / RANKINGS
            while path.read_bytes().count(b"\n") < 300:
                time.sleep(0.01)
            started.process.send_signal(signal.SIGKILL)
            started.process.communicate()
            at_kill = path.read_bytes().count(b"\n")
            restarted = start(home, port, tokens)
            told = {name: future.result(timeout=120) for name, future in working.items()}
        refused = httpx.post(f"{restarted.url}api/sign-in", json={"name": "eve", "token": "x"}, trust_env=False)
        stop(restarted)
    finally:
        for one in (started, restarted):
            one.process.kill()
    assert refused.status_code == 403
    assert 300 <= at_kill < 1000
    rows = read_rows(path, JudgedRanking)
    assert {(row.labeler, row.item) for row in rows} == {(name, item) for name, done in told.items() for item in done}
    assert Counter(row.item for row in rows) == {one.item: 1 for one in items}
    assert all(told.values())


# ---- how it starts ----


def test_what_keeps_it_from_starting_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RLHF_LABEL_TOKENS", raising=False)
    monkeypatch.delenv("RLHF_LABEL_URL", raising=False)

    def problem(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(server.home)
    assert "another page hands out the queues of this folder" in problem(f"--port={free_port()}")
    monkeypatch.chdir(tmp_path)
    taken = server.url.rpartition(":")[2].strip("/")
    assert f"error: port {taken} is taken; give another with --port." in problem(f"--port={taken}")
    assert "data/labels/guidelines.md cannot be read" in problem(f"--port={free_port()}")
    assert "nobody has a token" in problem("--host=0.0.0.0")
    monkeypatch.setenv("RLHF_LABEL_TOKENS", "ann:short")
    assert "fewer than 12 characters: ann" in problem("--host=0.0.0.0")
    monkeypatch.delenv("RLHF_LABEL_TOKENS")
    monkeypatch.setenv("RLHF_LABEL_URL", "https://label.example/")
    assert "nobody has a token" in problem(), "something passes requests from elsewhere on"
    monkeypatch.setenv("RLHF_LABEL_URL", "label.example")
    assert "write it whole, as https://label.example" in problem(), "or nobody would ask for tokens"


# ---- in a browser ----


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    one = browser.new_context(viewport={"width": 1200, "height": 1400})
    yield one
    one.close()


def sign_in(context: BrowserContext, server: Server, name: str, job: Job = "rank") -> Page:
    page = context.new_page()
    page.goto(f"{server.url}#token={server.token}")
    page.fill("#name", name)
    page.click("#sign-in")
    page.click(f"#job-{job}[aria-pressed=false], #job-{job}[aria-pressed=true]")
    page.wait_for_selector("#answer" if job == "demonstrate" else "#card-0")
    return page


def skip_the_hostile_ones(server: Server, name: str) -> None:
    with client(server, name) as one:
        for job in ("demonstrate", "rank"):
            ask(one, "skip", **judged(ask(one, "next", job=job)), reason="for another test")


def told(page: Page, text: str) -> None:
    page.wait_for_function("text => document.getElementById('notice').textContent.includes(text)", arg=text)


def test_an_answer_is_written_counted_saved_and_found_again(context: BrowserContext, server: Server) -> None:
    skip_the_hostile_ones(server, "Ann")
    page = sign_in(context, server, "Ann", "demonstrate")
    assert server.token not in page.url
    assert page.inner_text("#prompt") == "where is order 0"
    assert "Stay within the length" in page.inner_text("#guidelines")
    page.fill("#answer", "hello " * 100)
    page.wait_for_selector("#count.bad-text")
    page.click("#save")
    told(page, f"at most {MAX_TOKENS} are allowed")
    page.fill("#answer", "hello, it is late <b>\n\u05e9\u05dc\u05d5\u05dd")
    page.wait_for_selector("#count:not(.bad-text)")
    assert re.fullmatch(rf"\d+ of at most {MAX_TOKENS} tokens", page.inner_text("#count"))
    page.reload()
    page.wait_for_selector("#answer")
    assert page.inner_text("#prompt") == "where is order 0"
    assert page.input_value("#answer") == "hello, it is late <b>\n\u05e9\u05dc\u05d5\u05dd", (
        "not saved, and still there"
    )
    page.keyboard.press("Control+Enter")
    told(page, "Saved.")
    assert [row.response for row in server.demonstrations("Ann")[1:]] == [
        "hello, it is late <b>\n\u05e9\u05dc\u05d5\u05dd"
    ]
    assert page.inner_text("#prompt") == "where is order 1"
    assert page.inner_text("#mine") == "You: 1 today, 1 in all, 1 skipped"

    page.click("#back")
    told(page, "You have judged this one.")
    page.fill("#answer", "better")
    page.click("#save")
    told(page, "Saved.")
    assert server.demonstrations("Ann")[-1].response == "better"
    assert page.inner_text("#prompt") == "where is order 1"
    page.click("#skip")
    page.fill("#reason", "unclear")
    page.keyboard.press("Enter")
    told(page, "Skipped.")
    assert server.demonstrations("Ann")[-1].skipped == "unclear"
    page.reload()
    page.wait_for_selector("#answer")
    page.click("#back")
    told(page, "You skipped this one: unclear")
    page.click("#back")
    page.wait_for_function("document.getElementById('answer')?.value === 'better'")
    page.click("#forward")
    told(page, "You skipped this one: unclear")


def places(page: Page) -> dict[str, int]:
    """{text of an output: its place as shown, from 0}"""
    return {page.inner_text(f"#card-{place} .text"): place for place in range(4)}


def drag(page: Page, place: int, x: float, y: float) -> None:
    box = page.locator(f"#card-{place} .handle").bounding_box()
    assert box
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(x, y, steps=6)
    page.mouse.up()


def drag_onto(page: Page, place: int, selector: str, share: float) -> None:
    """share: of the height of what it is dropped on."""
    box = page.locator(selector).bounding_box()
    assert box
    drag(page, place, box["x"] + 40, box["y"] + share * box["height"])


def ranks_by_text(row: JudgedRanking) -> dict[str, int]:
    return dict(zip((text.split()[0] for text in row.responses), row.ranks, strict=True))


def test_outputs_are_ranked_by_mouse(context: BrowserContext, server: Server) -> None:
    skip_the_hostile_ones(server, "Mo")
    page = sign_in(context, server, "Mo")
    assert "System" in page.inner_text("#prompt").title()
    assert page.locator("#card-0, #card-1, #card-2, #card-3").count() == 4
    cut_off = page.locator(".card", has_text="Cut off here").locator(".text").inner_text()
    assert cut_off == "dear 0", "the one that did not end"
    at = places(page)
    page.click("#save")
    told(page, "Not placed yet: A, B, C, D.")
    drag_onto(page, at["late 0"], "#board", 0.01)
    drag_onto(page, at["sorry 0"], ".level:not(.loose)", 0.9)  # below it
    drag_onto(page, at["dear 0"], ".level:not(.loose) >> nth=0", 0.05)  # above all
    drag_onto(page, at["hello 0"], ".level:not(.loose) >> nth=1", 0.5)  # a tie with `late`
    page.click(f"#flag-{at['sorry 0']}-not-an-answer")
    page.click(f"#rating-{at['dear 0']}-7")
    page.click(f"#rating-{at['dear 0']}-6")
    drag_onto(page, at["dear 0"], ".level:not(.loose) >> nth=2", 0.95)  # a slip
    page.click("#undo")
    page.reload()
    page.wait_for_selector("#card-0")
    assert places(page) == at, "in the same order"
    names = ["1st, best", "2nd (tie)", "4th, worst"]
    assert [page.locator(".level > .name").all_inner_texts(), page.locator(".loose").count()] == [names, 0]
    page.click("#save")
    told(page, "Saved.")
    row = server.rankings("Mo")[-1]
    assert ranks_by_text(row) == {"dear": 1, "late": 2, "hello": 2, "sorry": 4}
    assert [row.flags[row.responses.index(text)] for text in ("sorry 0", "dear 0")] == [["not an answer"], []]
    assert [row.ratings[row.responses.index(text)] for text in ("sorry 0", "dear 0")] == [None, 6]
    assert sorted(places(page)) == ["dear 1", "hello 1", "late 1", "sorry 1"]
    page.reload()
    page.wait_for_selector("#card-0")
    page.click("#back")
    told(page, "You have judged this one.")
    assert places(page) == at
    assert page.get_attribute(f"#rank-{at['sorry 0']}-4", "aria-pressed") == "true"


def test_outputs_are_ranked_by_keys_alone(context: BrowserContext, server: Server) -> None:
    skip_the_hostile_ones(server, "Kay")
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#name")
    press = page.keyboard.press
    page.keyboard.type("Kay")
    press("Tab")
    page.keyboard.type(server.token)
    press("Enter")
    page.wait_for_selector("#answer")
    while page.evaluate("document.activeElement.id") != "job-rank":
        press("Shift+Tab")
    press("Enter")
    page.wait_for_selector("#card-0:focus")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "one sees where one is"
    first = [text for text, _ in sorted(places(page).items(), key=lambda pair: pair[1])]
    for key in ("3", "j", "1", "b", "Shift+5", "k"):  # where A goes when it gets its rank, B is the next
        press(key)
    for place, rank in ((2, "1"), (3, "2")):
        go_to(page, place)
        press(rank)
    for key in ("ArrowUp", "ArrowUp", "ArrowDown", "h", "n", "u"):  # level with 1, before, level again; n is undone
        press(key)
    assert [press_of(page, place) for place in range(4)] == ["4", "1", "1", "1"]
    press("?")
    page.wait_for_selector("dialog dl.keys")
    press("Escape")
    go_to(page, 3)
    press("ArrowDown")
    press("Control+Enter")
    told(page, "Saved.")
    row = server.rankings("Kay")[-1]
    assert [row.responses[index] for index in row.order] == first
    assert [row.ranks[index] for index in row.order] == [4, 1, 1, 3]
    assert [row.flags[index] for index in row.order] == [[], ["broken"], [], ["harmful"]]
    assert [row.ratings[index] for index in row.order] == [None, 5, None, None]
    press("s")
    page.wait_for_selector("#reason:focus")
    page.keyboard.type("both are bad")
    press("Enter")
    told(page, "Skipped.")
    assert server.rankings("Kay")[-1].skipped == "both are bad"
    press("p")
    told(page, "You skipped this one: both are bad")


def go_to(page: Page, place: int) -> None:
    for _ in range(8):
        if page.evaluate("document.activeElement.id") == f"card-{place}":
            return
        page.keyboard.press("j")
    raise AssertionError(f"`j` does not lead to card {place}")


def press_of(page: Page, place: int) -> str:
    """The place in the order that is pressed, as "1"."""
    return page.inner_text(f"#card-{place} [id^=rank-][aria-pressed=true]")[:-2]


def test_on_a_phone_nothing_is_wider_than_the_page(browser: Browser, server: Server) -> None:
    phone = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = sign_in(phone, server, "Phil", "demonstrate")
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == 360
    page.tap("#job-rank")
    page.wait_for_selector("#card-0")
    for place, rank in itertools.product(range(4), ("1", "2")):
        page.tap(f"#rank-{place}-{rank}")
    page.tap("#flag-3-not-an-answer")
    slide(phone, page, 3)
    assert [press_of(page, place) for place in range(4)] == ["2", "2", "2", "1"]
    assert page.evaluate(wide) == 360
    inside = page.evaluate(
        "[...document.querySelectorAll('#label button')].every((one) => one.getBoundingClientRect().right <= 360)"
    )
    assert inside
    page.tap("#save")
    told(page, "Saved.")
    row = server.rankings("Phil")[-1]
    assert [row.ranks[index] for index in row.order] == [2, 2, 2, 1]
    phone.close()


LONG_PROMPT = "\n".join(f"{n}. what the customer said on that day" for n in range(90)) + "\n" + "wide" * 200


@pytest.fixture
def long_prompt(server: Server) -> Iterator[None]:
    """What is to be ranked has a prompt that is longer than any screen."""
    path = server.home / ".rlhf/queue/rank.json"
    before = path.read_text()
    outputs = [f"{word} " * 60 for word in ("hello", "sorry", "dear", "late")]
    open_queue(queue_of("rank", [item_of(single(LONG_PROMPT), outputs)]), server.home)
    yield
    path.write_text(before)


SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


@pytest.mark.parametrize("screen", SCREENS)
def test_the_prompt_stays_in_sight_a_place_is_no_rating_and_a_phone_has_no_keys(
    browser: Browser, server: Server, long_prompt: None, screen: str
) -> None:
    context = browser.new_context(**SCREENS[screen])
    page = sign_in(context, server, f"Lo on a {screen}")
    height, width = SCREENS[screen]["viewport"]["height"], SCREENS[screen]["viewport"]["width"]
    for place in (3, 0):
        page.evaluate(f"document.getElementById('card-{place}').scrollIntoView()")
        question, card = page.locator(".question").bounding_box(), page.locator(f"#card-{place}").bounding_box()
        assert question
        assert card
        assert question["y"] >= 0
        assert question["y"] + question["height"] <= card["y"] + 1, "what is scrolled to is not under the prompt"
        assert question["height"] < 0.4 * height
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.focus("#prompt")
    page.keyboard.press("End")
    prompt = page.locator("#prompt")
    assert prompt.evaluate("one => one.scrollHeight") > height
    page.wait_for_function("document.getElementById('prompt').scrollTop > 500")
    for taller in (True, False):
        page.click("#whole")
        page.wait_for_selector(".question.whole" if taller else ".question:not(.whole)")
        assert (prompt.evaluate("one => one.offsetHeight") > 0.6 * height) == taller

    assert page.locator("#card-0 [id^=rank-]").all_inner_texts() == ["1st", "2nd", "3rd", "4th"]
    assert "".join(page.inner_text("#card-0 .stars").split()) == "bad" + "★" * 7 + "excellent"
    page.click("#rating-0-3")
    assert page.locator("#card-0 .lit").count() == 3
    assert ("key" in page.inner_text("#label").lower()) == (screen == "desktop")
    heights = page.evaluate("[...document.querySelectorAll('#label button')].map((one) => one.offsetHeight)")
    assert (min(filter(None, heights)) >= 44) == (screen == "phone"), "for thumbs"
    page.click("#save")
    told(page, "Not placed yet: A, B, C, D.")
    notice = page.locator("#notice").bounding_box()
    assert notice
    assert notice["y"] + notice["height"] <= height, "in sight, wherever the page is scrolled to"
    context.close()


def slide(phone: BrowserContext, page: Page, place: int) -> None:
    """With a finger: the card to the top, while the page scrolls along."""
    handle = page.locator(f"#card-{place} .handle")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box
    touch = phone.new_cdp_session(page)

    def send(kind: str, *points: dict[str, float]) -> None:
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    x = box["x"] + 8
    send("touchStart", {"x": x, "y": box["y"] + 8})
    send("touchMove", {"x": x, "y": box["y"] - 20})
    send("touchMove", {"x": x, "y": 30})
    page.wait_for_function("document.querySelector('.gap').getBoundingClientRect().top > 80")
    top = page.locator(".gap >> nth=0").bounding_box()
    assert top
    send("touchMove", {"x": x, "y": top["y"]})
    page.wait_for_selector(".gap.into")
    send("touchEnd")


def test_hostile_texts_are_text(context: BrowserContext, server: Server) -> None:
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = sign_in(context, server, "<b>Eve</b>")
    assert page.inner_text("#who") == "<b>Eve</b>"
    assert page.text_content("#prompt .text") == HOSTILE[0]
    assert sorted(page.text_content(f"#card-{place} .text") or "" for place in range(4)) == sorted(HOSTILE)
    assert page.locator("#work :is(script, img, a, b, iframe, table)").count() == 0
    arabic = page.locator(".card .text", has_text="overridden")
    assert arabic.evaluate("one => [one.dir, getComputedStyle(one).unicodeBidi]") == ["auto", "plaintext"]
    page.click("#job-demonstrate")
    page.wait_for_selector("#answer")
    assert page.text_content("#prompt .text") == "\n".join(HOSTILE)
    page.fill("#answer", HOSTILE[0])
    page.wait_for_selector("#count.bad-text")
    assert page.title() == "Labels"
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith(server.url)] == []


def test_a_save_waits_for_a_server_that_is_away_and_for_a_new_session(context: BrowserContext, server: Server) -> None:
    skip_the_hostile_ones(server, "Wes")
    page = sign_in(context, server, "Wes")
    for place in range(4):
        page.click(f"#rank-{place}-{place + 1}")
    page.route("**/api/save", lambda route: route.abort())
    page.click("#save")
    told(page, "Not saved yet: the server does not answer.")
    assert server.rankings("Wes")[1:] == []
    context.clear_cookies()
    page.unroute("**/api/save")
    page.wait_for_selector("dialog.door")
    page.fill("#token", server.token)
    page.click("#sign-in")
    told(page, "Saved.")
    row = server.rankings("Wes")[-1]
    assert [row.ranks[index] for index in row.order] == [1, 2, 3, 4]
    assert len(server.rankings("Wes")) == 2


def test_who_has_nothing_to_do_gets_what_comes(context: BrowserContext, server: Server) -> None:
    page = context.new_page()
    page.goto(f"{server.url}#token=wrong")
    page.fill("#name", "Ida")
    page.click("#sign-in")
    page.wait_for_selector("text=Name and token do not go together.")
    page.fill("#token", server.token)
    page.click("#sign-in")
    page.click("#job-rank")
    page.wait_for_selector("#card-0")
    path = server.home / ".rlhf/queue/rank.json"
    queue = path.read_text()
    try:
        open_queue(queue_of("rank", []), server.home)
        page.click("#pause")
        page.click("#go-on")
        page.wait_for_selector("#nothing")
        assert "All items have the labels" in page.inner_text("#nothing")
    finally:
        path.write_text(queue)
    page.wait_for_selector("#card-0")
    assert held_for(server, "Ida") > 60
    given_up = server.home / WAIT_FILE
    given_up.write_text('{"until": 1}')
    for place in range(4):
        page.click(f"#rank-{place}-1")
    page.click("#save")
    page.wait_for_selector("#nothing")
    assert "This job is closed" in page.inner_text("#nothing")
    assert page.inner_text("#job-rank") == "Rank answers (closed)"
    assert server.rankings("Ida")[-1].ranks == [1, 1, 1, 1], "what was begun is kept"
    given_up.unlink()
    page.wait_for_selector("#card-0")
    page.goto("about:blank")
    for _ in range(100):
        if held_for(server, "Ida") < LEAVING:
            return
        time.sleep(0.05)
    raise AssertionError("a closed tab holds its item as long as an open one")


def held_for(server: Server, labeler: str) -> float:
    """Seconds that the labeler's items stay theirs."""
    leases = Leases.model_validate_json((server.home / LEASES).read_text()).leases
    return max(one.until for one in leases if one.labeler == labeler) - time.time()
