"""Whether the stages that follow will find what they ask for: said at the end of `prepare`, before anything is trained.

Labels that nobody has given yet are taken for given: all that people or simulated labelers will be asked for. The rules
are those that the stages go by themselves (tasks/demands.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks import demands
from tasks.datasets import stable_share
from tasks.demands import Misfit
from tasks.lineage import StageSpec
from tasks.params import Params, SplitName
from tasks.stage import missing_labels

FEWEST_PAIRS = 20  # that a judge is compared with labelers on (tasks/judge.py)
Ids = NDArray[np.uint64]


class Supply(NamedTuple):
    """What the stages will find. Ids are in the order in which stages take them."""

    prompts: Mapping[SplitName, Ids]
    demonstrations: Ids  # of the split sft: the prompt of each
    rankings: Mapping[SplitName, pd.DataFrame]  # of reward and eval: id, pairs, tied_pairs
    tickets: Collection[int]  # prompts that simulated labelers can answer
    layers: int | None  # of the base model; None: its config does not say

    def count(self, split: SplitName) -> int:
        return len(self.prompts[split])


def supply_of(
    examples: pd.DataFrame, order: NDArray[np.float64], tickets: Collection[int], config: Path, share_prompts: bool
) -> Supply:
    """order: (N,) of the examples."""
    kept = examples[["id", "kind", "split", "copies", "pairs", "tied_pairs"]].assign(order=order)
    kept = kept[kept["split"].notna()]
    kept = kept.loc[kept.index.repeat(kept["copies"])]
    kept = kept.iloc[np.argsort(kept["order"].to_numpy(), kind="stable")]

    def of(kind: str, split: str) -> pd.DataFrame:
        return kept[(kept["kind"] == kind) & (kept["split"] == split)]

    def ids(*splits: str) -> Ids:
        found: Ids = kept.loc[kept["split"].isin(splits), "id"].drop_duplicates().to_numpy()
        return found

    return Supply(
        prompts={
            "sft": ids("sft"),
            "reward": ids("reward"),
            "ppo": ids("ppo", "reward") if share_prompts else ids("ppo"),
            "eval": ids("eval"),
        },
        demonstrations=of("demonstrations", "sft")["id"].to_numpy(),
        rankings={"reward": of("rankings", "reward"), "eval": of("rankings", "eval")},
        tickets=tickets,
        layers=json.loads(config.read_text(encoding="utf-8")).get("num_hidden_layers"),
    )


def misfits(params: Params, supply: Supply) -> Iterator[Misfit]:
    """What no stage could do with these data and parameters."""
    yield from of_demonstrations(params, supply)
    yield from of_rankings(params, supply)
    yield from of_ppo(params, supply)
    found = demands.prompts_of_split(
        "baseline.prompts", params.baseline.prompts, "eval", supply.count("eval"), fewest=2
    )
    if found and supply.count("eval"):
        yield found
    if supply.layers is not None:
        for key, wanted in (
            ("sft.trainable_layers", params.sft.trainable_layers),
            ("reward.trainable_layers", params.reward.trainable_layers),
            ("ppo.trainable_layers", params.ppo.trainable_layers),
        ):
            yield from some(demands.trained_layers(key, wanted, supply.layers))


def of_demonstrations(params: Params, supply: Supply) -> Iterator[Misfit]:
    labeler, wanted, seed = params.demonstrate.labeler, params.demonstrate.prompts, params.seed
    there = supply.prompts["sft"].tolist()
    if labeler == "recorded":
        found = demands.recorded_demonstrations(len(supply.demonstrations))
        ids = hexadecimal(supply.demonstrations)
    elif labeler == "simulated":
        ids = hexadecimal(id for id in there if id in supply.tickets)
        found = demands.simulated_demonstrations(wanted, len(ids))
    else:
        ids = hexadecimal(there)
        found = demands.demonstrations_by_people(wanted, len(ids))
    if found and len(supply.demonstrations):
        found = found._replace(fit={"demonstrate.labeler": "recorded"})
    yield from some(found)
    if not found:
        if labeler != "recorded":
            ids = sorted(ids, key=lambda id: stable_share(seed, "demonstrate", "order", id))[:wanted]
        draws = [validation_draw(seed, id) for id in ids]
        yield from some(demands.validation_sides(params.sft.validation_share, draws))


def of_rankings(params: Params, supply: Supply) -> Iterator[Misfit]:
    labeler, share = params.rank.labeler, params.rank.held_out_share
    came = {split: len(rows) for split, rows in supply.rankings.items()}
    if labeler == "recorded":
        found = demands.recorded_rankings(came["reward"], came["eval"])
        rows = pd.concat([rows.assign(apart=split == "eval") for split, rows in supply.rankings.items()])
        rows = pd.DataFrame({"id": hexadecimal(rows["id"]), "apart": rows["apart"].to_numpy()}).assign(
            ordered=(rows["pairs"] > rows["tied_pairs"]).to_numpy()
        )
        by_share = not came["eval"]
    else:
        found = demands.prompts_of_split("sample.prompts", params.sample.prompts, "reward", supply.count("reward"))
        ids = supply.prompts["reward"][: params.sample.prompts].tolist()
        if labeler == "simulated":
            known = [id for id in ids if id in supply.tickets]
            found = found or demands.simulated_rankings(len(known), len(ids))
            ids = known
        rows = pd.DataFrame({"id": hexadecimal(ids), "apart": False, "ordered": True})
        by_share = True
    if found and came["reward"]:
        found = found._replace(fit={"rank.labeler": "recorded"})
    if found:
        if supply.count("reward"):  # else the empty split is told
            yield found
        return
    draws = [stable_share(params.seed, "held out", id) for id in rows["id"].unique()] if by_share else []
    if by_share:
        sides = {id: draw < share for id, draw in zip(rows["id"].unique(), draws, strict=True)}
        rows["apart"] = rows["id"].map(sides)
    found = demands.held_out_rankings(labeler, share, rows.drop_duplicates("id")["apart"].tolist(), draws)
    if not found:
        training = rows.loc[rows["ordered"] & ~rows["apart"].astype(bool), "id"]
        taken = sum(stable_share(params.seed, "labels", id) < params.reward.label_share for id in training)
        found = demands.rankings_with_an_order(taken, int((rows["ordered"] & rows["apart"].astype(bool)).sum()))
        fitting = demands.share_with_both_sides(draws)
        if found and share == 0 and fitting is not None:
            found = found._replace(fit={"rank.held_out_share": fitting})
    yield from some(found)


def of_ppo(params: Params, supply: Supply) -> Iterator[Misfit]:
    there = supply.count("ppo")
    lack = demands.lacks_prompts(there, params.ppo.eval_every, params.ppo.eval_prompts)
    if lack and there:  # an empty split is told as such
        few = max(there // 4, min(4, there - 1))  # with fewer than four no policy is shown to be better
        yield Misfit(f"PPO cannot start: {lack}.", {"ppo.eval_prompts": few} if few else {})


def of_files(params: Params, specs: Mapping[str, StageSpec], root: Path) -> Iterator[Misfit]:
    """Files that stages read and no stage writes."""
    for name in params.ppo.rewards:
        yield from some(demands.reward_function(name, specs["ppo"].deps, root))
    for stage, spec in specs.items():
        for path in spec.deps:
            # a workspace that pulls what it needs may not have what DVC keeps
            here = (root / path).exists() or (root / f"{path}.dvc").exists()
            if path.startswith("data/labels/") and not here:
                yield Misfit(missing_labels(path, stage))


def remarks(params: Params, supply: Supply) -> Iterator[str]:
    """What stages put up with, and what people may not expect."""
    best_of, answered = params.baseline.best_of_prompts, params.baseline.prompts
    if best_of > answered:
        yield f"baseline.best_of_prompts is {best_of} and baseline.prompts {answered}: best of n is taken of {answered}"
    each = params.ppo.batch_size // params.ppo.samples_per_prompt
    left = supply.count("ppo") - (params.ppo.eval_prompts if params.ppo.eval_every else 0)
    if 0 < left < each:
        yield (
            f"an update of PPO takes {each} prompts (ppo.batch_size / ppo.samples_per_prompt), and {left} are left to "
            "train on: some come several times in one update"
        )
    if params.judge.endpoint:
        if params.judge.pairs > answered:
            yield f"judge.pairs is {params.judge.pairs} and baseline.prompts {answered}: it compares {answered} answers"
        if params.rank.labeler == "recorded" and len(supply.rankings["eval"]):
            pairs = int((supply.rankings["eval"]["pairs"] - supply.rankings["eval"]["tied_pairs"]).sum())
            asked = min(pairs, params.judge.agreement_pairs)
            if asked < FEWEST_PAIRS:
                yield (
                    f"the rankings of the split eval order {asked} pairs, and a judge is used only where it agrees "
                    f"with labelers on {FEWEST_PAIRS}: give the split eval more rankings"
                )


def validation_draw(seed: int, id: str) -> float:
    """As tasks/sft.py draws them."""
    return int(hashlib.sha256(f"sft validation {seed} {id}".encode()).hexdigest()[:12], 16) / 16**12


def hexadecimal(ids: Iterable[Any]) -> list[str]:
    """As `prompt_id` writes them."""
    return [f"{id:016x}" for id in ids]


def some(found: Misfit | None) -> Iterator[Misfit]:
    if found:
        yield found


def together(found: Iterable[Misfit]) -> dict[str, Any]:
    """The values with which each would fit; of two limits, for two sources, the higher one."""
    values: dict[str, Any] = {}
    for one in found:
        for key, value in one.fit.items():
            values[key] = max(value, values.get(key, value)) if key.startswith(("text.", "prepare.")) else value
    return values


def with_values(params: Params, values: Mapping[str, Any]) -> Params:
    """values: by dotted key."""
    raw = params.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        *sections, last = key.split(".")
        place = raw
        for name in sections:
            place = place[name]
        place[last] = value
    return Params.model_validate(raw)


def message(problems: Iterable[str], later: Iterable[Misfit], values: Mapping[str, Any]) -> str:
    """later: what does not fit either once the first values are there."""

    def bulleted(messages: Iterable[str]) -> str:
        return "\n".join("- " + text.replace("\n", "\n  ") for text in messages)

    text = f"the stages cannot do with this what they must:\n{bulleted(problems)}"
    if more := bulleted(one.message for one in later):
        text += f"\nand, with the values below for these, either:\n{more}"
    if values:
        text += f"\nThese values fit. Put them into params.yaml, in the place of those there:\n\n{as_block(values)}\n"
    return text


def as_block(values: Mapping[str, Any]) -> str:
    """What to put into params.yaml."""
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")
    return "\n".join(f"{section}:\n" + "\n".join(lines) for section, lines in sections.items())
