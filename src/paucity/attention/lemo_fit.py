"""What LeMo learns before it trains: predictors of informativeness, and a threshold for each layer.

Paper: Wang et al. 2025, https://arxiv.org/abs/2501.09767, Sec. 4.2 (Algorithm 1) and 4.3.

The predictors (`paucity.attention.lemo_predict`) learn from the exact scores of a few texts.

Thresholds are in units of the mean score of a layer's blocks in the text at hand. Step 1: 1, or what drops the share
of blocks asked for. Step 2: ``T + eta * (acc(T + eps) - acc(T - eps)) / 2 eps``, where the accuracy is minus the loss
of the next token on the first text; then all thresholds of a kind are shifted together, back to the share asked for.
The paper gives neither ``eta`` nor ``eps`` and has thresholds in units of the scores themselves; here both are in
standard deviations of the layer's scores, and the layer whose threshold matters most moves by ``eta``.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checks import check_ndim, fail
from ..folder import replacing, write_whole
from ..measure.tokens import device_of, evaluating, forward
from ..ops.informative import block_totals, relative_scores
from .influence import next_token_loss
from .lemo_predict import Predictor, block_summary, train_predictor

if TYPE_CHECKING:
    from .lemo import LeMo

SITES = ("attention", "mlp")
Key = tuple[str, int]
"""``attention`` or ``mlp``, and the layer."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Predictors and thresholds of a model.

    Attributes:
        options: with which they were found.
        predictors: by site and layer; an MLP that runs whole needs none.
        thresholds: by site and layer.
        recall: share of the blocks that exact scores would keep which the predicted ones keep as well.
        loss: mean smooth L1 loss of each predictor at the end.
    """

    options: "LeMo"
    predictors: dict[Key, Predictor]
    thresholds: dict[Key, float]
    recall: dict[Key, float]
    loss: dict[Key, float]

    def save(self, folder: str | Path) -> None:
        """Write ``lemo.safetensors`` and ``lemo.json`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{site}.{layer}.{name}": tensor.contiguous()
            for (site, layer), predictor in self.predictors.items()
            for name, tensor in predictor.state_dict().items()
        }
        with replacing(folder / "lemo.safetensors") as temporary:
            save_file(tensors, temporary)
        rows = [
            {"site": site, "layer": layer, "threshold": threshold, "recall": self.recall[site, layer]}
            | ({"loss": self.loss[site, layer]} if (site, layer) in self.loss else {})
            for (site, layer), threshold in self.thresholds.items()
        ]
        data = {"options": self.options.model_dump(mode="json"), "sites": rows}
        write_whole(folder / "lemo.json", json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Fitted":
        """Read what `save` wrote.

        Raises:
            InputError: if a file is absent.
        """
        from .lemo import LeMo

        folder = Path(folder)
        if not all((folder / name).is_file() for name in ("lemo.json", "lemo.safetensors")):
            raise fail("Fitted.load", "folder", "hold lemo.json and lemo.safetensors", folder)
        data = json.loads((folder / "lemo.json").read_text(encoding="utf-8"))
        options, tensors = LeMo.model_validate(data["options"]), load_file(folder / "lemo.safetensors")
        keys: list[Key] = [(row["site"], row["layer"]) for row in data["sites"]]
        predictors = {}
        for key in keys:
            prefix = f"{key[0]}.{key[1]}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if own:
                predictors[key] = Predictor.restored(key[0], own, options.block_size)
        found: list[dict[Key, float]] = [
            {key: row[name] for key, row in zip(keys, data["sites"], strict=True) if name in row}
            for name in ("threshold", "recall", "loss")
        ]
        return cls(options, predictors, *found)


def fit(model: nn.Module, batches: Sequence[Tensor], options: "LeMo") -> Fitted:
    """Train the predictors on the exact scores of ``batches`` and find the thresholds; see `LeMo.fit`."""
    for batch in batches:
        check_ndim("LeMo.fit", "batches", batch, 2)
    if not any(batch.shape[1] > options.block_size for batch in batches):
        longest = max((batch.shape[1] for batch in batches), default=0)
        raise fail("LeMo.fit", "batches", f"hold a text of over {options.block_size} tokens", f"{longest} at most")
    batches = [batch.to(device_of(model)) for batch in batches]
    look = options.model_copy(update={"in_eval": True, "segment": None, "recompute_norms": False})
    examples = _examples(model, look, batches, SITES)
    generator = torch.Generator().manual_seed(options.seed)
    predictors, losses = {}, {}
    for key, pairs in sorted(examples.items()):
        if key[0] == "attention" or options.mlp == "both":
            predictors[key], losses[key] = train_predictor(key[0], pairs, options, generator)
    told = {key: _relative(predictors.get(key), pairs) for key, pairs in examples.items()}
    thresholds = {key: _quantile(scores, options.sparsity(key[0])) for key, scores in told.items()}
    fitted = Fitted(look, predictors, thresholds, {}, losses)
    spreads = {key: max(float(scores.std()), 1e-6) for key, scores in told.items()}
    for _ in range(options.refinements if options.eta else 0):
        moved = _refined(model, fitted, spreads, batches[0], options)
        fitted = dataclasses.replace(fitted, thresholds=_shifted(moved, spreads, told, options))
    if options.attention and options.mlp != "off":  # what MLPs get is another when attention drops tokens
        found = _examples(model, fitted, batches, ("mlp",))
        examples |= found
        told |= {key: _relative(predictors.get(key), pairs) for key, pairs in found.items()}
        again = {key: _quantile(told[key], options.sparsity("mlp")) for key in found if options.mlp == "backward"}
        fitted = dataclasses.replace(fitted, thresholds={**fitted.thresholds, **again})
    recall = {key: _recall(told[key], examples[key], fitted.thresholds[key]) for key in told}
    return dataclasses.replace(fitted, options=options, recall=recall)


Examples = Sequence[tuple[Tensor, Tensor]]
"""`block_summary` and exact scores of each text."""


def _examples(
    model: nn.Module, how: "LeMo | Fitted", batches: Sequence[Tensor], sites: Sequence[str]
) -> dict[Key, list[tuple[Tensor, Tensor]]]:
    """`block_summary` and exact scores of each text at each of ``sites``, where all is computed."""
    from .lemo import apply

    examples: dict[Key, list[tuple[Tensor, Tensor]]] = {}
    applied = apply(model, how)

    def note(site: str, layer: int, hidden: Tensor, score: Tensor) -> None:
        everything = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        summary = block_summary(hidden, applied.options.block_size, everything)
        examples.setdefault((site, layer), []).append((summary, score.float()))

    applied.seen = dict.fromkeys(sites, note)
    try:
        with evaluating(model):
            for batch in batches:
                forward(model, batch, keep=1)
    finally:
        applied.remove()
    return examples


def _relative(predictor: Predictor | None, pairs: Examples) -> Tensor:
    """Predicted scores of all blocks of all texts, in units of each text's mean; exact ones without a predictor."""
    found = [score if predictor is None else predictor(x).relu() for x, score in pairs]
    return torch.cat([relative_scores(*_blocks(score)).flatten() for score in found])


def _blocks(score: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of blocks ``[B, n]`` from those of pairs ``[B, n, n]``, or what is given, and that all are there."""
    there = score.new_ones(score.shape[:2], dtype=torch.bool)
    return (score if score.ndim == 2 else block_totals(score.tril(), there)), there


def _quantile(scores: Tensor, sparsity: float | None) -> float:
    """The threshold that drops a share of the blocks; None is the mean score."""
    if sparsity is None:
        return 1.0
    return float(scores.sort().values[min(round(sparsity * len(scores)), len(scores) - 1)]) if sparsity else 0.0


def _shifted(
    thresholds: Mapping[Key, float], spreads: Mapping[Key, float], told: Mapping[Key, Tensor], options: "LeMo"
) -> dict[Key, float]:
    """The thresholds of each kind of site, shifted by as many deviations each, to the sparsity asked for."""
    shifted = dict(thresholds)
    for site in {site for site, _ in thresholds}:
        keys = [key for key in thresholds if key[0] == site]
        if options.sparsity(site):
            distance = torch.cat([(told[key] - thresholds[key]) / spreads[key] for key in keys])
            shift = _quantile(distance, options.sparsity(site))
            shifted |= {key: max(thresholds[key] + shift * spreads[key], 0.0) for key in keys}
    return shifted


def _refined(
    model: nn.Module, fitted: Fitted, spreads: Mapping[Key, float], batch: Tensor, options: "LeMo"
) -> dict[Key, float]:
    """Thresholds after a step along the gradient of the accuracy, by finite differences."""
    from .lemo import apply

    applied = apply(model, fitted)

    def accuracy(key: Key, threshold: float) -> float:
        applied.thresholds = {**fitted.thresholds, key: max(threshold, 0.0)}
        return -float(next_token_loss(model, batch, None))

    rises: dict[Key, float] = {}
    try:
        with evaluating(model):
            for key in fitted.predictors:  # no other choice changes the forward
                middle, gap = fitted.thresholds[key], options.epsilon * spreads[key]
                rises[key] = accuracy(key, middle + gap) - accuracy(key, middle - gap)
    finally:
        applied.remove()
    steepest = max(map(abs, rises.values()), default=0.0) or 1.0
    steps = {key: options.eta * spreads[key] * rise / steepest for key, rise in rises.items()}
    return {key: max(threshold + steps.get(key, 0.0), 0.0) for key, threshold in fitted.thresholds.items()}


def _recall(told: Tensor, pairs: Examples, threshold: float) -> float:
    """Share of the blocks above a threshold by exact scores that are so by ``told``."""
    wanted, kept = _relative(None, pairs) >= threshold, told >= threshold
    return float((wanted & kept).sum() / wanted.sum().clamp(min=1))
