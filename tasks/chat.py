"""Talk to a model in the terminal: `python -m tasks.chat models:/policy@champion`, or a folder such as data/models/sft.

The answer appears as it is written; what was said before goes along with each prompt. /new forgets it, /quit (or
Ctrl-D) ends.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Generator
from pathlib import Path
from threading import Thread
from typing import Any

from tasks.stage import UserError
from tasks.tracking import masked, tracking_uri

Message = dict[str, str]  # {"role": "user" or "assistant", "content": ...}


class Chat:
    """A conversation with a causal language model that has a chat template."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.history: list[Message] = []

    def say(self, text: str) -> Generator[str]:
        """The answer, piece by piece. It joins the history once it is complete, or as far as the caller took it."""
        from transformers import GenerationConfig, TextIteratorStreamer

        turns = self.fitting([*self.history, {"role": "user", "content": text}])
        streamer: Any = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampled = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.temperature > 0 else {}
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            **sampled,
        )
        stop = _Stop()
        batch = self.encode(turns)
        failures: list[Exception] = []

        def write() -> None:
            try:
                self.model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=[stop],
                )
            except Exception as error:  # told by the caller's thread, which waits for pieces
                failures.append(error)
                streamer.end()

        writer = Thread(target=write, daemon=True)
        writer.start()
        answer = ""
        try:
            for piece in streamer:
                answer += piece
                yield piece
        finally:
            stop.now = True
            writer.join()
            self.history = [*turns, {"role": "assistant", "content": answer.strip()}]
        if failures:
            self.history = turns[:-1]
            raise UserError(f"the model gave no answer: {type(failures[0]).__name__}: {failures[0]}")

    def encode(self, turns: list[Message]) -> Any:
        """The conversation up to where the assistant begins."""
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")

    def fitting(self, turns: list[Message]) -> list[Message]:
        """Without the oldest turns, where the conversation has grown too long. UserError where the last one has."""
        room = getattr(self.model.config, "max_position_embeddings", sys.maxsize) - self.max_new_tokens
        while (length := self.encode(turns).input_ids.shape[1]) > room:
            if len(turns) == 1:
                raise UserError(f"that is {length} tokens, and the model takes {room}.")
            turns = turns[2:]
        return turns


class _Stop:
    """Ends a generation from outside: transformers asks it after each token."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, ids: Any, _scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((len(ids),), self.now, device=ids.device)


def load(name: str) -> tuple[Any, Any, int]:
    """(model, tokenizer, its usual limit of new tokens) of a registered version or of a folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not name.startswith("models:/"):
        from tasks.models import load_language_model, load_tokenizer

        if not (Path(name) / "config.json").exists():
            raise UserError(f"{name} is no model folder; give one, or a registered version: models:/policy@champion.")
        return load_language_model(Path(name)), load_tokenizer(Path(name)), 256
    import mlflow
    from mlflow.exceptions import MlflowException

    from tasks.tracking import connect

    try:
        connect()  # with its short time-outs
        mlflow.set_tracking_uri(tracking_uri())
        loaded = mlflow.pyfunc.load_model(name).unwrap_python_model()
    except (MlflowException, OSError, ValueError) as error:
        raise UserError(f"{name} from MLflow at {masked(tracking_uri())}: {masked(str(error))}") from error
    if loaded.config["kind"] != "language":
        raise UserError(f"{name} is a reward model: it scores answers, and gives none.")
    return loaded.model, loaded.tokenizer, int(loaded.config["max_new_tokens"])


def converse(chat: Chat) -> None:
    while True:
        try:
            text = input("you> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input("...> ")
        except EOFError:
            print()
            return
        text = text.strip()
        if text == "/quit":
            return
        if text == "/new":
            chat.history.clear()
            print("(a new conversation)")
        elif text:
            print("model> ", end="", flush=True)
            # Ctrl-C ends the answer, not the conversation
            with contextlib.suppress(KeyboardInterrupt), contextlib.closing(chat.say(text)) as pieces:
                try:
                    for piece in pieces:
                        print(piece, end="", flush=True)
                except UserError as error:
                    print(f"error: {error}", end="")
            print()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.chat", description="Talk to a model in the terminal.")
    parser.add_argument("model", help="models:/policy@champion, models:/policy/3, or a folder such as data/models/sft")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; default: as the model was trained")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        parser.error("--temperature must be 0 or more")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input()
    try:
        print(f"loading {arguments.model} ...", file=sys.stderr)
        model, tokenizer, usual = load(arguments.model)
        print(
            "/new starts over, /quit or Ctrl-D ends, Ctrl-C cuts an answer short; after \\ a line goes on in the next",
            file=sys.stderr,
        )
        converse(Chat(model, tokenizer, arguments.max_new_tokens or usual, arguments.temperature))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
