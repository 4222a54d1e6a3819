"""Which rows stay, and in which split. A row's split depends on the seed, its source and itself alone: adding rows may
drop an old one, and never moves it to another split. A prompt itself may go from one training split to another when
labels for it come, which are of use there alone; out of eval it goes never, nor into it but by a source of other shares
or with another user.

The rules come in the order of `REASONS`, each a function of the rows that the ones before left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
import pandera.pandas as pa
from numpy.typing import NDArray

from tasks.datasets import stable_share
from tasks.params import Prepare, SplitName
from tasks.prepare import duplicates

SPLITS: list[SplitName] = list(get_args(SplitName))
REASONS = ["not drawn", "user cap", "duplicate", "with labels", "near-duplicate", "leak"]
Ids = NDArray[np.uint64]

ROWS = pa.DataFrameSchema(
    {
        "source": pa.Column(pa.Category),
        "kind": pa.Column(pa.Category, pa.Check.isin(["demonstrations", "rankings", "prompts"])),
        "id": pa.Column("uint64"),  # the prompt's
        "content": pa.Column("uint64"),  # hash of all that makes rows duplicates of each other
        "user": pa.Column("uint64"),  # hash; 0: not known
        "prefix": pa.Column("uint64"),  # hash of the prompt's first `common_prefix` characters; 0: it is shorter
    }
)
SELECTED = ROWS.add_columns(
    {
        "split": pa.Column(pd.CategoricalDtype(SPLITS), nullable=True),  # missing: dropped
        "dropped": pa.Column(pd.CategoricalDtype(REASONS), nullable=True),  # why; missing: kept
        "partner": pa.Column("uint64"),  # the prompt that a dropped row collides with; 0: none
        "copies": pa.Column("int64", pa.Check.ge(0)),  # how often the row is taken
    }
)
SELECTED.checks = [
    pa.Check(lambda rows: rows["split"].isna() == rows["dropped"].notna(), name="a split or a reason"),
    pa.Check(lambda rows: (rows["copies"] > 0) == rows["split"].notna(), name="kept rows are taken"),
]


class Blend(NamedTuple):
    """What of a source is taken."""

    weight: float  # 0.5: half of the rows; 2: each twice
    splits: Mapping[SplitName, float]  # shares of its groups; they add up to 1


Find = Callable[[pd.DataFrame, bool], duplicates.Search]


class Prompts(NamedTuple):
    """The distinct prompts of the rows."""

    ids: Ids  # (P,)
    signatures: NDArray[np.uint32]  # (P, duplicates.ENTRIES)


def select(
    rows: pd.DataFrame, prompts: Prompts, sources: Mapping[str, Blend], params: Prepare, seed: int
) -> pd.DataFrame:
    """`ROWS` in, `SELECTED` out: the same rows in their order."""
    ROWS.validate(rows)
    find = finder(prompts, params.near_duplicate)
    rules: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
        "not drawn": not_drawn,
        "user cap": partial(beyond_cap, cap=params.user_cap or len(rows), seed=seed),
        "duplicate": repeated,
        "with labels": labelled_too,
        "near-duplicate": partial(near_duplicates, find=find, seed=seed),
        "leak": partial(leaking, find=find, seed=seed),
    }
    split = claims(rows, sources, seed)
    table = rows.reset_index(drop=True).assign(
        split=split,
        side=side_of(split, params.share_prompts),
        dropped=None,
        partner=np.uint64(0),
        copies=copies(rows, sources, seed),
    )
    table["dropped"] = table["dropped"].astype(pd.CategoricalDtype(REASONS))
    for reason, rule in rules.items():
        gone = rule(table[table["dropped"].isna()])
        table.loc[gone.index, "dropped"] = reason
        table.loc[gone.index, "partner"] = gone
    table.loc[table["dropped"].notna(), "split"] = None
    table.loc[table["dropped"].notna(), "copies"] = 0
    table = table.drop(columns="side")
    SELECTED.validate(table)
    return table.set_index(rows.index)


def side_of(split: pd.Series, share_prompts: bool) -> pd.Series:
    """What no prompt may stand in two of: the splits, or with shared prompts reward and ppo as one."""
    return split.where(split != "ppo", "reward") if share_prompts else split


def repeated(rows: pd.DataFrame) -> pd.Series:
    """Rows whose content is on the same side before. {row: partner}

    Of equal rows one whose user is known stays, then that of the first source by name. Where the sides differ, for a
    source has other shares or a user is not known everywhere, `leaking` decides: what comes later takes nothing out of
    eval.
    """
    again = rows[rows.duplicated(["content", "side"], keep=False)]
    order = again.assign(source=again["source"].astype(str), kind=again["kind"].astype(str), unknown=again["user"] == 0)
    order = order.sort_values(["unknown", "source", "kind", "user"], kind="stable")
    gone: pd.Series = rows.loc[order.index[order.duplicated(["content", "side"])], "id"]
    return gone


def labelled_too(rows: pd.DataFrame) -> pd.Series:
    """Mere prompts that labelled rows bring to the same side. {row: partner}

    Where the sides differ, `leaking` decides: labels that come later do not take a prompt out of eval.
    """
    units = pd.MultiIndex.from_frame(rows[["id", "side"]])
    labelled = (rows["kind"] != "prompts").to_numpy()
    gone: pd.Series = rows.loc[~labelled & units.isin(units[labelled]), "id"]
    return gone


def beyond_cap(rows: pd.DataFrame, cap: int, seed: int) -> pd.Series:
    """All but `cap` rows of each known user, drawn by the seed. {row: 0}"""
    known = rows[rows["user"] != 0]
    many = known[known.groupby("user")["content"].transform("size") > cap]
    order = many.assign(draw=draws(many["content"], seed, "user")).sort_values(["draw", "content"])
    return nobody(order.index[order.groupby("user").cumcount() >= cap])


def not_drawn(rows: pd.DataFrame) -> pd.Series:
    """Rows that their source's weight leaves out. {row: 0}"""
    return nobody(rows.index[rows["copies"] == 0])


