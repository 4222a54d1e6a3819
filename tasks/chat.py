"""Talk to a model in the terminal: `python -m tasks.chat policy@champion`, or `sft`, or the folder of any model.

Without a name: the champion, else the newest candidate, else data/models/policy.

The answer appears as it is written; what was said before goes along with each prompt. /model NAME goes on with another
model, /model alone lists what there is, /new forgets what was said, /quit (or Ctrl-D) ends.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import json
import math
import re
import sys
from collections.abc import Generator
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from tasks import registry
from tasks.conversations import Conversation, Turn
from tasks.stage import UserError
from tasks.tracking import connect, masked, mlflow_told, tracking_uri

MODELS = Path("data/models")
OF_THIS_WORKSPACE = ("base", "sft", "policy")  # folders there
NAMES = "base, sft, policy, champion, policy/3, policy@candidate, or a model's folder"
FOLDER_LIMIT = 256  # new tokens of an answer; a registered version says its own


class Chat:
    """A conversation with a causal language model that has a chat template."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.history: Conversation = []
        self.ended = False  # whether the last answer ends with the end token

    def say(self, text: str) -> Generator[str]:
        """The answer to what was said so far and this, piece by piece."""
        turn: Turn = {"role": "user", "content": text}
        yield from self.reply(self.fitting([*self.history, turn]))

    def reply(self, turns: Conversation) -> Generator[str]:
        """The answer to a conversation, piece by piece. Both are the history once it is complete, or as far as the
        caller took it. UserError where the conversation is too long."""
        from transformers import GenerationConfig, TextIteratorStreamer

        batch = self.encode(turns)
        if (length := batch.input_ids.shape[1]) > self.room:
            raise UserError(f"that is {length} tokens, and the model takes {self.room}.")
        streamer: Any = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampled = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.temperature > 0 else {}
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            **sampled,
        )
        stop = _Stop()
        failures: list[Exception] = []
        self.ended = False

        def write() -> None:
            try:
                ids = self.model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=[stop],
                )
                self.ended = bool(ids[0, -1] == self.tokenizer.eos_token_id)
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

    @property
    def room(self) -> int:
        """Tokens that a conversation may have."""
        most: int = getattr(self.model.config, "max_position_embeddings", sys.maxsize)
        return most - self.max_new_tokens

    def encode(self, turns: Conversation) -> Any:
        """The conversation up to where the assistant begins."""
        from tasks.models import chat_text

        return self.tokenizer(chat_text(self.tokenizer, turns), add_special_tokens=False, return_tensors="pt")

    def fitting(self, turns: Conversation) -> Conversation:
        """Without the oldest turns, where the conversation has grown too long."""
        while len(turns) > 1 and self.encode(turns).input_ids.shape[1] > self.room:
            turns = turns[2:]
        return turns


class _Stop:
    """Ends a generation from outside: transformers asks it after each token."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, ids: Any, _scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((len(ids),), self.now, device=ids.device)


class Loaded(NamedTuple):
    name: str  # in full: data/models/sft, models:/policy/3
    model: Any
    tokenizer: Any
    max_new_tokens: int  # its usual limit


def load(name: str) -> Loaded:
    """The language model that a name stands for (`pinned`); UserError where there is none, or it cannot be loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = pinned(name)
    return load_version(name) if name.startswith("models:/") else load_folder(name)


def pinned(name: str) -> str:
    """What a name stands for now, in full: `sft` data/models/sft, `champion` or `policy@champion` models:/policy/3."""
    if name in OF_THIS_WORKSPACE:
        return str(MODELS / name)
    if name == registry.CHAMPION:
        name = f"policy@{name}"
    if re.fullmatch(r"[\w.-]+(/\d+|@[\w.-]+)", name) and not Path(name).exists():
        name = f"models:/{name}"
    if not name.startswith("models:/"):
        return name
    from mlflow.exceptions import MlflowException

    try:
        version = registry.resolve(connect(), name, models=("policy", *registry.COMPANIONS))
    except (MlflowException, OSError) as error:
        raise UserError(f"{name} from MLflow at {masked(tracking_uri())}: {masked(str(error))}") from error
    return f"models:/{version.name}/{version.version}"


def default_model() -> str:
    """The champion, else the newest candidate, else what PPO wrote here; says which on stderr."""
    try:
        with mlflow_told():
            client = connect()
            for alias in (registry.CHAMPION, registry.CANDIDATE):
                if version := registry.with_alias(client, alias):
                    print(f"policy/{version.version}, the {alias}", file=sys.stderr)
                    return f"models:/policy/{version.version}"
        print("no policy is registered: data/models/policy", file=sys.stderr)
    except UserError as error:
        print(f"data/models/policy, for registered ones cannot be had: {error}", file=sys.stderr)
    return "policy"


