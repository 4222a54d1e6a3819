"""Stage `sample`: K outputs of the SFT model for each prompt, for the labelers to rank (InstructGPT, step 2).

`python -m tasks.run sample`. The random numbers of an output depend on the seed, the prompt and the output's place
alone, so that a sub-set of the prompts gives the outputs that the whole gives. With `rank.labeler: recorded` nobody
is to rank outputs, and none are sampled.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.conversations import text_of
from tasks.datasets import Prompt, Samples, read_rows, write_figures, write_rows
from tasks.demands import prompts_of_split, require
from tasks.models import (
    decode_response,
    encode_prompt,
    load_language_model,
    load_tokenizer,
    require_same_tokenizer,
    split_model,
)
from tasks.ppo.rollout import generate, uniforms_for
from tasks.stage import Stage, UserError

if TYPE_CHECKING:
    from tasks.params import Params


def run(stage: Stage) -> None:
    folder = stage.dep("data/models/sft")
    require_same_tokenizer(stage.dep("data/prepared/tokenizer_fingerprint.txt").parent, folder)
    samples: list[Samples] = []
    dropped = 0
    if stage.params.rank.labeler == "recorded":
        print("sample: nothing is sampled, for rank.labeler is `recorded`: the rankings come with the data")
    else:
        prompts = chosen_prompts(stage.dep("data/prepared/prompts/reward.jsonl"), stage.params.sample.prompts)
        samples, dropped = sample_responses(load_language_model(folder), load_tokenizer(folder), prompts, stage.params)
    write_rows(stage.out("data/collected/samples") / "samples.jsonl", samples)
    ended = [flag for row in samples for flag in row.ended]
    figures: dict[str, float] = {"prompts": len(samples), "responses": len(ended), "duplicates_dropped": dropped}
    if ended:
        figures["ended_share"] = sum(ended) / len(ended)
    stage.tracker.metrics({f"sample/{name}": value for name, value in figures.items()})
    stage.tracker.table(
        "samples", [{"prompt": text_of(row.prompt), "response": row.responses[0]} for row in samples[:20]]
    )
    write_figures(stage.out("data/reports/sample/metrics.json"), {"sample": figures}, ["sample.ended_share"])


def chosen_prompts(path: Path, count: int) -> list[Prompt]:
    """The first `count` of the file."""
    prompts = read_rows(path, Prompt)
    require(prompts_of_split("sample.prompts", count, "reward", len(prompts)))
    return prompts[:count]


def sample_responses(model: Any, tokenizer: Any, prompts: list[Prompt], params: Params) -> tuple[list[Samples], int]:
    """(samples in the order of the prompts, number of duplicates dropped).

    Of equal responses to one prompt the first is kept: a labeler can only tie them. A prompt with one response left
    could not be ranked, and is left out with its duplicates counted.
    """
    settings = params.sample
    count = settings.responses_per_prompt
    encoded = [encode_prompt(tokenizer, prompt.prompt) for prompt in prompts]
    trunk, branch = split_model(model, 0)
    by_length = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    size = max(1, settings.batch_size // count)
    found: dict[int, Samples] = {}
    dropped = 0
    with tqdm(total=len(prompts) * count, desc="sample", unit="response") as bar:
        for start in range(0, len(by_length), size):
            chosen = by_length[start : start + size]
            names = [f"{prompts[index].id} {place}" for index in chosen for place in range(count)]
            rollout = generate(
                trunk,
                branch,
                [encoded[index] for index in chosen],
                uniforms_for(params.seed, names, params.text.max_response_tokens),
                max_new_tokens=params.text.max_response_tokens,
                end_token=tokenizer.eos_token_id,
                pad_token=tokenizer.pad_token_id,
                temperature=settings.temperature,
                top_p=settings.top_p,
                samples_per_prompt=count,
            )
            texts = [decode_response(tokenizer, ids) for ids in rollout.response_ids()]
            for place, index in enumerate(chosen):
                own = range(place * count, (place + 1) * count)
                distinct = {(texts[row], bool(rollout.ended[row])): None for row in own}
                dropped += count - len(distinct)
                if len(distinct) > 1:
                    found[index] = Samples(
                        id=prompts[index].id,
                        prompt=prompts[index].prompt,
                        responses=[text for text, _ in distinct],
                        ended=[ended for _, ended in distinct],
                    )
            bar.update(len(names))
    if not found:
        raise UserError("Every prompt got the same response each time: raise sample.temperature.")
    return [found[index] for index in sorted(found)], dropped
