"""The data card: what the data are, what became of every row, and how they are split, for people to read.

`card.md` with its plots, tables on the terminal, and the stage's figures. The same data give the same bytes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas.api.types import is_float_dtype, is_integer_dtype
from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text as TerminalText

from tasks.figures import Histogram, histograms, shares, svg
from tasks.params import Kind, Source, SplitName, Text

KINDS: tuple[str, ...] = get_args(Kind)
SPLITS: tuple[str, ...] = get_args(SplitName)
COLOURS = {"sft": "#1f77b4", "reward": "#ff7f0e", "ppo": "#d62728", "eval": "#2ca02c", "dropped": "#cccccc"}
BINS = 60
SHOWN = 20  # rows of a table of files or people
EXAMPLES = 5
LONGEST_CELL = 200  # characters
NOTHING = "–"
LARGE = 0.05  # share of the labels of a kind


@dataclass(frozen=True)
class Findings:
    """What is known of the data when all of them have been gone through.

    examples: a row an example that could be read, with the columns id (of the prompt), source, kind, split (missing
    where dropped), dropped (the reason; missing where taken), prompt_tokens (0: not counted), response_tokens (of the
    longest response; 0 where there is none), pairs, tied_pairs, labeler (missing where there is none), user (0:
    unknown), copies (that the weight of its source asks for).
    damaged: a row one that could not be read, with the columns source, file, row, reason, field, message.
    """

    sources: Sequence[Source]  # each with its name
    files: Mapping[str, str]  # {path: MD5}
    examples: pd.DataFrame
    damaged: pd.DataFrame
    near_duplicates: int  # prompts that go with another one as nearly the same
    contradictions: pd.DataFrame  # a row a pair of responses that was ranked both ways
    leaks: pd.DataFrame  # a row a prompt that stands in two splits, or nearly so
    masked: Mapping[str, Mapping[str, int]]  # {source: {"email": how many}}
    failed_checks: Sequence[str]
    limits: Text
    tokenizer_fingerprint: str
    unused: Sequence[Unused] = ()
    share_prompts: bool = False  # PPO takes the prompts of the split reward too


class Unused(NamedTuple):
    """Labels that came with the data, and that no stage will read."""

    kind: str
    rows: int
    of: int  # all of the kind that were taken
    why: str
    advice: str = ""  # none where it is as it should be

    @property
    def is_loss(self) -> bool:
        return bool(self.advice) and self.rows > LARGE * self.of

    def __str__(self) -> str:
        text = f"{self.rows:,} of {self.of:,} {self.kind} are not used: {self.why}"
        return f"{text}; {self.advice}" if self.advice else text


class Table(NamedTuple):
    title: str
    frame: pd.DataFrame  # columns of integers are counts, of floats shares, all others texts
    most: int | None = None  # rows to show


def write_card(folder: Path, found: Findings) -> None:
    """Write card.md and its plots, lengths.svg and splits.svg; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.md").write_text(card(found), encoding="utf-8")
    for name, figure in (("lengths", lengths_figure(found)), ("splits", splits_figure(found))):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # in a source's name
            (folder / f"{name}.svg").write_text(svg(figure), encoding="utf-8")


def console_tables(found: Findings) -> list[TerminalTable]:
    """What was taken, what was dropped and why, what was masked, and the splits."""
    tables = (taken_table(found), dropped_table(found), masked_table(found), splits_table(found))
    return [on_terminal(table) for table in tables if len(table.frame)]


def figures(found: Findings) -> dict[str, int]:
    """For metrics.json: the section `prepare`."""
    taken, dropped = taken_rows(found), dropped_rows(found)
    prompts = prompts_by_split(found)
    counts = {
        "rows": len(found.examples) + len(found.damaged),
        "taken": len(taken),
        "written": int(taken["copies"].sum()),
        "dropped": len(dropped),
        "damaged": len(found.damaged),
        "prompts": taken["id"].nunique(),
        "duplicates": int((dropped["reason"] == "duplicate").sum()),
        "near_duplicates": found.near_duplicates,
        **{name: int(prompts.get(name, 0)) for name in SPLITS},
        "pairs": int(taken["pairs"].sum()),
        "tied_pairs": int(taken["tied_pairs"].sum()),
        "contradictions": len(found.contradictions),
        "leaks": len(found.leaks),
        "labelers": taken["labeler"].nunique(),
        "users": len(rows_of_users(taken)),
        "failed_checks": len(found.failed_checks),
    }
    for prefix, names in (
        ("dropped", dropped["reason"]),
        ("dropped_from", dropped["source"]),
        ("taken", taken["kind"]),
        ("taken_from", taken["source"]),
    ):
        for name, count in names.astype(str).value_counts(sort=False).sort_index().items():
            key = f"{prefix}_{re.sub('[^a-z0-9]+', '_', str(name).lower()).strip('_')}"
            counts[key] = counts.get(key, 0) + int(count)  # two names may differ in signs alone
    for one in found.unused:
        counts[f"unused_{one.kind}"] = counts.get(f"unused_{one.kind}", 0) + one.rows
    return counts


