"""What is gathered of a layer's inputs over the calibration tokens before its weights are pruned.

Every statistic takes inputs ``[tokens, in]`` batch by batch in any float dtype and holds no more than its sums: norms
and moments ``[in]`` each, a Gram matrix ``[in, in]`` float32. Sites that read the very same tensor (query, key and
value; gate and up) share one statistic, which is gathered once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..checks import InputError, fail
from ..kernels.gram import add_gram, add_squares, empty_gram
from ..models.hooks import capture_inputs
from ..models.sites import Site
from .matrices import num_matrices

_MOST_DAMPING = 100.0


@dataclass(eq=False)
class InputNorm:
    """Sum of squares of every input feature, for the L2 norm of Wanda (Eq. 1 of https://arxiv.org/abs/2306.11695)."""

    size: int
    squares: Tensor = field(init=False)
    num_tokens: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.squares = torch.zeros(self.size, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """See `paucity.kernels.gram.add_squares`."""
        add_squares(self.squares, inputs)
        self.num_tokens += len(inputs)

    @property
    def norm(self) -> Tensor:
        """``[in]`` float32; all ones where nothing but zeros was seen, which leaves a score to the weights."""
        return (self.squares.sqrt() if self.seen else torch.ones_like(self.squares)).float()

    @property
    def seen(self) -> bool:
        """Whether any input was not zero."""
        return bool((self.squares > 0).any())

    @property
    def finite(self) -> bool:
        """Whether all inputs were."""
        return bool(self.squares.isfinite().all())


@dataclass(eq=False)
class InputMoments(InputNorm):
    """Norm, mean and variance of every input feature, for DSnoT (https://arxiv.org/abs/2310.08915, Eq. 4)."""

    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.total = torch.zeros(self.size, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Sums as those of the squares."""
        super().add(inputs)
        self.total += inputs.sum(0, dtype=torch.float32).double().cpu()

    @property
    def mean(self) -> Tensor:
        """``[in]`` float32."""
        return (self.total / max(1, self.num_tokens)).float()

    @property
    def variance(self) -> Tensor:
        """``[in]`` float32, over the tokens (population)."""
        count = max(1, self.num_tokens)
        return (self.squares / count - (self.total / count).square()).clamp_min(0).float()


@dataclass(eq=False)
class InputGram(InputNorm):
    """``X^T X`` of the inputs in float32: half the Hessian of a layer's squared output error.

    The memory is that of the one matrix; factors are made when a solver asks, once for all sites that share it.
    """

    gram: Tensor = field(init=False)
    """On the device of the inputs."""
    _factors: dict[float, tuple[Tensor, float]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gram = empty_gram(self.size)

    def add(self, inputs: Tensor) -> None:
        """See `paucity.kernels.gram.add_gram`; only the lower triangle is filled."""
        self.gram = self.gram.to(inputs.device)
        add_gram(self.gram, inputs)
        self.squares = self.gram.diagonal().double().cpu()
        self.num_tokens += len(inputs)

    @property
    def whole(self) -> Tensor:
        """The symmetric matrix ``[in, in]``, anew."""
        lower = self.gram.tril()
        return lower + lower.tril(-1).T

    def inverse_factor(self, damping: float) -> tuple[Tensor, float]:
        """See `inverse_factor`; kept for the next that asks for the same damping."""
        if damping not in self._factors:
            self._factors = {damping: inverse_factor(self.gram, damping)}
        return self._factors[damping]


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular ``U`` with ``U^T U`` the inverse of the damped ``gram``, and the damping that it took.

    Inputs that were always 0 get a diagonal of 1. Where the decomposition fails, the damping is made ten times as large
    until it does not.

    Args:
        gram: ``[in, in]`` float32, symmetric; only its lower triangle is read.
        damping: share of the mean diagonal.

    Raises:
        InputError: if ``gram`` is so far from positive that no damping helps.
    """
    # With rows and columns reversed, the lower factor of Cholesky is an upper one: gram = R R^T and U = R^-1.
    damped = gram.flip(0, 1)
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    mean, added, total = float(diagonal.mean()), 0.0, damping
    while total <= _MOST_DAMPING:
        diagonal += mean * (total - added)
        added = total
        factor, failed = torch.linalg.cholesky_ex(damped, upper=True)  # flipping brought the lower triangle on top
        if not failed:
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return torch.linalg.solve_triangular(factor.mT, identity, upper=False).flip(0, 1).contiguous(), total
        total *= 10
    raise InputError(
        f"inverse_factor: gram must be positive semidefinite, got one that {added:g} of damping does not mend."
    )


class Gathering:
    """Statistics of the inputs of sites, while the context is open that made it; see `gathering`."""

    def __init__(self, model: nn.Module, make: Callable[[int], InputNorm]) -> None:
        self.model, self.make = model, make
        self._found: dict[str, list[InputNorm]] = {}
        self._leaders: dict[str, str] = {}
        self._first: dict[tuple[int, ...], tuple[str, Tensor]] | None = {}
        self._taken: set[str] = set()

    def take(self, sites: Sequence[Site], run: Iterator[None]) -> dict[str, list[InputNorm]]:
        """Statistics of ``sites`` while ``run``, an iterator, forwards one batch at each step.

        Returns:
            By name, one statistic for each matrix of the site as `paucity.weights.matrices` counts them: one for an
            ordinary layer, one for each expert and each group of a convolution. Sites that read the same tensor in the
            first batch share theirs. What is taken is no longer gathered.

        Raises:
            InputError: if one of the sites did not run, or an input is not finite (the module is named).
        """
        self._first = {}
        for _ in run:
            self._first = None
        for site in sites:
            if site.name not in self._found:
                raise InputError(f"prune: sites must be run by the model's forward, got {site.name}, which is not.")
            if not all(statistic.finite for statistic in self._found[site.name]):
                where = f"NaN or infinity at the input of {site.module}"
                raise fail("prune", "calibration", "give finite activations", where)
        self._taken.update(site.name for site in sites)
        return {site.name: self._found.pop(site.name) for site in sites}

    def add(self, site: Site, inputs: Tensor, matrix: int | None) -> None:
        """Take in ``inputs [tokens, in]`` of one matrix of ``site``."""
        if site.name in self._taken:
            return
        if site.name not in self._leaders:
            self._leaders[site.name] = site.name
            if matrix is None and self._first is not None:
                # The tensor is held until the batch ends, so that its address cannot be another's meanwhile.
                version = -1 if inputs.is_inference() else inputs._version
                key = (inputs.data_ptr(), version, *inputs.shape, *inputs.stride())
                self._leaders[site.name] = self._first.setdefault(key, (site.name, inputs))[0]
        leader = self._leaders[site.name]
        if leader != site.name:
            self._found[site.name] = self._found[leader]
            return
        if site.name not in self._found:
            self._found[site.name] = [self.make(inputs.shape[-1]) for _ in range(num_matrices(self.model, site))]
        if len(inputs):
            self._found[site.name][matrix or 0].add(inputs)


@contextmanager
def gathering(model: nn.Module, sites: Sequence[Site], make: Callable[[int], InputNorm]) -> Iterator[Gathering]:
    """While the context is open, statistics made by ``make``, given an input size, are gathered of ``sites``."""
    found = Gathering(model, make)
    with capture_inputs(model, sites, found.add, patches=True):
        yield found


def gather(
    model: nn.Module, sites: Sequence[Site], make: Callable[[int], InputNorm], run: Iterator[None]
) -> dict[str, list[InputNorm]]:
    """`Gathering.take` of ``sites`` of one block, or of the whole model, at once."""
    with gathering(model, sites, make) as found:
        return found.take(sites, run)
