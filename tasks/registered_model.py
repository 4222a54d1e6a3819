"""A registered model as MLflow loads it: it names a folder in DVC's store by its hash, and holds no weights.

    mlflow.pyfunc.load_model("models:/policy@candidate").predict(["Where is my order?"])
    mlflow.pyfunc.load_model("models:/reward@candidate").predict(DataFrame with the columns prompt and response)

A prompt is a text, which a user says, or a conversation: [{"role": "system", "content": ...}, {"role": "user", ...}].

The weights come from DVC's cache where they are there, else from the DVC remote, and every file's md5 is verified.
MLflow copies this file into each version and runs it elsewhere: it imports nothing of this project.

`model_config` (written by tasks/register.py) has: kind ("language" or "reward"), path, md5, stores (where to look, in
this order: {"url", "options"}), max_new_tokens, batch_size.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel

CHUNK = 1 << 20


class RegisteredModel(PythonModel):  # type: ignore[misc]  # mlflow has no types
    """Answers prompts (kind "language": a list of replies) or scores responses (kind "reward": a list of floats)."""

    def load_context(self, context: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        self.config = context.model_config
        is_reward = self.config["kind"] == "reward"
        # the weights are in memory once they are loaded; no second copy stays on the disk
        with tempfile.TemporaryDirectory(prefix="rlhf-model-") as folder:
            fetch(self.config["md5"], self.config["path"], self.config["stores"], Path(folder))
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            kind: Any = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
            options = {"num_labels": 1} if is_reward else {}
            self.model: Any = kind.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, **options
            ).eval()
        self.tokenizer.padding_side = "left"

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[Any]:
        """A list of prompts serves as well. MLflow enforces any other hint, and warns of none."""
        answer = self._score if self.config["kind"] == "reward" else self._reply
        texts = self._texts(model_input)
        size = int(self.config["batch_size"])
        return [result for at in range(0, len(texts), size) for result in answer(texts[at : at + size])]

    def _texts(self, model_input: Any) -> list[str]:
        """The token text of each row, through the chat template: a prompt, or a prompt with its response."""
        if self.config["kind"] == "reward":
            prompts, responses = _columns(model_input, "prompt", "response")
            return [self._chat(p) + str(r) + self.tokenizer.eos_token for p, r in zip(prompts, responses, strict=True)]
        if hasattr(model_input, "columns"):
            (prompts,) = _columns(model_input, "prompt")
        else:
            one = isinstance(model_input, str) or isinstance(model_input[0], dict)  # a text, or a conversation's turns
            prompts = [model_input] if one else list(model_input)
        return [self._chat(prompt) for prompt in prompts]

    def _chat(self, prompt: Any) -> str:
        """prompt: a text, or the turns of a conversation."""
        of_turns = isinstance(prompt, Iterable) and not isinstance(prompt, str)
        turns = list(prompt) if of_turns else [{"role": "user", "content": str(prompt)}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _reply(self, texts: list[str]) -> list[str]:
        import torch
        from transformers import GenerationConfig

        batch = self.tokenizer(
            texts, add_special_tokens=False, padding=True, return_tensors="pt"
        )  # (B, T), left-padded
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=int(self.config["max_new_tokens"]),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        with torch.inference_mode():
            ids = self.model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=greedy
            )
        replies = self.tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return [reply.strip() for reply in replies]

    def _score(self, texts: list[str]) -> list[float]:
        import torch

        batch = self.tokenizer(
            texts, add_special_tokens=False, padding=True, return_tensors="pt"
        )  # (B, T), left-padded
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            hidden = self.model.base_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
            ).last_hidden_state
            scores = self.model.score(hidden[:, -1])[:, 0] - self.model.config.score_bias  # (B,)
        return [float(score) for score in scores]


def _columns(table: Any, *names: str) -> list[list[Any]]:
    missing = [name for name in names if name not in getattr(table, "columns", [])]
    if missing:
        raise ValueError(f"the input must be a DataFrame with the columns {', '.join(names)}; missing: {missing}")
    return [list(table[name]) for name in names]


def fetch(md5: str, path: str, stores: Iterable[dict[str, Any]], folder: Path) -> None:
    """Put the DVC folder with this hash into `folder`, every file verified."""
    listing = folder / "listing.json"
    stores = list(stores)
    fetch_object(md5, path, stores, listing)
    entries = json.loads(listing.read_text(encoding="utf-8"))
    listing.unlink()
    for entry in entries:
        name = PurePosixPath(entry["relpath"])
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{path}: the listing {md5} names a file outside its folder: {name}")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch_object(entry["md5"], f"{path}/{name}", stores, target)


def fetch_object(md5: str, path: str, stores: list[dict[str, Any]], target: Path) -> None:
    """Copy one object of DVC's store, from the first place that has it. A damaged one is refused, not passed over."""
    import fsspec

    digest, is_listing = md5.removesuffix(".dir"), md5.endswith(".dir")
    place = f"files/md5/{digest[:2]}/{digest[2:]}" + (".dir" if is_listing else "")
    failures = []
    for store in stores:
        url = f"{store['url'].rstrip('/')}/{place}"
        try:
            with fsspec.open(url, "rb", **store["options"]) as source, target.open("wb") as copy:
                actual = hashlib.md5(usedforsecurity=False)
                while chunk := source.read(CHUNK):
                    actual.update(chunk)
                    copy.write(chunk)
        except (OSError, ValueError, ImportError) as error:
            failures.append(f"  {url}: {type(error).__name__}: {error}")
            continue
        if actual.hexdigest() != digest:
            raise OSError(
                f"{path} is damaged: {url} has the md5 {actual.hexdigest()}, not {digest}. "
                "Delete that file and fetch it again with `dvc pull`."
            )
        return
    raise FileNotFoundError(
        f"{path} ({md5}) was not found in any place that the registered model names:\n" + "\n".join(failures) + "\n"
        "In the repository that registered it, `dvc push` copies it to the remote."
    )


mlflow.models.set_model(RegisteredModel())
