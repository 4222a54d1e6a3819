"""How far the people who rank agree with each other, who is far from the rest, and how they work.

Everything here is of people, never of simulated labelers, and of what each of them said before anything is aggregated.
Flagged outputs count as ranked last. Of fewer than FEW items no figure is given: chance would rule it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from statistics import mean, median
from typing import Any, NamedTuple

import krippendorff
import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from tasks.conversations import text_of
from tasks.labels.aggregation import flagged_last
from tasks.labels.judgments import JudgedRanking, seconds_of
from tasks.labels.people import Joined, as_judged, in_order_of
from tasks.labels.queue import Item

FEW = 10  # items
RESAMPLES = 4000
DISPUTED = 5  # prompts
LONGEST = 200  # characters of a cell


class Opinion(NamedTuple):
    """One labeler's judgment of one item, of its outputs in the item's order."""

    labeler: str
    ranks: list[int]  # flagged outputs last
    ratings: list[int | None]
    flags: list[str]  # of all outputs
    flagged: int  # outputs
    seconds: float


class Agreement(NamedTuple):
    figures: dict[str, float | None]
    labelers: list[dict[str, Any]]  # a row a labeler
    pairs: list[dict[str, Any]]  # a row two labelers who have items in common
    flags: Counter[str]
    skip_reasons: Counter[str]
    disputed: list[tuple[float, str]]  # (agreement, prompt): where people agree least


def measure(joined: Joined[JudgedRanking], seed: int) -> Agreement:
    by_item = [[opinion(one, row) for row in joined.labelled[one.item]] for one in joined.items]
    opinions = [one for own in by_item for one in own]
    shared = [own for own in by_item if len(own) > 1]
    prompts = [text_of(one.prompt) for one in joined.items if len(joined.labelled[one.item]) > 1]
    marks = [marks_among(own) for own in shared]
    skips = Counter(row.labeler for row in joined.skipped)

    names = sorted({*(one.labeler for one in opinions), *skips})
    apart = against_the_rest(marks, seed)
    labelers = [
        {
            "labeler": name,
            **work_of([one for one in opinions if one.labeler == name]),
            "skips": skips[name],
            **apart.get(name, {"shared_items": 0, "far": False}),
        }
        for name in names
    ]
    figures = {
        **work_of(opinions),
        "shared_items": len(shared),
        **agreement_of(marks, seed),
        "alpha": alpha([outcomes(own) for own in shared]),
        "alpha_ratings": alpha([rated(own) for own in shared]),
        "far_labelers": sum(row["far"] for row in labelers),
    }
    flags = Counter(flag for one in opinions for flag in one.flags)
    reasons = Counter(row.skipped or "" for row in joined.skipped)
    on_each = [[mark for _, _, own in found for mark in own] for found in marks]
    disputed = sorted(
        (mean(own), prompt) for own, prompt in zip(on_each, prompts, strict=True) if own and mean(own) < 1
    )
    return Agreement(figures, labelers, taus(shared), flags, reasons, disputed[:DISPUTED])


def opinion(one: Item, row: JudgedRanking) -> Opinion:
    return Opinion(
        row.labeler,
        flagged_last(*in_order_of(one, row)),
        [row.ratings[place] for place in as_judged(one, row)],
        [flag for flags in row.flags for flag in flags],
        sum(map(bool, row.flags)),
        seconds_of(row),
    )


def work_of(opinions: Sequence[Opinion]) -> dict[str, float | None]:
    """How much was ranked, how long an item took, and the shares of tied pairs and of flagged outputs."""
    pairs = [a == b for one in opinions for a, b in combinations(one.ranks, 2)]
    outputs = sum(len(one.ranks) for one in opinions)
    return {
        "rankings": len(opinions),
        "median_seconds": median(one.seconds for one in opinions) if opinions else None,
        "tied_share": share(sum(pairs), len(pairs)),
        "flagged_share": share(sum(one.flagged for one in opinions), outputs),
    }


# ---- pairs of outputs ordered alike ----

Marks = list[tuple[str, str, list[float]]]  # of one item: (labeler, another, `pair_marks` of the first by the second)


def marks_among(opinions: Sequence[Opinion]) -> Marks:
    return [
        (one.labeler, other.labeler, pair_marks(one.ranks, [-rank for rank in other.ranks]))
        for one, other in permutations(opinions, 2)
    ]


def pair_marks(ranks: Sequence[int], scores: Sequence[float]) -> list[float]:
    """Of each pair ranked without a tie: 1 where the scores order it alike, 0 where not, 1/2 where they are equal."""
    return [
        0.5 if score_a == score_b else float((rank_a < rank_b) == (score_a > score_b))
        for (rank_a, score_a), (rank_b, score_b) in combinations(zip(ranks, scores, strict=True), 2)
        if rank_a != rank_b
    ]


def agreement_of(marks: Sequence[Marks], seed: int) -> dict[str, float | None]:
    """Of the pairs that one labeler ordered, the share that another ordered alike (InstructGPT, section 3.4)."""
    sums, counts = totals([[own for _, _, own in found] for found in marks])
    if (counts > 0).sum() < FEW:
        return {"agreement": None}
    return with_interval(sums, counts, resampled(sums, counts, weights(len(marks), seed)))


def against_the_rest(marks: Sequence[Marks], seed: int) -> dict[str, dict[str, Any]]:
    """By labeler: the same of the pairs that this one ordered, what the others have among each other, and whether the
    labeler is far from the rest.

    Far is who agrees less with the others than those do among each other, by more than chance: in all but 2.5 % of the
    resamples of the items, divided by the number of labelers, for one of many is far by chance (Bonferroni).
    """
    labelers = sorted({one for found in marks for one, _, _ in found})
    rows: dict[str, dict[str, Any]] = {}
    for name in labelers:
        own = totals([[pairs for one, _, pairs in found if one == name] for found in marks])
        others = totals([[pairs for one, other, pairs in found if name not in (one, other)] for found in marks])
        rows[name] = {"shared_items": sum(any(one == name for one, _, _ in found) for found in marks), "far": False}
        if (own[1] > 0).sum() < FEW:
            continue
        draws = weights(len(marks), seed)
        shares = resampled(*own, draws)
        rows[name] |= with_interval(*own, shares)
        if (others[1] > 0).sum() >= FEW:
            lead = shares - resampled(*others, draws)
            far = np.nanquantile(lead, 1 - 0.025 / len(labelers)) < 0
            rows[name] |= {"among_others": share(others[0].sum(), others[1].sum()), "far": bool(far)}
    return rows


def totals(marks: Sequence[Sequence[Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the marks, number of marks) of each item, both (I,)."""
    flat = [[mark for own in found for mark in own] for found in marks]
    return np.array([sum(own) for own in flat], dtype=float), np.array([len(own) for own in flat], dtype=float)