def near_duplicates(rows: pd.DataFrame, find: Find, seed: int) -> pd.Series:
    """Mere prompts that are near another one of their side, labelled or drawn before by the seed; labelled rows cost
    money and stay. {row: partner}"""
    units = units_of(rows)
    units = units.assign(draw=draws(hexadecimal(units["id"]), seed, "near-duplicate"))
    units = units.sort_values(["labelled", "draw", "id"], ascending=[False, True, True])
    rivals = duplicates.keep(find(units, False), fixed=int(units["labelled"].sum()))
    return of_units(rows, units, rivals)


def leaking(rows: pd.DataFrame, find: Find, seed: int) -> pd.Series:
    """Rows whose prompt is the same as, or near, one that stays on another side. {row: partner}

    Moving one of them instead would break the promise that nothing moves, and no rule could keep both: let p, alone,
    belong to split A and q, alone, to B, and let them be near. With both present a rule that moves nothing must leave
    p in A, for p may have been there first, and q in B, for q may have been; and that is the leak. So one goes: eval
    keeps its prompts, that figures stay comparable, then labelled ones stay, then the first drawn by the seed.
    """
    units = units_of(rows)
    names = [f"{id}|{side}" for id, side in zip(hexadecimal(units["id"]), units["side"], strict=True)]
    units = units.assign(draw=draws(names, seed, "leak"), trained=units["side"] != "eval")
    units = units.sort_values(["trained", "labelled", "draw", "id"], ascending=[True, False, True, True])
    rivals = duplicates.keep(find(units, True), fixed=int((~units["trained"]).sum()))
    return of_units(rows, units, rivals)


def units_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows' distinct (id, side), with whether one of their rows is labelled."""
    units = rows.assign(labelled=rows["kind"] != "prompts").sort_values("labelled", ascending=False, kind="stable")
    return units.drop_duplicates(["id", "side"])[["id", "side", "prefix", "labelled"]]


