"""What is asked of trained dictionaries beyond their error: the truth, other trainings, and features that can be named.

First letters of words (Chanin et al. 2024, https://arxiv.org/abs/2409.14507) are a task whose answers are certain: how
well one or few features tell a letter, and how often features of single words stand in for that of the letter.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checks import InputError, check_shape, fail
from ..measure.code_probes import Labelled, absorption, sparse_probe
from ..measure.codes import mcc, stability
from ..measure.stats import mean_interval
from ..measure.token_tasks import LETTERS, first_letters
from ..models.harvest import harvest
from ..models.load import Loaded
from ..models.places import find_hook
from .base import Dictionary

PROBES = (1, 5)
"""Features that the probes of a letter read."""
LEAST_WORDS = 20
"""Words of a letter, without which it is left out."""


def read_truth(path: str | Path, width: int) -> Tensor:
    """True atoms ``[m, width]`` from a safetensors file that holds nothing else.

    Raises:
        InputError: if there is none, or it is of another width.
    """
    try:
        tensors = load_file(Path(path))
    except (OSError, SafetensorError) as error:
        raise fail("dictionary", "the truth", "be a safetensors file of atoms", error) from None
    if len(tensors) != 1:
        raise fail("dictionary", "the truth", "be one tensor", ", ".join(sorted(tensors)) or "none")
    atoms = next(iter(tensors.values()))
    check_shape("dictionary", "the truth", atoms, None, width)
    found: Tensor = atoms.to(torch.float32)
    return found


def against_truth(dictionary: Dictionary, truth: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """``mcc``: mean absolute cosine of a Hungarian match of true atoms ``[m, width]``, with an interval over them."""
    return {"mcc": asdict(mcc(truth, dictionary.atoms.detach().float(), seed=seed))}


def over_trainings(dictionaries: Sequence[Dictionary], *, seed: int = 0) -> dict[str, Any]:
    """``stability`` of trainings that differ in their seed: Hungarian mean absolute cosine over their pairs."""
    return {"stability": asdict(stability([one.atoms.detach().float() for one in dictionaries], seed=seed))}


def over_seeds(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of every figure over trainings, with an interval over them; what is None in one is left out."""
    names = [name for name, value in figures[0].items() if isinstance(value, int | float) and name != "num_tokens"]
    columns = {name: [one[name] for one in figures] for name in names}
    return {name: asdict(mean_interval(each)) for name, each in columns.items() if None not in each}


@torch.no_grad()
def letters(loaded: Loaded, hook: str, dictionary: Dictionary, *, seed: int = 0) -> dict[str, Any]:
    """Sparse probing and absorption of the first letter of words, at the word's own token.

    Half of the words fit the probes, half test them; a probe tells a letter from as many other words, drawn by the
    seed. Letters of fewer than `LEAST_WORDS` words are left out.

    Args:
        loaded: a language model with its tokenizer.
        hook: where the dictionary was trained.
        dictionary: of that width.
        seed: of words, halves and intervals.

    Returns:
        ``words``, ``letters`` (those that count), ``probe``: for each number of features the mean accuracy over letters
        with its interval over them, beside ``dense``, that of probes on the activations; ``absorption``: ``full`` and
        ``fraction``, or ``none``, the reason why it cannot be measured.

    Raises:
        InputError: if no letter has words enough.
    """
    ids, place, labels, _ = first_letters(loaded.need_tokenizer("dictionary"), seed=seed)
    found = find_hook(loaded.model, hook)
    rows = [harvest(loaded.model, [found], part)[hook].view(*part.shape, -1)[:, place] for part in torch.split(ids, 64)]
    x = torch.cat(rows).float()
    codes = dictionary.encode(x)
    counts = torch.bincount(labels, minlength=len(LETTERS))
    classes = [label for label, count in enumerate(counts.tolist()) if count >= LEAST_WORDS]
    if not classes:
        raise fail("letters", "tokenizer", f"have {LEAST_WORDS} words of one token that begin alike", int(counts.max()))
    half = len(x) // 2
    train, test = (Labelled(x[at], codes[at], labels[at]) for at in (slice(0, half), slice(half, None)))
    result: dict[str, Any] = {"words": len(x), "letters": "".join(LETTERS[label] for label in classes)}
    result["probe"] = {str(k): _probed(train, test, classes, k, seed) for k in PROBES if k <= dictionary.dict_size}
    result["dense"] = _probed(train, test, classes, 1, seed, dense=True)
    try:
        absorbed = absorption(train, test, dictionary.atoms.detach().float(), classes=classes, seed=seed)
        result["absorption"] = {"full": asdict(absorbed.full), "fraction": asdict(absorbed.fraction)}
    except InputError as error:
        result["absorption"] = {"none": str(error)}
    return result


def _probed(
    train: Labelled, test: Labelled, classes: Sequence[int], k: int, seed: int, *, dense: bool = False
) -> dict[str, Any] | None:
    values = []
    for label in classes:
        fit, other = _balanced(train, label, seed), _balanced(test, label, seed)
        if fit is None or other is None:
            continue
        found = sparse_probe(fit, other, k=k, seed=seed)
        values.append((found.dense if dense else found.accuracy).value)
    return asdict(mean_interval(values, seed=seed)) if values else None


def _balanced(part: Labelled, label: int, seed: int) -> Labelled | None:
    """Rows of a class and as many others; None where there is none."""
    generator = torch.Generator().manual_seed(seed + label)
    of, others = ((part.labels == label) == kind for kind in (True, False))
    rows = of.nonzero().squeeze(1)
    if not len(rows):
        return None
    rest = others.nonzero().squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=generator)[: len(rows)]]
    at = torch.cat([rows, rest])
    return Labelled(part.x[at], part.codes[at], part.labels[at] == label)
