"""A dictionary as a step of a recipe: trained on the calibration text, then in force where it was trained.

The model goes on with what the dictionary gives back of an activation, so that the report's quality, dense against
sparse, is what the dictionary costs. Special tokens pass as they are. The dictionaries are written beside the model.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..checks import check_choice, fail
from ..models.applied import current_work
from ..models.load import Loaded
from ..models.places import find_hook
from ..models.substitute import substituted
from .base import Dictionary
from .build import learned
from .files import save_dictionary
from .job import Fitted, Options, fit_on, measured_notes
from .judge import judge


def options_for(method: str) -> type[BaseModel]:
    """The options of a learned dictionary; a recipe gives one value of each, for it makes no sweep."""
    check_choice("options_for", "method", method, learned())
    return Options


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: list[Tensor]) -> "AppliedDictionaries":
    """Train one dictionary at each hook on the calibration text, and put it in force.

    Args:
        loaded: the model.
        method: a learned dictionary.
        options: from `options_for`.
        calibration: ``input_ids [1, T]`` int64; of five texts the last is for measuring, not for training.

    Raises:
        InputError: if something does not fit, or the options are a sweep. Then nothing has changed.
    """
    given, work = Options.model_validate(options.model_dump()), current_work()
    swept = [name for name in ("dict_size", "k", "l1", "seeds") if len(getattr(given, name)) > 1]
    if swept:
        raise fail("apply_step", swept[0], "be one value in a recipe", getattr(given, swept[0]))
    if len(calibration) < 2:
        raise fail(
            "apply_step", "calibration", "hold at least 2 texts, to train on and to measure on", len(calibration)
        )
    special = tuple(loaded.tokenizer.all_special_ids) if loaded.tokenizer is not None else ()
    held_out = max(1, len(calibration) // 5)
    fitted = fit_on(
        loaded.model.eval(),
        method,
        given,
        calibration[:-held_out],
        source=loaded.source,
        texts="calibration",
        skip_ids=special,
        keep=work.folder,
        on_progress=lambda done, total, what: work.tell(f"{what} ({done} of {total})"),
    )
    figures = [
        judge(loaded.model, one.hook, one.dictionary, calibration[-held_out:], skip_ids=special) for one in fitted
    ]
    return AppliedDictionaries(loaded, fitted, figures, given.model_dump(mode="json"), special)


class AppliedDictionaries:
    """Dictionaries in force on a model.

    Args:
        loaded: the model.
        fitted: one for each place.
        figures: of each, as `judge` found them.
        options: as given.
        special: token ids that pass as they are.
    """

    def __init__(
        self,
        loaded: Loaded,
        fitted: Sequence[Fitted],
        figures: Sequence[dict[str, Any]],
        options: dict[str, Any],
        special: Sequence[int],
    ) -> None:
        self.loaded, self.fitted, self.figures = loaded, list(fitted), list(figures)
        self.options, self.special = options, torch.tensor(sorted(special), dtype=torch.int64)
        self.counts = {one.hook: [0, 0] for one in fitted}
        self._mask: Tensor | None = None
        self._stack = ExitStack()
        handle = loaded.model.register_forward_pre_hook(self._see, with_kwargs=True)
        self._stack.callback(handle.remove)
        for one in fitted:
            place = find_hook(loaded.model, one.hook)
            self._stack.enter_context(substituted(loaded.model, place, self._change(one.hook, one.dictionary)))

    def _see(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which tokens of the forward that begins are special."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._mask = torch.isin(ids, self.special.to(ids.device)) if isinstance(ids, Tensor) else None

    def _change(self, hook: str, dictionary: Dictionary) -> Any:
        def change(x: Tensor) -> Tensor:
            codes = dictionary.encode(x.float())
            self.counts[hook][0] += int(codes.l0().sum())
            self.counts[hook][1] += codes.l0().numel()
            new = dictionary.decode(codes).to(x.dtype)
            mask = self._mask
            return new if mask is None else torch.where(mask.reshape(*x.shape[:-1], 1), x, new)

        return change

    def remove(self) -> None:
        """The model as it was."""
        self._stack.close()

    def density(self) -> dict[str, float]:
        """Share of a dictionary's atoms in a code, by hook; measured since the last reset."""
        found = {}
        for one in self.fitted:
            nonzeros, tokens = self.counts[one.hook]
            found[one.hook] = nonzeros / max(1, tokens) / one.dictionary.dict_size
        return found

    def reset(self) -> None:
        """Start measuring density anew."""
        self.counts = {one.hook: [0, 0] for one in self.fitted}

    def state(self) -> dict[str, Any]:
        """Method, options, and what was measured at each hook."""
        return {
            "method": self.fitted[0].method,
            "options": self.options,
            "dictionaries": {one.hook: found for one, found in zip(self.fitted, self.figures, strict=True)},
            "notes": ["The model that is saved is the dense one; the dictionaries lie beside it."]
            + [
                note
                for one, found in zip(self.fitted, self.figures, strict=True)
                for note in measured_notes(one.hook, found)
            ],
        }

    def write(self, folder: Path) -> None:
        """A folder ``dictionaries/HOOK`` for each."""
        for one, found in zip(self.fitted, self.figures, strict=True):
            facts = {"model": self.loaded.source, "hook": one.hook, "method": one.method, "metrics": found}
            save_dictionary(one.dictionary, folder / "dictionaries" / one.hook, facts=facts)
