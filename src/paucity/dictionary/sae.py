"""The sparse autoencoder that most methods share: a linear encoder, a rule that keeps few of its outputs, unit atoms.

``z = rule(W_enc (x - b_dec) + b_enc)`` and ``x_hat = W_dec z + b_dec`` with rows of ``W_dec`` of norm 1 (Bricken et al.
2023; Gao et al. 2024, https://arxiv.org/abs/2406.04093). A rule looks at all pre-activations without gradient and
computes those that it keeps once more with one, so that neither the backward pass nor what is behind the rule touches
the rest. Atoms that have been silent for long are trained on what is left of the error (AuxK, Gao et al., A.2).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_int, check_range, fail
from ..kernels.codes import decode_codes, encode_kept, encode_topk
from ..ops.formats import Codes
from .base import Batch, Dictionary, Objective


@dataclass(frozen=True, eq=False)
class Draft:
    """The codes of a training batch, and what the rule adds to the loss, by name."""

    codes: Codes
    penalties: dict[str, Tensor] = field(default_factory=dict)


class Rule(nn.Module, ABC):
    """How the pre-activations of an encoder become a code; it may have parameters of its own.

    Attributes:
        signed: whether values may be negative.
        needs_gradient: see `Dictionary.needs_gradient`.
        is_attached: whether an autoencoder has it.
    """

    is_attached: bool = False
    signed: bool = False
    needs_gradient: bool = False

    def attach(self, sae: "SparseAutoencoder") -> None:
        """Make parameters that depend on the sizes, and refuse sizes that do not fit; called once."""

    @abstractmethod
    def encode(self, sae: "SparseAutoencoder", x: Tensor) -> Codes:
        """Codes of ``x [n, input_size]``, each row for itself; differentiable in the kept values."""

    def train_codes(self, sae: "SparseAutoencoder", batch: Batch) -> Draft:
        """Codes of a batch of training, where rows may compete and the rule may add to the loss."""
        return Draft(self.encode(sae, batch.x))

    def neglected(self, sae: "SparseAutoencoder", batch: Batch) -> Tensor:
        """Which atoms the loss of silent ones trains, ``[dict_size]`` bool; called after `train_codes`."""
        return batch.silent >= sae.silent_after

    def after_step(self) -> None:
        """Put parameters back to where they have to be; called without gradients after each step of the optimizer."""

    def rescale(self, factor: float) -> None:
        """Multiply what has the unit of a pre-activation (a threshold) by ``factor``; called without gradients."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments of the class, JSON-able."""


