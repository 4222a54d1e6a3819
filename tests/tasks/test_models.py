"""Model folders, tokenizers, and a model seen as a trunk and a branch."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.conversations import single
from tasks.models import (
    Branch,
    Trunk,
    causal_mask,
    centred_scores,
    decode_response,
    encode_prompt,
    encode_response,
    freeze_trunk,
    left_padded,
    load_language_model,
    load_scalar_model,
    load_tokenizer,
    pack,
    positions_of,
    prepare_tokenizer,
    require_same_tokenizer,
    save_model,
    score_packed,
    shared_depth,
    shared_prompt_mask,
    split_model,
    through_trunk,
    trunk_depth,
)
from tasks.stage import UserError
from tests.tiny import CHATML, CONVERSATION, IN_CHATML, tiny_model_dir, tiny_tokenizer

PAD = 0
SEQUENCES = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20]]
close = partial(assert_close, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "reward", reward=True)


def trained(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


# ---- trunk and branch ----


def test_trunk_depth(folder: Path) -> None:
    model = load_language_model(folder)
    assert trunk_depth(model, "all") is None
    assert trunk_depth(model, 1) == 1
    assert trunk_depth(model, 2) == 0
    with pytest.raises(UserError, match="trainable_layers is 3, and the model has 2 layers"):
        trunk_depth(model, 3)


def test_freeze_trunk(folder: Path, reward_folder: Path) -> None:
    whole = {name for name, _ in load_language_model(folder).named_parameters()}
    for depth, frozen in ((None, ()), (0, ("embed",)), (1, ("embed", "layers.0.")), (2, ("embed", "layers."))):
        model = load_language_model(folder)
        freeze_trunk(model, depth)
        assert trained(model) == {name for name in whole if not any(part in name for part in frozen)}
    reward_model = load_scalar_model(reward_folder)
    freeze_trunk(reward_model, 2)
    assert trained(reward_model) == {"model.norm.weight", "score.weight"}


@pytest.mark.parametrize("depth", [None, 0, 1, 2])
def test_trunk_and_branch_together_are_the_model(folder: Path, depth: int | None) -> None:
    model = load_language_model(folder)
    trunk, branch = split_model(model, depth)
    ids, mask = left_padded(SEQUENCES, PAD)
    with torch.no_grad():
        final = branch(trunk(ids, causal_mask(mask), positions_of(mask)), causal_mask(mask), positions_of(mask))
        for row, sequence in enumerate(SEQUENCES):
            logits = model(input_ids=torch.tensor([sequence])).logits[0]
            close(branch.head(final[row, -len(sequence) :]), logits)
    assert model.model.embed_tokens is not None, "the model itself stays whole"
    assert len(model.model.layers) == 2


def test_branch_gradients_reach_its_own_blocks_and_not_the_trunk(folder: Path) -> None:
    model = load_language_model(folder)
    trunk, branch = split_model(model, 1)
    ids, mask = left_padded(SEQUENCES, PAD)
    states = trunk(ids, causal_mask(mask), positions_of(mask))
    assert not states.requires_grad
    branch(states, causal_mask(mask), positions_of(mask)).square().mean().backward()
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert with_gradient == {
        name for name, _ in model.named_parameters() if name.startswith(("model.layers.1.", "model.norm."))
    }


def test_a_frozen_copy_stays_and_shares_what_is_not_trained(folder: Path) -> None:
    model = load_language_model(folder)
    freeze_trunk(model, 1)
    branch = Branch(model, 0)
    names = {name for name, weight in branch.named_parameters() if weight.requires_grad}
    assert names
    assert all(name.startswith(("backbone.layers.1.", "backbone.norm.")) for name in names)
    reference = branch.frozen_copy()
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert len(branch.trained()) == len(names), "the branch itself is still trained"
    for name, weight in branch.named_parameters():
        assert (reference.get_parameter(name) is weight) == (name not in names)
    for weight in branch.trained():
        weight.data.zero_()
    assert all(reference.get_parameter(name).any() for name in names)


def test_shared_depth(folder: Path) -> None:
    one, same = load_language_model(folder), load_language_model(folder)
    assert shared_depth(one, same, 2) == 2
    assert shared_depth(one, same, 1) == 1
    assert shared_depth(one, same, None) is None
    upper, lower, embedding = (load_language_model(folder) for _ in range(3))
    upper.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    lower.model.layers[0].input_layernorm.weight.data[0] += 1e-3
    embedding.model.embed_tokens.weight.data[0, 0] += 1e-3
    assert shared_depth(one, upper, 2) == 1
    assert shared_depth(one, lower, 2) == 0
    assert shared_depth(one, embedding, 2) is None


# ---- tensors ----


def test_left_padded_by_hand() -> None:
    ids, mask = left_padded([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_causal_mask_by_hand() -> None:
    mask = causal_mask(torch.tensor([[True, True, True], [False, True, True]]))
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    # padding looks at itself, and nothing else looks at it
    assert mask[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_positions_of_by_hand() -> None:
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_pack_by_hand() -> None:
    packed = pack([7, 8], [[1, 2, 3], [4]])
    assert packed.inputs.tolist() == [7, 8, 1, 2, 3, 4]
    assert packed.blocks.tolist() == [0, 0, 1, 1, 1, 2]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 2]


def test_shared_prompt_mask_by_hand() -> None:
    """A prompt of two tokens, responses of two and one, one token of padding: no response sees another."""
    mask = shared_prompt_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


PACKS = [pack(row[:1], [row[1:]]) for row in SEQUENCES if len(row) > 1]
GROUPS = [pack([5, 6, 7], [[8, 9], [10], [11, 12, 13]]), pack([14], [[15, 16, 17, 18], [19]])]


@pytest.mark.parametrize("depth", [None, 0, 1])
def test_states_through_the_trunk_are_in_the_order_of_the_list(folder: Path, depth: int | None) -> None:
    trunk = Trunk(load_language_model(folder), depth)
    for one, done in zip(PACKS, through_trunk(trunk, PACKS, 2), strict=True):
        ids, mask = left_padded([one.inputs.tolist()], PAD)
        close(done.inputs, trunk(ids, causal_mask(mask), positions_of(mask))[0])
        assert torch.equal(done.blocks, one.blocks)


@pytest.mark.parametrize("depth", [None, 0, 1])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_scores_of_responses_that_share_a_prompt_are_those_one_by_one(
    reward_folder: Path, depth: int | None, batch_size: int
) -> None:
    model = load_scalar_model(reward_folder)
    trunk, branch = split_model(model, depth)
    alone = [[[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6, 7, 11, 12, 13]], [[14, 15, 16, 17, 18], [14, 19]]]
    with torch.no_grad():
        expected = [
            torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in group]) for group in alone
        ]
        assert torch.cat(expected).std() > 0.01
        close(score_packed(branch, through_trunk(trunk, GROUPS, batch_size)), expected)
        # the bias of this model is 0.25
        close(centred_scores(model, GROUPS, batch_size), [scores - 0.25 for scores in expected])


# ---- on disk ----


def test_a_model_folder_is_plain_transformers_with_safetensors_alone(folder: Path) -> None:
    suffixes = {path.suffix for path in folder.iterdir()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".txt"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = load_language_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    assert not ours.training
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}


def test_layers_that_training_left_alone_are_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small shards. DVC then stores and sends a frozen layer once."""
    model = load_language_model(tiny_model_dir(tmp_path / "start"))
    tokenizer = load_tokenizer(tmp_path / "start")
    write = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda folder, **_: write(folder, max_shard_size="20KB"))
    save_model(model, tokenizer, tmp_path / "before")
    model.model.norm.weight.data += 1
    save_model(model, tokenizer, tmp_path / "after")
    shards = sorted(path.name for path in (tmp_path / "before").glob("*.safetensors"))
    assert len(shards) > 2
    changed = [s for s in shards if (tmp_path / "before" / s).read_bytes() != (tmp_path / "after" / s).read_bytes()]
    assert len(changed) == 1


