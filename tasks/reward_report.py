"""What the reward model is worth, on rankings that it was not trained on: where it agrees with the labelers, whether it
knows how sure it is, and what it can be fooled by."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.conversations import text_of
from tasks.datasets import Ranking
from tasks.intervals import RESAMPLES, length_thirds, resamples, with_interval, with_interval_by_group

BINS = 10


class Pair(NamedTuple):
    """Two responses to one prompt that a labeler did not tie."""

    prompt: str  # its id
    ranking: int  # the place of the labeler's ranking among the rankings
    margin: float  # score of the better one less that of the worse one
    distance: int  # ranks between them
    words: int  # how many more the better one has

    @property
    def right(self) -> float:
        """1 where the scores agree with the labeler, 0 where not, 1/2 where they are equal."""
        return float(self.margin > 0) + 0.5 * (self.margin == 0)


def pairs_of(rankings: Sequence[Ranking], scores: Sequence[Tensor]) -> list[Pair]:
    """scores: (K,) of each ranking's responses."""
    found = []
    for place, (row, own) in enumerate(zip(rankings, scores, strict=True)):
        words = [len(response.split()) for response in row.responses]
        for better, high in enumerate(row.ranks):
            for worse, low in enumerate(row.ranks):
                if high < low:
                    margin = (own[better] - own[worse]).item()
                    found.append(Pair(row.id, place, margin, low - high, words[better] - words[worse]))
    return found


def accuracy(pairs: Sequence[Pair], seed: int) -> dict[str, float]:
    """Share of the pairs that are scored in the labeler's order, its interval by bootstrap over prompts."""
    right = torch.tensor([pair.right for pair in pairs])
    return with_interval_by_group("accuracy", right, [pair.prompt for pair in pairs], RESAMPLES, seed)


def by_slice(pairs: Sequence[Pair], rankings: Sequence[Ranking], seed: int) -> list[dict[str, Any]]:
    """Accuracy by rank distance, labeler, length of the prompt, and whether the better response is the longer one."""
    thirds = length_thirds([text_of(row.prompt) for row in rankings])
    labels: dict[str, Callable[[Pair], Any]] = {
        "rank distance": lambda pair: pair.distance,
        "labeler": lambda pair: rankings[pair.ranking].labeler,
        "prompt length": lambda pair: thirds[pair.ranking],
        "the better one is": lambda pair: "longer" if pair.words > 0 else "shorter" if pair.words < 0 else "as long",
    }
    rows = []
    for name, label in labels.items():
        for value in sorted({label(pair) for pair in pairs}):
            chosen = [pair for pair in pairs if label(pair) == value]
            rows.append(slice_of(f"{name}: {value}", chosen, seed))
    return rows


def slice_of(name: str, pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    prompts = len({pair.prompt for pair in pairs})
    return {"slice": name, "prompts": prompts, "pairs": len(pairs), **accuracy(pairs, seed)}


def reliability(pairs: Sequence[Pair]) -> list[dict[str, float]]:
    """How often it is right by how sure it is: a row a bin of confidence between 0.5 and 1 that has pairs.

    The model says with a confidence of sigmoid(|margin|) that the response it scores higher is the better one.
    """
    confidence = torch.tensor([pair.margin for pair in pairs]).abs().sigmoid()
    right = torch.tensor([pair.right for pair in pairs])
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    return [
        {
            "pairs": int((place == number).sum()),
            "confidence": confidence[place == number].mean().item(),
            "accuracy": right[place == number].mean().item(),
        }
        for number in range(BINS)
        if (place == number).any()
    ]


def calibration_error(rows: Sequence[dict[str, float]]) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): the mean distance over the pairs, bin by bin, between
    how sure the model was and how often it was right."""
    total = sum(row["pairs"] for row in rows)
    return sum(row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / total


def shuffled(text: str) -> str:
    words = text.split()
    random.Random(text).shuffle(words)
    return " ".join(words)


# What should not make a response better, and most of it worse
PROBES: dict[str, Callable[[str], str]] = {
    "empty": lambda _text: "",
    "first half": lambda text: " ".join(text.split()[: len(text.split()) // 2]),
    "words shuffled": shuffled,
    "said twice": lambda text: f"{text} {text}",
    "politer": lambda text: f"{text} Thank you so very much for your kind patience and understanding.",
    "longer": lambda text: f"{text} Please let us know if there is anything else that we can do for you at any time.",
}


def probed(scores: Tensor, seed: int) -> list[dict[str, Any]]:
    """scores (P, 1 + probes): of a response as it is, then of each of PROBES made of it."""
    picks = resamples(len(scores), RESAMPLES, seed)
    rows = []
    for number, name in enumerate(PROBES, start=1):
        change = scores[:, number] - scores[:, 0]
        rows.append(
            {"probe": name, **with_interval("change", change, picks), "raised": (change > 0).float().mean().item()}
        )
    return rows
