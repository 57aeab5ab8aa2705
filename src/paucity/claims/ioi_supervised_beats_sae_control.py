"""Claim: a dictionary that knows a task's attributes controls the model better than a sparse autoencoder does.

Paper: Makelov et al. 2024, https://arxiv.org/abs/2405.08366, on indirect object identification (IOI) in GPT-2 small.
The embedded model cannot do IOI: no name is one token, and with other words in their place it prefers the subject. The
task is instead recall of one of two numbers with the same attributes (answer, other, order), which it does; both
accuracies are in the result.
"""

import time
from typing import Any

import torch
from torch import Tensor

from ..dictionary.base import Dictionary
from ..dictionary.ioi import code_edit, occluded, splitting, supervised, value_f1
from ..dictionary.ioi_task import ATTRIBUTES, LastToken, Prompts, approximation, control, other_values, prompts
from ..dictionary.sae import SparseAutoencoder
from ..dictionary.sources import TensorSource
from ..dictionary.topk import TopK
from ..dictionary.trainer import train
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "ioi-supervised-beats-sae-control"
VALUES, DICT_SIZE, K, SWAPPED = 8, 512, 16, (1, 2, 4)
LEAST_TRUTH = 0.9
CONTROLLED = ATTRIBUTES.index("answer")


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Edit the answer at the last token with both kinds of dictionary, and compare what the model prefers then.

    The place is the residual stream behind the first block where the activation of a changed prompt takes over (the
    model then prefers what it does on the changed prompt, in ``LEAST_TRUTH`` of them); before it there is nothing to
    control, as later blocks look the answer up again. It holds if in every draw the supervised dictionary (least
    squares) agrees with the true activation more often than the autoencoder trained on the task's activations, with as
    many swapped features as suits the latter best.

    Args:
        quick: fewer prompts and one draw.
        seed: of the first draw; the others follow.
        loaded: the model, the embedded one in float32 if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded", dtype="float32")
    tokenizer = loaded.need_tokenizer(NAME)
    count, tested, draws = (512, 128, 1) if quick else (2048, 512, 3)
    layers = int(loaded.model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    seen = prompts(tokenizer, "recall", min(tested, 64), values=VALUES, seed=seed + 1_000_000)
    hook = _place(loaded, seen, layers, seed)
    found = []
    for draw in range(seed, seed + draws):
        known = prompts(tokenizer, "recall", count, values=VALUES, seed=2 * draw)
        fresh = prompts(tokenizer, "recall", tested, values=VALUES, seed=2 * draw + 1)
        found.append(_draw(loaded, hook, known, fresh, draw))
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"direction": "supervised edits agree with the truth more often than those of autoencoders"},
        measured={"hook": hook, "accuracy": _accuracies(loaded, seen, seed), "draws": found},
        holds=all(each["control"]["supervised"]["value"] > each["control"]["best_sae"]["value"] for each in found),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "task": "recall",
            "prompts": count,
            "tested": tested,
            "values": VALUES,
            "dict_size": DICT_SIZE,
            "k": K,
            "swapped": list(SWAPPED),
            "draws": draws,
        },
    )


def _accuracies(loaded: Loaded, seen: Prompts, seed: int) -> dict[str, Any]:
    """On recall, and on IOI, where a tokenizer has names."""
    place = LastToken(loaded.model, "residual.0", seen.candidates)
    figures: dict[str, Any] = {"recall": _right(place.logits(seen.ids), seen)}
    try:
        ioi = prompts(loaded.need_tokenizer(NAME), "ioi", 128, values=3, seed=seed)
    except ValueError as error:
        return figures | {"ioi": str(error)}
    return figures | {"ioi": _right(LastToken(loaded.model, "residual.0", ioi.candidates).logits(ioi.ids), ioi)}


def _right(logits: Tensor, found: Prompts) -> float:
    return float((logits.argmax(1) == found.labels[:, CONTROLLED]).double().mean())


def _place(loaded: Loaded, seen: Prompts, layers: int, seed: int) -> str:
    new = other_values(seen.labels, CONTROLLED, VALUES, seed=seed)
    ids = seen.changed(new)
    wanted = LastToken(loaded.model, "residual.0", seen.candidates).logits(ids).argmax(1)
    for layer in range(layers):
        place = LastToken(loaded.model, f"residual.{layer}", seen.candidates)
        if float((place.logits(seen.ids, place.activations(ids)).argmax(1) == wanted).double().mean()) >= LEAST_TRUTH:
            return f"residual.{layer}"
    return f"residual.{layers - 1}"


def _draw(loaded: Loaded, hook: str, known: Prompts, fresh: Prompts, seed: int) -> dict[str, Any]:
    place = LastToken(loaded.model, hook, fresh.candidates)
    x, y = place.activations(known.ids), place.activations(fresh.ids)
    sae = SparseAutoencoder(x.shape[1], DICT_SIZE, TopK(K), silent_after=len(x) * 4, seed=seed)
    train(sae, TensorSource(x, seed=seed), num_tokens=64 * len(x), batch_size=256, learning_rate=1e-3)
    clean = place.logits(fresh.ids)
    changed = other_values(fresh.labels, CONTROLLED, VALUES, seed=seed)
    old, new = fresh.labels[:, CONTROLLED], changed[:, CONTROLLED]
    y_new = place.activations(fresh.changed(changed))
    truth = place.logits(fresh.ids, y_new)

    def agreement(edited: Tensor) -> dict[str, float | None]:
        given = control(place.logits(fresh.ids, edited), truth)
        return {"value": given.value, "low": given.low, "high": given.high}

    figures: dict[str, Any] = {"nothing": agreement(y)}
    approximated: dict[str, float] = {}
    for name, method in (("supervised", "least_squares"), ("supervised_means", "means")):
        own = supervised(x, known.labels, method=method)
        figures[name] = agreement(own.edit(y, fresh.labels, CONTROLLED, new))
        approximated[name] = approximation(place, fresh, clean, own.reconstruct(fresh.labels), x.mean(0))
    with torch.no_grad():
        f1 = [_f1(sae, x, known.labels[:, i]) for i in range(len(ATTRIBUTES))]
        edits = {
            m: agreement(code_edit(y, sae.encode(y), sae.encode(y_new), sae.atoms, f1[CONTROLLED], old, new, m=m))
            for m in SWAPPED
        }
        approximated["sae"] = approximation(place, fresh, clean, sae(y), x.mean(0))
        codes = sae.encode(x)
    figures |= {f"sae_{m}": each for m, each in edits.items()}
    figures["best_sae"] = max(edits.values(), key=lambda each: each["value"] or 0.0)
    magnitudes = supervised(x, known.labels).magnitudes()
    best = [float(each.max(1).values.mean()) for each in f1]
    split = [splitting(codes, known.labels[:, 2], value) for value in (0, 1)]
    return {
        "control": figures,
        "approximation": approximated,
        "f1": dict(zip(ATTRIBUTES, best, strict=True)),
        "magnitudes": dict(zip(ATTRIBUTES, magnitudes, strict=True)),
        "occluded": [ATTRIBUTES[i] for i in occluded(best, magnitudes)],
        "splitting_of_order": [vars(each) for each in split],
    }


def _f1(sae: Dictionary, x: Tensor, values: Tensor) -> Tensor:
    return value_f1(sae.encode(x), values, int(values.max()) + 1)
