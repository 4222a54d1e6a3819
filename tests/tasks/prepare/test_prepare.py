"""The stage `prepare`, from raw files to splits, its reports, and what it does on bad input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks import prepare
from tasks.conversations import FINGERPRINT_FILE, single
from tasks.datasets import (
    Demonstration,
    Prompt,
    PromptFacts,
    RecordedRanking,
    prompt_id,
    read_figures,
    read_rows,
    stable_share,
)
from tasks.lineage import load_stages
from tasks.params import Params, Splits, load_params
from tasks.prepare import intake, machine, pipeline
from tasks.stage import Stage, UserError
from tasks.tickets import generate
from tasks.tracking import Tracker
from tests.imports import ROOT
from tests.tiny import CHATML

TICKETS = generate(seed=5, count=300)
SPLITS = tuple(Splits.model_fields)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage reads of a model: its tokenizer, to which a word is a token, and how much it takes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    (folder / FINGERPRINT_FILE).write_text("0123456789abcdef\n")
    return folder


# what later stages ask of few data
FEW: dict[str, dict[str, Any]] = {
    "demonstrate": {"prompts": 50},
    "sample": {"prompts": 50},
    "ppo": {"eval_prompts": 8},
    "baseline": {"prompts": 12},
}
RECORDED: dict[str, dict[str, Any]] = {"demonstrate": {"labeler": "recorded"}, "rank": {"labeler": "recorded"}}


class Repository:
    """A folder with raw data, and params.yaml of this repository but for what few data and a test change."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root = root
        for folder in ("data/raw", "data/tickets", "data/models"):
            (root / folder).mkdir(parents=True)
        (root / "data/models/base").symlink_to(base)
        self.sources: list[dict[str, Any]] = []
        self.few = [FEW]
        self.changes: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def write(self, name: str, rows: list[Any]) -> Path:
        path = self.root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
        return path

    def params(self) -> Params:
        raw = load_params(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
        raw["data"] = {"sources": self.sources}
        for changes in (*self.few, self.changes):
            for section, values in changes.items():
                raw[section] |= values
        return Params.model_validate(raw)

    def stage(self) -> Stage:
        return Stage(load_stages()["prepare"], self.params(), Tracker.in_memory(self.events), root=self.root)

    def run(self) -> dict[str, Any]:
        """Returns the metrics."""
        stage = self.stage()
        try:
            prepare.run(stage)
        except BaseException:
            stage.discard()
            raise
        stage.commit()
        metrics: dict[str, Any] = read_figures(
            (self.root / "data/reports/prepare/metrics.json").read_text(encoding="utf-8")
        )
        return metrics["prepare"]  # type: ignore[no-any-return]

    def prompts(self) -> dict[str, list[str]]:
        """Ids by split."""
        return {name: [row.id for row in self.rows(f"prompts/{name}.jsonl", Prompt)] for name in SPLITS}

    def rows(self, path: str, row_type: Any) -> list[Any]:
        file = self.root / "data/prepared" / path
        return read_rows(file, row_type) if file.stat().st_size else []

    def dropped(self) -> list[dict[str, Any]]:
        lines = (self.root / "data/reports/prepare/dropped.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def bytes(self) -> dict[str, bytes]:
        """All that the stage wrote."""
        folders = (self.root / "data/prepared", self.root / "data/reports")
        return {str(file): file.read_bytes() for folder in folders for file in sorted(folder.rglob("*.*"))}


@pytest.fixture
def repository(tmp_path: Path, base: Path) -> Repository:
    return Repository(tmp_path, base)


@pytest.fixture
def tickets(repository: Repository) -> Repository:
    repository.write("tickets/tickets.jsonl", [row.model_dump() for row in TICKETS])
    repository.sources = [{"kind": "prompts", "path": "data/tickets"}]
    return repository


def sentence(number: int, words: int = 8) -> str:
    """Unlike any other."""
    return " ".join(f"w{number}x{place}" for place in range(words))


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": sentence(number), "chosen": f"good {number}", "rejected": f"bad {number}", **more}


@pytest.fixture
def own(repository: Repository) -> Repository:
    """A team's demonstrations and rankings."""
    repository.few.append(RECORDED)
    shown = [{"instruction": sentence(number), "input": "", "output": f"done {number}"} for number in range(200)]
    repository.write("raw/shown.jsonl", shown)
    repository.write("raw/pairs.jsonl.gz", [pair(number) for number in range(1000, 1300)])
    repository.sources = [
        {"kind": "demonstrations", "path": "data/raw/shown.jsonl", "licence": "ours"},
        {"kind": "rankings", "path": "data/raw/pairs.jsonl.gz", "labeler": "ann"}
        | {"splits": {"reward": 6, "ppo": 3, "eval": 1}},
    ]
    return repository


def test_the_default_data_stay_as_they_were(tickets: Repository) -> None:
    """Ids, splits and their order are what they were before prepare took anything else."""
    shares = tickets.params().prepare.splits
    wanted: dict[str, list[str]] = {name: [] for name in SPLITS}
    ends = (shares.sft, shares.sft + shares.reward, shares.sft + shares.reward + shares.ppo, 2.0)
    for row in TICKETS:
        id = prompt_id(single(row.prompt))
        draw = stable_share(1, "split", id)
        wanted[next(name for name, end in zip(SPLITS, ends, strict=True) if draw < end)].append(id)
    metrics = tickets.run()
    assert tickets.prompts() == wanted
    assert {name: metrics[name] for name in SPLITS} == {name: len(ids) for name, ids in wanted.items()}
    assert (metrics["prompts"], metrics["duplicates"], metrics["failed_checks"]) == (300, 0, 0)
    facts = tickets.rows("facts.jsonl", PromptFacts)
    assert [(row.source, row.ticket) for row in facts] == [("tickets", row.ticket) for row in TICKETS]
    assert tickets.dropped() == []
    assert (tickets.root / "data/prepared" / FINGERPRINT_FILE).read_text() == "0123456789abcdef\n"


def test_demonstrations_and_rankings(own: Repository) -> None:
    own.run()
    shown = {split: own.rows(f"demonstrations/{split}.jsonl", Demonstration) for split in ("sft", "eval")}
    assert sum(map(len, shown.values())) == 200
    assert len(shown["sft"]) == pytest.approx(180, abs=17)  # all but eval's 0.1, to 4 standard errors
    first = shown["sft"][0]
    number = int(first.prompt[0]["content"].split("x")[0][1:])
    assert first == Demonstration(
        id=prompt_id(single(sentence(number))),
        prompt=single(sentence(number)),
        response=f"done {number}",
        labeler="shown",
    )
    rankings = own.rows("rankings/reward.jsonl", RecordedRanking)
    number = int(rankings[0].responses[0].split()[1])
    assert rankings[0].model_dump(exclude={"id", "prompt"}) == {
        "responses": [f"good {number}", f"bad {number}"],
        "ranks": [1, 2],
        "labeler": "ann",
    }
    prompts = own.prompts()
    assert {row.id for row in rankings} == set(prompts["reward"])
    assert {row.id for row in shown["sft"]} == set(prompts["sft"])
    assert sum(map(len, prompts.values())) == 500
    assert all(row.ticket is None for row in own.rows("facts.jsonl", PromptFacts))


def test_every_row_is_in_a_split_or_set_aside_with_a_reason(own: Repository) -> None:
    rows: list[Any] = [*(pair(number) for number in range(1000, 1300)), pair(1000)]
    rows += ['{"prompt": "torn', json.dumps({"prompt": "x", "chosen": True, "rejected": "b"})]
    rows += [pair(2000, chosen="word " * 70), pair(2001, prompt="word " * 70)]
    own.write("raw/pairs.jsonl.gz", rows)
    metrics = own.run()
    dropped = own.dropped()
    assert Counter(row["reason"] for row in dropped) == Counter(
        ["duplicate", "not JSON", "wrong type", "prompt too long", "response too long"]
    )
    torn = next(row for row in dropped if row["reason"] == "not JSON")
    assert (torn["file"], torn["row"], torn["content"]) == ("data/raw/pairs.jsonl.gz", 302, '{"prompt": "torn')
    wrong = next(row for row in dropped if row["reason"] == "wrong type")
    assert (wrong["field"], wrong["row"]) == ("chosen", 303)
    assert metrics["prompts"] == 500
    assert metrics["duplicates"] == 1


@pytest.fixture
def sixty(repository: Repository) -> Repository:
    """A person's own 60 demonstrations, half of them long, and 60 pairs; params.yaml as it comes."""
    repository.few = []
    shown = [{"prompt": sentence(n), "response": "word " * (20 if n % 2 else 99)} for n in range(60)]
    repository.write("raw/shown.jsonl", shown)
    repository.write("raw/pairs.jsonl", [pair(number) for number in range(1000, 1060)])
    repository.sources = [
        {"kind": "demonstrations", "path": "data/raw/shown.jsonl"},
        {"kind": "rankings", "path": "data/raw/pairs.jsonl"},
    ]
    return repository


def test_all_that_does_not_fit_is_told_at_once_and_what_would(sixty: Repository) -> None:
    with pytest.raises(UserError) as error:
        sixty.run()
    assert not (sixty.root / "data/prepared").exists()
    said, block = str(error.value).split("\n\n", 1)
    for key in ("damaged_limit", "split `ppo` is empty", "demonstrate.prompts", "sample.prompts", "baseline.prompts"):
        assert key in said
    values = YAML(typ="safe").load(block)
    eval_prompts = values["baseline"]["prompts"]
    assert values == {
        "text": {"max_response_tokens": 104},
        "prepare": {"share_prompts": True},
        "demonstrate": {"labeler": "recorded"},
        "rank": {"labeler": "recorded"},
        "baseline": {"prompts": eval_prompts},
    }
    sixty.changes = values
    metrics = sixty.run()
    assert (metrics["eval"], metrics["ppo"]) == (eval_prompts, metrics["reward"]), "of all 60 demonstrations"
    prompts = sixty.prompts()
    assert set(prompts["ppo"]) == set(prompts["reward"])
    assert len(set(prompts["sft"] + prompts["ppo"] + prompts["eval"])) == 120
    assert "share_prompts" in (sixty.root / "data/reports/prepare/card.md").read_text()


def test_nothing_about_the_machine_is_written(own: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    own.run()
    written = own.bytes()
    monkeypatch.setattr(machine, "unwritable", lambda *_: ["/locked"])
    with pytest.raises(UserError, match="- /locked cannot be written to"):
        own.run()
    monkeypatch.undo()
    rooms = [machine.Room(own.root, free=10, least=5, likely=20)]
    monkeypatch.setattr(machine, "rooms", lambda *_: rooms)
    own.run()
    assert own.bytes() == written


def test_labels_that_no_stage_will_use(own: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = own.run()
    lost = len(own.prompts()["ppo"])
    assert metrics["unused_rankings"] == lost == pytest.approx(90, abs=32)  # 4 standard errors
    shown = {split: own.rows(f"demonstrations/{split}.jsonl", Demonstration) for split in ("sft", "eval")}
    assert metrics["unused_demonstrations"] == len(shown["eval"])
    assert f"warning: {lost} of 300 rankings are not used" in capsys.readouterr().out
    own.changes = {"demonstrate": {"labeler": "human"}}
    assert own.run()["unused_demonstrations"] == 200


def test_the_same_file_as_prompts(own: Repository) -> None:
    """Its prompts are ranked: PPO gets them by the switch alone."""
    del own.sources[1]["splits"]
    own.sources.append({"kind": "prompts", "path": "data/raw/pairs.jsonl.gz", "name": "again"})
    with pytest.raises(UserError, match="`ppo` is empty"):
        own.run()
    own.changes = {"prepare": {"share_prompts": True}}
    assert own.run()["failed_checks"] == 0
    prompts = own.prompts()
    assert set(prompts["ppo"]) == set(prompts["reward"])
    assert not set(prompts["ppo"]) & set(prompts["eval"])


@pytest.mark.parametrize(("name", "place"), [("a.json", "row 4"), ("a.jsonl", "line 4"), ("b.json", "line 4")])
def test_rows_of_an_array_are_rows(own: Repository, name: str, place: str) -> None:
    rows: list[Any] = [pair(number) for number in range(1000, 1012)]
    rows[3] = {"prompt": 1, "chosen": "a", "rejected": "b"}
    own.write(f"raw/{name}", [json.dumps(rows)] if name == "a.json" else rows)
    own.sources[1] |= {"path": f"data/raw/{name}"}
    with pytest.raises(UserError, match=rf"first data/raw/{name}, {place}: "):
        own.run()


def test_all_sources_that_cannot_be_read_are_told(own: Repository) -> None:
    own.sources[0]["path"] = "data/raw/other.jsonl"
    own.sources[1]["format"] = "pears"
    with pytest.raises(UserError, match=r"(?s)sources, other: .*is missing.*sources, pairs: .*pears"):
        own.run()


def test_too_many_damaged_rows_are_an_error(own: Repository) -> None:
    own.write("raw/pairs.jsonl.gz", [*(pair(number) for number in range(1000, 1100)), *['{"prompt": 1'] * 6])
    with pytest.raises(UserError, match=r"(?s)6 of the 106 rows of pairs.*damaged_limit = 5%.*not JSON.*line 101"):
        own.run()
    assert not (own.root / "data/prepared").exists()
    own.changes = {"prepare": {"damaged_limit": 0.06}}
    own.run()


def test_a_changed_file_alone_is_read_again(own: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    own.sources[1]["path"] = "data/raw/pairs"
    own.write("raw/pairs/a.jsonl", [pair(number) for number in range(1000, 1300)])
    own.run()
    before = own.prompts()
    read: list[str] = []
    write_tables = intake.write_tables

    def noted(*arguments: Any) -> Any:
        read.append(arguments[2].name)
        return write_tables(*arguments)

    monkeypatch.setattr(pipeline, "write_tables", noted)
    own.run()
    assert read == [], "nothing has changed"
    own.write("raw/pairs/b.jsonl", [pair(number) for number in range(1300, 1400)])
    own.run()
    assert len(read) == 1
    after = own.prompts()
    assert all(set(before[name]) <= set(after[name]) for name in SPLITS), "no old row has moved"
    assert sum(map(len, after.values())) == 600
    assert len(list((own.root / ".rlhf/prepare").iterdir())) == 3, "one folder a file, and nothing old"


def test_the_same_bytes_by_another_way(own: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the kept tables, in chunks of another size, and by several processes."""
    own.changes = {"prepare": {"damaged_limit": 0.5}}
    rows = [*(pair(number) for number in range(1000, 1300)), *(pair(number) for number in range(1000, 1050)), "{"]
    own.write("raw/pairs.jsonl.gz", rows)
    own.run()
    written = own.bytes()
    own.run()
    assert own.bytes() == written
    monkeypatch.setattr(intake, "CHUNK_ROWS", 7)
    monkeypatch.setattr(intake, "POOL_BYTES", 0)
    monkeypatch.setattr(intake, "cores", lambda: 2)
    for tables in (own.root / ".rlhf/prepare").iterdir():
        tables.rename(own.root / tables.name)
    own.run()
    assert own.bytes() == written


def test_order_of_sources_and_files_decides_nothing(own: Repository) -> None:
    own.sources.append({"kind": "prompts", "path": "data/raw/more"})
    own.write("raw/more/a.jsonl", [{"prompt": sentence(number)} for number in range(150, 250)])
    own.write("raw/more/b.jsonl", [{"prompt": sentence(number)} for number in range(3000, 3100)])
    own.run()
    before = {name: set(ids) for name, ids in own.prompts().items()}
    own.sources.reverse()
    own.write("raw/more/b.jsonl", [{"prompt": sentence(number)} for number in range(150, 250)])
    own.write("raw/more/a.jsonl", [{"prompt": sentence(number)} for number in reversed(range(3000, 3100))])
    own.run()
    assert {name: set(ids) for name, ids in own.prompts().items()} == before


def test_weights(own: Repository) -> None:
    own.sources[0] |= {"weight": 2}
    own.sources[1] |= {"weight": 0.5}
    own.run()
    shown = Counter(row.id for row in own.rows("demonstrations/sft.jsonl", Demonstration))
    assert set(shown.values()) == {2}
    drawn = sum(reason["reason"] == "not drawn" for reason in own.dropped())
    assert drawn == pytest.approx(150, abs=35)  # 4 standard errors


def test_shares_of_a_source(own: Repository) -> None:
    own.sources[0]["splits"] = {"sft": 1}
    own.run()
    prompts = own.prompts()
    assert len(prompts["sft"]) == 200
    assert len(prompts["reward"]) == pytest.approx(180, abs=34)  # 4 standard errors


def test_a_conversation_goes_through_whole(own: Repository) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello there my friend"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "how are you today"},
    ]
    row = {"prompt": turns, "chosen": "well", "rejected": "no"}
    own.write("raw/pairs.jsonl.gz", [*(pair(number) for number in range(1000, 1300)), row])
    own.sources[1]["splits"] = {"reward": 90, "ppo": 5, "eval": 5}
    own.run()
    found = [one for name in SPLITS for one in own.rows(f"prompts/{name}.jsonl", Prompt) if len(one.prompt) > 1]
    assert [one.prompt for one in found] == [turns]


def test_personal_data(own: Repository) -> None:
    row = pair(1, prompt=f"{sentence(7)} write to ann.lee@example.com")
    torn = json.dumps(row)[:-1]
    own.write("raw/pairs.jsonl.gz", [*(pair(number) for number in range(1000, 1300)), row, torn])
    own.changes = {"prepare": {"mask": ["email"]}}
    own.run()
    assert not any(b"ann.lee@" in content for content in own.bytes().values())
    assert any(b"[EMAIL]" in content for content in own.bytes().values())
    assert (
        "[EMAIL]" in (own.root / "data/reports/prepare/card.md").read_text()
        or "email" in (own.root / "data/reports/prepare/card.md").read_text()
    )


def test_what_masking_makes_equal_is_no_ranking(own: Repository) -> None:
    row = pair(901, chosen="write to ann@example.com", rejected="write to bo@example.com", annotator="ann@example.com")
    other = pair(902, annotator="ann@example.com")
    own.write("raw/pairs.jsonl.gz", [*(pair(number) for number in range(1000, 1300)), row, other])
    own.changes = {"prepare": {"mask": ["email"]}}
    own.run()
    assert [one["reason"] for one in own.dropped()] == ["same when masked"]
    assert not any(b"@example" in content for content in own.bytes().values())


def test_the_first_prompts_are_of_all_sources(own: Repository) -> None:
    """Stages that need fewer prompts than there are take the first of a split."""
    own.sources.append({"kind": "prompts", "path": "data/raw/more.jsonl"})
    own.write("raw/more.jsonl", [{"prompt": sentence(number)} for number in range(3000, 3300)])
    own.run()
    facts = {row.id: row.source for row in own.rows("facts.jsonl", PromptFacts)}
    ids = own.prompts()["ppo"]
    first = Counter(facts[id] for id in ids[: len(ids) // 2])
    whole = Counter(facts[id] for id in ids)
    assert all(first[name] == pytest.approx(whole[name] / 2, abs=2 * whole[name] ** 0.5) for name in whole)
    own.write("raw/a.jsonl", [{"prompt": sentence(number)} for number in range(4000, 4020)])
    own.sources.insert(0, {"kind": "prompts", "path": "data/raw/a.jsonl"})
    own.run()
    old = [id for id in own.prompts()["ppo"] if id in facts]
    assert old == ids, "rows that come later leave the order of those before"


def test_prompts_that_get_labels_stay_out_of_training_if_they_were_in_eval(own: Repository) -> None:
    own.sources.append({"kind": "prompts", "path": "data/raw/more.jsonl"})
    own.write("raw/more.jsonl", [{"prompt": sentence(number)} for number in range(3000, 3400)])
    own.run()
    before = own.prompts()
    own.sources.append({"kind": "rankings", "path": "data/raw/later.jsonl"})
    own.write("raw/later.jsonl", [pair(number) for number in range(3000, 3200)])
    own.run()
    after = own.prompts()
    assert set(before["eval"]) <= set(after["eval"])
    assert not set(after["eval"]) & {id for name in ("sft", "reward", "ppo") for id in before[name]}


def test_which_ticket_a_prompt_has_does_not_depend_on_the_order_of_files(tickets: Repository) -> None:
    other = [TICKETS[0].ticket, TICKETS[1].ticket]
    rows = [{"prompt": TICKETS[5].prompt, "ticket": ticket.model_dump()} for ticket in other]
    found = []
    for first, second in (rows, rows[::-1]):
        tickets.write("tickets/a.jsonl", [first])
        tickets.write("tickets/b.jsonl", [second])
        tickets.run()
        facts = {row.id: row.ticket for row in tickets.rows("facts.jsonl", PromptFacts)}
        found.append(facts[prompt_id(single(TICKETS[5].prompt))])
    assert found[0] == found[1]


def test_a_file_of_another_ending_is_read_as_such(own: Repository) -> None:
    rows = [pair(number) for number in range(1000, 1300)]
    (own.root / "data/raw/own.json").write_text(json.dumps(rows, indent=1))
    own.sources[1]["path"] = "data/raw/own.json"
    own.run()
    (own.root / "data/raw/own.json").rename(own.root / "data/raw/own.jsonl")
    own.sources[1]["path"] = "data/raw/own.jsonl"
    with pytest.raises(UserError, match="rows of own cannot be taken"):
        own.run()


def test_torn_tables_and_a_torn_archive_leave_nothing_behind(own: Repository) -> None:
    own.run()
    written = own.bytes()
    for tables in (own.root / ".rlhf/prepare").iterdir():
        (tables / "examples.parquet").write_bytes(b"")
    own.run()
    assert own.bytes() == written
    path = own.root / "data/raw/pairs.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    for _ in range(2):
        with pytest.raises(UserError, match=r"pairs\.jsonl\.gz"):
            own.run()
    assert not list((own.root / ".rlhf/prepare").glob(".tmp-*"))


def test_dry_run_shows_and_writes_nothing(own: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    other = pair(1001, chosen="bad 1001", rejected="good 1001")  # a contradiction: the card shows both
    own.write("raw/pairs.jsonl.gz", [*(pair(number) for number in range(1000, 1300)), pair(1000), other, "{"])
    before = snapshot(own.root)
    prepare.dry_run(own.stage())
    assert snapshot(own.root) == before
    told = capsys.readouterr().out
    for word in ("pairs", "shown", "duplicate", "not JSON", "nothing was written"):
        assert word in told


def test_dry_run_as_a_command(own: Repository) -> None:
    raw = own.params().model_dump(mode="json", by_alias=True)
    (own.root / "params.yaml").write_text(json.dumps(raw))
    (own.root / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    (own.root / "tasks").symlink_to(ROOT / "tasks")
    shutil.copytree(ROOT / "data/labels", own.root / "data/labels")
    before = snapshot(own.root)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tasks.run", "prepare", "--dry-run"]
    done = subprocess.run(command, cwd=own.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing was written" in done.stdout
    assert snapshot(own.root) == before
    done = subprocess.run(
        [*command[:-2], "tickets", "--dry-run"], cwd=own.root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "it has no --dry-run" in done.stderr


def snapshot(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"kind": "prompts"}, "either `path` or `hub`"),
        ({"kind": "prompts", "path": "data/raw/a", "hub": "a/b"}, "either `path` or `hub`"),
        ({"kind": "prompts", "path": "/etc/passwd"}, "must lie under data/raw"),
        ({"kind": "prompts", "path": "data/raw/../models"}, "must lie under data/raw"),
        ({"kind": "prompts", "hub": "a/b", "split": "train", "revision": "main"}, "40-digit commit"),
        ({"kind": "prompts", "hub": "a/b", "revision": "a" * 40}, "needs `split`"),
        ({"kind": "prompts", "path": "data/raw/a", "split": "train"}, "split: for a `hub` source only"),
    ],
)
def test_a_wrong_source(repository: Repository, source: Mapping[str, Any], told: str) -> None:
    repository.sources = [dict(source)]
    with pytest.raises(ValueError, match=told):
        repository.params()


def test_a_wrong_format(own: Repository) -> None:
    own.sources[0]["format"] = "alpacca"
    with pytest.raises(UserError, match=r"data\.sources, shown: `format: alpacca` is none of .*alpaca"):
        own.run()


def test_a_source_of_which_nothing_is_left(own: Repository) -> None:
    own.sources.append({"kind": "prompts", "path": "data/raw/pairs.jsonl.gz", "name": "again"})
    assert own.run()["failed_checks"] == 1
    assert "of again nothing is left" in (own.root / "data/reports/prepare/card.md").read_text()


def test_a_file_that_is_not_there(own: Repository) -> None:
    own.sources[0]["path"] = "data/raw/other.jsonl"
    with pytest.raises(UserError, match=r"data/raw/other\.jsonl"):
        own.run()


def test_a_source_with_nothing_to_take(own: Repository) -> None:
    own.write("raw/shown.jsonl", [{"question": 1}])
    with pytest.raises(UserError, match=r"1 of the 1 rows of shown cannot be taken"):
        own.run()


def test_two_sources_of_one_name(own: Repository) -> None:
    own.sources[1] = {"kind": "demonstrations", "path": "data/raw/shown.jsonl"}
    with pytest.raises(UserError, match="two sources of demonstrations are called shown"):
        own.run()


def test_a_limit_beyond_the_model(own: Repository) -> None:
    own.changes = {"text": {"max_prompt_tokens": 8100}}
    with pytest.raises(UserError, match="is 8196 tokens, and the model takes 8192"):
        own.run()


def test_an_empty_split(own: Repository) -> None:
    del own.sources[1]["splits"]
    with pytest.raises(UserError, match="the split `ppo` is empty"):
        own.run()


def test_a_template_that_all_prompts_begin_with(own: Repository) -> None:
    template = "You are a helpful assistant of a shop that sells lamps. Read the question, think, and answer it in one "
    template = 2 * template
    rows = [pair(number, prompt=template + sentence(number)) for number in range(1000, 1300)]
    own.write("raw/pairs.jsonl.gz", rows)
    with pytest.raises(UserError, match=r"300 of 500 rows begin with the same 200 characters.*common_prefix"):
        own.run()
    own.changes = {"prepare": {"common_prefix": len(template) + 20, "near_duplicate": None}}
    own.run()


ALL = {"reward": 0.5, "ppo": 0.3, "eval": 0.2}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the layout of the hub's cache, with a split in two files, and no network."""
    from datasets import config
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    folder = cache / f"datasets--tiny--pairs/snapshots/{COMMIT}"
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        rows = [pair(5000 + 100 * part + number, note=None) for number in range(100)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"data/train-{part}.jsonl").write_text(lines)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.jsonl\n---\n"
    )
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")  # not in the home of whoever tests
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_data_set_of_the_hub(own: Repository, hub: Path) -> None:
    own.sources[1] = {"kind": "rankings", "hub": "tiny/pairs", "revision": COMMIT, "split": "train", "splits": ALL}
    own.run()
    facts = Counter(row.source for row in own.rows("facts.jsonl", PromptFacts))
    assert facts == {"shown": 200, "tiny/pairs": 200}
    assert COMMIT[:8] in (own.root / "data/reports/prepare/card.md").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [({"revision": "f" * 40}, "cannot be fetched"), ({"split": "test"}, "tiny/pairs at 01234567: .*test")],
)
def test_a_data_set_that_is_not_there(own: Repository, hub: Path, change: dict[str, str], told: str) -> None:
    own.sources[1] = {
        "kind": "rankings",
        "hub": "tiny/pairs",
        "revision": COMMIT,
        "split": "train",
        "splits": ALL,
    } | change
    with pytest.raises(UserError, match=told):
        own.run()


def test_mlflow_is_told_what_was_read(own: Repository) -> None:
    own.run()
    kinds = {event["kind"] for event in own.events}
    assert {"metrics", "datasets", "artifact", "table"} <= kinds
    (datasets,) = [event["datasets"] for event in own.events if event["kind"] == "datasets"]
    assert set(datasets) == {"data/raw/shown.jsonl", "data/raw/pairs.jsonl.gz"}


def test_contradictions_are_told(own: Repository) -> None:
    rows = [pair(number) for number in range(1000, 1300)]
    own.write("raw/pairs.jsonl.gz", [*rows, pair(1000, chosen="bad 1000", rejected="good 1000")])
    assert own.run()["contradictions"] == 1
    card = (own.root / "data/reports/prepare/card.md").read_text()
    row = next(line for line in card.splitlines() if "good 1000" in line)
    assert all(part in row for part in (sentence(1000), "bad 1000"))
