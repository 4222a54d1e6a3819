"""Labelers rank the outputs best to worst, with ties; votes of the arena join them. `python -m tasks.run rank`.

The noise ceiling in the report is how often a scorer that knows the labelers' mean opinion without noise agrees with
their noisy rankings: the most that a reward model can be asked for. The labelers' agreement is how often two of them
order a pair alike, each prompt being ranked a second time by another for this figure alone (InstructGPT, section 3.4:
73 %). With `rank.labeler: recorded` the rankings are those that came with the raw data. Held out are those of the split
eval, for `prepare` keeps near-duplicates and one user's prompts within a split: drawn by prompt from the split reward,
many would have a copy among those that are trained on. Nobody knows their ceiling, and agreement is measured where
labelers happened to rank the same responses. All figures but `votes` leave the votes out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations, permutations
from typing import Any, NamedTuple

from tasks.conversations import text_of
from tasks.datasets import (
    PromptFacts,
    Ranking,
    RecordedRanking,
    Samples,
    Ticket,
    Vote,
    read_rows,
    stable_share,
    write_figures,
    write_rows,
)
from tasks.demands import held_out_rankings, recorded_rankings, require, simulated_rankings
from tasks.labels.agreement import Agreement, measure, nobody, page, pair_marks
from tasks.labels.checks import run_checks
from tasks.labels.judgments import SIMULATED, JudgedRanking, item_id
from tasks.labels.people import ask_people, rankings_of, tell_not_used
from tasks.labels.queue import Item, Queue, close_queue, labels_wanted, with_origin
from tasks.labels.simulated import choose_labeler, generator, opinion, rank
from tasks.params import Labeler, Params
from tasks.stage import Stage, UserError

Figures = dict[str, float | None]  # of the labelers; None where it cannot be known
Side = Callable[[str], bool]  # of a prompt, by its id: whether all rankings of it are held out


class Collected(NamedTuple):
    rankings: list[Ranking]  # to train on, and by prompt held out
    figures: Figures
    held_out: Side
    apart: Sequence[Ranking]  # of held-out labelers
    agreed: Agreement | None  # people on the page


def run(stage: Stage) -> None:
    params = stage.params
    ways = {"simulated": by_simulated_labelers, "human": by_people, "recorded": recorded}
    if params.rank.labeler != "human":
        close_queue("rank", stage.root)
    rankings, figures, held_out, apart, agreed = ways[params.rank.labeler](stage)
    sides = {row.id: row.held_out for row in rankings}
    draws = [held_out_draw(id, params.seed) for id in sides]
    require(held_out_rankings(params.rank.labeler, params.rank.held_out_share, sides.values(), draws))
    # in a new repository nobody has voted
    votes = read_rows(stage.dep("data/labels/arena.jsonl"), Vote, may_be_empty=True)
    if params.rank.labeler == "human":  # the same people may have voted
        people = params.rank.human
        votes = [vote for vote in votes if vote.labeler not in people.leave_out]
        apart = [*apart, *(ranking_of(vote, held_out) for vote in votes if vote.labeler in people.held_out_labelers)]
        votes = [vote for vote in votes if vote.labeler not in people.held_out_labelers]
    taken = [ranking_of(vote, held_out) for vote in votes]
    folder = stage.out("data/collected/rankings")
    write_rows(folder / "rankings.jsonl", [*rankings, *taken])
    write_rows(folder / "held_out_labelers.jsonl", apart)

    metrics = {
        "prompts": len(sides),
        "held_out_prompts": sum(sides.values()),
        "rankings": len(rankings),
        "pairs": sum(len(row.ranks) * (len(row.ranks) - 1) // 2 for row in rankings),
        "ties": sum(a == b for row in rankings for a, b in combinations(row.ranks, 2)),
        "votes": len(votes),
        "held_out_labelers_rankings": len(apart),
        **figures,
    }
    write_figures(
        stage.out("data/reports/rank/metrics.json"),
        {"rank": metrics | {"people": told_of_people(agreed)}},
        ["rank.rankings", "rank.noise_ceiling"],
    )
    text = page(agreed, figures) if agreed else nobody(params.rank.labeler)
    stage.out("data/reports/rank/agreement.md").write_text(text, encoding="utf-8")
    stage.tracker.metrics({f"rank/{name}": float(value) for name, value in metrics.items() if value is not None})
    if agreed:
        stage.tracker.tags({"labelers.far": ", ".join(row["labeler"] for row in agreed.labelers if row["far"])})
        stage.tracker.table("labelers", agreed.labelers)
        stage.tracker.table("pairs of labelers", agreed.pairs)
    stage.tracker.table(
        "rankings",
        [
            {"prompt": text_of(row.prompt), "labeler": row.labeler, "rank": place, "response": response}
            for row in rankings[:10]
            for place, response in sorted(zip(row.ranks, row.responses, strict=True))
        ],
    )


def by_people(stage: Stage) -> Collected:
    """The samples as people ranked them, and as simulated labelers fill in."""
    params = stage.params
    samples = read_rows(stage.dep("data/collected/samples") / "samples.jsonl", Samples)
    judged = read_rows(stage.dep("data/labels/rankings.jsonl"), JudgedRanking, may_be_empty=True)
    queue = queue_of(samples, params)
    joined = ask_people(with_origin(queue, stage), judged, params.rank.human, stage.root)
    tell_unused_recorded(stage)
    held_out = by_share(params)
    rankings, apart = rankings_of(joined, params.rank.human, held_out)
    filled_in: list[Ranking] = []
    without_ticket = 0
    if params.rank.human.fill_in:
        lacking = {one.item for one in joined.unlabelled}
        tickets = tickets_of(stage)
        known = [row for row in samples if item_of(row) in lacking and row.id in tickets]
        without_ticket = len(lacking) - len(known)
        filled_in = [
            row.model_copy(update={"labeler": f"{SIMULATED}{row.labeler}"})
            for row in simulated(known, marks_of(known, tickets), params)
        ]
        print(
            f"rank: simulated labelers fill in for people on {len(filled_in)} of {len(samples)} prompts"
            + (f"; {without_ticket} more have no ranking and no ticket to rank by" if without_ticket else "")
        )
    if not rankings and not filled_in:
        raise UserError(
            f"there is no ranking to train on. Of {len(samples)} prompts people ranked the outputs of none "
            f"({joined.counts['skipped']} skips), held-out labelers aside ({len(apart)} rankings), and simulated "
            "labelers can rank answers to support tickets alone. Have people rank more (`make label`; raise "
            "rank.human.set_aside_after in params.yaml where what they skipped should be handed out again)."
        )
    agreed = measure(joined, params.seed)
    figures = {
        **NOTHING_KNOWN,
        "labelers_agreement": agreed.figures["agreement"],
        "without_ticket": without_ticket,
        "by_people": len(rankings),
        "by_simulated": len(filled_in),
        **joined.counts,
        **{name: value for name, value in agreed.figures.items() if name != "rankings"},  # those are `judgments` here
    }
    return Collected([*rankings, *filled_in], figures, held_out, apart, agreed)


def told_of_people(agreed: Agreement | None) -> dict[str, Any]:
    if agreed is None:
        return {}
    rows = {
        row["labeler"]: {name: value for name, value in row.items() if name != "labeler"} for row in agreed.labelers
    }
    return {"by_labeler": rows, "flags": agreed.flags, "skip_reasons": agreed.skip_reasons}


def queue_of(samples: Sequence[Samples], params: Params) -> Queue:
    """What people are asked to rank."""
    human = params.rank.human
    return Queue(
        job="rank",
        seed=params.seed,
        max_tokens=None,
        leave_out=human.leave_out,
        set_aside_after=human.set_aside_after,
        items=[
            Item(
                item=(item := item_of(row)),
                prompt=row.prompt,
                responses=row.responses,
                ended=row.ended,
                labels=labels_wanted(item, human, params.seed),
            )
            for row in samples
        ],
    )


def item_of(row: Samples) -> str:
    return item_id(row.prompt, row.responses, row.ended)


def recorded(stage: Stage) -> Collected:
    """All rankings that came with the raw data, of the splits reward and eval; each response counts as complete."""
    training, apart = (
        read_rows(stage.dep(f"data/prepared/rankings/{split}.jsonl"), RecordedRanking, may_be_empty=True)
        for split in ("reward", "eval")
    )
    require(recorded_rankings(len(training), len(apart)))
    held_out: Side = {row.id for row in apart}.__contains__
    if not apart:
        held_out = by_share(stage.params)
        print(
            "rank: the split eval has no rankings, so rank.held_out_share of the prompts of the split reward are "
            "held out; near-duplicates of them and other prompts of the same users may be trained on"
        )
    rankings = [
        Ranking(**row.model_dump(), ended=[True] * len(row.responses), held_out=held_out(row.id))
        for row in (*training, *apart)
    ]
    tell_unused_judgments(stage)
    figures = NOTHING_KNOWN | {"labelers_agreement": agreement_among(rankings)}
    return Collected(rankings, figures, held_out, [], None)


def by_simulated_labelers(stage: Stage) -> Collected:
    """The samples as simulated labelers rank them."""
    params = stage.params
    samples = read_rows(stage.dep("data/collected/samples") / "samples.jsonl", Samples)
    tickets = tickets_of(stage)
    known = [row for row in samples if row.id in tickets]
    require(simulated_rankings(len(known), len(samples)))
    marks = marks_of(known, tickets)
    rankings = simulated(known, marks, params)
    opinions = {row.id: mean_utilities(row, marks[row.id], params.labelers) for row in known}
    tell_unused_recorded(stage)
    tell_unused_judgments(stage)
    figures = {
        "labelers_agreement": agreement(rankings, second_opinions(known, marks, params.labelers, params.seed))
        if len(params.labelers) > 1
        else None,
        "noise_ceiling": agreement([row for row in rankings if row.held_out], opinions),
        "noise_ceiling_train": agreement([row for row in rankings if not row.held_out], opinions),
        "without_ticket": len(samples) - len(known),
        "by_people": 0,
        "by_simulated": len(rankings),
    }
    return Collected(rankings, figures, by_share(params), [], None)


NOTHING_KNOWN: Figures = {
    "labelers_agreement": None,
    "noise_ceiling": None,
    "noise_ceiling_train": None,
    "without_ticket": 0,
    "by_people": 0,
    "by_simulated": 0,
}
Marks = list[dict[str, float]]  # of each response of one prompt, by check


def simulated(samples: Sequence[Samples], marks: Mapping[str, Marks], params: Params) -> list[Ranking]:
    """marks: by the prompt's id."""
    return [
        rank_samples(row, marks[row.id], params.labelers, params.seed, params.rank.held_out_share) for row in samples
    ]


