"""Prompts with attributes of known values, and a model on them with another activation at the last token.

``ioi``: "Then, Mary and John went to the store. John gave a drink to" -> " Mary" (Wang et al. 2022,
https://arxiv.org/abs/2211.00593; Makelov et al. 2024, https://arxiv.org/abs/2405.08366), for models that know it.
``recall``: the same three attributes for models that only retrieve: two keys with numbers, of which one is asked for.
The attributes are the answer (the indirect object), the other one (the subject), and which of them comes first.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checks import check_choice, check_int, check_shape, fail
from ..measure.stats import Estimate, share_interval
from ..measure.tokens import device_of, encode, evaluating, forward, leading_ids
from ..models.harvest import harvest
from ..models.places import find_hook
from ..models.substitute import substituted

ATTRIBUTES = ("answer", "other", "order")
TASKS = ("ioi", "recall")
AT_ONCE = 64
_words = str.split
_NAMES = _words(
    "Mary John Tom James Dan Sarah Martin Amy Anna Paul Mark Jack Alex Kate Jane Sam David Peter Emma Lucy Henry "
    "George Robert William Charles Edward Joseph Arthur Frank Harry"
)
_PLACES, _THINGS = _words("store school garden house office park"), _words("drink book letter ring key ball")
_KINDS, _KEYS = _words("old small red quiet dark round green brave"), _words("anchor river king horse stone table moon")
_TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {other} gave a {thing} to",
    "When {first} and {second} came to the {place}, {other} handed a {thing} to",
)


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of one length.

    Attributes:
        ids: int64 ``[n, T]``; the answer comes next.
        labels: int64 ``[n, 3]``, the values of `ATTRIBUTES`.
        candidates: int64 ``[V]``, the token of each value of the answer.
        changed: gives the ids ``[n, T]`` of the same prompts with other ``labels``.
    """

    ids: Tensor
    labels: Tensor
    candidates: Tensor
    changed: Callable[[Tensor], Tensor]


def prompts(tokenizer: PreTrainedTokenizerBase, task: str, num: int, *, values: int = 8, seed: int = 0) -> Prompts:
    """Draw prompts; those that are not of the commonest length are drawn again.

    Args:
        tokenizer: the model's.
        task: one of `TASKS`.
        num: of prompts.
        values: names, or first digits, that answers are drawn from.
        seed: of everything.

    Raises:
        InputError: if the tokenizer has too few names of one token, or does not write numbers digit by digit.
    """
    check_choice("prompts", "task", task, TASKS)
    check_int("prompts", "num", num)
    check_int("prompts", "values", values, 3, 9 if task == "recall" else None)
    lead = leading_ids(tokenizer)
    write, answers = _recall(tokenizer, values) if task == "recall" else _ioi(tokenizer, values)
    head, candidates = _answers(tokenizer, answers)

    def ids(number: int, label: Sequence[int]) -> list[int]:
        text = write(random.Random(f"{seed}-{number}"), label)
        return [*lead, *encode(tokenizer, text), *head]

    rng = random.Random(seed)
    lengths = Counter(len(ids(number, _draw(rng, values))) for number in range(64))
    length, rng, number = lengths.most_common(1)[0][0], random.Random(seed), 0
    found: list[tuple[int, list[int], list[int]]] = []
    while len(found) < num:
        label = _draw(rng, values)
        row = ids(number, label)
        if len(row) == length:
            found.append((number, label, row))
        number += 1
        if number > 100 * (num + 64):
            raise fail("prompts", "tokenizer", "give prompts of one length", f"{len(found)} of {number}")
    numbers = [each[0] for each in found]

    def changed(labels: Tensor) -> Tensor:
        check_shape("changed", "labels", labels, num, len(ATTRIBUTES))
        return torch.tensor([ids(each, label) for each, label in zip(numbers, labels.tolist(), strict=True)])

    return Prompts(
        torch.tensor([each[2] for each in found]), torch.tensor([each[1] for each in found]), candidates, changed
    )


def other_values(labels: Tensor, attribute: int, num_values: int, *, seed: int = 0) -> Tensor:
    """Labels with one attribute drawn anew, other than before; the answer and the other one stay apart."""
    rng, rows = random.Random(seed), labels.tolist()
    for row in rows:
        taken = {row[0], row[1]} if attribute < 2 else {row[2]}
        row[attribute] = rng.choice(
            [value for value in range(num_values if attribute < 2 else 2) if value not in taken]
        )
    return torch.tensor(rows)


