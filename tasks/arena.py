"""Which of two models answers better? `make arena`, or `python -m tasks.arena policy@champion sft`: a page to vote on.

A prompt, two answers side by side, and a vote before anyone learns which model gave which. A vote is a ranking of two
responses, appended to data/labels/arena.jsonl; the stage `rank` takes it along with the other rankings.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.chat import NAMES, Chat, default_model, load
from tasks.conversations import Conversation, single, text_of
from tasks.datasets import Prompt, Vote, prompt_id, read_rows
from tasks.labels.label_file import append, recorded, take_back
from tasks.lineage import hash_path
from tasks.program import ends_well
from tasks.registry import whoami
from tasks.stage import UserError

if TYPE_CHECKING:
    import gradio

LABELS = Path("data/labels/arena.jsonl")
PROMPTS = Path("data/prepared/prompts/reward.jsonl")  # to draw from: labels of held-out ones would be a leak
SIDES = ("A", "B")
FIRST, EQUAL, SECOND = [1, 2], [1, 1], [2, 1]  # ranks of the left and of the right answer


# ---- a round ----


class Contestant(NamedTuple):
    name: str  # policy/3, or a folder with the start of its DVC hash
    model: Any
    tokenizer: Any


class Round:
    """A prompt and the two models' answers to it. It stays on the server: the browser gets the texts alone."""

    def __init__(
        self,
        prompt: Conversation,
        contestants: Sequence[Contestant],
        seed: int,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        sides = random.Random(seed).sample(contestants, 2)
        self.prompt, self.seed = prompt, seed
        self.models = [side.name for side in sides]
        self.chats = [Chat(side.model, side.tokenizer, max_new_tokens, temperature) for side in sides]
        self.responses: list[str] = []
        self.shown_at = ""

    def answers(self) -> Generator[list[str]]:
        """The left and the right answer, as far as they are written; in the end `responses`."""
        with contextlib.ExitStack() as stack:
            yield from in_step(
                [stack.enter_context(contextlib.closing(chat.reply(self.prompt))) for chat in self.chats]
            )
        self.responses = [chat.history[-1]["content"] for chat in self.chats]
        if not all(text or chat.ended for text, chat in zip(self.responses, self.chats, strict=True)):
            raise UserError("an answer holds nothing but spaces, cut off at the longest; ask again.")
        self.shown_at = datetime.now(UTC).isoformat(timespec="seconds")
        yield self.responses

    def vote(self, ranks: list[int], labeler: str) -> Vote:
        return Vote(
            id=prompt_id(self.prompt),
            prompt=self.prompt,
            responses=self.responses,
            ended=[chat.ended for chat in self.chats],
            ranks=ranks,
            labeler=labeler,
            held_out=False,  # the stage `rank` says
            models=self.models,
            seed=self.seed,
            shown_at=self.shown_at,
        )


def in_step(streams: Sequence[Iterator[str]]) -> Generator[list[str]]:
    """What each has written so far, with one piece more of each every time.

    Where one has ended the other goes on no faster than both together did, or it would give away the faster model.
    """
    texts = [""] * len(streams)
    started, pace = time.monotonic(), 0.0
    for step, pieces in enumerate(zip_longest(*streams), start=1):
        if None in pieces:
            time.sleep(max(0.0, started + step * pace - time.monotonic()))
        else:
            pace = (time.monotonic() - started) / step
        texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
        yield texts


# ---- votes ----


def tally(votes: Sequence[Vote], names: Sequence[str]) -> tuple[dict[str, int], int]:
    """(wins by model, ties) of the votes between these two models."""
    wins, ties = dict.fromkeys(names, 0), 0
    for vote in votes:
        if sorted(vote.models) == sorted(names):
            ties += vote.ranks == EQUAL
            for model, rank in zip(vote.models, vote.ranks, strict=True):
                wins[model] += vote.ranks != EQUAL and rank == 1
    return wins, ties


# ---- the page ----


class Arena:
    """Two models, and the file that the votes go to."""

    def __init__(self, contestants: Sequence[Contestant], path: Path, max_new_tokens: int, temperature: float) -> None:
        self.contestants, self.path = contestants, path
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.votes = recorded(path, Vote, "Name another file with --file.")
        prompts = [row.prompt for row in read_rows(PROMPTS, Prompt)] if PROMPTS.exists() else []
        self.prompts = {words_of(text_of(prompt)): prompt for prompt in prompts}

    def draw(self) -> str:
        return text_of(random.choice(list(self.prompts.values())))

    def round(self, text: str) -> Round:
        """Of one of the prompts, with all its turns, where the text is its; else of the text as one user's turn."""
        prompt = self.prompts.get(words_of(text), single(text))
        return Round(prompt, self.contestants, secrets.randbelow(2**32), self.max_new_tokens, self.temperature)

    def take(self, vote: Vote) -> None:
        append(vote, self.path)
        self.votes.append(vote)

    def take_back(self, vote: Vote) -> bool:
        """False: somebody has removed it from the file already."""
        removed = take_back(vote, self.path)
        self.votes.remove(vote)
        return removed

    def verdict(self, vote: Vote) -> str:
        """HTML: which model was which, and how the two stand."""
        names = [contestant.name for contestant in self.contestants]
        wins, ties = tally(self.votes, names)
        left, right = (escape(name) for name in vote.models)
        same = " It was one model against itself: what you saw is its noise." if left == right else ""
        score = ", ".join(f"<b>{escape(name)}</b> {count}" for name, count in wins.items())
        return (
            f"<p>Saved. Answer A was <b>{left}</b>, answer B <b>{right}</b>.{same}</p>"
            f"<p>Wins so far: {score}; ties: {ties}.</p>"
        )


def words_of(text: str) -> str:
    """The text without the white space that a text field may change."""
    return " ".join(text.split())


CSS = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto !important}
.gradio-container, .gradio-container :has(#votes) {overflow: visible !important}
#votes {position: sticky; bottom: 0; z-index: 4; padding: 0.5rem 0; background: var(--body-background-fill)}
#votes, #last {flex-wrap: nowrap !important; gap: 0.5rem}
#votes button {min-width: 0; min-height: 2.75rem}
#votes button:enabled {border: 1px solid var(--color-accent)}
#last, #ask-row {align-items: center}
#verdict .refused {color: var(--error-text-color)}
#verdict {overflow-wrap: anywhere}
@media (hover: none), (pointer: coarse) {.by-key {display: none}}
"""
# A, B and T vote, U takes back, but not while a text is being written; a double click votes once
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  const ids = {a: "first", 1: "first", t: "equal", 0: "equal", "=": "equal", b: "second", 2: "second", u: "undo"};
  const id = ids[event.key.toLowerCase()];
  if (!id || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea:enabled")) return;
  document.getElementById(id).click();
});
document.addEventListener("click", (event) => {
  if (event.detail > 1 && event.target.closest("#votes")) { event.preventDefault(); event.stopPropagation(); }
}, true);
</script>"""


def page(arena: Arena, labeler: str) -> gradio.Blocks:
    import gradio as gr

    blocks = gr.Blocks(title="Arena", analytics_enabled=False, fill_width=True)
    with blocks:
        shown = gr.State()  # the round that can be voted on; Gradio keeps it on the server
        last = gr.State()  # the vote that can be taken back
        count = gr.State(0)  # of votes here: each new one brings the next pair
        asked = gr.State("")  # what was asked last
        gr.HTML(
            "<h1>Which answer is better?</h1>"
            "<p>Two models answer one prompt. Your vote is saved as a label, you see which model was which, and the "
            "next pair comes by itself.<span class=by-key> By key: A, T, B; U takes the last vote back.</span></p>"
        )
        with gr.Row(elem_id="ask-row"):
            name = gr.Textbox(labeler, label="Your name", elem_id="name", max_lines=1, scale=2, min_width=140)
            draw = gr.Button(
                "Next pair", elem_id="draw", variant="primary", interactive=bool(arena.prompts), min_width=110
            )
            ask = gr.Button("Ask this prompt", elem_id="ask", min_width=110)
        prompt = gr.Textbox(label="Prompt, drawn or your own", lines=4, max_lines=10, elem_id="prompt")
        with gr.Row():
            answers = [
                gr.Textbox(
                    label=f"Answer {side}",
                    lines=6,
                    max_lines=30,
                    elem_id=f"answer{side}",
                    interactive=False,
                    min_width=300,  # below each other on a phone
                )
                for side in SIDES
            ]
        with gr.Row(equal_height=True, elem_id="votes"):
            choices = [("A is better", "first", FIRST), ("Tie", "equal", EQUAL), ("B is better", "second", SECOND)]
            buttons = [gr.Button(text, elem_id=id, interactive=False, min_width=80) for text, id, _ in choices]
        with gr.Row(elem_id="last"):
            verdict = gr.HTML(elem_id="verdict")
            undo = gr.Button("Undo", elem_id="undo", interactive=False, scale=0, min_width=80)
        outputs = [shown, last, count, asked, prompt, verdict, undo, *answers, *buttons]

        as_it_was: dict[Any, Any] = {verdict: gr.skip()}

        def refused(reason: object) -> dict[Any, Any]:
            return {verdict: f"<p class=refused>{escape(str(reason))}</p>"}

        def voting(allowed: bool) -> dict[Any, Any]:
            return {button: gr.Button(interactive=allowed) for button in buttons}

        def start(text: str) -> Generator[dict[Any, Any]]:
            if not text.strip():
                yield refused("Write a prompt, or take the next pair.")
                return
            cleared = {
                answer: gr.Textbox("", label=f"Answer {side}") for side, answer in zip(SIDES, answers, strict=True)
            }
            yield {shown: None, asked: text, **cleared, **voting(False)}
            current = arena.round(text.strip())
            try:
                for texts in current.answers():
                    yield dict(zip(answers, texts, strict=True))
                yield {shown: current, **voting(True)}
            except UserError as error:
                yield refused(error)

        def drawn() -> Generator[dict[Any, Any]]:
            text = arena.draw()
            yield {prompt: text}
            yield from start(text)

        def follow(text: str, asked_before: str) -> Generator[dict[Any, Any]]:
            if text == asked_before:
                yield from drawn()
            else:  # somebody is writing their own
                yield as_it_was

        def cast(current: Round | None, labeler: str, cast_before: int, ranks: list[int]) -> dict[Any, Any]:
            if current is None:  # a second click on a pair that has its vote
                return as_it_was
            if not labeler.strip():
                return refused("Your name is empty: say who votes.")
            vote = current.vote(ranks, labeler.strip())
            try:
                arena.take(vote)
            except OSError as error:
                return refused(f"The vote is not saved: {error}. Mend that and vote again.")
            titles = {
                answer: gr.Textbox(label=f"Answer {side}: {model}")
                for side, answer, model in zip(SIDES, answers, vote.models, strict=True)
            }
            told = {verdict: arena.verdict(vote), undo: gr.Button(interactive=True)}
            return {shown: None, last: vote, count: cast_before + 1, **told, **titles, **voting(False)}

        def take_back_last(vote: Vote | None) -> dict[Any, Any]:
            if vote is None:
                return as_it_was
            try:
                removed = arena.take_back(vote)
            except OSError as error:
                return refused(f"The vote is not removed: {error}. Mend that and try again.")
            # not to be voted on anew: who voted has seen which model was which
            text = "Your last vote is removed." if removed else "That vote is not there any more."
            return {last: None, verdict: f"<p>{text}</p>", undo: gr.Button(interactive=False)}

        # one round at a time; other voters wait in Gradio's queue
        answering: dict[str, Any] = {
            "outputs": outputs,
            "concurrency_id": "rounds",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress": "minimal",
        }
        next_pair = [draw.click(drawn, **answering)]
        if arena.prompts:
            next_pair.append(count.change(follow, inputs=[prompt, asked], **answering))
        gr.on([ask.click, prompt.submit], start, inputs=prompt, cancels=next_pair, **answering)
        saving: dict[str, Any] = {
            "outputs": outputs,
            "concurrency_id": "votes",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress": "hidden",
        }
        for button, (*_, ranks) in zip(buttons, choices, strict=True):
            button.click(
                lambda current, labeler, cast_before, ranks=ranks: cast(current, labeler, cast_before, ranks),
                inputs=[shown, name, count],
                **saving,
            )
        undo.click(take_back_last, inputs=last, **saving)
    return blocks


def serve(blocks: gradio.Blocks, port: int) -> None:
    """On this machine alone, with nothing fetched from or sent to elsewhere, until Ctrl-C."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            theme=theme,
            css=CSS,
            head=KEYS,
        )
    except OSError as error:
        raise UserError(f"port {port} is taken; give another with --port.") from error
    print(f"http://127.0.0.1:{port}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        blocks.close(verbose=False)


def contestants(a: str, b: str) -> tuple[list[Contestant], int]:
    """The two models, and the smaller of their usual limits of new tokens: another limit each would tell them apart."""
    loaded = [load(a)]
    loaded.append(loaded[0] if a == b else load(b))
    names = [
        one.name.removeprefix("models:/")
        if one.name.startswith("models:/")
        else f"{one.name}@{hash_path(Path(one.name))[:8]}"  # a folder's content changes with the next run
        for one in loaded
    ]
    found = [Contestant(name, one.model, one.tokenizer) for name, one in zip(names, loaded, strict=True)]
    return found, min(one.max_new_tokens for one in loaded)


@ends_well(installs_gradio="make arena")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.arena",
        description="A page to vote on which of two models answers better. Votes become labels.",
    )
    parser.add_argument("a", nargs="?", help=f"{NAMES}; default: the champion, else the candidate, else policy")
    parser.add_argument("b", nargs="?", help="the other one, likewise; default: sft")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--name", help="who votes, as the page suggests it; default: git's user.name")
    parser.add_argument("--file", type=Path, default=LABELS, help=f"where votes go; the pipeline reads {LABELS}")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; default: as the models were trained")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        parser.error("--temperature must be 0 or more")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    names = arguments.a or default_model(), arguments.b or "sft"
    print(f"loading {' and '.join(names)} ...", file=sys.stderr)
    pair, usual = contestants(*names)
    if pair[0].name == pair[1].name:
        print(f"note: both are {pair[0].name}: the votes will show its noise, and no winner", file=sys.stderr)
    arena = Arena(pair, arguments.file, arguments.max_new_tokens or usual, arguments.temperature)
    serve(page(arena, arguments.name or whoami()), arguments.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