def prompts_by_split(found: Findings) -> pd.Series[int]:
    """Distinct prompts that each split has."""
    taken = taken_rows(found)
    counts = taken.groupby("split", observed=True)["id"].nunique().reindex(SPLITS, fill_value=0)
    if found.share_prompts:
        counts["ppo"] = taken.loc[taken["split"].isin(["reward", "ppo"]), "id"].nunique()
    return counts


def card(found: Findings) -> str:
    """As Markdown."""
    counts, taken = figures(found), taken_rows(found)
    users = rows_of_users(taken)
    sections: dict[str, list[str | Table]] = {
        "# Data card": [
            f"{counts['rows']:,} rows were read, {counts['taken']:,} taken and {counts['dropped']:,} dropped. What was "
            f"taken has {counts['prompts']:,} different prompts.",
            *(f"**Check failed:** {as_text(problem)}" for problem in found.failed_checks),
            *(f"**Warning:** {as_text(str(one))}" for one in found.unused if one.is_loss),
            "![Each source by split](splits.svg)",
        ],
        "## Sources": [sources_table(found), "Their files:", files_table(found)],
        "## Taken": ["`written` is what the weights make of it.", taken_table(found)],
        "## Dropped": [
            dropped_table(found),
            "Damaged rows, the first of each source and reason:",
            damaged_table(found),
        ],
        "## Splits": [
            splits_table(found),
            "Of each source:",
            by_source_table(found),
            *["PPO takes the prompts of the split reward too (`prepare.share_prompts`)."] * found.share_prompts,
            f"Prompts that stand in two splits, by themselves or by a near-duplicate: **{counts['leaks']:,}**.",
        ],
        **({"## Labels that no stage uses": [as_text(f"{one}.") for one in found.unused]} if found.unused else {}),
        "## Lengths": [
            f"In tokens, without the chat template. `text.max_prompt_tokens` is {found.limits.max_prompt_tokens:,} and "
            f"`text.max_response_tokens` {found.limits.max_response_tokens:,}: the dotted lines. The plot has all rows "
            "whose tokens were counted, the longest together in the last bar; the table has those that were taken.",
            "![Histograms of the lengths](lengths.svg)",
            lengths_table(found),
        ],
        "## Duplicates": [
            f"Dropped: {counts['duplicates']:,} rows that are there already, {counts['near_duplicates']:,} prompts "
            f"without labels that are nearly another one of their split, {counts.get('dropped_leak', 0):,} rows whose "
            "prompt is in another split, or nearly so."
        ],
        "## Labelers": [labelers_table(found)],
        "## Ties": [ties_table(found)],
        "## Contradictory rankings": [
            f"Pairs of responses that were ranked both ways: {counts['contradictions']:,}. The first {EXAMPLES}:",
            Table("contradictions", found.contradictions.head(EXAMPLES)),
        ],
        "## Users": [
            f"Rows whose user is known: {users.sum():,}, of {len(users):,} users; at most "
            f"{users.max() if len(users) else 0:,} are of one."
        ],
        "## Personal data masked": [masked_table(found)],
        "## Tokenizer": [f"Fingerprint of the tokenizer and its chat template: `{found.tokenizer_fingerprint}`"],
    }
    blocks = []
    for title, content in sections.items():
        blocks += [title, *(in_markdown(part) if isinstance(part, Table) else part for part in content)]
    return "\n\n".join(blocks) + "\n"


def taken_rows(found: Findings) -> pd.DataFrame:
    return found.examples[found.examples["dropped"].isna()]


