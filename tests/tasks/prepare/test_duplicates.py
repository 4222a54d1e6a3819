"""Shingles, signatures, and the search for prompts that collide."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.prepare import duplicates
from tasks.prepare.duplicates import ENTRIES, Search, Units
from tasks.tickets import generate

TICKETS = [row.prompt for row in generate(seed=1, count=4800)]


def search(
    signatures: np.ndarray[Any, np.dtype[np.uint32]],
    threshold: float = 0.8,
    across: bool = False,
    split: list[int] | None = None,
    stem: list[int] | None = None,
) -> Search:
    """One unit a signature; in one split and each with a stem of its own, if nothing else is said."""
    count = len(signatures)
    units = Units(np.arange(count), np.array(stem or range(count)), np.array(split or [0] * count))
    bits, bands = duplicates.low_bits(signatures), duplicates.band_keys(signatures, threshold)
    return Search(units, across, signatures, bits, bands, threshold)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat sat, the CAT.", {"the cat sat", "cat sat the", "sat the cat"}),
        ("ＴＨＥ  ｃａｔ\nsat", {"the cat sat"}),  # full width
        ("Hello there!", {"hello there"}),
        ("STRASSE straße x", {"strasse strasse x"}),
        ("???", {"???"}),
        ("", {""}),
        ("今日は雨", {"今 日 は", "日 は 雨"}),
        ("GPT4 是什么", {"gpt4 是 什", "是 什 么"}),
    ],
)
def test_shingles_by_hand(text: str, expected: set[str]) -> None:
    assert duplicates.shingles(text) == expected


def test_signatures_are_the_same_in_every_process() -> None:
    assert duplicates.signatures(["The cat sat on the mat."])[0, :4].tolist() == [
        3554024823,
        3332377144,
        3479685412,
        3428200523,
    ]


def test_signatures_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = duplicates.signatures(TICKETS[:50])
    monkeypatch.setattr(duplicates, "BATCH", 7)
    assert np.array_equal(duplicates.signatures(TICKETS[:50]), whole)
    assert np.array_equal(duplicates.low_bits(whole), np.packbits(whole % 2 == 1, axis=1).view(np.uint64))
    assert duplicates.signatures([]).shape == (0, ENTRIES)


def test_equal_entries_estimate_jaccard_similarity() -> None:
    """Of 200 words the first 20 + k differ: 178 - k shingles are shared, of 218 + k."""
    pairs = [
        tuple(" ".join(f"{pair}{word if place < 21 else 'w'}{place}" for place in range(200)) for word in "wx")
        for pair in range(300)
    ]
    exact = 177 / 219
    first, second = (duplicates.signatures(texts) for texts in zip(*pairs, strict=True))
    found = duplicates.similarity(np.concatenate([first, second]), np.arange(300), np.arange(300, 600))
    assert found.mean() == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / ENTRIES / 300))


def test_bands_by_hand() -> None:
    """At 0.8 a near pair has at least 103 equal entries, so 26 bands are more than its 25 others can spoil."""
    assert duplicates.least_equal(0.8) == 103
    bands = duplicates.bands(0.8)
    assert len(bands) == 26
    assert {band.stop - band.start for band in bands} == {4, 5}
    assert [entry for band in bands for entry in range(ENTRIES)[band]] == list(range(ENTRIES))
    assert duplicates.bands(1.0) == [slice(0, 128)]
    assert duplicates.least_equal(0.5) == 64
    assert [band.stop - band.start for band in duplicates.bands(0.3)] == [2] * 64


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.6, 0.8, 0.95]))
def test_a_near_pair_shares_a_band_wherever_its_entries_differ(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(2**32, size=ENTRIES, dtype=np.uint32)
    second = first.copy()
    second[rng.permutation(ENTRIES)[: ENTRIES - duplicates.least_equal(threshold)]] += 1
    keys = duplicates.band_keys(np.stack([first, second]), threshold)
    assert (keys[:, 0] == keys[:, 1]).any()


def made(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Signatures of a few clusters, with pairs on both sides of 0.8 and at it. (count, ENTRIES)"""
    rng = np.random.default_rng(seed)
    signatures = rng.integers(2**32, size=(3, ENTRIES), dtype=np.uint32)[rng.integers(0, 3, count)]
    for row in signatures:
        changed = rng.permutation(ENTRIES)[: rng.choice([0, 10, 13, 25, 26, 60])]
        row[changed] = rng.integers(2**32, size=len(changed), dtype=np.uint32)
    return signatures


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    fixed=st.integers(0, 10),
    across=st.booleans(),
    stems=st.integers(1, 60),
)
def test_keep_is_the_plain_loop(seed: int, count: int, fixed: int, across: bool, stems: int) -> None:
    rng = np.random.default_rng(seed)
    signatures = made(seed, count)
    split, stem = rng.integers(0, 3, count).tolist(), rng.integers(0, stems, count).tolist()
    fixed = min(fixed, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "FIRST", 2)  # many blocks
        patch.setattr(duplicates, "BLOCK", 2)
        rival = duplicates.keep(search(signatures, 0.8, across, split, stem), fixed)

    def collide(a: int, b: int) -> bool:
        alike: bool = stem[a] == stem[b] or (signatures[a] == signatures[b]).mean() >= 0.8
        return alike and (split[a] != split[b]) == across

    kept = list(range(fixed))
    for unit in range(fixed, count):
        if any(collide(unit, other) for other in kept):
            assert rival[unit] in kept
            assert collide(unit, rival[unit])
        else:
            kept.append(unit)
    assert np.flatnonzero(rival < 0).tolist() == kept