def marks_of(samples: Sequence[Samples], tickets: Mapping[str, Ticket]) -> dict[str, Marks]:
    return {row.id: [run_checks(response, tickets[row.id]) for response in row.responses] for row in samples}


def tickets_of(stage: Stage) -> dict[str, Ticket]:
    """By the prompt's id."""
    facts = read_rows(stage.dep("data/prepared/facts.jsonl"), PromptFacts)
    return {row.id: row.ticket for row in facts if row.ticket}


def tell_unused_recorded(stage: Stage) -> None:
    rows = read_rows(stage.dep("data/prepared/rankings/reward.jsonl"), RecordedRanking, may_be_empty=True)
    tell_not_used(len(rows), "rankings came with the data and", "rank", stage.params.rank.labeler)


def tell_unused_judgments(stage: Stage) -> None:
    rows = read_rows(stage.dep("data/labels/rankings.jsonl"), JudgedRanking, may_be_empty=True)
    tell_not_used(len(rows), "lines of data/labels/rankings.jsonl", "rank", stage.params.rank.labeler)


def rank_samples(row: Samples, marks: Marks, labelers: Sequence[Labeler], seed: int, held_out_share: float) -> Ranking:
    """One prompt's outputs as one labeler ranks them."""
    labeler = choose_labeler(labelers, seed, "rank", row.id)
    return Ranking(
        **row.model_dump(),
        ranks=ranked(row, marks, labeler, seed),
        labeler=labeler.id,
        held_out=is_held_out(row.id, seed, held_out_share),
    )


