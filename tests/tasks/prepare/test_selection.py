"""Which rows stay, and in which split."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.errors
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from tasks.conversations import single
from tasks.datasets import prompt_id, stable_share
from tasks.params import Prepare, SplitName, load_params
from tasks.prepare import duplicates, selection
from tasks.prepare.selection import Blend, Prompts, contradictions, leaks, select
from tasks.tickets import generate

PARAMS = load_params(Path("params.yaml"))
SHARES: dict[SplitName, float] = {"sft": 0.3, "reward": 0.3, "ppo": 0.3, "eval": 0.1}
HALVES: dict[SplitName, float] = {"sft": 0.5, "eval": 0.5}
SOURCES = {"a": Blend(1.0, SHARES), "b": Blend(0.7, SHARES), "c": Blend(2.5, HALVES)}
NAMES = np.array(selection.SPLITS)


def text_of(family: int, variant: int) -> str:
    """Of one family, variants 0 to 3 are near each other (Jaccard 0.92 and more), and 4 shares half of its words with
    them (0.3 at most); families share no word."""
    words = [f"f{family}w{place}" for place in range(200)]
    if variant == 4:
        words[:100] = [f"half{family}w{place}" for place in range(100)]
    else:
        words[30 * variant + 20] = f"changed{family}v{variant}"
    return " ".join(words)


TEXTS = {(family, variant): text_of(family, variant) for family in range(6) for variant in range(5)}
IDS = {name: int(prompt_id(single(text)), 16) for name, text in TEXTS.items()}
SHINGLES = {IDS[name]: duplicates.shingles(text) for name, text in TEXTS.items()}
PROMPTS = Prompts(np.array(list(IDS.values()), np.uint64), duplicates.signatures(list(TEXTS.values())))


def content_of(*parts: object) -> int:
    return int(stable_share(*parts) * 2**48) + 1


def row(
    family: int, variant: int = 0, kind: str = "prompts", source: str = "a", user: int = 0, response: int = 0
) -> dict[str, Any]:
    """Prompts of the last two families begin alike."""
    return {
        "source": source,
        "kind": kind,
        "id": IDS[family, variant],
        "content": content_of(family, variant, kind, response if kind != "prompts" else None),
        "user": user and content_of("user", user),
        "prefix": content_of("prefix", family) if family >= 4 else 0,
    }


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    numbers = dict.fromkeys(("id", "content", "user", "prefix"), "uint64")
    return pd.DataFrame(rows).astype(numbers | {"source": "category", "kind": "category"})


def prepare(**changes: object) -> Prepare:
    return PARAMS.prepare.model_copy(update=changes)


def selected(rows: list[dict[str, Any]], seed: int = 1, **changes: object) -> pd.DataFrame:
    return select(table(rows), PROMPTS, SOURCES, prepare(**changes), seed)


def reasons(rows: pd.DataFrame) -> list[str | None]:
    return [None if pd.isna(reason) else reason for reason in rows["dropped"]]


ANY_ROWS = st.lists(
    st.builds(
        row,
        family=st.integers(0, 5),
        variant=st.integers(0, 4),
        kind=st.sampled_from(["prompts", "demonstrations", "rankings"]),
        source=st.sampled_from(["a", "b", "c"]),
        user=st.integers(0, 3),
        response=st.integers(0, 3),
    ),
    min_size=1,
    max_size=40,
)
quick = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])


def collide(a: Any, b: Any) -> bool:
    first, second = SHINGLES[a.id], SHINGLES[b.id]
    return len(first & second) / len(first | second) >= 0.8 or (a.prefix == b.prefix != 0)


@quick
@given(rows=ANY_ROWS, seed=st.integers(0, 3))
def test_no_prompt_or_near_one_stands_in_two_splits(rows: list[dict[str, Any]], seed: int) -> None:
    found = selected(rows, seed)
    kept: list[Any] = list(found[found["split"].notna()].itertuples())
    for first in kept:
        for second in kept:
            assert first.split == second.split or not collide(first, second)
    mere = [row for row in kept if row.kind == "prompts"]
    for first in mere:
        assert not any(collide(first, other) for other in kept if other.Index != first.Index), "it costs no label"
    assert leaks(found, PROMPTS, 0.8).empty


@quick
@given(rows=ANY_ROWS, cut=st.integers(1, 40), cap=st.sampled_from([None, 1, 3]))
def test_adding_rows_moves_nothing(rows: list[dict[str, Any]], cut: int, cap: int | None) -> None:
    before, after = selected(rows[:cut], user_cap=cap), selected(rows, user_cap=cap)
    both = pd.DataFrame({"before": before["split"], "after": after["split"].iloc[: len(before)]}).dropna()
    assert (both["before"] == both["after"]).all()
    copies = after["copies"].iloc[: len(before)]
    assert ((copies == before["copies"]) | (copies == 0) | (before["copies"] == 0)).all()


@quick
@given(rows=ANY_ROWS, cap=st.sampled_from([None, 1, 3]))
def test_every_row_has_a_split_or_a_reason(rows: list[dict[str, Any]], cap: int | None) -> None:
    found = selected(rows, user_cap=cap)
    assert_frame_equal(found[list(rows[0])], table(rows))
    assert (found["split"].isna() != found["dropped"].isna()).all()
    assert ((found["copies"] > 0) == found["split"].notna()).all()
    named = found["dropped"].isin(["duplicate", "with labels", "near-duplicate", "leak"])
    assert (found["partner"].isin(found["id"]) == named).all()
    leaking = found[found["dropped"] == "leak"]
    assert leaking["partner"].isin(found.loc[found["split"].notna(), "id"]).all(), "the partner stays"


@quick
@given(rows=ANY_ROWS, cap=st.sampled_from([None, 1, 3]))
def test_selecting_what_was_kept_keeps_it(rows: list[dict[str, Any]], cap: int | None) -> None:
    found = selected(rows, user_cap=cap)
    kept = found[found["split"].notna()]
    again = select(kept[list(rows[0])], PROMPTS, SOURCES, prepare(user_cap=cap), 1)
    assert_frame_equal(again, kept)


@quick
@given(rows=ANY_ROWS, order=st.randoms(use_true_random=False), cap=st.sampled_from([None, 1, 3]))
def test_the_order_of_rows_does_not_matter(rows: list[dict[str, Any]], order: Any, cap: int | None) -> None:
    mixed = order.sample(rows, len(rows))
    one, other = (
        selected(some, user_cap=cap)
        .astype({"source": str, "kind": str, "split": str, "dropped": str})
        .sort_values([*rows[0], "dropped"], ignore_index=True)
        for some in (rows, mixed)
    )
    assert_frame_equal(one, other)


@pytest.mark.parametrize(
    ("share", "name"),
    [(0.0, "sft"), (0.2999, "sft"), (0.3, "reward"), (0.61, "ppo"), (0.95, "eval"), (0.9999999999999999, "eval")],
)
def test_split_of_by_hand(share: float, name: str) -> None:
    assert NAMES[selection.split_of(np.array([share]), SHARES)].tolist() == [name]


def test_a_split_without_a_share_gets_nothing() -> None:
    assert NAMES[selection.split_of(np.array([0.0, 0.4999, 0.5, 0.9999999999999999]), HALVES)].tolist() == [
        "sft",
        "sft",
        "eval",
        "eval",
    ]
    third: dict[SplitName, float] = {"sft": 0.3, "reward": 0.7, "eval": 0.0}
    assert NAMES[selection.split_of(np.array([0.9999999999999999]), third)].tolist() == ["reward"]


def test_the_default_tickets_are_split_as_ever() -> None:
    """The digest is of the splits that the first version of `prepare` made, a loop over `stable_share`."""
    texts = [ticket.prompt for ticket in generate(PARAMS.seed, PARAMS.tickets.count)]
    names = [prompt_id(single(text)) for text in texts]
    ids = np.array([int(name, 16) for name in names], np.uint64)
    rows = pd.DataFrame({"id": ids, "content": ids, "user": np.uint64(0), "prefix": np.uint64(0)})
    rows = rows.assign(source=pd.Categorical(["a"] * len(ids)), kind=pd.Categorical(["prompts"] * len(ids)))
    prompts = Prompts(ids, duplicates.signatures(texts))
    found = select(rows, prompts, {"a": Blend(1.0, SHARES)}, PARAMS.prepare, PARAMS.seed)
    lines = "".join(f"{name} {split}\n" for name, split in zip(names, found["split"], strict=True))
    digest = "d8a4bfce99e0de8173316b683fcef7c817bbd6f93bca2679511ccf020d8b7f73"
    assert hashlib.sha256(lines.encode()).hexdigest() == digest
    assert found["split"].value_counts().to_dict() == {"ppo": 1473, "reward": 1467, "sft": 1390, "eval": 470}
    assert leaks(found, prompts, 0.8).empty


def test_of_equal_rows_one_with_a_known_user_stays_then_the_first_source() -> None:
    rows = [row(0, source="c"), row(0, source="a"), row(0, source="b", user=1), row(0, source="c", user=1)]
    sources = dict.fromkeys("abc", Blend(1.0, SHARES))
    found = select(table(rows), PROMPTS, sources, PARAMS.prepare, 1)
    assert reasons(found) == ["duplicate", "duplicate", None, "duplicate"]
    assert found["partner"].tolist() == [IDS[0, 0], IDS[0, 0], 0, IDS[0, 0]]


def test_a_mere_prompt_comes_with_its_labels() -> None:
    assert reasons(selected([row(0), row(0, kind="rankings"), row(1)])) == ["with labels", None, None]


def test_a_mere_prompt_whose_labels_are_not_drawn_stays() -> None:
    rows = [
        row(family, source=source, kind=kind)
        for family in range(4)
        for source, kind in (("b", "rankings"), ("a", "prompts"))
    ]
    found = selected(rows)
    drawn = [stable_share(1, "weight", one["content"]) < 0.7 for one in rows[::2]]
    assert reasons(found)[::2] == [None if taken else "not drawn" for taken in drawn]
    assert reasons(found)[1::2] == ["with labels" if taken else None for taken in drawn]


def test_labels_do_not_take_a_prompt_out_of_eval() -> None:
    sources = {"old": Blend(1.0, {"eval": 1.0}), "new": Blend(1.0, {"reward": 1.0})}
    rows = table([row(0, source="old"), row(0, source="new", kind="rankings")])
    found = select(rows, PROMPTS, sources, PARAMS.prepare, 1)
    assert reasons(found) == [None, "leak"]


def test_a_user_has_at_most_so_many_rows() -> None:
    rows = [row(family, variant, user=1) for family in range(4) for variant in (0, 4)]
    order = sorted(range(8), key=lambda place: stable_share(1, "user", rows[place]["content"]))
    found = selected([*rows, row(4, user=2), row(5)], user_cap=3)
    assert np.flatnonzero(found["dropped"] == "user cap").tolist() == sorted(order[3:])


def test_rows_of_one_user_stay_together() -> None:
    found = selected([row(family, user=1) for family in range(6)])
    assert found["split"].nunique() == 1
    key = f"user {content_of('user', 1):016x}"
    assert found["split"].tolist() == [NAMES[selection.split_of(selection.draws([key], 1, "split"), SHARES)][0]] * 6


def test_prompts_that_begin_alike_stay_together_and_one_of_them_goes() -> None:
    found = selected([row(4, variant, kind="rankings") for variant in (0, 4)])
    assert found["split"].nunique() == 1
    found = selected([row(4, variant) for variant in (0, 4)])
    assert sorted(reasons(found), key=str) == [None, "near-duplicate"]
    apart = selected([row(3, variant) for variant in (0, 4)])
    assert reasons(apart) == [None, None]


@pytest.mark.parametrize(("weight", "copies"), [(0.25, {0: 750, 1: 250}), (1.0, {1: 1000}), (2.75, {2: 250, 3: 750})])
def test_weights(weight: float, copies: dict[int, int]) -> None:
    """{how often: of 1000 rows}, to four standard errors."""
    rows = pd.DataFrame({"source": pd.Categorical(["a"] * 1000), "content": range(1000)})
    drawn = selection.copies(rows, {"a": Blend(weight, SHARES)}, seed=1)
    assert dict(zip(*np.unique(drawn, return_counts=True), strict=True)) == pytest.approx(copies, abs=55)
    assert np.array_equal(selection.copies(rows[::-1], {"a": Blend(weight, SHARES)}, seed=1), drawn[::-1])


def test_a_row_that_is_not_drawn() -> None:
    rows = [row(family, source="b") for family in range(4)]
    found = selected(rows)
    assert reasons(found) == [None if stable_share(1, "weight", row["content"]) < 0.7 else "not drawn" for row in rows]


def test_eval_keeps_its_prompts_then_labelled_ones_stay() -> None:
    """Three near prompts in three splits, of which one alone is not labelled."""
    units = pd.DataFrame(
        {
            "id": np.array([IDS[0, 0], IDS[0, 1], IDS[0, 2], IDS[1, 0], IDS[1, 1]], np.uint64),
            "kind": ["rankings", "rankings", "prompts", "rankings", "prompts"],
            "side": pd.Categorical(["sft", "reward", "eval", "ppo", "sft"], selection.SPLITS),
            "prefix": np.uint64(0),
        }
    )
    gone = selection.leaking(units, selection.finder(PROMPTS, 0.8), seed=1)
    assert gone.to_dict() == {0: IDS[0, 2], 1: IDS[0, 2], 4: IDS[1, 0]}


def test_near_duplicates_are_not_looked_for_where_the_threshold_is_null() -> None:
    rows = [row(0, variant) for variant in range(4)]
    assert reasons(selected(rows, near_duplicate=None)) == [None] * 4
    assert reasons(selected(rows)).count(None) == 1


@pytest.mark.parametrize(("shared", "reason"), [(False, "leak"), (True, None)])
def test_shared_prompts_may_be_ranked_and_in_ppo(shared: bool, reason: str | None) -> None:
    """Two labelled rows and near ones, one of each in the split ppo; mere prompts are there already."""
    sources = {"a": Blend(1.0, {"reward": 1.0}), "b": Blend(1.0, {"ppo": 1.0})}
    ranked = [row(0, kind="rankings"), row(0, kind="rankings", source="b", response=1), row(0, 1, "rankings", "b")]
    rows = table([*ranked, row(1, kind="rankings"), row(1, source="b"), row(2, source="b")])
    found = select(rows, PROMPTS, sources, prepare(share_prompts=shared), 1)
    first = reasons(found)[:3]
    assert reason in first
    assert reasons(found)[3:] == [None, "with labels" if shared else "leak", None]
    assert (first == [None] * 3) == shared
    assert leaks(found, PROMPTS, 0.8, shared).empty
    assert list(found.columns) == [*rows.columns, "split", "dropped", "partner", "copies"]


@quick
@given(rows=ANY_ROWS, seed=st.integers(0, 3))
def test_with_shared_prompts_all_other_splits_stay_apart(rows: list[dict[str, Any]], seed: int) -> None:
    found = selected(rows, seed, share_prompts=True)
    kept = found[found["split"].notna()]
    sides = kept["split"].astype(str).replace("ppo", "reward")
    assert leaks(found, PROMPTS, 0.8, share_prompts=True).empty
    assert (kept.assign(side=sides).groupby("id")["side"].nunique() == 1).all()


def test_leaks_names_every_kind() -> None:
    rows = [row(0, 0), row(0, 1), row(1), row(1, kind="rankings"), row(4, 0), row(4, 4), row(2, 0), row(2, 4), row(3)]
    found = table(rows).assign(split=pd.Categorical(["sft", "ppo"] * 4 + [None], selection.SPLITS))
    pairs = leaks(found, PROMPTS, 0.8).sort_values("similarity", ignore_index=True)
    assert [{first, second} for first, second in zip(pairs["id_a"], pairs["id_b"], strict=True)] == [
        {IDS[4, 0], IDS[4, 4]},
        {IDS[0, 0], IDS[0, 1]},
        {IDS[1, 0]},
    ]
    assert pairs[["split_a", "split_b"]].to_numpy().tolist() == [["sft", "ppo"]] * 3
    assert pairs["similarity"].iloc[0] < 0.5
    assert 0.8 <= pairs["similarity"].iloc[1] < 1
    assert pairs["similarity"].iloc[2] == 1
    assert len(leaks(found, PROMPTS, None)) == 2
    assert leaks(found[found["split"].isna()], PROMPTS, 0.8).empty


def test_contradictions_by_hand() -> None:
    votes = [
        (1, 5, 9, -1, 10),  # 5 is better
        (1, 9, 5, -1, 11),  # 9 is
        (1, 9, 5, 1, 12),  # 5 is
        (1, 5, 9, 0, 13),
        (2, 5, 9, -1, 14),  # another prompt
        (2, 9, 5, 1, 15),  # the same again
        (3, 7, 7, -1, 16),  # of equal responses neither can be
        (3, 7, 7, 1, 17),
    ]
    pairs = pd.DataFrame(votes, columns=["id", "a", "b", "better", "row"]).astype(
        {"id": "uint64", "a": "uint64", "b": "uint64", "better": "int8"}
    )
    assert contradictions(pairs).to_dict("records") == [
        {"id": 1, "a": 5, "b": 9, "a_better": 2, "b_better": 1, "a_row": 10, "b_row": 11}
    ]
    assert contradictions(pairs.iloc[:0]).empty


@pytest.mark.parametrize(
    ("column", "values"), [("id", np.array([1.5])), ("kind", pd.Categorical(["votes"])), ("user", np.array([-1]))]
)
def test_tables_are_checked(column: str, values: Any) -> None:
    with pytest.raises(pandera.errors.SchemaError, match=column):
        select(table([row(0)]).assign(**{column: values}), PROMPTS, SOURCES, PARAMS.prepare, 1)
