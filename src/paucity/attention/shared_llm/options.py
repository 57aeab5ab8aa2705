"""Sizes of SharedLLM, and the models that it can be built on.

Paper: Han et al. 2024, https://arxiv.org/abs/2410.19318, Sec. 4.1 and Table 6.
"""

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from ...checks import fail
from ..rotary import Rotary, find_rotary
from .inject import Start

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class SharedOptions(BaseModel):
    """Options of ``shared_llm``; the defaults are the paper's for language modelling.

    Attributes:
        num_layers: ``M``, layers of the lower model, and of the upper one that read its keys (the paper has 4 of 32
            here, and 16 for instructions).
        chunk_size: tokens of a chunk (512 for instructions).
        ratios: compression ratio of each level of a tree, coarsest first; their number is the height of the tree.
        start: what the output projection of the cross-attention starts from, see `TreeCrossAttention`.
        parallel_chunks: chunks of each text that the lower model reads at a time; None is all.
        seed: of what starts at random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_layers: int = Field(4, ge=1)
    chunk_size: int = Field(1024, ge=2)
    ratios: list[int] = Field([16, 8, 4], min_length=1)
    start: Start = "zero"
    parallel_chunks: int | None = Field(None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _tree_fits(self) -> "SharedOptions":
        if min(self.ratios) < 1:
            raise fail("shared_llm", "ratios", "be at least 1 each", self.ratios)
        if 2 ** len(self.ratios) > self.chunk_size:
            raise fail("shared_llm", "chunk_size", f"be at least 2 ** {len(self.ratios)} levels", self.chunk_size)
        return self


def rotary_of(model: nn.Module, num_layers: int) -> list[Rotary]:
    """How the first layers turn positions.

    Raises:
        InputError: if the model is not laid out as Llama is, or has fewer layers.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    layers = getattr(decoder, "layers", None)
    if layers is None or any({name for name, _ in layer.named_children()} != _PARTS for layer in layers):
        raise fail("SharedLLM", "model", "be a causal language model laid out as Llama is", type(model).__name__)
    if not all(hasattr(layer.self_attn, name) for layer in layers for name in ("q_proj", "o_proj", "head_dim")):
        raise fail("SharedLLM", "model", "have query and output projections of its own", type(model).__name__)
    if num_layers > len(layers):
        raise fail("SharedLLM", "num_layers", f"be at most the model's {len(layers)} layers", num_layers)
    found = [find_rotary(model, index) for index in range(num_layers)]
    rotary = [turn for turn in found if turn is not None]
    if len(rotary) < num_layers:
        raise fail("SharedLLM", "model", "have rotary embeddings of a kind known", type(model).__name__)
    return rotary