def ranked(row: Samples, marks: Marks, labeler: Labeler, seed: int) -> list[int]:
    utilities = [opinion(mark, labeler, ended=ended) for mark, ended in zip(marks, row.ended, strict=True)]
    return rank(utilities, labeler, generator(seed, "rank", row.id, labeler))


def ranking_of(vote: Vote, held_out: Side) -> Ranking:
    """The vote without what only the arena knows; all rankings of one prompt are on one side."""
    fields = vote.model_dump(include=set(Ranking.model_fields))
    return Ranking(**fields | {"held_out": held_out(vote.id)})


def by_share(params: Params) -> Side:
    return partial(is_held_out, seed=params.seed, share=params.rank.held_out_share)


def is_held_out(prompt: str, seed: int, share: float) -> bool:
    """prompt: its id."""
    return held_out_draw(prompt, seed) < share


def held_out_draw(prompt: str, seed: int) -> float:
    """prompt: its id."""
    return stable_share(seed, "held out", prompt)


def second_opinions(
    samples: Sequence[Samples], marks: Mapping[str, Marks], labelers: Sequence[Labeler], seed: int
) -> dict[str, list[float]]:
    """Each prompt as another labeler ranks it, by its id: the better, the higher."""
    found = {}
    for row in samples:
        others = [labeler for labeler in labelers if labeler != choose_labeler(labelers, seed, "rank", row.id)]
        ranking = ranked(row, marks[row.id], choose_labeler(others, seed, "second opinion", row.id), seed)
        found[row.id] = [-float(place) for place in ranking]
    return found


