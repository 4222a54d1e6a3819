"""What a run comes to, in one text: each state of the registry, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.gates import Gate
from tasks.verdict import NOT_REGISTERED, PROMOTED, WAITS, Standing, in_markdown, verdict, with_champion

PASSED = Gate("kl", "at most", 40.0, 9.5)
FAILED = Gate("ended", "at least", 0.9, 0.8)
OPEN = Gate("champion_win_rate_low", "at least", 0.51, None, open="policy/1 answered none of these prompts")
GOLD = {"prompts": 40, "gold": {"prompts": 40}, "win_rate": 0.75, "win_rate_low": 0.7, "win_rate_high": 0.8}


def told(standing: Standing, *judged: Gate, kept: int = 6, stopped: int = 0, **figures: Any) -> dict[str, Any]:
    ppo = {"kept_update": kept, "updates": 8, "stopped_early": stopped}
    return verdict({"ppo": {"ppo": ppo}, "evaluation": GOLD | figures}, judged or [PASSED], standing)


def commands(found: dict[str, Any]) -> list[str]:
    return [row["command"] for row in found["next"]]


def fact(found: dict[str, Any], name: str) -> str:
    (text,) = (row["text"] for row in found["facts"] if row["name"] == name)
    return str(text)


CHAT, PROMOTE = "make chat MODEL=models:/policy/2", 'make promote VERSION=policy/2 REASON="..."'
COMPARE = "make compare A=policy/1 B=policy/2"


def test_promoted_over_a_champion() -> None:
    found = told(Standing("policy/2", PROMOTED, "policy/2", "policy/1"))
    assert found["headline"] == "policy/2 is the champion."
    assert [(row["name"], row["text"]) for row in found["facts"]] == [
        ("PPO kept", "update 6 of 8"),
        ("Win rate over SFT", "75 % [70, 80], by the gold score on 40 prompts"),
        ("Gates", "all 1 passed"),
        ("Champion now", "policy/2, in place of policy/1"),
    ]
    assert commands(found) == [CHAT, COMPARE]
    assert (found["win_rate"], found["win_rate_low"], found["win_rate_high"]) == (0.75, 0.7, 0.8)


def test_promoted_without_a_champion_before() -> None:
    found = told(Standing("policy/2", PROMOTED, "policy/2", ""), stopped=1)
    assert fact(found, "PPO kept") == "update 6 of 8, stopped early"
    assert fact(found, "Champion now") == "policy/2"
    assert commands(found) == [CHAT]


def test_refused_with_and_without_a_champion() -> None:
    for champion, wanted in (("policy/1", [CHAT, COMPARE, PROMOTE]), ("", [CHAT, PROMOTE])):
        found = told(Standing("policy/2", "refused: ended", champion, champion), PASSED, FAILED)
        assert found["headline"] == "policy/2 is refused: it failed ended."
        assert fact(found, "Gates") == "1 of 2 passed; ended: 0.8, at least 0.9 asked: failed by 0.1"
        assert fact(found, "Champion now") == (champion or "none")
        assert commands(found) == wanted, "no champion is offered where there is none"


def test_a_champion_that_cannot_be_compared_waits_for_a_person() -> None:
    found = told(Standing("policy/2", WAITS, "policy/1", "policy/1"), PASSED, OPEN)
    assert "waits for a person to decide: champion_win_rate_low could not be measured" in found["headline"]
    assert "policy/1 answered none of these prompts" in fact(found, "Gates")
    assert (found["gates_passed"], found["gates_failed"], found["gates_open"]) == (1, [], ["champion_win_rate_low"])
    assert commands(found) == [CHAT, COMPARE, PROMOTE]


def test_all_passed_and_approval_is_asked_for() -> None:
    found = told(Standing("policy/2", WAITS, "", ""))
    assert found["headline"].endswith("waits for a person to decide: register.approval is true.")
    assert commands(found) == [CHAT, PROMOTE]


def test_a_person_said_no() -> None:
    found = told(Standing("policy/2", "declined: rude (ann, 2026-11-20)", "policy/1", "policy/1"))
    assert found["headline"] == "policy/2 stays a candidate: declined: rude (ann, 2026-11-20)."


def test_nothing_gained_is_said_first_and_has_no_win_rate() -> None:
    found = told(Standing("policy/2", "refused: ended", "", ""), FAILED, kept=0, win_rate=0.5)
    assert found["headline"].startswith("PPO brought nothing: update 0 of 8 is kept, so the policy is the SFT model. ")
    assert fact(found, "Win rate over SFT") == "none, they are the same model"
    assert "win_rate" not in found
    assert commands(found) == ["make run"]


@pytest.mark.parametrize(
    ("champion", "wanted"),
    [("", ["make chat MODEL=policy"]), ("policy/1", ["make chat MODEL=policy", "make compare A=policy/1"])],
)
def test_a_run_that_registered_nothing(champion: str, wanted: list[str]) -> None:
    found = told(Standing("", NOT_REGISTERED, champion, champion), FAILED)
    assert found["headline"] == "Nothing was registered: register.enabled is false."
    assert commands(found) == wanted


def test_nobody_judged() -> None:
    found = told(Standing("policy/2", "refused: win_rate_low", "", ""), FAILED, win_rate=None)
    assert fact(found, "Win rate over SFT") == "not measured"


def test_the_champion_was_moved_since() -> None:
    waited = told(Standing("policy/2", WAITS, "policy/1", "policy/1"), OPEN)
    assert with_champion(waited, "policy/1") == waited
    promoted = with_champion(waited, "policy/2")
    assert promoted["headline"] == "policy/2 is the champion."
    assert commands(promoted) == [CHAT, COMPARE]
    despite = told(Standing("policy/2", "refused: ended", "policy/1", "policy/1"), FAILED)
    assert with_champion(despite, "policy/2")["headline"] == "policy/2 is the champion, though it failed ended."
    rolled_back = with_champion(told(Standing("policy/2", PROMOTED, "policy/2", "policy/1")), "policy/1")
    assert rolled_back["headline"] == "policy/2 was promoted, and is not the champion any more."
    assert PROMOTE in commands(rolled_back)


def test_in_markdown() -> None:
    text = in_markdown(told(Standing("policy/2", WAITS, "", "")))
    assert text.splitlines()[:3] == [
        "**policy/2 failed no gate and waits for a person to decide: register.approval is true.**",
        "",
        "- **PPO kept**: update 6 of 8",
    ]
    assert text.splitlines()[-1] == f"- **Next**: `{PROMOTE}` make it the champion"
