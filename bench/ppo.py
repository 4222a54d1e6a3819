"""PPO's speed and memory beside trl 1.12.0's: the same models, prompts, response lengths and batches on both sides.

Three modes a size: `trl`; `full`, the same maths here, all layers trained; `frozen_trunk`, the top layers trained on a
frozen trunk. With QUICK, at one epoch, a fourth: `trl_tuned`, TRL with the settings of memory and threads that our
stages make. Each runs in a process of its own, one after the other, so that a slow minute of the machine hits all; two
updates warm up (one where the batch is 64), two count. `limit_fraction` is the work's floating-point operations, done
at the rate at which this machine multiplies large matrices, as a share of the time that was taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.peer import peer_python
from bench.workload import model_config

MODES = ("trl", "full", "frozen_trunk")
# what tasks.run.tune_process sets for our side: QUICK measures TRL with it, too
TUNED = {
    "GOMP_SPINCOUNT": "10000",
    "MKL_CBWR": "AUTO",
    "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
ROOT = Path(__file__).parent.parent
BASE, REWARD = ROOT / "data/models/base", Path(__file__).parent / ".models/reward"


class Size(NamedTuple):
    model: str
    layers: int  # trained with frozen_trunk
    batch: int
    epochs: int
    ragged: bool
    prompt_length: int = 24
    response_length: int = 32


def sizes(quick: bool) -> list[Size]:
    if quick:
        return [Size("SmolLM2-135M", 6, 16, epochs, False) for epochs in (1, 4)]
    return [
        Size(model, layers, batch, epochs, ragged)
        for model, layers in (("Llama-10M", 2), ("SmolLM2-135M", 6))
        for batch in (16, 64)
        for ragged in (False, True)
        for epochs in (1, 4)
    ]


def run(quick: bool, threads: int, console: Console) -> Iterator[dict[str, Any]]:
    """A record a size and mode, as they are measured."""
    python = peer_python()
    make_models()
    for size in sizes(quick):
        rate = matmul_rate(threads)
        found = {}
        for mode in (*MODES, "trl_tuned") if quick and size.epochs == 1 else MODES:
            console.print(f"[dim]{describe(size)}: {mode} ...[/]")
            found[mode] = measure(size, mode, threads, python)
        for mode, figures in found.items():
            seconds = figures["seconds"]
            updates = len(figures["update_seconds"])
            yield {
                "bench": "ppo",
                "model": size.model,
                "batch": size.batch,
                "epochs": size.epochs,
                "ragged": size.ragged,
                "mode": mode,
                "trainable_layers": size.layers if mode == "frozen_trunk" else "all",
                "episodes_per_s": figures["episodes_per_s"],
                "tokens_per_s": figures["tokens_per_s"],
                "generate_s": seconds["generate"] / updates,
                "score_s": seconds["score"] / updates,
                "train_s": seconds["train"] / updates,
                "update_s": seconds["total"] / updates,
                "peak_rss_bytes": figures["peak_rss_bytes"],
                "limit_fraction": flops(size, mode, figures) / rate / seconds["total"],
                "ratio_to_trl": figures["episodes_per_s"] / found["trl"]["episodes_per_s"],
                "memory_to_trl": figures["peak_rss_bytes"] / found["trl"]["peak_rss_bytes"],
                "threads": threads,
                "matmul_flops_per_s": rate,
            }


def measure(size: Size, mode: str, threads: int, peer: Path) -> dict[str, Any]:
    """One side's line of JSON (bench/trl_side.py, bench/ours_side.py)."""
    theirs = mode.startswith("trl")
    command = [str(peer), "bench/trl_side.py"] if theirs else [sys.executable, "-m", "bench.ours_side"]
    options = {
        "--batch": size.batch,
        "--epochs": size.epochs,
        "--prompt-length": size.prompt_length,
        "--response-length": size.response_length,
        "--threads": threads,
        "--warmup": 2 if size.batch < 64 else 1,
        "--updates": 2,
        **({} if theirs else {"--mode": mode, "--layers": size.layers}),
        **({"--shape": "10M"} if size.model == "Llama-10M" else {"--model": BASE, "--reward": REWARD}),
    }
    command += [str(part) for pair in options.items() for part in pair]
    command += ["--ragged"] * size.ragged
    return line_of(command, TUNED if mode == "trl_tuned" else {})


