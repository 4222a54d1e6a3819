"""The real stages from end to end on a tiny language model: by DVC, by the flow, by hand, and again by force."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from ruamel.yaml import YAML

from tasks import run
from tasks.datasets import read_figures
from tasks.lineage import hash_path, load_stages, locked_outs
from tests.killing import finish_apart
from tests.pipeline.conftest import command
from tests.tiny import shell, small_disk

if TYPE_CHECKING:
    from playwright.sync_api import Browser

yaml = YAML()
# made without arithmetic in floating point: the same by each Python on each processor. A stage that writes other bytes
# on purpose has another hash here.
HASHES = {
    "data/tickets": "fb4e1416d17ca66f99a9f2920801c210.dir",
    "data/prepared": "6df624602a8de71e57871c38a9d9cd2b.dir",
    "data/collected/demonstrations": "b6bc19776847a6ced9cbc622f54becb9.dir",
}


def outs_of(repo: Path) -> dict[str, str]:
    return {path: md5 for stage in load_stages(repo) for path, md5 in locked_outs(stage, repo).items()}


def lock_of(repo: Path) -> Any:
    """dvc.lock's content: of stages that ran side by side, the one that ended first stands first."""
    return YAML(typ="safe").load(repo / "dvc.lock")


def test_dvc_repro_makes_every_out_and_its_lock(by_dvc: Path) -> None:
    specs = load_stages(by_dvc)
    assert set(outs_of(by_dvc)) == {out for spec in specs.values() for out in spec.outs}
    evaluation = read_figures((by_dvc / "data/reports/evaluation/metrics.json").read_text())
    assert {"base", "sft", "policy", "gain", "gain_low", "gain_high"} <= set(evaluation["gold"])
    assert {"win_rate", "win_rate_low", "win_rate_high", "kl"} <= set(evaluation)
    assert {"sft", "policy"} <= set(evaluation["fluency"])
    assert 0 <= read_figures((by_dvc / "data/reports/reward/metrics.json").read_text())["reward"]["accuracy"] <= 1


def test_what_a_run_leaves_untracked_belongs_into_the_commit(by_dvc: Path) -> None:
    """DVC adds no git-ignore file of its own beside the one that is committed."""
    untracked = set(shell(by_dvc, "git", "ls-files", "--others", "--exclude-standard").splitlines())
    code = ("flows/", "tasks/", "data/labels/", "data/raw/", ".dvc", "params.yaml", "dvc.yaml", "prefect.toml")
    made = {path for path in untracked if not path.startswith(code)} - {".gitignore", "data/.gitignore"}
    kept_by_dvc = set(shell(by_dvc, "git", "check-ignore", *outs_of(by_dvc)).splitlines())
    assert made == {"dvc.lock", *outs_of(by_dvc)} - kept_by_dvc


def test_dvc_shows_as_many_figures_as_fit_a_screen(by_dvc: Path) -> None:
    shown = json.loads(command(by_dvc, "dvc", "metrics", "show", "--json"))
    figures = [name for file in shown[""]["data"].values() for name in file["data"]]
    assert 10 <= len(figures) <= 20
    assert {"gold.policy", "gold.gain", "win_rate", "kl", "reward.accuracy"} <= set(figures)


def test_each_python_makes_the_same_data(by_dvc: Path) -> None:
    made = outs_of(by_dvc)
    assert {path: made[path] for path in HASHES} == HASHES


def test_another_python_makes_the_same_dvc_lock(by_dvc: Path, make_repo: Any) -> None:
    """RLHF_OTHER_PYTHON is the Python of an environment with the same lock."""
    other = os.environ.get("RLHF_OTHER_PYTHON")
    if not other:
        pytest.skip("RLHF_OTHER_PYTHON=/path/to/another/.venv/bin/python is not set")
    repo: Path = make_repo("by-other-python")
    command(repo, "dvc", "repro", python=other)
    assert lock_of(repo) == lock_of(by_dvc)