class LastToken:
    """A model seen and changed at a place and the last token of each prompt.

    Args:
        model: a causal language model.
        hook: the place.
        candidates: of `Prompts`.
    """

    def __init__(self, model: nn.Module, hook: str, candidates: Tensor) -> None:
        self.model, self.hook, self.candidates = model, find_hook(model, hook), candidates

    def activations(self, ids: Tensor) -> Tensor:
        """``[n, width]`` float32."""
        found = []
        for part in torch.split(ids, AT_ONCE):
            rows = harvest(self.model, [self.hook], part)[self.hook.name]
            found.append(rows.view(*part.shape, -1)[:, -1].float().cpu())
        return torch.cat(found)

    def logits(self, ids: Tensor, new: Tensor | None = None) -> Tensor:
        """``[n, V]`` of the candidates, where the model goes on with ``new [n, width]`` if given."""
        found = []
        for start in range(0, len(ids), AT_ONCE):
            part = ids[start : start + AT_ONCE].to(device_of(self.model))
            with evaluating(self.model):
                if new is None:
                    logits, _ = forward(self.model, part, keep=1)
                else:
                    rows = new[start : start + AT_ONCE]

                    def put(x: Tensor, rows: Tensor = rows) -> Tensor:
                        return torch.cat([x[:, :-1], rows.to(x).unsqueeze(1)], 1)

                    with substituted(self.model, self.hook, put):
                        logits, _ = forward(self.model, part, keep=1)
            found.append(logits[:, -1].float().cpu()[:, self.candidates])
        return torch.cat(found)


def approximation(place: LastToken, found: Prompts, clean: Tensor, new: Tensor, mean: Tensor) -> float:
    """Share of the difference of logits, answer less other, that ``new [n, d]`` keeps; the ``mean [d]`` keeps none.

    Args:
        place: of the model.
        found: the prompts.
        clean: logits of the model as it is.
        new: reconstructions.
        mean: of the activations.
    """

    def difference(logits: Tensor) -> float:
        answer, other = (logits.gather(1, found.labels[:, i : i + 1]) for i in (0, 1))
        return float((answer - other).double().mean())

    none = difference(place.logits(found.ids, mean.expand_as(new)))
    whole = difference(clean) - none
    return (difference(place.logits(found.ids, new)) - none) / whole if whole else math.nan


def control(edited: Tensor, truth: Tensor) -> Estimate:
    """Share of the prompts where the model prefers the same candidate after an edit as with the true activation.

    Args:
        edited: logits ``[n, V]`` with edited activations.
        truth: with the activations of the changed prompts.
    """
    check_shape("control", "truth", truth, *edited.shape)
    return share_interval((edited.argmax(1) == truth.argmax(1)).double().tolist())


def _draw(rng: random.Random, values: int) -> list[int]:
    return [*rng.sample(range(values), 2), rng.randrange(2)]


def _ioi(tokenizer: PreTrainedTokenizerBase, values: int) -> tuple[Any, list[str]]:
    names = [name for name in _NAMES if len(encode(tokenizer, f" {name}")) == 1][:values]
    if len(names) < values:
        raise fail("prompts", "tokenizer", f"have {values} names of one token", len(names))

    def write(rng: random.Random, label: Sequence[int]) -> str:
        pair = [names[label[0]], names[label[1]]]
        first, second = pair if label[2] == 0 else pair[::-1]
        template, place, thing = rng.choice(_TEMPLATES), rng.choice(_PLACES), rng.choice(_THINGS)
        return template.format(first=first, second=second, other=pair[1], place=place, thing=thing)

    return write, [f" {name}" for name in names]


def _recall(tokenizer: PreTrainedTokenizerBase, values: int) -> tuple[Any, list[str]]:
    if len(encode(tokenizer, "12345")) != 5:
        raise fail("prompts", "tokenizer", "write numbers digit by digit", tokenizer.tokenize("12345"))

    def write(rng: random.Random, label: Sequence[int]) -> str:
        keys = [f"{kind} {key}" for kind, key in zip(rng.sample(_KINDS, 2), rng.sample(_KEYS, 2), strict=True)]
        numbers = [f"{1 + value}{rng.randrange(10_000):04d}" for value in label[:2]]
        lines = [f"The magic number for {key} is {number}.\n" for key, number in zip(keys, numbers, strict=True)]
        asked = f"What is the magic number for {keys[0]}? The magic number for {keys[0]} is"
        return "".join(lines if label[2] == 0 else lines[::-1]) + asked

    return write, [f" {1 + value}" for value in range(values)]


def _answers(tokenizer: PreTrainedTokenizerBase, answers: list[str]) -> tuple[list[int], Tensor]:
    """What all answers begin with, and the token of each after that."""
    rows, head = [encode(tokenizer, answer) for answer in answers], 0
    while all(len(row) > head + 1 and row[head] == rows[0][head] for row in rows):
        head += 1
    tokens = [row[head] for row in rows]
    if len(set(tokens)) < len(tokens):
        raise fail("prompts", "tokenizer", "tell the answers apart by one token", tokens)
    return rows[0][:head], torch.tensor(tokens)
