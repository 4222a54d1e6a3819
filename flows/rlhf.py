"""The whole pipeline, from a base model to a PPO policy: `python -m flows.rlhf [STAGE ...]`.

DVC knows what depends on what and what is up to date (dvc.yaml); this flow starts the stages in that order, those that
do not depend on each other side by side, and MLflow keeps the record.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import httpx
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from rich.console import Console

from flows.console import terminal
from flows.dvc_stage import WAITS, Outcome, Pool, dvc_stage, outcome_of, unchanged
from flows.leftovers import mend_leftovers
from flows.quick import quick_folder, thin_out
from flows.report import TOLD, Report, pipeline_record, print_report, publish, quoted
from flows.server import prefect_server
from tasks.lineage import StageSpec, load_stages, read_lock, run_name, upstream
from tasks.params import load_params
from tasks.run import WAITS as EXIT_WAITS
from tasks.stage import UserError
from tasks.tracking import connect, masked


@flow(name="rlhf", flow_run_name=run_name, task_runner=ThreadPoolTaskRunner())  # type: ignore[arg-type]
def rlhf(targets: list[str] | None = None, pull: bool = False) -> State[Report]:
    """Bring every stage of dvc.yaml up to date, or `targets` and what they need.

    pull: in a fresh workspace, fetch what is needed from DVC's cache or remote, and no more.
    """
    mend_leftovers()
    specs = needed(load_stages(), targets)
    parents = upstream(specs)
    runs: dict[str, PrefectFuture[State[Outcome]]] = {}
    done = frozenset[str]() if pull else unchanged({name: parents[name] for name in specs})
    with pipeline_record() as pipeline, Pool(pull, done) as pool:
        for name, spec in specs.items():
            first = [runs[parent] for parent in parents[name]]
            runs[name] = dvc_stage(spec).submit(spec, pool, pipeline.ids, wait_for=first, return_state=False)
        wait(list(runs.values()))
        report = [pipeline.row(spec, outcome_of(runs[name].state)) for name, spec in specs.items()]
        failed = [row.stage for row in report if row.status == "failed"]
        waits = [row.told for row in report if row.status == "waits"]
        # MLflow has no word for a run that waits; "scheduled" alone is neither an end nor a fault
        pipeline.status = "FAILED" if failed else "SCHEDULED" if waits else "FINISHED"
        pipeline.note = "\n".join(
            f"- **{row.stage} {TOLD[row.status]}**: {quoted(row.told)}" for row in report if row.told
        )
    publish(report, pipeline.url)
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}", data=report)
    return Cancelled(name=WAITS, message="\n".join(waits), data=report) if waits else Completed(data=report)


def needed(specs: dict[str, StageSpec], targets: Iterable[str] | None) -> dict[str, StageSpec]:
    """The targets and all that they depend on, in the order of `specs`; everything where no target is named.

    UserError for one that is no stage.
    """
    for name in targets or ():
        if name not in specs:
            near = difflib.get_close_matches(name, specs, n=1)
            raise UserError(
                f"no stage `{name}` in dvc.yaml" + (f"; did you mean `{near[0]}`?" if near else f": {', '.join(specs)}")
            )
    parents = upstream(specs)
    wanted: set[str] = set()
    pending = list(targets or specs)
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            pending.extend(parents[name])
    return {name: spec for name, spec in specs.items() if name in wanted}


def out_of_date(report: Report) -> list[str]:
    """The stages that were not part of the run and would run now."""
    parents = upstream(load_stages())
    others = parents.keys() - {row.stage for row in report}
    done = unchanged(parents) if others else frozenset()
    return [stage for stage in parents if stage in others and stage not in done]


def run_quickly(targets: list[str] | None) -> State[Report]:
    """In the folder of the quick run: of the data that people brought, a part."""
    kinds = {source.kind for source in load_params(Path("params.yaml")).data.sources}
    if kinds != {"prompts"}:
        prepared = cast("State[Report]", rlhf(["prepare"], return_state=True))
        if not prepared.is_completed():
            return prepared
        thin_out()
    return cast("State[Report]", rlhf(targets, return_state=True))


def _open_record() -> None:
    """MLflow takes seconds to import, and the first time to make its tables: meanwhile Prefect's server starts."""
    with contextlib.suppress(Exception):  # the flow tells
        connect()


def main(argv: list[str] | None = None) -> int:
    """Run the flow for a person. Exit codes: 0 done, 1 a stage failed, 2 something to mend, 3 people must label
    something first (0 with --waits-ok), 130 or 143 stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        targets, waits_ok, quick = _parse(argv)
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        with contextlib.ExitStack() as place:
            opening = threading.Thread(target=_open_record, daemon=True)
            opening.start()
            with terminal() as log, prefect_server(log.print):
                opening.join()
                if quick:
                    place.enter_context(quick_folder())
                    state = run_quickly(targets)
                else:
                    state = cast("State[Report]", rlhf(targets, return_state=True))
            report: Report | Exception = state.result(raise_on_failure=False)
            if isinstance(report, Exception):
                raise report
            print_report(report, console, [] if quick else out_of_date(report), quick=quick)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here.", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except httpx.TransportError as error:  # after all of Prefect's own tries
        print(
            f"error: Prefect's server does not answer ({masked(str(error))}).\n"
            "The stages went on without it: what is done stands in dvc.lock, and the same command goes on from here.",
            file=sys.stderr,
        )
        return 2
    if state.name == WAITS:
        return 0 if waits_ok else EXIT_WAITS
    return 1 if state.is_failed() else 0


def _parse(argv: list[str] | None) -> tuple[list[str] | None, bool, bool]:
    """(the stages that are asked for, whether waiting for people is a success, whether it is a quick run)"""
    parser = argparse.ArgumentParser(
        prog="python -m flows.rlhf",
        description="Run the pipeline: every stage that is out of date, and nothing else.",
        epilog="PREFECT_API_URL: a Prefect server to report to (else one is started for the run). "
        "MLFLOW_TRACKING_URI: where MLflow keeps the record (else mlflow.db here).",
    )
    parser.add_argument("stage", nargs="*", metavar="STAGE", help="only these and what they need; default: all")
    parser.add_argument(
        "--waits-ok",
        action="store_true",
        help="end with 0 and not 3 where people must label something first: make calls every other exit code an error",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a trial in minutes, in .rlhf/quick: small sizes, and nothing is registered",
    )
    arguments = parser.parse_args(argv)
    wanted: list[str] = arguments.stage
    try:
        known = load_stages()
    except FileNotFoundError:
        raise UserError("no dvc.yaml here; run from the repository's root.") from None
    needed(known, wanted)
    read_lock()
    if Path("params.yaml").exists():
        load_params(Path("params.yaml"))  # a wrong key is told now, not when the stage that reads it has its turn
    return wanted or None, arguments.waits_ok, arguments.quick


if __name__ == "__main__":
    sys.exit(main())