def dropped_rows(found: Findings) -> pd.DataFrame:
    """source, reason of every row that was dropped or damaged."""
    examples = found.examples.loc[found.examples["dropped"].notna(), ["source", "dropped"]]
    examples = examples.rename(columns={"dropped": "reason"}).astype(str)
    return pd.concat([found.damaged[["source", "reason"]].astype(str), examples], ignore_index=True)


def rows_of_users(taken: pd.DataFrame) -> pd.Series[int]:
    return taken.loc[taken["user"] != 0, "user"].value_counts()


def by_name(found: Findings, values: pd.Series[int]) -> pd.Series[int]:
    """A count of each source, in the order of params.yaml."""
    return values.reindex(names_of(found), fill_value=0)


def names_of(found: Findings) -> list[str]:
    return list(dict.fromkeys(str(source.name) for source in found.sources))


def sources_table(found: Findings) -> Table:
    rows = [
        {
            "source": source.name,
            "kind": source.kind,
            "from": source.path or " ".join(filter(None, (source.hub, source.subset, source.split))),
            "revision": source.revision or NOTHING,
            "licence": source.licence or "not given",
            "weight": f"{source.weight:g}",
        }
        for source in found.sources
    ]
    return Table("sources", pd.DataFrame(rows))


def files_table(found: Findings) -> Table:
    return Table(
        "files", pd.DataFrame(sorted(found.files.items()), columns=["file", "MD5, or commit of the hub"]), most=SHOWN
    )


def taken_table(found: Findings) -> Table:
    taken = taken_rows(found).groupby("source", observed=True)
    dropped = by_name(found, dropped_rows(found)["source"].value_counts())
    frame = pd.DataFrame({"taken": by_name(found, taken.size()), "dropped": dropped})
    frame.insert(0, "read", frame.sum(axis=1))
    frame["dropped share"] = share(frame["dropped"], frame["read"])
    frame["different prompts"] = by_name(found, taken["id"].nunique())
    frame["written"] = by_name(found, taken["copies"].sum())
    return Table("taken", frame.rename_axis("source").reset_index())


def dropped_table(found: Findings) -> Table:
    """By source and reason, the largest first."""
    dropped = dropped_rows(found)
    frame = dropped.groupby(["source", "reason"]).size().rename("rows").reset_index()
    read = dropped["source"].value_counts().add(taken_rows(found)["source"].astype(str).value_counts(), fill_value=0)
    frame["share of the source"] = share(frame["rows"], frame["source"].map(read).astype(float))
    order = {name: place for place, name in enumerate(names_of(found))}
    frame = frame.sort_values("rows", ascending=False, kind="stable")
    return Table("dropped", frame.sort_values("source", key=lambda names: names.map(order), kind="stable"))


def damaged_table(found: Findings) -> Table:
    return Table("damaged", found.damaged.drop_duplicates(["source", "reason"]))


def splits_table(found: Findings) -> Table:
    taken = taken_rows(found)
    frame = prompts_by_split(found).to_frame("prompts")
    frame["share"] = share(frame["prompts"], frame["prompts"].sum())
    kinds = taken.groupby(["split", "kind"], observed=True).size().unstack(fill_value=0)
    kinds = kinds.reindex(index=SPLITS, columns=KINDS, fill_value=0)
    frame = frame.join(kinds.rename(columns=lambda kind: f"rows of {kind}"))
    return Table("splits", frame.rename_axis("split").reset_index())


def by_source_table(found: Findings) -> Table:
    groups = taken_rows(found).groupby(["source", "split"], observed=True)["id"]
    frame = pd.DataFrame({"rows": groups.size(), "different prompts": groups.nunique()})
    places = pd.MultiIndex.from_product([names_of(found), SPLITS], names=["source", "split"])
    return Table("splits of each source", frame.reindex(places[places.isin(frame.index)]).reset_index())


def lengths_table(found: Findings) -> Table:
    taken = taken_rows(found)
    columns = {}
    for what in ("prompt", "response"):
        tokens = taken.loc[taken[f"{what}_tokens"] > 0].groupby("source", observed=True)[f"{what}_tokens"]
        for name, values in (("median", tokens.median()), ("95 %", tokens.quantile(0.95)), ("longest", tokens.max())):
            columns[f"{what}, {name}"] = values.reindex(names_of(found)).round().astype("Int64")
    return Table("lengths", pd.DataFrame(columns).rename_axis("source").reset_index())


