"""One token a row through a model's blocks, after what a cache holds of the rows.

Where a block is transformers' Llama block, its arithmetic is done here in half as many operations; and where the rows
are few, on a CPU, a frozen trunk's products take weights that MKL packed beforehand: otherwise it packs them anew for
each product. Other blocks, and reduced precision, go through transformers' modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tasks.models import Branch, Trunk

PACKED_ROWS = 32  # up to so many rows a product's time is the weights' way through memory, not arithmetic

Linear = Callable[[Tensor], Tensor]


class Decoder:
    """A trunk's or a branch's blocks, and a branch's head.

    rows: how many will come at each step. Another number works too, without packed weights.
    """

    def __init__(self, part: Trunk | Branch, rows: int) -> None:
        self.part = part
        backbone: Any = part.backbone  # None in a trunk of depth None: ids pass through
        self.backbone = backbone
        self.plain = not _is_llama(backbone) or _is_autocast(part)
        self.packed = not self.plain and _can_pack(backbone, rows)
        linear = (lambda module: _packed(module, rows)) if self.packed else (lambda module: module)
        self.blocks = [] if self.plain else [_Block(layer, linear) for layer in backbone.layers]
        self.head: Linear = linear(part.head) if isinstance(part, Branch) else nn.Identity()

    def __call__(self, inputs: Tensor, attention: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """ids (B,) or states (B, H) -> states (B, H); attention (B, 1, 1, T) bool, positions (B, 1)."""
        if self.plain:
            return self.part(inputs[:, None], attention, positions, cache)[:, 0]  # type: ignore[no-any-return]
        states: Tensor = inputs if inputs.is_floating_point() else self.backbone.embed_tokens(inputs)
        cosine, sine = (part[..., : part.shape[-1] // 2] for part in self.backbone.rotary_emb(states, positions))
        for block in self.blocks:
            states = block(states, cosine, sine, attention, cache)
        return self.backbone.norm(states)  # type: ignore[no-any-return]


class _Block:
    """transformers' LlamaDecoderLayer on one token a row."""

    def __init__(self, layer: Any, linear: Callable[[Any], Linear]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.place, self.head_width, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.query, self.key, self.value = map(linear, (attention.q_proj, attention.k_proj, attention.v_proj))
        self.output = linear(attention.o_proj)
        self.gate, self.up, self.down = map(linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def __call__(self, states: Tensor, cosine: Tensor, sine: Tensor, attention: Tensor, cache: Cache) -> Tensor:
        rows = len(states)
        normed = _rms_norm(self.before_attention, states)
        queries = _rotated(self.query(normed).view(rows, -1, self.head_width), cosine, sine)
        keys = _rotated(self.key(normed).view(rows, -1, self.head_width), cosine, sine)
        values = self.value(normed).view(rows, -1, self.head_width)
        keys, values = cache.layers[self.place].update(keys[:, :, None], values[:, :, None])
        seen = F.scaled_dot_product_attention(
            queries[:, :, None], keys, values, attn_mask=attention, scale=self.scaling, enable_gqa=True
        )
        states = states + self.output(seen.reshape(rows, -1))
        normed = _rms_norm(self.before_mlp, states)
        return states + self.down(F.silu(self.gate(normed)) * self.up(normed))


def _is_llama(backbone: Any) -> bool:
    return backbone is not None and all(
        type(layer) is LlamaDecoderLayer and layer.self_attn.config.hidden_act == "silu" for layer in backbone.layers
    )


def _is_autocast(part: nn.Module) -> bool:
    weight = next(part.parameters(), None)
    return weight is not None and torch.is_autocast_enabled(weight.device.type)


def _rms_norm(norm: Any, states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of (B, heads, D) by halves; cosine and sine (B, 1, D / 2). (Su et al. 2021.)"""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class _Packed(NamedTuple):
    rows: int
    version: int  # torch counts the changes of a tensor
    weight: Tensor


_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()  # once, for all updates


def _can_pack(backbone: Any, rows: int) -> bool:
    """Frozen weights alone: a trained one would be packed anew for each update, which costs what it saves."""
    weight = next(backbone.parameters())
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return 1 < rows <= PACKED_ROWS and on_cpu and not weight.requires_grad and torch.backends.mkl.is_available()


def _packed(module: Any, rows: int) -> Linear:
    """The module as a function of states (rows, H): the same product."""
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return module  # type: ignore[no-any-return]
    weight, bias = module.weight, module.bias
    known = _PACKED.get(module)
    if known is None or (known.rows, known.version) != (rows, weight._version):
        known = _Packed(rows, weight._version, torch.ops.mkl._mkl_reorder_linear_weight(weight, rows))
        _PACKED[module] = known
    packed = known.weight
    return lambda states: torch.ops.mkl._mkl_linear(states, packed, weight, bias, rows)
