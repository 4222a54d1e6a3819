"""The work that both sides of a comparison do: prompts, response lengths and a small model, the same from one seed.

And what both are asked and tell. Needs torch alone, so that it runs in the peer's environment too.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
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


def timing_options(description: str) -> argparse.ArgumentParser:
    """What is timed: models, sizes, how often."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, default=Path("data/models/sft"))
    parser.add_argument("--reward", type=Path, default=Path("data/models/reward"))
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape, no folders")
    parser.add_argument("--batch", type=int, default=16, help="episodes an update")
    parser.add_argument("--micro-batch", type=int, default=16, help="episodes a forward pass in training")
    parser.add_argument("--prompt-length", type=int, default=24)
    parser.add_argument("--response-length", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=1, help="updates before those that count")
    parser.add_argument("--updates", type=int, default=2, help="updates that count")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-6)
    parser.add_argument("--seed", type=int, default=1)
    return parser


def learning_options(description: str | None) -> argparse.ArgumentParser:
    """What is learned (bench/time_to_reward.py)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("work", type=Path, help="JSON: models, prompts, settings")
    parser.add_argument("out", type=Path, help="JSON Lines: seconds of training, episodes, answers")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget", type=float, required=True, help="seconds of training")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def peak_rss_bytes() -> int:
    """Of this process: VmHWM, as getrusage's ru_maxrss would start from what the parent had."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
