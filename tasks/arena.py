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
from tasks.labels.label_file import append, recorded
from tasks.lineage import hash_path
from tasks.registry import whoami
from tasks.stage import UserError

if TYPE_CHECKING:
    import gradio

LABELS = Path("data/labels/arena.jsonl")
PROMPTS = Path("data/prepared/prompts/reward.jsonl")  # to draw from: labels of held-out ones would be a leak
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

    def verdict(self, vote: Vote) -> str:
        """HTML: which model was which, and how the two stand."""
        names = [contestant.name for contestant in self.contestants]
        wins, ties = tally(self.votes, names)
        left, right = (escape(name) for name in vote.models)
        same = " It was one model against itself: what you saw is its noise." if left == right else ""
        score = ", ".join(f"<b>{escape(name)}</b> {count}" for name, count in wins.items())
        return (
            f"<p>Saved. Answer 1 was <b>{left}</b>, answer 2 <b>{right}</b>.{same}</p>"
            f"<p>Wins so far: {score}; ties: {ties}.</p>"
        )


def words_of(text: str) -> str:
    """The text without the white space that a text field may change."""
    return " ".join(text.split())


CSS = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto !important}
#verdict .refused {color: var(--error-text-color)}
#verdict {overflow-wrap: anywhere}
"""
# 1, 2 and 0 or = vote, but not while a text is being written
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  const id = {"1": "first", "0": "equal", "=": "equal", "2": "second"}[event.key];
  if (!id || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea:enabled")) return;
  document.getElementById(id).click();
});
</script>"""


def page(arena: Arena, labeler: str) -> gradio.Blocks:
    import gradio as gr

    blocks = gr.Blocks(title="Arena", analytics_enabled=False, fill_width=True)
    with blocks:
        shown = gr.State()  # the round that can be voted on; Gradio keeps it on the server
        gr.HTML(
            "<h1>Which answer is better?</h1>"
            "<p>Two models answer one prompt. Your vote is saved as a label; then you see which model was which.</p>"
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=240):
                prompt = gr.Textbox(label="Prompt", lines=7, max_lines=16, elem_id="prompt")
            with gr.Column(scale=1, min_width=200):
                name = gr.Textbox(labeler, label="Your name", elem_id="name", max_lines=1)
                draw = gr.Button("Draw a prompt", elem_id="draw", interactive=bool(arena.prompts))
                ask = gr.Button("Ask both models", elem_id="ask", variant="primary")
        with gr.Row():
            answers = [
                gr.Textbox(label=f"Answer {n}", lines=8, max_lines=30, elem_id=f"answer{n}", interactive=False)
                for n in (1, 2)
            ]
        with gr.Row(equal_height=True):
            choices = [("1 is better", "first", FIRST), ("Equal", "equal", EQUAL), ("2 is better", "second", SECOND)]
            buttons = [gr.Button(text, elem_id=id, interactive=False, min_width=90) for text, id, _ in choices]
        gr.HTML("<small>Or by key: 1, 0 or =, 2</small>")
        verdict = gr.HTML(elem_id="verdict")

        def refused(reason: object) -> dict[Any, Any]:
            return {verdict: f"<p class=refused>{escape(str(reason))}</p>"}

        def voting(allowed: bool) -> dict[Any, Any]:
            return {button: gr.Button(interactive=allowed) for button in buttons}

        def start(text: str) -> Generator[dict[Any, Any]]:
            if not text.strip():
                yield refused("Write a prompt, or draw one.")
                return
            cleared = {answer: gr.Textbox("", label=f"Answer {n}") for n, answer in enumerate(answers, start=1)}
            yield {shown: None, verdict: "", **cleared, **voting(False)}
            current = arena.round(text.strip())
            try:
                for texts in current.answers():
                    yield dict(zip(answers, texts, strict=True))
                yield {shown: current, **voting(True)}
            except UserError as error:
                yield refused(error)

        def cast(current: Round | None, labeler: str, ranks: list[int]) -> dict[Any, Any]:
            if current is None:
                return refused("There are no answers to vote on; ask first.")
            if not labeler.strip():
                return refused("Your name is empty: say who votes.")
            vote = current.vote(ranks, labeler.strip())
            try:
                arena.take(vote)
            except OSError as error:
                return refused(f"The vote is not saved: {error}. Mend that and vote again.")
            titles = {
                answer: gr.Textbox(label=f"Answer {n}: {model}")
                for n, answer, model in zip((1, 2), answers, vote.models, strict=True)
            }
            return {shown: None, verdict: arena.verdict(vote), **titles, **voting(False)}

        draw.click(arena.draw, outputs=prompt, api_visibility="private")
        # one round at a time; other voters wait in Gradio's queue
        gr.on(
            [ask.click, prompt.submit],
            start,
            inputs=prompt,
            outputs=[shown, verdict, *answers, *buttons],
            concurrency_limit=1,
            api_visibility="private",
            show_progress="minimal",
        )
        for button, (*_, ranks) in zip(buttons, choices, strict=True):
            button.click(
                lambda current, labeler, ranks=ranks: cast(current, labeler, ranks),
                inputs=[shown, name],
                outputs=[shown, verdict, *answers, *buttons],
                concurrency_id="votes",
                concurrency_limit=1,
                api_visibility="private",
                show_progress="hidden",
            )
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
    try:
        names = arguments.a or default_model(), arguments.b or "sft"
        print(f"loading {' and '.join(names)} ...", file=sys.stderr)
        pair, usual = contestants(*names)
        if pair[0].name == pair[1].name:
            print(f"note: both are {pair[0].name}: the votes will show its noise, and no winner", file=sys.stderr)
        arena = Arena(pair, arguments.file, arguments.max_new_tokens or usual, arguments.temperature)
        serve(page(arena, arguments.name or whoami()), arguments.port)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        print("error: the page needs gradio, which is not installed; `make arena` installs it.", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
