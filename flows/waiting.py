"""Runs that wait for people's labels: what they lack, and how they go on.

A run of a deployment that waits is suspended: no process, no memory, its workspace as it was. The workspace says so in
`.rlhf/waits.json`. The watcher (flows/watch.py) counts what is still missing, keeps the run's artifact up to date, and
resumes the run as a person would on Prefect's page.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import suspend_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import resume_flow_run
from prefect.input import RunInput, keyset_from_base_key
from prefect.settings import get_current_settings
from prefect.types._datetime import now
from pydantic import BaseModel, Field

from flows.deploy import STILL_WAITS
from flows.dvc_stage import WAITS
from flows.report import Report
from flows.workspace import START, WORKSPACES, Workspace, home_of, whole_lines
from tasks.labels.queue import LABELS, QUEUES, WAIT_FILE, Job, Progress, close_queue, page_address, progress, read_queue
from tasks.tracking import masked

MARK = WAIT_FILE
ARTIFACT, TITLE = "rlhf-labels", "Labels that are missing"


class Resume(RunInput):
    """What a person answers on Prefect's page, who wants a waiting run to look again."""

    fill_in: bool = Field(
        False, description="Simulated labelers do what people have not done, marked as such in every report"
    )


class Waiting(BaseModel):
    """What a workspace says of the run that waits with it."""

    jobs: list[Job]
    form: str  # the key of its answers
    until: float  # POSIX seconds; then Prefect's server gives the run up
    server: str = ""  # Prefect's, that knows the run


def may_suspend() -> bool:
    """Whether somebody would start this flow run again: a worker does so for a run of a deployment, but no sub-flow."""
    context = FlowRunContext.get()
    run = context and context.flow_run
    return bool(run and run.deployment_id and not run.parent_task_run_id)


def waits_already(workspace: Workspace, jobs: list[Job]) -> str:
    """The run that waits for the very same, or "": of the same deployment, with the same parameters, from the same
    commit, for the same items. A nightly run need not wait beside the one of the night before."""
    context = FlowRunContext.get()
    own = context and context.flow_run
    files = [START, *(QUEUES / f"{job}.json" for job in jobs)]
    with get_client(sync_client=True) as client:
        for mark in sorted(workspace.path.parent.glob(f"*/{MARK}")):
            other = mark.parents[1]
            same = all((other / file).exists() for file in files) and all(
                (other / file).read_bytes() == (workspace.path / file).read_bytes() for file in files
            )
            if not own or not same:
                continue
            with suppress(ObjectNotFound):
                run = client.read_flow_run(UUID(other.name))
                alive = run.state is not None and run.state.name == "Suspended"
                if alive and (run.deployment_id, run.parameters) == (own.deployment_id, own.parameters):
                    return other.name
    return ""


def suspend(workspace: Workspace, jobs: list[Job], days: float) -> None:
    """End this process; resumed, the flow begins anew in the same workspace, where what is done stays done."""
    text = in_markdown(lacking(workspace.path, home_of(workspace.repository), jobs))
    create_markdown_artifact(text, key=ARTIFACT, description=TITLE)
    waiting = Waiting(jobs=jobs, form=uuid.uuid4().hex, until=time.time() + days * 86400, server=server())
    (workspace.path / MARK).write_text(waiting.model_dump_json(), encoding="utf-8")
    suspend_flow_run(
        wait_for_input=Resume.with_initial_data(description=text),
        key=waiting.form,  # never used before, else Prefect would take it for a suspension that is over
        timeout=int(days * 86400),
    )


def server() -> str:
    return get_current_settings().api.url or ""


def resumed(workspace: Workspace) -> Waiting | None:
    """What this run waited for until somebody resumed it; it does not wait any more."""
    mark = workspace.path / MARK
    if not mark.exists():
        return None
    waiting = Waiting.model_validate_json(mark.read_text(encoding="utf-8"))
    mark.unlink()
    return waiting


def answers(waiting: Waiting) -> dict[str, Any]:
    """The parameters that whoever resumed the run has changed."""
    answer = cast("Resume", Resume.load(keyset_from_base_key(f"suspended-{waiting.form}")))
    return {f"{job}.human.fill_in": True for job in waiting.jobs} if answer.fill_in else {}


def jobs_of(report: Report) -> list[Job]:
    """What people are asked to do: each stage that waits has a queue of its name."""
    return [job for job in LABELS if any(row.stage == job and row.status == "waits" for row in report)]


