"""The champion: which registered versions are in use. Moved by gates (tasks/register.py) or by a person:

    python -m tasks.registry list
    python -m tasks.registry promote policy/3 --reason "reads better, 20 samples looked at"
    python -m tasks.registry rollback --reason "too long in production"

A policy's version names the SFT and the reward version that it came with; the three move together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tasks.stage import UserError
from tasks.tracking import account, connect, masked, mlflow_told, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
CANDIDATE = "candidate"  # the version of the newest run
COMPANIONS = ("sft", "reward")  # of a policy
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes: no model, no version, no such alias
KEPT_UPDATE = "evaluation.overoptimisation.kept_update"  # a tag of a version
LISTED = 8  # versions in a message
TAKEN_BACK = ("rolled_back", "declined")  # by a person: the gates alone do not promote such a version


def champion(client: MlflowClient) -> ModelVersion | None:
    """The policy version that is the champion now."""
    return with_alias(client, CHAMPION)


def with_alias(client: MlflowClient, alias: str, model: str = "policy") -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ABSENT:
            return None
        raise


def promote(client: MlflowClient, number: str, *, author: str, reason: str) -> None:
    """Make a policy version the champion, with its companions. Tags say who, why, when, and which it replaced."""
    before = champion(client)
    if before is not None and str(before.version) == number:
        return
    version = find(client, number)
    for key in version.tags:
        if key.partition(".")[0] in TAKEN_BACK:
            client.delete_model_version_tag("policy", number, key)
    set_tags(client, number, CHAMPION, author, reason, replaced=str(before.version) if before else "")
    move(client, version)


def decline(client: MlflowClient, number: str, *, author: str, reason: str) -> None:
    """It stays a candidate, though it passed its gates."""
    set_tags(client, number, "declined", author, reason)


def taken_back(version: ModelVersion) -> str:
    """`rolled back: too long (ann, 2026-11-20)`, or "" where nobody said no to it."""
    for kind in TAKEN_BACK:
        if f"{kind}.time" in version.tags:
            author, reason, time = (version.tags[f"{kind}.{key}"] for key in ("author", "reason", "time"))
            return f"{kind.replace('_', ' ')}: {reason} ({author}, {time[:10]})"
    return ""


def rollback(client: MlflowClient, *, author: str, reason: str) -> str:
    """Give its place back to the version that the champion replaced, which is returned."""
    current = champion(client)
    if current is None:
        raise UserError("there is no champion to roll back from.")
    before: str | None = current.tags.get(f"{CHAMPION}.replaced")
    if not before:
        raise UserError(f"policy/{current.version} replaced no other version: there is none to go back to.")
    target = find(client, before)
    set_tags(client, str(current.version), "rolled_back", author, reason)
    move(client, target)
    return before


def move(client: MlflowClient, version: ModelVersion) -> None:
    companions = {name: version.tags.get(f"with.{name}") for name in COMPANIONS}
    for name, companion in companions.items():
        if companion:
            client.set_registered_model_alias(name, CHAMPION, companion)
    client.set_registered_model_alias("policy", CHAMPION, str(version.version))  # last: it is what others look at


def find(client: MlflowClient, number: str, model: str = "policy") -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(model, number)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        raise UserError(
            f"MLflow at {masked(tracking_uri())} has no {model}/{number}; {_there_are(client, model)}"
        ) from None


def known(client: MlflowClient, model: str = "policy") -> dict[str, str]:
    """Its versions with their aliases, newest first: {"policy/3": "candidate, champion", "policy/2": ""}."""
    if not client.search_registered_models(f"name = '{model}'"):
        return {}
    aliases = dict(client.get_registered_model(model).aliases)
    numbers = sorted((int(found.version) for found in client.search_model_versions(f"name = '{model}'")), reverse=True)
    return {
        f"{model}/{number}": ", ".join(sorted(alias for alias, at in aliases.items() if int(at) == number))
        for number in numbers
    }


def _there_are(client: MlflowClient, model: str) -> str:
    """The end of a message that a version does not exist."""
    named = [f"{name} ({aliases})" if aliases else name for name, aliases in known(client, model).items()]
    more = f" and {len(named) - LISTED} older ones" if len(named) > LISTED else ""
    return f"there are {', '.join(named[:LISTED])}{more}." if named else f"{_told(model)} has no version yet."


def set_tags(client: MlflowClient, number: str, kind: str, author: str, reason: str, **more: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for key, value in {"author": author, "reason": reason, "time": now, **more}.items():
        client.set_model_version_tag("policy", number, f"{kind}.{key}", value)


def parse_version(text: str) -> tuple[str, str]:
    """`policy/3`, `models:/sft@candidate` or `3` -> (model, the number or the alias after an @); alone, a number is of
    the policy."""
    name, _, number = text.removeprefix("models:/").replace("@", "/@").rpartition("/")
    if name not in ("", "policy", *COMPANIONS) or not (number.isdigit() or number.startswith("@")):
        raise UserError(f"`{text}` is no version of a model; write it as policy/3 or policy@candidate.")
    return name or "policy", number


def resolve(client: MlflowClient, text: str, models: tuple[str, ...] = ("policy",)) -> ModelVersion:
    """The version that `policy/3` or `policy@candidate` names. models: those that serve here."""
    name, number = parse_version(text)
    if name not in models:
        raise UserError(f"`{text}` is no version of the policy; write it as policy/3 or policy@candidate.")
    if not number.startswith("@"):
        return find(client, number, name)
    if (found := with_alias(client, number[1:], name)) is None:
        raise UserError(f"no version of {_told(name)} has the alias `{number[1:]}`; {_there_are(client, name)}")
    return found


def _told(model: str) -> str:
    return {"policy": "the policy", "sft": "the SFT model", "reward": "the reward model"}[model]


def versions(client: MlflowClient) -> list[ModelVersion]:
    """All of the policy, newest first."""
    found = client.search_model_versions("name = 'policy'")
    return sorted(found, key=lambda version: -int(version.version))


def table(client: MlflowClient) -> Table:
    shown = Table(title=f"policy in {masked(tracking_uri())}", title_justify="left")
    for column in (
        "version",
        "alias",
        "gates",
        "win rate",
        "gold gain",
        "by score",
        "KL",
        "made from",
        "champion because",
    ):
        shown.add_column(column, overflow="fold")
    aliases = known(client)
    if not aliases:
        raise UserError("nothing is registered yet: `make run` does it at its end.")
    for version in versions(client):
        tags = version.tags
        shown.add_row(
            f"policy/{version.version}",
            aliases.get(f"policy/{version.version}", ""),
            through_gates(version),
            "is the SFT model" if tags.get(KEPT_UPDATE) == "0" else tags.get("evaluation.win_rate", ""),
            *(tags.get(f"evaluation.{name}", "") for name in ("gold.gain", "score_win_rate", "kl")),
            tags.get("git.commit", "")[:8],
            taken_back(version) or promoted(version),
        )
    return shown


def through_gates(version: ModelVersion) -> str:
    """`failed: kl; not measured: reward_hacking`, or `passed`."""
    tags = version.tags
    told = {"failed": tags.get("gates.failed"), "not measured": tags.get("gates.open")}
    missed = "; ".join(f"{kind}: {names}" for kind, names in told.items() if names)
    return missed or ("passed" if tags.get("gates.passed") == "true" else "")


def promoted(version: ModelVersion) -> str:
    """Why it became the champion, and by whom; "" where it never did."""
    tags = version.tags
    if f"{CHAMPION}.time" not in tags:
        return ""
    return f"{tags[f'{CHAMPION}.reason']} ({tags[f'{CHAMPION}.author']}, {tags[f'{CHAMPION}.time'][:10]})"


def whoami() -> str:
    """As git knows the person, else the account."""
    done = subprocess.run(["git", "config", "user.name"], capture_output=True, encoding="utf-8", check=False)
    return done.stdout.strip() or account()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.registry", description="Which registered versions are in use."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the versions of the policy, their gates and figures")
    by_hand = argparse.ArgumentParser(add_help=False)
    by_hand.add_argument("--reason", required=True, help="why; it becomes a tag of the version")
    by_hand.add_argument("--author", default=None, help="who; default: git's user.name")
    command = commands.add_parser("promote", parents=[by_hand], help="make a version the champion")
    command.add_argument("version", help="policy/3, or policy@candidate")
    commands.add_parser("rollback", parents=[by_hand], help="back to the version that the champion replaced")
    arguments = parser.parse_args(argv)
    try:
        with mlflow_told():
            client = connect()
            if arguments.command == "list":
                Console(width=None if sys.stdout.isatty() else 160).print(table(client))
                return 0
            if not arguments.reason.strip():
                raise UserError("--reason is empty; say why.")
            by = {"author": arguments.author or whoami(), "reason": arguments.reason.strip()}
            before = champion(client)
            was = f"policy/{before.version}" if before else "none"
            if arguments.command == "promote":
                version = resolve(client, arguments.version)
                if before is not None and before.version == version.version:
                    print(f"policy/{version.version} is the champion already; nothing was recorded.")
                    return 0
                if failed := version.tags.get("gates.failed"):
                    print(f"note: policy/{version.version} failed gates: {failed}", file=sys.stderr)
                promote(client, str(version.version), **by)
                number = str(version.version)
            else:
                number = rollback(client, **by)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"champion: policy/{number} (before: {was})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
