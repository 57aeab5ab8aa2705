"""The layouts of ``sparsify`` (EleutherAI) and ``dictionary_learning`` (Marks, Karvonen, Mueller), read.

``sparsify`` writes ``cfg.json`` and ``sae.safetensors``. ``dictionary_learning`` writes ``config.json`` and a pickle
``ae.pt``, which is not opened here: `load_dictionary` says how to make ``ae.safetensors`` of it once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_int, fail
from .batch_topk import BatchTopK
from .gated import Gated
from .jumprelu import JumpReLU
from .relu import ReLU
from .sae import Rule, SparseAutoencoder
from .tensors import fill, read_json, read_tensors
from .topk import TopK

SPARSIFY = ("cfg.json", "sae.safetensors")
LEARNING = ("config.json", "ae.safetensors")
_LINEAR = {"encoder": "encoder.weight", "encoder_bias": "encoder.bias", "decoder": "decoder.weight"}
_PLAIN = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec", "decoder_bias": "b_dec"}
_GATED = {
    "encoder": "encoder.weight",
    "encoder_bias": "gate_bias",
    "decoder": "decoder.weight",
    "decoder_bias": "decoder_bias",
    "rule.log_gain": "r_mag",
    "rule.magnitude_bias": "mag_bias",
}
_NAMES = {
    "AutoEncoder": _LINEAR | {"decoder_bias": "bias"},
    "AutoEncoderNew": _LINEAR | {"decoder_bias": "decoder.bias"},
    "AutoEncoderTopK": _LINEAR | {"decoder_bias": "b_dec"},
    "BatchTopKSAE": _LINEAR | {"decoder_bias": "b_dec", "rule.threshold": "threshold"},
    "GatedAutoEncoder": _GATED,
    "JumpReluAutoEncoder": _PLAIN | {"rule.threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": _PLAIN | {"rule.threshold": "threshold"},
}


def read_sparsify(folder: Path) -> SparseAutoencoder:
    """Read a TopK autoencoder or transcoder of ``sparsify``.

    Raises:
        InputError: if files are missing or do not fit, or it has a skip connection or another activation than topk.
    """
    config = read_json("read_sparsify", folder / SPARSIFY[0])
    check_choice("read_sparsify", "activation of the source", config.get("activation", "topk"), ("topk",))
    for name in ("skip_connection", "signed"):
        if config.get(name):
            raise fail("read_sparsify", f"{name} of the source", "be false", config[name])
    for name in ("d_in", "k"):
        check_int("read_sparsify", f"{name} of the source", config.get(name, 0))
    size = config.get("num_latents") or config["d_in"] * config.get("expansion_factor", 32)
    stored, _ = read_tensors("read_sparsify", folder / SPARSIFY[1])
    transcodes = bool(config.get("transcode"))
    sae = SparseAutoencoder(config["d_in"], size, TopK(config["k"]), centre=not transcodes)
    names = {"encoder": "encoder.weight", "encoder_bias": "encoder.bias", "decoder": "W_dec", "decoder_bias": "b_dec"}
    fill("read_sparsify", sae, _renamed(stored, names), names)
    return sae


def read_dictionary_learning(folder: Path) -> SparseAutoencoder:
    """Read an autoencoder of ``dictionary_learning``, whose ``ae.pt`` was converted to ``ae.safetensors``.

    Atoms keep the norms that they have in the file; its own loader divides those of ``AutoEncoder`` by their norms and
    multiplies codes by them, which reconstructs the same.

    Raises:
        InputError: if files are missing or do not fit, or it is of another class.
    """
    config = read_json("read_dictionary_learning", folder / LEARNING[0]).get("trainer")
    if not isinstance(config, dict):
        raise fail("read_dictionary_learning", "source", "say its trainer in config.json", type(config).__name__)
    kind = str(config.get("dict_class"))
    check_choice("read_dictionary_learning", "dict_class of the source", kind, _NAMES)
    stored, _ = read_tensors("read_dictionary_learning", folder / LEARNING[1])
    names = _NAMES[kind]
    for name in ("encoder", "decoder"):
        if names[name] not in stored or stored[names[name]].ndim != 2:
            raise fail("read_dictionary_learning", "source", f"hold a matrix {names[name]}", ", ".join(sorted(stored)))
    wide = stored[names["encoder"]].shape
    size, width = wide if names is not _PLAIN and names["encoder"] == "encoder.weight" else reversed(wide)
    rule, prefixes = _rule(kind, config, stored)
    for buffer in ("k", "group_sizes", *(("threshold",) if kind == "AutoEncoderTopK" else ())):
        stored.pop(buffer, None)
    tensors = _renamed(stored, names)
    for name in ("encoder", "decoder"):
        # A linear layer of torch is [out, in], which for a decoder is [width, size]; their plain encoder is [in, out].
        if (name == "decoder") == (names["encoder"] == "encoder.weight"):
            tensors[name] = tensors[name].T
    if "rule.threshold" in tensors:  # -1 before it is known
        tensors["rule.threshold"] = tensors["rule.threshold"].clamp_min(0)
    centre = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    sae = SparseAutoencoder(width, size, rule, centre=centre, prefixes=prefixes)
    fill("read_dictionary_learning", sae, tensors, names)
    return sae


def _rule(kind: str, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[Rule, tuple[int, ...]]:
    """The rule of a class, and the nested sizes of a Matryoshka one."""
    if "TopK" in kind:
        k = config.get("k", int(stored["k"]) if "k" in stored else 0)
        check_int("read_dictionary_learning", "k of the source", k)
        groups = stored.get("group_sizes", torch.zeros(0, dtype=torch.int64))
        return (TopK if kind == "AutoEncoderTopK" else BatchTopK)(k), tuple(groups.cumsum(0)[:-1].tolist())
    return {"GatedAutoEncoder": Gated, "JumpReluAutoEncoder": JumpReLU}.get(kind, ReLU)(), ()


def _renamed(stored: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    ours = {theirs: name for name, theirs in names.items()}
    return {ours.get(name, name): tensor for name, tensor in stored.items()}
