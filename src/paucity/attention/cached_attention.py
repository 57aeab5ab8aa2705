"""Attention of a layer whose cache is ours: steps with one token, and whatever follows an eviction."""

from torch import Tensor

from ..checks import InputError
from .cache.layer import SparseLayer
from .prompt import Prompt
from .site import Site


def attend_cached(
    site: Site, layer: SparseLayer, query: Tensor, prompt: Prompt, padding: Tensor | None, dropout: float
) -> Tensor | None:
    """Attention of the newest tokens over what is cached, themselves included.

    Args:
        site: the policies in force.
        layer: the cache, to which the new tokens were added.
        query: ``[B, H, Tq, D]``.
        prompt: of the layer.
        padding: ``[B, seen]`` bool, False where a token is padding; None where none is.
        dropout: of attention.

    Returns:
        ``[B, H, Tq, Dv]``, or None where all of it must be computed by the dense model, with all keys.

    Raises:
        InputError: if that must be so and some keys are gone, or a new token is padding.
    """
    first, reason = text_starts(padding)
    if dropout:
        reason = "attention dropout"
    if layer.policy is not None:
        if reason is not None:
            raise InputError(f"attention: a cache that was evicted from must be read plainly, got {reason}.")
        if padding is not None and not bool(padding[:, -query.shape[2] :].all()):
            raise InputError("attention: tokens after an eviction must not be padding, got some that are.")
    elif query.shape[2] > 1:
        return None
    if reason is not None:
        count_dense(site, layer, False, reason)
        return None
    cached = layer.cached(first)
    if site.decode is not None and query.shape[2] == 1 and site.layer in site.decode.layers:
        return site.decode.attend(query, cached, prompt)
    if site.eviction is not None and layer.policy is not None:
        return site.eviction.attend(query, cached, prompt)
    return cached.attend(query, prompt)


def evict(
    site: Site, layer: SparseLayer, query: Tensor, prompt: Prompt, padding: Tensor | None, windowed: bool
) -> None:
    """Let the eviction policy, if there is one, drop what it does not keep; shapes as in `attend_cached`.

    Layers with a sliding window (``windowed``) are left alone, while the text is within the window, too.
    """
    if site.eviction is None or site.layer not in site.eviction.layers:
        return
    first, reason = text_starts(padding)
    if windowed:
        reason = "a sliding window"
    if reason is not None:
        site.eviction.counts.dense[reason] += 1
        return
    site.eviction.after(layer, query, prompt, first)


def count_dense(site: Site, layer: SparseLayer | None, prompted: bool, reason: str) -> None:
    """Note with each policy concerned that a layer was computed by the dense model.

    Raises:
        InputError: if some keys are gone.
    """
    if layer is not None and layer.policy is not None:
        raise InputError(f"attention: a cache that was evicted from must be read plainly, got {reason}.")
    for applied in (site.prefill if prompted else site.decode, site.eviction):
        if applied is not None:
            applied.counts.dense[reason] += 1


def text_starts(padding: Tensor | None) -> tuple[Tensor | None, str | None]:
    """Where the text of each row begins ``[B]``, None where all begin at once; and why that cannot be said, if so."""
    if padding is None:
        return None, None
    first = padding.int().argmax(-1)
    if bool((padding.sum(-1) == padding.shape[1] - first).all()):
        return first, None
    return None, "padding inside the text"
