"""Which prompts are alike: MinHash signatures of their three-word shingles, and a search that is sure of its finds.

The Jaccard similarity of two prompts' shingles is estimated by the share of equal entries in their signatures (Broder,
"On the resemblance and containment of documents", 1997; its standard error at 0.8 is 0.035), and `near` means that this
estimate reaches the threshold.

The search is by bands (Leskovec et al., Mining of Massive Datasets, section 3.4), with as many as make it certain: see
`bands`. A cluster of n alike prompts has n² pairs, so nothing here lists all of them: `keep` asks for each prompt
whether one that is kept already collides with it. What stays quadratic, the weak spot of all banding, is one template
that fills less than the threshold of very many prompts and does not begin them: 100,000 of similarity 0.4 take minutes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import rensa
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

ENTRIES = 128  # of a signature
SEED = 1  # of the hash functions: signatures are the same in every process and run
BATCH = 10_000  # texts whose shingles are in memory at once
BLOCK = 8192  # pairs that are compared at once: 8 MB, which a processor's cache holds
FIRST = 256  # units that `keep` decides first
SHIFT, UNIT = np.uint64(32), np.uint64(2**32 - 1)  # of numbers that hold a key above a unit

# Chinese and Japanese are written without spaces: each of their characters counts as a word. So does each sign that is
# no punctuation: 7 + 5 is not 7 - 5. All else makes words, even the marks of Hindi's vowels, which \w lacks.
ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
SIGNS = r"#$%&*+\-/<=>@\\^_`|~\u00ac\u00b1\u00d7\u00f7\u2190-\u22ff"
PUNCTUATION = r"!\"'(),.:;?\[\]{}\u00a1\u00ab\u00bb\u00bf\u2010-\u205e\u3001-\u3020"
WORD = re.compile(rf"[{ALONE}{SIGNS}]|[^\s{ALONE}{SIGNS}{PUNCTUATION}]+")


def shingles(text: str) -> set[str]:
    """All runs of three words, without regard to case, width of characters or punctuation; of a text with fewer words
    all of them as one, of a text with none the text."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    words = WORD.findall(normal)
    if len(words) < 3:
        return {" ".join(words) or normal}
    return set(map(" ".join, zip(words, words[1:], words[2:], strict=False)))


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash of each text's shingles. (N, ENTRIES)"""
    found = np.empty((len(texts), ENTRIES), np.uint32)
    for start in range(0, len(texts), BATCH):
        sets = [shingles(text) for text in texts[start : start + BATCH]]
        found[start : start + BATCH] = rensa.RMinHash.digests_from_token_sets(sets, ENTRIES, SEED)
    return found


