"""A prompt: the turns of a conversation up to where the assistant is to answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

FINGERPRINT_FILE = "tokenizer_fingerprint.txt"  # beside models and data: which tokenizer and chat template they go with

Role = Literal["system", "user", "assistant"]


class Turn(TypedDict):
    role: Role
    content: str


Conversation = list[Turn]


def single(prompt: str) -> Conversation:
    """One thing that a user says."""
    return [{"role": "user", "content": prompt}]


def text_of(prompt: Sequence[Turn]) -> str:
    """The conversation as people read it: a single user's turn as it stands, several with who speaks before each."""
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)


def key_of(prompt: Sequence[Turn]) -> str:
    """What prompts are told apart by: the same turns have the same key, and no others."""
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return json.dumps([[turn["role"], turn["content"]] for turn in prompt], ensure_ascii=False)
