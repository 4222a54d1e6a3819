"""Stage `register`: one MLflow model version each for the SFT, the reward and the policy model.

    python -m tasks.run register

A version holds a model's DVC hash and where DVC keeps it, not its weights; tasks/registered_model.py is what MLflow
runs when the version is loaded. The same hash is the same version, so the stage is safe to repeat; the alias is moved
to the versions of this run only when all of them exist.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.datasets import write_json
from tasks.lineage import hash_path
from tasks.stage import Stage, UserError
from tasks.tracking import connect, masked, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODELS = ("sft", "reward", "policy")
MAIN_FIGURES = ("gold.base", "gold.sft", "gold.policy", "gold.gain", "win_rate", "kl")
# Given, because MLflow's own search for them imports the model and asks the network
REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "fsspec", "s3fs", "pandas")


def run(stage: Stage) -> None:
    folders = {name: stage.dep(f"data/models/{name}") for name in MODELS}
    figures = main_figures(stage.dep("data/reports/evaluation/metrics.json"))
    hashes = {name: hash_path(folder) for name, folder in folders.items()}
    stores = dvc_stores(stage.root)
    run_id = stage.tracker.run_id()
    alias = stage.params.register_.alias

    from mlflow.exceptions import MlflowException

    try:
        client = connect()
        versions = {}
        for name, md5 in hashes.items():
            config = {
                "kind": "reward" if name == "reward" else "language",
                "path": f"data/models/{name}",
                "md5": md5,
                "stores": stores,
                "max_new_tokens": stage.params.text.max_response_tokens,
                "batch_size": 16,
            }
            versions[name] = find_version(client, name, md5) or make_version(client, name, config, run_id)
            for figure, value in figures.items():
                client.set_model_version_tag(name, versions[name], f"evaluation.{figure}", f"{value:.6g}")
        for name, number in versions.items():
            client.set_registered_model_alias(name, alias, number)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"MLflow at {masked(tracking_uri())} did not take the models: {masked(str(error)).splitlines()[0]}\n"
            "The stage can be repeated: what is registered already is found again."
        ) from error
    registered = {name: {"version": versions[name], "md5": hashes[name], "alias": alias} for name in hashes}
    write_json(stage.out("data/reports/registered.json"), registered)


def main_figures(path: Path) -> dict[str, float]:
    """The figures of the evaluation that a version bears, with dotted names."""
    report = json.loads(path.read_text(encoding="utf-8"))
    found = {}
    for figure in MAIN_FIGURES:
        value: Any = report
        for part in figure.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[figure] = float(value)
    return found


def dvc_stores(root: Path) -> list[dict[str, Any]]:
    """Where DVC keeps its objects: its cache, then its remotes, the default one first. No credentials: those of the
    one who loads the model are used."""
    from dvc.repo import Repo

    with Repo(str(root.resolve())) as repo:
        cache = Path(repo.cache.local.path).parents[1]  # without files/md5
        default = repo.config["core"].get("remote")
        remotes = sorted(repo.config["remote"].items(), key=lambda item: item[0] != default)
    return [
        {"url": str(cache), "options": {}},
        *({"url": masked(remote["url"]), "options": fsspec_options(remote)} for _, remote in remotes),
    ]


def fsspec_options(remote: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a DVC remote that say where it is, in fsspec's words."""
    options: dict[str, Any] = {}
    if "endpointurl" in remote:
        options["endpoint_url"] = remote["endpointurl"]
    if "region" in remote:
        options["client_kwargs"] = {"region_name": remote["region"]}
    if "profile" in remote:
        options["profile"] = remote["profile"]
    return options


def find_version(client: MlflowClient, name: str, md5: str) -> str | None:
    """The version that holds this hash, the oldest if there are several."""
    found = client.search_model_versions(f"name = '{name}' and tags.`dvc.md5` = '{md5}'")
    return min((str(model.version) for model in found), key=int, default=None)


def make_version(client: MlflowClient, name: str, config: dict[str, Any], run_id: str) -> str:
    """Store what loads the model, about 50 KB, with the stage's run, and register it."""
    import mlflow

    from tasks import registered_model

    # The model takes a list or a table, which no signature of MLflow's describes; it warns of that at every save
    logging.getLogger("mlflow.pyfunc").setLevel(logging.ERROR)
    run = client.get_run(run_id)
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(
            f"{folder}/model",
            python_model=registered_model.__file__,
            model_config=config,
            pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in REQUIREMENTS],
        )
        client.log_artifacts(run_id, f"{folder}/model", f"models/{name}")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = {
        "dvc.path": config["path"],
        "dvc.md5": config["md5"],
        "git.commit": run.data.tags.get("git.commit", ""),
        "pipeline.id": run.data.tags.get("pipeline.id", ""),
    }
    model = client.create_model_version(name, f"{run.info.artifact_uri}/models/{name}", run_id, tags)
    return str(model.version)