def of_units(rows: pd.DataFrame, units: pd.DataFrame, rivals: duplicates.Ints) -> pd.Series:
    """{row: partner} of the rows of all units with a rival (U,)."""
    gone = units.loc[rivals >= 0, ["id", "side"]].assign(partner=units["id"].to_numpy()[rivals[rivals >= 0]])
    found = rows[["id", "side"]].reset_index().merge(gone, on=["id", "side"])
    return found.set_index("index")["partner"]


def finder(prompts: Prompts, threshold: float | None) -> Find:
    """What makes the search over units in their order: what shares a long prefix collides, and what is near."""
    index = pd.Index(prompts.ids)
    bits = duplicates.low_bits(prompts.signatures)
    bands = duplicates.band_keys(prompts.signatures, threshold) if threshold else np.empty((0, len(index)), np.uint32)

    def find(units: pd.DataFrame, across: bool) -> duplicates.Search:
        stems = np.where(units["prefix"] != 0, units["prefix"], units["id"])  # both hashes: as good as never equal
        return duplicates.Search(
            duplicates.Units(
                prompt=index.get_indexer(pd.Index(units["id"])),
                stem=np.unique(stems, return_inverse=True)[1],
                split=units["side"].cat.codes.to_numpy().astype(np.int64),
            ),
            across,
            prompts.signatures,
            bits,
            bands,
            threshold or 1.0,
        )

    return find


def copies(rows: pd.DataFrame, sources: Mapping[str, Blend], seed: int) -> NDArray[np.int64]:
    """How often each row is taken: the whole part of its source's weight, and once more with the chance of the rest.
    (N,)"""
    weight = rows["source"].map({name: blend.weight for name, blend in sources.items()}).to_numpy(float)
    whole = np.floor(weight)
    uneven = weight > whole
    whole[uneven] += draws(rows.loc[uneven, "content"], seed, "weight") < (weight - whole)[uneven]
    return whole.astype(np.int64)


def claims(rows: pd.DataFrame, sources: Mapping[str, Blend], seed: int) -> pd.Series:
    """The split of each row's group: its user's where known, else of the prompts that begin like its own. (N,)"""
    keys = [
        f"user {user:016x}" if user else f"prefix {prefix:016x}" if prefix else f"{id:016x}"
        for user, prefix, id in zip(*(rows[name].tolist() for name in ("user", "prefix", "id")), strict=True)
    ]
    shares = draws(keys, seed, "split")
    codes = np.empty(len(rows), np.int64)
    for name, blend in sources.items():
        chosen = (rows["source"] == name).to_numpy()
        codes[chosen] = split_of(shares[chosen], blend.splits)
    return pd.Series(np.array(SPLITS)[codes], dtype=pd.CategoricalDtype(SPLITS))


def split_of(draws: NDArray[np.float64], splits: Mapping[SplitName, float]) -> NDArray[np.int64]:
    """The number, in `SPLITS`, of the split whose slice of [0, 1) holds each draw; the slices lie in the order of
    `SPLITS`. (N,)"""
    numbers = [number for number, name in enumerate(SPLITS) if splits.get(name)]
    ends = list(accumulate(splits[SPLITS[number]] for number in numbers))
    # the last end may lie below 1 by rounding
    return np.array(numbers)[np.searchsorted(ends[:-1], draws, side="right")]


def draws(keys: Iterable[object], *parts: object) -> NDArray[np.float64]:
    """`stable_share` of the parts and each key. (N,)"""
    return np.array([stable_share(*parts, key) for key in keys], float)


def hexadecimal(ids: pd.Series) -> list[str]:
    """As `prompt_id` writes them."""
    return [f"{id:016x}" for id in ids.tolist()]


def nobody(rows: pd.Index) -> pd.Series:
    """{row: 0}"""
    return pd.Series(np.uint64(0), rows)


