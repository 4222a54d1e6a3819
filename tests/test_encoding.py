"""Text is UTF-8 whatever the locale says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRODUCT = sorted(file for part in ("flows", "tasks") for file in (ROOT / part).rglob("*.py"))
BINARY = ("rb", "wb", "ab", "xb", "a+b", "r+b", "w+b")


def in_the_locale_s(source: str) -> Iterator[int]:
    """The lines where text is read or written in the locale's encoding, for want of another."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        called = ast.unparse(call.func)
        name = called.rpartition(".")[2]
        parts = [part for argument in (*call.args, *call.keywords) for part in ast.walk(argument)]
        binary = any(isinstance(part, ast.Constant) and part.value in BINARY for part in parts)
        opens = name in ("open", "fdopen") and called != "os.open" and not binary
        texts = name in ("read_text", "write_text") or given.get("text") == "True"
        if (opens or texts) and "encoding" not in given:
            yield call.lineno


def test_no_file_and_no_output_is_read_in_the_locale_s_encoding() -> None:
    found = {str(file.relative_to(ROOT)): list(in_the_locale_s(file.read_text(encoding="utf-8"))) for file in PRODUCT}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_what_is_found() -> None:
    right = [
        'p.open("rb")',
        'open(p, encoding="x")',
        "os.open(p, 0)",
        'p.open("rb" if x else "ab")',
        'p.read_text(encoding="x")',
        'label(text="b")',
    ]
    wrong = ["p.open()", 'open(p, "w")', "p.read_text()", "p.write_text(t)", "run(c, text=True)", 'os.fdopen(f, "w")']
    assert list(in_the_locale_s("\n".join(right))) == []
    assert list(in_the_locale_s("\n".join(wrong))) == [*range(1, 7)]
