"""Claim: trained on short inputs, SharedLLM gains from contexts far longer, and costs less than full attention.

Paper: Han et al. 2024, https://arxiv.org/abs/2410.19318, Tables 1 and 2, Fig. 3: trained on 8K tokens, it predicts
texts of up to 128K better than models with the same window do (StreamingLLM among them), with less time and memory than
full attention.

Here the embedded model has a window of 256 tokens, the running text, in place of its own. The cross-attention alone is
trained (as in the authors' code, so that without a context the model is exactly what it was) for a minute on contexts
of 1,024 tokens, and reads contexts of up to 16,384 of source that the model has never seen, 16 times as long. `holds`
says that all of ``parts`` do:

- at every context longer than those of the training the running text is predicted better than without a context;
- and better than with one from another place, which tells a memory from a habit;
- and better than by a streaming window with sinks that holds as many keys and values as SharedLLM at the longest (for
  all three, the interval over texts lies above 0);
- reading the longest takes less time and less memory than full attention.

It does not hold as a whole: the streaming window predicts better, even one as wide as the running text. It has read the
text before with all layers and without a break, and what this model learns from a text stands in the few hundred tokens
before. The other parts hold: the context is extended, at an eighth of the keys. The paper trains on 20 billion tokens,
this on 160,000, and its figures are for the last 256 tokens of running texts of thousands, where the embedded model,
which reads 4,096 tokens no better than 2,048, has little to gain. The quick run's 16 steps are too few to learn from
a context at all: it only shows what reading costs.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..attention.apply import apply
from ..attention.shared_llm import SharedLLM, SharedOptions, SharedTraining
from ..attention.sink_window import SinkWindow
from ..measure.cost import time_interleaved
from ..measure.data import held_out_python, python_documents
from ..measure.memory import peak_memory_mb
from ..measure.stats import mean_interval
from ..measure.tokens import context_length, device_of, encode, evaluating, forward
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "sharedllm-extends-context"
UNIT = 256
"""Tokens of the running text and of a chunk."""

TRAINED, LONGEST = 4, 64  # contexts, in chunks
TRAINED_ON = {"embedded": 4096}  # tokens that the model itself was trained on
BATCH_SIZE = 8
NUM_CHARACTERS = 20_000  # of the text to train on, for each step
SINKS = 4


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Train the injection, then measure the loss of running texts after contexts of several lengths.

    Args:
        quick: fewer steps, texts and lengths, contexts half as long, and of full attention the cost alone.
        seed: of the training's texts and their order, and of the places of the texts measured.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    ids = torch.tensor(encode(loaded.need_tokenizer(NAME), held_out_python())).to(device_of(loaded.model))
    steps, count, longest = (16, 6, LONGEST // 2) if quick else (80, 16, LONGEST)
    unit = min(UNIT, 2 ** int(math.log2(len(ids) // (longest + 2))))
    shared, training = _trained(loaded, unit, steps, seed)
    trained_in = time.monotonic() - started

    lengths = [unit * size for size in ((TRAINED, longest) if quick else (TRAINED, 4 * TRAINED, longest))]
    rng = random.Random(seed)
    places = [rng.randrange(lengths[-1], len(ids) - unit + 1) for _ in range(count)]
    others = [lengths[-1] + (place + len(ids) // 2) % (len(ids) - unit - lengths[-1] + 1) for place in places]
    losses = {"running_text_alone": _losses(partial(_shared_logits, shared, ids, unit, 0), ids, unit, places, places)}
    for length in lengths:
        logits = partial(_shared_logits, shared, ids, unit, length)
        losses[f"after_{length}"] = _losses(logits, ids, unit, places, places)
        losses[f"after_{length}_of_another_place"] = _losses(logits, ids, unit, places, others)
    memory, few = shared.compress(ids[None, -unit - lengths[-1] : -unit]), 0 if quick else 2
    window = unit + memory.num_kept * len(shared.crosses) // len(shared.layers)
    losses |= _beside(loaded, ids, unit, places, lengths[-1], window, few=few)
    if few:
        losses[f"after_{lengths[-1]}_of_{few}_texts"] = losses[f"after_{lengths[-1]}"][:few]
    gains = {
        name: {str(length): _interval(losses[against.format(length)], losses[f"after_{length}"]) for length in lengths}
        for name, against in (
            ("over_running_text_alone", "running_text_alone"),
            ("over_context_of_another_place", "after_{}_of_another_place"),
            ("over_streaming_of_equal_memory", "streaming_of_equal_memory"),
        )
    }
    costs = _costs(loaded.model, shared, ids[-unit - lengths[-1] :], unit)
    parts = {f"gain_{name}": all(gain[str(n)]["low"] > 0 for n in lengths[1:]) for name, gain in gains.items()}
    parts |= {f"fewer_{name}": cost["shared_llm"] < cost["full_attention"] for name, cost in costs.items()}
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={
            "perplexity on PG19 by thousand tokens": {
                "SharedLLM": {"4": 8.98, "16": 8.15, "32": 7.96, "100": 8.24},
                "StreamingLLM": {"4": 9.21, "16": 9.25, "32": 9.24, "100": 9.32},
            }
        },
        measured={
            "gain_in_nats_per_token": gains,
            "nats_per_token": {name: mean(rows) for name, rows in losses.items()},
            "parts": parts,
            "reading_the_longest": costs,
            "kept_share_of_keys": memory.num_kept / memory.num_tokens,
            "training": {"seconds": trained_in, "first": mean(training[:8]), "last": mean(training[-8:])},
        },
        holds=all(parts.values()),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "options": shared.options.model_dump(mode="json"),
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "trained_context": lengths[0],
            "running_length": unit,
            "window_of_equal_memory": window,
            "num_texts": count,
            "text": "held_out_python",
        },
    )


def _trained(loaded: Loaded, unit: int, steps: int, seed: int) -> tuple[SharedLLM, list[float]]:
    """SharedLLM on the model, in its dtype, and the losses of its training on the standard library."""
    documents = python_documents(include_tests=False)
    random.Random(seed).shuffle(documents)
    text, size = "\n".join(documents)[: steps * NUM_CHARACTERS], (TRAINED + 1) * unit
    ids = torch.tensor(encode(loaded.need_tokenizer(NAME), text))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - size + 1, (steps * BATCH_SIZE, 1), generator=generator)
    layers = int(loaded.model.config.num_hidden_layers)  # type: ignore[arg-type, union-attr]
    options = SharedOptions(num_layers=max(1, min(4, layers - 1)), chunk_size=unit, seed=seed)
    shared = SharedLLM(loaded.model, options)
    training = SharedTraining(
        running_length=unit,
        batch_size=BATCH_SIZE,
        micro_batch=BATCH_SIZE,
        num_steps=steps,
        learning_rate=5e-3,
        warmup_share=0.05,
        autocast=True,
        top=False,
        seed=seed,
    )
    losses = shared.fit(ids[starts + torch.arange(size)], training)
    return shared.to(next(loaded.model.parameters()).dtype), losses


def _losses(
    logits: Callable[[int, int], Tensor], ids: Tensor, unit: int, places: Sequence[int], contexts: Sequence[int]
) -> list[float]:
    """Nats per token of the running text at each place, but its first token, after the context that ends elsewhere."""
    rows = [logits(place, end)[:-1].float() for place, end in zip(places, contexts, strict=True)]
    return [float(cross_entropy(row, ids[p + 1 : p + unit])) for row, p in zip(rows, places, strict=True)]


def _shared_logits(shared: SharedLLM, ids: Tensor, unit: int, length: int, place: int, end: int) -> Tensor:
    with evaluating(shared):
        context = ids[None, end - length : end] if length else None
        logits: Tensor = shared(ids[None, place : place + unit], context).logits[0]
    return logits


def _plain_logits(model: nn.Module, ids: Tensor, unit: int, length: int, place: int, end: int) -> Tensor:
    with evaluating(model):
        logits, _ = forward(model, ids[None, end - length : place + unit], keep=unit)
    return logits[0]


def _beside(
    loaded: Loaded, ids: Tensor, unit: int, places: Sequence[int], longest: int, window: int, *, few: int
) -> dict[str, list[float]]:
    """Streaming windows, and full attention at the length that the model knows and, of ``few`` texts, at the longest.

    Streaming windows read as far back as the model knows; what is before that can hardly matter to them.
    """
    known = TRAINED_ON.get(loaded.source) or context_length(loaded.model) or 4096
    own = partial(_plain_logits, loaded.model, ids, unit, min(longest, known - unit))
    found = {}
    for name, width in (("as_wide_as_the_running_text", unit), ("of_equal_memory", window)):
        applied = apply(loaded.model, SinkWindow(num_sinks=SINKS, window_size=width - SINKS, min_length=0))
        try:
            found[f"streaming_{name}"] = _losses(own, ids, unit, places, places)
        finally:
            applied.remove()
    if few:
        far = partial(_plain_logits, loaded.model, ids, unit, longest)
        found["full_attention_at_the_length_of_its_training"] = _losses(own, ids, unit, places, places)
        found[f"full_attention_after_{longest}_of_{few}_texts"] = _losses(far, ids, unit, places[:few], places[:few])
    return found


def _costs(model: nn.Module, shared: SharedLLM, ids: Tensor, unit: int) -> dict[str, dict[str, float]]:
    """Seconds and peak megabytes of reading all of ``ids``, up to the logits of the last token and a cache."""

    def full() -> None:
        with evaluating(model):
            forward(model, ids[None], keep=1, use_cache=True)

    def compressed() -> None:
        with evaluating(shared):
            shared(ids[None, -unit:], ids[None, :-unit], use_cache=True, logits_to_keep=1)

    timing = time_interleaved({"full_attention": full, "shared_llm": compressed}, repeats=1, warmup=0)
    return {
        "seconds": {name: times.median for name, times in timing.timings.items()},
        "peak_megabytes": {
            "full_attention": peak_memory_mb(full, model=model),
            "shared_llm": peak_memory_mb(compressed, model=shared),
        },
    }


def _interval(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    gain = mean_interval([a - b for a, b in zip(before, after, strict=True)])
    return {"mean": gain.value, "low": gain.low, "high": gain.high}
