"""What made a result: the stage runs behind an out, by the hashes that MLflow recorded, and their content by hash.

Each run wrote, by hash, what the next one read. Content comes from DVC's cache and remotes and from git, and is what
the hash says or is not taken at all.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.lineage import StageSpec, load_stages, upstream
from tasks.stage import UserError
from tasks.tracking import experiments, masked, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class Recorded(NamedTuple):
    """One stage run, as MLflow has it."""

    stage: str
    run_id: str
    commit: str
    dirty: bool
    deps: dict[str, str]  # path -> DVC hash, of data; code is in the commit
    outs: dict[str, str]
    params: dict[str, str]
    environment: dict[str, str]


def lineage(
    client: MlflowClient,
    path: str,
    md5: str,
    specs: dict[str, StageSpec],
    store: Store,
    gaps: list[str] | None = None,
) -> list[Recorded]:
    """The stage runs behind an out, from the raw data on: each wrote, by hash, what the next one read.

    gaps: takes what the record lacks behind the out's own run, one line a stage; without it a gap is an error.
    """
    parents = upstream(specs)
    maker = next((spec.name for spec in specs.values() if path in spec.outs), None)
    if maker is None:
        raise UserError(f"no stage of dvc.yaml writes {path}.")
    found: list[Recorded] = []
    wanted: dict[str, dict[str, str]] = {maker: {path: md5}}  # stage -> what it must have written
    for spec in reversed(list(specs.values())):  # a stage comes after all that read from it
        if spec.name not in wanted:
            continue
        try:
            run = made_by(client, spec.name, wanted[spec.name], store)
        except UserError as error:
            if gaps is None or spec.name == maker:
                raise
            gaps.append(str(error))
            continue
        found.insert(0, run)
        for parent in parents[spec.name]:
            read = {dep: md5 for dep, md5 in run.deps.items() if any(inside(dep, out) for out in specs[parent].outs)}
            if read:
                wanted.setdefault(parent, {}).update(read)
    return found


def inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def made_by(client: MlflowClient, stage: str, hashes: dict[str, str], store: Store) -> Recorded:
    """The newest finished run of the stage that wrote all these; a file within an out is looked up in its listing."""
    query = f"tags.`dvc.stage` = '{stage}' and attributes.status = 'FINISHED'"
    runs = client.search_runs(known, query, max_results=1000) if (known := experiments(client)) else []
    for run in runs:
        recorded = recorded_in(run)
        if all(store.hash_within(recorded.outs, path) == md5 for path, md5 in hashes.items()):
            return recorded
    told = ", ".join(f"{path} ({md5})" for path, md5 in hashes.items())
    raise UserError(
        f"MLflow at {masked(tracking_uri())} has no finished run of `{stage}` that wrote {told}. Where MLflow missed "
        "what was logged, `python -m tasks.tracking replay` sends it."
    )


def recorded_in(run: Run) -> Recorded:
    tags: dict[str, str] = run.data.tags

    def under(prefix: str) -> dict[str, str]:
        return {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}

    return Recorded(
        tags["dvc.stage"],
        run.info.run_id,
        tags.get("git.commit", ""),
        tags.get("git.dirty") == "true",
        under("dvc.dep."),
        under("dvc.out."),
        dict(run.data.params),
        under("env."),
    )


class Store:
    """DVC's objects by hash: its cache, then its remotes; small files that DVC does not keep, from git or as they lie
    in the repository's folder, where that is what the hash says."""

    def __init__(self, repository: Path) -> None:
        from tasks.register import dvc_stores

        self.repository = repository
        self.places = dvc_stores(repository)
        self._listings: dict[str, dict[str, str]] = {}

    def hash_within(self, outs: dict[str, str], path: str) -> str:
        """The hash of a path that is one of the outs, or lies within one; else ""."""
        for out, md5 in outs.items():
            if path == out:
                return md5
            if inside(path, out) and md5.endswith(".dir"):
                return self.listing(md5, out).get(path.removeprefix(out + "/"), "")
        return ""

    def listing(self, md5: str, path: str) -> dict[str, str]:
        """{file: hash} of a folder; empty where it cannot be had."""
        from tasks.registered_model import fetch_object

        if md5 not in self._listings:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "listing.json"
                try:
                    fetch_object(md5, path, self.places, file)
                except FileNotFoundError:
                    return {}
                except OSError as error:
                    raise UserError(str(error)) from None
                self._listings[md5] = {
                    entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))
                }
        return self._listings[md5]

    def put_within(self, hashes: dict[str, str], path: str, folder: Path) -> Path:
        """A file that is one of these, or lies within one, put into the folder."""
        md5 = self.hash_within(hashes, path)
        if not md5:
            owner = next(out for out in hashes if inside(path, out))
            raise UserError(f"{path}: {owner} ({hashes[owner]}) is in no store, or does not hold it")
        target = folder / Path(path).name
        self.put(path, md5, target)
        return target

    def put(self, path: str, md5: str, target: Path) -> None:
        """The file or folder with this hash, to a place where nothing is."""
        from tasks.registered_model import fetch, fetch_object

        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if md5.endswith(".dir"):
                target.mkdir()
                fetch(md5, path, self.places, target)
            else:
                fetch_object(md5, path, self.places, target)
        except OSError as error:
            if md5.endswith(".dir") or not (self._from_git(path, md5, target) or self._from_folder(path, md5, target)):
                raise UserError(str(error)) from None

    def _from_git(self, path: str, md5: str, target: Path) -> bool:
        """Reports are in git, on the branch of their run."""
        log = ["git", "log", "--all", "--format=%H", "--", path]
        commits = subprocess.run(log, cwd=self.repository, capture_output=True, encoding="utf-8", check=True)
        for commit in commits.stdout.split():
            shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=self.repository, capture_output=True)  # noqa: PLW1510
            if hashlib.md5(shown.stdout, usedforsecurity=False).hexdigest() == md5:
                target.write_bytes(shown.stdout)
                return True
        return False

    def _from_folder(self, path: str, md5: str, target: Path) -> bool:
        """Labels are appended: what was read then is how the file begins now."""
        file = self.repository / path
        if not file.is_file():
            return False
        content = file.read_bytes()
        begun = hashlib.md5(usedforsecurity=False)
        length = 0
        for line in [b"", *content.splitlines(keepends=True)]:
            begun.update(line)
            length += len(line)
            if begun.hexdigest() == md5:
                target.write_bytes(content[:length])
                return True
        return False


def stages_at(repository: Path, commit: str) -> tuple[dict[str, StageSpec], bool]:
    """(the stages as dvc.yaml had them at the commit, True), or as it has them now, and False where git has no such
    commit."""
    command = ["git", "show", f"{commit}:dvc.yaml"]
    told = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=False)
    if not commit or told.returncode:
        return load_stages(repository), False
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dvc.yaml").write_text(told.stdout, encoding="utf-8")
        return load_stages(Path(folder)), True


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
