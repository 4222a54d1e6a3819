"""Whether this machine has the room and the permissions that the stages to come need. Nothing of it goes into an out.

Sizes are estimates: all models have the base model's size, in fp32 as the stages write them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.lineage import StageSpec
from tasks.tracking import tracking_uri

MODELS = ("sft", "reward", "policy", "value")  # each as large as the base model
CHECKPOINTS = 3  # of a stage at once: two, and one that is being written
# bytes for each trained parameter: weights, the best ones so far, Adam's two moments; of PPO of two models
CHECKPOINT_BYTES = {"sft": 16, "reward": 12, "ppo": 32}


class Room(NamedTuple):
    folder: Path
    free: int  # bytes
    least: int  # without which it cannot end well
    likely: int  # with checkpoints, and what DVC's cache holds beside


def unwritable(root: Path, specs: Mapping[str, StageSpec]) -> list[str]:
    """Folders and files that the stages write to, and that this user cannot."""
    places = {(root / out).parent for spec in specs.values() for out in spec.outs}
    places |= {root / out for spec in specs.values() for out in spec.outs if (root / out).is_dir()}
    places |= {root / ".rlhf"} | ({cache} if (cache := cache_of(root)) else set())
    uri = tracking_uri()
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        places |= {database.parent, database}
    return sorted({str(there) for place in places if not os.access(there := nearest(place), os.W_OK)})


def nearest(place: Path) -> Path:
    """The path itself, or of those above it the first that is there: there the rest will be made."""
    return place if place.exists() or place == place.parent else nearest(place.parent)


def dvc_config(root: Path) -> dict[str, Any]:
    """What DVC's own, the repository's and the local files say; empty outside a DVC repository."""
    if not (root / ".dvc").is_dir():
        return {}
    from dvc.config import Config, ConfigError

    try:
        return dict(Config(dvc_dir=str((root / ".dvc").resolve())))
    except ConfigError:  # DVC says so itself
        return {}


def cache_of(root: Path) -> Path | None:
    folder = dvc_config(root).get("cache", {}).get("dir")
    return Path(folder) if folder else root / ".dvc/cache" if (root / ".dvc").is_dir() else None


def rooms(root: Path, model: Path, layers: Mapping[str, int | str]) -> Iterator[Room]:
    """Of each file system on which something will be written. layers: how many each stage trains, or `all`."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    missing = sum(not (root / "data/models" / name).exists() for name in MODELS)
    heads = (1 if config.get("tie_word_embeddings") else 2) * config.get("vocab_size", 0) * config.get("hidden_size", 0)
    blocks = max(size / 4 - heads, 0)  # parameters
    trained = {
        stage: size / 4 if count == "all" else blocks * min(1, int(count) / config.get("num_hidden_layers", 1))
        for stage, count in layers.items()
    }
    checkpoints = max(CHECKPOINTS * CHECKPOINT_BYTES[stage] * count for stage, count in trained.items())
    least: dict[int, float] = defaultdict(float)
    likely: dict[int, float] = defaultdict(float)
    folders: dict[int, Path] = {}

    def need(folder: Path, certain: float, more: float) -> None:
        there = nearest(folder.resolve())
        device = there.stat().st_dev
        folders.setdefault(device, there)
        least[device] += certain
        likely[device] += certain + more

    need(root / "data/models", missing * size, 0)
    need(root / ".rlhf", 0, checkpoints)
    if cache := cache_of(root):
        links = set(dvc_config(root).get("cache", {}).get("type", []))
        elsewhere = nearest(cache.resolve()).stat().st_dev != nearest((root / "data").resolve()).stat().st_dev
        if "symlink" not in links and ("hardlink" not in links or elsewhere):
            need(cache, 0, missing * size)  # a second copy, but for file systems that have reflinks
    for device, folder in folders.items():
        yield Room(folder, shutil.disk_usage(folder).free, round(least[device]), round(likely[device]))


def of_room(rooms: Iterable[Room]) -> tuple[list[str], list[str]]:
    """(what makes the run impossible, what may)"""
    errors, warnings = [], []
    for room in rooms:
        text = (
            f"{room.folder}: {gigabytes(room.free)} GB are free, and the models alone take {gigabytes(room.least)} GB"
            if room.free < room.least
            else f"{room.folder}: {gigabytes(room.free)} GB are free, and models and checkpoints may take "
            f"{gigabytes(room.likely)} GB"
        )
        advice = "; `python -m flows.prune --gc` drops from DVC's cache what no branch and no registered version needs"
        if room.free < room.least:
            errors.append(text + advice + ".")
        elif room.free < room.likely:
            warnings.append(text + advice)
    return errors, warnings


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}"
