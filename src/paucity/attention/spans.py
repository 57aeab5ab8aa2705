"""Spans: every head looks back over a window of its own, which may grow with the text, and at the first keys.

Paper: Fu et al. 2024 (MoA), https://arxiv.org/abs/2406.14909, Eq. 3: a head sees ``alpha + beta * N`` keys of a text of
``N`` tokens, and the first 64. `paucity.attention.moa` finds the two for every head of a model.

``N`` is what the text has at the time: all of a prompt that is given at once, and in a prompt that is continued on a
cache all that came so far. Exact for every query: the span counts keys visible, itself included, rounded up to whole
blocks, at least one; sinks come on top where it does not reach them. Not here: decode steps (they are dense) and the
paper's cache that drops what no head sees.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from ..checks import check_int, fail
from ..ops.formats.stripes import Window
from .compute import Attended
from .per_head import attend_by_head
from .policy import PrefillPolicy
from .prompt import Prompt
from .sink_window import SinkWindow

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Spans(PrefillPolicy):
    """Options of ``spans``. One number stands for a layer, or for the model, where a list is not needed.

    Attributes:
        alpha: for each layer of the model, and each query head of it, tokens of the span whatever the text.
        beta: likewise, tokens of the span for each token of the text.
        num_sinks: keys at the start that every query sees.
        block_size: spans are whole multiples of it.
    """

    alpha: Number | list[Number | list[Number]] = Field()
    beta: Share | list[Share | list[Share]] = Field()
    num_sinks: int = Field(64, ge=0)
    block_size: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _not_empty(self) -> "Spans":
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            shape = _shape(value)
            if shape is not None and (not shape or 0 in shape):
                raise fail("spans", name, "have an entry for every layer and head", "an empty list")
        return self

    def span(self, layer: int, length: int, num_heads: int) -> list[int]:
        """Keys that each head of a layer sees of a text of ``length`` tokens, itself included, without the sinks.

        Raises:
            InputError: if the layer, or one of ``num_heads`` heads, has no entry.
        """
        alphas, betas = (_row(name, v, layer, num_heads) for name, v in (("alpha", self.alpha), ("beta", self.beta)))
        return [span_of(a, b, length, self.block_size) for a, b in zip(alphas, betas, strict=True)]

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError unless there is an entry for every layer, and for every head."""
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            shape = _shape(value)
            if shape is not None and len(shape) != max(layers) + 1:
                raise fail("spans", name, f"have {max(layers) + 1} layers", len(shape))
            for heads in shape or ():
                if heads is not None and heads != num_heads:
                    raise fail("spans", name, f"have {num_heads} heads in every layer", heads)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Window:
        """The window of heads that all have the same span.

        Raises:
            InputError: if they have not; then `attend` computes each by its own.
        """
        spans = set(self._ruling(query, key, prompt))
        if len(spans) > 1:
            raise fail("spans", "select", "be asked for heads of one span", sorted(spans))
        return self._policy(spans.pop()).select(query, key, prompt)

    def compute(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
        """Each head by its own span, those of one span together."""
        ruling = self._ruling(query, key, prompt)
        spans = sorted(set(ruling))
        return attend_by_head(
            [self._policy(span) for span in spans], [spans.index(span) for span in ruling], query, key, value, prompt
        )

    def lookahead(self, length: int) -> int:
        """1 where no span grows; else ``length``, for how long the text is sways every query."""
        rows = self.beta if isinstance(self.beta, list) else [self.beta]
        return length if any(any(row) if isinstance(row, list) else row for row in rows) else 1

    def _ruling(self, query: Tensor, key: Tensor, prompt: Prompt) -> list[int]:
        heads = prompt.head_indices(query)
        spans = self.span(prompt.layer, key.shape[2] + prompt.dropped, prompt.num_heads or max(heads) + 1)
        return [spans[head] for head in heads]

    def _policy(self, span: int) -> SinkWindow:
        return SinkWindow(num_sinks=self.num_sinks, window_size=span, q_block=self.q_block)


def span_of(alpha: float, beta: float, length: int, block_size: int) -> int:
    """``alpha + beta * length`` in whole blocks, rounded up, at least one.

    Examples:
        >>> span_of(-1024, 0.5, 4096, 64), span_of(-1024, 0.5, 1000, 64)
        (1024, 64)
    """
    check_int("span_of", "length", length, 0)
    wanted = round(alpha + beta * length, 6)  # 0.1 * 640 is not quite 64
    return max(1, -int(-wanted // block_size)) * block_size


def pair_share(span: int, num_sinks: int, length: int, window: int | None = None) -> float:
    """Pairs that a span and sinks keep of a text, as a share of those of the dense model with its sliding window.

    Examples:
        >>> pair_share(1, 1, 3)
        0.8333333333333334
    """
    kept, dense = (
        Window(size, sinks).kept_pairs(length, length, window=window)
        for size, sinks in ((span, num_sinks), (length, 0))
    )
    return int(kept) / int(dense)


def _shape(value: float | list[float | list[float]]) -> list[int | None] | None:
    """Heads of each layer, None where one number is for all."""
    return [len(row) if isinstance(row, list) else None for row in value] if isinstance(value, list) else None


def _row(name: str, value: float | list[float | list[float]], layer: int, num_heads: int) -> list[float]:
    if isinstance(value, list):
        if not 0 <= layer < len(value):
            raise fail("spans", name, f"have an entry for layer {layer}", f"{len(value)} layers")
        value_of = value[layer]
    else:
        value_of = value
    if not isinstance(value_of, list):
        return [value_of] * num_heads
    if len(value_of) < num_heads:
        raise fail("spans", name, f"have an entry for {num_heads} heads", len(value_of))
    return value_of[:num_heads]
