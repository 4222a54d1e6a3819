"""What runs without anyone: the deployments of prefect.yaml. Each run has a workspace of its own (flows/workspace.py).

`pipeline` brings everything up to date at a revision, with parameters changed where asked; `sweep` does so for several
sets of parameters; `replay` makes a registered version again; `prune` removes what runs left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_run_logger, pause_flow_run, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed
from prefect.variables import Variable
from pydantic import Field
from rich.console import Console

from flows import prune as pruning
from flows import replay as replaying
from flows.dvc_stage import WAITS
from flows.notify import notify
from flows.report import Report
from flows.rlhf import needed, rlhf
from flows.waiting import Waiting, answers, jobs_of, may_suspend, resumed, suspend, waits_already
from flows.workspace import BRANCHES, Workspace, name_of, open_workspace
from tasks.datasets import flat, read_figures
from tasks.labels.queue import LABELS
from tasks.lineage import load_stages, run_name, upstream
from tasks.run import end_with_parent
from tasks.stage import UserError, read_yaml
from tasks.verdict import CHAMPION_NOW, NOT_REGISTERED, PROMOTED
from tasks.verdict import WAITS as WAITS_FOR_APPROVAL

BY_WORKER = "PREFECT__FLOW_RUN_ID" in os.environ  # this process is a worker's child, and not a person's
REGISTERED = Path("data/reports/registered.json")


class Approval(RunInput):
    """What a person answers on Prefect's page before a policy becomes the champion."""

    approve: bool
    name: str = Field(min_length=1)
    reason: str = Field(min_length=1)


class PipelineFailedError(UserError):
    """Raised and not returned: Prefect retries in the same process only what raises."""

    def __init__(self, message: str, facts: dict[str, Any]) -> None:
        super().__init__(message)
        self.facts = facts


@flow(name="pipeline", retries=1, retry_delay_seconds=30)
def pipeline(
    revision: str = "HEAD",
    targets: list[str] | None = None,
    params: dict[str, Any] | None = None,
    repository: str = ".",
    notification: str | None = None,
    approval_hours: float = 24.0,
    elsewhere: dict[str, str] | None = None,
    update_imports: bool = False,
    label_days: float = 60.0,
) -> State[dict[str, Any]]:
    """Bring every stage, or `targets` and what they need, up to date in a workspace at a revision.

    params: changes to params.yaml, {"ppo.kl_coef": 0.05}. repository: a folder, or an address to clone.
    notification: the slug of a Prefect notification block, such as `custom-webhook/team`.
    elsewhere: stages that are run by another deployment, on a machine of their size, {"ppo": "pipeline/gpu"}.
    update_imports: first get what `dvc import` brought in anew, where its source has changed.
    label_days: how long a run waits for people's labels, suspended, before it is given up.
    Tried again or resumed, it goes on in the same workspace: what is done stays done, a killed stage goes on from its
    checkpoint.
    """
    if BY_WORKER:
        end_with_parent()
    elsewhere = elsewhere or {}
    id = str(flow_run.get_id())  # the same in every attempt
    with contextlib.ExitStack() as work, telling_of_failure(notification):
        try:  # a wrong name is told before any work, and no retry mends it
            workspace = work.enter_context(open_workspace(id, revision, repository))
            with workspace.entered():
                waited = resumed(workspace)
                workspace.set_params((params or {}) | (answers(waited) if waited else {}))
                name_this_run(run_name())
                needed(load_stages(), [*elsewhere, *(targets or ())])
        except UserError as error:
            notify(notification, f"The pipeline cannot start: {error}", {})
            return Cancelled(name="Refused", message=str(error))  # one that failed Prefect's server would retry
        with workspace.entered():
            if waited:
                workspace.take_labels()
            elif update_imports:
                workspace.update_imports()
            state = run_stages(workspace, targets, elsewhere)
            result = finish(workspace, state)
            if state.is_failed():
                raise PipelineFailedError(str(state.message), result)
            if state.name != WAITS and workspace.changed(REGISTERED):
                tell_news(
                    notification, workspace, news_of_champion(workspace, approval_hours), result | facts_of_verdict()
                )
        if state.name != WAITS:
            workspace.remove()
    if state.name == WAITS:  # the workspace is free by now for whoever resumes this run
        return wait_for_people(workspace, state, result, waited, label_days, notification)
    return Completed(message=f"branch {workspace.branch}", data=result)


