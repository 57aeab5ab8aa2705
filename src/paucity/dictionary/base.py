"""What a dictionary is: atoms, and codes over them that make each activation out of few.

Learned encoders, pursuits and classical sparse coding share one contract: ``fit`` finds the atoms on activations,
``encode`` gives `Codes` (values and indices, of either sign, however they are found), ``decode`` sums the atoms that a
code names. What trains by gradient also says what a step costs (`Dictionary.objective`), and `trainer.train` does it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..checks import InputTypeError, check_int, check_shape, fail
from ..kernels.codes import decode_codes
from ..kernels.dispatch import check_computable
from ..ops.formats import Codes


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step of training sees.

    Attributes:
        x: activations ``[n, input_size]``.
        target: what is to be reconstructed, ``[n, output_size]``: ``x`` itself but for transcoders.
        silent: ``[dict_size]`` int64, tokens since an atom was last in a code.
        step: steps that are done.
        total: steps of the whole training.
        gradient: ``[n, output_size]``, of a model's loss to its activation, for the methods that ask for it.
    """

    x: Tensor
    target: Tensor
    silent: Tensor
    step: int
    total: int
    gradient: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Objective:
    """What a step is to make small.

    Attributes:
        loss: scalar, differentiable.
        codes: of the batch.
        reconstruction: ``[n, output_size]``.
        parts: the terms of the loss by name, for telemetry.
    """

    loss: Tensor
    codes: Codes
    reconstruction: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """One step, as it is told.

    Attributes:
        step: steps that are done.
        total: steps of the training.
        fvu: of each dictionary, the batch's squared error over its variance.
        l0: of each, mean entries of a code that are not 0.
        silent: of each, share of atoms without a code for as many tokens as it allows.
    """

    step: int
    total: int
    fvu: tuple[float, ...]
    l0: tuple[float, ...]
    silent: tuple[float, ...]


class Dictionary(nn.Module, ABC):
    """Atoms ``[dict_size, output_size]`` and codes over them.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.

    Attributes:
        needs_gradient: whether `objective` wants the gradient of a model's loss in its batches.
        is_fit: whether it was trained or read, so that a training goes on from where it is.
    """

    needs_gradient: bool = False

    def __init__(self, input_size: int, dict_size: int) -> None:
        super().__init__()
        name = type(self).__name__
        check_int(name, "input_size", input_size)
        check_int(name, "dict_size", dict_size)
        self.input_size, self.dict_size = input_size, dict_size
        self.is_fit = False

    @property
    @abstractmethod
    def atoms(self) -> Tensor:
        """``[dict_size, output_size]``, each with the norm that the method gives it; differentiable where learned."""

    @property
    def offset(self) -> Tensor | None:
        """``[output_size]``, added to every reconstruction; None is zero."""
        return None

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Codes ``[..., k]`` of activations ``[..., input_size]``, each row for itself and the same in any batch."""

    def decode(self, codes: Codes) -> Tensor:
        """``[..., output_size]``: the sum of the atoms that each code names, and the offset."""
        atoms = self.atoms
        out = decode_codes(codes.values, codes.indices, atoms.to(codes.values.dtype))
        return out if self.offset is None else out + self.offset

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction ``[..., output_size]`` of activations ``[..., input_size]``."""
        return self.decode(self.encode(x))

    @abstractmethod
    def fit(self, activations: Any, **options: Any) -> Any:
        """Find the atoms on activations: a tensor ``[n, input_size]`` or a source (`paucity.dictionary.sources`)."""

    def objective(self, batch: Batch) -> Objective:
        """What a step of gradient descent is to make small.

        Raises:
            InputTypeError: if the method is not trained by gradient.
        """
        raise InputTypeError(
            f"objective: {type(self).__name__} must be trained by gradient, got one that is fit whole."
        )

    def start_at(self, mean: Tensor) -> None:
        """Put the offset where the activations are before a first training; called without gradients."""
        if isinstance(self.offset, nn.Parameter) and len(self.offset) == len(mean):
            self.offset.copy_(mean)

    def before_step(self) -> None:
        """Change gradients before the optimizer sees them; called without gradients."""

    def after_step(self) -> None:
        """Put parameters back to where they have to be; called without gradients after each step of the optimizer."""

    def rescale(self, factor: float) -> None:
        """Change parameters so that activations ``factor`` times as large are treated as those of training were.

        Codes grow with the activations; a dictionary that is homogeneous in them does nothing but to its offset.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What creates the same dictionary, untrained: the arguments of its class, JSON-able."""

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take on the sizes of a checkpoint, whose tensors come next, where `fit` and not the settings fix them."""

    def check_input(self, x: Tensor) -> None:
        """Raise InputError or InputTypeError unless ``x`` is ``[..., input_size]`` of finite floats."""
        name = f"{type(self).__name__}.encode"
        check_computable(name, "x", x)
        check_shape(name, "x", x, *x.shape[:-1], self.input_size)
        if not bool(x.isfinite().all()):
            raise fail(name, "x", "be finite", "NaN or infinity")
