"""Dense decoding through transformers at its best: the cache is read once a step, and never copied.

transformers' own `DynamicCache` copies all keys and values on every step to append one, which often takes longer than
the attention; that is no cost of attention. Here they lie in a buffer with room to grow, and single queries are
answered by `kernels.decode.decode_attention`, which reads each key once for all heads of its group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Cache, LlamaConfig
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..checks import check_int, fail
from ..kernels.decode import decode_attention

NAME = "paucity_dense"


def use_dense(model: nn.Module) -> None:
    """Have a transformers model of plain causal layers attend through `attention`, in place."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    setter = getattr(model, "set_attn_implementation", None)
    if setter is None:
        raise fail("use_dense", "model", "be a transformers model", type(model).__name__)
    setter(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `decode_attention` for single queries without a mask, otherwise SDPA.

    Returns:
        ``[B, Tq, H, Dv]`` and no weights.
    """
    if query.shape[2] > 1 or attention_mask is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    answer = decode_attention(query, key, value, scale=scaling)
    return answer.transpose(1, 2) if isinstance(answer, Tensor) else answer[0].transpose(1, 2), None


class _Room(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, slices of buffers that are longer."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.buffers, self.length = (keys, values), length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        return self._show()

    def rewind(self, length: int) -> None:
        self.length = length
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values


def filled_cache(
    config: Any, length: int, *, batch: int = 1, room: int = 16, device: str = "cpu", seed: int = 0
) -> Cache:
    """A cache of random keys and values, as after a prompt, for timing steps without the prompt.

    Args:
        config: of a transformers model whose layers all keep plain keys and values of one width.
        length: tokens that are cached.
        batch: sequences.
        room: steps that fit.
        device: where it lies.
        seed: of the numbers.
    """
    check_int("filled_cache", "length", length, 0)
    check_int("filled_cache", "batch", batch)
    check_int("filled_cache", "room", room)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, length + room, dim)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(config, "dtype", None) or torch.float32
    # Drawn once and copied: every layer needs memory of its own, not numbers of its own.
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    layers = [_Room(drawn[0].clone(), drawn[1].clone(), length) for _ in range(config.num_hidden_layers)]
    return Cache(layers=layers)


def random_llama(dtype: torch.dtype, *, context: int, seed: int = 0, **sizes: int) -> nn.Module:
    """A Llama of random weights that attends through `attention`, in eval mode, for timing.

    Args:
        dtype: of weights and cache.
        context: its longest text.
        seed: of the weights; the caller's random numbers are left alone.
        sizes: of ``LlamaConfig``.
    """
    config = LlamaConfig(max_position_embeddings=context, dtype=dtype, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    use_dense(model)
    return model.eval()


def decode_step(model: nn.Module, length: int, *, batch: int = 1) -> Callable[[], Tensor]:
    """A function that runs one decode step of ``batch`` sequences of ``length`` cached tokens, again at every call.

    It gives the logits [batch, 1, vocabulary].
    """
    device = next(model.parameters()).device
    cache = filled_cache(model.config, length, batch=batch, room=1, device=str(device))
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def step() -> Tensor:
        for layer in cache.layers:
            layer.rewind(length)
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    return step
