"""Stage `base`: fetch the pre-trained language model, check it, write it as safetensors with its tokenizer.

`python -m tasks.run base`. Three kinds of source, each pinned by its content:

- `wheel:NAME==VERSION`: a pip package that carries a .gguf file; the wheel's sha256 is checked before it is opened.
- `hub:ORG/NAME` with a commit as `revision`: from the Hugging Face hub, or from its local cache without a network.
- `folder:PATH`: a local folder in the transformers layout; `sha256` is of its weights, as this stage computes it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tasks.datasets import write_figures
from tasks.models import context_of, prepare_tokenizer, save_model, split_model, tokenizer_fingerprint
from tasks.stage import Stage, UserError

if TYPE_CHECKING:
    from tasks.params import Base


def run(stage: Stage) -> None:
    model, tokenizer = fetch(stage.params.base)
    split_model(model, 0)  # an architecture that later stages would refuse is refused here
    save_model(model, tokenizer, stage.out("data/models/base"))
    figures = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "vocabulary": model.config.vocab_size,
        "context": context_of(model.config),
    }
    stage.tracker.metrics({f"base/{name}": value for name, value in figures.items()})
    report = {**figures, "tokenizer": tokenizer_fingerprint(tokenizer)}
    write_figures(stage.out("data/reports/base/metrics.json"), {"base": report}, ["base.parameters"])


def fetch(params: Base) -> tuple[Any, Any]:
    """(model, tokenizer) as all stages want them."""
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = load_source(params, Path(scratch))
    if params.chat_template is not None:
        tokenizer.chat_template = params.chat_template
    if not tokenizer.chat_template:
        raise UserError(f"base.model {params.model} has no chat template; set `base.chat_template` in params.yaml.")
    prepare_tokenizer(model, tokenizer)
    return model, tokenizer


def load_source(params: Base, scratch: Path) -> tuple[Any, Any]:
    """(model, tokenizer) from the source that `base.model` names, in fp32, on the CPU."""
    kind, _, name = params.model.partition(":")
    if kind == "wheel":
        gguf = unpack_gguf(fetch_wheel(name, scratch), params, scratch)
        return load_gguf(gguf)
    if kind == "hub":
        if not params.revision or len(params.revision) != 40:
            raise UserError(
                "base.revision must be the 40-digit commit of the hub repository: a branch or tag can move."
            )
        return load_pretrained(name, params.revision)
    if kind == "folder":
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"base.model: {folder} is not a model folder: it has no config.json.")
        check_sha256(params, folder_sha256(folder), f"the folder {folder}")
        return load_pretrained(str(folder), None)
    raise UserError(f"base.model is {params.model!r}; it must start with `wheel:`, `hub:` or `folder:`.")


def fetch_wheel(requirement: str, scratch: Path) -> Path:
    """Download the wheel with pip: from the package index that pip is configured for, or from pip's cache."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    result = subprocess.run([*command, "--quiet", requirement], check=False, capture_output=True, encoding="utf-8")
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reasons = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()[-3:]
        raise UserError(
            f"pip could not download {requirement}: {' '.join(reasons)}\nCheck the network and pip's index."
        )
    return wheels[0]


def unpack_gguf(wheel: Path, params: Base, scratch: Path) -> Path:
    """The one .gguf file of a wheel whose hash is the expected one."""
    with wheel.open("rb") as file:
        check_sha256(params, hashlib.file_digest(file, "sha256").hexdigest(), f"the wheel {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheel.name} holds {len(names)} .gguf files; the stage `base` needs exactly one.")
        return Path(archive.extract(names[0], scratch))


def folder_sha256(folder: Path) -> str:
    """One hash over the names and the contents of the files that make the model."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".json", ".safetensors", ".jinja", ".model", ".txt"}:
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def check_sha256(params: Base, actual: str, what: str) -> None:
    if params.sha256 != actual:
        raise UserError(
            f"{what} has sha256 {actual}, and params.yaml says base.sha256: {params.sha256}.\n"
            "If you trust it, put the first into params.yaml; nothing of it was opened."
        )


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _read_once():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain fp32 now; without these three lines save_pretrained would write them as quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Transformers reads the whole file three times, each several seconds, and makes the same map of names for each of
    the model's modules."""
    import gguf

    with ExitStack() as patches:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patches.enter_context(patch.object(gguf, name, cache(getattr(gguf, name))))
        yield


def load_pretrained(name: str, revision: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"base.model {name}: {error}") from None
    return model, tokenizer
