"""LServe: half of the heads stream, found by how little they lose; the others select pages while decoding.

Paper: Yang et al. 2025 (LServe), https://arxiv.org/abs/2502.14866, Sec. 3.3: heads are classed by the gates of
DuoAttention (Xiao et al. 2024, https://arxiv.org/abs/2410.10819) at a quantile, half of them streaming.

DuoAttention trains a gate for every head on synthetic passkeys. Here nothing is trained: a KV head scores the change of
its queries' output, relative to it, when it reads sinks and a window alone on the calibration text. The text has to
hold something worth looking back for, such as repetitions and definitions.

`prefill_split` makes the policy of prompts with the same split, with LServe's longer window there.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from ..checks import check_divides, fail
from ..kernels.attention import sparse_attention
from ..measure.tokens import check_batch
from ..ops.formats.stripes import Window
from .decode.paged_selection import PagedSelection
from .decode.streaming_heads import StreamingHeads, check_streaming
from .flash import Flash
from .per_head import PerHead
from .policy import PolicySearch
from .prefill import Observed
from .sink_window import SinkWindow
from .watch import look


class LServe(PolicySearch):
    """Options of ``lserve``. Those not listed here are of the policy found.

    Attributes:
        streaming_share: KV heads that stream, of all of the model.
    """

    streaming_share: float = Field(0.5, ge=0, le=1)
    num_keys: int = Field(4096, ge=1)
    page_size: int = Field(64, ge=1)
    num_chunks: int = Field(4, ge=1)
    reselect_every: int = Field(4, ge=1)
    num_sinks: int = Field(128, ge=0)
    window_size: int = Field(256, ge=1)
    min_length: int = Field(1024, ge=0)

    def fit(self, model: nn.Module, calibration: Sequence[Tensor]) -> PagedSelection:
        """The policy for ``model``, which is left as it was.

        Args:
            model: a Hugging Face causal language model without a prefill policy.
            calibration: token ids ``[B, T]``, one batch after another, longer than sinks and window.

        Raises:
            InputError: if there is no text, or one is not long enough.
        """
        loss = streaming_loss(model, calibration, num_sinks=self.num_sinks, window_size=self.window_size)
        heads = [(float(row[head]), layer, head) for layer, row in loss.items() for head in range(len(row))]
        streaming: list[list[int]] = [[] for _ in range(max(loss) + 1)]
        for _, layer, head in sorted(heads)[: round(self.streaming_share * len(heads))]:
            streaming[layer].append(head)
        options = {name: getattr(self, name) for name in PagedSelection.model_fields if name in LServe.model_fields}
        return PagedSelection(streaming=[sorted(row) for row in streaming], **options)


def streaming_loss(
    model: nn.Module, calibration: Sequence[Tensor], *, num_sinks: int, window_size: int
) -> dict[int, Tensor]:
    """How far the output of each KV head moves when it reads sinks and a window alone, relative to the output.

    Args:
        model: a Hugging Face causal language model without a prefill policy.
        calibration: token ids ``[B, T]``, one batch after another.
        num_sinks: first keys that are read.
        window_size: latest keys that are read, the query's own included.

    Returns:
        ``[H_kv]`` float32 by layer, mean over the texts.

    Raises:
        InputError: if there is no text, or one is no longer than sinks and window.
    """
    if not calibration:
        raise fail("lserve", "calibration", "hold at least one text", "none")
    sums: dict[int, Tensor] = {}

    def note(seen: Observed) -> None:
        query, key, value, prompt, done = seen
        near = sparse_attention(
            *(query, key, value, Window(window_size, num_sinks)),
            scale=prompt.scale,
            softcap=prompt.softcap,
            window=prompt.window,
        )
        assert isinstance(near, Tensor)  # no lse was asked for
        change, whole = (
            (x.float() ** 2).sum((0, 2, 3)).view(key.shape[1], -1).sum(-1) for x in (near - done.out, done.out)
        )
        sums[prompt.layer] = sums.get(prompt.layer, torch.zeros(())) + (change / whole.clamp(min=1e-30)).sqrt().cpu()

    for ids in calibration:
        check_batch("lserve", "calibration", ids, num_sinks + window_size + 1)
        look(model, ids, note)
    return {layer: total / len(calibration) for layer, total in sorted(sums.items())}


def prefill_split(
    policy: PagedSelection | StreamingHeads, num_heads: int, num_kv_heads: int, *, window_size: int = 8192
) -> PerHead:
    """The policy of prompts in which the same heads stream, and the others read everything.

    Args:
        policy: of decoding, with the KV heads that stream.
        num_heads: query heads of the model.
        num_kv_heads: its KV heads.
        window_size: latest keys that streaming heads read in prompts.

    Raises:
        InputError: if no heads stream, or the policy is for a model with other heads.
    """
    check_divides("prefill_split", "num_kv_heads", num_kv_heads, num_heads, "num_heads")
    if not policy.streaming:
        raise fail("prefill_split", "policy", "name streaming heads", policy.streaming)
    check_streaming("prefill_split", policy.streaming, range(len(policy.streaming)), num_kv_heads)
    group = num_heads // num_kv_heads
    return PerHead(
        choices=[Flash(), SinkWindow(num_sinks=policy.num_sinks, window_size=window_size)],
        assignment=[[int(head // group in row) for head in range(num_heads)] for row in policy.streaming],
        min_length=policy.min_length,
        layers=policy.layers,
    )
