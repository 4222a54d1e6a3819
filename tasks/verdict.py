"""The verdict of a run: what PPO kept, whether it is better and who says so, the gates, the champion, what to do next.

The stage `register` makes it once, for it alone knows all of that, and writes it to data/reports/registered.json. The
terminal, report.html, MLflow's note and Prefect's artifact show these same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tasks import gates

PROMOTED = "promoted"
WAITS = "waits for approval"
CHAMPION_NOW = "Champion now"
NOT_REGISTERED = "not registered: register.enabled is false"


class Standing(NamedTuple):
    """What the registry says once `register` has done its work."""

    policy: str  # policy/3; "" where nothing was registered
    outcome: str  # PROMOTED, WAITS, NOT_REGISTERED, `refused: ...`, or what a person said against it
    champion: str  # who it is now, policy/1; "" where there is none
    rival: str  # the champion that it was compared with; "" where there was none


def verdict(
    reports: Mapping[str, Mapping[str, Any]], judged: Sequence[gates.Gate], standing: Standing
) -> dict[str, Any]:
    """reports: the stages' metrics by name. In the result `headline`, `facts` and `next` are for people."""
    ppo = reports["ppo"]["ppo"]
    figures = gates.together(reports.values())
    nothing = gates.nothing_gained(figures)
    won = {} if nothing else gates.judged(figures)
    failed, unmeasured = [gate for gate in judged if gate.failed], [gate for gate in judged if gate.open]
    passed = len(judged) - len(failed) - len(unmeasured)
    told = [f"{passed} of {len(judged)} passed" if failed or unmeasured else f"all {len(judged)} passed"]
    rate = _rate(won) if won else "none, they are the same model" if nothing else "not measured"
    fields: dict[str, Any] = {
        "kept_update": ppo["kept_update"],
        "updates": ppo["updates"],
        "nothing_gained": nothing,
        **{name: won[name] for name in ("win_rate", "win_rate_low", "win_rate_high", "by") if name in won},
        "gates_passed": passed,
        "gates_failed": [gate.name for gate in failed],
        "gates_open": [gate.name for gate in unmeasured],
        **standing._asdict(),
    }
    early = ", stopped early" if ppo["stopped_early"] else ""
    facts = [
        {"name": "PPO kept", "text": f"update {ppo['kept_update']} of {ppo['updates']}{early}"},
        {"name": "Win rate over SFT", "text": rate},
        {"name": "Gates", "text": "; ".join([*told, *map(str, [*failed, *unmeasured])])},
        {"name": CHAMPION_NOW, "text": ""},
    ]
    return with_champion({**fields, "facts": facts}, standing.champion)


def with_champion(told: Mapping[str, Any], champion: str) -> dict[str, Any]:
    """The verdict with who is the champion now: people move it by hand, and DVC does not run `register` for that."""
    standing = Standing(told["policy"], told["outcome"], champion, told["rival"])
    nothing = bool(told["nothing_gained"])
    kept = f"update {told['kept_update']} of {told['updates']}"
    brought = f"PPO brought nothing: {kept} is kept, so the policy is the SFT model. " if nothing else ""
    replaced = f", in place of {standing.rival}" if standing.rival and champion == standing.policy else ""
    return {
        **told,
        "champion": champion,
        "headline": brought + _status(standing, told["gates_failed"], told["gates_open"]),
        "facts": [*told["facts"][:-1], {"name": CHAMPION_NOW, "text": (champion or "none") + replaced}],
        "next": [{"command": command, "what": what} for command, what in _next(standing, nothing)],
    }


def _status(standing: Standing, failed: list[str], unmeasured: list[str]) -> str:
    policy = standing.policy
    if standing.outcome == NOT_REGISTERED:
        return "Nothing was registered: register.enabled is false."
    if policy == standing.champion:
        despite = f", though it failed {', '.join(failed)}" if failed else ""
        return f"{policy} is the champion{despite}."
    if failed:
        return f"{policy} is refused: it failed {', '.join(failed)}."
    if standing.outcome == WAITS:
        why = f"{', '.join(unmeasured)} could not be measured" if unmeasured else "register.approval is true"
        return f"{policy} failed no gate and waits for a person to decide: {why}."
    before = f"{policy} was promoted, and is not the champion any more."
    return before if standing.outcome == PROMOTED else f"{policy} stays a candidate: {standing.outcome}."


def _rate(won: Mapping[str, Any]) -> str:
    """`75 % [70, 80], by the gold score on 128 prompts`"""
    low, high = won["win_rate_low"], won["win_rate_high"]
    bounds = f" [{100 * low:.0f}, {100 * high:.0f}]" if low is not None and high is not None else ""
    return f"{100 * won['win_rate']:.0f} %{bounds}, by {won['by']}"


def _next(standing: Standing, nothing: bool) -> list[tuple[str, str]]:
    """(command, what it does): only what works as things stand."""
    policy, rival = standing.policy, standing.rival
    if nothing:
        more = "after a change in params.yaml: more ppo.updates, a higher ppo.learning_rate, more ppo.eval_prompts"
        return [("make run", more)]
    commands = [(f"make chat MODEL={f'models:/{policy}' if policy else 'policy'}", "talk to it")]
    if policy and rival:
        commands.append((f"make compare A={rival} B={policy}", f"beside {rival}"))
    elif standing.champion and not policy:
        commands.append((f"make compare A={standing.champion}", "the champion beside this run"))
    if policy and policy != standing.champion:
        despite = "" if standing.outcome == WAITS else ", all the same"
        commands.append((f'make promote VERSION={policy} REASON="..."', f"make it the champion{despite}"))
    return commands


def in_markdown(told: Mapping[str, Any]) -> str:
    facts = [f"- **{row['name']}**: {row['text']}" for row in told["facts"]]
    commands = [f"- **Next**: `{row['command']}` {row['what']}" for row in told["next"]]
    return "\n".join([f"**{told['headline']}**", "", *facts, *commands])
