"""PPO-ptx: the gradient of a language-model loss, mixed into PPO's (Ouyang et al. 2022, equation 2, its last term)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.models import Branch, Packed, Trunk, by_length, device_of, pack, run_packed
from tasks.ppo.rollout import chosen_logprobs


class Text(NamedTuple):
    """What the language model is to predict, after what it is given: a demonstration's response after its prompt.

    Of a plain text, `given` is its first token, from which the others follow.
    """

    given: list[int]
    predicted: list[int]


def texts_of_step(texts: Sequence[Text], order: Sequence[int], step: int, count: int) -> list[Text]:
    """The `count` texts of an optimizer step, in the given order, each before any comes again."""
    return [texts[order[place % len(order)]] for place in range(step * count, (step + 1) * count)]


def token_count(texts: Sequence[Text]) -> int:
    return sum(len(text.predicted) for text in texts)


def losses(trunk: Trunk, branch: Branch, texts: Sequence[Text], at_once: int, count: float) -> Iterator[Tensor]:
    """-log p of the texts' predicted tokens, in parts of `at_once` texts that add up to its sum over `count` tokens.

    The paper's term is gamma * E[log pi(x)] with gamma = 27.8, 8 pretraining examples for each episode, and the
    gradients of both accumulated before the step (appendix C.4). PPO's loss is a mean over tokens here, and so is this.
    """
    device = device_of(branch)
    packs = [_to(pack(text.given, [text.predicted]), device) for text in texts]
    for chosen in by_length(packs, at_once):
        part = [packs[place] for place in chosen]
        through = part
        if trunk.depth is not None:
            states = run_packed(trunk, part)
            through = [one._replace(inputs=state) for one, state in zip(part, states, strict=True)]
        finals, targets = [], []
        for final, one in zip(run_packed(branch, through), part, strict=True):
            start = int((one.blocks == 0).sum())
            finals.append(final[start - 1 : -1])  # the state at t predicts the token at t + 1
            targets.append(one.inputs[start:])
        yield -chosen_logprobs(branch.head, torch.cat(finals), torch.cat(targets), 1.0).sum() / count


def _to(one: Packed, device: torch.device) -> Packed:
    return Packed(*(part.to(device) for part in one))
