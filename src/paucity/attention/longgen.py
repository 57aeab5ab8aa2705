"""LongGen: full attention in the middle third of the layers, a fixed sparse pattern in the others.

Paper: Ge et al. 2024, https://arxiv.org/abs/2410.01485, Sec. 2: some layers must see every token directly; a third of
them, in the middle, is enough, and the thirds before and after need a window with sinks, or strided blocks, alone.

The rule needs to know how many layers there are, so this looks at a model (at no text) and gives the sparse pattern's
policy with ``layers`` set. Any policy of the catalogue may be that pattern: `sink_window` and `sharded`, whose blocks
are strided, are the paper's two kinds. The paper keeps about 2048 keys a query in these layers, which is the default
here; how it divides them between sinks and window we do not know.

Differs: the paper trains the hybrid on 5 billion tokens while it extends the context; this is the architecture alone,
on the model as it is. Its cache, too, keeps only what the sparse layers see; here the cache is whole.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_serializer, field_validator, model_validator
from torch import Tensor, nn

from ..checks import check_int, fail
from ..models.text_config import text_config
from ..ops.select import num_kept
from .policy import PolicySearch, PrefillPolicy
from .portable import from_json, to_json
from .sink_window import SinkWindow

Placement = Literal["middle", "first", "last", "spread"]


class LongGen(PolicySearch):
    """Options of ``longgen``. In JSON and YAML the pattern is a mapping of ``method`` and its options.

    Attributes:
        pattern: the policy of the layers that are not full; its own ``layers`` must be absent.
        full_share: share of the layers that stay full, rounded; at least one layer is full.
        placement: where these are: in the middle, the first, the last, or spread evenly.
        full_layers: the layers that stay full, instead of ``full_share`` and ``placement``.
    """

    pattern: SerializeAsAny[PrefillPolicy] = SinkWindow(num_sinks=64, window_size=1984)
    full_share: float = Field(1 / 3, gt=0, lt=1)
    placement: Placement = "middle"
    full_layers: list[int] | None = None

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> Any:
        return from_json(value) if isinstance(value, dict) else value

    @field_serializer("pattern")
    def _plain(self, value: PrefillPolicy) -> dict[str, Any]:
        return to_json(value)

    @model_validator(mode="after")
    def _layers_once(self) -> "LongGen":
        if self.pattern.layers is not None:
            raise fail("longgen", "pattern", "have no layers of its own", self.pattern.layers)
        return self

    def fit(self, model: nn.Module, calibration: Sequence[Tensor]) -> PrefillPolicy:
        """The pattern, ruling the layers of ``model`` that are not full; ``calibration`` is not looked at.

        Raises:
            InputError: if ``full_layers`` has one that the model does not have.
        """
        num_layers: int = text_config(model).num_hidden_layers
        for layer in self.full_layers or ():
            check_int("longgen", "full_layers", layer, 0, num_layers - 1)
        chosen = full_layers(num_layers, share=self.full_share, placement=self.placement)
        full = chosen if self.full_layers is None else self.full_layers
        return self.pattern.model_copy(update={"layers": [i for i in range(num_layers) if i not in full]})


def full_layers(num_layers: int, *, share: float = 1 / 3, placement: Placement = "middle") -> list[int]:
    """The layers that stay full, ascending: a share of them, rounded, at least one.

    Args:
        num_layers: of the model.
        share: of the layers.
        placement: where they are; what is left over where both sides of the middle cannot be alike lies after it.

    Examples:
        >>> full_layers(12)
        [4, 5, 6, 7]
    """
    check_int("full_layers", "num_layers", num_layers)
    count = max(1, num_kept(num_layers, 1 - share))
    if placement == "spread":
        return [(2 * i + 1) * num_layers // (2 * count) for i in range(count)]
    start = {"first": 0, "middle": (num_layers - count) // 2, "last": num_layers - count}[placement]
    return list(range(start, start + count))
