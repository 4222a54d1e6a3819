"""The repository's code with small parameters and a tiny model, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from tasks.base import folder_sha256
from tasks.tickets import generate
from tests.tiny import tiny_model_dir

ROOT = Path(__file__).parents[2]
Once = Callable[[str, Callable[[Path], object]], Path]
yaml = YAML()

SMALL: dict[str, dict[str, Any]] = {
    "text": {"max_prompt_tokens": 150, "max_response_tokens": 70},
    "tickets": {"count": 80},
    "data": {"sources": [{"kind": "prompts", "path": "data/tickets"}]},
    "demonstrate": {"prompts": 12},
    "sft": {"trainable_layers": 1, "epochs": 2, "batch_size": 4, "validation_share": 0.3},
    "sample": {"prompts": 10, "responses_per_prompt": 3, "batch_size": 12},
    "rank": {"held_out_share": 0.4},
    "reward": {"trainable_layers": 1, "epochs": 1, "batch_prompts": 2, "centre_on": 4},
    "ppo": {
        "trainable_layers": 1,
        "updates": 2,
        "batch_size": 4,
        "samples_per_prompt": 2,
        "minibatch_size": 2,
        "micro_batch_size": 2,
        "value_warmup_epochs": 1,
        "eval_every": 0,  # with so few prompts the SFT model itself may score best
        "checkpoint_every": 1,
    },
    "baseline": {"prompts": 4, "batch_size": 4, "best_of": 4, "best_of_prompts": 2},
    "evaluate": {"bootstrap_samples": 100},
}


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder of that name, filled by the worker that comes first, for all workers."""
    mine = tmp_path_factory.getbasetemp()
    common = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine

    def folder(name: str, fill: Callable[[Path], object]) -> Path:
        path, full = common / name, common / f"{name}.full"
        with FileLock(common / f"{name}.lock"):
            if not full.exists():
                shutil.rmtree(path, ignore_errors=True)  # of one that failed
                path.mkdir()
                fill(path)
                full.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def model(once: Once) -> Path:
    texts = [row.prompt for row in generate(seed=1, count=200)]
    return once("tiny", lambda folder: tiny_model_dir(folder / "model", texts=texts)) / "model"


@pytest.fixture(scope="session")
def make_repo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A clone of this repository's code with small parameters, its own DVC cache and MLflow store."""

    def make(name: str, place: Path | None = None) -> Path:
        repo = (place or tmp_path_factory.mktemp(name)) / "repo"
        repo.mkdir()
        code = ("flows", "tasks", "dvc.yaml", "params.yaml", "prefect.toml", ".dvcignore", ".gitignore")
        for part in (*code, "data/labels", "data/.gitignore"):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, repo / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / part).exists():
                shutil.copy(ROOT / part, repo / part)
        for folder in (".dvc", "data/raw"):
            (repo / folder).mkdir(parents=True)
        (repo / "data/raw/.gitkeep").touch()
        for part in ("config", ".gitignore"):
            shutil.copy(ROOT / ".dvc" / part, repo / ".dvc" / part)
        params = yaml.load(repo / "params.yaml")
        for section, values in SMALL.items():
            params[section].update(values)
        params["base"].update(model=f"folder:{model}", sha256=folder_sha256(model), chat_template=None)
        yaml.dump(params, repo / "params.yaml")
        subprocess.run(["git", "init", "--quiet"], cwd=repo, check=True)
        return repo

    return make


@pytest.fixture(scope="session")
def by_dvc(make_repo: Any, once: Once) -> Path:
    """One for all workers: those that run other tests than test_end_to_end.py's read the copy of dvc.lock beside it."""

    def fill(folder: Path) -> None:
        repo = make_repo("by-dvc", folder)
        command(repo, "dvc", "repro")
        shutil.copy(repo / "dvc.lock", folder)

    return once("by-dvc", fill) / "repo"


def command(repo: Path, *arguments: str, fails: bool = False, python: str = sys.executable) -> str:
    """Run a module in the repository, as a person would; returns all that it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RLHF_"))}
    environment |= {
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(repo / ".prefect"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{repo / 'mlflow.db'}",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [python, "-m", *arguments], cwd=repo, env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output
