"""Generation against transformers' own, and what is captured on the way against plain forward passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tasks.models import load_language_model, load_scalar_model, pack, split_model, through_trunk
from tasks.ppo.rollout import (
    Rollout,
    as_rollout,
    chosen_logprobs,
    final_states,
    generate,
    response_logprobs,
    sample_tokens,
    score_last_token,
    uniforms_for,
)
from tests.tiny import tiny_model_dir

PAD, END = 0, 2
NEW = 12
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [20, 21, 22, 23, 24, 25, 26], [30], [31, 40, 41]]
DEPTHS = (None, 0, 1, 2)
close = partial(assert_close, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model that ends about one response in three within NEW tokens: its end token is made likelier."""
    model = load_language_model(tiny_model_dir(tmp_path_factory.mktemp("rollout") / "policy", seed=3))
    model.model.embed_tokens.weight.data[END] *= 2.5
    return model


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_scalar_model(tiny_model_dir(tmp_path_factory.mktemp("rollout") / "reward", reward=True, seed=4))


def sample(model: Any, depth: int | None = 0, prompts: list[list[int]] = PROMPTS, **options: Any) -> Rollout:
    samples = options.get("samples_per_prompt", 1)
    uniforms = uniforms_for(1, [f"{prompt} {n}" for prompt in prompts for n in range(samples)], NEW)
    settings = {"max_new_tokens": NEW, "end_token": END, "pad_token": PAD, **options}
    return generate(*split_model(model, depth), prompts, uniforms, **settings)


def greedy(model: Any, depth: int | None, prompts: list[list[int]] = PROMPTS) -> Rollout:
    return generate(*split_model(model, depth), prompts, None, max_new_tokens=NEW, end_token=END, pad_token=PAD)