def test_a_near_prompt_behind_others_that_share_its_bands_is_found() -> None:
    """Ten prompts that equal the last one in one half, then one in all but ten entries."""
    rng = np.random.default_rng(0)
    signatures = rng.integers(2**32, size=(12, ENTRIES), dtype=np.uint32)
    signatures[:5, :64] = signatures[-1, :64]
    signatures[5:10, 64:] = signatures[-1, 64:]
    signatures[10, 10:] = signatures[-1, 10:]
    rival = duplicates.keep(search(signatures, across=True, split=[0] * 11 + [1]), fixed=11)
    assert rival.tolist() == [-1] * 11 + [10]


def test_no_two_default_tickets_are_near() -> None:
    signatures = duplicates.signatures(TICKETS)
    assert (duplicates.keep(search(signatures), 0) < 0).all()


@pytest.mark.parametrize("fixed", [0, 10_000])
@pytest.mark.parametrize("changed", [0, 5])
def test_a_cluster_takes_time_linear_in_its_prompts(fixed: int, changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 prompts that are all near each other are 2 * 10^8 pairs."""
    count = 20_000
    rng = np.random.default_rng(0)
    signatures = np.repeat(rng.integers(2**32, size=(1, ENTRIES), dtype=np.uint32), count, 0)
    places = rng.integers(0, ENTRIES, (count, changed))
    signatures[np.arange(count)[:, None], places] = rng.integers(2**32, size=(count, changed), dtype=np.uint32)
    compared: list[int] = []
    similarity = duplicates.similarity

    def counting(signatures: Any, left: Any, right: Any) -> Any:
        compared.append(len(left))
        return similarity(signatures, left, right)

    monkeypatch.setattr(duplicates, "similarity", counting)
    split = [0] * fixed + [1, 2] * ((count - fixed) // 2)
    rival = duplicates.keep(search(signatures, across=True, split=split), fixed)
    assert len(set(np.array(split)[rival < 0])) == 1
    assert sum(compared) < 100 * count


def test_pairs_are_all_that_are_near() -> None:
    signatures = made(seed=7, count=60)
    later, earlier = search(signatures).pairs(np.arange(60))
    expected = {
        (b, a)
        for a, b in itertools.combinations(range(60), 2)
        if np.count_nonzero(signatures[a] == signatures[b]) >= 103
    }
    assert expected
    assert set(zip(later.tolist(), earlier.tolist(), strict=True)) == expected