def labelers_table(found: Findings) -> Table:
    rows = taken_rows(found)["labeler"].dropna().astype(str).value_counts()
    rows = rows.sort_index().sort_values(ascending=False, kind="stable")
    frame = pd.DataFrame({"labeler": rows.index, "rows": rows.to_numpy()})
    frame["share"] = share(frame["rows"], frame["rows"].sum())
    return Table("labelers", frame, most=SHOWN)


def ties_table(found: Findings) -> Table:
    taken = taken_rows(found)
    rankings = taken[taken["kind"] == "rankings"].groupby("source", observed=True)
    frame = rankings[["pairs", "tied_pairs"]].sum().rename(columns={"tied_pairs": "ties"})
    frame["share"] = share(frame["ties"], frame["pairs"])
    order = [name for name in names_of(found) if name in frame.index]
    return Table("ties", frame.loc[order].rename_axis("source").reset_index())


def masked_table(found: Findings) -> Table:
    rows = [
        {"source": source, "what": kind, "times": count}
        for source, counts in found.masked.items()
        for kind, count in counts.items()
    ]
    return Table("masked", pd.DataFrame(rows))


def share(part: pd.Series[int], whole: pd.Series[int] | pd.Series[float] | float) -> pd.Series[float]:
    """0 where there is nothing at all."""
    return (part / whole).fillna(0.0).astype(float)


def lengths_figure(found: Findings) -> Figure:
    limits = {"prompt": found.limits.max_prompt_tokens, "response": found.limits.max_response_tokens}
    panels: dict[str, list[Histogram]] = {name: [] for name in names_of(found)}
    for what, limit in limits.items():
        tokens = found.examples[f"{what}_tokens"].to_numpy(dtype=np.int64)
        source = pd.Categorical(found.examples["source"], categories=list(panels)).codes
        # a few texts of a million tokens would leave no room for the rest
        last = max(1.25 * limit, np.quantile(tokens, 0.99) if len(tokens) else 0)
        for place, drawn in enumerate(panels.values()):
            own = tokens[(source == place) & (tokens > 0)]
            drawn.append(Histogram(*np.histogram(np.minimum(own, last), BINS, (0, last)), limit))
    return histograms(panels, [f"tokens of the {what}" for what in ("prompt", "longest response")])


def splits_figure(found: Findings) -> Figure:
    counts = taken_rows(found).groupby(["source", "split"], observed=True).size().unstack(fill_value=0)
    counts = counts.reindex(index=names_of(found), columns=SPLITS, fill_value=0)
    counts["dropped"] = by_name(found, dropped_rows(found)["source"].value_counts())
    return shares(counts, COLOURS)


def in_markdown(table: Table) -> str:
    frame = table.frame.head(table.most or len(table.frame))
    if frame.empty:
        return "None."
    cells = as_cells(frame).map(as_text)
    text = cells.to_markdown(
        index=False, disable_numparse=True, colalign=["right" if is_number(frame[name]) else "left" for name in frame]
    )
    more = len(table.frame) - len(frame)
    return f"{text}\n\nand {more:,} more" if more else text


def on_terminal(table: Table) -> TerminalTable:
    shown = TerminalTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in table.frame:
        # fold: of a name that is cut nobody sees which of two it is
        shown.add_column(str(name), justify="right" if is_number(table.frame[name]) else "left", overflow="fold")
    for row in as_cells(table.frame).itertuples(index=False):
        shown.add_row(*(TerminalText(cell) for cell in row))
    return shown


def is_number(column: pd.Series) -> bool:
    return is_integer_dtype(column) or is_float_dtype(column)


def as_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Every cell as people read it, on one line."""
    cells = {
        name: column.map(one_cell, na_action="ignore").astype(object).fillna(NOTHING) for name, column in frame.items()
    }
    return pd.DataFrame(cells)


def one_cell(value: object) -> str:
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float):
        return "<0.1%" if 0 < value < 0.0005 else f"{value:.1%}"
    # line breaks, escape sequences of terminals, and marks that turn the direction of what follows
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(value)[: 2 * LONGEST_CELL]).split())
    return line if len(line) <= LONGEST_CELL else f"{line[:LONGEST_CELL]}…"


def as_text(cell: str) -> str:
    """What Markdown shows as just these characters: no markup, HTML, link, formula or emoji is made of them."""
    return re.sub(r"[\\`*_\[\]<>#|~&$@:]|(?<=www)\.", r"\\\g<0>", cell)
