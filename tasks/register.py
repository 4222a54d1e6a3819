"""Stage `register`: one MLflow model version each for the SFT, the reward and the policy model.

    python -m tasks.run register

A version holds a model's DVC hash and where DVC keeps it, not its weights; tasks/registered_model.py is what MLflow
runs when the version is loaded. The same hash is the same version, so the stage is safe to repeat. The alias
`candidate` is moved to the versions of this run when all of them exist; `champion` only if the policy passes every
gate (tasks/gates.py). Where a gate could not be measured, a person decides. The verdict (tasks/verdict.py) says what
came of it. With `register.enabled: false` the registry is read and not written.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import gates, registry
from tasks.datasets import SideBySide, read_figures, read_rows, write_json
from tasks.labels.whose import whose_labels
from tasks.lineage import hash_path
from tasks.stage import Stage, UserError
from tasks.tracking import connect, masked, tracking_uri
from tasks.verdict import NOT_REGISTERED, PROMOTED, WAITS, Standing, in_markdown, verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODELS = ("sft", "reward", "policy")
REPORTS = ("prepare", "demonstrate", "rank", "reward", "ppo", "evaluation", "judge")
SAMPLES = "data/reports/evaluation/samples.jsonl"
MAIN_FIGURES = (
    *("gold.base", "gold.sft", "gold.policy", "gold.gain", "win_rate"),
    *("score.gain", "score_win_rate", "kl", "overoptimisation.kept_update"),
)
# Given, because MLflow's own search for them imports the model and asks the network
REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "fsspec", "s3fs", "pandas")


def run(stage: Stage) -> None:
    folders = {name: stage.dep(f"data/models/{name}") for name in MODELS}
    reports = {
        name: read_figures(stage.dep(f"data/reports/{name}/metrics.json").read_text(encoding="utf-8"))
        for name in REPORTS
    }
    hashes = {name: hash_path(folder) for name, folder in folders.items()}
    samples = stage.dep("data/reports/evaluation/samples.jsonl")
    stores = dvc_stores(stage.root)
    params = stage.params.register_
    run_id = stage.tracker.run_id() if params.enabled else ""

    from mlflow.exceptions import MlflowException

    try:
        client = connect()
        versions = {name: find_version(client, name, md5) for name, md5 in hashes.items()}
        if params.enabled:
            versions = make_versions(client, hashes, versions, stores, run_id, stage.params.text.max_response_tokens)
        rival = rival_of(client, hashes["policy"])
        limits = params.gates
        duel: dict[str, Any] = {}
        if rival is None:
            limits = limits.model_copy(update={"champion_win_rate_low": None})
        else:
            duel = against(
                rival,
                read_rows(samples, SideBySide),
                stores,
                stage.params.seed,
                same_reward_model=rival.tags.get("with.reward") == versions["reward"],
            )
            reports["champion"] = {"champion": duel}
        judged = gates.evaluate(limits, reports.values())
        happened = what_happened(reports)
        outcome = NOT_REGISTERED
        if params.enabled:
            policy = client.get_model_version("policy", str(versions["policy"]))
            for name, number in versions.items():
                for figure, value in main_figures(reports).items():
                    client.set_model_version_tag(name, number, f"evaluation.{figure}", f"{value:.6g}")
                client.set_registered_model_alias(name, registry.CANDIDATE, number)
            companions = {f"with.{name}": str(versions[name]) for name in registry.COMPANIONS}
            tags = companions | {"evaluation.samples": hash_path(samples)}
            put_on_record(client, policy, happened, judged, rival, tags)
            outcome = promote_if_due(client, policy, judged, approval=params.approval)
        champion = registry.champion(client)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"MLflow at {masked(tracking_uri())} did not take the models: {masked(str(error)).splitlines()[0]}\n"
            "The stage can be repeated: what is registered already is found again."
        ) from error
    standing = Standing(
        policy=f"policy/{versions['policy']}" if params.enabled else "",
        outcome=outcome,
        champion=f"policy/{champion.version}" if champion else "",
        rival=f"policy/{rival.version}" if rival else "",
    )
    told = verdict(reports, judged, standing)
    for gate in judged:
        print(f"gate {gate}")
    print(f"{standing.policy or 'policy'}: {outcome}")
    stage.tracker.metrics({f"gate/{gate.name}": float(gate.passed) for gate in judged if not gate.open})
    stage.tracker.tags({"gates": gates.in_short(judged), "policy": standing.policy})
    numbers = {name: value for name, value in duel.items() if not isinstance(value, str)}
    stage.tracker.metrics({f"champion/{name}": value for name, value in numbers.items()})
    stage.tracker.note(f"{in_markdown(told)}\n\n{happened}")
    numbered = {name: {"version": number} for name, number in versions.items() if params.enabled}
    registered: dict[str, Any] = {name: {**numbered.get(name, {}), "md5": md5} for name, md5 in hashes.items()}
    registered["champion"] = outcome
    if rival is not None:
        registered["against_champion"] = {"version": str(rival.version), **duel}
    registered["gates"] = {
        gate.name: {"value": gate.value, gate.side.replace(" ", "_"): gate.limit, "passed": gate.passed}
        | ({"by": gate.by} if gate.by else {})
        | ({"open": gate.open} if gate.open else {})
        for gate in judged
    }
    registered["verdict"] = told
    write_json(stage.out("data/reports/registered.json"), registered)


def make_versions(
    client: MlflowClient,
    hashes: dict[str, str],
    known: dict[str, str | None],
    stores: list[dict[str, Any]],
    run_id: str,
    max_new_tokens: int,
) -> dict[str, str | None]:
    """{model: its version}, made where the registry has none with the model's hash."""
    versions: dict[str, str | None] = {}
    for name, md5 in hashes.items():
        config = {
            "kind": "reward" if name == "reward" else "language",
            "path": f"data/models/{name}",
            "md5": md5,
            "stores": stores,
            "max_new_tokens": max_new_tokens,
            "batch_size": 16,
        }
        versions[name] = known[name] or make_version(client, name, config, run_id)
    return versions