def name_this_run(name: str) -> None:
    """On Prefect's page, once it is known in the workspace what the run changes."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.get_id()), name=name)


def wait_for_people(
    workspace: Workspace,
    state: State[Any],
    facts: dict[str, Any],
    waited: Waiting | None,
    days: float,
    notification: str | None,
) -> State[dict[str, Any]]:
    """Suspend this run until the labels are there. One that nobody would start again ends here; its queue stays open,
    and the next run takes what people did."""
    jobs = jobs_of(cast("Report", state.result(raise_on_failure=False)))
    if not may_suspend():
        return Cancelled(name=WAITS, message=state.message, data=facts)
    if same := waits_already(workspace, jobs):
        workspace.remove()
        return Cancelled(name=WAITS, message=f"the run {same} waits for the same labels already", data=facts)
    if waited is None or waited.jobs != jobs:
        notify(notification, f"The pipeline waits for people: {state.message}", facts)
    suspend(workspace, jobs, days)
    raise AssertionError("the process that suspends its run does not come here")


@contextmanager
def telling_of_failure(notification: str | None) -> Iterator[None]:
    """Whatever goes wrong is told, once no retry can mend it."""
    try:
        yield
    except Exception as error:
        run = FlowRunContext.get()
        retries = (run and run.flow and run.flow.retries) or 0
        if flow_run.get_run_count() > retries:
            notify(notification, f"The pipeline failed: {error}", getattr(error, "facts", {}))
        raise


def tell_news(notification: str | None, workspace: Workspace, news: str, facts: dict[str, Any]) -> None:
    """Unless it is what was told last: a nightly run that finds nothing new registers the same version again."""
    told = f"rlhf_news_{name_of(workspace.repository)}"
    if Variable.get(told, default=None) != news:
        notify(notification, news, facts)
        Variable.set(told, news, overwrite=True)


def run_stages(workspace: Workspace, targets: list[str] | None, elsewhere: Mapping[str, str]) -> State[Any]:
    """Everything, or `targets` and what they need; with as many of people's labels as there are."""
    params = flat(read_yaml(Path("params.yaml")) or {})
    if any(params.get(f"{job}.labeler") == "human" and params.get(f"{job}.human.fill_in") for job in LABELS):
        workspace.take_labels()  # nobody will wait for them
    for stage in needed(load_stages(), targets):
        if stage in elsewhere:
            state = run_elsewhere(stage, elsewhere[stage], workspace)
            if state.name == WAITS:
                return state
    return run_here(workspace, targets)


def run_here(workspace: Workspace, targets: list[str] | None) -> State[Any]:
    state = stages(targets, return_state=True)
    while state.name == WAITS and workspace.take_labels():
        state = stages(targets, return_state=True)
    return state


# Within a task each run of the flow is a new one. Called by the flow itself, the first one after a resumption would be
# taken for the first one before it, and only its end be handed out again.
@task(name="stages", cache_policy=NO_CACHE, persist_result=False)
def stages(targets: list[str] | None) -> State[Any]:
    ended = rlhf(targets, pull=True, return_state=True)
    # a state of its own: of one that is another run's Prefect makes a summary
    return State(type=ended.type, name=ended.name, message=ended.message, data=ended.result(raise_on_failure=False))


def run_elsewhere(stage: str, deployment: str, workspace: Workspace) -> State[Any]:
    """One stage by another deployment, on what the ones before it made here; its commit is this branch's next. Returns
    how the ones before it ended: where they wait for people, it is not run."""
    before = sorted(upstream(load_stages())[stage])
    state = run_here(workspace, before) if before else Completed()
    if state.name == WAITS:
        return state
    finish(workspace, state)
    if state.is_failed():
        raise UserError(str(state.message))
    parameters = {"revision": workspace.branch, "targets": [stage], "repository": workspace.repository}
    run: Any = run_deployment(deployment, parameters=parameters)
    if run.state.name == WAITS:
        raise UserError(
            f"`{stage}` waits for people's labels, and they are given where this run is, not by {deployment}: "
            "take it out of `elsewhere`."
        )
    if not run.state.is_completed():
        raise UserError(f"`{stage}` by {deployment}: {run.state.name}: {run.state.message}")
    workspace.advance(BRANCHES + str(run.id))
    return state


def finish(workspace: Workspace, state: State[Any]) -> dict[str, Any]:
    """Keep what there is, of a failed run too: lock and reports on the branch, outs and run cache at the remote."""
    ended = "failed" if state.is_failed() else "waits for labels" if state.name == WAITS else "done"
    commit = workspace.commit(f"Run {workspace.id}: {ended}")
    try:
        for missing in workspace.push():
            get_run_logger().warning(missing)
    except UserError as error:
        if not state.is_failed():
            raise
        get_run_logger().warning("%s", error)  # beside the stage's own, which is what the run failed of
    finally:
        workspace.publish()
    figures: dict[str, Any] = {}
    for file in sorted(Path("data/reports").glob("*/metrics.json")):
        figures |= flat(read_figures(file.read_text(encoding="utf-8")))
    return {"run": workspace.id, "branch": workspace.branch, "commit": commit, "figures": figures}


def news_of_champion(workspace: Workspace, approval_hours: float) -> str:
    """What became of the policy that this run registered, once a person was asked where that is due."""
    told = json.loads(REGISTERED.read_text(encoding="utf-8"))
    verdict = str(told["champion"])
    if verdict == NOT_REGISTERED:
        return f"the policy is {verdict}"
    policy = f"policy/{told['policy']['version']}"
    if verdict == WAITS_FOR_APPROVAL:
        verdict = ask_for_approval(told["policy"]["version"], approval_hours, workspace)
    if verdict == PROMOTED:
        return f"{policy} is the champion now"
    if verdict.startswith("refused"):
        return f"{policy} missed its gates: {verdict.partition(': ')[2]}"
    return f"{policy} stays a candidate: {verdict}"


