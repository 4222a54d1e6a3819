"""Who may label: tokens, and how failed sign-ins are slowed down."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tasks.labels.judgments import LONGEST_NAME, labeler_name
from tasks.stage import UserError

TOKENS = "RLHF_LABEL_TOKENS"  # in the environment: ann:TOKEN,bob:TOKEN
TOKEN_FILE = Path(".rlhf/label_tokens")  # or here, a line each: `ann: TOKEN`
LOOPBACK_TOKEN = Path(".rlhf/label_token_loopback")
SESSION_KEY = Path(".rlhf/labelling/session_key")
SHORTEST = 12  # characters of a token, where others than this machine reach the page

FREE_BY_NAME, FREE_BY_ADDRESS = 2, 10  # failures before waiting begins; one address may be a whole office
LONGEST_WAIT = 30.0  # seconds
FORGET_AFTER = 3600.0  # seconds without a failure
REMEMBERED = 10_000  # names and addresses


def read_tokens(home: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """{labeler: token} of the environment, else of the file; empty where there is neither."""
    tokens: dict[str, str] = {}
    path = home / TOKEN_FILE
    if environment.get(TOKENS, "").strip():
        lines = [
            (f"{TOKENS}, entry {number}", entry) for number, entry in enumerate(environment[TOKENS].split(","), start=1)
        ]
    elif path.exists():
        if path.stat().st_mode & 0o077:
            print(f"warning: others on this machine can read {path}; `chmod 600 {path}` ends that", file=sys.stderr)
        text = path.read_text(encoding="utf-8")
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.splitlines(), start=1)]
    else:
        lines = []
    for place, line in lines:
        if not line.strip() or line.strip().startswith("#"):
            continue
        name, colon, token = line.partition(":")
        try:
            name = labeler_name(name)
        except ValueError:
            colon = ""
        if not colon or not token.strip():
            raise UserError(f"{place}: an entry is `name:token`, with a name of 1 to {LONGEST_NAME} characters.")
        if name in tokens:
            raise UserError(f"{place}: {name} has a token already; give each labeler one.")
        tokens[name] = token.strip()
    return tokens


def require_strong(tokens: Mapping[str, str], host: str) -> None:
    """Where others reach the page, everybody needs a token that cannot be guessed."""
    if not tokens:
        raise UserError(
            f"--host {host} opens the page to other machines, and nobody has a token. Set {TOKENS}=ann:TOKEN,bob:TOKEN "
            f"or write lines `ann: TOKEN` into {TOKEN_FILE} (git ignores it); `python -c 'import secrets; "
            "print(secrets.token_urlsafe())'` draws one."
        )
    weak = sorted(name for name, token in tokens.items() if len(token) < SHORTEST)
    if weak:
        raise UserError(
            f"--host {host} opens the page to other machines, and these tokens have fewer than {SHORTEST} characters: "
            f"{', '.join(weak)}. Draw them with `python -c 'import secrets; print(secrets.token_urlsafe())'`."
        )


def secret_file(path: Path) -> str:
    """What the file holds; drawn and written where there is none, for the owner's eyes alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe() + "\n")
        temporary.replace(path)
    return path.read_text(encoding="utf-8").strip()


def wait_after(failures: int, free: int) -> float:
    """Seconds to wait after so many failures: 1, 2, 4 ... up to LONGEST_WAIT; none for the first `free` ones."""
    return min(LONGEST_WAIT, 2.0 ** min(failures - free - 1, 10)) if failures > free else 0.0


@dataclass
class Door:
    """Lets labelers in. Failures are counted by name and by address; both must have waited. A name that was let in from
    an address before is not held up there by what others try."""

    tokens: Mapping[str, str]
    anyones: str | None  # a token with which everybody may sign in, on loopback
    clock: Callable[[], float] = time.monotonic
    failures: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)  # {what: (how many, when last)}
    known: set[tuple[str, str]] = field(default_factory=set)  # (name, address)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def knock(self, name: str, token: str, address: str) -> tuple[bool, float]:
        """(whether they are let in, seconds to wait before the token is even looked at); one at a time, or many
        guesses at once would all find that there is nothing to wait for."""
        with self.lock:
            wait = self.wait(name, address)
            return (False, wait) if wait > 0 else (self.try_token(name, token, address), 0.0)

    def wait(self, name: str, address: str) -> float:
        """Seconds until this name may try again from this address."""
        waits = [0.0]
        kinds = [(("both", f"{name}|{address}"), FREE_BY_NAME)]
        if (name, address) not in self.known:
            kinds += [(("name", name), FREE_BY_NAME), (("address", address), FREE_BY_ADDRESS)]
        for key, free in kinds:
            count, last = self.failures.get(key, (0, 0.0))
            waits.append(last + wait_after(count, free) - self.clock())
        return max(waits)

    def try_token(self, name: str, token: str, address: str) -> bool:
        """Whether the token is the labeler's; ask `wait` before."""
        expected = self.anyones or self.tokens.get(name)
        right = hmac.compare_digest(_digest(token), _digest(expected or secrets.token_urlsafe()))
        both, by_name, by_address = ("both", f"{name}|{address}"), ("name", name), ("address", address)
        if right:
            self.known.add((name, address))
            self.failures.pop(both, None)
            return True
        now = self.clock()
        if len(self.failures) > REMEMBERED:
            self.failures = {key: seen for key, seen in self.failures.items() if now - seen[1] < LONGEST_WAIT}
        # what others fail at elsewhere does not hold up a labeler who is known there
        counted = [both] if (name, address) in self.known else [both, by_name, by_address]
        for key in counted:
            count, last = self.failures.get(key, (0, now))
            self.failures[key] = (1 if now - last > FORGET_AFTER else count + 1, now)
        return False

    def mark(self, name: str) -> str | None:
        """A fingerprint of the labeler's token, which a session bears: with another token it ends."""
        token = self.anyones or self.tokens.get(name)
        return token and _digest(f"{name}|{token}").hex()[:16]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()
