"""What stands in the way of more speed: of a pass forward and backward, the share that is matrix products, and the rate
at which these run beside the machine's best. Where products take 80 % of the time, all the rest for nothing would make
it 1.25 times as fast."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.ppo import BASE, line_of, make_models, matmul_rate

EPISODES, PROMPT, RESPONSE = 16, 24, 32
LAYERS = ("all", 6)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def run(quick: bool, threads: int, console: Console) -> Iterator[dict[str, Any]]:
    """A record each for all layers and for the top 6, in a process of its own."""
    make_models()
    for layers in LAYERS:
        console.print(f"[dim]shares: {layers} layers ...[/]")
        command = [sys.executable, "-m", "bench.shares", str(layers), str(threads)]
        measured = line_of(command)
        yield {
            "bench": "shares",
            "model": "SmolLM2-135M",
            "batch": EPISODES,
            "trainable_layers": layers,
            **measured,
            "products_of_limit": measured["flops"] / measured["products_s"] / matmul_rate(threads),
        }


def measure(layers: Any, threads: int) -> dict[str, Any]:
    """Of the policy's log-probabilities and their gradient: seconds, of them in products, and the products' work."""
    from tasks.run import tune_process

    tune_process()
    import torch
    from torch.profiler import ProfilerActivity, profile

    from tasks.models import causal_mask, freeze_trunk, load_language_model, positions_of, split_model, trunk_depth
    from tasks.ppo.rollout import Rollout, response_logprobs

    torch.set_num_threads(threads)
    model = load_language_model(BASE).requires_grad_(True)
    depth = trunk_depth(model, layers)
    freeze_trunk(model, depth)
    trunk, branch = split_model(model, depth)
    ids = torch.randint(5, model.config.vocab_size, (EPISODES, PROMPT + RESPONSE))
    mask = torch.ones_like(ids, dtype=torch.bool)
    states = trunk(ids, causal_mask(mask), positions_of(mask))
    ended = torch.ones(EPISODES, dtype=torch.bool)
    rollout = Rollout(ids, mask, PROMPT, torch.zeros(EPISODES, RESPONSE), states, ended)

    def step() -> None:
        response_logprobs(branch, rollout, 1.0).sum().backward()

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        step()
    events = profiled.key_averages()
    products = [event for event in events if event.key in PRODUCTS]
    return {
        "seconds": sum(event.self_cpu_time_total for event in events) / 1e6,
        "products_s": sum(event.self_cpu_time_total for event in products) / 1e6,
        "flops": sum(event.flops for event in products),
    }


def table(records: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"Forward and backward of {EPISODES} episodes of {PROMPT} + {RESPONSE} tokens")
    for column in ("layers", "seconds", "in matrix products", "which run at, of the limit"):
        shown.add_column(column, justify="right")
    for row in records:
        share = row["products_s"] / row["seconds"]
        shown.add_row(
            str(row["trainable_layers"]), f"{row['seconds']:.2f}", f"{share:.0%}", f"{row['products_of_limit']:.0%}"
        )
    return shown


if __name__ == "__main__":
    wanted = sys.argv[1] if sys.argv[1] == "all" else int(sys.argv[1])
    print(json.dumps(measure(wanted, int(sys.argv[2]))))
