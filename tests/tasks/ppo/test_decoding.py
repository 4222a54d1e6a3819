"""One token at a time against transformers' own forward pass, and packed weights against torch's product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache

from tasks.models import Branch, Trunk, causal_mask, load_language_model, positions_of, split_model
from tasks.ppo import decoding
from tasks.ppo.decoding import PACKED_ROWS, Decoder
from tasks.ppo.rollout import PreallocatedLayer, Rollout, generate
from tests.tiny import tiny_model_dir

MKL = torch.backends.mkl.is_available()
TOKENS = torch.randint(3, 250, (5, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(5, 9, dtype=torch.bool)
MASK[1, :3] = MASK[4, :1] = False


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return load_language_model(tiny_model_dir(tmp_path / "model", seed=5))


def qwen() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


@torch.no_grad()
def stepwise(model: Any, depth: int | None) -> tuple[Tensor, Decoder]:
    """Final states (5, 6, H) of the last six tokens: the first three go in together, the others one by one."""
    trunk, branch = split_model(model, depth)
    cache = Cache(layers=[PreallocatedLayer(9) for _ in model.model.layers])
    mask, positions = causal_mask(MASK), positions_of(MASK)
    branch(trunk(TOKENS[:, :3], mask[..., :3, :3], positions[:, :3], cache), mask[..., :3, :3], positions[:, :3], cache)
    through_trunk, through_branch = Decoder(trunk, len(TOKENS)), Decoder(branch, len(TOKENS))
    final = []
    for here in range(3, 9):
        seen = MASK[:, None, None, : here + 1]
        states = through_trunk(TOKENS[:, here], seen, positions[:, here : here + 1], cache)
        final.append(through_branch(states, seen, positions[:, here : here + 1], cache))
    return torch.stack(final, dim=1), through_branch


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.skipif(not MKL, reason="no MKL"))])
@pytest.mark.parametrize("depth", [None, 0, 1, 2])
def test_states_and_logits_are_transformers_own(model: Any, depth: int | None, packed: bool) -> None:
    model.requires_grad_(not packed)
    states, decoder = stepwise(model, depth)
    assert not decoder.plain
    assert decoder.packed == packed
    with torch.no_grad():
        whole = model.model(input_ids=TOKENS, attention_mask=causal_mask(MASK), position_ids=positions_of(MASK))[0]
        assert_close(states, whole[:, 3:], rtol=0, atol=2e-6)
        assert_close(decoder.head(states[:, -1]), model.lm_head(whole[:, -1]), rtol=0, atol=1e-5)


def test_other_blocks_and_reduced_precision_go_through_transformers_modules(model: Any) -> None:
    states, decoder = stepwise(qwen(), 1)
    assert decoder.plain
    with torch.no_grad():
        whole = qwen().model(input_ids=TOKENS, attention_mask=causal_mask(MASK), position_ids=positions_of(MASK))[0]
    assert_close(states, whole[:, 3:], rtol=0, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert stepwise(model, 1)[1].plain


@pytest.mark.skipif(not MKL, reason="no MKL")
class TestPacked:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("rows", [2, 7, 16, PACKED_ROWS])
    @torch.no_grad()
    def test_the_product_is_torchs(self, rows: int, bias: bool) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(576, 192, bias=bias).requires_grad_(False)
        states = torch.randn(rows, 576)
        # MKL sums the 576 products in another order; how much that is depends on the processor
        assert_close(decoding._packed(linear, rows)(states), linear(states), rtol=0, atol=5e-6)
        # and of another number of rows than it was packed for
        assert torch.equal(decoding._packed(linear, rows)(states[:1]), linear(states[:1]))

    @torch.no_grad()
    def test_a_frozen_weight_is_packed_once_and_again_when_it_has_changed(self) -> None:
        linear = nn.Linear(8, 4).requires_grad_(False)
        states = torch.randn(3, 8)
        decoding._packed(linear, 3)
        first = decoding._PACKED[linear]
        decoding._packed(linear, 3)
        assert decoding._PACKED[linear] is first
        linear.weight.mul_(2)
        assert_close(decoding._packed(linear, 3)(states), linear(states), rtol=0, atol=1e-6)
        assert decoding._PACKED[linear] is not first

    def test_a_trained_weight_is_not_packed(self) -> None:
        linear = nn.Linear(8, 4)
        assert decoding._packed(linear, 3) is linear
        assert linear not in decoding._PACKED

    @torch.no_grad()
    def test_generation_follows_new_weights_in_a_frozen_trunk(self, model: Any) -> None:
        """As without packed weights, before and after."""
        parts = split_model(model, 1)
        seen = []
        for change in (1, 1.5):
            model.model.layers[0].mlp.up_proj.weight.mul_(change)
            found = [generate_six(parts)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decoding, "PACKED_ROWS", 0)
                found.append(generate_six(parts))
            assert_close(found[0], found[1], rtol=0, atol=1e-5)
            seen.append(found[0])
        assert not torch.allclose(seen[0], seen[1])

    def test_what_was_packed_goes_with_its_module(self) -> None:
        linear = nn.Linear(8, 4).requires_grad_(False)
        decoding._packed(linear, 3)
        count = len(decoding._PACKED)
        del linear
        assert len(decoding._PACKED) == count - 1


def generate_six(parts: tuple[Trunk, Branch]) -> Tensor:
    """The log-probabilities of six tokens in four rows."""
    uniforms = torch.linspace(0.05, 0.95, 24).view(4, 6)
    return generate(*parts, [[5, 6, 7]] * 4, uniforms, max_new_tokens=6, end_token=2, pad_token=0).logprobs


def test_more_rows_than_are_packed_for_are_dropped_when_finished(model: Any) -> None:
    """And the responses are those of fewer rows at a time."""
    model.model.embed_tokens.weight.data[2] *= 6
    count = PACKED_ROWS + 8
    uniforms = torch.rand(count, 12, generator=torch.Generator().manual_seed(0))

    def sample(part: Tensor) -> Rollout:
        prompts = [[5, 6, 7]] * len(part)
        return generate(*split_model(model, 1), prompts, part, max_new_tokens=12, end_token=2, pad_token=0)

    whole, parts = sample(uniforms), [sample(part) for part in uniforms.split(8)]
    assert 0.3 < whole.ended.float().mean() < 1
    assert whole.response_ids() == [row for part in parts for row in part.response_ids()]
