"""Self-speculation: the model with sparse attention drafts tokens, the dense model verifies them in one pass.

Papers: Chen et al. 2024 (MagicDec), https://arxiv.org/abs/2408.11049, and Sun et al. 2024 (TriForce),
https://arxiv.org/abs/2404.11912: over a long text what a decode step costs is its cache, so that the same model, which
reads little of it, drafts nearly as well for less. Draft and verification share weights and one cache: the draft's
keys are cropped, and the pass that verifies ``k`` tokens writes the exact ones. Which tokens are kept is said in
`paucity.attention.speculation.verify`: greedy decoding gives what the dense model gives (up to ties in the rounding of
the logits, for a pass over many tokens rounds otherwise than one over a single token), sampling its distribution.

Rows of a batch move on together, by what all of them accepted: nothing is padded inside a text. Not implemented: the
middle level of TriForce (a small second model that drafts for the sparse one), and MagicDec's cache of its own for the
draft, which the decode policies here keep themselves where they need one.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from ...checks import check_int, check_ndim, check_range, check_shape, fail
from ...measure.tokens import check_context, device_of, evaluating
from .drafting import Draft, drafting, without_prefill
from .passes import text_pass
from .result import Speculation, end_tokens, pad_token
from .verify import accept_greedy, accept_sampled


class Sampler:
    """The distribution that tokens are drawn from, and the draws; without a temperature the likeliest token."""

    def __init__(
        self, temperature: float | None, top_k: int | None, top_p: float | None, generator: torch.Generator
    ) -> None:
        self.temperature, self.generator = temperature, generator
        warpers = [
            None if top_k is None else TopKLogitsWarper(top_k),
            None if top_p is None else TopPLogitsWarper(top_p),
        ]
        self.warpers = [warper for warper in warpers if warper is not None]

    def prob(self, logits: Tensor) -> Tensor:
        """Probabilities ``[B, n, vocab]`` of logits ``[B, n, vocab]``, float32."""
        flat = logits.float().flatten(0, 1) / (self.temperature or 1.0)
        for warper in self.warpers:
            flat = warper(torch.empty(0), flat)
        return flat.softmax(-1).view(logits.shape)

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A token ``[B, 1]`` for logits ``[B, 1, vocab]``, and the distribution it was drawn from, if it was."""
        if self.temperature is None:
            return logits.argmax(-1), None
        prob = self.prob(logits)
        return torch.multinomial(prob[:, 0], 1, generator=self.generator), prob

    def accept(self, drafted: Tensor, probs: list[Tensor | None], logits: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafted tokens are kept in each row, and the token after them."""
        if self.temperature is None:
            return accept_greedy(drafted, logits)
        known = [prob for prob in probs if prob is not None]
        prob = self.prob(logits)
        draft_prob = torch.cat(known, dim=1) if known else prob[:, :0]
        return accept_sampled(drafted, draft_prob, prob, generator=self.generator)


def speculate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    draft: Draft,
    num_draft: int = 4,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    cache: Cache | None = None,
) -> Speculation:
    """Decode with a sparse draft of the model itself; the result is that of the dense model.

    Args:
        model: a causal language model.
        input_ids: int64 ``[B, T]``, padded on the left.
        draft: a decode policy, what `paucity.attention.apply` returned for one, or a function that gives a context in
            which the model is sparse in whatever way.
        num_draft: tokens drafted for each pass that verifies.
        max_new_tokens: after the prompt.
        attention_mask: ``[B, T]``, 0 or False where a token is padding.
        do_sample: draw tokens, instead of taking the likeliest.
        temperature: of what is drawn.
        top_k: draw among so many of the likeliest.
        top_p: draw among the likeliest that make up this much.
        seed: of what is drawn.
        eos_token_id: tokens that end a text, those of the model by default.
        pad_token_id: what follows the end of a row; by default the model's, or else the first of those that end a text.
        cache: an empty cache that can be cropped, if the draft needs one of its own.

    A prefill policy that the model carries rules the prompt, and nothing else.

    Raises:
        InputError: if a number is out of range, padding is not on the left, the context is too short, or the model
            carries an eviction policy or another decode policy.
    """
    name = "speculate"
    check_ndim(name, "input_ids", input_ids, 2)
    if not input_ids.numel():
        raise fail(name, "input_ids", "hold tokens", f"shape {list(input_ids.shape)}")
    check_int(name, "num_draft", num_draft)
    check_int(name, "max_new_tokens", max_new_tokens)
    check_context(name, "max_new_tokens", model, input_ids.shape[1] + max_new_tokens)
    check_range(name, "temperature", temperature, 0, open_low=True)
    if top_k is not None:
        check_int(name, "top_k", top_k)
    if top_p is not None:
        check_range(name, "top_p", top_p, 0, 1, open_low=True)
    padding = _padding(name, input_ids, attention_mask)
    cache = DynamicCache() if cache is None else cache
    if cache.get_seq_length():
        raise fail(name, "cache", "be empty", f"{cache.get_seq_length()} tokens")
    ends = end_tokens(model, eos_token_id)
    pad_id = pad_token(model, eos_token_id) if pad_token_id is None else pad_token_id
    device = device_of(model)
    stops = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    sampler = Sampler(
        temperature if do_sample else None, top_k, top_p, torch.Generator(device=device).manual_seed(seed)
    )
    tokens = input_ids.to(device)
    start, ended = tokens.shape[1], torch.zeros(len(tokens), dtype=torch.bool, device=device)
    drafted_counts, accepted, advanced, over = list[int](), list[Tensor](), list[int](), list[Tensor]()
    seconds = [0.0, 0.0, 0.0]

    def run(ids: Tensor, keep: int | None = None) -> Tensor:
        """A pass over the next tokens, with the padding of the text before them."""
        mask = None
        if padding is not None:
            total = cache.get_seq_length() + ids.shape[1]
            mask = torch.nn.functional.pad(padding, (0, total - padding.shape[1]), value=True)
        return text_pass(model, cache, ids, padding=mask, keep=keep)

    with evaluating(model), drafting(model, draft) as drafted_by, ExitStack() as after_prompt:
        clock = time.perf_counter()
        new, _ = sampler.draw(run(tokens, keep=1))
        seconds[0] = time.perf_counter() - clock
        after_prompt.enter_context(without_prefill(model))
        while True:
            new = torch.where(ended.unsqueeze(1), pad_id, new)
            before = tokens.shape[1]
            for column in new.unbind(1):  # what follows the end of a row is padding
                tokens = torch.cat([tokens, torch.where(ended, pad_id, column).unsqueeze(1)], dim=1)
                ended = ended | torch.isin(column, stops)
                if bool(ended.all()):
                    break
            if before > start:
                advanced.append(tokens.shape[1] - before)
            left = start + max_new_tokens - tokens.shape[1]
            if not left or bool(ended.all()):
                break
            # One is drafted for the last token too: a pass of several tokens is dense, whatever the policies.
            size, last = max(1, min(num_draft, left - 1)), tokens[:, -1:]
            clock = time.perf_counter()
            guesses, probs = list[Tensor](), list[Tensor | None]()
            with drafted_by.on():
                for _ in range(size):
                    guess, prob = sampler.draw(run(guesses[-1] if guesses else last, keep=1))
                    guesses.append(guess)
                    probs.append(prob)
            cache.crop(-size)
            seconds[1] += time.perf_counter() - clock
            clock = time.perf_counter()
            drafted = torch.cat(guesses, dim=1)
            count, following = sampler.accept(drafted, probs, run(torch.cat([last, drafted], dim=1)))
            gained = min(int(count[~ended].min()), left - 1)
            cache.crop(gained - size)
            known = torch.cat([drafted, last], dim=1).scatter(1, count.unsqueeze(1), following.unsqueeze(1))
            new = known[:, : gained + 1]
            seconds[2] += time.perf_counter() - clock
            drafted_counts.append(size)
            accepted.append(count.masked_fill(ended, 0).cpu())
            over.append(ended.cpu())
        density = drafted_by.density()
    rows = torch.stack(accepted) if accepted else torch.zeros(0, len(tokens), dtype=torch.long)
    was_over = torch.stack(over) if over else None
    counts, moved = (torch.tensor(numbers, dtype=torch.long) for numbers in (drafted_counts, advanced))
    return Speculation(tokens, counts, rows, moved, seconds[0], seconds[1], seconds[2], density, was_over)


def _padding(name: str, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Where there are tokens, bool ``[B, T]``; None where all are."""
    if attention_mask is None:
        return None
    check_shape(name, "attention_mask", attention_mask, *input_ids.shape)
    valid = attention_mask.bool().to(input_ids.device)
    if bool((valid[:, 1:] < valid[:, :-1]).any()) or not bool(valid[:, -1].all()):
        raise fail(name, "attention_mask", "have padding on the left alone", attention_mask.tolist())
    return None if bool(valid.all()) else valid
