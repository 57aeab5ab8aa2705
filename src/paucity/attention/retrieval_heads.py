"""Retrieval heads: the few heads that copy what was asked for out of a long text.

Paper: Wu et al. 2024, https://arxiv.org/abs/2404.15574, Sec. 2 (detection) and 4 (masking).

While an answer is generated token by token, a head scores ``1 / needle length`` whenever the key that it attends to
most lies in the needle and holds the token that is generated; a head that copies the whole answer scores 1. Scores are
means over needles, lengths and depths. Every prompt counts, also one that the model answers wrongly.

Needles are facts with a question (`needle_prompts`), of which the answer's tokens count; or, where there is no
tokenizer (`RetrievalHeads.fit`), a stretch of text that is begun again at the end of another text (`copy_prompts`).
`masked_heads` takes heads away. `RetrievalHeads` lets a KV head stream in decoding
(`paucity.attention.decode.streaming_heads`) unless one of its query heads retrieves.
"""

from collections.abc import Sequence

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from transformers import DynamicCache

from ..checks import fail
from ..measure.tokens import Progress, check_context, context_length, device_of, evaluating, forward
from ..models.text_config import text_config
from .apply import apply
from .cache.cached import Cached
from .decode.needles import Needle, copy_prompts
from .decode.policy import DecodePolicy
from .decode.scores import seen
from .decode.streaming_heads import StreamingHeads
from .policy import PolicySearch
from .prompt import Prompt

LENGTHS = (1024, 2048, 4096)


class RetrievalHeads(PolicySearch):
    """Options of ``retrieval_heads``. Those not listed here are of the policy found.

    Attributes:
        threshold: a head that scores more retrieves.
        lengths: of the prompts; None is 1024, 2048 and 4096 as far as the model's context and the calibration go.
        num_depths: depths of the needle at each length.
        num_needles: needles at each depth.
        cue: tokens of the needle that are given at the end.
        answer: tokens that should follow them.
        seed: of needles and texts.
    """

    threshold: float = Field(0.1, ge=0, lt=1)
    lengths: list[int] | None = Field(None, min_length=1)
    num_depths: int = Field(10, ge=1)
    num_needles: int = Field(1, ge=1)
    cue: int = Field(16, ge=1)
    answer: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)
    num_sinks: int = Field(128, ge=0)
    window_size: int = Field(256, ge=1)
    page_size: int = Field(64, ge=1)
    min_length: int = Field(1024, ge=0)

    def fit(self, model: nn.Module, calibration: Sequence[Tensor]) -> StreamingHeads:
        """The policy for ``model``, which is left as it was.

        Args:
            model: a Hugging Face causal language model without a decode policy.
            calibration: token ids ``[B, T]``, one batch after another.

        Raises:
            InputError: if there are too few tokens, or a length is beyond the model's context.
        """
        tokens = torch.cat([ids.flatten() for ids in calibration]).tolist() if calibration else []
        room = min(context_length(model) or len(tokens), len(tokens))
        lengths = self.lengths or [n for n in LENGTHS if n + self.answer <= room] or [room - self.answer]
        check_context("retrieval_heads", "lengths", model, max(lengths) + self.answer)
        sizes = {name: getattr(self, name) for name in ("num_depths", "num_needles", "cue", "answer", "seed")}
        scores = retrieval_scores(model, copy_prompts(tokens, lengths=lengths, **sizes))
        return self.policy(scores, _num_kv_heads(model))

    def policy(self, scores: Tensor, num_kv_heads: int) -> StreamingHeads:
        """The policy by scores ``[layers, H]``, such as those of needles with a question."""
        retrieves = (scores > self.threshold).view(len(scores), num_kv_heads, -1).any(-1)
        return StreamingHeads(
            streaming=[(~row).nonzero().flatten().tolist() for row in retrieves],
            num_sinks=self.num_sinks,
            window_size=self.window_size,
            page_size=self.page_size,
            min_length=self.min_length,
        )


class _Watch(DecodePolicy):
    """Notes which key each head attends to most, and reads everything."""

    min_length: int = 0
    _top: dict[int, Tensor] = PrivateAttr(default_factory=dict)

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> None:
        """Everything."""
        rows = query.view(len(query), cached.lengths.shape[1], -1, query.shape[-1])
        products = (rows @ cached.keys().mT).masked_fill(~seen(cached, prompt).unsqueeze(2), -torch.inf)
        self._top[prompt.layer] = products.argmax(-1).flatten().cpu()

    def top(self, layers: int, heads: int) -> Tensor:
        """Position for each head ``[layers, heads]``, -1 where a layer was not seen."""
        unseen = torch.full((heads,), -1)
        return torch.stack([self._top.get(layer, unseen) for layer in range(layers)])


def retrieval_scores(model: nn.Module, needles: Sequence[Needle], *, on_progress: Progress | None = None) -> Tensor:
    """The retrieval score of every head, ``[layers, H]`` float32 in [0, 1].

    Args:
        model: a Hugging Face causal language model without a decode policy; it answers greedily.
        needles: prompts, of at least two tokens.
        on_progress: called with (prompts done, prompts).

    Raises:
        InputError: if there is no prompt.
    """
    if not needles:
        raise fail("retrieval_scores", "needles", "hold at least one prompt", "none")
    heads = text_config(model).num_attention_heads
    watch = _Watch()
    applied = apply(model, watch)
    layers = max(applied.layers) + 1
    scores = torch.zeros(layers, heads)
    try:
        with evaluating(model):
            for done, needle in enumerate(needles, 1):
                scores += _score(model, watch, needle, layers, heads)
                if on_progress is not None:
                    on_progress(done, len(needles))
    finally:
        applied.remove()
    return scores / len(needles)


def _score(model: nn.Module, watch: _Watch, needle: Needle, layers: int, heads: int) -> Tensor:
    """The share of the answer that each head copies, ``[layers, H]``."""
    ids = torch.tensor([needle.ids], device=device_of(model))
    text, score = torch.tensor(needle.ids), torch.zeros(layers, heads)
    _, cache = forward(model, ids[:, :-1], keep=1, cache=DynamicCache(), use_cache=True)
    token = ids[:, -1:]
    for _ in range(needle.num_answer):
        logits, cache = forward(model, token, keep=1, cache=cache, use_cache=True)
        token = logits.argmax(-1)
        top = watch.top(layers, heads)
        inside = (top >= needle.start) & (top < needle.stop)
        score += inside & (text[top.clamp(0, len(text) - 1)] == token.cpu().flatten())
    return score / needle.num_answer


def _num_kv_heads(model: nn.Module) -> int:
    config = text_config(model)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
