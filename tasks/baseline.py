"""Stage `baseline`: what the policy is held against. Base and SFT model answer the held-out prompts, once for all
policies that start from them, and the reward model scores the answers.

`python -m tasks.run baseline`. The SFT model answers the first of the prompts several times more: the best of n of
these, by the reward model, is what PPO competes with (Gao et al. 2023, section 3.1).
"""

from __future__ import annotations

from tqdm import tqdm

from tasks.datasets import Prompt, read_rows, write_rows
from tasks.demands import prompts_of_split, require
from tasks.models import require_same_tokenizer
from tasks.panel import Panel
from tasks.stage import Stage


def run(stage: Stage) -> None:
    params = stage.params
    settings = params.baseline
    prompts = read_rows(stage.dep("data/prepared/prompts/eval.jsonl"), Prompt)
    require(prompts_of_split("baseline.prompts", settings.prompts, "eval", len(prompts), fewest=2))
    prompts = prompts[: settings.prompts]
    several = prompts[: settings.best_of_prompts]
    folders = {name: stage.dep(f"data/models/{name}") for name in ("base", "sft", "reward")}
    require_same_tokenizer(stage.dep("data/prepared/tokenizer_fingerprint.txt").parent, folders["base"])
    panel = Panel(folders, settings, params.text.max_response_tokens, params.seed)
    folder = stage.out("data/collected/baseline")
    with tqdm(total=2 * len(prompts) + len(several) * settings.best_of, desc="baseline", unit="answer") as bar:
        for name in ("base", "sft"):
            write_rows(folder / f"{name}.jsonl", panel.answer(name, prompts, bar))
        write_rows(folder / "sft_several.jsonl", panel.answer("sft", several, bar, times=settings.best_of))