def bands(threshold: float) -> list[slice]:
    """The parts that signatures are cut into; prompts are compared where a part of theirs is equal.

    Of ENTRIES entries the fewest that must be equal are ceil(threshold * ENTRIES). With more bands than may differ, one
    band is equal in every near pair (pigeonhole): at 0.8 these are 26 bands of 4 or 5 entries. From thresholds below
    a half on that would be bands of one entry, which much that is not near shares; there are at most ENTRIES / 2, and a
    pair of similarity t is found with probability 1 - (1 - t²)^(ENTRIES / 2), 0.997 at 0.3.
    """
    count = min(ENTRIES - least_equal(threshold) + 1, ENTRIES // 2)
    ends = np.linspace(0, ENTRIES, count + 1).astype(int).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def least_equal(threshold: float) -> int:
    """The fewest equal entries of a near pair."""
    return int(np.ceil(threshold * ENTRIES - 1e-9))


def band_keys(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.uint32]:
    """(B, N): equal where the band is equal, and else by chance (once in 2^32)."""
    keys = np.zeros((len(bands(threshold)), len(signatures)), np.uint32)
    for row, band in zip(keys, bands(threshold), strict=True):
        mixed = np.zeros(len(signatures), np.uint64)
        for entry in signatures[:, band].T:  # (N,)
            mixed = (mixed ^ entry) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing
            mixed ^= mixed >> np.uint64(29)
        row[:] = mixed >> np.uint64(32)
    return keys


def low_bits(signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """The lowest bit of each entry (Li and König, "b-Bit Minwise Hashing", 2010). (N, ENTRIES / 64)"""
    parts = (signatures[start : start + BATCH] & 1 for start in range(0, len(signatures), BATCH))
    packed = (np.packbits(part.astype(np.uint8), axis=1).view(np.uint64) for part in parts)
    return np.concatenate([np.empty((0, ENTRIES // 64), np.uint64), *packed])


def similarity(signatures: NDArray[np.uint32], left: Ints, right: Ints) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of the pairs of rows left (M,) and right (M,). (M,)"""
    found = np.empty(len(left))
    for start in range(0, len(left), BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = (signatures[left[part]] == signatures[right[part]]).mean(1)
    return found


class Units(NamedTuple):
    """What may collide, the first in the order before the others."""

    prompt: Ints  # (U,) row of the prompt's signature
    stem: Ints  # (U,) the same number: they collide, whatever their signatures
    split: Ints  # (U,)


class Search(NamedTuple):
    """Finds the units that collide: of the same split, or across splits."""

    units: Units
    across: bool
    signatures: NDArray[np.uint32]  # (P, ENTRIES)
    bits: NDArray[np.uint64]  # (P, ENTRIES / 64)
    bands: NDArray[np.uint32]  # (B, P); B = 0: only equal stems collide
    threshold: float

    def ordered(self, number: int, members: Ints) -> NDArray[np.uint64]:
        """Members in the order of a key and then their own, as key * 2^32 + unit: one number sorts many times faster
        than two. The keys are the stem (number 0) and each band. (M,)"""
        units = self.units
        keys = units.stem[members] if number == 0 else self.bands[number - 1][units.prompt[members]]
        return np.sort((keys.astype(np.uint64) << SHIFT) | members.astype(np.uint64))

    def collide(self, number: int, left: Ints, right: Ints) -> Flags:
        """Whether units with the same key do. (M,)"""
        if number == 0:
            return np.ones(len(left), bool)
        a, b = self.units.prompt[left], self.units.prompt[right]
        # where bits differ the entries do, so this turns most others away, and ten times faster, and never a near pair
        near: Flags = np.bitwise_count(self.bits[a] ^ self.bits[b]).sum(1) <= ENTRIES - least_equal(self.threshold)
        near[near] = similarity(self.signatures, a[near], b[near]) * ENTRIES >= least_equal(self.threshold)
        return near

    def sides(self, left: Ints, right: Ints) -> Iterator[tuple[Ints, Ints]]:
        """The parts of left and right between which units may collide."""
        split = self.units.split
        for name in np.unique(split[left]):
            yield left[split[left] == name], right[(split[right] == name) != self.across]

    def spans(self, number: int, left: Ints, right: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Members of left that share their key with earlier ones of right (M,), and where these begin (M,) and end (M,)
        in right in the order of keys (R,)."""
        queries, pool = self.ordered(number, left), self.ordered(number, right)
        begin = np.searchsorted(pool, queries >> SHIFT << SHIFT)
        end = np.searchsorted(pool, queries)
        some = begin < end
        return (queries[some] & UNIT).astype(np.int64), begin[some], end[some], (pool & UNIT).astype(np.int64)

    def lonely(self) -> Flags:
        """Units that share no key with any other. (U,)"""
        everyone = np.arange(len(self.units.prompt))
        lonely = np.ones(len(everyone), bool)
        for number in range(len(self.bands) + 1):
            ordered = self.ordered(number, everyone)
            shared = ordered[1:] >> SHIFT == ordered[:-1] >> SHIFT
            lonely[(ordered[1:][shared] & UNIT).astype(np.int64)] = False
            lonely[(ordered[:-1][shared] & UNIT).astype(np.int64)] = False
        return lonely

    def rivals(self, left: Ints, right: Ints) -> Ints:
        """For each member of left one earlier unit of right that it collides with, or -1. (L,)"""
        found = np.full(len(self.units.prompt), -1)
        for number in range(len(self.bands) + 1):
            for some, others in self.sides(left[found[left] < 0], right):
                members, begin, end, pool = self.spans(number, some, others)
                step = 1  # few at first: in a cluster the first one collides already
                while len(members):
                    take = np.minimum(end - begin, step)
                    for which, place in expand(begin, take):
                        hits = self.collide(number, members[which], pool[place])
                        found[members[which[hits]]] = pool[place[hits]]
                    begin = begin + take
                    left_over = (found[members] < 0) & (begin < end)
                    members, begin, end = members[left_over], begin[left_over], end[left_over]
                    step *= 2
        return found[left]

    def pairs(self, members: Ints) -> tuple[Ints, Ints]:
        """All pairs of members that collide: the later (M,) and the earlier (M,); a pair may come more than once."""
        later, earlier = [members[:0]], [members[:0]]
        for number in range(len(self.bands) + 1):
            for some, others in self.sides(members, members):
                found, begin, end, pool = self.spans(number, some, others)
                for which, place in expand(begin, end - begin):
                    hits = self.collide(number, found[which], pool[place])
                    later.append(found[which[hits]])
                    earlier.append(pool[place[hits]])
        return np.concatenate(later), np.concatenate(earlier)


def expand(begin: Ints, count: Ints) -> Iterator[tuple[Ints, Ints]]:
    """The places begin, begin + 1, ... of each of N spans: (which of the spans (M,), place (M,)), in parts that fit
    into memory."""
    part = np.cumsum(count) // (8 * BLOCK)
    for rows in np.split(np.arange(len(count)), np.flatnonzero(np.diff(part)) + 1):
        which = np.repeat(rows, count[rows])
        ends = np.cumsum(count[rows])
        yield which, np.arange(len(which)) - np.repeat(ends - count[rows], count[rows]) + begin[which]


def keep(search: Search, fixed: int) -> Ints:
    """Go through the units in their order and keep each that collides with no kept one. The first `fixed` stay in any
    case. -1 for a kept unit, for others a kept one that they collide with. (U,)

    Done in blocks that double: after the first k units of a random order those that are undecided collide with few
    others, about (n / k) log n of them (Blelloch et al., "Greedy sequential maximal independent set and matching are
    parallel on average", 2012, section 3), so that even one cluster of all prompts takes time linear in their number.
    """
    rival = np.full(len(search.units.prompt), -1)
    free = np.flatnonzero(~search.lonely())
    first, free = free[free < fixed], free[free >= fixed]
    rival[free] = search.rivals(free, first)
    free = free[rival[free] < 0]
    start, size = 0, FIRST
    while start < len(free):
        block = free[start : start + size]
        before = free[:start]
        rival[block] = search.rivals(block, before[rival[before] < 0])
        settle(rival, *search.pairs(block[rival[block] < 0]))
        start += size
        size = start
    return rival


def settle(rival: Ints, later: Ints, earlier: Ints) -> None:
    """The same for few pairs (M,): in each round the units that no earlier undecided one collides with are kept."""
    while len(later):
        sure = ~np.isin(earlier, later)
        rival[later[sure]] = earlier[sure]
        open_pairs = (rival[later] < 0) & (rival[earlier] < 0)
        later, earlier = later[open_pairs], earlier[open_pairs]
