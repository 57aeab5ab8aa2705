"""Transcoder: sparse features of what goes into an MLP that make what comes out of it.

Paper: Dunefsky et al. 2024, https://arxiv.org/abs/2406.11944, Eq. 1-3: ``z = relu(W_enc x + b_enc)``,
``y_hat = W_dec z + b_dec`` and the loss ``|y - y_hat|^2 + l1 * sum(z)``, with ``y`` the MLP's output for ``x``. Any
other rule of a sparse autoencoder may take the place of ReLU. As the two sides differ in size, the input is multiplied
by a gain that gives both the same mean square per dimension; it is measured once, before training.

Not implemented: the affine skip connection of https://arxiv.org/abs/2501.18823, as a code alone could no longer be
decoded; the search for circuits through several transcoders. Rules that compare codes with the norm of their input
(top-AFA) or ask for gradients are not meant for pairs.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import InputTypeError, check_int, check_ndim, check_range, check_shape, fail
from ..models.places import find_hook, mlp_input
from ..ops.formats import Codes
from .base import Batch, Dictionary, Objective
from .relu import ReLU
from .sae import Rule, SparseAutoencoder
from .sources import ActivationSource, Rows, TensorSource, as_source


class Pairs(ActivationSource):
    """Inputs and targets from a source whose rows hold both side by side, the input first.

    Args:
        source: rows ``[n, input_size + output_size]``, as `paucity.dictionary.live.live_source` and
            `paucity.dictionary.cache.cached_source` give for two hooks, or such a tensor.
        input_size: columns of the input.
    """

    def __init__(self, source: Tensor | ActivationSource, input_size: int) -> None:
        self.source = as_source(source)
        check_int("Pairs", "input_size", input_size, 1, self.source.input_size - 1)
        self.input_size, self.output_size = input_size, self.source.input_size - input_size

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`."""
        yield from (rows.x for rows in self.rows(batch_size, start=start))

    def rows(self, batch_size: int, *, start: int = 0) -> Iterator[Rows]:
        """See `ActivationSource.rows`; each with its target."""
        for both in self.source.batches(batch_size, start=start):
            yield Rows(both[:, : self.input_size], target=both[:, self.input_size :])


def pairs_of(x: Tensor, y: Tensor, *, seed: int = 0) -> Pairs:
    """Pairs of the rows of ``x [n, input_size]`` and ``y [n, output_size]``, in an order of the seed."""
    check_ndim("pairs_of", "x", x, 2)
    check_shape("pairs_of", "y", y, len(x), None)
    return Pairs(TensorSource(torch.cat([x, y], 1), seed=seed), x.shape[1])


def mlp_hooks(model: nn.Module, layer: int) -> tuple[str, str]:
    """Names of the places before and behind the MLP of a layer, for `live_source` and `write_cache`.

    Raises:
        InputError: if the model has no such layer.
    """
    mlp = find_hook(model, f"mlp.{layer}")
    return mlp_input(model, mlp), mlp.name


