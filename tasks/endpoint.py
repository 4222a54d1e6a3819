"""Questions to a language model behind any OpenAI-compatible endpoint.

Each answer is kept on disk under the hash of its request: what was asked once is not asked again, by whichever run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from tqdm import tqdm

from tasks.datasets import Row
from tasks.stage import UserError

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError

    from tasks.params import Judge

RETRIES = 4  # where the server is busy, fails or is not there; the client waits 0.5 s, then twice as long each time
TIMEOUT = 120.0  # seconds for one answer: a local model on a CPU takes its time
NO_KEY = "none"  # local servers ask for none, and the client does not go without

ADVICE = "Check judge.model and judge.endpoint in params.yaml; an address mostly ends in /v1."


class Kept(Row):
    """A file of the cache."""

    answer: str


class Endpoint:
    """Takes questions, gives answers in the same order."""

    def __init__(self, settings: Judge, seed: int, cache: Path) -> None:
        self.settings = settings
        self.cache = cache
        options = {"seed": seed} | settings.model_dump()["sampling"]
        self.options = {name: value for name, value in options.items() if value is not None}

    def answers(self, questions: Sequence[str]) -> list[str]:
        """UserError where the endpoint cannot be reached or refuses."""
        from openai import OpenAI  # takes a second, and most runs ask nobody

        self.cache.mkdir(parents=True, exist_ok=True)
        distinct = list(dict.fromkeys(questions))
        with (
            OpenAI(base_url=self.settings.endpoint, api_key=api_key(), max_retries=RETRIES, timeout=TIMEOUT) as client,
            ThreadPool(self.settings.concurrency) as pool,  # its threads keep no stage from ending, as executors' do
        ):
            given = pool.imap(partial(self._answer, client), distinct)
            found = list(tqdm(given, total=len(distinct), desc="judge", unit="answer"))
        by_question = dict(zip(distinct, found, strict=True))
        return [by_question[question] for question in questions]

    def _answer(self, client: OpenAI, question: str) -> str:
        request = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": question}],
            **self.options,
        }
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        file = self.cache / f"{digest}.json"
        try:
            return Kept.model_validate_json(file.read_bytes()).answer
        except (FileNotFoundError, ValidationError):  # not asked yet, or the disk has damaged it
            kept = Kept(answer=self._ask(client, request))
        temporary = self.cache / f".tmp-{file.name}"
        temporary.write_text(kept.model_dump_json(), encoding="utf-8")
        temporary.replace(file)
        return kept.answer

    def _ask(self, client: OpenAI, request: dict[str, Any]) -> str:
        from openai import OpenAIError

        try:
            completion = client.chat.completions.create(**request)
        except (OpenAIError, json.JSONDecodeError) as error:
            raise UserError(self._explain(error, client.api_key)) from None
        if not getattr(completion, "choices", None):  # a page of a web server, which the client hands over as a text
            raise UserError(f"{self._where} does not answer as an OpenAI-compatible server. {ADVICE}")
        content = completion.choices[0].message.content or ""
        return content.encode(errors="replace").decode()  # half a character, where max_tokens has cut one, is no UTF-8

    @property
    def _where(self) -> str:
        return f"the judge at {self.settings.endpoint}"

    def _explain(self, error: OpenAIError | json.JSONDecodeError, key: str) -> str:
        """One message, without the key, which some servers repeat."""
        import openai

        said = str(error.__cause__ or error)
        if isinstance(error, openai.APIStatusError):  # its own text leaves out what it does not know
            said = f"{error.status_code}: {error.body}"
        reason = " ".join(said.replace(key, "***").split())[:300]
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return f"{self._where} refuses the key ({reason}). Set RLHF_JUDGE_API_KEY to one that it takes."
            case openai.NotFoundError():
                return f"{self._where} does not know the model `{self.settings.model}` ({reason}). {ADVICE}"
            case openai.APIConnectionError():
                return (
                    f"{self._where} cannot be reached ({reason}). Start it, or check judge.endpoint in params.yaml; "
                    "null there does without a judge. What was answered is kept."
                )
            case _:
                return f"{self._where} does not answer ({reason}). What was answered is kept: run again to go on."


def api_key() -> str:
    """From the environment: a key stands in no file and in no record. Under a name of our own, for OPENAI_API_KEY would
    go to whichever address a params.yaml names."""
    key = (os.environ.get("RLHF_JUDGE_API_KEY") or NO_KEY).strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("RLHF_JUDGE_API_KEY has a character that no key has; set it again.")
    return key
