"""Claim: a third of the layers full and in the middle, the others sparse, beats sparse layers alone at equal cost.

Paper: Ge et al. 2024, https://arxiv.org/abs/2410.01485: it is essential that some layers see every token directly; a
third is enough, best in the middle. Facts hidden in a text, and bits per byte, with every placement of the full layers,
against all layers sparse with the same window, and all sparse with a window so long that it costs at least as much.

The verdict is the paper's placement, the middle, against sparse layers of equal cost, in the mean loss of the answers.
It does not hold on the embedded model: this has five layers, was trained dense, and finds facts in its last one. With
the full layers last it retrieves as if dense; in the middle, as badly as all sparse. The paper trains the hybrid on 5
billion tokens, so that what is full learns to retrieve; here nothing is trained. What does hold is that direct access
in the right layers is worth more than a window of equal cost (``best_placement``).
"""

import dataclasses
import time
from typing import Any

from ..attention import LongGen, PrefillPolicy, SinkWindow, apply
from ..attention.longgen import full_layers
from ..measure.data import held_out_python
from ..measure.quality import bits_per_byte
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult
from .fixed_patterns import Answers, answer, hidden_facts, mean_answers, pairs_of, text_config, window_of_cost

NAME = "longgen-hybrid"
TASKS = ("passkey", "key_value")
LENGTHS, QUICK_LENGTHS = (1024, 2048), (1024,)
NUM_SEEDS, NUM_PROMPTS, QUICK_PROMPTS, MAX_TOKENS = 2, 4, 3, 6144


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Compare placements of the full layers with sparse layers alone.

    Args:
        quick: one length, fewer prompts, no bits per byte.
        seed: of the prompts.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    text, lengths = held_out_python(), QUICK_LENGTHS if quick else LENGTHS
    seeds = [seed + i for i in range(1 if quick else NUM_SEEDS)]
    rows: list[dict[str, Any]] = []
    found: dict[str, list[Answers]] = {}
    for length in lengths:
        asked = [
            hidden_facts(
                loaded, text, task=task, length=length, num_prompts=QUICK_PROMPTS if quick else NUM_PROMPTS, seed=one
            )
            for task in TASKS
            for one in seeds
        ]
        for name, policy in _policies(loaded, length).items():
            mean = mean_answers([answer(loaded, questions, policy) for questions in asked])
            found.setdefault(name, []).append(mean)
            rows.append({"length": length, "layers": name, **dataclasses.asdict(mean)})
    means = {name: mean_answers(answers) for name, answers in found.items()}
    bits = {} if quick else {name: _bits(loaded, text, policy) for name, policy in _policies(loaded, 1024).items()}
    middle, alone = means["middle full"], means["all sparse, equal cost"]
    placed = {name: mean for name, mean in means.items() if name.endswith(" full")}
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={
            "loss against the dense model in needle retrieval, trained": "none",
            "full layers": "the middle third",
        },
        measured={
            "answers": {name: dataclasses.asdict(mean) for name, mean in means.items()},
            "best_placement": min(placed, key=lambda name: placed[name].nats),
            "bits_per_byte": bits,
            "by_length": rows,
        },
        holds=middle.nats < alone.nats,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "text": "held_out_python",
            "lengths": list(lengths),
            "seeds": seeds,
            "prompts_of_a_seed_and_task": QUICK_PROMPTS if quick else NUM_PROMPTS,
            "sparse_layers": "sink_window, a 64th of the text sinks, 7 64ths window",
            "training": "none",
        },
    )


def _policies(loaded: Loaded, length: int) -> dict[str, PrefillPolicy | None]:
    layers: int = text_config(loaded).num_hidden_layers
    pattern = SinkWindow(num_sinks=length // 64, window_size=7 * length // 64, min_length=0)
    count = len(full_layers(layers))
    pairs = (count * length * (length + 1) // 2 + (layers - count) * pairs_of(pattern, length)) / layers
    policies: dict[str, PrefillPolicy | None] = {"dense": None, "all sparse": pattern}
    policies["all sparse, equal cost"] = window_of_cost(pairs, length, num_sinks=pattern.num_sinks)
    policies["middle full"] = LongGen(pattern=pattern, placement="middle").fit(loaded.model, [])
    policies["first full"] = LongGen(pattern=pattern, placement="first").fit(loaded.model, [])
    policies["last full"] = LongGen(pattern=pattern, placement="last").fit(loaded.model, [])
    policies["spread full"] = LongGen(pattern=pattern, placement="spread").fit(loaded.model, [])
    return policies


def _bits(loaded: Loaded, text: str, policy: PrefillPolicy | None) -> float:
    applied = None if policy is None else apply(loaded.model, policy)
    try:
        quality = bits_per_byte(
            loaded.model, loaded.need_tokenizer(NAME), text, length=1024, stride=512, max_tokens=MAX_TOKENS
        )
    finally:
        if applied is not None:
            applied.remove()
    assert quality.bits_per_byte is not None
    return quality.bits_per_byte.value
