"""What a page says of the model that was measured."""

from collections.abc import Iterable

from ..report import ModelFacts
from .load import Loaded


def model_facts(loaded: Loaded, notes: Iterable[str] = ()) -> ModelFacts:
    """Source, architecture, size and dtype of a model; its own notes come before ``notes``."""
    model = loaded.model
    return ModelFacts(
        source=loaded.source,
        architecture=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        notes=[*loaded.notes, *notes],
    )