def line_of(command: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """The JSON that a side prints last."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def make_models() -> None:
    """SmolLM2 as the stage `base` makes it, and a scalar model on the same weights with a head from a seed."""
    if not (BASE / "config.json").exists():
        subprocess.run([sys.executable, "-m", "dvc", "repro", "base"], cwd=ROOT, check=True)
    if (REWARD / "config.json").exists():
        return
    code = (
        "import sys, torch; from pathlib import Path;"
        "from tasks.models import load_scalar_model, load_tokenizer, save_model;"
        "base, out = Path(sys.argv[1]), Path(sys.argv[2]); torch.manual_seed(0);"
        "model = load_scalar_model(base); torch.nn.init.normal_(model.score.weight, std=0.02);"
        "save_model(model, load_tokenizer(base), out)"
    )
    subprocess.run([sys.executable, "-c", code, str(BASE), str(REWARD)], cwd=ROOT, check=True)


def matmul_rate(threads: int) -> float:
    """Floating-point operations a second of this machine now: fp32, 2048 x 2048, the best of 20."""
    code = (
        "import sys, time, torch; torch.set_num_threads(int(sys.argv[1])); n = 2048;"
        "a, b = torch.randn(n, n), torch.randn(n, n); best = 1e9\n"
        "for _ in range(20):\n"
        "    t = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - t)\n"
        "print(2 * n**3 / best)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(threads)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def flops(size: Size, mode: str, figures: dict[str, Any]) -> float:
    """Of the matrix products that the counted updates need: 2 a weight and token forward, 4 more backward.

    All tokens go through the blocks, response tokens through the vocabulary head. Attention's own products, under 2 %
    at these lengths, are left out.
    """
    tokens = figures["tokens_per_s"] * figures["seconds"]["total"]
    responses = figures["response_tokens_per_s"] * figures["seconds"]["total"]
    shape = model_config(size.model.rpartition("-")[2])
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kv_width = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    block = width * (2 * width + 2 * kv_width + 3 * shape["intermediate_size"])
    head = width * shape["vocab_size"]
    trained = layers if mode != "frozen_trunk" else size.layers
    generation = 2 * (tokens * layers * block + responses * head)
    reference_reward_value = 2 * (3 * tokens * trained * block + responses * head)
    policy = tokens * trained * block * 6 + responses * head * (6 if mode != "frozen_trunk" else 4)
    value = tokens * trained * block * 6
    return float(generation + reference_reward_value + size.epochs * (policy + value))


def describe(size: Size) -> str:
    return (
        f"{size.model}, batch {size.batch}, {'ragged' if size.ragged else 'fixed'}, "
        f"{size.epochs} epoch{'s' * (size.epochs > 1)}"
    )


def table(records: list[dict[str, Any]]) -> Table:
    shown = Table(title="PPO beside trl 1.12.0", caption=machine())
    for column in (
        "model", "batch", "epochs", "lengths", "mode", "episodes/s", "tokens/s", "generate / score / train, s",
        "peak GB", "of the limit", "speed", "memory",
    ):  # fmt: skip
        shown.add_column(column, justify="left" if column in ("model", "lengths", "mode") else "right")
    for row in records:
        layers = "" if row["trainable_layers"] == "all" else f" (top {row['trainable_layers']})"
        shown.add_row(
            row["model"],
            str(row["batch"]),
            str(row["epochs"]),
            "ragged" if row["ragged"] else "fixed",
            row["mode"] + layers,
            f"{row['episodes_per_s']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['generate_s']:.1f} / {row['score_s']:.1f} / {row['train_s']:.1f}",
            f"{row['peak_rss_bytes'] / 1e9:.2f}",
            f"{row['limit_fraction']:.0%}",
            f"{row['ratio_to_trl']:.2f}x",
            f"{row['memory_to_trl']:.2f}x",
            end_section=row["mode"] in (MODES[-1], "trl_tuned"),
        )
    return shown


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(": ")[2] if names else "unknown CPU"
    return f"{name}, {os.cpu_count()} cores; fp32; speed and memory as shares of trl's"