def plain_logprobs(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """One sequence through the whole model, without padding, cache or trunk."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)[torch.arange(len(response)), response]


def test_the_model_of_these_tests_ends_some_responses_and_not_all(model: Any) -> None:
    ended = sample(model, samples_per_prompt=4).ended
    assert 0.2 < ended.float().mean().item() < 0.9


@pytest.mark.parametrize("depth", DEPTHS)
def test_greedy_is_transformers_own_greedy(model: Any, depth: int | None) -> None:
    """One prompt at a time there, all together here."""
    rollout = greedy(model, depth)
    for prompt, response in zip(PROMPTS, rollout.response_ids(), strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=END,
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        assert response == theirs


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_pass(model: Any, depth: int | None, temperature: float) -> None:
    rollout = sample(model, depth, temperature=temperature, samples_per_prompt=2)
    again = response_logprobs(split_model(model, depth)[1], rollout, temperature)
    for row, response in enumerate(rollout.response_ids()):
        expected = plain_logprobs(model, PROMPTS[row // 2], response, temperature)
        close(rollout.logprobs[row, : len(response)], expected)
        close(again[row, : len(response)], expected)
    assert not rollout.logprobs[~rollout.response_mask].any()
    assert not again[~rollout.response_mask].any()


@pytest.mark.parametrize("depth", DEPTHS)
def test_samples_of_a_prompt_go_through_with_it_once_and_give_the_same_states(model: Any, depth: int | None) -> None:
    rollout = sample(model, depth, samples_per_prompt=4)
    branch = split_model(model, depth)[1]
    seen: list[int] = []
    branch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0] * inputs[0].shape[1]))
    together, alone = final_states(branch, rollout), final_states(branch, rollout._replace(samples=1))
    real = torch.cat([torch.ones(len(rollout.tokens), 1, dtype=torch.bool), rollout.response_mask], dim=1)
    close(together[real], alone[real])
    # as many positions as the longest has tokens, that is without padding where all are alike
    tokens, width = rollout.mask.sum(-1), rollout.prompt_length
    of_prompts = rollout.mask[::4, :width].sum(-1) + rollout.response_mask.sum(-1).view(-1, 4).sum(-1)
    assert seen == [len(PROMPTS) * int(of_prompts.max()), 4 * len(PROMPTS) * int(tokens.max())]


def test_padding_on_either_side_changes_no_state(model: Any) -> None:
    rollout = sample(model, 1, samples_per_prompt=2)
    branch = split_model(model, 1)[1]
    wider = rollout.padded(rollout.responses.shape[1] + 3)
    expected, found = final_states(branch, rollout), final_states(branch, wider)
    close(found[:, : expected.shape[1]], expected)
    assert not found[:, expected.shape[1] :].any()
    assert not expected[:, 1:][~rollout.response_mask].any()


@pytest.mark.parametrize("depth", DEPTHS)
def test_another_engines_responses_become_the_same_rollout(model: Any, depth: int | None) -> None:
    """What `generate` wrote goes through `as_rollout`, with tokens after the end that must be cut off."""
    rollout = sample(model, depth, samples_per_prompt=2, temperature=0.7)
    responses = [[*row, 7, 8] if row[-1] == END else row for row in rollout.response_ids()]
    again = as_rollout(
        *split_model(model, depth),
        PROMPTS,
        responses,
        end_token=END,
        pad_token=PAD,
        temperature=0.7,
        samples_per_prompt=2,
    )
    for name in ("tokens", "mask", "ended"):
        assert torch.equal(getattr(again, name), getattr(rollout, name)), name
    assert (again.prompt_length, again.samples) == (rollout.prompt_length, 2)
    close(again.logprobs, rollout.logprobs)
    close(again.states[again.mask].float(), rollout.states[rollout.mask].float())


def test_logprobs_with_gradients_are_those_without(model: Any) -> None:
    """With gradients the rows go through together, without them in chunks of 16: 20 rows make two chunks."""
    rollout = sample(model, 1, samples_per_prompt=4)
    branch = split_model(model, 1)[1]
    without = response_logprobs(branch.requires_grad_(False), rollout, 1.0)
    within = response_logprobs(branch.requires_grad_(True), rollout, 1.0)
    assert within.requires_grad
    assert not without.requires_grad
    assert_close(within.detach(), without, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head_has_the_numbers_and_gradients_of_the_plain_one(temperature: float) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    states, tokens, wanted = torch.randn(6, 8), torch.randint(50, (6,)), torch.randn(6)
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    for fused in (True, False):
        inputs = states.clone().requires_grad_(True)
        head.weight.grad = None
        if fused:
            logprobs = chosen_logprobs(head, inputs, tokens, temperature)
        else:
            logprobs = (head(inputs) / temperature).log_softmax(-1)[torch.arange(6), tokens]
        (logprobs * wanted).sum().backward()
        assert inputs.grad is not None
        assert head.weight.grad is not None
        results.append((logprobs.detach(), inputs.grad, head.weight.grad))
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    # a frozen head has no gradient, and without gradients it is the same number
    head.requires_grad_(False)
    head.weight.grad = None
    inputs = states.clone().requires_grad_(True)
    (chosen_logprobs(head, inputs, tokens, temperature) * wanted).sum().backward()
    assert_close(inputs.grad, results[0][1])
    assert head.weight.grad is None
    with torch.no_grad():
        assert_close(chosen_logprobs(head, states, tokens, temperature), results[0][0])
    # a head with a bias goes the plain way
    biased = torch.nn.Linear(8, 50)
    expected = (biased(states) / temperature).log_softmax(-1)[torch.arange(6), tokens]
    assert_close(chosen_logprobs(biased, states, tokens, temperature), expected)


@pytest.mark.parametrize("depth", DEPTHS)
def test_captured_states_are_the_trunks(model: Any, depth: int | None) -> None:
    rollout = sample(model, depth, samples_per_prompt=2)
    trunk, _ = split_model(model, depth)
    sequences = [row[keep].tolist() for row, keep in zip(rollout.tokens, rollout.mask, strict=True)]
    for row, fresh in enumerate(through_trunk(trunk, [pack(sequence, []) for sequence in sequences], 3)):
        close(rollout.states[row][rollout.mask[row]], fresh.inputs)


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_does_not_change_the_responses(model: Any, depth: int | None) -> None:
    assert sample(model, depth).response_ids() == sample(model, 0).response_ids()


def test_samples_per_prompt_are_neighbours_and_equal_to_repeated_prompts(model: Any) -> None:
    together = sample(model, 1, samples_per_prompt=3)
    uniforms = uniforms_for(1, [f"{prompt} {n}" for prompt in PROMPTS for n in range(3)], NEW)
    repeated = generate(
        *split_model(model, 1),
        [prompt for prompt in PROMPTS for _ in range(3)],
        uniforms,
        max_new_tokens=NEW,
        end_token=END,
        pad_token=PAD,
    )
    assert together.response_ids() == repeated.response_ids()
    close(together.logprobs, repeated.logprobs)
    responses = together.response_ids()
    assert any(responses[row] != responses[row + 1] for row in range(0, 15, 3))


def test_a_response_does_not_depend_on_its_neighbours(model: Any) -> None:
    whole = sample(model, 1).response_ids()
    for some in ([0], [3, 1], [4, 2, 0]):
        chosen = [PROMPTS[index] for index in some]
        assert sample(model, 1, chosen).response_ids() == [whole[index] for index in some]


def test_flags_masks_and_padding(model: Any) -> None:
    rollout = sample(model, samples_per_prompt=4)
    assert rollout.prompt_length == 7
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    lengths = set()
    for row, (prompt, response) in enumerate(zip(prompts, rollout.response_ids(), strict=True)):
        assert rollout.tokens[row, :7].tolist() == [PAD] * (7 - len(prompt)) + prompt
        assert rollout.mask[row, :7].tolist() == [False] * (7 - len(prompt)) + [True] * len(prompt)
        rest = rollout.responses.shape[1] - len(response)
        assert rollout.responses[row].tolist() == response + [PAD] * rest
        assert rollout.response_mask[row].tolist() == [True] * len(response) + [False] * rest
        assert bool(rollout.ended[row]) == (response[-1] == END)
        assert END not in response[:-1]
        assert response[-1] == END or len(response) == NEW
        lengths.add(len(response))
    assert len(lengths) > 2
    assert rollout.responses.shape[1] == max(lengths)


def test_it_stops_when_all_have_ended_and_cuts_the_padding(model: Any) -> None:
    """With a head that knows the end token alone."""
    trunk, branch = split_model(model, 0)
    branch.head = head = torch.nn.Linear(32, 512)
    head.weight.data.zero_()
    head.bias.data.fill_(-100.0)
    head.bias.data[END] = 0.0
    uniforms = uniforms_for(1, ["x"], NEW)
    rollout = generate(trunk, branch, PROMPTS[:1], uniforms, max_new_tokens=NEW, end_token=END, pad_token=PAD)
    assert rollout.response_ids() == [[END]]
    assert rollout.responses.shape == (1, 1)
    assert rollout.logprobs.tolist() == [[0.0]]
    assert rollout.ended.tolist() == [True]


def test_rows_keeps_what_belongs_together(model: Any) -> None:
    rollout = sample(model)
    part = rollout.rows(torch.tensor([3, 1]))
    assert part.response_ids() == [rollout.response_ids()[row] for row in (3, 1)]
    assert part.prompt_length == rollout.prompt_length
    for name in ("tokens", "mask", "logprobs", "states", "ended"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[[3, 1]])


def test_inverse_of_the_cumulative_distribution_by_hand() -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).log().repeat(7, 1)
    # cumulative: 0.1, 0.1, 0.7, 1, 1; a token is chosen by numbers from the one before up to its own, exclusive
    draws = torch.tensor([0.0, 0.09, 0.11, 0.69, 0.71, 0.99, 1 - 2**-24])
    tokens, logprobs = sample_tokens(logits, draws, 1.0, 1.0)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3, 3]
    assert_close(logprobs.exp(), torch.tensor([0.1, 0.1, 0.6, 0.6, 0.3, 0.3, 0.3]))


def test_frequencies_are_the_probabilities_and_what_cannot_be_is_never_chosen() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    count = 20_000
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample_tokens(probabilities.log().repeat(count, 1), draws, 1.0, 1.0)
    frequencies = tokens.bincount(minlength=7) / count
    assert_close(frequencies, probabilities, rtol=0, atol=0.015)  # four standard deviations of the first
    assert not frequencies[probabilities == 0].any()


def test_temperature_sharpens() -> None:
    # at temperature 1/2 probabilities are squared: 0.36 and 0.16, that is 9/13 and 4/13
    logits = torch.tensor([[0.6, 0.4]]).log()
    for draw, token, probability in ((0.69, 0, 9 / 13), (0.70, 1, 4 / 13)):
        tokens, logprobs = sample_tokens(logits, torch.tensor([draw]), 0.5, 1.0)
        assert tokens.tolist() == [token]
        assert logprobs.exp().item() == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {1}), (0.55, {1, 3}), (0.79, {1, 3}), (0.9, {1, 3, 4}), (0.99, {1, 3, 4, 5})]
)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05])
    draws = torch.linspace(0, 1 - 2**-24, 4001)
    tokens, logprobs = sample_tokens(probabilities.log().repeat(len(draws), 1), draws, 1.0, top_p)
    assert set(tokens.tolist()) == kept
    # within what is kept, in proportion
    total = probabilities[list(kept)].sum()
    for token in kept:
        share = (tokens == token).float().mean().item()
        assert share == pytest.approx((probabilities[token] / total).item(), abs=0.001)
    # the log-probability is of the whole distribution
    assert_close(logprobs.exp(), probabilities[tokens])


def test_greedy_takes_the_likeliest() -> None:
    tokens, logprobs = sample_tokens(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]]), None, 1.0, 1.0)
    assert tokens.tolist() == [1, 0]
    # log of e^3 / (1 + e^3 + e) and of e^2 / (e^2 + 2)
    assert logprobs.tolist() == pytest.approx([-0.1698460, -0.2395447], abs=1e-6)


def test_uniforms_depend_on_the_seed_and_the_name_alone() -> None:
    whole = uniforms_for(7, ["a", "b", "c"], 6)
    assert torch.equal(uniforms_for(7, ["c", "a"], 6), whole[[2, 0]])
    assert torch.equal(uniforms_for(7, ["b"], 4), whole[1:2, :4])
    assert not torch.equal(uniforms_for(8, ["a"], 6), whole[:1])
    assert not torch.equal(whole[0], whole[1])
    assert (whole >= 0).all()
    assert (whole < 1).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_score_last_token_is_the_classifiers_logit(model: Any, reward_model: Any, depth: int | None) -> None:
    """AutoModelForSequenceClassification, one sequence at a time; the two models share no trunk here, so the rollout's
    states are computed anew with the reward model's."""
    rollout = sample(model, None, samples_per_prompt=4)
    trunk, branch = split_model(reward_model, depth)
    states = torch.zeros(*rollout.tokens.shape, 32) if depth is not None else rollout.tokens
    sequences = [row[keep] for row, keep in zip(rollout.tokens, rollout.mask, strict=True)]
    if depth is not None:
        for row, fresh in enumerate(through_trunk(trunk, [pack(ids.tolist(), []) for ids in sequences], 8)):
            states[row][rollout.mask[row]] = fresh.inputs
    scores = score_last_token(branch, rollout._replace(states=states))
    with torch.no_grad():
        expected = [reward_model(input_ids=ids[None]).logits[0, 0] for ids in sequences]
    assert scores.std() > 0.01
    close(scores, torch.stack(expected))
