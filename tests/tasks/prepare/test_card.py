"""The data card of a few rows counted by hand."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from tasks.params import Source, Text
from tasks.prepare.card import Findings, Unused, card, console_tables, figures, lengths_figure, write_card

HOSTILE = "<script>alert(1)</script> | *a* _b_ [c](http://d.e) `f` ~~g~~ &lt; \x1b[31m\nnext\u202eline"
COLUMNS = {
    **{"id": "a", "source": "pairs", "kind": "rankings", "split": None, "dropped": None, "prompt_tokens": 10},
    **{"response_tokens": 20, "responses": 2, "pairs": 1, "tied_pairs": 0, "labeler": "ann", "user": 0, "copies": 1},
}
NUMBERS = [name for name, value in COLUMNS.items() if isinstance(value, int)]
ROWS: list[dict[str, Any]] = [
    {"split": "reward", "tied_pairs": 1, "user": 7},
    {"split": "reward", "user": 7, "labeler": "bob"},
    {"id": "b", "split": "eval", "responses": 3, "pairs": 3, "prompt_tokens": 12, "user": 8},
    {"id": "c", "dropped": "duplicate"},
    {"id": "d", "source": "own $5_*", "kind": "demonstrations", "split": "sft", "pairs": 0, "copies": 2},
    {"id": "e", "source": "own $5_*", "kind": "demonstrations", "dropped": "too long", "response_tokens": 90_000},
    {"id": "a", "source": "asked", "kind": "prompts", "split": "reward", "labeler": None, "response_tokens": 0},
]
DAMAGED = {"source": "pairs", "file": "p.jsonl", "row": 1234, "reason": "no JSON", "field": "line", "message": HOSTILE}


def findings(rows: list[dict[str, Any]]) -> Findings:
    examples = pd.DataFrame([{**COLUMNS, "pairs": int("source" not in row), **row} for row in rows], columns=[*COLUMNS])
    return Findings(
        sources=[
            Source(kind="rankings", path="data/raw/p.jsonl", name="pairs", licence="MIT"),
            Source(kind="demonstrations", hub="us/own", revision="0a1b" * 10, split="train", name="own $5_*", weight=2),
            Source(kind="prompts", path="data/raw/数据.jsonl", name="asked"),
            Source(kind="prompts", path="data/raw/none.jsonl", name="数据"),
        ],
        files={"data/raw/p.jsonl": "d41d8cd98f00b204e9800998ecf8427e"},
        examples=examples.astype({name: "uint64" if name == "user" else "int64" for name in NUMBERS}),
        damaged=pd.DataFrame([DAMAGED, DAMAGED]),
        near_duplicates=3,
        contradictions=pd.DataFrame({"id": ["a"] * 7, "a": [HOSTILE] * 7, "b": ["no"] * 7}),
        leaks=pd.DataFrame(),
        masked={"pairs": {"email": 1234}},
        failed_checks=["too many *"],
        limits=Text(max_prompt_tokens=64, max_response_tokens=1024),
        tokenizer_fingerprint="f00d",
    )


FOUND = findings(ROWS)


def cells_of(html: str) -> list[list[str]]:
    """Every row of every table."""
    return [
        ["".join(cell.itertext()) for cell in row]
        for row in ElementTree.fromstring(f"<html>{html.replace('&nbsp;', ' ')}</html>").iter("tr")
    ]


@pytest.fixture(scope="module")
def html() -> str:
    shown: str = MarkdownIt("gfm-like", {"xhtmlOut": True, "linkify": False}).render(card(FOUND))
    return shown


def test_figures_by_hand() -> None:
    assert figures(FOUND) == {
        **{"rows": 9, "taken": 5, "written": 6, "dropped": 4, "damaged": 2, "prompts": 3, "duplicates": 1},
        **{"near_duplicates": 3, "sft": 1, "reward": 1, "ppo": 0, "eval": 1, "pairs": 5, "tied_pairs": 1},
        **{"contradictions": 7, "leaks": 0, "labelers": 2, "users": 2, "failed_checks": 1},
        **{"dropped_duplicate": 1, "dropped_no_json": 2, "dropped_too_long": 1},
        **{"dropped_from_own_5": 1, "dropped_from_pairs": 3},
        **{"taken_demonstrations": 1, "taken_prompts": 1, "taken_rankings": 3},
        **{"taken_from_asked": 1, "taken_from_own_5": 1, "taken_from_pairs": 3},
    }


@pytest.mark.parametrize(
    "row",
    [
        f"own $5_*|demonstrations|us/own train|{'0a1b' * 10}|not given|2",
        "data/raw/p.jsonl|d41d8cd98f00b204e9800998ecf8427e",
        "pairs|6|3|3|50.0%|2|3",  # read, taken, dropped, share, different prompts, written
        "own $5_*|2|1|1|50.0%|1|2",
        "数据|0|0|0|0.0%|0|0",
        "pairs|no JSON|2|33.3%",
        "own $5_*|too long|1|50.0%",
        "reward|1|33.3%|0|2|1",  # prompts, share, rows of demonstrations, of rankings, of prompts
        "ppo|0|0.0%|0|0|0",
        "pairs|reward|2|1",
        "asked|10|10|10|–|–|–",
        "ann|3|75.0%",
        "pairs|5|1|20.0%",  # pairs, ties
        "pairs|email|1,234",
    ],
)
def test_a_row_of_a_table(html: str, row: str) -> None:
    assert row.split("|") in cells_of(html)


def test_sentences(html: str) -> None:
    for sentence in (
        "9 rows were read, 5 taken and 4 dropped. What was taken has 3 different prompts.",
        "<strong>Check failed:</strong> too many *",
        "is 64 and <code>text.max_response_tokens</code> 1,024",
        "Dropped: 1 rows that are there already, 3 prompts without labels that are nearly another one of their split, "
        "0 rows whose prompt is in another split, or nearly so.",
        "Rows whose user is known: 3, of 2 users; at most 2 are of one.",
        "in two splits, by themselves or by a near-duplicate: <strong>0</strong>",
        "Fingerprint of the tokenizer and its chat template: <code>f00d</code>",
    ):
        assert sentence in html


def test_what_people_wrote_is_shown_as_text(html: str) -> None:
    shown = "<script>alert(1)</script> | *a* _b_ [c](http://d.e) `f` ~~g~~ &lt; [31m next line"
    assert ["pairs", "p.jsonl", "1,234", "no JSON", "line", shown] in cells_of(html)
    assert cells_of(html).count(["a", shown, "no"]) == 5, "of the contradictions the first"
    assert not [tag for tag in ("<script", "<a ", "<em", "<s>", "\x1b", "\u202e") if tag in html]


def test_a_long_text_is_cut() -> None:
    long = dataclasses.replace(FOUND, contradictions=pd.DataFrame({"a": ["word " * 1000]}))
    assert "word …" in card(long)
    assert len(card(long)) < len(card(FOUND)) + 500


def test_of_many_files_and_labelers_the_first() -> None:
    many = dataclasses.replace(FOUND, files={f"part-{number:04}": "0" for number in range(1025)})
    assert "part-0019" in card(many)
    assert "part-0020" not in card(many)
    assert "and 1,005 more" in card(many)


def test_a_share_that_is_not_nothing_does_not_look_like_it() -> None:
    examples = pd.concat([FOUND.examples] * 2000, ignore_index=True)
    assert r"no JSON   |      2 |                \<0.1% |" in card(dataclasses.replace(FOUND, examples=examples))


@pytest.mark.parametrize("rows", [[], [ROWS[3]], [ROWS[6]]])
def test_nothing_to_tell(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    few = dataclasses.replace(findings(rows), masked={}, contradictions=pd.DataFrame(), files={})
    write_card(tmp_path, dataclasses.replace(few, damaged=few.damaged[:0]))
    assert "## Personal data masked\n\nNone.\n" in (tmp_path / "card.md").read_text(encoding="utf-8")
    assert len(console_tables(few)) == 3


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    write_card(tmp_path / "a", FOUND)
    write_card(tmp_path / "b", dataclasses.replace(FOUND, examples=FOUND.examples[::-1]))
    names = ["card.md", "lengths.svg", "splits.svg"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert all(f"]({name})" in card(FOUND) for name in names[1:])


def test_the_longest_are_in_the_last_bar() -> None:
    figure = lengths_figure(FOUND)
    # the second source's: 10 and 10 tokens, 20 and 90,000
    bars: list[Any] = [axis.patches[0] for axis in figure.axes[2:4]]
    prompts, responses = (own.get_data().values for own in bars)
    assert prompts[[9, 7]].tolist() == [0, 2]  # 60 bars to 1.25 * 64 tokens
    assert responses[[0, -1]].tolist() == [1, 1]
    assert [list(axis.lines[0].get_xdata()) for axis in figure.axes[2:4]] == [[64, 64], [1024, 1024]]  # type: ignore[arg-type]
    plt.close(figure)


def test_columns_may_be_categories() -> None:
    kinds = dict.fromkeys(["source", "kind", "split", "dropped", "labeler"], "category")
    found = dataclasses.replace(FOUND, examples=FOUND.examples.astype(kinds))
    assert card(found) == card(FOUND)
    assert figures(found) == figures(FOUND)


def test_on_a_terminal() -> None:
    console = Console(width=120, file=io.StringIO())
    for table in console_tables(FOUND):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["own", "$5_*", "2", "1", "1", "50.0%", "1", "2"] in lines
    assert ["pairs", "no", "JSON", "2", "33.3%"] in lines
    assert ["sft", "1", "33.3%", "1", "0", "0"] in lines


def test_a_narrow_terminal_folds_names() -> None:
    names = ["comparisons_of_the_team", "comparisons_of_the_team_extra"]
    rows = [{**ROWS[0], "source": name} for name in names]
    found = dataclasses.replace(
        findings(rows), sources=[Source(kind="rankings", path="data/raw/p.jsonl", name=name) for name in names]
    )
    console = Console(width=60, file=io.StringIO())
    console.print(console_tables(found)[0])
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "…" not in shown
    first = [line[2:20].split(" ")[0] for line in shown.splitlines()]
    assert "".join(first).count("comparisons_of_the_team") == 2
    assert "".join(first).endswith("extra")


UNUSED = [Unused("rankings", 2, 4, "they are in the split ppo", "share"), Unused("demonstrations", 1, 40, "why", "so")]


def test_unused_labels_are_told_where_there_are_any() -> None:
    assert "unused" not in "".join(figures(FOUND))
    assert "no stage uses" not in card(FOUND)
    found = dataclasses.replace(FOUND, unused=UNUSED)
    assert (figures(found)["unused_rankings"], figures(found)["unused_demonstrations"]) == (2, 1)
    assert "## Labels that no stage uses" in card(found)
    assert [one.is_loss for one in UNUSED] == [True, False], "one in twenty is much"
    assert card(found).count("**Warning:** 2 of 4 rankings") == 1


def test_shared_prompts_count_for_ppo() -> None:
    found = dataclasses.replace(FOUND, share_prompts=True)
    assert (figures(found)["ppo"], figures(found)["reward"]) == (1, 1)
    assert "share\\_prompts" in card(found) or "share_prompts" in card(found)