def test_an_edited_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    load_tokenizer(copy)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    with pytest.raises(UserError, match=r"copy: its tokenizer or chat template was changed .*dvc checkout"):
        load_tokenizer(copy)


def test_an_edited_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["frobnicate"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(UserError, match="was changed"):
        load_tokenizer(copy)


def test_models_with_different_tokenizers_do_not_work_together(folder: Path, tmp_path: Path) -> None:
    require_same_tokenizer(folder, shutil.copytree(folder, tmp_path / "copy"))
    other = tiny_model_dir(tmp_path / "other", texts=["quite another text with another vocabulary"])
    with pytest.raises(UserError, match=r"different tokenizers or chat templates .*other: [0-9a-f]{16}"):
        require_same_tokenizer(folder, other)


# ---- tokenizer ----


def test_pad_is_not_the_end_token(folder: Path) -> None:
    model, tokenizer = load_language_model(folder), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # as many models come
    prepare_tokenizer(model, tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.eos_token_id == tokenizer.eos_token_id == 2


def test_a_good_pad_token_is_left_alone(folder: Path) -> None:
    model, tokenizer = load_language_model(folder), tiny_tokenizer()
    tokenizer.pad_token = "<|im_start|>"
    prepare_tokenizer(model, tokenizer)
    assert tokenizer.pad_token == "<|im_start|>"


def test_without_a_spare_token_there_is_no_padding(folder: Path) -> None:
    model, tokenizer = load_language_model(folder), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.unk_token = tokenizer.bos_token = tokenizer.eos_token
    with pytest.raises(UserError, match="no token that could serve as padding"):
        prepare_tokenizer(model, tokenizer)


def test_prompt_and_response_as_tokens() -> None:
    tokenizer = tiny_tokenizer()
    prompt = encode_prompt(tokenizer, "hello dear")
    assert tokenizer.decode(prompt) == "<|im_start|>user\nhello dear<|im_end|>\n<|im_start|>assistant\n"
    response = encode_response(tokenizer, "we are sorry")
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in response[:-1]
    assert encode_response(tokenizer, "we are sorry", ended=False) == response[:-1]
    assert decode_response(tokenizer, response) == "we are sorry"
    assert decode_response(tokenizer, encode_response(tokenizer, " we are \n")) == "we are"


def test_a_conversation_goes_through_the_chat_template_whole() -> None:
    tokenizer = tiny_tokenizer()
    expected = tokenizer(IN_CHATML, add_special_tokens=False).input_ids
    assert encode_prompt(tokenizer, CONVERSATION) == expected
    # the marks of a turn are one token each, not what their letters would be
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert expected.count(start) == 5
    assert encode_prompt(tokenizer, "hello dear") == encode_prompt(tokenizer, single("hello dear"))


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (NO_SYSTEM, CONVERSATION, "refuses the turns system, user, assistant, user .*System role not supported"),
        (ALTERNATING, [*CONVERSATION[1:2], *CONVERSATION[3:]], "refuses the turns user, user .*must alternate"),
    ],
)
def test_a_template_that_refuses_a_conversation(template: str, prompt: Any, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + CHATML
    with pytest.raises(UserError, match=rf"{message}.*base\.chat_template"):
        encode_prompt(tokenizer, prompt)
    assert encode_prompt(tokenizer, CONVERSATION[1:])