def facts_of_verdict() -> dict[str, str]:
    """For a notification, whose subject says who is the champion."""
    verdict = json.loads(REGISTERED.read_text(encoding="utf-8"))["verdict"]
    return {row["name"]: row["text"] for row in verdict["facts"] if row["name"] != CHAMPION_NOW}


def ask_for_approval(number: str, hours: float, workspace: Workspace) -> str:
    """Wait for a person on Prefect's page; `promoted` or why not. Nobody in time is a no, and they are not asked again
    of this version; `make promote` stays open to them."""
    from tasks import registry
    from tasks.tracking import connect

    client = connect()
    record = client.get_model_version("policy", number)
    passed = f"policy/{number} failed none of its gates (run {workspace.id})."
    text = f"{passed}\n\n{record.description}\n\nMay it become the champion?"
    try:
        answer = pause_flow_run(
            wait_for_input=Approval.with_initial_data(description=text, approve=False, name="", reason=""),
            timeout=int(hours * 3600),
        )
    except FlowPauseTimeout:
        reason = f"nobody said yes within {hours:g} hours"
        registry.decline(client, number, author="nobody", reason=reason)
        return reason
    if not answer.approve:
        registry.decline(client, number, author=answer.name, reason=answer.reason)
        return f"{answer.name} said no: {answer.reason}"
    current = registry.champion(client)
    if current is not None and str(current.version) != record.tags.get("gates.rival"):
        return f"policy/{current.version} became the champion meanwhile, and this one was not held against it"
    registry.promote(client, number, author=answer.name, reason=answer.reason)
    return PROMOTED


@flow(name="sweep", flow_run_name="{grid}")
def sweep(
    grid: dict[str, list[Any]],
    samples: int | None = None,
    seed: int = 1,
    revision: str = "HEAD",
    targets: list[str] | None = None,
    repository: str = ".",
    notification: str | None = None,
) -> State[list[dict[str, Any]]]:
    """The pipeline once for each combination of the grid's values, or for so many of them drawn at random.

    grid: {"ppo.kl_coef": [0.01, 0.02, 0.05]}. What the runs have in common, DVC's run cache holds: it is made once.
    """
    rows = []
    for point in points(grid, samples, seed):
        state = pipeline(revision, targets, point, repository, notification, return_state=True)
        result = state.result(raise_on_failure=False)
        told: dict[str, Any] = result if isinstance(result, dict) else getattr(result, "facts", {})
        rows.append({**point, "result": state.name, "branch": told.get("branch", ""), "commit": told.get("commit", "")})
        create_table_artifact(key="rlhf-sweep", table=rows, description="compare: dvc metrics diff COMMIT COMMIT")
    return end_of(rows, "runs")


def end_of(rows: list[dict[str, Any]], what: str) -> State[list[dict[str, Any]]]:
    """Of several runs of the pipeline, each with its `result`."""
    failed = [row for row in rows if row["result"] not in ("Completed", WAITS)]
    waits = [row for row in rows if row["result"] == WAITS]
    if failed:
        return Failed(message=f"{len(failed)} of {len(rows)} {what} failed", data=rows)
    if waits:
        told = f"{len(waits)} of {len(rows)} {what} wait for people's labels: `make label`, then start it again"
        return Cancelled(name=WAITS, message=told, data=rows)
    return Completed(message=f"{len(rows)} {what}", data=rows)


def points(grid: Mapping[str, list[Any]], samples: int | None, seed: int) -> list[dict[str, Any]]:
    """The combinations in order, or some of them in random order, none twice."""
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise UserError('the grid must give values for each key: {"ppo.kl_coef": [0.01, 0.02]}.')
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return every if samples is None else random.Random(seed).sample(every, min(samples, len(every)))


@flow(name="replay", flow_run_name="{version}")
def replay(version: str, only: str | None = None) -> State[None]:
    """Make a registered policy again and compare it with what was recorded (flows/replay.py)."""
    console = Console(record=True, width=160, highlight=False)
    found = replaying.replay(version, only, console)
    create_markdown_artifact(
        f"```\n{console.export_text()}\n```", key="rlhf-replay", description=f"replay of {version}"
    )
    differ = [row.out for row in found if not row.same]
    return Failed(message=f"not the same: {', '.join(differ)}") if differ else Completed(message="the same to the bit")


@flow(name="prune", flow_run_name="older than {keep_days:g} days")
def prune(keep_days: float = 7.0, keep_branches: int = 50, gc: bool = False) -> State[None]:
    """Remove workspaces and run branches that are old, but for what registered versions need (flows/prune.py).

    gc: drop from DVC's cache, too, what no branch, no tag and no registered version needs.
    """
    removed = pruning.prune(keep_days, keep_branches)
    if gc:
        pruning.collect_garbage(Path())
    return Completed(message=f"removed: {removed}")