class Transcoder(Dictionary):
    """A linear encoder of the input with a rule, and unit atoms of the output.

    Args:
        input_size: width of the input.
        dict_size: number of atoms.
        output_size: width of the output; ``input_size`` if not given.
        rule: what stays of the pre-activations; `ReLU` if not given.
        auxiliary: weight of the loss of silent atoms; 0 trains none.
        silent_after: tokens without a code after which an atom counts as silent.
        seed: of the initial atoms.

    Attributes:
        sae: encoder, rule and atoms.
        gain: scalar, what inputs are multiplied by.
    """

    gain: Tensor

    def __init__(
        self,
        input_size: int,
        dict_size: int,
        output_size: int | None = None,
        rule: Rule | None = None,
        *,
        auxiliary: float = 1 / 32,
        silent_after: int = 10_000_000,
        seed: int = 0,
    ) -> None:
        super().__init__(input_size, dict_size)
        self.output_size = input_size if output_size is None else output_size
        rule = ReLU() if rule is None else rule
        if not isinstance(rule, Rule):
            raise InputTypeError(f"Transcoder: rule must be a Rule, got {type(rule).__name__}.")
        if rule.needs_gradient:
            raise fail("Transcoder", "rule", "need no gradients", type(rule).__name__)
        check_range("Transcoder", "auxiliary", auxiliary, 0)
        self.auxiliary, self.silent_after, self.seed = auxiliary, silent_after, seed
        self.sae = SparseAutoencoder(
            input_size,
            dict_size,
            rule,
            output_size=self.output_size,
            centre=False,
            auxiliary=auxiliary,
            silent_after=silent_after,
            seed=seed,
        )
        self.register_buffer("gain", torch.ones(()))

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, output_size]``, rows of norm 1."""
        return self.sae.decoder

    @property
    def offset(self) -> Tensor:
        """``[output_size]``."""
        return self.sae.decoder_bias

    def encode(self, x: Tensor) -> Codes:
        """Codes of inputs ``[..., input_size]``."""
        self.check_input(x)
        return self.sae.encode(x.to(self.sae.encoder.dtype) * self.gain)

    def objective(self, batch: Batch) -> Objective:
        """What `SparseAutoencoder.objective` says of the output."""
        return self.sae.objective(replace(batch, x=batch.x * self.gain))

    def before_step(self) -> None:
        """See `SparseAutoencoder.before_step`."""
        self.sae.before_step()

    def after_step(self) -> None:
        """See `SparseAutoencoder.after_step`."""
        self.sae.after_step()

    def rescale(self, factor: float) -> None:
        """Inputs and outputs ``factor`` times as large are treated as those of training were."""
        self.sae.rescale(factor)

    @torch.no_grad()
    def balance(self, pairs: ActivationSource, count: int = 4096) -> None:
        """Set the gain by the first ``count`` pairs.

        Raises:
            InputError: if they come without targets, or one side is 0 throughout.
        """
        rows = next(pairs.rows(count))
        if rows.target is None:
            raise fail("Transcoder", "pairs", "come with targets (see Pairs)", type(pairs).__name__)
        sizes = [float(each.float().square().mean()) for each in (rows.x, rows.target)]
        if not all(math.isfinite(size) and size > 0 for size in sizes):
            raise fail("Transcoder", "pairs", "be finite and not 0 throughout", f"mean squares {sizes}")
        self.gain.fill_((sizes[1] / sizes[0]) ** 0.5)

    def fit(self, activations: Any, **options: Any) -> Any:
        """Set the gain and train on `Pairs`; options are those of `paucity.dictionary.trainer.train`.

        With a folder to go on from, the first call's gain is found again, as the pairs are the same.
        """
        from .trainer import train

        source = as_source(activations)
        self.balance(source)
        gain = float(self.gain)
        # The trainer scales by the norm of its inputs; given as large as the outputs, both come to mean square 1.
        self.gain.fill_(1.0)
        try:
            return train(self, _Gained(source, gain), **options)
        finally:
            self.gain.fill_(gain)

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("input_size", "dict_size", "output_size", "auxiliary", "silent_after", "seed")
        return {name: getattr(self, name) for name in names} | {"rule": self.sae.settings()["rule"]}


class _Gained(ActivationSource):
    """Pairs whose inputs are multiplied by ``gain``."""

    def __init__(self, source: ActivationSource, gain: float) -> None:
        self.source, self.gain = source, gain
        self.input_size, self.output_size = source.input_size, source.output_size

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[Tensor]:
        yield from (rows.x for rows in self.rows(batch_size, start=start))

    def rows(self, batch_size: int, *, start: int = 0) -> Iterator[Rows]:
        for rows in self.source.rows(batch_size, start=start):
            yield replace(rows, x=rows.x.float() * self.gain)
