"""Options of structured pruning as steps of a recipe."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...checks import fail

Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class RecoveryOptions(BaseModel):
    """Training of low-rank adapters after pruning, merged into the weights; needs ``peft`` (extra ``lora``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranks: Literal["adaptive", "uniform"] = Field(
        default="adaptive", description="adaptive: in proportion to a block's importance; the total is the same"
    )
    rank: Count = Field(default=8, description="mean rank of the blocks")
    steps: Count = 100
    batch_size: Count = 4
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    text: str | None = Field(
        default=None, description="python or a file to train on; the calibration text if not given"
    )
    seed: Annotated[int, Field(ge=0)] = 0


class StructuredOptions(BaseModel):
    """What all structured steps know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: Fraction = Field(default=0.25, description="fraction of the units removed")
    shrink: bool = Field(default=True, description="physically, into a smaller model; zeros in place otherwise")
    recovery: RecoveryOptions | None = None

    @model_validator(mode="after")
    def _recovery_fits(self) -> "StructuredOptions":
        if self.recovery is not None and not self.shrink:
            raise fail("options", "recovery", "come with shrink, as merged adapters fill zeros", "shrink: false")
        return self


class HeadsOptions(StructuredOptions):
    """Options of ``heads``: of every layer the same number of heads goes."""

    score: Literal["activation", "magnitude", "taylor", "random"] = "taylor"
    unit: Literal["group", "query"] = Field(
        default="group", description="group: key and value heads with all their queries; query: queries of every group"
    )
    seed: Annotated[int, Field(ge=0)] = 0


class NeuronsOptions(StructuredOptions):
    """Options of ``neurons`` of feed-forward networks, of experts, too."""

    score: Literal["activation", "cfsp", "magnitude", "taylor", "random"] = "activation"
    allocation: Literal["uniform", "owl", "cfsp"] = "uniform"
    sharpness: Annotated[float, Field(ge=0)] = Field(default=1.0, description="of the allocation cfsp")
    round_to: Count = Field(default=1, description="the number of neurons that stay is a multiple of it")
    seed: Annotated[int, Field(ge=0)] = 0


class LayersOptions(StructuredOptions):
    """Options of ``layers``: whole layers go."""

    score: Literal["cosine", "angular", "random"] = "cosine"
    seed: Annotated[int, Field(ge=0)] = 0


class CfspOptions(StructuredOptions):
    """Options of ``cfsp``, with the defaults of the authors' code but for ``round_to``, which is 128 there."""

    sparsity: Fraction = Field(default=0.2, description="fraction of the neurons removed")
    sharpness: Annotated[float, Field(ge=0)] = Field(default=1.0, description="a: how unevenly blocks share")
    weight_power: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="b: of activations in a weight's share"
    )
    power: Annotated[float, Field(ge=0)] = Field(default=1.0, description="c: of activations in the score")
    relative: Literal["row", "column"] = "column"
    round_to: Count = 1


OPTIONS: dict[str, type[StructuredOptions]] = {
    "cfsp": CfspOptions,
    "heads": HeadsOptions,
    "layers": LayersOptions,
    "neurons": NeuronsOptions,
}
