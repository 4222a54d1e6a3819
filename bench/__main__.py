"""`make bench`: measurements that anyone can repeat. Writes bench/results.json and prints a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import ppo

RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", choices=("ppo",), help="one of the benchmarks; without it, all")
    parser.add_argument("--quick", action="store_true", help="one size, in under 15 minutes")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    console = Console()
    records: list[dict[str, Any]] = []
    for record in ppo.run(arguments.quick, arguments.threads, console):
        records.append(record)
        keep(record)
    console.print(ppo.table(records))
    console.print(f"{len(records)} records written to {RESULTS}")


def keep(record: dict[str, Any]) -> None:
    """Into results.json, in place of the record of the same measurement."""
    key = ("bench", "model", "batch", "epochs", "ragged", "mode")
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    records = [other for other in records if any(other.get(name) != record[name] for name in key)]
    RESULTS.write_text(json.dumps([*records, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
