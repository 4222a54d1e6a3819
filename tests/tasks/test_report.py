"""The page of a run: what is marked, shown and drawn. tests/pipeline/test_end_to_end.py looks at a whole one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tasks import figures
from tasks.datasets import SideBySide
from tasks.gates import Gate
from tasks.report import changes, committed, draw, gate_of, marked, number, render, spread
from tests.tiny import shell, tiny_repo


def answered(sft: str, policy: str, gain: float = 0.0) -> SideBySide:
    scores = {"gold.sft": 0.5, "gold.policy": 0.5 + gain, "score.sft": 0.0, "score.policy": 0.0}
    return SideBySide(prompt="p", base="", sft=sft, policy=policy, scores=scores)


def test_what_differs_is_marked_and_text_stays_text() -> None:
    found = marked(answered("We are <b>very</b> sorry, Ann.", "We are sorry & late, Ann."))
    assert found["sft"] == "We are <del>&lt;b&gt;very&lt;/b&gt; sorry, </del>Ann."
    assert found["policy"] == "We are <ins>sorry &amp; late, </ins>Ann."


def test_equal_answers_have_no_marks() -> None:
    assert marked(answered("the same", "the same")) | {"row": None} == {
        "row": None,
        "sft": "the same",
        "policy": "the same",
    }


def test_samples_range_from_the_greatest_loss_to_the_greatest_win() -> None:
    gains = [((place * 37) % 100) / 100 - 0.5 for place in range(100)]
    shown = [row.scores["gold.policy"] - 0.5 for row in spread([answered("a", "b", gain) for gain in gains])]
    assert len(shown) == 20
    assert shown == sorted(shown)
    assert [shown[0], shown[-1]] == pytest.approx([-0.5, 0.49])
    assert len(spread([answered("a", "b")] * 3)) == 3


def test_without_gold_on_every_prompt_they_range_by_score() -> None:
    rows = [answered("a", "b", gain) for gain in (0.5, -0.5)]
    rows[0].scores.pop("gold.policy")
    rows[0].scores["score.policy"] = -1.0
    assert [row.scores["score.policy"] for row in spread(rows)] == [-1.0, 0.0]


def test_only_what_changed_is_told() -> None:
    before = {"parameters": {"seed": "1", "ppo.kl_coef": "0.02"}, "figures": {"kl": 9.0, "gold.gain": 0.2}}
    now = {
        "parameters": {"seed": "1", "ppo.kl_coef": "0.05"},
        "figures": {"kl": 7.0, "gold.gain": 0.2, "win_rate": 0.8},
    }
    assert changes(now, before) == {
        "parameters": [("ppo.kl_coef", "0.02", "0.05")],
        "figures": [("kl", 9.0, 7.0), ("win_rate", None, 0.8)],
    }
    assert changes(now, {}) == {}


def test_the_report_before_is_that_of_the_last_commit(tmp_path: Path) -> None:
    repo = tiny_repo(tmp_path / "repo")
    assert committed(repo) == {}
    page = repo / "data/reports/report.html"
    page.parent.mkdir(parents=True)
    page.write_text('<p>x</p><script type="application/json" id="facts">{"figures": {"kl": 2.5}}</script>')
    shell(repo, "git", "add", "--all")
    shell(repo, "git", "commit", "--quiet", "--message", "Run")
    page.write_text("another one")
    assert committed(repo) == {"figures": {"kl": 2.5}}


def test_numbers() -> None:
    assert [number(value) for value in (None, 0.12345, 0.24, 35.0, 123.4, 3, "a")] == [
        "–",
        "0.123",
        "0.240",
        "35.0",
        "123",
        "3",
        "a",
    ]


CURVE: list[dict[str, Any]] = [
    {
        "source": source,
        "point": str(point),
        "root_kl": str(point / 4),
        **{name + end: str(point / 10) for name in ("score_gain", "gold_gain") for end in ("", "_low", "_high")},
    }
    for source in ("ppo", "best of n")
    for point in (1, 2, 4, 8, 16)
]


def test_curves_go_by_number_and_not_by_name() -> None:
    """From a CSV file all is text, and as text 16 stands before 2."""
    figure = figures.over_optimisation(CURVE[::-1], kept=8)
    for axis in figure.axes:
        data: list[Any] = [line.get_xdata() for line in axis.get_lines()]
        lines = [list(x) for x in data if len(x) == 5]
        assert lines
        assert all(line == sorted(line) for line in lines)


def test_without_gold_the_curves_have_one_panel() -> None:
    """From a CSV file of a run of which some prompts have it: a cell that a row lacks is empty."""
    without = [{key: value for key, value in row.items() if "gold" not in key} for row in CURVE]
    assert [axis.get_ylabel() for axis in figures.over_optimisation(without, 8).axes] == ["gain in reward-model score"]
    mixed = [row | ({"gold_gain": ""} if row["source"] == "ppo" else {}) for row in CURVE]
    assert len(figures.over_optimisation(mixed, 8).axes) == 2


def section(**more: float) -> dict[str, float]:
    figures = dict.fromkeys(("base", "sft", "policy", "gain"), 0.25) | more
    return figures | {name + end: 0.25 for name in ("base", "sft", "policy", "gain") for end in ("_low", "_high")}


SHARES = {"win": 0.75, "tie": 0.0, "loss": 0.25, "win_rate": 0.75, "win_rate_low": 0.7, "win_rate_high": 0.8}
ANSWERS = {"sft": 0.5, "base": 0.5, "policy": 0.5}


def page(
    *,
    gold: int,
    judge: bool = False,
    rank: Any = None,
    demonstrate: Any = None,
    more_of_reward: Any = None,
    nothing_gained: bool = False,
) -> str:
    """Of a run on four prompts. gold: how many of them have a ticket. rank, demonstrate: figures of people's work."""
    evaluation: dict[str, Any] = {
        "prompts": 4,
        **{"kl": 9.0, "kl_low": 8.0, "kl_high": 10.0},
        **{name: section() for name in ("score", "fluency")},
        **dict.fromkeys(("length", "ended", "relevance", "repetition"), ANSWERS),
        "versus": {"sft": {"score": SHARES}},
        **({"gold": section(prompts=gold)} if gold else {}),
    }
    by = "the gold score" if gold else "the reward model"
    reward = {"held_out_pairs": 10, "accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9}
    rows = [answered("a", "b") for _ in range(4)]
    for row in rows[gold:]:
        row.scores.pop("gold.sft")
        row.scores.pop("gold.policy")
    verdicts = {"sft": {"pairs": 0}} if judge else {}
    told = {
        "headline": "policy/2 is <refused>.",
        "facts": [{"name": "Win rate over SFT", "text": f"75 %, by {by} on {gold or 4} prompts"}],
        "next": [{"command": "make chat MODEL=models:/policy/2", "what": "talk to it"}],
        "nothing_gained": nothing_gained,
    }
    return render(
        reports={
            "judge": {
                "judge": {
                    **{"asked": 40 if judge else 0, "unreadable": 0, "noise_ceiling": None, "used": int(judge)},
                    **{"agreement": 0.9, "labelled_pairs": 20, "versus": verdicts},
                }
            },
            "reward": {
                "reward": reward
                | {"noise_ceiling": None, "calibration_error": 0.1, "held_out_labelers_accuracy": None}
                | (more_of_reward or {})
            },
            **{name: {name: {"rows": 4}} for name in ("prepare", "sample")},
            "demonstrate": {"demonstrate": demonstrate or {"count": 4, "people": {}}},
            "rank": {"rank": rank or {"rankings": 4, "people": {}}},
        },
        labels="4 demonstrations, all simulated",
        evaluation=evaluation,
        verdict=told,
        figures=dict.fromkeys(
            ("slices", "overoptimisation", "ppo", "accuracy", "reliability", "probes", "scores"), "drawn"
        ),
        gates=[
            Gate("win_rate_low", "at most", 0.2, 0.1, by=by),
            Gate("reward_hacking", "at most", 0.2, None, open="nobody could"),
            Gate("kl", "at most", 0.2, 0.5),
        ],
        samples=[marked(row) for row in rows],
        judge_of_samples="gold" if gold == 4 else "score",
        made=[("policy", "data/models/policy", "0" * 32)],
        changes={},
        facts={"parameters": dict.fromkeys(("base.model", "seed", "ppo.updates", "ppo.kl_coef"), "1"), "figures": {}},
    )


def test_the_page_without_with_and_with_some_gold_scores() -> None:
    without, some, full = page(gold=0), page(gold=3), page(gold=4)
    lack = "There is no gold score: these prompts have no ticket."
    part = "What goes by the gold score is over the 3 prompts that have a ticket."
    assert [[text in one for text in (lack, part)] for one in (without, some, full)] == [
        [True, False],
        [False, True],
        [False, False],
    ]
    assert "<td>gold score</td>" not in without
    assert "<td>gold score</td>" in full
    assert "by the reward model on 4 prompts" in without
    assert "SFT: score 0.00" in without
    assert "SFT: gold 0.50, score 0.00" in full
    assert "not measured: nobody could. A person decides." in without
    assert "passed, by the gold score" in full
    assert "failed by 0.300" in full
    for one in (without, some, full):
        assert "nan" not in one.lower()
        assert "labelers' noise is not known" in one


def test_the_verdict_stands_on_top_and_a_model_is_not_compared_with_itself() -> None:
    gained, nothing = (page(gold=4, nothing_gained=nothing) for nothing in (False, True))
    for one in (gained, nothing):
        top = one.partition("<table>")[0]
        assert "policy/2 is &lt;refused&gt;." in top
        assert one.index("policy/2 is") < one.index("make chat MODEL=models:/policy/2") < one.index("<h2>")
    assert ["<td>SFT</td>" in one for one in (gained, nothing)] == [True, False]
    assert ["The policy gains" in one for one in (gained, nothing)] == [True, False]


def test_gates_are_those_that_register_wrote_down() -> None:
    by = {"value": 0.6, "at_least": 0.55, "passed": True, "by": "the judge"}
    assert gate_of("win_rate_low", by) == Gate("win_rate_low", "at least", 0.55, 0.6, by="the judge")
    open_ = {"value": None, "at_most": 0.2, "passed": False, "open": "nobody could"}
    assert gate_of("reward_hacking", open_) == Gate("reward_hacking", "at most", 0.2, None, open="nobody could")


PEOPLE: dict[str, Any] = {
    **{"items": 20, "judgments": 30, "labelers": 3, "shared_items": 10},
    **{"agreement": 0.7, "agreement_low": 0.6, "agreement_high": 0.8, "alpha": 0.45, "alpha_ratings": None},
    **{"missing_judgments": 2, "other_judgments": 7, "left_out_judgments": 5, "replaced_judgments": 1},
    "set_aside_items": 3,
}


def by_labeler(rows: dict[str, Any]) -> dict[str, Any]:
    return {"by_labeler": rows, "skip_reasons": {}}


def test_the_people_behind_a_run() -> None:
    shares = {"agreement": 0.5, "agreement_low": 0.4, "agreement_high": 0.6, "among_others": 0.9, "tied_share": 0.25}
    eve = {"rankings": 15, "far": True, "flagged_share": 0.0, "skips": 1, "median_seconds": 4.0, **shares}
    few = {"rankings": 0, "far": False, "tied_share": None, "flagged_share": None, "skips": 2, "median_seconds": None}
    bo = {"demonstrations": 9, "median_words": 30.0, "skips": 4, "median_seconds": 80.0}
    theirs = {"accuracy": 0.66, "accuracy_low": 0.66, "accuracy_high": 0.66, "pairs": 44}
    said = page(
        gold=4,
        rank=PEOPLE | {"people": by_labeler({"eve <b>": eve, "fox": few})},
        demonstrate=PEOPLE | {"too_long": 6, "people": by_labeler({"bo": bo})},
        more_of_reward={f"held_out_labelers_{name}": value for name, value in theirs.items()},
    )
    text = " ".join(re.sub(r"<[^>]+>", " ", said).split())
    assert "4 demonstrations, all simulated." in text
    assert "30 rankings by 3 people, 10 of 20 items by several of them." in text
    assert "Two people order 70 % [60, 80] of the pairs alike; InstructGPT's labelers did 72.6" in text
    assert "alpha of the pairs is 0.450, of the ratings –." in text
    assert "Not used: 7 of samples that are not there any more, 5 of people who are left out, 1 that the same" in text
    assert "eve &lt;b&gt; far from the rest 15 50 % [40, 60] 90 % 25 % 0 % 1 4.00" in text
    assert "fox 0 too few shared items – – 2 –" in text
    assert "30 demonstrations by 3 people, 6 of them too long to be used. 2 more are wanted." in text
    assert "bo 9 30.0 4 80.0" in text
    assert "of 44 pairs that labelers ranked from whom it learned nothing, 66 % [66, 66] (InstructGPT: 69.6" in text
    assert "by_labeler" not in text


def test_without_people_and_with_too_few_of_them() -> None:
    assert "Two people order" not in page(gold=4)
    assert "from whom it learned nothing" not in page(gold=4)
    few = PEOPLE | {"agreement": None, "people": by_labeler({})}
    assert "Too few items were ranked by several people to say how far they agree." in page(gold=4, rank=few)


def test_a_judge_without_a_noise_ceiling() -> None:
    said = " ".join(page(gold=0, judge=True).split())
    assert "agrees with the labelers in 0.900 of 20 held-out pairs , and gave 0 of 40" in said


def test_the_slices_are_drawn_by_what_all_prompts_have() -> None:
    reward = {"reward slices": "slice,prompts,accuracy", "reward probes": "probe,change"}
    bars = {name: row_of(header) for name, header in reward.items()}
    tables = {
        **bars,
        "overoptimisation": CURVE,
        "slices": row_of("slice,prompts,score_gain"),
        "reward reliability": row_of("pairs,confidence,accuracy"),
        "reward scores": [{"source": "samples", "score": "0.5"}],
        "ppo": row_of("update,score,kl,entropy,response_length"),
    }
    rows = [answered("a", "b")]
    rows[0].scores.pop("gold.policy")
    assert "gain of the policy over SFT, reward-model score" in draw(tables, rows, 8)["slices"]


def row_of(header: str) -> list[dict[str, str]]:
    return [{name + end: "1" for name in header.split(",") for end in ("", "_low", "_high")}]


def test_the_same_tables_give_the_same_bytes() -> None:
    """In two processes: names within an SVG file must not be drawn anew."""
    code = (
        "from tests.tasks.test_report import CURVE, figures; import hashlib;"
        "print(hashlib.sha256(figures.svg(figures.over_optimisation(CURVE, 8)).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    said = {shell(root, "python", "-c", code) for _ in range(2)}
    assert len(said) == 1
    assert "<dc:date>" not in figures.svg(figures.bars([{"x": "a", "y": 1, "y_low": 0, "y_high": 2}], "x", "y", "z"))
