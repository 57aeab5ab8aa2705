"""FAST: activations of an instruct model conversation by conversation, as it was tuned, never glued together.

Paper: Li et al. 2025, "Training Superior Sparse Autoencoders for Instruct Models", https://arxiv.org/abs/2506.07691,
section 3. Each conversation is put into the model's chat template and is one forward of its own; the activations go
through a buffer that is filled, shuffled, half consumed and filled again (`mixing.MixedSource`). Block training, which
it is compared with, glues conversations (or texts) together and cuts the result into blocks (`concatenated`).
Special tokens of the template are part of what is trained on, as in the paper. Not implemented: its choice of data sets
and its sizes of models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checks import check_int, fail
from ..models.load import Loaded
from .live import live_source
from .mixing import MixedSource

Conversation = Sequence[Mapping[str, str]]
"""Messages ``{"role": ..., "content": ...}``."""


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    template: str | None = None,
    max_length: int | None = None,
) -> list[Tensor]:
    """Each conversation in the chat template: int64 ``[1, T]``, one forward each.

    Args:
        tokenizer: of the model.
        conversations: with at least one message each.
        template: a Jinja chat template; None is the tokenizer's own.
        max_length: tokens of a conversation, what is longer is cut off; None cuts nothing.

    Raises:
        InputError: if there is no template, no conversation, one without a message, or one that the template refuses.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise fail("conversation_ids", "tokenizer", "have a chat template, or one be given", "none")
    if not len(conversations):
        raise fail("conversation_ids", "conversations", "hold at least one", "none")
    if max_length is not None:
        check_int("conversation_ids", "max_length", max_length)
    found = []
    for number, messages in enumerate(conversations):
        if not len(messages) or not all({"role", "content"} <= set(message) for message in messages):
            raise fail("conversation_ids", "conversations", "hold messages with a role and content", f"number {number}")
        options: dict[str, Any] = {} if template is None else {"chat_template": template}
        try:
            text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            got = f"number {number}: {error}"
            raise fail("conversation_ids", "conversations", "fit the chat template", got) from None
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found.append(torch.tensor([ids[:max_length]], dtype=torch.int64))
    return found


def concatenated(items: Sequence[Tensor], length: int) -> list[Tensor]:
    """Block training: all tokens of ``items`` one after the other, cut into blocks ``[1, length]``; the rest is left.

    Args:
        items: int64 ``[1, T]`` each.
        length: tokens of a block, at least 2.

    Raises:
        InputError: if there are too few tokens for a block.
    """
    check_int("concatenated", "length", length, 2)
    flat = torch.cat([item.flatten() for item in items]) if len(items) else torch.empty(0, dtype=torch.int64)
    if len(flat) < length:
        raise fail("concatenated", "items", f"hold at least {length} tokens", len(flat))
    return list(flat[: len(flat) // length * length].view(-1, 1, length).unbind(0))


def fast_source(
    loaded: Loaded,
    hooks: str | Sequence[str],
    conversations: Sequence[Conversation],
    *,
    template: str | None = None,
    max_length: int | None = None,
    capacity: int = 65_536,
    seed: int = 0,
) -> MixedSource:
    """The activations of FAST: see `conversation_ids` and `live.live_source`, whose arguments these are."""
    tokenizer = loaded.need_tokenizer("fast_source")
    items = conversation_ids(tokenizer, conversations, template=template, max_length=max_length)
    return live_source(loaded.model, hooks, items, capacity=capacity, seed=seed)
