"""Activation sparsity in force on a model: what a mask drops is zeroed or not read, and counted.

No class is patched, and `AppliedActivations.remove` leaves nothing behind. Every token is made sparse and counted: all
positions, padding too, at any batch size. A linear layer whose weight is large enough to pay is replaced by one that,
decoding up to 16 tokens at once, does not read the columns of dropped inputs (`SparseInputLinear`). Elsewhere the zeros
go through the dense products: quality and density are real there, arithmetic and time are not less.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn

from ..checks import check_choice, fail
from ..models.sites import Site, find_sites, weight_view
from ..ops.select import threshold_mask, topk_mask
from . import linear
from .cats import cats_mask
from .teal import teal_mask
from .wina import column_norm, wina_mask, wina_score

METHODS = ("cats", "teal", "wina")
"""The methods that `AppliedActivations` installs."""


@dataclass(frozen=True)
class Setting:
    """What calibration found for one site.

    Args:
        sparsity: fraction to drop.
        threshold: largest score dropped; None where each token keeps its top-k.
    """

    sparsity: float
    threshold: float | None = None


class _Gate:
    """Zeroes what a mask drops, and counts."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        self.mask = mask
        self.reset()

    def reset(self) -> None:
        self.kept: Tensor | int = 0
        self.total = 0

    def keep(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        self.kept = self.kept + mask.sum()  # stays on the device: nothing waits for it
        self.total += mask.numel()
        return mask

    def __call__(self, x: Tensor) -> Tensor:
        return x.masked_fill(~self.keep(x), 0)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self(args[0]), *args[1:]

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self(output)


class AppliedActivations:
    """Activation sparsity in force on a model.

    Args:
        model: the model; its modules get hooks, and large linear layers a stand-in with the same parameters.
        method: one of `METHODS`.
        settings: by site name; for ``cats`` the sites are the gates.
        options: of the step, for `state`.
        notes: what the user should know, for `state`.
        skip: let large linear layers skip what is dropped; without it all is zeroed and multiplied.

    Raises:
        InputError: if a site is not in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        settings: dict[str, Setting],
        *,
        options: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
        skip: bool = True,
    ) -> None:
        check_choice("AppliedActivations", "method", method, METHODS)
        found = {site.name: site for site in find_sites(model)}
        for name in settings:
            if name not in found:
                raise fail("AppliedActivations", "settings", "name sites of the model", name)
        self.model, self.method, self.settings = model, method, dict(settings)
        self._options = options or {}
        self._sites = {name: found[name] for name in settings}
        self._gates = {name: _Gate(_mask_of(model, method, found[name], settings[name])) for name in settings}
        self._shares: dict[str, tuple[str, float]] = {}  # site -> (its gate, share of the site that the gate rules)
        self._undo: list[Callable[[], None]] = []
        dense = 0
        for name, gate in self._gates.items():
            if method == "cats":
                self._undo.append(gate_activation(model, found[name]).register_forward_hook(gate.after).remove)
                parent = found[name].module.rpartition(".")[0]
                for site in found.values():
                    if site.module.rpartition(".")[0] == parent and site.kind in _GATED_SHARE:
                        self._shares[site.name] = name, _GATED_SHARE[site.kind]
                        if site.kind == "down":
                            dense += not (skip and self._install(site, _nonzero))
            else:
                self._shares[name] = name, 1.0
                if not (skip and self._install(found[name], gate.keep)):
                    module, dense = model.get_submodule(found[name].module), dense + 1
                    self._undo.append(module.register_forward_pre_hook(gate.before).remove)
        if dense:
            notes = [
                *notes,
                f"{dense} layers multiply the zeros: their weights are too small to gain, or not nn.Linear.",
            ]
        self._notes = list(dict.fromkeys(notes))

    @classmethod
    def from_state(cls, model: nn.Module, state: dict[str, Any]) -> Self:
        """The step that `state` describes, on a model of the same architecture, without calibration."""
        settings = {name: Setting(**setting) for name, setting in state["sites"].items()}
        return cls(model, state["method"], settings, options=state["options"], notes=state["notes"])

    def change(self, settings: dict[str, Setting]) -> None:
        """Give some of the sites other settings, from the next forward on."""
        for name, setting in settings.items():
            if setting != self.settings[name]:
                self.settings[name] = setting
                self._gates[name].mask = _mask_of(self.model, self.method, self._sites[name], setting)

    def remove(self) -> None:
        """Take all hooks and stand-ins off; the model is what it was. The densities measured so far stay."""
        while self._undo:
            self._undo.pop()()

    def _install(self, site: Site, keep: Callable[[Tensor], Tensor]) -> bool:
        restore = None if site.tied else linear.install(self.model, site.module, keep)
        if restore is not None:
            self._undo.append(restore)
        return restore is not None

    def density(self) -> dict[str, float]:
        """Share of the weight's entries used by the average token, by site name, for the sites that ran since `reset`.

        With ``cats`` the gate runs in full and a fused gate_up in half; the rows of up and the columns of down are used
        where the gate is open.
        """
        measured = {name: float(gate.kept) / gate.total for name, gate in self._gates.items() if gate.total}
        used = {name: (measured[gate], share) for name, (gate, share) in self._shares.items() if gate in measured}
        return {name: 1 - share * (1 - density) for name, (density, share) in used.items()}

    def reset(self) -> None:
        """Start counting anew."""
        for gate in self._gates.values():
            gate.reset()

    def state(self) -> dict[str, Any]:
        """``{"method", "options", "notes", "sites": {name: {"sparsity", "threshold"}}}``, for `from_state`."""
        sites = {name: asdict(setting) for name, setting in self.settings.items()}
        return {"method": self.method, "options": self._options, "notes": self._notes, "sites": sites}


def _nonzero(x: Tensor) -> Tensor:
    return x != 0


_GATED_SHARE = {"gate": 0.0, "gate_up": 0.5, "up": 1.0, "down": 1.0}


def gate_activation(model: nn.Module, site: Site) -> nn.Module:
    """The module of the non-linearity after the gate of a gated MLP.

    Args:
        model: the model.
        site: of kind ``gate`` or ``gate_up``.

    Raises:
        InputError: if the MLP has not exactly one child without parameters that could be it.
    """
    path = site.module.rpartition(".")[0]
    children = [
        child
        for child in model.get_submodule(path).children()
        if not isinstance(child, nn.Dropout | nn.Identity) and next(child.parameters(), None) is None
    ]
    if len(children) != 1:
        names = [type(child).__name__ for child in children]
        raise fail("gate_activation", f"{path}", "have one activation module", ", ".join(names) or "none")
    return children[0]


def _mask_of(model: nn.Module, method: str, site: Site, setting: Setting) -> Callable[[Tensor], Tensor]:
    sparsity, threshold = setting.sparsity, setting.threshold
    if method == "cats":
        if threshold is None:
            raise fail("AppliedActivations", "settings", "hold a threshold for cats", f"none for {site.name}")
        return lambda x: cats_mask(x, threshold)
    if method == "teal":
        if threshold is None:
            return lambda x: topk_mask(x, sparsity=sparsity, by_abs=True)
        return lambda x: teal_mask(x, threshold)
    norm = column_norm(weight_view(model, site))
    if threshold is None:
        return lambda x: wina_mask(x, norm.to(x.device), sparsity=sparsity)
    return lambda x: threshold_mask(wina_score(x, norm.to(x.device)), threshold)
