"""How a program ends that a person started: what they can mend is one line on stderr, Ctrl-C is no error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Protocol

from tasks.stage import UserError


class Main(Protocol):
    def __call__(self, argv: list[str] | None = None) -> int: ...


def ends_well(installs_gradio: str) -> Callable[[Main], Main]:
    """installs_gradio: the command that brings what the program needs to serve its page."""

    def decorate(main: Main) -> Main:
        @wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return main(argv)
            except ModuleNotFoundError as error:
                if error.name != "gradio":
                    raise
                text = f"the page needs gradio, which is not installed; `{installs_gradio}` installs it."
            except UserError as error:
                text = str(error)
            except KeyboardInterrupt:
                return 0
            print(f"error: {text}", file=sys.stderr)
            return 2

        return run

    return decorate
