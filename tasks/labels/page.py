"""Where people write demonstrations and rank outputs: `make label`, or `python -m tasks.labels.page`.

The page hands out the queues that waiting stages opened (tasks/labels/queue.py) and appends what people say to
data/labels. Its own JavaScript (page.js) and scripts use one interface, JSON over HTTP under /api; Gradio serves the
page. The browser gets texts and places: which model wrote an output is not even known here.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import ipaddress
import math
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.middleware.sessions import SessionMiddleware

from tasks.conversations import FINGERPRINT_FILE
from tasks.labels.desk import Desk, RefusedError, Visit
from tasks.labels.judgments import Flag, Rating, labeler_name, version_of
from tasks.labels.queue import PAGE, Job
from tasks.labels.sign_in import (
    LOOPBACK_TOKEN,
    SESSION_KEY,
    TOKEN_FILE,
    TOKENS,
    Door,
    read_tokens,
    require_strong,
    secret_file,
)
from tasks.program import ends_well
from tasks.stage import UserError

if TYPE_CHECKING:
    import gradio

LOCK = Path(".rlhf/labelling/lock")
IDLE_HOURS = 8  # after which a session ends
LONGEST_BODY = 1_000_000  # bytes of a request
# what the page loads of Gradio's server; its uploads, files and proxy are for nobody
GRADIO_PATHS = ("/assets/", "/static/", "/theme.css", "/favicon.ico")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class TokenCounter:
    """Counts with the tokenizer of the model that will learn: `data/models/base` beside the queue."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tokenizers: dict[Path, tuple[str, Any]] = {}  # {folder: (fingerprint, tokenizer)}

    def __call__(self, folder: Path, text: str) -> int | None:
        base = folder / "data/models/base"
        if not (base / FINGERPRINT_FILE).exists():
            return None
        with self.lock:
            fingerprint = (base / FINGERPRINT_FILE).read_text(encoding="utf-8")
            if base not in self.tokenizers or self.tokenizers[base][0] != fingerprint:
                from tasks.models import load_tokenizer  # imports torch, which takes seconds

                self.tokenizers[base] = fingerprint, load_tokenizer(base)
            return len(self.tokenizers[base][1](text, add_special_tokens=False)["input_ids"])


# ---- what browsers and scripts send ----


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SignIn(Body):
    name: str = Field(max_length=200)
    token: str = Field(max_length=500)


class OfJob(Body):
    job: Job


class OfItem(OfJob):
    item: str = Field(max_length=64)


class Leave(OfItem):
    leaving: bool = False  # the tab closes; it may be a reload


class Text(Body):
    item: str = Field(max_length=64)
    text: str = Field(max_length=200_000)


class Judged(OfItem):
    started_at: str = Field(max_length=40)  # as it came with the item
    guidelines: Annotated[str, StringConstraints(pattern="^[0-9a-f]{12}$")]  # likewise

    @property
    def visit(self) -> Visit:
        return Visit(self.item, self.started_at, self.guidelines)


class Skip(Judged):
    reason: str = Field(max_length=1000)


class Save(Judged):
    """A demonstration has `response`; a ranking the rest, of the outputs in the order in which they came."""

    response: str | None = Field(None, max_length=200_000)
    ranks: list[Annotated[int, Field(ge=1, le=1000)]] | None = None
    flags: list[list[Flag]] | None = None
    ratings: list[Rating | None] | None = None


# ---- the interface ----


def signed_in(request: Request) -> str:
    name = request.session.get("name")
    if name is None or request.session.get("mark") != request.app.state.door.mark(name):
        raise HTTPException(401, "sign in first")
    request.session["name"] = name  # so that the cookie is sent anew: idle time is counted from here
    return str(name)


Labeler = Annotated[str, Depends(signed_in)]


