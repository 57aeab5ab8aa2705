"""TidalDecode: one layer looks at all keys, and the layers after it read those that mattered there.

Paper: Yang et al. 2024, "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
https://arxiv.org/abs/2410.05076, Algorithm 1. Prompts are dense. In a step with one token the first two layers read
everything; layer 2 does, too, and keeps the positions of the ``num_keys`` tokens with the largest weights of each head;
the layers after it read these tokens alone, until one layer in the middle, which reads everything and chooses anew. The
authors find that layer once for each kind of model: 9 is the default of their code, 13 that of their paper for Llama 3.

Queries that share a KV head share the tokens: those with the largest weights, averaged over the queries. (The authors'
readable code gives every query head tokens of its own, by logits, and reads as many times more.) There is no window of
recent tokens in the paper, and none here. The correction of the cache, a dense pass over what was decoded every so many
steps, which the paper describes as optional, is not here.

A layer that finds no choice of the same step chooses itself, such as where layers are left out or cached otherwise.
"""

import torch
from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages
from .scores import exact_weights, top_pages

_NAME = "tidal"


class Tidal(DecodePolicy):
    """Options of ``tidal``.

    Attributes:
        num_keys: keys that each KV head reads in the layers that follow another's choice.
        reselect_layers: layers that choose anew; those that the model does not have are ignored.
    """

    num_keys: int = Field(256, ge=1)
    dense_layers: int = Field(2, ge=0)
    reselect_layers: list[int] = Field([9])

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages | None:
        """What an earlier layer chose in this step; everything in a layer that chooses or is within the budget."""
        if cached.longest <= self.num_keys:
            return None
        step, chosen = cached.shared.get(_NAME, (None, None))
        if step != cached.num_seen or len(chosen) != len(query) or chosen.shape[1] != cached.lengths.shape[1]:
            chosen = None
        if chosen is not None and prompt.layer not in self.reselect_layers:
            return Pages(_to_places(chosen, cached), 1)
        best = top_pages(exact_weights(query, cached, prompt).mean(2), cached, self.num_keys, window=prompt.window)
        cached.shared[_NAME] = cached.num_seen, _to_tokens(best, cached)
        return None


def _to_tokens(places: Tensor, cached: Cached) -> Tensor:
    """Which tokens of each row's text the entries at ``places`` ``[B, H_kv, n]`` are; -1 stays."""
    if cached.intact:
        return places
    text = (cached.num_seen - cached.num_text).view(-1, 1, 1)
    found = cached.positions().gather(-1, places.long().clamp(min=0)) - text
    return found.masked_fill(places < 0, -1).int()


def _to_places(tokens: Tensor, cached: Cached) -> Tensor:
    """Where the tokens ``[B, H_kv, n]`` stand in their lists; -1 for those that are not there."""
    if cached.intact:
        return tokens
    text = (cached.num_seen - cached.num_text).view(-1, 1, 1)
    there = (cached.positions() - text).masked_fill(~cached.inside(), cached.num_seen).int()
    places = torch.searchsorted(there, tokens).clamp(max=there.shape[-1] - 1)
    return places.masked_fill((there.gather(-1, places) != tokens) | (tokens < 0), -1).int()
