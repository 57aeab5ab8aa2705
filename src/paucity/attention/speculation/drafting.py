"""What drafts: a decode policy put on the model, one in force on it, or any context in which the model is cheaper."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

from torch import nn

from ...checks import fail
from ..apply import AppliedDecode, apply
from ..decode import DecodePolicy
from .passes import sites

Draft = DecodePolicy | AppliedDecode | Callable[[], AbstractContextManager[object]]
"""A policy for the decode steps of drafting, one in force, or a context that makes the model sparse as it likes."""


class Drafting(NamedTuple):
    """How to draft on a model: the context in which it does, and the share of the cache that it reads, if known."""

    on: Callable[[], AbstractContextManager[object]]
    density: Callable[[], float | None]


@contextmanager
def drafting(model: nn.Module, draft: Draft) -> Iterator[Drafting]:
    """Prepare ``model``: dense, but for what `Drafting.on` encloses; it is left as it was.

    Raises:
        InputError: if the model carries an eviction policy, or another decode policy than ``draft``.
    """
    carried = sites(model)
    if any(site.eviction for site in carried):
        raise fail("speculate", "model", "carry no eviction policy", "one that does")
    if any(site.decode is not None and site.decode is not draft for site in carried):
        raise fail("speculate", "model", "carry no other decode policy than the draft", "one that does")
    if isinstance(draft, AppliedDecode) and not any(site.decode is draft for site in carried):
        raise fail("speculate", "draft", "be in force on the model", "a policy of another model, or one removed")
    with ExitStack() as stack:
        applied = draft if isinstance(draft, AppliedDecode) else None
        if isinstance(draft, DecodePolicy):
            applied = apply(model, draft)
            stack.callback(applied.remove)
        if applied is not None:
            stack.enter_context(applied.pause())
            yield Drafting(lambda: _resumed(applied), lambda: _mean(applied.density()))
        elif callable(draft):
            yield Drafting(draft, lambda: None)
        else:
            raise fail("speculate", "draft", "be a decode policy or a context", type(draft).__name__)


@contextmanager
def without_prefill(model: nn.Module) -> Iterator[None]:
    """Let passes over several tokens be dense: they verify, and are no prompts."""
    carried = [(site, site.prefill) for site in sites(model)]
    for site, _ in carried:
        site.prefill = None
    try:
        yield
    finally:
        for site, prefill in carried:
            site.prefill = prefill


@contextmanager
def _resumed(applied: AppliedDecode) -> Iterator[None]:
    applied.paused = False
    try:
        yield
    finally:
        applied.paused = True


def _mean(shares: dict[str, float]) -> float | None:
    return sum(shares.values()) / len(shares) if shares else None
