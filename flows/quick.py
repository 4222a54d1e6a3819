"""A trial of the whole pipeline in minutes, before the long run: `make run QUICK=1`.

It runs in `.rlhf/quick`, on the working tree as it is, committed or not: links lead to the code and to people's data.
params.yaml is copied, with its sizes reduced. DVC's cache is shared, so that the long run finds what both make, such as
the base model. The figures of so little training mean nothing: MLflow keeps them in an experiment of their own, and
nothing is registered.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from flows.workspace import Workspace, change_params, held, share_dvc_store
from tasks.params import Params, load_params
from tasks.tracking import QUICK_EXPERIMENT

FOLDER = Path(".rlhf/quick")
OWN = ("params.yaml", "dvc.lock", "data", "mlflow.db", "mlartifacts")  # what a run changes, besides hidden folders
GIVEN = ("raw", "labels")  # in data: what people bring
SETTINGS = (".dvc/config", ".dvc/plots")
MOST_ROWS = 120  # of recorded demonstrations and rankings each, about
RECORDED = {  # where `prepare` puts those that are trained on
    "demonstrations": Path("data/prepared/demonstrations/sft.jsonl"),
    "rankings": Path("data/prepared/rankings/reward.jsonl"),
}


@contextmanager
def quick_folder() -> Iterator[None]:
    """The current folder, and where MLflow's record goes, for as long as it lasts. UserError where another quick run
    is at work. What the last one made stays: what has not changed since is not made again."""
    home = Path.cwd()
    quick = Workspace("quick", home / FOLDER, str(home))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with held(FOLDER.parent, quick.id):
        link_working_tree(home, quick.path)
        share_dvc_store(quick, git=False)
        change_params(quick.path / "params.yaml", reduced(load_params(home / "params.yaml")))
        # in each of so short stages, importing MLflow would take longer than the work
        ours = {"RLHF_EXPERIMENT": QUICK_EXPERIMENT, "RLHF_SENDS": "flow"}
        os.environ.update(ours)
        try:
            with quick.entered():
                yield
        finally:
            for name in ours:
                del os.environ[name]


def link_working_tree(home: Path, folder: Path) -> None:
    """Have there what a run reads, by links, and copies of what it changes."""
    for path in (*folder.iterdir(), *(folder / "data" / name for name in GIVEN)):
        if path.is_symlink():  # the tree may have changed since
            path.unlink()
    for path in home.iterdir():
        if path.name not in OWN and path.name != ".git" and (path.is_file() or not path.name.startswith(".")):
            (folder / path.name).symlink_to(path)
    (folder / "data").mkdir(exist_ok=True)
    for name in GIVEN:
        if (home / "data" / name).exists():
            (folder / "data" / name).symlink_to(home / "data" / name)
    shutil.copyfile(home / "params.yaml", folder / "params.yaml")
    for name in SETTINGS:
        if (home / name).is_dir():
            shutil.copytree(home / name, folder / name, dirs_exist_ok=True)
        elif (home / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(home / name, folder / name)


def reduced(params: Params) -> dict[str, Any]:
    """The parameters that a quick run changes: {"sft.epochs": 1}. Sizes become smaller, and never larger: what fits
    the data of the long run fits here. What `prepare` makes stays the same: of the sizes it checks only that they fit.

    Of few prompts a hash may hold out none: shares become larger.
    """
    ppo, rank = params.ppo, params.rank
    samples = min(ppo.samples_per_prompt, 2)
    minibatch = _multiple(samples, ppo.minibatch_size, 4)
    return {
        "demonstrate.prompts": min(params.demonstrate.prompts, 16),
        "demonstrate.human.fill_in": True,  # nobody is waited for
        "sft.trainable_layers": _layers(params.sft.trainable_layers),
        "sft.epochs": 1,
        "sft.validation_share": max(params.sft.validation_share, 0.3),
        "sample.prompts": min(params.sample.prompts, 8),
        "sample.responses_per_prompt": min(params.sample.responses_per_prompt, 2),
        "rank.human.fill_in": True,
        "rank.held_out_share": max(rank.held_out_share, 0.4) if rank.held_out_share else 0.0,
        "reward.trainable_layers": _layers(params.reward.trainable_layers),
        "reward.epochs": 1,
        "reward.centre_on": min(params.reward.centre_on, 8),
        "ppo.trainable_layers": _layers(ppo.trainable_layers),
        "ppo.updates": 1,
        "ppo.batch_size": _multiple(minibatch, ppo.batch_size, 4),
        "ppo.samples_per_prompt": samples,
        "ppo.minibatch_size": minibatch,
        "ppo.micro_batch_size": _multiple(samples, ppo.micro_batch_size, 4),
        "ppo.epochs": 1,
        "ppo.value_warmup_epochs": min(ppo.value_warmup_epochs, 1),
        "ppo.eval_prompts": min(ppo.eval_prompts, 2),
        "ppo.ptx_examples_per_episode": min(ppo.ptx_examples_per_episode, 1),
        "baseline.prompts": min(params.baseline.prompts, 4),
        "baseline.best_of": min(params.baseline.best_of, 2),
        "baseline.best_of_prompts": min(params.baseline.best_of_prompts, 1),
        "evaluate.bootstrap_samples": min(params.evaluate.bootstrap_samples, 200),
        "judge.agreement_pairs": min(params.judge.agreement_pairs, 20),
        "judge.pairs": min(params.judge.pairs, 4),
        "register.enabled": False,
    }


def _multiple(of: int, given: int, most: int) -> int:
    """The largest multiple of a number that is neither above `given` nor above `most`."""
    return min(given, most) // of * of


def _layers(given: Literal["all"] | int) -> int:
    return 2 if given == "all" else min(given, 2)


def thin_out() -> bool:
    """Recorded demonstrations and rankings are all trained on, however many: have `prepare` draw some of them. Within
    the folder, once it has prepared them all; returns whether it must do so anew."""
    params = load_params(Path("params.yaml"))
    labeler = {"demonstrations": params.demonstrate.labeler, "rankings": params.rank.labeler}
    weights: dict[str, float] = {}
    for kind, file in RECORDED.items():
        if labeler[kind] == "recorded" and (count := file.read_bytes().count(b"\n")) > MOST_ROWS:
            weights[kind] = MOST_ROWS / count
    sources = [
        source.model_dump(mode="json") | {"weight": source.weight * weights.get(source.kind, 1.0)}
        for source in params.data.sources
    ]
    if weights:
        change_params(Path("params.yaml"), {"data.sources": sources})
    return bool(weights)