def application(desk: Desk, door: Door, reach: Reach, home: Path, cookie: str, *, https: bool) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    app.state.door = door

    @app.post("/api/sign-in")
    def sign_in(body: SignIn, request: Request) -> Response:
        try:
            name = labeler_name(body.name)
        except ValueError as error:
            return refused(400, str(error))
        address = request.client.host if request.client else ""
        let_in, wait = door.knock(name, body.token.strip(), address)
        if wait:
            return refused(429, f"Too many failed sign-ins. Try again in {math.ceil(wait)} seconds.", retry_after=wait)
        if not let_in:
            return refused(403, "Name and token do not go together.", retry_after=door.wait(name, address))
        request.session["name"], request.session["mark"] = name, door.mark(name)
        return JSONResponse({"name": name})

    @app.post("/api/sign-out")
    def sign_out(labeler: Labeler, request: Request) -> dict[str, bool]:
        desk.release_all(labeler)
        request.session.clear()
        return {"signed_out": True}

    @app.get("/api/queues")
    def queues(labeler: Labeler) -> dict[str, Any]:
        return {"name": labeler, "jobs": desk.progress(labeler), "closed": desk.closed()}

    @app.get("/api/guidelines")
    def guidelines(labeler: Labeler) -> dict[str, str]:
        text = desk.guidelines()
        return {"text": text, "version": version_of(text)}

    @app.post("/api/next")
    def next_item(body: OfJob, labeler: Labeler) -> dict[str, Any]:
        found = desk.next(labeler, body.job)
        return {"item": None, "why": found} if isinstance(found, str) else found

    @app.post("/api/mine")
    def mine(body: OfJob, labeler: Labeler) -> dict[str, list[str]]:
        return {"items": desk.mine(labeler, body.job)}

    @app.post("/api/again")
    def again(body: OfItem, labeler: Labeler) -> dict[str, Any]:
        return desk.again(labeler, body.job, body.item)

    @app.post("/api/count")
    def count(body: Text, labeler: Labeler) -> dict[str, int | None]:
        return {"tokens": desk.count(labeler, body.item, body.text)}

    @app.post("/api/alive")
    def alive(body: OfItem, labeler: Labeler) -> dict[str, Any]:
        return {"held": desk.alive(labeler, body.job, body.item), "closed": desk.closed().get(body.job)}

    @app.post("/api/release")
    def release(body: Leave, labeler: Labeler) -> dict[str, bool]:
        desk.release(labeler, body.job, body.item, leaving=body.leaving)
        return {"released": True}

    @app.post("/api/save")
    def save(body: Save, labeler: Labeler) -> dict[str, bool]:
        if body.job == "demonstrate":
            if body.response is None:
                raise RefusedError("a demonstration needs `response`")
            desk.save_demonstration(labeler, body.visit, body.response)
        else:
            if body.ranks is None or body.flags is None or body.ratings is None:
                raise RefusedError("a ranking needs `ranks`, `flags` and `ratings`")
            desk.save_ranking(labeler, body.visit, body.ranks, body.flags, body.ratings)
        return {"saved": True}

    @app.post("/api/skip")
    def skip(body: Skip, labeler: Labeler) -> dict[str, bool]:
        desk.skip(labeler, body.job, body.visit, body.reason)
        return {"saved": True}

    @app.exception_handler(RefusedError)
    def not_so(_request: Request, error: Exception) -> Response:
        return refused(400, f"Not done: {error}.")

    @app.exception_handler(HTTPException)
    def not_signed_in(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refused(error.status_code, str(error.detail))

    @app.exception_handler(UserError)
    def out_of_order(_request: Request, error: Exception) -> Response:
        return refused(503, str(error))

    @app.exception_handler(OSError)
    def not_written(_request: Request, error: Exception) -> Response:
        print(f"error: {error}", file=sys.stderr)
        return refused(507, f"Not saved: {getattr(error, 'strerror', None) or error}.")

    @app.exception_handler(RequestValidationError)
    def not_understood(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return refused(400, f"{where}: {first['msg']}".encode("utf-8", "backslashreplace").decode())

    # the key outlives the server: who is signed in stays so when it starts again
    app.add_middleware(
        SessionMiddleware,
        secret_key=secret_file(home / SESSION_KEY),
        session_cookie=cookie,
        max_age=IDLE_HOURS * 3600,
        same_site="strict",
        https_only=https,
    )

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        problem = objection(request, reach)
        response = refused(*problem) if problem else await go_on(request)
        response.headers.update(HEADERS)
        if request.scope["path"].startswith("/api/"):
            response.headers["Cache-Control"] = "no-store"
        return response

    return app


def refused(status: int, message: str, retry_after: float = 0.0) -> Response:
    content: dict[str, Any] = {"error": message}
    if retry_after > 0:
        content["retry_after"] = round(retry_after, 1)
    return JSONResponse(
        content, status, headers={"Retry-After": f"{math.ceil(retry_after)}"} if retry_after > 0 else None
    )


@dataclass(frozen=True)
class Reach:
    """Under which addresses the page may be asked for."""

    names: frozenset[str]
    any_number: bool  # any IP address; no foreign site can take one for its own, as it can a name (DNS rebinding)
    public: str  # host and port of RLHF_LABEL_URL, where something passes requests on to the page

    def knows(self, host: str) -> bool:
        with contextlib.suppress(ValueError):  # neither a host nor a number
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.names or host == self.public != "":
                return True
            ipaddress.ip_address(name)
            return self.any_number
        return False


def objection(request: Request, reach: Reach) -> tuple[int, str] | None:
    """Why the request is not even looked at: it comes from another site, or is none that the page makes."""
    host, path, headers = request.headers.get("host", ""), request.scope["path"], request.headers
    if not reach.knows(host):
        return 403, "The page is not served under this host name; RLHF_LABEL_URL says under which it is."
    if "origin" in headers and headers["origin"].partition("://")[2] not in {host, reach.public} - {""}:
        return 403, "Requests from other sites are refused."
    if not path.startswith("/api/"):
        known = request.method in ("GET", "HEAD") and (path == "/" or path.startswith(GRADIO_PATHS))
        return None if known else (404, "There is nothing here.")
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return 403, "Requests from other sites are refused."
    return malformed(request) if request.method == "POST" else None


def malformed(request: Request) -> tuple[int, str] | None:
    """A form of another site could send no JSON, and nobody needs to send much of it."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return 415, "Send JSON with content-type: application/json."
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > LONGEST_BODY:
        return 413, f"A request has a content-length of at most {LONGEST_BODY} bytes."
    return None


# ---- the page ----


def blocks() -> gradio.Blocks:
    """An empty page of Gradio's; page.js fills it."""
    import gradio as gr

    with gr.Blocks(title="Labels", analytics_enabled=False, fill_width=True) as page:
        gr.HTML('<div id="label"><noscript>This page needs JavaScript.</noscript></div>')
    return page


def add_page(app: FastAPI) -> None:
    import gradio as gr

    here = Path(__file__).parent
    gr.mount_gradio_app(
        app,
        blocks(),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=(here / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(here / 'page.js').read_text(encoding='utf-8')}</script>",
    )


def reach_of(host: str, url: str) -> Reach:
    own = {"localhost", "127.0.0.1", "::1", host, socket.gethostname(), socket.getfqdn()}
    return Reach(frozenset(own), not is_loopback(host), urlsplit(url).netloc)


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """One page at a time hands out the queues of a folder; the lock goes with the process, however it ends."""
    path = home / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another page hands out the queues of this folder; two would give one item to two people. "
                "Use that one, or end it with Ctrl-C first."
            ) from None
        yield


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Until Ctrl-C. No request is logged."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1, server_header=False)
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


@ends_well(installs_gradio="make label")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.labels.page",
        description="A page where people write demonstrations and rank outputs, for stages that wait for them.",
        epilog=f"Tokens: {TOKENS}=ann:TOKEN,bob:TOKEN in the environment, or lines `ann: TOKEN` in {TOKEN_FILE}. "
        "RLHF_LABEL_URL is the address under which labelers reach the page, where it is not this machine's.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to other machines, which needs tokens")
    parser.add_argument("--port", type=int, default=urlsplit(PAGE).port, help="%(default)s where nothing is said")
    parser.add_argument(
        "--hold-minutes",
        type=float,
        default=30.0,
        help="how long an item stays with a labeler who gives no sign of life (default: %(default)g)",
    )
    arguments = parser.parse_args(argv)
    if not 0 < arguments.hold_minutes < 1e6:
        parser.error("--hold-minutes must be more than 0")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    run(Path(), arguments.host, arguments.port, arguments.hold_minutes * 60)
    return 0