def weights(items: int, seed: int) -> np.ndarray:
    """(RESAMPLES, I): how often each item is in a resample of as many, drawn with replacement."""
    draws: np.ndarray = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=RESAMPLES)
    return draws.astype(float)


def resampled(sums: np.ndarray, counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The share in each resample (RESAMPLES,); NaN where it has no pair."""
    drawn = draws @ counts
    shares: np.ndarray = np.divide(draws @ sums, drawn, out=np.full(len(draws), np.nan), where=drawn > 0)
    return shares


def with_interval(sums: np.ndarray, counts: np.ndarray, shares: np.ndarray) -> dict[str, float | None]:
    return {
        "agreement": share(sums.sum(), counts.sum()),
        "agreement_low": round(float(np.nanquantile(shares, 0.025)), 4),
        "agreement_high": round(float(np.nanquantile(shares, 0.975)), 4),
    }


# ---- coefficients ----


def alpha(units: Sequence[Sequence[Sequence[int]]]) -> float | None:
    """Krippendorff's alpha, ordinal (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    units: of each item the units, and of each unit the values that labelers gave it. None where too few items have a
    unit with two values, or where all values are the same, which says nothing.
    """
    paired = [[values for values in found if len(values) > 1] for found in units]
    if sum(map(bool, paired)) < FEW:
        return None
    found = [values for own in paired for values in own]
    domain = sorted({value for values in found for value in values})
    if len(domain) < 2:
        return None
    counts = [[values.count(value) for value in domain] for values in found]
    told = krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement="ordinal")
    return round(float(told), 4)


def outcomes(opinions: Sequence[Opinion]) -> list[list[int]]:
    """Of each pair of outputs, what each labeler says: 1 the first is better, -1 the second, 0 a tie, which lies
    between. Each pair stands both ways round: which of its outputs comes first is nobody's doing."""
    count = len(opinions[0].ranks)
    return [
        [(one.ranks[a] < one.ranks[b]) - (one.ranks[a] > one.ranks[b]) for one in opinions]
        for a, b in permutations(range(count), 2)
    ]


def rated(opinions: Sequence[Opinion]) -> list[list[int]]:
    """Of each output the ratings that it got."""
    return [[rating for rating in given if rating] for given in zip(*(one.ratings for one in opinions), strict=True)]


def taus(shared: Sequence[Sequence[Opinion]]) -> list[dict[str, Any]]:
    """Kendall's tau-b between each two labelers: the mean over the items that both ranked and neither tied whole."""
    common: dict[tuple[str, str], int] = Counter()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for opinions in shared:
        for one, other in combinations(sorted(opinions, key=lambda opinion: opinion.labeler), 2):
            pair = (one.labeler, other.labeler)
            common[pair] += 1
            if len(set(one.ranks)) > 1 and len(set(other.ranks)) > 1:
                found[pair].append(float(kendalltau(one.ranks, other.ranks).statistic))
    return [
        {
            "labelers": pair,
            "items": common[pair],
            "tau": round(mean(found[pair]), 4) if len(found[pair]) >= FEW else None,
        }
        for pair in sorted(common)
    ]


def share(part: float, whole: float) -> float | None:
    return round(float(part) / float(whole), 4) if whole else None


# ---- for people to read ----


def page(found: Agreement, collected: Mapping[str, Any]) -> str:
    """Markdown. collected: figures of the stage: how much is by people, how much by simulated labelers, and so on."""
    figures = found.figures
    by_simulated = collected["by_simulated"]
    blocks = [
        "# The people who rank, and how far they agree",
        f"{collected['judgments']:,} rankings by {collected['labelers']} "
        f"{'person' if collected['labelers'] == 1 else 'people'} on {collected['items']:,} items; "
        f"{figures['shared_items']:,} items were ranked by several. "
        + (
            f"**{by_simulated:,} of {by_simulated + collected['by_people']:,} rankings are simulated**, for nobody had "
            "ranked those items; nothing else on this page is of them."
            if by_simulated
            else "None is simulated."
        ),
        "## Agreement",
        table(
            [
                ("pairs of outputs that two people order alike", percent(figures, "agreement")),
                ("InstructGPT's labelers, section 3.4", "72.6 % ± 1.5; the held-out ones 77.3 % ± 1.3"),
                ("Krippendorff's alpha of the pairs, ordinal: better, tie, worse", number(figures["alpha"])),
                ("Krippendorff's alpha of the ratings, ordinal", number(figures["alpha_ratings"])),
                ("pairs that are tied", percent(figures, "tied_share", "–")),
                ("outputs that are flagged", percent(figures, "flagged_share", "–")),
                ("seconds an item, median", number(figures["median_seconds"], "–")),
            ],
            ("", ""),
        ),
        "Of the pairs that one of two people ordered, the share that the other ordered alike; the other's ties are "
        "half. In brackets: 95 % intervals, by bootstrap over the items. Alpha is 1 where all say the same and 0 where "
        f"they agree as by chance. Where there are fewer than {FEW} common items it says too few.",
        "## Who is far from the rest",
        ", ".join(f"**{plain(row['labeler'])}**" for row in found.labelers if row["far"])
        or "Nobody, as far as can be told.",
        "Far is who agrees less with the others than those do among each other, by more than chance: in all but 2.5 % "
        "of the bootstrap's draws, divided by the number of people. It takes three people. Look at what they do before "
        "you leave them out (`rank.human.leave_out`): the guidelines may be read in two ways.",
        "## Each labeler against the rest",
        table(
            [
                (
                    plain(row["labeler"]),
                    row["rankings"],
                    row["shared_items"],
                    percent(row, "agreement"),
                    percent(row, "among_others"),
                    percent(row, "tied_share", "–"),
                    percent(row, "flagged_share", "–"),
                    row["skips"],
                    number(row["median_seconds"], "–"),
                )
                for row in found.labelers
            ],
            ("labeler", "rankings", "shared items", "agrees with the others", "the others among each other", "ties",
             "flagged outputs", "skips", "seconds an item"),
        ),
        "## Between each two",
        table(
            [(*map(plain, row["labelers"]), row["items"], number(row["tau"])) for row in found.pairs],
            ("", "", "common items", "Kendall's tau-b, mean"),
        ),
    ]  # fmt: skip
    for title, counts in (("What was flagged", found.flags), ("Why items were skipped", found.skip_reasons)):
        if counts:
            rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
            blocks += [f"## {title}", table([(plain(what), count) for what, count in rows], ("", "times"))]
    if found.disputed:
        shares = [(plain(prompt), f"{100 * agreed:.0f} %") for agreed, prompt in found.disputed]
        blocks += ["## Where people agree least", table(shares, ("prompt", "pairs ordered alike"))]
    return "\n\n".join(blocks) + "\n"


def nobody(labeler: str) -> str:
    """The page of a run in which people did not rank."""
    return f"# The people who rank, and how far they agree\n\nNobody ranked here: rank.labeler is `{labeler}`.\n"


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    frame = pd.DataFrame([[str(cell) for cell in row] for row in rows], columns=range(len(headers)))
    return frame.to_markdown(index=False, headers=list(headers), disable_numparse=True) if rows else "None."


def percent(row: Mapping[str, Any], name: str, unknown: str = "too few") -> str:
    if row.get(name) is None:
        return unknown
    interval = f" [{100 * row[f'{name}_low']:.0f}, {100 * row[f'{name}_high']:.0f}]" if f"{name}_low" in row else ""
    return f"{100 * row[name]:.0f} %{interval}"


def number(value: float | None, unknown: str = "too few") -> str:
    return unknown if value is None else f"{value:.3g}"


def plain(text: str) -> str:
    """On one line, and nothing that Markdown makes markup, HTML, a link or a formula of."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
    return re.sub(r"[\\`*_\[\]<>#|~&$@:]", r"\\\g<0>", line)
