"""What a method that prunes layer by layer is: options, what it gathers of the inputs, and how it solves a layer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..checks import check_choice, check_divides, check_int, check_nm, check_sparsity, fail
from ..kernels.select import topk_mask
from ..ops.select import block_topk_mask, num_kept
from .statistics import InputNorm

Scope = Literal["row", "layer", "global"]
Allocation = Literal["uniform", "erk", "owl", "cfsp", "greedy"]
Order = Literal["dense", "block"]
DEFAULT_SPARSITY = 0.5


@dataclass(eq=False)
class Layer:
    """One matrix of a weight, as a solver sees it.

    Attributes:
        weight: ``[rows, cols]`` float32, a copy that a solver may change.
        name: of the parameter, with the index of the matrix.
        inputs: the statistics that the method asked for; None where it asks for none.
        gradient: ``[rows, cols]`` float32, the mean square over the calibration batches; None where not asked for.
        notes: what the user should know, added by solvers.
    """

    weight: Tensor
    name: str
    inputs: InputNorm | None = None
    gradient: Tensor | None = None
    notes: list[str] = field(default_factory=list)


class Pruner(BaseModel, ABC):
    """A method of pruning with its options; the masks that it finds are bool, True is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    gathers: ClassVar[type[InputNorm] | None] = None
    """The statistic of the inputs that the method needs."""
    needs_gradients: ClassVar[bool] = False
    updates: ClassVar[bool] = False
    """Whether weights that stay change."""

    sparsity: float | None = Field(default=None, description="fraction removed, 0.5 if not given; of N:M it follows")
    scope: Scope = Field(default="layer", description="what competes: an output row, a layer, or all layers")
    n: int | None = Field(default=None, description="entries kept of every m consecutive inputs")
    m: int | None = Field(default=None, description="see n")
    block: tuple[int, int] | None = Field(
        default=None, description="rows and columns of the blocks that stay or go as one; (1, g) for groups of a row"
    )
    sites: tuple[str, ...] = Field(default=("linear",), description="kinds or groups of sites")
    allocation: Allocation = Field(default="uniform", description="how the sparsity is shared among the layers")
    order: Order = Field(
        default="dense",
        description="calibrate each block in the dense model, or behind the pruned blocks before it (two passes)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Pruner":
        check_pattern("options", self.sparsity, self.scope, self.n, self.m, self.block, self.allocation)
        self.check_scope("options", self.scope, self.order)
        return self

    @classmethod
    def check_scope(cls, function: str, scope: str, order: str) -> None:
        """Raise InputError, in the name of ``function``, if all layers are to compete that are solved in turn."""
        if scope == "global" and (cls.solve is not Pruner.solve or order == "block"):
            given = f"{cls.__name__.lower()} with order {order}"
            raise fail(function, "scope", "not be global where layers are solved one after the other", given)

    @property
    def target(self) -> float:
        """The sparsity asked for; of N:M what it comes to."""
        if self.n is not None and self.m is not None:
            return 1 - self.n / self.m
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def check_size(self, what: str, rows: int, cols: int) -> None:
        """Raise InputError, naming ``what``, if the pattern does not divide a matrix ``[rows, cols]``."""
        if self.m is not None:
            check_divides("prune", "m", self.m, cols, f"the input size of {what}")
        if self.block is not None:
            check_divides("prune", "block", self.block[0], rows, f"the rows of {what}")
            check_divides("prune", "block", self.block[1], cols, f"the columns of {what}")

    def select(self, score: Tensor, sparsity: float) -> Tensor:
        """Keep-mask of scores ``[..., rows, cols]`` in the pattern; all rows compete unless the scope is a row."""
        if self.n is not None and self.m is not None:
            return topk_mask(score.reshape(*score.shape[:-1], -1, self.m), self.n).flatten(-2)
        rows = score.flatten(0, -2)
        if self.block is None:
            rows = rows if self.scope == "row" else rows.reshape(1, -1)
            mask = topk_mask(rows, num_kept(rows.shape[1], sparsity))
        else:
            mask = block_topk_mask(rows, block=self.block[1:] if self.scope == "row" else self.block, sparsity=sparsity)
        return mask.view(score.shape)

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """Importance ``[rows, cols]`` float32 of every weight; higher is kept."""

    def solve(self, layer: Layer, sparsity: float) -> Tensor:
        """Keep-mask ``[rows, cols]``; a method that `updates` also writes ``layer.weight``."""
        return self.select(self.score(layer), sparsity)


def check_pattern(
    function: str,
    sparsity: float | None,
    scope: str,
    n: int | None,
    m: int | None,
    block: tuple[int, int] | None,
    allocation: str,
) -> None:
    """Raise InputError, in the name of ``function``, if the options contradict each other or are out of range."""
    check_choice(function, "scope", scope, get_args(Scope))
    check_choice(function, "allocation", allocation, get_args(Allocation))
    if sparsity is not None:
        check_sparsity(function, sparsity)
    if (n is None) != (m is None):
        raise fail(function, "n and m", "be given together", f"n={n}, m={m}")
    if allocation != "uniform" and (scope == "global" or n is not None):
        raise fail(function, "allocation", "be uniform with scope global and with N:M", allocation)
    if block is not None:
        for size in block:
            check_int(function, "block", size)
        if n is not None or scope == "global":
            raise fail(function, "block", "be left out with N:M and with scope global", block)
        if scope == "row" and block[0] != 1:
            raise fail(function, "block", "have one row with scope row", block)
    if n is None or m is None:
        return
    check_nm(function, n, m)
    if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-9:
        raise fail(function, "sparsity", f"be left out or equal 1 - n/m ({1 - n / m:g})", sparsity)
