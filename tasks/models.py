"""Models and tokenizers on disk, and a model seen as a frozen trunk with a trainable branch on top.

Every model of the pipeline is a folder in the transformers layout: safetensors shards, config, tokenizer with chat
template, and the tokenizer's fingerprint. Torch and transformers are all that is needed here.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from tasks.conversations import FINGERPRINT_FILE, Turn, single, text_of
from tasks.stage import UserError

transformers_logging.disable_progress_bar()


# ---- tokenizer ----


def prepare_tokenizer(model: Any, tokenizer: Any) -> None:
    """Give the pair a pad token that is not the end token: with one token for both, masks cannot tell them apart."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = tokenizer.unk_token or tokenizer.bos_token
        if spare is None or spare == tokenizer.eos_token:
            raise UserError(
                "The tokenizer has no token that could serve as padding (unk or bos, other than the end token)."
            )
        tokenizer.pad_token = spare
    tokenizer.padding_side = "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides how text becomes tokens: the vocabulary and rules, special tokens, chat template."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True),
        tokenizer.chat_template or "",
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, checked against the fingerprint written beside it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = (folder / FINGERPRINT_FILE).read_text(encoding="utf-8").strip()
    actual = tokenizer_fingerprint(tokenizer)
    if actual != expected:
        raise UserError(
            f"{folder}: its tokenizer or chat template was changed (fingerprint {actual}, the model was saved with "
            f"{expected}). Restore the folder with `dvc checkout {folder}`."
        )
    return tokenizer


def require_same_tokenizer(*folders: Path) -> None:
    """Models that work together must read text alike, and so must data that were prepared for them."""
    fingerprints = {folder: (folder / FINGERPRINT_FILE).read_text(encoding="utf-8").strip() for folder in folders}
    if len(set(fingerprints.values())) > 1:
        listed = ", ".join(f"{folder}: {fingerprint}" for folder, fingerprint in fingerprints.items())
        raise UserError(
            f"These were made with different tokenizers or chat templates ({listed}). `dvc repro` makes them anew from "
            "one base."
        )


def chat_text(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """A conversation as the chat template writes it, up to where the assistant begins. UserError where the template
    refuses it: some take no system turn, others only user and assistant by turns."""
    try:
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"the model's chat template refuses the turns {roles} of the prompt {text_of(turns)!r:.100}: {error}. "
            "Leave such prompts out, or set `base.chat_template` in params.yaml to one that takes them."
        ) from None
    return text


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Turn]) -> list[int]:
    """A conversation, or a text as one user turn, up to where the assistant begins to write."""
    turns = single(prompt) if isinstance(prompt, str) else prompt
    ids: list[int] = tokenizer(chat_text(tokenizer, turns), add_special_tokens=False).input_ids
    return ids


def encode_response(tokenizer: Any, response: str, *, ended: bool = True) -> list[int]:
    """The response's tokens, with the end token where it ended."""
    ids: list[int] = tokenizer(response, add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id] if ended else ids