@pytest.mark.parametrize(("width", "media"), [(1200, "screen"), (375, "screen"), (700, "print")])
def test_the_report_reads_well_without_network(
    by_dvc: Path, browser: Browser, width: int, media: Literal["screen", "print"]
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.emulate_media(media=media)
    page.goto((by_dvc / "data/reports/report.html").as_uri())
    assert len(asked) == 1, "it is all in one file"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    headings = page.locator("h2").all_inner_texts()
    assert {"Gates", "Is the reward model any good?", "From the labels to the policy", "Parameters"} <= set(headings)
    drawn = page.locator("figure svg")
    assert drawn.count() == 7
    assert all(drawn.nth(place).bounding_box()["width"] > 100 for place in range(7))  # type: ignore[index]
    assert page.locator(".sample").count() == 4, "as many as there are prompts, and at most 20"
    page.close()


def test_nothing_is_unpickled_and_nothing_is_left_over(by_dvc: Path) -> None:
    files = [path for path in (by_dvc / "data").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert not list((by_dvc / "data").rglob(".tmp-*"))


def alone(repo: Path, stage: str) -> None:
    os.chdir(repo)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{repo / 'mlflow.db'}"
    assert run.main([stage]) == 0


def test_each_stage_alone_gives_the_same_bits(by_dvc: Path) -> None:
    """What `python -m tasks.run STAGE` does, for all of them, over what `dvc repro` made. Forks start faster."""
    recorded = outs_of(by_dvc)
    for stage in load_stages(by_dvc):
        finish_apart(alone, by_dvc, stage)
    assert {path: hash_path(by_dvc / path) for path in recorded} == recorded


def test_a_disk_that_is_too_small_for_checkpoints_costs_them_alone(by_dvc: Path) -> None:
    recorded = outs_of(by_dvc)
    with small_disk(by_dvc / ".rlhf/checkpoints/ppo", "64k"):
        said = command(by_dvc, "tasks.run", "ppo")
    assert "could not be written ([Errno 28] No space left on device" in said or "os error 28" in said
    assert hash_path(by_dvc / "data/models/policy") == recorded["data/models/policy"]


def test_the_flow_gives_the_same_bits_and_shows_what_it_did(by_dvc: Path, make_repo: Any) -> None:
    """Then everything again by force leaves dvc.lock as it is, and a second flow run finds all stages cached."""
    repo: Path = make_repo("by-flow")
    first = command(repo, "flows.rlhf")
    assert all(stage in first for stage in load_stages(repo))
    assert "policy" in first
    assert lock_of(repo) == lock_of(by_dvc)

    again = command(repo, "flows.rlhf")
    assert again.lower().count("cached") >= len(load_stages(repo))

    before = (repo / "dvc.lock").read_text()
    command(repo, "dvc", "repro", "--force")
    assert (repo / "dvc.lock").read_text() == before


def stages_run(said: str) -> set[str]:
    return {stage for stage in load_stages() if f"Running stage '{stage}'" in said}


def test_a_changed_ppo_parameter_runs_ppo_and_what_follows_and_comes_back_from_the_run_cache(by_dvc: Path) -> None:
    path = by_dvc / "params.yaml"
    original, before = path.read_text(), outs_of(by_dvc)
    params = yaml.load(path)
    params["ppo"]["kl_coef"] = 0.5
    yaml.dump(params, path)
    changed = command(by_dvc, "dvc", "repro")
    # `judge` reads the answers, which so small a change of so small a model leaves as they are
    assert stages_run(changed) - {"judge"} == {"ppo", "evaluate", "report", "register"}

    path.write_text(original)
    restored = command(by_dvc, "dvc", "repro")
    # `register` must run, to move the alias back; the report is no metric, and git keeps it: it is made again
    assert stages_run(restored) == {"report", "register"}
    assert outs_of(by_dvc) == before


def test_a_quick_run_takes_over_what_is_the_same_and_keeps_apart_what_is_not(by_dvc: Path) -> None:
    before = {name: (by_dvc / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    said = command(by_dvc, "flows.rlhf", "--quick", "demonstrate")
    statuses = {stage: re.search(rf"│ {stage} +│ (\w+)", said) for stage in ("base", "tickets", "demonstrate")}
    assert {stage: found and found[1] for stage, found in statuses.items()} == {
        **{"base": "cached", "tickets": "cached"},
        "demonstrate": "ran",
    }
    assert "the figures and answers" in said
    assert ".rlhf/quick" in said
    assert {name: (by_dvc / name).read_bytes() for name in before} == before
    assert (by_dvc / ".rlhf/quick/data/collected/demonstrations").is_dir()
    with closing(sqlite3.connect(by_dvc / "mlflow.db")) as store:
        pipelines = store.execute(
            "select experiments.name, count(*) from runs join experiments using (experiment_id) join tags "
            "on tags.run_uuid = runs.run_uuid where tags.key = 'dvc.stage' and tags.value = 'demonstrate' group by 1"
        )
        assert dict(pipelines)["rlhf-quick"] == 1


def test_an_unknown_key_is_named_with_the_nearest_right_one(by_dvc: Path) -> None:
    path = by_dvc / "params.yaml"
    original = path.read_text()
    try:
        path.write_text(original.replace("kl_coef:", "kl_coeff:"))
        output = command(by_dvc, "tasks.run", "tickets", fails=True)
    finally:
        path.write_text(original)
    assert "ppo.kl_coeff" in output
    assert "kl_coef" in output
    assert "Traceback" not in output
