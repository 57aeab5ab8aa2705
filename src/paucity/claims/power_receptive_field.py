"""Claim: what PowerAttention reaches doubles with every layer, where a window of the same cost adds its own length.

Paper: Chen et al. 2025, https://arxiv.org/abs/2503.03588, Sec. 3 and 4. Three things are measured.

Exact, on the masks of the policies: how far back everything is reached after each number of layers, by passing "is
reached" through the mask of one layer after the other. A window of at least the same number of pairs is beside it.
On the model: which tokens move the last logits, by their gradient, which is exactly 0 where no path leads; it must lie
within what the masks say. The verdict rests on these two.
Beside them, no part of the verdict: how many passkeys are found, all layers sparse, and with the last layer dense (the
paper keeps two of seven layers dense). The paper's own figures on passkeys are of models trained on with the pattern;
untrained, a model has not learnt to pass on what it saw, and with all layers sparse neither pattern finds much.
Differs: blocks are a 128th of the text, as 256 are of the paper's 32768 tokens.
"""

import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from ..attention import Power, PrefillPolicy, apply
from ..measure.data import held_out_python
from ..measure.tokens import device_of, encode
from ..models.load import Loaded, load
from ..ops.formats.block import BlockMask
from . import CLAIMS
from .base import ClaimResult
from .fixed_patterns import answer, hidden_facts, mean_answers, pairs_of, pattern_of, text_config, window_of_cost

NAME = "power-receptive-field"
NUM_BLOCKS, NUM_LAYERS = 1024, 9
LENGTHS, QUICK_LENGTHS = (2048, 4096), (1024,)
NUM_SEEDS, NUM_PROMPTS = 3, 4


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Measure the reach of both patterns, and what they find.

    Args:
        quick: shorter texts and fewer prompts.
        seed: of the prompts and of the texts.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    text, lengths = held_out_python(), QUICK_LENGTHS if quick else LENGTHS
    seeds = [seed + i for i in range(1 if quick else NUM_SEEDS)]
    exact = {name: _growth(window_blocks, sinks) for name, window_blocks, sinks in (("paper", 5, 1), ("bare", 1, 0))}
    in_model, passkeys = [], []
    for length in lengths:
        block = max(1, length // 128)
        power = Power(q_block=block, min_length=0)
        window = window_of_cost(pairs_of(power, length), length, num_sinks=block)
        both: dict[str, PrefillPolicy] = {"power": power, "window": window}
        in_model += [_in_model(loaded, text, length, one, both) for one in seeds]
        layers = list(range(text_config(loaded).num_hidden_layers - 1))
        last_dense = {f"{name}, last layer dense": p.model_copy(update={"layers": layers}) for name, p in both.items()}
        asked = [
            hidden_facts(loaded, text, task="passkey", length=length, num_prompts=NUM_PROMPTS, seed=s) for s in seeds
        ]
        for name, policy in (both if quick else both | last_dense).items():
            found = mean_answers([answer(loaded, questions, policy) for questions in asked])
            passkeys.append({"length": length, "pattern": name, **dataclasses.asdict(found)})
    doubles = all(
        reach >= min(2 ** (layer + 1), NUM_BLOCKS) for row in exact.values() for layer, reach in enumerate(row["power"])
    )
    linear = all(
        len({b - a for a, b in zip(row["window"], row["window"][1:], strict=False)}) == 1 for row in exact.values()
    )
    farther = all(row["power"]["moves"] > row["window"]["moves"] for row in in_model)
    within = all(row[name]["unreached_but_moves"] == 0 for row in in_model for name in ("power", "window"))
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"layers to reach distance N": {"power": "log2 N", "window": "N"}, "reach of d layers": "2^d"},
        measured={
            "blocks_reached_after_each_layer": exact,
            "share_of_tokens_that_move_the_last_logits": {
                name: statistics.mean(row[name]["moves"] for row in in_model) for name in ("power", "window")
            },
            "in_the_model": in_model,
            "passkeys_without_training": passkeys,
        },
        holds=doubles and linear and farther and within,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "text": "held_out_python",
            "blocks": NUM_BLOCKS,
            "lengths": list(lengths),
            "blocks_of_a_text": 128,
            "seeds": seeds,
            "prompts_of_a_seed": NUM_PROMPTS,
        },
    )


def reached(one_layer: Tensor, num_layers: int) -> Tensor:
    """What the last position has reached after 1 to ``num_layers`` layers, bool ``[num_layers, n]``.

    Args:
        one_layer: ``[n, n]`` bool, which positions (across) one (down) sees.
        num_layers: layers passed.
    """
    see, at = one_layer.float(), torch.zeros(len(one_layer))
    at[-1] = 1
    rows = []
    for _ in range(num_layers):
        at = ((at @ see > 0) | (at > 0)).float()
        rows.append(at > 0)
    return torch.stack(rows)


def _one_layer(policy: PrefillPolicy, length: int) -> Tensor:
    pattern = pattern_of(policy, length)
    if isinstance(pattern, BlockMask):
        return pattern.to_dense(causal=True)[0, 0]
    return pattern.visible(length, length)[0, 0]


def _growth(window_blocks: int, sink_blocks: int) -> dict[str, Any]:
    """Blocks in succession, its own first, that the last block has reached after each layer, until all are reached."""
    power = Power(q_block=1, window_blocks=window_blocks, sink_blocks=sink_blocks)
    pairs = pairs_of(power, NUM_BLOCKS)
    window = window_of_cost(pairs, NUM_BLOCKS, num_sinks=sink_blocks)
    row: dict[str, Any] = {"pairs": {"power": pairs, "window": pairs_of(window, NUM_BLOCKS)}}
    for name, policy in (("power", power), ("window", window)):
        far = reached(_one_layer(policy, NUM_BLOCKS), NUM_LAYERS).flip(-1).long()
        row[name] = far.cumprod(-1).sum(-1).tolist()
    return row


def _in_model(loaded: Loaded, text: str, length: int, seed: int, policies: dict[str, PrefillPolicy]) -> dict[str, Any]:
    """Tokens of one text that move the last logits, beside those that the masks let them be moved by."""
    ids = encode(loaded.need_tokenizer(NAME), text)
    start = seed * 997 % max(1, len(ids) - length)
    tokens = torch.tensor([ids[start : start + length]], device=device_of(loaded.model))
    layers = text_config(loaded).num_hidden_layers
    row: dict[str, Any] = {"length": length, "seed": seed}
    model: Any = loaded.model
    for name, policy in policies.items():
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        applied = apply(loaded.model, policy)
        try:
            logits = model(inputs_embeds=embedded, logits_to_keep=1, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits.float().amax(), embedded)
            density = statistics.mean(applied.density().values())
        finally:
            applied.remove()
        moves = (gradient[0] != 0).any(-1).cpu()
        possible = reached(_one_layer(policy, length), layers)[-1]
        row[name] = {
            "density": density,
            "moves": float(moves.float().mean()),
            "reached": float(possible.float().mean()),
            "unreached_but_moves": int((moves & ~possible).sum()),
        }
    return row