def decode_response(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


# ---- on disk ----


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model folder. Small shards, so that layers which training left alone are the same file in DVC's cache."""
    model.save_pretrained(folder, max_shard_size="64MB")
    tokenizer.save_pretrained(folder)
    (folder / FINGERPRINT_FILE).write_text(tokenizer_fingerprint(tokenizer) + "\n", encoding="utf-8")


def load_language_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()


def load_scalar_model(folder: Path) -> Any:
    """A model with one number per token as its output: a reward or a value model.

    From a language model's folder it gets a random head, which the caller sets (tasks/reward.py: init_head).
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a table of warning about that head
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, use_safetensors=True
        ).eval()
    finally:
        transformers_logging.set_verbosity(before)


# ---- trunk and branch ----


def trunk_depth(model: Any, trainable_layers: Literal["all"] | int) -> int | None:
    """How many of the lowest blocks stay frozen; None when everything is trained, the embedding too."""
    if trainable_layers == "all":
        return None
    layers = int(model.config.num_hidden_layers)
    if trainable_layers > layers:
        raise UserError(f"trainable_layers is {trainable_layers}, and the model has {layers} layers.")
    return layers - trainable_layers


def freeze_trunk(model: Any, depth: int | None) -> None:
    """Leave gradients only on the blocks above the trunk, the final norm and, on a scalar model, the head.

    The embedding stays frozen with the trunk, and so does a language-model head, which is tied to it.
    """
    if depth is None:
        return
    model.requires_grad_(False)
    model.model.layers[depth:].requires_grad_(True)
    model.model.norm.requires_grad_(True)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)


class Trunk(nn.Module):
    """Embedding and lowest blocks, frozen. Token ids (B, T) -> states (B, T, H); with depth None, ids pass through."""

    def __init__(self, model: Any, depth: int | None) -> None:
        super().__init__()
        self.depth = depth
        self.backbone = None if depth is None else _slice_backbone(model.model, 0, depth)
        if self.backbone is not None:
            self.backbone.norm = nn.Identity()
            self.backbone.requires_grad_(False)

    def forward(self, ids: Tensor, attention_mask: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        if self.backbone is None:
            return ids
        with torch.no_grad():
            return _final_states(self.backbone, ids, attention_mask, positions, cache)


class Branch(nn.Module):
    """The upper blocks, the final norm and a head. Trunk states (B, T, H) or ids (B, T) -> final states (B, T, H).

    The head is applied by the caller to the positions it needs: over a large vocabulary it costs as much as 8 blocks.
    """

    def __init__(self, model: Any, depth: int | None) -> None:
        super().__init__()
        self.depth = depth
        self.backbone = _slice_backbone(model.model, depth or 0, None)
        self.head: nn.Module = model.score if hasattr(model, "score") else model.lm_head
        if depth is not None:
            self.backbone.embed_tokens = None

    def forward(self, states: Tensor, attention_mask: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        return _final_states(self.backbone, states, attention_mask, positions, cache)

    def trained(self) -> list[nn.Parameter]:
        """The weights that have gradients (a tied embedding once)."""
        return [weight for weight in self.parameters() if weight.requires_grad]

    def frozen_copy(self) -> Branch:
        """This branch as it is now, for good: what is trained is copied, what is frozen is shared."""
        shared = {id(weight): weight for weight in self.parameters() if not weight.requires_grad}
        return copy.deepcopy(self, shared).requires_grad_(False)


def split_model(model: Any, depth: int | None) -> tuple[Trunk, Branch]:
    """The model as a trunk and a branch that share its weights. UserError where the two together are not the model."""
    if not hasattr(getattr(model, "model", None), "layers"):
        raise UserError(f"{type(model).__name__} has no `model.layers`: it cannot be split into trunk and branch.")
    trunk, branch = Trunk(model, depth), Branch(model, depth)
    _check_parts(model, trunk, branch)
    return trunk, branch


@torch.no_grad()
def _check_parts(model: Any, trunk: Trunk, branch: Branch) -> None:
    """Some architectures do more than their blocks and their head: Gemma and Granite scale the embeddings, Cohere,
    Granite and Gemma 2 scale or cap the logits. Then log-probabilities would be wrong, and nothing would tell."""
    pad = model.config.pad_token_id  # a scalar model reads the last token that is none
    tokens = [token for token in range(min(10, model.config.vocab_size)) if token != pad]
    ids = torch.tensor([tokens], device=device_of(branch))
    mask = torch.ones_like(ids, dtype=torch.bool)
    training = model.training
    model.eval()
    whole = model(input_ids=ids, use_cache=False).logits.float()
    sight = causal_mask(mask), positions_of(mask)
    final = branch(trunk(ids, *sight), *sight)
    model.train(training)
    parts = branch.head(final if whole.dim() == 3 else final[:, -1]).float()
    rounding = 1e-4 if next(branch.parameters()).dtype == torch.float32 else 0.03
    largest = (whole - parts).abs().max().item()
    if not largest <= rounding * whole.abs().max().item():
        raise UserError(
            f"{type(model).__name__} does more than its blocks, their norm and its head: its logits are off by up to "
            f"{largest:.3g} without that. Architectures like Llama, Mistral and Qwen work."
        )


def context_of(config: Any) -> int:
    """How many tokens a sequence may have so that each may look at all before it."""
    most = getattr(config, "max_position_embeddings", None) or 10**9
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(most, window or most)


def shared_depth(one: Any, other: Any, at_most: int | None) -> int | None:
    """How many of the lowest blocks are bit-identical in two models, so that one trunk serves both, up to a limit.

    None where even the embeddings differ, or where the limit is None.
    """

    def same(a: nn.Module, b: nn.Module) -> bool:
        own, theirs = list(a.parameters()), list(b.parameters())
        return len(own) == len(theirs) and all(map(torch.equal, own, theirs))

    if at_most is None or not same(one.model.embed_tokens, other.model.embed_tokens):
        return None
    for depth in range(min(at_most, len(other.model.layers))):
        if not same(one.model.layers[depth], other.model.layers[depth]):
            return depth
    return min(at_most, len(other.model.layers))


def _slice_backbone(backbone: Any, start: int, stop: int | None) -> Any:
    """The backbone with some of its blocks, sharing their weights. Transformers' own forward runs it."""
    part = copy.copy(backbone)
    part._modules = dict(backbone._modules)
    part.layers = nn.ModuleList(backbone.layers[start:stop])
    return part


def _final_states(
    backbone: Any, inputs: Tensor, attention_mask: Tensor, positions: Tensor, cache: Cache | None
) -> Tensor:
    """Token ids (B, T) or states (B, T, H) through some blocks and their norm -> (B, T, H)."""
    final: Tensor = backbone(
        **{"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs},
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return final


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def left_padded(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, T); the mask is True on tokens that are kept."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in sequences])
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in sequences])
    return ids, mask


def causal_mask(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, 1, T, T) bool: which positions each position may look at.

    Padding looks at itself, so that no softmax is over nothing and gives NaN.
    """
    length = mask.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=mask.device)
    return square.tril() & mask[:, None, None, :] | square.tril().triu()


def positions_of(mask: Tensor) -> Tensor:
    """Position of each kept token among the kept ones, (B, T); padding gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


# ---- a prompt and its responses as one sequence ----


class Packed(NamedTuple):
    """A prompt and K responses to it in one sequence of T tokens, so that the prompt goes through a model once."""

    inputs: Tensor  # (T,) ids, or (T, H) trunk states
    blocks: Tensor  # (T,) 0 on the prompt, k on its k-th response, counted from 1
    positions: Tensor  # (T,) each response goes on where the prompt ends


def pack(prompt: list[int], responses: list[list[int]]) -> Packed:
    start = len(prompt)
    blocks, positions = [0] * start, list(range(start))
    for number, response in enumerate(responses, start=1):
        blocks += [number] * len(response)
        positions += range(start, start + len(response))
    ids = prompt + [token for response in responses for token in response]
    return Packed(torch.tensor(ids), torch.tensor(blocks), torch.tensor(positions))


def shared_prompt_mask(blocks: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T) bool: a token sees its prompt and its own response up to itself, no other response.

    blocks as in `Packed`, and -1 on padding, which looks at itself, so that no softmax is over nothing and gives NaN.
    """
    length = blocks.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=blocks.device)
    keys, queries = blocks[:, None, :], blocks[:, :, None]
    seen = square.tril() & ((keys == 0) | (keys == queries) & (keys > 0))
    return (seen | square.tril().triu())[:, None]


def run_packed(part: Trunk | Branch, batch: list[Packed]) -> list[Tensor]:
    """The states (T, H) that a trunk or a branch makes of each."""
    inputs = pad_sequence([one.inputs for one in batch], batch_first=True)
    blocks = pad_sequence([one.blocks for one in batch], batch_first=True, padding_value=-1)
    positions = pad_sequence([one.positions for one in batch], batch_first=True)
    states = part(inputs, shared_prompt_mask(blocks), positions)
    return [row[: len(one.blocks)] for row, one in zip(states, batch, strict=True)]


def by_length(packs: list[Packed], batch_size: int) -> Iterator[list[int]]:
    """Batches of places in the list, of similar lengths, so that little padding is computed."""
    order = sorted(range(len(packs)), key=lambda place: len(packs[place].blocks))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def through_trunk(trunk: Trunk, packs: list[Packed], batch_size: int, bar: Any = None) -> list[Packed]:
    """The same with the trunk's states as inputs."""
    done = list(packs)
    for chosen in by_length(packs, batch_size):
        for place, states in zip(chosen, run_packed(trunk, [packs[place] for place in chosen]), strict=True):
            done[place] = packs[place]._replace(inputs=states.clone())
            if bar is not None:
                bar.update(int(packs[place].blocks[-1]))
    return done


def score_packed(branch: Branch, packs: list[Packed]) -> list[Tensor]:
    """A scalar model's output (K,) at the last token of each response."""
    scores = []
    for final, one in zip(run_packed(branch, packs), packs, strict=True):
        ends = one.blocks.bincount().cumsum(0)[1:] - 1
        scores.append(branch.head(final[ends])[:, 0])
    return scores


@torch.no_grad()
def centred_scores(model: Any, packs: list[Packed], batch_size: int, bar: Any = None) -> list[Tensor]:
    """A reward model's scores (K,) of the responses to each prompt, its bias taken off."""
    branch = Branch(model, None)
    scores = [torch.empty(0)] * len(packs)
    for chosen in by_length(packs, batch_size):
        for place, own in zip(chosen, score_packed(branch, [packs[place] for place in chosen]), strict=True):
            scores[place] = own - float(model.config.score_bias)
            if bar is not None:
                bar.update(len(own))
    return scores
