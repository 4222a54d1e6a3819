"""The way of the data: files -> checked rows -> what is kept, and in which split -> JSON Lines for the stages.

Texts go from file to file in batches; in memory are hashes, counts and the prompts' MinHash signatures alone.
"""

from __future__ import annotations

import json
import math
import mmap
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError
from numpy.typing import NDArray
from rich.console import Console
from tqdm import tqdm

from tasks.conversations import FINGERPRINT_FILE, text_of
from tasks.datasets import stable_share, write_figures
from tasks.demands import Misfit
from tasks.lineage import load_stages
from tasks.params import Kind, Params, Source, SplitName, Splits, Text
from tasks.prepare import card, machine, outlook
from tasks.prepare.formats import check_format
from tasks.prepare.hub import rows_of_hub
from tasks.prepare.intake import Raw, Settings, Tables, file_digest, key_of_file, worker_pool, write_tables
from tasks.prepare.selection import Blend, Prompts, contradictions, leaks, select
from tasks.prepare.sources import files_of, rows_of, unit_of
from tasks.stage import Stage, UserError

TEMPLATE_TOKENS = 32  # room for the chat template around prompt and response
TABLES = Path(".rlhf/prepare")  # git-ignored
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
ADVICE = (
    "Mend them, choose another `kind`, `format` or other `columns` (README, Sources), or raise prepare.damaged_limit, "
    "text.max_prompt_tokens or text.max_response_tokens in params.yaml (longer texts take more time and memory)."
)
SHOWN = 5  # prompts of a split in MLflow
DAMAGED = ["source", "file", "row", "reason", "field", "message"]
TOKENS = ["prompt_tokens", "response_tokens"]
ROUNDS = 5  # of looking for values that fit, each with those of the one before
QUICKLY_READ = 16 * 2**20  # bytes of raw data that are read again for it
# the splits where labels are of use; a source's rows go there alone if it does not say otherwise
LABELS: dict[Kind, tuple[SplitName, ...]] = {"demonstrations": ("sft", "eval"), "rankings": ("reward", "eval")}


class File(NamedTuple):
    """A file of a source, or its data set of the hub."""

    source: str  # its name
    settings: Settings
    name: str
    digest: str  # MD5; of a data set of the hub the commit
    size: int  # bytes; of a data set of the hub 0
    rows: Callable[[], Iterator[Raw]]
    unit: Callable[[], str]  # what its rows are counted in: "line" or "row"

    def place(self, row: int) -> str:
        return f"{self.name}, {self.unit()} {row}"


class Examined(NamedTuple):
    """All that is known of the raw data before anything is written."""

    sources: dict[str, Source]
    files: list[tuple[File, Tables]]
    examples: pd.DataFrame  # in the files' order; each has a `split`, or the reason why it was `dropped`
    damaged: pd.DataFrame  # rows that could not be taken
    rows: Counter[str]  # in the files of each source
    masked: dict[str, Counter[str]]  # by source
    contradictions: pd.DataFrame
    leaks: pd.DataFrame