def waits_until(workspace: Path) -> float:
    """When nobody will wait for the labels of this run any more; 0 where nobody does."""
    with suppress(FileNotFoundError):
        return Waiting.model_validate_json((workspace / MARK).read_text(encoding="utf-8")).until
    return 0.0


def lacking(workspace: Path, home: Path, jobs: Iterable[Job]) -> dict[Job, Progress]:
    """How far each job is, by the labels that the workspace has and those at home, which it takes when it goes on."""
    found = {}
    for job in jobs:
        file, row_type = LABELS[job]
        lines = dict.fromkeys([*whole_lines(workspace / file), *whole_lines(home / file)])
        judgments = [row_type.model_validate_json(line) for line in lines]
        found[job] = progress(read_queue(workspace / QUEUES / f"{job}.json"), judgments)
    return found


def in_markdown(missing: Mapping[Job, Progress]) -> str:
    """For the run's page: how many labels are missing, and where to give them."""
    rows = [
        f"| {job} | {told.done} of {told.items} items | {told.judgments} | **{told.missing}** | {told.skipped} |"
        for job, told in missing.items()
    ]
    return "\n".join(
        [
            f"**Labels by people that are missing: {sum(told.missing for told in missing.values())}.** "
            f"[Open the page]({page_address()}) (`make label` starts it).\n",
            "| job | done | labels | missing | skipped |",
            "|---|---|---|---|---|",
            *rows,
            "\nWhen they are there, the run goes on by itself. Resumed by hand it looks again.",
        ]
    )


def resume_those_with_labels(home: Path) -> list[str]:
    """Resume the runs that lack nothing any more, and say of the others what is missing. Returns those that go on.
    Queues of runs that are over, or that Prefect's server has deleted, are closed."""
    found: list[str] = []
    queues = {file.parents[len(QUEUES.parts)] for file in home.glob(f"{WORKSPACES}/*/{QUEUES}/*.json")}
    workspaces = sorted(queues | {mark.parents[1] for mark in home.glob(f"{WORKSPACES}/*/{MARK}")})
    if not workspaces:
        return found
    with get_client(sync_client=True) as client:
        for workspace in workspaces:
            try:
                if look_at(run_of(workspace, client), workspace, home, client):
                    found.append(workspace.name)
            except Exception as error:  # one run that cannot be looked at must not keep the others waiting
                print(f"warning: the run {workspace.name}, which waits: {masked(str(error))}", file=sys.stderr)
    return found


def run_of(workspace: Path, client: SyncPrefectClient) -> FlowRun | None:
    with suppress(ObjectNotFound, ValueError):  # ValueError: the workspace bears no run's name
        return client.read_flow_run(UUID(workspace.name))
    return None


def close_queues(workspace: Path) -> None:
    """Nobody should label for it any more."""
    for job in LABELS:
        close_queue(job, workspace)
    (workspace / MARK).unlink(missing_ok=True)


def look_at(run: FlowRun | None, workspace: Path, home: Path, client: SyncPrefectClient) -> bool:
    """Whether the run goes on. One that cannot be suspended has ended with its queue open: what people do is the next
    start's."""
    mark = workspace / MARK
    waiting = Waiting.model_validate_json(mark.read_text(encoding="utf-8")) if mark.exists() else None
    if run is None:
        if waiting and waiting.server == server():  # deleted; of another server nothing is known
            close_queues(workspace)
        return False
    if run.state is None or run.state.is_final():
        if run.state is None or run.state.name != WAITS:
            close_queues(workspace)
        return False
    if not waiting or run.state.name != "Suspended":
        return False
    missing = lacking(workspace, home, waiting.jobs)
    if not any(told.missing for told in missing.values()):
        resume_flow_run(run.id, run_input=Resume(fill_in=False).model_dump())
        return True
    if now() - run.state.timestamp < timedelta(minutes=10):  # see flows/deploy.py
        emit_event(STILL_WAITS, resource={"prefect.resource.id": f"prefect.flow-run.{run.id}"})
    tell(in_markdown(missing), run.id, client)
    return False


def tell(text: str, run: UUID, client: SyncPrefectClient) -> None:
    """A new version of the run's artifact, where it says something else."""
    newest = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            key=ArtifactFilterKey(any_=[ARTIFACT]), flow_run_id=ArtifactFilterFlowRunId(any_=[run])
        ),
        sort=ArtifactSort.CREATED_DESC,
        limit=1,
    )
    if not newest or newest[0].data != text:
        client.create_artifact(
            ArtifactCreate(key=ARTIFACT, type="markdown", description=TITLE, data=text, flow_run_id=run)
        )
