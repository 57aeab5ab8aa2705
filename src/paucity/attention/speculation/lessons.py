"""What prompt tokens learn from: places in a text, and the model's own greedy continuation behind each."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .passes import text_pass, tree_pass


class Lesson(NamedTuple):
    """A text in a cache, places in it, and the logits ``[B, m, places, vocab]`` that prompt tokens should give."""

    cache: DynamicCache
    places: Tensor
    teacher: Tensor


def lesson(model: nn.Module, ids: Tensor, depth: int, num_places: int, generator: torch.Generator) -> Lesson:
    """Random places of a text, with what the model says after each of ``depth`` tokens of its greedy continuation."""
    length, cache = ids.shape[1], DynamicCache()
    logits = text_pass(model, cache, ids)
    places = torch.randperm(length, generator=generator)[:num_places].sort().values.to(ids.device)
    tokens = logits[:, places].argmax(-1)
    for level in range(1, depth + 1):
        logits = tree_pass(model, cache, embed(model, tokens), _branches(places, level, length))
        cache.crop(-tokens.shape[1])
        tokens = torch.cat([tokens, logits[:, -len(places) :].argmax(-1)], dim=1)
    return Lesson(cache, places, logits.view(len(ids), depth, len(places), -1))


def guesses(model: nn.Module, embeddings: Tensor, lesson: Lesson) -> Tensor:
    """Logits ``[B, m, places, vocab]`` of prompt tokens ``[m, E, hidden]`` behind every place."""
    (batch, depth, count), ensemble = lesson.teacher.shape[:3], embeddings.shape[1]
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator, union-attr]
    embeddings = embeddings.unsqueeze(1).expand(-1, count, -1, -1).flatten(0, 2).to(dtype)
    parents = _branches(lesson.places.repeat_interleave(ensemble), depth, lesson.cache.get_seq_length())
    logits = tree_pass(model, lesson.cache, embeddings.expand(batch, -1, -1), parents)
    return logits.view(batch, depth, count, ensemble, -1).mean(3)


def _branches(places: Tensor, depth: int, length: int) -> Tensor:
    """Parents of ``depth`` tokens in a row behind each place of a text, the first of all places before the second."""
    later = torch.arange(length, length + (depth - 1) * len(places), device=places.device)
    return torch.cat([places, later])


def embed(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the model makes of token ids before its first layer, ``[..., hidden]``."""
    return model.get_input_embeddings()(tokens)  # type: ignore[no-any-return, operator]