def mean_utilities(row: Samples, marks: Marks, labelers: Sequence[Labeler]) -> list[float]:
    """What all labelers think of each response on average, without noise."""
    return [
        sum(opinion(mark, labeler, ended=ended) for labeler in labelers) / len(labelers)
        for mark, ended in zip(marks, row.ended, strict=True)
    ]


def agreement(rankings: Sequence[Ranking], scores: Mapping[str, Sequence[float]]) -> float | None:
    """The share of the pairs ranked without a tie that the scores order alike; equal scores count half.

    scores: by prompt id, one score a response. None where there is no such pair.
    """
    return mean([mark for row in rankings for mark in pair_marks(row.ranks, scores[row.id])])


def agreement_among(rankings: Sequence[Ranking]) -> float | None:
    """The same where several labelers ranked the same responses to a prompt: the ranks of each as scores for each
    other. None where nobody did."""
    groups: dict[tuple[str, frozenset[str]], list[Ranking]] = defaultdict(list)
    for row in rankings:
        groups[row.id, frozenset(row.responses)].append(row)
    marks = []
    for group in groups.values():
        for one, other in permutations(group, 2):
            if one.labeler != other.labeler:
                ranks = dict(zip(other.responses, other.ranks, strict=True))
                marks += pair_marks(one.ranks, [-float(ranks[response]) for response in one.responses])
    return mean(marks)


def mean(marks: Sequence[float]) -> float | None:
    return round(sum(marks) / len(marks), 4) if marks else None
