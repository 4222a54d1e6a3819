"""Generation: responses of a policy to prompts, with what training needs of them captured on the way.

Whole batches at once, a cache that is written in place, sampling by the inverse of the cumulative distribution. The
random numbers are an argument, so a response depends on its own numbers and not on its neighbours in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from tasks.models import Branch, Trunk, causal_mask, device_of, left_padded, positions_of, shared_prompt_mask
from tasks.ppo.decoding import Decoder

ROWS_AT_ONCE = 16  # episodes in a forward pass without gradients
COMPACT_BELOW = 0.7  # share of unfinished rows under which copying the cache costs less than carrying finished rows


class Rollout(NamedTuple):
    """B episodes: prompts left-padded to P tokens, responses right-padded to R tokens. Masks: True means keep."""

    tokens: Tensor  # (B, P + R) long
    mask: Tensor  # (B, P + R) bool
    prompt_length: int  # P
    logprobs: Tensor  # (B, R), of each response token under the policy at its temperature; 0 on padding
    states: Tensor  # (B, P + R, H) trunk states, or ids (B, P + R) where there is no trunk
    ended: Tensor  # (B,) bool, whether the response ends with the end token
    samples: int = 1  # responses a prompt; rows of one prompt are neighbours

    @property
    def response_mask(self) -> Tensor:
        """(B, R)"""
        return self.mask[:, self.prompt_length :]

    @property
    def responses(self) -> Tensor:
        """(B, R) long"""
        return self.tokens[:, self.prompt_length :]

    def rows(self, chosen: Tensor) -> Rollout:
        """Some of the episodes: with several samples a prompt, all of a prompt's."""
        return Rollout(
            self.tokens[chosen],
            self.mask[chosen],
            self.prompt_length,
            self.logprobs[chosen],
            self.states[chosen],
            self.ended[chosen],
            self.samples,
        )

    def chunks(self) -> Iterator[Rollout]:
        """The episodes in order, so many at once as a forward pass without gradients should take."""
        count = max(1, ROWS_AT_ONCE // self.samples) * self.samples
        return (self.rows(rows) for rows in torch.arange(len(self.tokens)).split(count))

    def padded(self, length: int) -> Rollout:
        """The same with responses padded to `length` tokens."""
        more = length - self.responses.shape[1]
        if more == 0:
            return self
        return self._replace(
            tokens=F.pad(self.tokens, (0, more)),
            mask=F.pad(self.mask, (0, more)),
            logprobs=F.pad(self.logprobs, (0, more)),
            states=F.pad(self.states, (0,) * 2 * (self.states.dim() - 2) + (0, more)),
        )

    def response_ids(self) -> list[list[int]]:
        """The response tokens of each episode, without padding, with the end token where there is one."""
        return [row[keep].tolist() for row, keep in zip(self.responses, self.response_mask, strict=True)]


class Sampler(Protocol):
    """What generates: `generate` here, or another engine (vLLM, say) that hands its tokens to `as_rollout`."""

    def __call__(
        self,
        trunk: Trunk,
        branch: Branch,
        prompts: Sequence[list[int]],
        uniforms: Tensor | None,
        *,
        max_new_tokens: int,
        end_token: int,
        pad_token: int,
        temperature: float,
        top_p: float,
        samples_per_prompt: int,
    ) -> Rollout: ...


@torch.no_grad()
def generate(
    trunk: Trunk,
    branch: Branch,
    prompts: Sequence[list[int]],
    uniforms: Tensor | None,
    *,
    max_new_tokens: int,
    end_token: int,
    pad_token: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    after_token: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample `samples_per_prompt` responses to each prompt; rows of one prompt are neighbours in the result.

    uniforms: (B, max_new_tokens) numbers in [0, 1), B = prompts x samples; None for greedy decoding.
    after_token: is called with how many tokens of the longest response there are, for a progress bar.
    """
    device = device_of(branch)
    ids, prompt_mask = (part.to(device) for part in left_padded(list(prompts), pad_token))
    uniforms = None if uniforms is None else uniforms.to(device)
    copies = torch.arange(len(prompts), device=device).repeat_interleave(samples_per_prompt)  # the prompt of each row
    batch, width = len(copies), ids.shape[1]
    total = width + max_new_tokens
    cache = Cache(layers=[PreallocatedLayer(total) for _ in range((branch.depth or 0) + len(branch.backbone.layers))])

    # The prompt goes through once, however many samples it gets.
    attention, positions = causal_mask(prompt_mask), positions_of(prompt_mask)
    prompt_states = trunk(ids, attention, positions, cache)
    final = branch(prompt_states, attention, positions, cache)[:, -1][copies]
    if samples_per_prompt > 1:
        cache.batch_select_indices(copies)

    tokens = torch.full((batch, total), pad_token, device=device)
    tokens[:, :width] = ids[copies]
    mask = torch.zeros(batch, total, dtype=torch.bool, device=device)
    mask[:, :width] = prompt_mask[copies]
    logprobs = torch.zeros(batch, max_new_tokens, device=device)
    states = prompt_states.new_zeros(batch, total, *prompt_states.shape[2:])
    states[:, :width] = prompt_states[copies]
    ended = torch.zeros(batch, dtype=torch.bool, device=device)

    through_trunk, through_branch = Decoder(trunk, batch), Decoder(branch, batch)
    rows = torch.arange(batch, device=device)  # the rows that the cache and `final` hold
    alive = torch.ones(batch, dtype=torch.bool, device=device)  # which of them are still being written
    for step in range(max_new_tokens):
        here = width + step
        draws = None if uniforms is None else uniforms[rows, step]
        chosen, logprob = sample_tokens(through_branch.head(final).float(), draws, temperature, top_p)
        chosen = torch.where(alive, chosen, pad_token)
        tokens[rows, here] = chosen
        mask[rows, here] = alive
        logprobs[rows, step] = torch.where(alive, logprob, 0.0)
        ended[rows] |= alive & (chosen == end_token)
        alive = alive & (chosen != end_token)
        if after_token is not None:
            after_token(step + 1)

        attention = mask[rows, None, None, : here + 1]
        positions = mask[rows, : here + 1].sum(-1, keepdim=True) - 1
        state = through_trunk(chosen, attention, positions, cache)
        states[rows, here] = state
        if not alive.any() or here + 1 == total:
            break
        final = through_branch(state, attention, positions, cache)
        # packed weights are for one number of rows, and few enough that finished ones cost next to nothing
        if not through_trunk.packed and alive.float().mean() < COMPACT_BELOW:
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, alive, final = rows[kept], alive[kept], final[kept]

    longest = int(mask[:, width:].sum(-1).max())
    cut = width + longest
    return Rollout(
        tokens[:, :cut], mask[:, :cut], width, logprobs[:, :longest], states[:, :cut], ended, samples_per_prompt
    )


@torch.no_grad()
def as_rollout(
    trunk: Trunk,
    branch: Branch,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    end_token: int,
    pad_token: int,
    temperature: float = 1.0,
    samples_per_prompt: int = 1,
) -> Rollout:
    """Responses that something else generated, as an episode each: states and log-probabilities come from our models.

    responses: `samples_per_prompt` to each prompt, neighbours, at least one token each; each is cut off after its
    first end token.
    """
    device = device_of(branch)
    cut = [row[: row.index(end_token) + 1] if end_token in row else row for row in responses]
    longest = max(map(len, cut))
    ids, prompt_mask = left_padded([prompts[place // samples_per_prompt] for place in range(len(cut))], pad_token)
    tokens = torch.cat([ids, torch.tensor([row + [pad_token] * (longest - len(row)) for row in cut])], dim=1)
    response_mask = torch.arange(longest) < torch.tensor([len(row) for row in cut])[:, None]
    tokens, mask = tokens.to(device), torch.cat([prompt_mask, response_mask], dim=1).to(device)
    states = torch.cat(
        [
            trunk(rows, causal_mask(keep), positions_of(keep))
            for rows, keep in zip(tokens.split(ROWS_AT_ONCE), mask.split(ROWS_AT_ONCE), strict=True)
        ]
    )
    ended = torch.tensor([row[-1] == end_token for row in cut], device=device)
    nothing = torch.zeros(len(cut), longest, device=device)
    rollout = Rollout(tokens, mask, ids.shape[1], nothing, states, ended, samples_per_prompt)
    return rollout._replace(logprobs=response_logprobs(branch, rollout, temperature))


def sample_tokens(logits: Tensor, draws: Tensor | None, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row: logits (B, V), draws (B,) in [0, 1) or None for greedy -> (tokens (B,), logprobs (B,)).

    The log-probability is the policy's own, at the temperature, before top-p leaves anything out.
    """
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if draws is None:
        tokens = logits.argmax(-1)
    else:
        kept = probabilities if top_p >= 1 else _nucleus(probabilities, top_p)
        cumulative = kept.cumsum(-1)
        # right=True: a token of probability 0 is never chosen
        threshold = draws[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log()


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities add up to top_p (Holtzman et al. 2020)."""
    ordered, order = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * (before < top_p))


def final_states(branch: Branch, rollout: Rollout) -> Tensor:
    """The branch's final states (B, 1 + R, H) at the prompt's last token and at each response token; 0 on padding.

    A prompt goes through once, with all its samples behind it in one sequence, and padding does not go through: of a
    prompt of 60 tokens with 4 samples of 20 to 60, that saves half of the work.
    """
    width, samples = rollout.prompt_length, rollout.samples
    prompts, length = len(rollout.tokens) // samples, rollout.responses.shape[1]
    inputs = torch.cat(
        [
            rollout.states[::samples, :width],
            rollout.states[:, width:].reshape(prompts, samples * length, *rollout.states.shape[2:]),
        ],
        dim=1,
    )
    prompt_mask, response_mask = rollout.mask[::samples, :width], rollout.response_mask.reshape(prompts, -1)
    keep = torch.cat([prompt_mask, response_mask], dim=1)  # (prompts, P + samples * R)
    number = torch.arange(1, samples + 1, device=keep.device).repeat_interleave(length)
    blocks = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.long), number.expand(prompts, -1)], dim=1)
    after = prompt_mask.sum(-1, keepdim=True) + torch.arange(length, device=keep.device).repeat(samples)
    positions = torch.cat([positions_of(prompt_mask), after], dim=1)

    # what is kept, in order, to the front of each row
    longest = int(keep.sum(-1).max())
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, :longest]
    row = torch.arange(prompts, device=keep.device)[:, None]
    kept = keep[row, order]
    final: Tensor = branch(
        inputs[row, order],
        shared_prompt_mask(torch.where(kept, blocks[row, order], -1)),
        torch.where(kept, positions[row, order], 0),
    )
    spread = final.new_zeros(*keep.shape, final.shape[-1]).index_put((row, order), final * kept[..., None])
    start = spread[:, width - 1 : width].repeat_interleave(samples, dim=0)
    return torch.cat([start, spread[:, width:].reshape(len(rollout.tokens), length, -1)], dim=1)


def response_logprobs(branch: Branch, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probabilities (B, R) of the response tokens at a temperature; 0 on padding.

    Under no_grad the rows go through in chunks, for memory; with gradients the caller chooses how many to hand over.
    """
    parts = [rollout] if torch.is_grad_enabled() else rollout.chunks()
    return torch.cat([token_logprobs(branch, final_states(branch, part), part, temperature) for part in parts])


def token_logprobs(branch: Branch, final: Tensor, rollout: Rollout, temperature: float) -> Tensor:
    """The same from final states (B, 1 + R, H). The head, dear over a large vocabulary, sees kept positions alone."""
    keep = rollout.response_mask
    chosen = chosen_logprobs(branch.head, final[:, :-1][keep], rollout.responses[keep], temperature)
    return torch.zeros(keep.shape, device=keep.device).masked_scatter(keep, chosen)


def chosen_logprobs(head: nn.Module, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (N,) of tokens (N,) under a vocabulary head on states (N, H), at a temperature."""
    plain = isinstance(head, nn.Linear) and head.bias is None
    if plain and not torch.is_autocast_enabled(states.device.type):
        return _ChosenLogprobs.apply(states, head.weight, tokens, temperature)  # type: ignore[no-any-return, no-untyped-call]
    return -F.cross_entropy(head(states).float() / temperature, tokens, reduction="none")


class _ChosenLogprobs(torch.autograd.Function):
    """The head and its log-softmax in one, over one buffer of N x V numbers: they are the largest of a training step.

    log p(token) = logit(token) - logsumexp(logits), all divided by the temperature; its gradient by the logits is
    one at the token, less the probabilities.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        logits = states @ weight.T
        if temperature != 1:
            logits /= temperature
        top = logits.amax(-1, keepdim=True)
        chosen = (logits.gather(-1, tokens[:, None]) - top)[:, 0]
        probabilities = logits.sub_(top).exp_()  # up to their sum
        total = probabilities.sum(-1)
        logprobs = chosen - total.log()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(states, weight, tokens, probabilities.div_(total[:, None]))
            ctx.temperature = temperature
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        states, weight, tokens, probabilities = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        by_logits = probabilities.mul_(-gradient[:, None])  # its only use
        by_logits[torch.arange(len(tokens), device=tokens.device), tokens] += gradient
        by_states = by_logits @ weight if ctx.needs_input_grad[0] else None
        by_weight = by_logits.T @ states if ctx.needs_input_grad[1] else None
        return by_states, by_weight, None, None


@torch.no_grad()
def score_last_token(branch: Branch, rollout: Rollout) -> Tensor:
    """A scalar model's output (B,) at each response's last token."""
    scores = []
    for part in rollout.chunks():
        final = final_states(branch, part)
        last = final[torch.arange(len(final), device=final.device), part.response_mask.sum(-1)]
        scores.append(branch.head(last)[:, 0].float())
    return torch.cat(scores)


def uniforms_for(seed: int, names: Iterable[str], length: int) -> Tensor:
    """(len(names), length) random numbers in [0, 1); a row depends on the seed and its own name alone."""
    rows = []
    for name in names:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows.append(torch.rand(length, generator=generator))
    return torch.stack(rows)


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one block, written in place; transformers' own layer copies the whole cache at every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, D) and return all that is held so far."""
        if self.length == 0:
            batch, heads, _, width = key_states.shape
            self.keys = key_states.new_zeros(batch, heads, self.capacity, width)
            self.values = value_states.new_zeros(batch, heads, self.capacity, value_states.shape[-1])
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]