def prepare(stage: Stage) -> None:
    params = stage.params
    model = stage.dep("data/models/base")
    stage.dep("data/raw"), stage.dep("data/tickets")
    seen = examine(params, model, stage.root, stage.root / TABLES)
    order = order_of(seen.examples, seen.sources, params.seed)
    look_ahead(seen, params, model, stage.root)
    remove_other_tables(stage.root / TABLES, [tables for _, tables in seen.files])

    out = stage.out("data/prepared")
    dropped = stage.out("data/reports/prepare/dropped.jsonl")
    shown = write_prepared(seen, out, dropped, order, params.prepare.share_prompts)
    shutil.copy(model / FINGERPRINT_FILE, out / FINGERPRINT_FILE)

    found = findings(seen, params, model)
    figures = card.figures(found)
    write_figures(stage.out("data/reports/prepare/metrics.json"), {"prepare": figures}, ["prepare.prompts"])
    hexadecimal = {name: [f"{id:016x}" for id in seen.leaks[name]] for name in ("id_a", "id_b")}
    seen.leaks.assign(**hexadecimal).to_csv(
        stage.out("data/reports/prepare/leaks.csv"), index=False, lineterminator="\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        card.write_card(Path(scratch), found)
        for file in sorted(Path(scratch).iterdir()):
            stage.tracker.artifact(file)
            shutil.copy(file, stage.out(f"data/reports/prepare/{file.name}"))
    stage.tracker.metrics({f"prepare/{name}": float(value) for name, value in figures.items()})
    stage.tracker.datasets({file.name: file.digest for file, _ in seen.files})
    stage.tracker.table("prompts", shown)
    told(found)


def show(stage: Stage) -> None:
    """What `prepare` would take and drop. The tables of the files go to a temporary folder."""
    params, model = stage.params, stage.root / "data/models/base"
    if not model.exists():
        raise UserError(
            "data/models/base is missing, whose tokenizer measures the texts: run `make run STAGES=base`, once."
        )
    with tempfile.TemporaryDirectory() as scratch:
        seen = examine(params, model, stage.root, Path(scratch))
        told(findings(seen, params, model))
        look_ahead(seen, params, model, stage.root)
    print("nothing was written")


def told(found: card.Findings) -> None:
    console = Console()
    for table in card.console_tables(found):
        console.print(table)
    for one in found.unused:
        print(f"{'warning' if one.is_loss else 'note'}: {one}")
    for problem in found.failed_checks:
        print(f"check failed: {problem}; with register.gates.failed_data_checks no policy from these data is promoted")


def findings(seen: Examined, params: Params, model: Path) -> card.Findings:
    return card.Findings(
        sources=[source.model_copy(update={"name": name}) for name, source in seen.sources.items()],
        files={file.name: file.digest for file, _ in seen.files},
        examples=seen.examples,
        damaged=seen.damaged[DAMAGED],
        near_duplicates=int((seen.examples["dropped"] == "near-duplicate").sum()),
        contradictions=contradictions_in_words(seen),
        leaks=seen.leaks,
        masked=seen.masked,
        failed_checks=failed_checks(seen, params),
        unused=unused_labels(seen.examples, params),
        share_prompts=params.prepare.share_prompts,
        limits=params.text,
        tokenizer_fingerprint=(model / FINGERPRINT_FILE).read_text(encoding="utf-8").strip(),
    )


# ---- what there is to read ----


def named(sources: Sequence[Source]) -> dict[str, Source]:
    """{what reports call it: source}"""
    plain = [source.name or (source.hub or Path(source.path or "").name).removesuffix("/") for source in sources]
    plain = [name.split(".")[0] if source.path else name for name, source in zip(plain, sources, strict=True)]
    counts = Counter(plain)
    found: dict[str, Source] = {}
    for name, source in zip(plain, sources, strict=True):
        full = name if counts[name] == 1 else f"{name} ({source.kind})"
        if full in found:
            raise UserError(f"data.sources: two sources of {source.kind} are called {name}. Give each a `name`.")
        found[full] = source
    return found


def list_files(sources: dict[str, Source], params: Params, model: Path, root: Path) -> list[File]:
    tokenizer, turn_tokens = model / "tokenizer.json", tokens_around_a_turn(model)
    files = []
    wrong = []
    for name, source in sources.items():
        try:
            check_format(source.kind, source.format, source.columns)
            paths = files_of(root / str(source.path)) if source.path else []
        except UserError as error:
            wrong.append(f"data.sources, {name}: {error}")
            continue
        settings = Settings(
            kind=source.kind,
            format=source.format,
            columns=source.columns,
            tokenizer=tokenizer,
            turn_tokens=turn_tokens,
            max_prompt_tokens=params.text.max_prompt_tokens,
            max_response_tokens=params.text.max_response_tokens,
            common_prefix=params.prepare.common_prefix,
            mask=params.prepare.mask,
        )
        if source.hub:
            told = " ".join(filter(None, (f"hub:{source.hub}", source.subset, source.split)))
            of_hub = partial(rows_of_hub, source)
            files.append(File(name, settings, told, str(source.revision), 0, of_hub, lambda: "row"))
            continue
        for path in paths:
            rows, unit = partial(rows_of, path), partial(unit_of, path)
            told, size = str(path.relative_to(root)), path.stat().st_size
            files.append(File(name, settings, told, file_digest(path), size, rows, unit))
    if wrong:
        raise UserError("\n".join(wrong))
    return files


def context_of(config: Path) -> float:
    """Tokens that the model takes."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    window = facts.get("sliding_window") if facts.get("use_sliding_window", True) else None
    return float(min(facts.get("max_position_embeddings", math.inf), window or math.inf))


def room(text: Text, most: float) -> Misfit | None:
    """The model must take the longest prompt and response that the parameters allow."""
    wanted = text.max_prompt_tokens + text.max_response_tokens + TEMPLATE_TOKENS
    if wanted <= most:
        return None
    prompt = int((most - TEMPLATE_TOKENS) * text.max_prompt_tokens / (wanted - TEMPLATE_TOKENS))
    response = int(most - TEMPLATE_TOKENS - prompt)
    return Misfit(
        f"text.max_prompt_tokens + text.max_response_tokens + {TEMPLATE_TOKENS} for the chat template is {wanted} "
        f"tokens, and the model takes {most:g}. Lower them in params.yaml.",
        {"text.max_prompt_tokens": prompt, "text.max_response_tokens": response} if min(prompt, response) > 0 else {},
    )


def tokens_around_a_turn(model: Path) -> int:
    """How many tokens the chat template adds for each turn after the first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def length(turns: int) -> int:
        said = [{"role": ("user", "assistant")[place % 2], "content": "a"} for place in range(turns)]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    own = len(tokenizer("a", add_special_tokens=False).input_ids)
    try:
        return max(0, math.ceil((length(3) - length(1)) / 2 - own))
    except TemplateError:  # it takes one turn alone; a stage that needs more will say so
        return 0


# ---- what becomes of it ----


def examine(params: Params, model: Path, root: Path, folder: Path) -> Examined:
    """folder: where the files' tables are, or are put."""
    sources = named(params.data.sources)
    files = list_files(sources, params, model, root)
    read = list(zip(files, read_files(files, folder), strict=True))
    rows: Counter[str] = Counter()
    masked: dict[str, Counter[str]] = {name: Counter() for name in sources}
    for file, tables in read:
        counts = tables.counts()
        rows[file.source] += counts["rows"]
        masked[file.source].update(counts["masked"])
    damaged = pd.DataFrame(
        (
            {"source": file.source, "file": file.name}
            | {name: one[name] for name in DAMAGED[2:]}
            | {name: one.get(name, 0) for name in TOKENS}
            for file, tables in read
            for one in tables.damaged()
        ),
        columns=[*DAMAGED, *TOKENS],
    )
    examples = load_examples(read, sources)
    if examples.empty:
        found = list(too_much_damage(files, damaged, rows, params, context_of(model / "config.json")))
        raise UserError(outlook.message([one.message for one in found], [], outlook.together(found)))
    prompts = load_prompts([tables for _, tables in read])
    blends = {name: Blend(source.weight, shares_of(source, params.prepare.splits)) for name, source in sources.items()}
    near = params.prepare.near_duplicate
    examples = select(examples, prompts, blends, params.prepare, params.seed)
    return Examined(
        sources=sources,
        files=read,
        examples=examples,
        damaged=damaged,
        rows=rows,
        masked=masked,
        contradictions=contradictions(load_pairs(read, examples[examples["dropped"].isna()])),
        leaks=leaks(examples, prompts, near, params.prepare.share_prompts),
    )


def read_files(files: Sequence[File], folder: Path) -> list[Tables]:
    """The tables of each file; of one that has not changed those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / key_of_file(file.name, file.digest, file.settings) for file in files]
    new = {place: file for place, file in zip(places, files, strict=True) if not Tables(place).are_whole()}
    size = sum(file.size for file in new.values())
    is_known = all(file.size and not file.name.endswith((".gz", ".zst")) for file in new.values())
    with (
        worker_pool(size) as pool,
        tqdm(total=size if is_known else None, desc="prepare", unit="B", unit_scale=True, disable=not new) as bar,
    ):
        for place, file in new.items():
            bar.set_postfix_str(file.name)
            write_tables(file.rows(), file.settings, place, pool, bar.update)
    return [Tables(place) for place in places]


PERMISSION = "Give yourself write permission there (`ls -ld` shows who has it)."


def remove_other_tables(folder: Path, used: Sequence[Tables]) -> None:
    for place in set(folder.iterdir()) - {tables.folder for tables in used}:
        if not place.name.startswith(".tmp-") or time.time() - place.stat().st_mtime > 24 * 3600:  # one is being filled
            shutil.rmtree(place)


def load_examples(read: Sequence[tuple[File, Tables]], sources: dict[str, Source]) -> pd.DataFrame:
    """The columns that fit into memory, of all files."""
    columns = ["row", "id", "content", "user", "prefix", "labeler", "prompt_tokens", "response_tokens"]
    parts = []
    for file, tables in read:
        part = pq.read_table(tables.examples, columns=[*columns, "pairs", "tied_pairs"]).to_pandas()
        part["source"], part["kind"] = file.source, file.settings.kind
        if file.settings.kind != "prompts":
            part["labeler"] = part["labeler"].fillna(sources[file.source].labeler or file.source)
        parts.append(part)
    examples: pd.DataFrame = pd.concat(parts, ignore_index=True)
    for name in ("source", "kind", "labeler"):
        examples[name] = examples[name].astype("category")
    return examples


def load_prompts(tables: Sequence[Tables]) -> Prompts:
    """The distinct prompts of all files."""
    ids, signatures = zip(*(one.prompts() for one in tables), strict=True)
    distinct, first = np.unique(np.concatenate(ids), return_index=True)
    return Prompts(distinct, np.concatenate(signatures)[first])


def load_pairs(read: Sequence[tuple[File, Tables]], kept: pd.DataFrame) -> pd.DataFrame:
    """Every pair of responses to a prompt that more than one ranking is of."""
    rankings = kept[kept["kind"] == "rankings"]
    several = rankings.loc[rankings["id"].duplicated(keep=False), "id"].unique()
    pairs: list[tuple[int, int, int, int, int]] = []
    start = 0
    for file, tables in read:
        columns = pq.read_table(tables.examples, columns=["id", "response_keys", "ranks"])
        wanted = np.isin(columns["id"].to_numpy(), several) & np.isin(
            np.arange(start, start + len(columns)), rankings.index
        )
        if file.settings.kind == "rankings" and wanted.any():
            for place, one in zip(np.flatnonzero(wanted), columns.filter(wanted).to_pylist(), strict=True):
                for (a, rank_a), (b, rank_b) in combinations(zip(one["response_keys"], one["ranks"], strict=True), 2):
                    pairs.append((one["id"], a, b, int(np.sign(rank_a - rank_b)), start + int(place)))
        start += len(columns)
    frame = pd.DataFrame(pairs, columns=["id", "a", "b", "better", "row"])
    return frame.astype({"id": "uint64", "a": "uint64", "b": "uint64", "better": "int8", "row": "int64"})


def contradictions_in_words(seen: Examined) -> pd.DataFrame:
    """The same rows; of the first few what was asked and answered, as the card shows them."""
    first = seen.contradictions.head(card.EXAMPLES)
    words: dict[int, str] = {}
    for _, tables in seen.files if len(first) else ():
        for batch in batches(tables.examples, ["id", "prompt", "response_keys", "responses"]):
            for one in batch.filter(np.isin(batch["id"].to_numpy(), first["id"])).to_pylist():
                words[one["id"]] = text_of(orjson.loads(one["prompt"]))
                words |= dict(zip(one["response_keys"], one["responses"], strict=True))
    shown = {"prompt": "id", "one response": "a", "the other": "b"}
    told = {name: seen.contradictions[key].map(words).fillna("") for name, key in shown.items()}
    votes = {"one is better": "a_better", "the other is": "b_better"}
    return pd.DataFrame(told | {name: seen.contradictions[key] for name, key in votes.items()})


def shares_of(source: Source, splits: Splits) -> dict[SplitName, float]:
    """Which part of a source's prompts goes into which split. Where the source does not say, its share of eval is that
    of all, so that the same prompts are in eval whatever kind of rows they come in."""
    if source.splits:
        total = sum(source.splits.values())
        return {name: source.splits.get(name, 0.0) / total for name in SPLITS}
    trained = [name for name in LABELS.get(source.kind, SPLITS) if name != "eval"]
    total = sum(getattr(splits, name) for name in trained)
    share = {name: getattr(splits, name) / (total or 1) * (1 - splits.eval) for name in trained}
    return {name: splits.eval if name == "eval" else share.get(name, 0.0) for name in SPLITS}


# ---- checks ----


def look_ahead(seen: Examined, params: Params, model: Path, root: Path) -> None:
    """UserError with all that a stage could not do with these data and parameters, and on this machine."""
    if len(seen.leaks):  # `select` has left one in: its fault, not that of the data
        raise AssertionError(f"{len(seen.leaks)} prompts stand in two splits:\n{seen.leaks.head()}")
    supply = supply_of(seen, params, model)
    found = list(misfits(seen, supply, params, model))
    problems = [one.message for one in found]
    specs = load_stages(root) if (root / "dvc.yaml").exists() else {}
    problems += [one.message for one in outlook.of_files(params, specs, root)] if specs else []
    problems += [f"{place} cannot be written to. {PERMISSION}" for place in machine.unwritable(root, specs)]
    layers = {
        "sft": params.sft.trainable_layers,
        "reward": params.reward.trainable_layers,
        "ppo": params.ppo.trainable_layers,
    }
    too_small, small = machine.of_room(machine.rooms(root, model, layers))
    for remark in (*outlook.remarks(params, supply), *small):
        print(f"warning: {remark}")
    if problems or too_small:
        with tempfile.TemporaryDirectory() as scratch:
            values, later = values_that_fit(found, seen, params, model, root, Path(scratch))
        raise UserError(outlook.message([*problems, *too_small], later, values))


def values_that_fit(
    first: list[Misfit], seen: Examined, params: Params, model: Path, root: Path, scratch: Path
) -> tuple[dict[str, Any], list[Misfit]]:
    """(values with which all fits that can; what else did not fit on the way to them)

    What changes the data comes first, then who labels, then numbers, which follow from both. scratch: for the tables of
    the files, where they are read anew.
    """
    found = first
    values: dict[str, Any] = {}
    later: list[Misfit] = []
    known = {key for one in first for key in one.fit}
    is_quick = sum(file.size or QUICKLY_READ for file, _ in seen.files) < QUICKLY_READ
    for _ in range(ROUNDS):
        new = outlook.together(found)
        of_data = {key: value for key, value in new.items() if key.startswith(("text.", "prepare."))}
        of_people = {key: value for key, value in new.items() if key.endswith(".labeler")}
        chosen = (of_data or of_people or new) if is_quick else new
        if not chosen:
            break
        values |= chosen
        params = outlook.with_values(params, values)
        if of_data and not is_quick:
            break  # the next run says the rest
        seen = examine(params, model, root, scratch) if of_data else seen
        found = list(misfits(seen, supply_of(seen, params, model), params, model))
        later += [one for one in found if not set(one.fit) <= known and one not in first]
        known |= {key for one in found for key in one.fit}
    return values, later


def misfits(seen: Examined, supply: outlook.Supply, params: Params, model: Path) -> Iterator[Misfit]:
    most = context_of(model / "config.json")
    if found := room(params.text, most):
        yield found
    yield from too_much_damage([file for file, _ in seen.files], seen.damaged, seen.rows, params, most)
    yield from empty_splits(seen, params)
    yield from outlook.misfits(params, supply)


def supply_of(seen: Examined, params: Params, model: Path) -> outlook.Supply:
    tickets = load_tickets([tables for _, tables in seen.files])
    order = order_of(seen.examples, seen.sources, params.seed)
    return outlook.supply_of(seen.examples, order, tickets, model / "config.json", params.prepare.share_prompts)


def too_much_damage(
    files: Sequence[File], damaged: pd.DataFrame, rows: Counter[str], params: Params, most: float
) -> Iterator[Misfit]:
    """rows: of each source. most: tokens that the model takes."""
    names = {file.name: file for file in files}
    for source, count in rows.items():
        own = damaged[damaged["source"] == source]
        bad = len(own[["file", "row"]].drop_duplicates())
        if bad > params.prepare.damaged_limit * count:
            reasons = "\n".join(
                f"{len(some):,} × {reason}, first {names[some.iloc[0]['file']].place(some.iloc[0]['row'])}: "
                f"{some.iloc[0]['message']}"
                for reason, some in sorted(own.groupby("reason"), key=lambda one: -len(one[1]))
            )
            yield Misfit(
                f"{bad:,} of the {count:,} rows of {source} cannot be taken, more than prepare.damaged_limit = "
                f"{params.prepare.damaged_limit:.0%}:\n{reasons}\n{ADVICE}",
                lengths_that_fit(own, count, params, most),
            )


def lengths_that_fit(damaged: pd.DataFrame, rows: int, params: Params, most: float) -> dict[str, Any]:
    """Limits with which few enough of a source's rows are too long; none where it is not for their length. Where the
    model does not take so much, the share of rows to do without.

    damaged: those of the source, which has so many rows.
    """
    text = params.text
    by_row = damaged.groupby(["file", "row"])[TOKENS].max()
    too_long = by_row[(by_row > 0).any(axis=1)]
    spare = int(params.prepare.damaged_limit * rows) - (len(by_row) - len(too_long))
    if spare < 0:
        return {}
    limits = np.array([text.max_prompt_tokens, text.max_response_tokens])
    excess = (too_long / limits).max(axis=1).sort_values(ascending=False, kind="stable")
    kept = too_long.loc[excess.index[spare:]].max().to_numpy()
    prompt, response = (int(max(limit, -(-need // 8) * 8)) for limit, need in zip(limits, kept, strict=True))
    if prompt + response + TEMPLATE_TOKENS > most:
        return {"prepare.damaged_limit": math.ceil(100 * len(by_row) / rows) / 100}
    return {
        name: value
        for name, value, limit in zip(
            ("text.max_prompt_tokens", "text.max_response_tokens"), (prompt, response), limits, strict=True
        )
        if value > limit
    }


def empty_splits(seen: Examined, params: Params) -> Iterator[Misfit]:
    kept = seen.examples[seen.examples["split"].notna()]
    counts = prompts_of(seen.examples)
    shares = params.prepare.share_prompts
    for name, count in counts.items():
        if count or (name == "ppo" and shares and counts["reward"]):
            continue
        alike = kept.loc[kept["prefix"] != 0, "prefix"].value_counts()
        if len(alike) and alike.iloc[0] > len(kept) / 2:
            yield Misfit(
                f"the split `{name}` is empty: {alike.iloc[0]:,} of {len(kept):,} rows begin with the same "
                f"{params.prepare.common_prefix} characters, and such rows stay together. Where that is a "
                "template, set prepare.common_prefix in params.yaml to more characters than it has, or to null."
            )
        elif name == "ppo" and counts["reward"]:
            yield Misfit(
                "the split `ppo` is empty: no prompt falls into it. Add a source of prompts to data.sources in "
                "params.yaml; or, with data too few for that, set prepare.share_prompts to true, and PPO takes the "
                "prompts of the split reward (its score is then optimistic).",
                {"prepare.share_prompts": True},
            )
        else:
            yield Misfit(
                f"the split `{name}` is empty: no prompt falls into it. Add a source of prompts to data.sources in "
                f"params.yaml, give a source `splits` that hold {name}, or raise prepare.splits.{name}."
            )


def unused_labels(examples: pd.DataFrame, params: Params) -> list[card.Unused]:
    """Labels that came with the data and that no stage will read, whatever becomes of their prompts."""
    kept = examples[examples["split"].notna()]
    found = []
    for kind, labeler in (
        ("demonstrations", params.demonstrate.labeler),
        ("rankings", params.rank.labeler),
    ):
        own = kept[kept["kind"] == kind]
        stage, trained = ("demonstrate", "sft") if kind == "demonstrations" else ("rank", "reward")
        here = own["split"].isin(LABELS[kind])  # type: ignore[index]
        for split, count in own.loc[~here, "split"].value_counts().items():
            if count:
                advice = f"give their source `splits` of {trained} and eval alone"
                if split == "ppo":
                    advice += ", and PPO prompts of its own or prepare.share_prompts: true"
                found.append(card.Unused(kind, int(count), len(own), f"they are in the split {split}", advice))
        if labeler != "recorded":
            if here.any():
                why, advice = f"{stage}.labeler is {labeler}", f"set {stage}.labeler to recorded"
                found.append(card.Unused(kind, int(here.sum()), len(own), why, advice))
        elif kind == "demonstrations":
            if apart := int((own["split"] == "eval").sum()):
                found.append(card.Unused(kind, apart, len(own), "they are held out, and their prompts alone are used"))
        elif tied := int((here & (own["pairs"] == own["tied_pairs"])).sum()):
            found.append(card.Unused(kind, tied, len(own), "all of their responses are level"))
    return found


def prompts_of(examples: pd.DataFrame) -> dict[SplitName, int]:
    """Distinct prompts of each split."""
    counts = examples.groupby("split", observed=True)["id"].nunique()
    return {name: int(counts.get(name, 0)) for name in SPLITS}


def failed_checks(seen: Examined, params: Params) -> list[str]:
    """What is odd about the data and no error: it is told, counted, and a gate before promotion (tasks/gates.py)."""
    failed = []
    examples = seen.examples
    duplicates = int((examples["dropped"] == "duplicate").sum())
    if duplicates > params.prepare.duplicate_limit * len(examples):
        limit = params.prepare.duplicate_limit
        failed.append(f"{duplicates} of {len(examples)} rows are duplicates, more than {limit:.0%}")
    for name, own in examples.groupby("source", observed=True):
        if own["split"].isna().all() and not (
            params.prepare.share_prompts and own["id"].isin(examples.loc[examples["split"].notna(), "id"]).all()
        ):
            why = ", ".join(f"{count:,} × {reason}" for reason, count in own["dropped"].value_counts().items() if count)
            advice = (
                ""
                if params.prepare.share_prompts or (own["kind"] != "prompts").any()
                else ("; where others of the same prompts are ranked, prepare.share_prompts: true gives them to PPO")
            )
            failed.append(f"of {name} nothing is left: {why}{advice}")
    labelled = examples[examples["kind"] != "prompts"]
    leaking = int((labelled["dropped"] == "leak").sum())
    if leaking > params.prepare.duplicate_limit * len(labelled):
        kinds = labelled.groupby("id")["kind"].nunique()
        advice = (
            "no prompt is trained on in two of them: give demonstrations and rankings prompts of their own"
            if (kinds > 1).sum() > len(kinds) / 2
            else "a prompt is in one of them alone: give sources that share prompts the same `splits`, and leave out "
            "users where several of them have the same prompts"
        )
        failed.append(
            f"{leaking} of {len(labelled)} demonstrations and rankings are dropped, for others of the same prompts are "
            f"in another split, and {advice}"
        )
    prompts = examples[examples["split"].notna()].drop_duplicates("id")
    alone = prompts["prefix"].where(prompts["prefix"] != 0, prompts["id"])
    groups = prompts["user"].where(prompts["user"] != 0, alone)
    shares = {name: shares_of(source, params.prepare.splits) for name, source in seen.sources.items()}
    leaked = examples.loc[examples["dropped"] == "leak", "id"].nunique()  # from training more than from eval
    for split, count in prompts_of(examples).items():
        wanted, spread = 0.0, 0.0
        for name in shares:
            sizes = groups[prompts["source"] == name].value_counts()
            wanted += shares[name][split] * float(sizes.sum())
            spread += shares[name][split] * float((sizes**2).sum())  # groups go to a split as wholes
        if abs(count - wanted) > leaked + 4 * math.sqrt(max(spread, 1)):  # by chance in one data set of 10,000
            failed.append(f"the split `{split}` has {count} prompts where {wanted:.0f} were expected")
    return failed


# ---- what is written ----


def write_prepared(
    seen: Examined, out: Path, dropped: Path, order: NDArray[np.float64], share_prompts: bool
) -> list[dict[str, str]]:
    """The splits, each in the given order, and the rows that are in none with the reason. Some prompts to show.

    order: (N,) of the examples.
    """
    facts = load_tickets([tables for _, tables in seen.files])
    shown: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    written: dict[SplitName, set[int]] = {name: set() for name in SPLITS}
    columns = [seen.examples[name].astype(object) for name in ("split", "dropped", "labeler")]
    decisions = zip(*columns, seen.examples["partner"], seen.examples["copies"], order, strict=True)
    with ExitStack() as stack:
        prompts = {name: stack.enter_context(SortedLines(out / f"prompts/{name}.jsonl")) for name in SPLITS}
        labels = {
            (kind, name): stack.enter_context(SortedLines(out / f"{kind}/{name}.jsonl"))
            for kind, names in LABELS.items()
            for name in names
        }
        known = stack.enter_context(SortedLines(out / "facts.jsonl"))
        rest = stack.enter_context(dropped.open("wb"))
        for file, tables in seen.files:
            for one in examples_of(tables):
                split, reason, labeler, partner, copies, key = next(decisions)
                if isinstance(reason, str):
                    rest.write(dropped_line(file, one, reason, partner))
                    continue
                head = b'{"id":"%016x","prompt":%b' % (one["id"], one["prompt"].encode())
                is_new = not any(one["id"] in ids for ids in written.values())
                for name in (split, "ppo") if share_prompts and split == "reward" else (split,):
                    if one["id"] not in written[name]:
                        written[name].add(one["id"])
                        prompts[name].write(key, head + b"}\n")
                if is_new:
                    ticket = facts.get(one["id"], "null").encode()
                    source = orjson.dumps(file.source)
                    known.write(key, b'{"id":"%016x","source":%b,"ticket":%b}\n' % (one["id"], source, ticket))
                    if len(shown[split]) < SHOWN:
                        shown[split].append({"split": split, "prompt": text_of(orjson.loads(one["prompt"]))})
                if (file.settings.kind, split) in labels:
                    line = head + b"," + orjson.dumps(label_of(file, one, labeler))[1:] + b"\n"
                    labels[file.settings.kind, split].write(key, line * copies)
            for damaged in tables.damaged():
                rest.write(orjson.dumps({"source": file.source, "file": file.name, **damaged}) + b"\n")
    return [row for rows in shown.values() for row in rows]


def order_of(examples: pd.DataFrame, sources: dict[str, Source], seed: int) -> NDArray[np.float64]:
    """Stages that need a part of the prompts take the first: a fair part of all sources and files, which rows that come
    later change as little as can be. The embedded tickets are drawn at random, and more come at the end. (N,)"""
    embedded = [name for name, source in sources.items() if (source.path or "").startswith("data/tickets")]
    drawn = examples["source"].isin(embedded).to_numpy()
    order = np.empty(len(examples))
    order[drawn] = np.arange(drawn.sum()) / max(1, drawn.sum())
    order[~drawn] = [stable_share(seed, "order", f"{id:016x}") for id in examples.loc[~drawn, "id"].tolist()]
    return order


class SortedLines:
    """A file whose lines end up in the order of their keys; in memory are the keys alone."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("wb")
        self.keys: list[float] = []
        self.ends = [0]

    def __enter__(self) -> Self:
        return self

    def write(self, key: float, line: bytes) -> None:
        self.file.write(line)
        self.keys.append(key)
        self.ends.append(self.ends[-1] + len(line))

    def __exit__(self, *_: object) -> None:
        self.file.close()
        order = np.argsort(self.keys, kind="stable").tolist()
        if order == list(range(len(order))):
            return
        unsorted = self.path.rename(self.path.with_suffix(".unsorted"))
        with (
            unsorted.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines,
            self.path.open("wb") as out,
        ):
            out.writelines(lines[self.ends[place] : self.ends[place + 1]] for place in order)
        unsorted.unlink()


def label_of(file: File, one: dict[str, Any], labeler: str) -> dict[str, Any]:
    if file.settings.kind == "demonstrations":
        return {"response": one["responses"][0], "labeler": labeler}
    return {"responses": one["responses"], "ranks": one["ranks"], "labeler": labeler}


def dropped_line(file: File, one: dict[str, Any], reason: str, partner: int) -> bytes:
    """partner: the id of the prompt that it collides with; 0: none."""
    where = {"source": file.source, "file": file.name, "row": one["row"], "reason": reason}
    of = {"of": f"{partner:016x}"} if partner else {}
    content = {name: one[name] for name in ("responses", "ranks", "labeler") if one[name]}
    return orjson.dumps({**where, **of, "prompt": orjson.loads(one["prompt"]), **content}) + b"\n"


def examples_of(tables: Tables) -> Iterator[dict[str, Any]]:
    for batch in batches(tables.examples, ["row", "id", "prompt", "responses", "ranks", "labeler"]):
        yield from batch.to_pylist()


def batches(examples: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(examples) as file:
        yield from file.iter_batches(8192, columns=columns)


def load_tickets(tables: Sequence[Tables]) -> dict[int, str]:
    """{prompt id: the facts behind it, as JSON}; of several for one prompt the first by the alphabet."""
    found: dict[int, str] = {}
    for one in tables:
        columns = pq.read_table(one.examples, columns=["id", "ticket"])
        known = columns.filter(columns["ticket"].is_valid())
        for id, ticket in zip(known["id"].to_pylist(), known["ticket"].to_pylist(), strict=True):
            found[id] = min(ticket, found.get(id, ticket))
    return found
