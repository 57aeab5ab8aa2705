"""Activations of a language model on code, dictionaries trained on them, and what these keep of the model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..dictionary.base import Dictionary
from ..dictionary.sae import Rule, SparseAutoencoder
from ..dictionary.sources import TensorSource
from ..dictionary.trainer import train
from ..measure.data import held_out_python, python_documents
from ..measure.quality import Quality, perplexity
from ..measure.tokens import encode
from ..models.calibration import calibration_batches
from ..models.harvest import harvest
from ..models.load import Loaded, load
from ..models.loss_gradient import harvest_gradients
from ..models.places import find_hook
from ..models.substitute import substituted

LEARNING_RATE = 4e-3  # of 1, 2, 4 and 8e-3 that with which TopK's error on held-out tokens is least in so few steps
NUM_DOCUMENTS = 120
LENGTH = 256
AT_ONCE = 16


@dataclass(frozen=True)
class Sizes:
    """How large a claim is.

    Attributes:
        text_tokens: activations that there are to train on.
        held_out_tokens: to measure on, which is also the window of what counts as dead.
        spliced_tokens: of these, the first, on which the model runs with reconstructions.
        num_tokens: activations seen in training, each as often as it comes.
        batch_size: of a step.
        dict_size: atoms.
        k: entries of a code.
        seeds: how many.
    """

    text_tokens: int = 131_072
    held_out_tokens: int = 32_768
    spliced_tokens: int = 8_192
    num_tokens: int = 393_216
    batch_size: int = 256
    dict_size: int = 1024
    k: int = 16
    seeds: int = 3


FULL = Sizes()
QUICK = Sizes(text_tokens=16_384, held_out_tokens=8_192, spliced_tokens=2_048, num_tokens=65_536, seeds=1)


@dataclass(frozen=True)
class Kept:
    """What a dictionary keeps of the held-out activations, and of the model.

    Attributes:
        fvu: squared error over variance.
        l0: mean entries of a code that are not 0.
        dead: share of atoms that are in no code of the held-out tokens.
        nats: by how much the loss of a token rises where the model goes on with the reconstruction; None if not asked.
    """

    fvu: float
    l0: float
    dead: float
    nats: float | None


class Embedded:
    """The activations of the embedded model behind one of its blocks: some to train on, others to measure on.

    Args:
        name: of the claim, for errors.
        sizes: see `Sizes`.
        seed: of the text to train on, and the first of the dictionaries.
        hook: the place, by name.
        gradients: whether the activations to train on come with the gradients of the model's loss.
        loaded: the model, the embedded one in float32 if not given.
    """

    def __init__(
        self,
        name: str,
        sizes: Sizes,
        *,
        seed: int,
        hook: str = "residual.2",
        gradients: bool = False,
        loaded: Loaded | None = None,
    ) -> None:
        self.loaded = loaded or load("embedded", dtype="float32")
        self.sizes, self.seed, self.hook = sizes, seed, find_hook(self.loaded.model, hook)
        self.seeds = list(range(seed, seed + sizes.seeds))
        tokenizer = self.loaded.need_tokenizer(name)
        documents = random.Random(seed).sample(python_documents(include_tests=False), NUM_DOCUMENTS)
        windows = calibration_batches(
            tokenizer, "\n".join(documents), num_samples=sizes.text_tokens // LENGTH, length=LENGTH, seed=seed
        )
        self.gradients: Tensor | None = None
        if gradients:
            self.activations, self.gradients = self.with_gradients(torch.cat(windows))
        else:
            self.activations = self.without_gradients(torch.cat(windows))
        self.ids = torch.tensor(encode(tokenizer, held_out_python())[: sizes.held_out_tokens])
        self.held_out = self.without_gradients(self.ids[: len(self.ids) // LENGTH * LENGTH].view(-1, LENGTH))

    def without_gradients(self, windows: Tensor) -> Tensor:
        """Activations ``[tokens, width]`` of windows ``[n, T]``, without the first token of each, which has no past."""
        model, found = self.loaded.model, []
        for part in torch.split(windows, AT_ONCE):
            rows = harvest(model, [self.hook], part)[self.hook.name]
            found.append(rows.view(*part.shape, -1)[:, 1:].flatten(0, 1).float())
        return torch.cat(found)

    def with_gradients(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the gradients to them, also without the last token of each, after which no loss comes."""
        found = [harvest_gradients(self.loaded.model, self.hook, part) for part in torch.split(windows, AT_ONCE)]
        length = windows.shape[1] - 1
        x, gradient = (torch.cat([pair[side].float() for pair in found]) for side in (0, 1))
        return tuple(rows.view(-1, length, rows.shape[1])[:, 1:].flatten(0, 1) for rows in (x, gradient))  # type: ignore[return-value]

    def train(self, rules: Sequence[Rule], draw: int, **options: Any) -> list[SparseAutoencoder]:
        """A dictionary for each rule, all trained on the same batches; ``options`` are of `SparseAutoencoder`."""
        width, sizes = self.activations.shape[1], self.sizes
        options = {"dict_size": sizes.dict_size, "silent_after": sizes.num_tokens // 8} | options
        found = [SparseAutoencoder(width, rule=rule, seed=draw, **options) for rule in rules]
        source = TensorSource(self.activations, gradients=self.gradients, seed=draw)
        train(found, source, num_tokens=sizes.num_tokens, batch_size=sizes.batch_size, learning_rate=LEARNING_RATE)
        return found

    @cached_property
    def whole(self) -> Quality:
        """The model as it is, on what `kept` splices into."""
        return self._perplexity()

    @torch.no_grad()
    def kept(self, dictionary: Dictionary, *, spliced: bool = False) -> Kept:
        """What a dictionary keeps, each row encoded for itself."""
        error, entries = 0.0, 0
        used = torch.zeros(dictionary.dict_size, dtype=torch.bool)
        for rows in torch.split(self.held_out, 4096):
            codes = dictionary.encode(rows)
            error += float((dictionary.decode(codes) - rows).double().square().sum())
            entries += int(codes.l0().sum())
            used[codes.indices[codes.values != 0].long()] = True
        x = self.held_out.double()
        variance = float((x - x.mean(0)).square().sum())
        nats = None
        if spliced:
            whole = self.whole.nats_per_token.value
            with substituted(self.loaded.model, self.hook, dictionary):
                nats = self._perplexity().nats_per_token.value - whole
        return Kept(error / variance, entries / len(x), float((~used).double().mean()), nats)

    def _perplexity(self) -> Quality:
        ids = self.ids[: self.sizes.spliced_tokens]
        return perplexity(self.loaded.model, ids, length=LENGTH, stride=LENGTH)

    def settings(self) -> dict[str, Any]:
        """What the claim has to say of its model, texts and training."""
        return {
            "model": self.loaded.source,
            "hook": self.hook.name,
            "text": f"{NUM_DOCUMENTS} modules of python",
            "held_out": "held_out_python",
            "length": LENGTH,
            "seeds": self.seeds,
            "learning_rate": LEARNING_RATE,
            **{name: getattr(self.sizes, name) for name in Sizes.__dataclass_fields__ if name != "seeds"},
        }
