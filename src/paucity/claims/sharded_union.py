"""Claim: heads that see different shards of the far context keep more than heads that all see the same, at equal cost.

Paper: Lin et al. 2024, https://arxiv.org/abs/2407.17678: the union of the shards of all heads is the whole context,
and that (heterogeneous) beats one shard for all (homogeneous). First the union, exact, from the masks of the policy, at
many lengths and numbers of heads. Then facts hidden in a text, and bits per byte, on the model, without training.

Both are averaged over every shard that the first head may have, so that over the draws a head computes the same pairs
in both, and no choice of shard favours one. The verdict is the mean loss of the answers in nats, on passkeys and on
key-value pairs, and the union; accuracy and bits per byte stand beside. Differs: the paper trains from scratch with the
pattern; here a dense model is given it. Then each retrieving head sees only its own shard of the facts, so that
neither finds most of them.
"""

import dataclasses
import statistics
import time
from typing import Any

import torch

from ..attention import Sharded, apply
from ..measure.data import held_out_python
from ..measure.quality import bits_per_byte
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult
from .fixed_patterns import Answers, answer, hidden_facts, mean_answers, pattern_of, text_config

NAME = "sharded-union"
TASKS = ("passkey", "key_value")
LENGTHS, QUICK_LENGTHS = (1024, 2048), (1024,)
NUM_PROMPTS, QUICK_PROMPTS, MAX_TOKENS = 6, 3, 6144
UNION_LENGTHS = (1, 2, 63, 64, 65, 500, 1023, 2048)


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Check the union, then compare different shards with one shard for all.

    Args:
        quick: one length, fewer prompts, no bits per byte.
        seed: of the prompts.
        loaded: the model, the embedded one if not given; as many shards are taken as it has heads.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    text, lengths = held_out_python(), QUICK_LENGTHS if quick else LENGTHS
    heads: int = text_config(loaded).num_attention_heads
    union = [_union(count, stride) for count, stride in ((4, 4), (8, 4), (32, 8), (32, 32))]

    def policy(length: int, offset: int, homogeneous: bool) -> Sharded:
        return Sharded(
            q_block=length // 64,
            local_blocks=4,
            vert_stride=heads,
            offset=offset,
            homogeneous=homogeneous,
            min_length=0,
        )

    kinds = {"different shards": False, "one shard": True}
    rows: list[dict[str, Any]] = []
    found: dict[str, list[Answers]] = {name: [] for name in kinds}
    for length in lengths:
        for task in TASKS:
            count = QUICK_PROMPTS if quick else NUM_PROMPTS
            questions = hidden_facts(loaded, text, task=task, length=length, num_prompts=count, seed=seed)
            row: dict[str, Any] = {"task": task, "length": length}
            for name, homogeneous in kinds.items():
                draws = [answer(loaded, questions, policy(length, i, homogeneous)) for i in range(heads)]
                found[name].append(mean_answers(draws))
                row[name] = dataclasses.asdict(found[name][-1]) | {"nats_by_offset": [draw.nats for draw in draws]}
            rows.append(row)
    means = {name: dataclasses.asdict(mean_answers(answers)) for name, answers in found.items()}
    bits = {}
    if not quick:
        for name, homogeneous in kinds.items():
            bits[name] = statistics.mean(_bits(loaded, text, policy(1024, i, homogeneous)) for i in range(heads))
    complete = all(row["different shards"] == 1.0 for row in union)
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"share of the context in the union": 1.0, "passkeys found within 32768 tokens (trained)": 1.0},
        measured={"union": union, "answers": means, "bits_per_byte": bits, "by_task": rows},
        holds=complete and means["different shards"]["nats"] < means["one shard"]["nats"],
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "text": "held_out_python",
            "lengths": list(lengths),
            "prompts": QUICK_PROMPTS if quick else NUM_PROMPTS,
            "blocks_of_a_text": 64,
            "local_blocks": 4,
            "vert_stride": heads,
            "offsets": heads,
            "union_lengths": list(UNION_LENGTHS),
        },
    )


def _union(heads: int, stride: int) -> dict[str, Any]:
    """Share of the pairs of blocks that some head sees, for different shards and for one: the least of all lengths."""
    row: dict[str, Any] = {"heads": heads, "vert_stride": stride}
    for name, homogeneous in (("different shards", False), ("one shard", True)):
        policy = Sharded(q_block=16, local_blocks=1, vert_stride=stride, homogeneous=homogeneous)
        shares = []
        for length in UNION_LENGTHS:
            pattern = pattern_of(policy, length, num_heads=heads)
            seen = pattern.blocks[0].any(0)  # type: ignore[union-attr]
            shares.append(int(seen.sum()) / int(torch.ones_like(seen).tril().sum()))
        row[name] = min(shares)
    return row


def _bits(loaded: Loaded, text: str, policy: Sharded) -> float:
    applied = apply(loaded.model, policy)
    try:
        quality = bits_per_byte(
            loaded.model, loaded.need_tokenizer(NAME), text, length=1024, stride=512, max_tokens=MAX_TOKENS
        )
    finally:
        applied.remove()
    assert quality.bits_per_byte is not None
    return quality.bits_per_byte.value
