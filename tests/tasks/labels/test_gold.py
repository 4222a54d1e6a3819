"""The gold score: its arithmetic, and that nothing which trains can reach it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tasks.datasets import Ticket
from tasks.labels.gold import WEIGHTS, fluency, gold_parts, gold_score
from tasks.lineage import load_stages

ROOT = Path(__file__).parents[3]
TRAINING = ("sft", "sample", "reward", "ppo")

TICKET = Ticket(
    kind="late",
    customer="Ben",
    order="77",
    item="lamp",
    problem="arrived late",
    remedy="store credit",
    deadline="Friday",
    signer="Sue",
)
GOOD = (
    "Dear Ben,\nWe are sorry that the lamp in order 77 arrived late. You will get store credit by Friday.\nYours, Sue"
)


def test_weights_add_up_to_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1.0, abs=1e-12)
    assert len(WEIGHTS) == 10


@pytest.mark.parametrize(("logprob", "mark"), [(-9.0, 0.0), (-5.0, 0.0), (-3.5, 0.5), (-2.0, 1.0), (-0.1, 1.0)])
def test_fluency_is_a_clipped_line(logprob: float, mark: float) -> None:
    assert fluency(logprob) == pytest.approx(mark, abs=1e-12)


def test_gold_score_by_hand() -> None:
    assert gold_score(GOOD, TICKET, mean_logprob=-2.0) == pytest.approx(1.0)
    assert gold_score(GOOD, TICKET, mean_logprob=-3.5) == pytest.approx(0.95)  # half the fluency
    # no order number, another weekday (which is also invented): three checks of 0.1 each
    worse = GOOD.replace(" in order 77", "").replace("Friday", "Monday")
    assert gold_score(worse, TICKET, mean_logprob=-5.0) == pytest.approx(0.6)
    assert gold_score("", TICKET, mean_logprob=-5.0) == 0.0


def test_parts_and_weights_have_the_same_names() -> None:
    assert gold_parts(GOOD, TICKET, -2.0).keys() == WEIGHTS.keys()


def test_only_evaluate_imports_the_gold_score() -> None:
    importers = {path.relative_to(ROOT) for path in (ROOT / "tasks").rglob("*.py") if GOLD in imports_of(path)}
    assert importers <= {Path("tasks/evaluate.py")}


def test_only_evaluate_declares_the_gold_score() -> None:
    assert {spec.name for spec in load_stages(ROOT).values() if str(GOLD.relative_to(ROOT)) in spec.deps} == {
        "evaluate"
    }


@pytest.mark.parametrize("stage", TRAINING)
def test_training_reaches_neither_checks_nor_facts(stage: str) -> None:
    reached = reachable(stage_files(stage))
    assert not {GOLD, CHECKS, SIMULATED} & reached
    assert not [path for path in reached if "tickets.jsonl" in path.read_text(encoding="utf-8")]
    deps = load_stages(ROOT)[stage].deps
    hidden = ("tasks/labels", "data/raw", "data/prepared/tickets.jsonl")
    assert not [dep for dep in deps if dep.startswith(hidden) or dep in ("data", "data/prepared", "tasks")]


def test_the_walk_sees_what_is_there() -> None:
    """A walk that found nothing would prove nothing."""
    assert {GOLD, CHECKS} <= reachable(stage_files("evaluate"))
    assert {CHECKS, SIMULATED} <= reachable(stage_files("rank"))


GOLD = ROOT / "tasks/labels/gold.py"
CHECKS = ROOT / "tasks/labels/checks.py"
SIMULATED = ROOT / "tasks/labels/simulated.py"


def stage_files(stage: str) -> list[Path]:
    """A stage is a module or a package of its name."""
    module, package = ROOT / f"tasks/{stage}.py", ROOT / f"tasks/{stage}"
    files = [module] if module.exists() else sorted(package.glob("*.py"))
    assert files, f"stage {stage} has no code"
    return files


def imports_of(path: Path) -> set[Path]:
    """Files under tasks/ that a file imports, anywhere in it, by any form of the import statement."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            base = ".".join(parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    places = [ROOT / name.replace(".", "/") for name in names if name.split(".")[0] == "tasks"]
    found = {place.with_suffix(".py") for place in places} | {place / "__init__.py" for place in places}
    return {file for file in found if file.exists()}


def reachable(files: list[Path]) -> set[Path]:
    reached: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting.extend(imports_of(file))
    return reached
