"""The work that both sides of a comparison do: prompts, response lengths and a small model, the same from one seed.

Needs torch alone, so that it runs in the peer's environment too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST_TOKEN = 32  # below are the special tokens: none is in a prompt (SmolLM2 has 17)


# vocabulary, width, width of the MLP, layers, heads, key-value heads; the last two are SmolLM2's
SHAPES = {
    "10M": (8192, 256, 1024, 8, 4, 4),
    "45M": (16384, 448, 1280, 16, 7, 7),
    "135M": (49152, 576, 1536, 30, 9, 3),
    "360M": (49152, 960, 2560, 32, 15, 5),
}


def model_config(shape: str) -> dict[str, Any]:
    """Arguments of a LlamaConfig of about so many parameters."""
    vocabulary, width, mlp, layers, heads, kv_heads = SHAPES[shape]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def make_prompts(seed: int, update: int, batch: int, max_length: int, vocab_size: int, ragged: bool) -> list[list[int]]:
    """Random tokens. Each prompt has max_length of them; ragged: uniformly between half of it and all of it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + update)
    shortest = (max_length + 1) // 2 if ragged else max_length
    lengths = torch.randint(shortest, max_length + 1, (batch,), generator=generator).tolist()
    lengths[0] = max_length  # one is full, so that the padded width does not hang on the seed
    return [torch.randint(FIRST_TOKEN, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def response_lengths(seed: int, update: int, batch: int, max_length: int) -> Tensor:
    """Ragged responses' lengths (B,), end token included: uniformly between a quarter of max_length and all of it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_000 + update)
    lengths = torch.randint((max_length + 3) // 4, max_length + 1, (batch,), generator=generator)
    lengths[0] = max_length  # the batch is not over before its last step
    return lengths


def force_lengths(logits: Tensor, step: int, lengths: Tensor | None, end_token: int, pad_token: int) -> Tensor:
    """The logits (B, V) of response token `step` (from 0) with the end certain at a row's length, impossible elsewhere.

    lengths: (B,) end token included; None: no row ends. Padding is impossible, as the peer takes it for the end.
    """
    forced = logits.clone()
    forced[:, [end_token, pad_token]] = -torch.inf
    if lengths is not None:
        last = (lengths == step + 1).to(logits.device)
        forced[last] = -torch.inf
        forced[last, end_token] = 0
    return forced