def rival_of(client: MlflowClient, md5: str) -> ModelVersion | None:
    """Whom the policy with this hash must beat: the champion; if it is that itself, the one that it had to beat."""
    current = registry.champion(client)
    if current is None or current.tags.get("dvc.md5") != md5:
        return current
    before = current.tags.get("gates.rival")
    return registry.find(client, before) if before else None


def against(
    rival: ModelVersion, rows: list[SideBySide], stores: list[dict[str, Any]], seed: int, *, same_reward_model: bool
) -> dict[str, Any]:
    """Wins, ties and losses against another version's policy, on the prompts that both answered: by the gold score, or
    where too few have one by the reward model if both were scored by the same. Where it cannot be measured, `open` says
    why.

    Its answers come from DVC's store, by the hash that the version has; they may be lost, or be to other prompts.
    Today's reward model does not score them: it would favour the policy that was trained to please it.
    """
    import torch

    from tasks.intervals import RESAMPLES, resamples, versus
    from tasks.registered_model import fetch_object

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        try:
            fetch_object(rival.tags.get("evaluation.samples", ""), SAMPLES, stores, file)
        except OSError as error:
            return {"open": f"the answers of policy/{rival.version} cannot be had: {error}"}
        theirs = {row.prompt: row.scores for row in read_rows(file, SideBySide)}
    pairs = [(row.scores, theirs[row.prompt]) for row in rows if row.prompt in theirs]
    if not pairs:
        return {"open": f"policy/{rival.version} answered none of these prompts, so the two cannot be compared"}
    golden = [pair for pair in pairs if all("gold.policy" in scores for scores in pair)]
    lacking = gates.GOLD.lacks(len(golden), len(pairs)) if golden else "no gold score"
    if lacking and not same_reward_model:
        return {"open": f"{lacking}, and policy/{rival.version} was scored by another reward model"}
    judge, key, judged = (gates.ITSELF, "score.policy", pairs) if lacking else (gates.GOLD, "gold.policy", golden)
    ours, others = torch.tensor([[scores[key] for scores in pair] for pair in judged]).T
    picks = resamples(len(ours), RESAMPLES, seed)
    by = judge.told(len(ours), lacking if golden else "")
    return {"prompts": len(ours), **versus(ours, others, picks), "by": by}


