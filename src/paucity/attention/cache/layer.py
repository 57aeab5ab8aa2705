"""A layer of a transformers cache whose tokens can be read by pages, and evicted head by head."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...checks import InputError, check_int, check_shape, fail
from .cached import Cached
from .page_index import PageIndex
from .store import Store


class SparseLayer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers asks of a cache layer, over a `Store`.

    It stands in for a ``DynamicLayer``: until something is evicted, ``update`` returns the same keys and values. After
    that they can be read only by a model that carries the eviction policy that made it.

    Attributes:
        seen: tokens that went in, padding and evicted ones included; the position of the next one.
        policy: the eviction policy that has evicted something, or None.
        expected: whether attention of ours will ask this layer for the tokens of the next `update`.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, shared: dict[str, Any] | None = None) -> None:
        self.is_initialized = False
        self.store: Store | None = None
        self.seen = 0
        self.policy: Any = None
        self.memory: dict[str, Any] = {}
        self.shared: dict[str, Any] = {} if shared is None else shared
        self._indexes: dict[str, PageIndex] = {}
        self.expected = False
        self._given: weakref.ref[Tensor] | None = None
        self._trusted = False

    @property
    def keys(self) -> Tensor | None:
        """``[B, H_kv, seen, D]``; None while there are none.

        Raises:
            InputError: if something was evicted.
        """
        return self._all("keys")

    @property
    def values(self) -> Tensor | None:
        """``[B, H_kv, seen, Dv]``, as `keys`."""
        return self._all("values")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over shape, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store = Store(key_states, value_states)
        self.is_initialized = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H_kv, T, D]``; all that is cached, ``[B, H_kv, seen, D]``.

        Attention of ours, which asks the layer itself, is given a new token alone; so is every one after an eviction.

        Raises:
            InputError: if something was evicted and the model does not carry the policy that did so.
        """
        if self.policy is not None and not self.expected:
            raise InputError("cache: model must carry the eviction policy that the cache is from, got none.")
        expected, self.expected = self.expected, False
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        check_shape("cache", "key_states", key_states, *self.store.lengths.shape, None, self.store.keys.shape[-1])
        first, alone = not self.seen, expected and self._trusted and key_states.shape[2] == 1
        self.store.append(key_states, value_states, self.seen)
        self.seen += key_states.shape[2]
        given = (key_states, value_states) if first or alone else self.whole(key_states, value_states)
        self._given = weakref.ref(given[0]) if expected else None
        return given

    def gave(self, key: Tensor) -> bool:
        """Whether ``key`` is what the last `update` returned; from then on a new token is returned alone."""
        given, self._given = self._given, None
        self._trusted = given is not None and given() is key
        return self._trusted

    def whole(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All that is cached, ``[B, H_kv, seen, D]``; what was given where it is that, or something was evicted."""
        store = self.store
        if store is None or self.policy is not None or key.shape[2] == self.seen:
            return key, value
        keys, values = (store.rectangle(part, store.starts, store.lengths) for part in (store.keys, store.values))
        return keys, values

    def cached(self, first: Tensor | None = None) -> Cached:
        """The lists, without the padding before the text.

        Args:
            first: ``[B]``, where the text of each row begins; None is at 0. Not looked at once something was evicted,
                padding first of all.
        """
        assert self.store is not None
        starts, lengths = self.store.starts, self.store.lengths
        if first is not None and self.policy is None:
            starts, lengths = starts + first.unsqueeze(-1), lengths - first.unsqueeze(-1)
        return Cached(self.store, starts, lengths, self.seen, first, self.memory, self.shared, self._indexes)

    def evict(self, keep: Tensor, starts: Tensor, policy: Any) -> None:
        """Drop all entries but those of ``keep`` ``[B, H_kv, L]`` bool, by place from ``starts`` ``[B, H_kv]`` on."""
        assert self.store is not None
        self.store.keep(keep, starts)
        self.policy = policy
        self._forget()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are as long as all that was seen."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, so that positions go on where the text stopped."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Empty the layer."""
        self.store, self.seen, self.policy, self.is_initialized = None, 0, None, False
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens; what had been evicted before stays so.

        Raises:
            InputError: if the number is positive or beyond what was seen.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise fail("crop", "tokens_to_remove", f"be in [-{self.seen}, 0]", tokens_to_remove)
        if tokens_to_remove and self.store is not None:
            self.seen += tokens_to_remove
            self.store.crop(self.seen, -tokens_to_remove)
            for index in self._indexes.values():
                index.crop(self.store.starts, self.store.lengths)
            self.memory.clear()
            self.shared.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch by index."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        check_int("batch_repeat_interleave", "repeats", repeats)
        if self.store is not None:
            rows = torch.arange(len(self.store.starts), device=self.store.starts.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows of the batch by index or by a bool mask."""
        if self.store is not None:
            indices = indices.to(self.store.starts.device)
            rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices.long()
            self.store.select_rows(rows)
            for index in self._indexes.values():
                index.select_rows(rows)
            self.memory.clear()
            self.shared.clear()

    def offload(self) -> None:
        """Not there."""
        raise InputError("cache: offloading must be off, got a cache that offloads its layers.")

    def prefetch(self) -> None:
        """Nothing to bring back."""

    def _all(self, name: str) -> Tensor | None:
        if self.store is None:
            return None
        if self.policy is not None:
            raise InputError(f"cache: {name} must all be there, got a layer that was evicted from.")
        return self.store.rectangle(getattr(self.store, name), self.store.starts, self.store.lengths)

    def _forget(self) -> None:
        self.memory.clear()
        self.shared.clear()
        self._indexes.clear()
