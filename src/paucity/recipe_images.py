"""The parts of a recipe that are about images: which set, how the dense model is trained, what is timed."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .measure.images import SETS

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
if TYPE_CHECKING:
    SetName = str
else:
    SetName = Literal[tuple(sorted(SETS))]
"""A name in `paucity.measure.images.SETS`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageData(_Strict):
    """Which images a model is trained and measured on, and on what its cost is measured.

    ``fallback`` is taken, and said so, where the set is not there. Of the training images the first
    ``num_calibration`` are what methods that need activations look at. Both models are timed on batches of each of
    ``batch_sizes``.
    """

    name: SetName
    fallback: SetName | None = None
    train_limit: Count | None = None
    test_limit: Count | None = None
    num_calibration: Count = 256
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 16, 64)
    repeats: Count = 15


class Training(_Strict):
    """How the dense model is trained, and the sparse one after its steps.

    ``arguments`` build the model (``width``, ``depth`` ...). A model that was trained before (a folder) is not trained
    again. A small set is passed over more often, until ``min_steps`` steps are taken. After steps that only prune, the
    sparse model is trained for ``finetune_epochs`` with its zeros held; with ``distil`` it listens to the dense one.
    """

    arguments: dict[str, int] = {}
    epochs: Count = 4
    batch_size: Count = 128
    min_steps: Annotated[int, Field(ge=0)] = 300
    learning_rate: Rate = 0.1
    finetune_epochs: Annotated[int, Field(ge=0)] = 2
    finetune_learning_rate: Rate = 0.02
    shift: Annotated[int, Field(ge=0)] = 0
    distil: bool = False
