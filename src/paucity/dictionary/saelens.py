"""The layout of SAELens: ``cfg.json``, ``sae_weights.safetensors`` and, where known, ``sparsity.safetensors``.

SAELens (https://github.com/decoderesearch/SAELens) stores ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]`` and biases;
a configuration names the architecture. Numbers are kept as they are, but that reading casts to the dtype that the
configuration names and folds decoder norms into the encoder where it asks for it (``rescale_acts_by_decoder_norm``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checks import check_choice, check_int, check_range, check_shape, fail
from ..folder import replacing
from .abs_topk import AbsTopK
from .base import Dictionary
from .batch_topk import BatchTopK
from .feature_choice import FeatureChoice
from .gated import Gated
from .jumprelu import JumpReLU
from .matching_pursuit import MatchingPursuit
from .mutual_choice import MutualChoice
from .relu import ReLU
from .sae import Rule, SparseAutoencoder
from .tensors import dtype_of, fill, read_json, read_tensors, write_both
from .topk import TopK

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
_VERSION = "6.0.0"
_SHARED = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec", "decoder_bias": "b_dec"}
_NAMES = {
    "standard": _SHARED,
    "transcoder": _SHARED,
    "topk": _SHARED,
    "abstopk": _SHARED,
    "jumprelu": _SHARED | {"rule.threshold": "threshold"},
    "jumprelu_transcoder": _SHARED | {"rule.threshold": "threshold"},
    "matching_pursuit": {"decoder": "W_dec", "decoder_bias": "b_dec"},
    "gated": _SHARED | {"encoder_bias": "b_gate", "rule.log_gain": "r_mag", "rule.magnitude_bias": "b_mag"},
}
_OF_K: dict[str, type[TopK] | type[AbsTopK]] = {"topk": TopK, "abstopk": AbsTopK}
_WITH_THRESHOLD = (JumpReLU, BatchTopK, FeatureChoice)
_TRANSCODERS = ("transcoder", "jumprelu_transcoder")


@dataclass(frozen=True)
class SaeLens:
    """What a folder of SAELens holds.

    Attributes:
        dictionary: ready to encode.
        metadata: what it was trained on, as it is written there.
        sparsity: ``[dict_size]``, log10 of how often an atom is used, where the folder has it.
        reshape: ``hook_z`` where activations come by head, ``[..., heads, d_head]``, and are put side by side; or
            ``none``.
    """

    dictionary: Dictionary
    metadata: dict[str, Any] = field(default_factory=dict)
    sparsity: Tensor | None = None
    reshape: str = "none"


def read_saelens(folder: Path, *, scale: float | None = None) -> SaeLens:
    """Read a dictionary of SAELens; its codes and reconstructions are those that SAELens computes.

    Args:
        folder: with the files of this layout, of any version.
        scale: the factor that brings activations to a mean norm of ``sqrt(d_in)``; it is folded in. Needed where
            ``normalize_activations`` is ``expected_average_only_in``, since the files do not hold it; 1 runs the
            dictionary on activations as they are, as SAELens does.

    Raises:
        InputError: if files are missing or do not fit, or ask for what is not computed here: a normalisation of each
            row, another architecture, fine-tuning factors.
    """
    config = _modern(read_json("read_saelens", folder / CONFIG))
    architecture = str(config.get("architecture"))
    check_choice("read_saelens", "architecture of the source", architecture, _NAMES)
    _check_norm(config, scale)
    dtype = dtype_of("read_saelens", config.get("dtype", "float32"))
    stored = {name: tensor.to(dtype) for name, tensor in read_tensors("read_saelens", folder / WEIGHTS)[0].items()}
    factors = stored.pop("scaling_factor", None)
    if factors is not None and not bool((factors == 1).all()):
        raise fail("read_saelens", "source", "have no fine-tuning factors", "scaling_factor other than 1")
    if "log_threshold" in stored:
        stored["threshold"] = stored.pop("log_threshold").exp()
    for name in ("d_in", "d_sae"):
        check_int("read_saelens", f"{name} of the source", config.get(name, 0))
    pursues = architecture == "matching_pursuit"
    sae = _pursuit(config, stored) if pursues else _autoencoder(config, architecture)
    names = _NAMES[architecture]
    tensors = {
        ours: stored.pop(theirs).T if ours == "encoder" else stored.pop(theirs)
        for ours, theirs in names.items()
        if theirs in stored
    }
    fill("read_saelens", sae, tensors | stored, names)
    if config.get("rescale_acts_by_decoder_norm") and architecture in _OF_K:
        _fold_norms(cast(SparseAutoencoder, sae))
    if scale is not None:
        sae.rescale(1 / scale)
    path = folder / SPARSITY
    sparsity = read_tensors("read_saelens", path)[0].get("sparsity") if path.is_file() else None
    if sparsity is not None:
        check_shape("read_saelens", "sparsity of the source", sparsity, sae.dict_size)
    reshape = str(config.get("reshape_activations") or "none")
    return SaeLens(sae, dict(config.get("metadata") or {}), sparsity, reshape)


def save_saelens(
    dictionary: Dictionary,
    folder: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    sparsity: Tensor | None = None,
    reshape: str | None = None,
) -> None:
    """Write a dictionary for SAELens; BatchTopK (also of Matryoshka), Mutual and Feature choice as JumpReLU.

    Args:
        dictionary: an autoencoder (or transcoder) of one of these rules, or of ReLU, TopK, AbsTopK, Gated, JumpReLU.
        folder: is made; files of this layout in it are replaced.
        metadata: what SAELens knows by name, such as ``model_name`` and ``hook_name``; JSON.
        sparsity: ``[dict_size]``, log10 of how often an atom is used.
        reshape: ``hook_z`` where SAELens gives activations by head, else ``none``; ``hook_z`` if not given and
            ``metadata`` names such a hook.

    Raises:
        InputError: if SAELens has no architecture for the dictionary.
    """
    architecture, tensors, options = _as_saelens(dictionary)
    if sparsity is not None:
        check_shape("save_saelens", "sparsity", sparsity, dictionary.dict_size)
    if reshape is None:
        reshape = "hook_z" if str((metadata or {}).get("hook_name", "")).endswith("hook_z") else "none"
    check_choice("save_saelens", "reshape", reshape, ("hook_z", "none"))
    config = {
        "architecture": architecture,
        "d_in": dictionary.input_size,
        "d_sae": dictionary.dict_size,
        "dtype": str(tensors["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": reshape,
        **options,
        "metadata": {"sae_lens_version": _VERSION, "sae_lens_training_version": None, **(metadata or {})},
    }
    (folder / SPARSITY).unlink(missing_ok=True)
    write_both(folder / CONFIG, config, folder / WEIGHTS, tensors)
    if sparsity is not None:
        with replacing(folder / SPARSITY) as temporary:
            save_file({"sparsity": sparsity.detach().cpu().contiguous()}, temporary)


def _as_saelens(dictionary: Dictionary) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Architecture, tensors by their name in SAELens, and what the configuration says about them."""
    if isinstance(dictionary, MatchingPursuit) and dictionary.unit and not dictionary.signed:
        options: dict[str, Any] = {"apply_b_dec_to_input": True, "max_iterations": dictionary.k}
        options |= {"residual_threshold": dictionary.tolerance, "stop_on_duplicate_support": dictionary.stop_on_repeat}
        atoms, bias = dictionary.decoder, dictionary.decoder_bias
        offset: Tensor = atoms.new_zeros(atoms.shape[1]) if bias is None else bias
        return "matching_pursuit", {"W_dec": atoms, "b_dec": offset}, options
    if not isinstance(dictionary, SparseAutoencoder):
        raise fail("save_saelens", "dictionary", "be one that SAELens has", type(dictionary).__name__)
    rule, state = dictionary.rule, dictionary.state_dict()
    if isinstance(rule, MutualChoice):
        rule, state["rule.threshold"] = rule.choice, state["rule.choice.threshold"]
    known = {ReLU: "standard", TopK: "topk", AbsTopK: "abstopk", Gated: "gated"}
    architecture = known.get(type(rule), "jumprelu" if isinstance(rule, _WITH_THRESHOLD) else None)
    options = {"apply_b_dec_to_input": dictionary.centre}
    if dictionary.output_size != dictionary.input_size:
        architecture = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}.get(str(architecture))
        options["d_out"] = dictionary.output_size
    if architecture is None:
        shape = f"{dictionary.input_size} to {dictionary.output_size}"
        raise fail("save_saelens", "dictionary", "be one that SAELens has", f"{type(rule).__name__} from {shape}")
    if isinstance(rule, TopK | AbsTopK):
        options |= {"k": rule.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(rule, _WITH_THRESHOLD):  # one for all atoms, or of each
        threshold = state["rule.threshold"].clamp_min(0).to(dictionary.encoder.dtype)
        state["rule.threshold"] = threshold.expand(dictionary.dict_size)
    state["encoder"] = state["encoder"].T
    return architecture, {theirs: state[ours] for ours, theirs in _NAMES[architecture].items()}, options


def _pursuit(config: Mapping[str, Any], stored: dict[str, Tensor]) -> Dictionary:
    """An empty pursuit; what SAELens does not compute with, or not as here, is taken out of ``stored`` or refused."""
    if "W_dec" in stored and not torch.allclose(
        norms := stored["W_dec"].float().norm(dim=-1), norms.new_ones(()), atol=1e-2
    ):
        raise fail(
            "read_saelens", "source", "have atoms of norm 1 for matching pursuit", f"norms up to {norms.max():g}"
        )
    if not config.get("apply_b_dec_to_input", True) and "b_dec" in stored:
        stored["b_dec"] = torch.zeros_like(stored["b_dec"])
    return MatchingPursuit(
        config["d_in"],
        config["d_sae"],
        config["d_in"] if config.get("max_iterations") is None else config["max_iterations"],
        tolerance=float(config.get("residual_threshold", 1e-2)),
        stop_on_repeat=bool(config.get("stop_on_duplicate_support", True)),
    )


def _autoencoder(config: Mapping[str, Any], architecture: str) -> Dictionary:
    """An empty autoencoder or transcoder."""
    rule: Rule
    if architecture in _OF_K:
        check_int("read_saelens", "k of the source", config.get("k", 0))
        rule = _OF_K[architecture](config["k"])
    else:
        rule = {"standard": ReLU, "transcoder": ReLU, "gated": Gated}.get(architecture, JumpReLU)()
    transcodes = architecture in _TRANSCODERS
    return SparseAutoencoder(
        config["d_in"],
        config["d_sae"],
        rule,
        output_size=config.get("d_out", config["d_in"]) if transcodes else None,
        centre=not transcodes and bool(config.get("apply_b_dec_to_input", True)),
    )


def _check_norm(config: Mapping[str, Any], scale: float | None) -> None:
    kind = config.get("normalize_activations") or "none"
    if scale is not None:
        check_range("read_saelens", "scale", scale, 0, open_low=True)
    if kind == "expected_average_only_in" and scale is None:
        wanted = (
            "be given, as the source was trained on activations of mean norm sqrt(d_in) and does not say the factor"
        )
        raise fail("read_saelens", "scale", wanted, None)
    if kind not in ("none", "expected_average_only_in"):
        wanted = "be none or expected_average_only_in: others change each row by itself, and codes alone do not say how"
        raise fail("read_saelens", "normalize_activations of the source", wanted, kind)


@torch.no_grad()
def _fold_norms(sae: SparseAutoencoder) -> None:
    norms = sae.decoder.norm(dim=1)
    norms = norms.where(norms > 0, 1)
    sae.encoder.mul_(norms.unsqueeze(1))
    sae.encoder_bias.mul_(norms)
    sae.decoder.div_(norms.unsqueeze(1))


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as version 6 would have written it."""
    metadata = config.get("metadata") or {}
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    if version.partition(".")[0].isdigit() and int(version.partition(".")[0]) >= 6:
        return config
    config = {"architecture": "standard", **config}
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation == "topk":
        config |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k", 0)}
    elif activation != "relu":
        raise fail("read_saelens", "activation of the source", "be relu or topk", activation)
    if config.get("normalize_activations") is True:
        config["normalize_activations"] = "expected_average_only_in"
    known = ("model_name", "hook_name", "hook_point", "dataset_path", "context_size", "prepend_bos", "neuronpedia_id")
    stated = {name: config[name] for name in known if name in config} | metadata
    if "hook_point" in stated:  # as it is called now
        stated.setdefault("hook_name", stated.pop("hook_point"))
    return config | {"metadata": stated}
