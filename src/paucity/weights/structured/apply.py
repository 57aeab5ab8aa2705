"""Structured pruning as steps of a recipe: ``heads``, ``neurons``, ``layers`` and ``cfsp``."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel
from torch import Tensor, nn

from ...checks import check_choice
from ...models.calibration import as_batches
from ...models.load import Loaded
from ...ops.formats import Masks
from .choose import Choice, choose_cfsp, choose_heads, choose_layers, choose_neurons
from .influence import gather
from .layouts import find_units
from .options import OPTIONS, RecoveryOptions
from .recover import recover
from .shrinking import Shrunk, shrink
from .sizes import need_config
from .surgery import check_unfilled
from .zeroing import Zeroed, zero

_CHOOSE: dict[str, Callable[..., Choice]] = {
    "cfsp": choose_cfsp,
    "heads": choose_heads,
    "layers": choose_layers,
    "neurons": choose_neurons,
}


def options_for(method: str) -> type[BaseModel]:
    """The options of ``heads``, ``neurons``, ``layers`` or ``cfsp``."""
    check_choice("options_for", "method", method, OPTIONS)
    return OPTIONS[method]


class AppliedStructure:
    """Structure that was removed from a model, with the way back.

    Args:
        model: the pruned model.
        done: what `shrink` or `zero` gave.
        restore: undoes what was trained since; nothing where nothing was.
        state: method, options and what was found.
    """

    def __init__(
        self, model: nn.Module, done: Shrunk | Zeroed, restore: Callable[[], None], state: dict[str, Any]
    ) -> None:
        self.model, self.done = model, done
        self._restore, self._state = restore, state

    @property
    def masks(self) -> Masks | None:
        """What stays where structure was zeroed; None where it was removed."""
        return self.done.masks if isinstance(self.done, Zeroed) else None

    def remove(self) -> None:
        """The dense model, exactly."""
        self._restore()
        self.done.remove()

    def density(self) -> dict[str, float]:
        """Kept share of every parameter that units or layers could lose, by its name in the dense model."""
        return dict(self.done.density)

    def reset(self) -> None:
        """Nothing to reset: structure is static."""

    def state(self) -> dict[str, Any]:
        """``{"method", "options", "sparsity", "sizes", "layers", "calibration_tokens", "notes", ...}``.

        ``sparsity`` is the share of all parameters that went, ``sizes`` what each network keeps, ``layers`` the removed
        ones, ``importance`` the mean angular distance of the dense blocks, ``recovery`` ranks and losses.
        """
        return self._state


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: list[Tensor]) -> AppliedStructure:
    """Remove structure from ``loaded.model`` in place, or zero it.

    Args:
        loaded: a model of transformers.
        method: ``heads``, ``neurons``, ``layers`` or ``cfsp``.
        options: of `options_for`.
        calibration: ``input_ids [B, T]`` int64; needed by scores and allocations that look at activations, and trained
            on by recovery where that has no text.

    Raises:
        InputError: if the options do not fit the model or the calibration; then the model is as it was.
    """
    check_choice("apply_step", "method", method, OPTIONS)
    given = OPTIONS[method].model_validate(options.model_dump())
    model, batches = need_config(method, loaded.model), as_batches(method, loaded.model, calibration)
    ids = [batch for batch in batches if isinstance(batch, Tensor)]
    if given.shrink:
        check_unfilled(method, model)
    model.eval()
    choice = _CHOOSE[method](model, given, ids)
    importance = _importance(model, choice, given.recovery, ids)
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    done = (shrink if given.shrink else zero)(model, choice.kept, layers=choice.layers)
    removed = sum(sizes[name] * (1 - share) for name, share in done.density.items() if name in sizes)
    state: dict[str, Any] = {
        "method": method,
        "options": given.model_dump(mode="json"),
        "sparsity": removed / total,
        "sizes": {units.module: _size(units.kind, mask) for units, mask in choice.kept},
        "layers": choice.layers,
        "calibration_tokens": sum(batch.numel() for batch in ids) if choice.statistics or given.recovery else 0,
        "importance": importance,
        "notes": _notes(done, choice),
    }
    restore: Callable[[], None] = _nothing
    if given.recovery is not None:
        try:
            stay = [value for layer, value in enumerate(importance) if layer not in choice.layers]
            restore, state["recovery"] = recover(loaded, given.recovery, ids, stay)
        except BaseException:
            done.remove()
            raise
    return AppliedStructure(model, done, restore, state)


def _importance(
    model: nn.Module, choice: Choice, recovery: RecoveryOptions | None, calibration: Sequence[Tensor]
) -> list[float]:
    """Mean angular distance of every dense block, where it is known or recovery asks for it."""
    if choice.statistics is None and recovery is not None:
        from .scores import output_sites

        choice.statistics = gather(model, output_sites(model, find_units(model, "heads"))[:1], calibration)
    return [] if choice.statistics is None else choice.statistics.angular


def _size(kind: str, mask: Tensor) -> list[int] | int:
    if kind == "heads":
        return [int(mask.any(1).sum()), int(mask.sum(1).max())]
    return int(mask.sum(-1).max())


def _notes(done: Shrunk | Zeroed, choice: Choice) -> list[str]:
    notes = list(choice.notes)
    if choice.statistics is not None:
        notes += choice.statistics.notes
    if isinstance(done, Shrunk) and done.padded:
        notes.append(
            "transformers' configuration has one size for all layers, or cannot say this one: saved weights are filled"
            " up with zeros to it (load the folder and call trim for the small model again). No further step can remove"
            " anything from this one."
        )
    return notes


def _nothing() -> None:
    """Nothing was trained."""