class SparseAutoencoder(Dictionary):
    """A linear encoder with a rule, and unit atoms.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.
        rule: what stays of the pre-activations.
        output_size: width of what is reconstructed, ``input_size`` if not given (other for transcoders).
        centre: whether the offset is subtracted before encoding.
        auxiliary: weight of the loss of silent atoms; 0 trains none.
        k_aux: silent atoms that a row uses; half of ``input_size`` if not given.
        silent_after: tokens without a code after which an atom counts as silent.
        prefixes: sizes of nested dictionaries, ascending, all below ``dict_size``, whose reconstructions are averaged
            with that of the whole (Matryoshka, https://arxiv.org/abs/2503.17547).
        drawn_prefixes: how many such sizes to draw anew in each step instead (see `paucity.dictionary.matryoshka`).
        seed: of the initial atoms.

    Attributes:
        encoder: ``[dict_size, input_size]``.
        encoder_bias: ``[dict_size]``.
        decoder: ``[dict_size, output_size]``.
        decoder_bias: ``[output_size]``.
    """

    def __init__(
        self,
        input_size: int,
        dict_size: int,
        rule: Rule,
        *,
        output_size: int | None = None,
        centre: bool = True,
        auxiliary: float = 1 / 32,
        k_aux: int | None = None,
        silent_after: int = 10_000_000,
        prefixes: tuple[int, ...] = (),
        drawn_prefixes: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(input_size, dict_size)
        name = type(self).__name__
        output_size = input_size if output_size is None else output_size
        check_int(name, "output_size", output_size)
        check_range(name, "auxiliary", auxiliary, 0)
        check_int(name, "silent_after", silent_after)
        if k_aux is not None:
            check_int(name, "k_aux", k_aux)
        if list(prefixes) != sorted({size for size in prefixes if 0 < size < dict_size}):
            raise fail(name, "prefixes", f"ascend within (0, {dict_size})", prefixes)
        check_int(name, "drawn_prefixes", drawn_prefixes, 0, 0 if prefixes else dict_size - 1)
        self.output_size, self.centre = output_size, centre and output_size == input_size
        self.auxiliary, self.k_aux, self.silent_after = auxiliary, k_aux or max(1, input_size // 2), silent_after
        self.prefixes, self.drawn_prefixes, self.seed = tuple(prefixes), drawn_prefixes, seed
        generator = torch.Generator().manual_seed(seed)
        atoms = F.normalize(torch.randn(dict_size, output_size, generator=generator), dim=1)
        other = atoms if output_size == input_size else torch.randn(dict_size, input_size, generator=generator)
        self.encoder = nn.Parameter(F.normalize(other, dim=1).clone())
        self.encoder_bias = nn.Parameter(torch.zeros(dict_size))
        self.decoder = nn.Parameter(atoms.clone())
        self.decoder_bias = nn.Parameter(torch.zeros(output_size))
        if rule.is_attached:
            raise fail(name, "rule", "be no other autoencoder's", type(rule).__name__)
        self.rule, self.needs_gradient, rule.is_attached = rule, rule.needs_gradient, True
        rule.attach(self)

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, output_size]``, rows of norm 1."""
        return self.decoder

    @property
    def offset(self) -> Tensor:
        """``[output_size]``."""
        return self.decoder_bias

    def centred(self, x: Tensor) -> Tensor:
        """What the encoder is given of ``x``."""
        return x - self.decoder_bias if self.centre else x

    @torch.no_grad()
    def pre(self, x: Tensor) -> Tensor:
        """Pre-activations ``[n, dict_size]`` of ``x [n, input_size]``, to choose among."""
        return F.linear(self.centred(x), self.encoder, self.encoder_bias)

    def kept(self, x: Tensor, indices: Tensor) -> Tensor:
        """Pre-activations ``[n, k]`` at ``indices [n, k]``, differentiable."""
        return encode_kept(self.centred(x), self.encoder, self.encoder_bias, indices)

    def best(self, x: Tensor, k: int, *, by_abs: bool = False) -> tuple[Tensor, Tensor]:
        """The ``k`` highest pre-activations of each row, differentiable, and their indices; both ``[n, k]``."""
        return encode_topk(self.centred(x), self.encoder, self.encoder_bias, k, by_abs=by_abs)

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`."""
        self.check_input(x)
        codes = self.rule.encode(self, x.reshape(-1, self.input_size).to(self.encoder.dtype))
        shape = (*x.shape[:-1], codes.k)
        return Codes(codes.values.view(shape), codes.indices.view(shape), self.dict_size)

    def objective(self, batch: Batch) -> Objective:
        """Squared error summed over the width, mean over rows; AuxK; and what the rule adds."""
        draft = self.rule.train_codes(self, batch)
        reconstruction = self.decode(draft.codes)
        error = _squared(reconstruction - batch.target)
        parts = {"error": error} | draft.penalties
        for size in (sizes := self._sizes(batch.step)):
            parts["error"] = parts["error"] + _squared(self.decode(prefix(draft.codes, size)) - batch.target)
        parts["error"] = parts["error"] / (1 + len(sizes))
        silent = self.rule.neglected(self, batch)
        if self.auxiliary and bool(silent.any()):
            parts["auxiliary"] = self.auxiliary * self._auxiliary(batch, reconstruction, silent)
        return Objective(torch.stack(list(parts.values())).sum(), draft.codes, reconstruction, parts)

    def _sizes(self, step: int) -> tuple[int, ...]:
        """Sizes of the nested dictionaries of a step, drawn in proportion to ``1 / sqrt(size)`` or as given."""
        if not self.drawn_prefixes:
            return self.prefixes
        weight = torch.arange(1, self.dict_size, dtype=torch.float64).rsqrt()
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        return tuple((1 + weight.multinomial(self.drawn_prefixes, generator=generator)).tolist())

    def _auxiliary(self, batch: Batch, reconstruction: Tensor, silent: Tensor) -> Tensor:
        """What silent atoms miss of the error, by their highest pre-activations, of either sign where codes are."""
        error = (batch.target - reconstruction).detach()
        which = silent.nonzero().squeeze(-1)
        k = min(self.k_aux, len(which))
        table, bias = self.encoder[which], self.encoder_bias[which]
        values, places = encode_topk(self.centred(batch.x), table, bias, k, by_abs=self.rule.signed)
        indices = which[places.long()]
        values = values if self.rule.signed else values.relu()
        missed = _squared(decode_codes(values, indices, self.decoder) - error)
        return missed * (k / self.k_aux)

    @torch.no_grad()
    def before_step(self) -> None:
        """Take from the atoms' gradients what would only change their norm."""
        if self.decoder.grad is not None:
            along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
            self.decoder.grad -= along * self.decoder

    @torch.no_grad()
    def after_step(self) -> None:
        """Atoms of norm 1."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.decoder.dtype).tiny))
        self.rule.after_step()

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Offsets and biases times ``factor``: codes are then as much larger as activations are."""
        self.encoder_bias.mul_(factor)
        self.decoder_bias.mul_(factor)
        self.rule.rescale(factor)

    def fit(self, activations: Any, **options: Any) -> Any:
        """See `paucity.dictionary.trainer.train`, whose options these are."""
        from .trainer import train

        return train(self, activations, **options)

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("input_size", "dict_size", "output_size", "centre", "auxiliary", "k_aux", "silent_after", "prefixes")
        kind = type(self.rule)
        rule = {"name": f"{kind.__module__.removeprefix(f'{__package__}.')}:{kind.__name__}", **self.rule.settings()}
        return {name: getattr(self, name) for name in (*names, "drawn_prefixes", "seed")} | {"rule": rule}


def prefix(codes: Codes, size: int) -> Codes:
    """The part of ``codes`` that lies on the first ``size`` atoms."""
    return Codes(codes.values * (codes.indices < size), codes.indices, codes.dict_size)


def _squared(error: Tensor) -> Tensor:
    return error.square().sum(-1).mean()