def run(home: Path, host: str, port: int, hold: float) -> None:
    url = os.environ.get("RLHF_LABEL_URL", "")
    if url and not (urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname):
        raise UserError(f"RLHF_LABEL_URL is `{url}`; write it whole, as https://label.example.")
    tokens = read_tokens(home)
    for reached in (host, urlsplit(url).hostname):
        if reached and not is_loopback(reached):
            require_strong(tokens, reached)
    with alone(home), listening(host, port) as listener:
        anyones = None if tokens else secret_file(home / LOOPBACK_TOKEN)
        count_tokens = TokenCounter()
        desk = Desk(home, hold, count_tokens)
        desk.guidelines()
        if not desk.progress(""):
            print(
                "note: no queue is open. With demonstrate.labeler or rank.labeler set to human in params.yaml, "
                "`make run` opens one; the page shows it by itself.",
                file=sys.stderr,
            )
        if count_tokens(home, "") is None:  # loads the tokenizer, which takes seconds, before anybody waits for it
            import tasks.models  # noqa: F401, most of these seconds; a run in a workspace may bring its tokenizer later
        door, reach, cookie = Door(tokens, anyones), reach_of(host, url), f"label_{port}"
        app = application(desk, door, reach, home, cookie, https=url.startswith("https:"))
        add_page(app)
        address = url or f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        # behind the # it is in no log: browsers keep that part to themselves
        print(address + (f"#token={anyones}" if anyones else ""), flush=True)
        serve(app, listener)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is taken; give another with --port.") from error
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror or error}.") from error
    with listener:
        yield listener


if __name__ == "__main__":
    sys.exit(main())