def load_folder(name: str) -> Loaded:
    from safetensors import SafetensorError

    from tasks.models import load_language_model, load_tokenizer

    folder = Path(name)
    try:
        kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
        if any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise UserError(f"{name} is a reward or value model: it scores answers, and gives none.")
        return Loaded(name, load_language_model(folder), load_tokenizer(folder), FOLDER_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(no_model(name, Path(error.filename or "a file").name)) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_version(name: str) -> Loaded:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        connect()  # with its short time-outs
        mlflow.set_tracking_uri(tracking_uri())
        loaded = mlflow.pyfunc.load_model(name).unwrap_python_model()
    except (MlflowException, OSError, ValueError) as error:
        raise UserError(f"{name} from MLflow at {masked(tracking_uri())}: {masked(str(error))}") from error
    if loaded.config["kind"] != "language":
        raise UserError(f"{name} is a reward model: it scores answers, and gives none.")
    return Loaded(name, loaded.model, loaded.tokenizer, int(loaded.config["max_new_tokens"]))


def no_model(name: str, missing: str) -> str:
    """A message: nothing is called that; the nearest name, and what there is. missing: a file of the folder."""
    names, lost = known_models()
    no = f"{name} is no model folder ({missing} is missing)." if "/" in name else f"there is no model `{name}`."
    near = difflib.get_close_matches(name, [*names, registry.CHAMPION], n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    there = ", ".join(f"{one} ({aliases})" if aliases else one for one, aliases in names.items())
    known = f"There are {there}; or a model's folder." if there else "There is no model yet: `make run` makes them."
    return f"{no}{hint} {known} {lost}".rstrip()


def known_models() -> tuple[dict[str, str], str]:
    """({name: its aliases} of the folders of this workspace and of the registered language models, newest first; why
    the registered ones are not there, or "")"""
    names = {name: "" for name in OF_THIS_WORKSPACE if (MODELS / name / "config.json").exists()}
    try:
        with mlflow_told():
            client = connect()
            return names | registry.known(client) | registry.known(client, "sft"), ""
    except UserError as error:
        return names, f"(registered versions are not listed: {error})"


def show_models(current: str) -> None:
    """What `/model NAME` takes; a star at the current one, whose name is given in full."""
    names, lost = known_models()
    if lost:
        print(lost)
    in_full = {name: f"models:/{name}" if "/" in name else str(MODELS / name) for name in names}
    for name, aliases in names.items():
        print(f"{'*' if in_full[name] == current else ' '} {name:<12} {aliases}".rstrip())
    if current not in in_full.values():
        print(f"* {current}")


def start(name: str, at_most: int | None, temperature: float) -> tuple[Chat, str]:
    """A conversation and its model's name in full. The chat alone holds the model, so that `switch` can free it."""
    loaded = load(name)
    return Chat(loaded.model, loaded.tokenizer, at_most or loaded.max_new_tokens, temperature), loaded.name


def converse(chat: Chat, current: str, at_most: int | None) -> None:
    """Until the user ends it. current: the model's name in full; at_most: new tokens of any model's answer."""
    while True:
        try:
            text = input("you> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input("...> ")
        except EOFError:
            print()
            return
        text = text.strip()
        command, _, name = text.partition(" ")
        if text == "/quit":
            return
        if text == "/new":
            chat.history.clear()
            print("(a new conversation)")
        elif text == "/model":
            show_models(current)
        elif command == "/model":
            try:
                current = switch(chat, name.strip(), at_most)
                print(f"({current} answers from here on; it is given what was said before, /new starts over)")
            except UserError as error:
                print(f"error: {error}\n({current} stays)")
        elif re.fullmatch(r"/\w+", command):
            print(f"error: {command} is no command; there are /model, /new and /quit.")
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


def switch(chat: Chat, name: str, at_most: int | None) -> str:
    """Let another model go on with the conversation; its name in full. One that cannot be loaded changes nothing."""
    loaded = load(name)
    chat.model, chat.tokenizer = loaded.model, loaded.tokenizer
    chat.max_new_tokens = at_most or loaded.max_new_tokens
    gc.collect()  # the old model's modules refer to each other
    return loaded.name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.chat",
        description="Talk to a model in the terminal.",
        epilog="In the conversation, /model NAME goes on with another model and /model lists what there is.",
    )
    parser.add_argument("model", nargs="?", help=f"{NAMES}; default: the champion, else the candidate, else policy")
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
        wanted = arguments.model or default_model()
        print(f"loading {wanted} ...", file=sys.stderr)
        chat, name = start(wanted, arguments.max_new_tokens, arguments.temperature)
        print(
            "/new starts over, /quit or Ctrl-D ends, Ctrl-C cuts an answer short; after \\ a line goes on in the next\n"
            "/model NAME goes on with another model (sft, champion, policy/3, ...), /model lists what there is",
            file=sys.stderr,
        )
        converse(chat, name, arguments.max_new_tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