def leaks(rows: pd.DataFrame, prompts: Prompts, threshold: float | None, share_prompts: bool = False) -> pd.DataFrame:
    """Prompts of `SELECTED` rows that stand on two sides, begin alike on two, or are near one of another: split_a,
    id_a, split_b, id_b, similarity.

    It is empty after `select`, and searches in another way: joins on bands of its own, 21 of 6 entries from all over
    the signatures. Pairs at the threshold t are found with probability 1 - (1 - t^6)^21, 0.998 at 0.8.
    """
    units = rows.loc[rows["split"].notna(), ["split", "id", "prefix"]].drop_duplicates(["split", "id"])
    units["prompt"] = pd.Index(prompts.ids).get_indexer(pd.Index(units["id"]))
    units["side"] = side_of(units["split"], share_prompts)
    found = [*across_splits(units, units["id"])]
    begun = units[units["prefix"] != 0].drop_duplicates(["split", "prefix"])
    found += across_splits(begun, begun["prefix"])
    if threshold:
        rng = np.random.default_rng(0)
        for band in np.split(rng.permutation(duplicates.ENTRIES)[:126], 21):
            factors = rng.integers(2**64, size=len(band), dtype=np.uint64)
            keys = (prompts.signatures[:, band] * factors).sum(1)[units["prompt"]]  # multilinear hashing, modulo 2^64
            found += [pairs[similarity(pairs, prompts) >= threshold] for pairs in across_splits(units, keys)]
    pairs = pd.concat(found).drop_duplicates(["split_a", "id_a", "split_b", "id_b"], ignore_index=True)
    return pairs.assign(similarity=similarity(pairs, prompts))[["split_a", "id_a", "split_b", "id_b", "similarity"]]


def across_splits(units: pd.DataFrame, keys: pd.Series | Ids) -> Iterator[pd.DataFrame]:
    """All pairs of units (U) of different sides and the same key, as columns *_a and *_b, in parts that fit into
    memory."""
    units = units.assign(key=np.asarray(keys), place=units["side"].cat.codes)
    places = units.groupby("key")["place"]
    units = units[places.transform("min") < places.transform("max")]
    part = units.groupby("key")["key"].transform("size").cumsum().to_numpy() // 1_000_000
    for rows in np.split(np.arange(len(units)), np.flatnonzero(np.diff(part)) + 1):
        both = units.iloc[rows].merge(units, on="key", suffixes=("_a", "_b"))
        yield both[both["place_a"] < both["place_b"]]


def similarity(pairs: pd.DataFrame, prompts: Prompts) -> NDArray[np.float64]:
    """Of prompt_a and prompt_b. (M,)"""
    return duplicates.similarity(prompts.signatures, pairs["prompt_a"].to_numpy(), pairs["prompt_b"].to_numpy())


def contradictions(pairs: pd.DataFrame) -> pd.DataFrame:
    """Pairs of responses to one prompt that rows order both ways.

    pairs: id, a, b (hashes of the prompt and of two responses), better (-1: a, 1: b, 0: neither), row. Returned, one
    line for each: id, a, b with a < b, a_better and b_better (numbers of rows), a_row and b_row (the first of them).
    """
    clear = pairs[(pairs["better"] != 0) & (pairs["a"] != pairs["b"])]
    swapped = clear["a"] > clear["b"]
    clear = clear.assign(
        a=clear["a"].where(~swapped, clear["b"]),
        b=clear["b"].where(~swapped, clear["a"]),
        better=clear["better"].where(~swapped, -clear["better"]),
    )
    groups = clear.groupby(["id", "a", "b", "better"])["row"].agg(["size", "min"]).reset_index()
    for_a, for_b = groups[groups["better"] == -1], groups[groups["better"] == 1]
    both = for_a.merge(for_b, on=["id", "a", "b"], suffixes=("_a", "_b"))
    names = {"size_a": "a_better", "size_b": "b_better", "min_a": "a_row", "min_b": "b_row"}
    return both.rename(columns=names)[["id", "a", "b", *names.values()]]