def what_happened(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A run in five lines of Markdown."""
    reward, evaluation = reports["reward"], reports["evaluation"]
    figures = gates.together(reports.values())
    judged = gates.judged(figures)
    kept, updates = (reports["ppo"]["ppo"][name] for name in ("kept_update", "updates"))
    gold, peak = "gold" in evaluation, "overoptimisation.gold_peak_update"

    def told(report: Mapping[str, Any], name: str, spec: str = ".3g") -> str:
        value, low, high = (gates.figure_at(report, name + end) for end in ("", "_low", "_high"))
        if value is None:
            return "not measured"
        return f"{value:{spec}}" + (f" [{low:{spec}}, {high:{spec}}]" if low is not None and high is not None else "")

    def of(name: str) -> str:
        return f"{told(evaluation, f'{name}.policy')} (SFT {told(evaluation, f'{name}.sft')})"

    gained = "gold" if gold else "score"
    lacking = "" if gold else " There is no gold score: these prompts have no ticket."
    turned = " and has come down since" if gates.figure_at(evaluation, "overoptimisation.turned_down") else ""
    height = f"gold was highest after update {told(evaluation, peak)}{turned}"
    others = "reward.held_out_labelers_accuracy"
    heard = f"; of held-out labelers' pairs {told(reward, others, '.0%')}" if gates.figure_at(reward, others) else ""
    better = (
        f"win rate {told(judged, 'win_rate', '.0%')} by {judged.get('by', 'nobody')}; its {gained} gained "
        f"{told(evaluation, f'{gained}.gain')}: {of(gained)}.{lacking}"
    )
    lines = [
        f"**Policy against SFT**: {'the policy is the SFT model.' if gates.nothing_gained(figures) else better}",
        f"**What it cost**: KL {told(evaluation, 'kl')} nats an answer; length {of('length')} tokens; ended properly "
        f"{of('ended')}; repetition {of('repetition')}.",
        f"**Reward model**: orders {told(reward, 'reward.accuracy', '.0%')} of held-out pairs as the labelers did; "
        f"their noise allows {told(reward, 'reward.noise_ceiling', '.0%')}; calibration error "
        f"{told(reward, 'reward.calibration_error')}{heard}.",
        f"**Labels**: {whose_labels(reports)}.",
        f"**Over-optimisation**: update {kept} of {updates} is kept; "
        f"{'gold was not measured on the way' if gates.figure_at(evaluation, peak) is None else height}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def put_on_record(
    client: MlflowClient,
    policy: ModelVersion,
    happened: str,
    judged: list[gates.Gate],
    rival: ModelVersion | None,
    tags: dict[str, str],
) -> None:
    """What was measured, which gates the version passed, which not and by how much, on its page."""
    failed, unjudged = [gate for gate in judged if gate.failed], [gate for gate in judged if gate.open]
    facts = {
        "gates.passed": str(not failed and not unjudged).lower(),
        "gates.failed": ", ".join(gate.name for gate in failed),
        "gates.open": ", ".join(gate.name for gate in unjudged),
        "gates.rival": str(rival.version) if rival else "",
        **{f"gate.{gate.name}": str(gate).partition(": ")[2] for gate in judged},
    }
    for key, value in (tags | facts).items():
        client.set_model_version_tag("policy", policy.version, key, value)
    opponent = f" (the champion that it was held against: policy/{rival.version})" if rival else ""
    told = [
        *([f"{len(failed)} of {len(judged)} gates failed"] if failed else []),
        *([f"{len(unjudged)} could not be measured"] if unjudged else []),
    ]
    text = f"{', '.join(told) or 'All gates passed'}{opponent}."
    lines = "\n".join(f"- {gate}" for gate in judged)
    client.update_model_version("policy", policy.version, f"{text}\n\n{happened}\n\nGates:\n\n{lines}")


def promote_if_due(client: MlflowClient, policy: ModelVersion, judged: list[gates.Gate], *, approval: bool) -> str:
    """What became of it: PROMOTED, `refused: ...`, what a person said against it, or WAITS."""
    failed = [gate.name for gate in judged if gate.failed]
    current = registry.champion(client)
    if failed:
        return f"refused: {', '.join(failed)}"
    if current is None or current.version != policy.version:
        if no := registry.taken_back(policy):
            return no
        if approval or any(gate.open for gate in judged):
            return WAITS
    registry.promote(client, str(policy.version), author="gates", reason="all gates passed")
    return PROMOTED


def main_figures(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The figures of the evaluation that a version has, with dotted names; no win rate of a model over itself."""
    found = {figure: gates.figure_at(reports["evaluation"], figure) for figure in MAIN_FIGURES}
    nothing = gates.nothing_gained(gates.together(reports.values()))
    return {
        figure: value for figure, value in found.items() if value is not None and not (nothing and "win_rate" in figure)
    }


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
