"""What LeMo learns before it trains: predictors of informativeness, and a threshold for each layer.

Paper: Wang et al. 2025, https://arxiv.org/abs/2501.09767, Sec. 4.2 (Algorithm 1) and 4.3.

The predictors (`paucity.attention.lemo_predict`) learn from the exact scores of a few texts.

Thresholds: the layer's mean score (Step 1), then by ``T + eta * (acc(T + eps) - acc(T - eps)) / 2 eps`` (Step 2), where
the accuracy is minus the loss of the next token on the first text. The paper gives neither step; ours are in units of
the mean score. With a sparsity asked for, all thresholds of a kind are scaled together until it is reached.
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
from ..measure.tokens import device_of, evaluating, forward
from ..ops.informative import block_totals
from .influence import next_token_loss
from .lemo_predict import Predictor, block_summary, train_predictor

if TYPE_CHECKING:
    from .lemo import LeMo

Key = tuple[str, int]
"""``attention`` or ``mlp``, and the layer."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Predictors and thresholds of a model.

    Attributes:
        options: with which they were found.
        predictors: by site and layer.
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
        save_file(tensors, folder / "lemo.safetensors")
        rows = [
            {"site": site, "layer": layer, "threshold": self.thresholds[site, layer]}
            | {"recall": self.recall[site, layer], "loss": self.loss[site, layer]}
            for site, layer in self.predictors
        ]
        data = {"options": self.options.model_dump(mode="json"), "sites": rows}
        (folder / "lemo.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

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
            features = own["towers.0.matrices.0.weight"].shape[1] // 2
            predictor = predictors[key] = Predictor(key[0], features, options.block_size, options.rank)
            for i, tower in enumerate(predictor.towers):
                for j, matrix in enumerate(tower.matrices):  # type: ignore[union-attr, arg-type]
                    matrix.weight = nn.Parameter(own[f"towers.{i}.matrices.{j}.weight"])
                    matrix.bias = nn.Parameter(own[f"towers.{i}.matrices.{j}.bias"])
            predictor.load_state_dict(own)
            predictor.eval().requires_grad_(False)
        found = {name: {key: row[name] for key, row in zip(keys, data["sites"], strict=True)} for name in _FIGURES}
        return cls(options, predictors, *(found[name] for name in _FIGURES))


_FIGURES = ("threshold", "recall", "loss")


def fit(model: nn.Module, batches: Sequence[Tensor], options: "LeMo") -> Fitted:
    """Train the predictors on the exact scores of ``batches`` and find the thresholds; see `LeMo.fit`."""
    from .lemo import apply

    for batch in batches:
        check_ndim("LeMo.fit", "batches", batch, 2)
    if not any(batch.shape[1] > options.block_size for batch in batches):
        longest = max((batch.shape[1] for batch in batches), default=0)
        raise fail("LeMo.fit", "batches", f"hold a text of over {options.block_size} tokens", f"{longest} at most")
    device = device_of(model)
    examples: dict[Key, list[tuple[Tensor, Tensor]]] = {}

    def note(site: str, layer: int, hidden: Tensor, score: Tensor) -> None:
        everything = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        examples.setdefault((site, layer), []).append(
            (block_summary(hidden, options.block_size, everything), score.float())
        )

    look = options.model_copy(update={"in_eval": True, "segment": None, "recompute_norms": False})
    applied = apply(model, look)
    applied.seen = note
    try:
        with evaluating(model):
            for batch in batches:
                forward(model, batch.to(device), keep=1)
    finally:
        applied.remove()
    generator = torch.Generator().manual_seed(options.seed)
    predictors, losses = {}, {}
    for key, pairs in sorted(examples.items()):
        predictors[key], losses[key] = train_predictor(key[0], pairs, options, generator)
    told = {key: _totals(predictors[key], pairs) for key, pairs in examples.items()}
    means = {key: float(scores.mean()) for key, scores in told.items()}
    shares = _scaled(dict.fromkeys(told, 1.0), told, means, options)
    fitted = Fitted(look, predictors, {key: shares[key] * means[key] for key in shares}, {}, losses)
    for _ in range(options.refinements if options.eta else 0):
        moved = _refined(model, fitted, means, batches[0].to(device), options)
        shares = _scaled(moved, told, means, options)
        fitted = dataclasses.replace(fitted, thresholds={key: shares[key] * means[key] for key in shares})
    recall = {key: _recall(told[key], examples[key], fitted.thresholds[key] / max(means[key], 1e-12)) for key in told}
    return dataclasses.replace(fitted, options=options, recall=recall)


Examples = Sequence[tuple[Tensor, Tensor]]


def _totals(predictor: Predictor, pairs: Examples) -> Tensor:
    """Predicted scores of all blocks of all texts, one after another."""
    found = [predictor(x).relu() * predictor.get_buffer("scale") for x, _ in pairs]
    return torch.cat([_blocks(score).flatten() for score in found])


def _blocks(score: Tensor) -> Tensor:
    """Scores of blocks ``[B, n]`` from those of pairs ``[B, n, n]``, or what is given."""
    return score if score.ndim == 2 else block_totals(score.tril(), score.new_ones(score.shape[:2], dtype=torch.bool))


def _scaled(
    shares: Mapping[Key, float], told: Mapping[Key, Tensor], means: Mapping[Key, float], options: "LeMo"
) -> dict[Key, float]:
    """Thresholds in units of the mean score, scaled for each kind of site to the sparsity asked for."""
    scaled = dict(shares)
    for site in {site for site, _ in shares}:
        wanted = options.sparsity(site)
        keys = [key for key in shares if key[0] == site]
        if wanted is None:
            continue
        ratio = torch.cat([told[key] / max(shares[key] * means[key], 1e-12) for key in keys]).sort().values
        factor = float(ratio[min(round(wanted * len(ratio)), len(ratio) - 1)]) if wanted else 0.0
        scaled |= {key: shares[key] * factor for key in keys}
    return scaled


def _refined(
    model: nn.Module, fitted: Fitted, means: Mapping[Key, float], batch: Tensor, options: "LeMo"
) -> dict[Key, float]:
    """Thresholds in units of the mean score after a step along the gradient of the accuracy, by finite differences."""
    from .lemo import apply

    applied = apply(model, fitted)

    def accuracy(key: Key, share: float) -> float:
        applied.thresholds = {**fitted.thresholds, key: share * means[key]}
        return -float(next_token_loss(model, batch, None))

    moved = {}
    try:
        with evaluating(model):
            for key, threshold in fitted.thresholds.items():
                share = threshold / max(means[key], 1e-12)
                rise = accuracy(key, share + options.epsilon) - accuracy(key, share - options.epsilon)
                moved[key] = max(share + options.eta * rise / (2 * options.epsilon), 0.0)
    finally:
        applied.remove()
    return moved


def _recall(told: Tensor, pairs: Examples, share: float) -> float:
    """Share of the blocks above a threshold (in units of the mean score) by exact scores that are so by ``told``."""
    exact = torch.cat([_blocks(score).flatten() for _, score in pairs])
    wanted, kept = exact >= share * exact.mean(), told >= share * told.mean()
    return float((wanted & kept).sum() / wanted.sum().clamp(min=1))
