"""Tiny stand-ins that tests build in a second: a language model, a reward model, a repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.conversations import FINGERPRINT_FILE, Conversation

TEXT = "hello dear customer your order is late we are sorry and will refund it by monday user assistant ticket"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION: Conversation = [
    {"role": "system", "content": "we are a shop"},
    {"role": "user", "content": "hello, my order is late"},
    {"role": "assistant", "content": "we are sorry"},
    {"role": "user", "content": "and my refund?"},
]
IN_CHATML = (
    "<|im_start|>system\nwe are a shop<|im_end|>\n<|im_start|>user\nhello, my order is late<|im_end|>\n"
    "<|im_start|>assistant\nwe are sorry<|im_end|>\n<|im_start|>user\nand my refund?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def tiny_tokenizer(texts: Iterable[str] = ()) -> Any:
    """A byte-level BPE: any text becomes tokens and back. `texts` teach it longer tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT, *texts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=special[0], pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.chat_template = CHATML
    tokenizer.padding_side = "left"
    return tokenizer


def tiny_model_dir(path: Path, *, reward: bool = False, seed: int = 0, texts: Iterable[str] = ()) -> Path:
    """A Llama with two layers and random weights in the transformers layout, as the stages write it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from tasks.models import save_model

    tokenizer = tiny_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=not reward,
        initializer_range=0.2,  # with the usual 0.02 a tied model only echoes its last token
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model: Any
    if reward:
        config.num_labels = 1
        config.score_bias = 0.25
        model = LlamaForSequenceClassification(config)
    else:
        model = LlamaForCausalLM(config)
    save_model(model, tokenizer, path)
    return path


def give_fingerprint(model: Path, *folders: Path) -> None:
    """As if the data in the folders had been prepared with the model's tokenizer."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / FINGERPRINT_FILE, folder)


def shell(folder: Path, *command: str) -> str:
    """Run a command there; `dvc` and `python` are this environment's."""
    program = {"python": [sys.executable], "dvc": [sys.executable, "-m", "dvc"]}.get(command[0], [command[0]])
    done = subprocess.run([*program, *command[1:]], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tiny_repo(folder: Path) -> Path:
    """A git and DVC repository with a local default remote and one commit."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shell(folder, "git", "init", "--quiet")
    shell(folder, "git", "config", "user.name", "Test")
    shell(folder, "git", "config", "user.email", "test@example.com")
    shell(folder, "dvc", "init", "--quiet")
    shell(folder, "dvc", "remote", "add", "--quiet", "--default", "local", str(folder.parent / f"{folder.name}-remote"))
    shell(folder, "git", "commit", "--quiet", "--all", "--message", "Start", "--allow-empty")
    return folder


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own there, which is full after so many bytes ("64k")."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
