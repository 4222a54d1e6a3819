"""What the stages ask of the data and of the parameters, as rules that need no model.

`prepare` goes through all of them at its end, before anything is trained (tasks/prepare/outlook.py); each stage goes
through its own again. A rule only says what does not fit, and which values would: no byte that a stage writes comes
from here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from tasks.stage import UserError


class Misfit(NamedTuple):
    message: str
    fit: Mapping[str, Any] = {}  # {"baseline.prompts": 9}: values of params.yaml with which it would fit


def require(misfit: Misfit | None) -> None:
    if misfit:
        raise UserError(misfit.message)


def prompts_of_split(key: str, wanted: int, split: str, there: int, fewest: int = 1) -> Misfit | None:
    """fewest: that `key` may be."""
    if wanted <= there:
        return None
    return Misfit(
        f"{key} is {wanted}, and the {split} split has {there} prompts. Lower it in params.yaml, or raise "
        f"prepare.splits.{split} or the {split} of the sources' `splits`.",
        {key: there} if there >= fewest else {},
    )


def simulated_demonstrations(wanted: int, known: int) -> Misfit | None:
    if wanted <= known:
        return None
    return Misfit(
        f"demonstrate.prompts is {wanted}, and the split sft holds {known} prompts that simulated people can answer: "
        "support tickets and nothing else. Lower demonstrate.prompts or raise prepare.splits.sft in params.yaml, or "
        "add such prompts; or set demonstrate.labeler to `recorded` to use your own demonstrations, or to `human` to "
        "write them.",
        {"demonstrate.prompts": known} if known else {},
    )


def demonstrations_by_people(wanted: int, there: int) -> Misfit | None:
    if wanted <= there:
        return None
    return Misfit(
        f"demonstrate.prompts is {wanted}, and the split sft holds {there} prompts for people to answer. Lower "
        "demonstrate.prompts or raise prepare.splits.sft in params.yaml, or add prompts.",
        {"demonstrate.prompts": there} if there else {},
    )


def recorded_demonstrations(there: int) -> Misfit | None:
    if there:
        return None
    return Misfit(
        "demonstrate.labeler is `recorded`, and data/prepared/demonstrations/sft.jsonl holds no demonstrations. Add a "
        "source of the kind `demonstrations` to data.sources in params.yaml, or set demonstrate.labeler to `simulated` "
        "or `human`."
    )


def validation_sides(share: float, draws: Sequence[float]) -> Misfit | None:
    """draws: a number in [0, 1) of each demonstration; those below the share are validated on."""
    apart = sum(draw < share for draw in draws)
    if 0 < apart < len(draws):
        return None
    fitting = share_with_both_sides(draws)
    return Misfit(
        f"sft.validation_share {share} of {len(draws)} demonstrations leaves {len(draws) - apart} to train on and "
        f"{apart} to validate on; both need at least one.",
        {} if fitting is None else {"sft.validation_share": fitting},
    )


MORE_PROMPTS = {
    "recorded": "Give the split eval rankings (`splits` of their source), add rankings",
    "simulated": "Raise sample.prompts",
    "human": "Have people rank more",
}


def held_out_rankings(labeler: str, share: float, held_out: Iterable[bool], draws: Sequence[float]) -> Misfit | None:
    """held_out: of each ranked prompt. draws: of those that a share decides on, a number in [0, 1); those below it are
    held out."""
    sides = list(held_out)
    if share == 0 or len(set(sides)) == 2:
        return None
    fitting = share_with_both_sides(draws)
    return Misfit(
        f"rank.held_out_share = {share:g} of {len(sides)} ranked prompts leaves no prompt on one side. "
        f"{MORE_PROMPTS[labeler]} or change the share in params.yaml.",
        {} if fitting is None else {"rank.held_out_share": fitting},
    )


def recorded_rankings(training: int, held_out: int) -> Misfit | None:
    if training:
        return None
    return Misfit(
        "rank.labeler is `recorded`, and data/prepared/rankings/reward.jsonl holds no rankings; eval.jsonl beside it "
        f"holds {held_out}. Add a source of the kind `rankings` to data.sources in params.yaml, give the one that is "
        "there a share for reward (its `splits`), or set rank.labeler to `simulated` or `human`."
    )


def simulated_rankings(known: int, sampled: int) -> Misfit | None:
    if known:
        return None
    return Misfit(
        f"rank.labeler is `simulated`, and none of the {sampled} sampled prompts is a support ticket: simulated people "
        "can rank answers to nothing else. Add such prompts, or set rank.labeler to `human` or `recorded` in "
        "params.yaml to use people's rankings."
    )


def rankings_with_an_order(training: int, held_out: int) -> Misfit | None:
    if training and held_out:
        return None
    return Misfit(
        f"{training} rankings to train on and {held_out} held out have an order; both need at least one. Change "
        "`sample.prompts`, `rank.held_out_share` or `reward.label_share` in params.yaml, or, for recorded rankings, "
        "the `splits` of their source."
    )


def lacks_prompts(prompts: int, eval_every: int, eval_prompts: int) -> str | None:
    """What keeps PPO from starting, where there are so many prompts."""
    if not prompts:
        return "there are no prompts"
    if eval_every and prompts <= eval_prompts:
        return f"{prompts} prompts leave none to train on when eval_prompts {eval_prompts} are held out"
    return None


def trained_layers(key: str, wanted: int | str, layers: int) -> Misfit | None:
    if wanted == "all" or int(wanted) <= layers:
        return None
    return Misfit(f"{key} is {wanted}, and the model has {layers} layers.", {key: layers})


def reward_function(name: str, deps: Sequence[str], root: Path) -> Misfit | None:
    """name: a key of ppo.rewards, `model` or `FILE.py:FUNCTION`, a file in the repository and among the stage's deps.
    The file is read and not run."""
    file, _, function = name.partition(":")
    where = f"ppo.rewards: `{name}`"
    if name == "model":
        return None
    if not function or not file.endswith(".py"):
        return Misfit(f"{where} is neither `model` nor `FILE.py:FUNCTION`.")
    if not (root / file).is_file():
        return Misfit(f"{where}: there is no file {file} here.")
    if not any(file == dep or file.startswith(dep + "/") for dep in deps):
        return Misfit(
            f"{where}: add {file} to the deps of the stage `ppo` in dvc.yaml, so that it is part of what is tracked."
        )
    try:
        tree = ast.parse((root / file).read_bytes())
    except (SyntaxError, ValueError, OSError) as error:  # ValueError: null bytes
        return Misfit(f"{where}: {file} cannot be imported: {type(error).__name__}: {error}")
    names = {
        getattr(node, "asname", None) or getattr(node, "name", None) or getattr(node, "id", None)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Name | ast.alias)
    }
    return None if names & {function, "*"} else Misfit(f"{where}: {file} has no function `{function}`.")


def share_with_both_sides(draws: Sequence[float]) -> float | None:
    """A share with about a fifth of the draws below it, at least one, and not all. None for fewer than two."""
    order = sorted(set(draws))  # one prompt may have several demonstrations
    if len(order) < 2:
        return None
    most = max(1, len(order) // 5)
    low, high = order[most - 1], order[most]
    rounded = ceil(low * 100 + 1e-9) / 100
    return rounded if low < rounded <= high else (low + high) / 2
