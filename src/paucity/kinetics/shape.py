"""What the cost of a decoder depends on: its matrices, its keys and values, and how far each layer sees."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..checks import InputError, check_choice, check_int, fail
from ..models.config import read_config
from ..models.load import DTYPES
from ..models.sites import find_sites

_OUTSIDE = ("embedding", "position_embedding", "lm_head", "norm", "conv")


@dataclass(frozen=True)
class Shape:
    """A dense decoder as the cost model sees it.

    Attributes:
        name: for tables and messages.
        parameters: all of them, a tied matrix once.
        linear: elements of the matrices that every token is multiplied with, the output head aside.
        head: elements of the output head, which only tokens with logits are multiplied with.
        hidden: width of the residual stream.
        inner: width between the two products of the MLP.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        dim: of a query or key.
        value_dim: of a value.
        windows: keys that each layer sees, the token's own included; None where it sees all.
        dtype: of weights and cache, one of ``models.load.DTYPES``.
        context: tokens that the model was made for; None where it does not say.
    """

    name: str
    parameters: int
    linear: int
    head: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    windows: tuple[int | None, ...]
    dtype: str = "bfloat16"
    context: int | None = None

    def __post_init__(self) -> None:
        for field in ("parameters", "linear", "head", "hidden", "inner", "heads", "kv_heads", "dim", "value_dim"):
            check_int("Shape", field, getattr(self, field), 0 if field in ("head", "inner") else 1)
        check_choice("Shape", "dtype", self.dtype, DTYPES)
        if not self.windows or any(window is not None and window < 1 for window in self.windows):
            raise fail("Shape", "windows", "name at least one layer, and see at least one key", self.windows)
        if self.heads % self.kv_heads:
            raise fail("Shape", "heads", f"be a multiple of the {self.kv_heads} key-value heads", self.heads)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows)

    @property
    def group(self) -> int:
        """Query heads that share a key-value head, the paper's ``r``."""
        return self.heads // self.kv_heads

    @property
    def itemsize(self) -> int:
        """Bytes of an element of weights and cache."""
        return DTYPES[self.dtype].itemsize

    @property
    def layer_cache(self) -> int:
        """Elements that one layer keeps of one token, keys and values."""
        return self.kv_heads * (self.dim + self.value_dim)

    @property
    def cache(self) -> int:
        """Elements that all layers keep of one token, the paper's ``D``."""
        return self.layers * self.layer_cache

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of a text of ``tokens`` tokens; a windowed layer keeps its window."""
        kept = sum(tokens if window is None else min(tokens, window) for window in self.windows)
        return kept * self.layer_cache * self.itemsize


def shape_of(source: Any, *, dtype: str | None = None, name: str | None = None) -> Shape:
    """The shape of a model, from its configuration alone.

    The matrices are those that transformers would make: the model is built without memory for its weights.

    Args:
        source: ``"embedded"``, a folder, a hub id, or a transformers configuration.
        dtype: of weights and cache; None is the configuration's own, bfloat16 where it names none.
        name: None is the source's.

    Raises:
        InputError: if the source cannot be read, or is no dense decoder whose layers all keep plain keys and values:
            a mixture of experts, an encoder, state layers, latent or chunked attention.
    """
    config = read_config(source) if isinstance(source, str | Path) else source
    own = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    if dtype is not None:
        check_choice("shape_of", "dtype", dtype, DTYPES)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, AttributeError, KeyError, ImportError, TypeError) as error:
        raise _refused(config, f"one that is none ({str(error).splitlines()[0][:120]})") from error
    sites = find_sites(model)
    if any(site.kind in ("expert_gate_up", "expert_down", "router") for site in sites):
        raise _refused(config, "a mixture of experts")
    hidden, heads = (int(getattr(config, name, None) or 0) for name in ("hidden_size", "num_attention_heads"))
    if not hidden or not heads:
        raise _refused(config, "no attention heads")
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    elements = {site.name: model.get_parameter(site.name).numel() for site in sites}
    widths = {site.kind: elements[site.name] // hidden for site in sites}
    dim, value_dim = _dims(config, Counter(site.kind for site in sites), widths, heads, kv_heads)
    heads_of_output = [site for site in sites if site.kind == "lm_head" or (site.kind == "embedding" and site.tied)]
    return Shape(
        name=name or (str(source) if isinstance(source, str | Path) else str(config.model_type)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(elements[site.name] for site in sites if site.kind not in _OUTSIDE),
        head=sum(elements[site.name] for site in heads_of_output),
        hidden=hidden,
        inner=widths.get("down", 0),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=value_dim,
        windows=_windows(config),
        dtype=dtype or (own if own in DTYPES else "bfloat16"),
        context=getattr(config, "max_position_embeddings", None),
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (
        ["full_attention" if window is None else "sliding_attention"] * int(config.num_hidden_layers)
    )
    if unknown := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        raise _refused(config, f"layers of the kind {unknown[0]}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise _refused(config, "layers that share keys and values")
    return tuple(None if kind == "full_attention" or window is None else int(window) for kind in kinds)


def _dims(config: Any, counts: Counter[str], widths: dict[str, int], heads: int, kv_heads: int) -> tuple[int, int]:
    """Width of a key and of a value; what the projections do not bear out is refused."""
    layers = int(config.num_hidden_layers)
    if counts["qkv"] == layers and widths["qkv"] % (heads + 2 * kv_heads) == 0:
        dim = widths["qkv"] // (heads + 2 * kv_heads)
        return dim, dim
    if counts["q"] == counts["k"] == counts["v"] == layers:
        query, key, value = (widths[kind] / count for kind, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
        if query == key == int(key) and value == int(value):
            return int(key), int(value)
    raise _refused(config, "attention of another kind")


def _refused(config: Any, found: str) -> InputError:
    constraint = "be a dense decoder whose layers keep keys and values"
    return fail("shape_of", "source", constraint, f"{type(config).__name__} with {found}")
