"""`make bench`: measurements that anyone can repeat. Writes bench/results.json and prints a table of each."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import growth, machinery, ppo, prepare, shares, time_to_reward

RESULTS = Path(__file__).parent / "results.json"
BENCHES: dict[str, Any] = {
    "ppo": ppo,
    "shares": shares,
    "time_to_reward": time_to_reward,
    "growth": growth,
    "machinery": machinery,
    "prepare": prepare,
}
# what names a measurement: a new one replaces the old
KEY = (
    *("bench", "model", "batch", "epochs", "ragged", "mode", "vary", "value", "learning_rate", "seed", "budget_s"),
    *("trainable_layers", "what"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", choices=BENCHES, help="one of them; without it, all")
    parser.add_argument("--quick", action="store_true", help="few sizes; `ppo` takes less than 15 minutes then")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 170)
    for name in [arguments.only] if arguments.only else BENCHES:
        records = []
        for record in BENCHES[name].run(arguments.quick, arguments.threads, console):
            records.append(record)
            keep(record)
        console.print(BENCHES[name].table(records))
        if hasattr(BENCHES[name], "plot") and not arguments.quick:
            BENCHES[name].plot(records)
            console.print(f"plot: {BENCHES[name].PLOT}")
    console.print(f"records: {RESULTS}")


def keep(record: dict[str, Any]) -> None:
    """Into results.json, in place of the last record of the same measurement."""
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    records = [other for other in records if any(other.get(name) != record.get(name) for name in KEY)]
    RESULTS.write_text(json.dumps([*records, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
