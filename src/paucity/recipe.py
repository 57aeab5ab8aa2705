"""Recipe: what to make sparse, how, and what to measure; a validated model, from YAML or built in Python."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_serializer, model_validator

from . import catalog
from .checks import InputError, did_you_mean, fail
from .measure.kick_options import Kick
from .measure.prompts import TASKS
from .recipe_images import ImageData, Training

Count = Annotated[int, Field(ge=1)]
if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[tuple(TASKS)]
"""A name in `paucity.measure.prompts.TASKS`."""


Built = TypeVar("Built", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(_Strict):
    """One method with its options. In YAML the options stand beside ``method``."""

    method: str
    options: SerializeAsAny[BaseModel]

    @model_validator(mode="before")
    @classmethod
    def _options_of_method(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "method" not in data or isinstance(data.get("options"), BaseModel):
            return data
        method = str(data["method"])
        options_for, _ = catalog.get(method).installer()
        given = {key: value for key, value in data.items() if key != "method"}
        return {"method": method, "options": options_for(method).model_validate(given)}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"method": self.method, **self.options.model_dump(mode="json", exclude_defaults=True)}


class Calibration(_Strict):
    """What the methods that need activations look at: ``num_samples`` windows of ``length`` tokens."""

    text: str = "python"
    num_samples: Count = 32
    length: Annotated[int, Field(ge=2)] = 1024


class Retrieval(_Strict):
    """Retrieval-from-context prompts: every task at every length (tokens)."""

    tasks: tuple[Task, ...] = ("passkey", "key_value")
    lengths: tuple[Count, ...] = (1024, 4096)
    num_prompts: Count = 20


class Measure(_Strict):
    """What is measured on the dense and on the sparse model. Lengths are in tokens, ``stride`` too.

    ``kick`` asks for abilities that perplexity does not show, and is left out unless it is given (``kick: {}``: all).
    Where a step is about the cache, ``decoded_tokens`` are read one by one, too, after each of ``decoded_prompts``
    prompts of ``prefill_tokens``.
    """

    text: str = "held_out_python"
    length: Annotated[int, Field(ge=2)] = 4096
    stride: Count = 2048
    max_tokens: Count = 65536
    retrieval: Retrieval = Retrieval()
    decoded_tokens: Count = 32
    decoded_prompts: Count = 8
    prefill_tokens: Annotated[int, Field(ge=2)] = 4096
    decode_tokens: Count = 32
    repeats: Count = 5
    kick: Kick | None = None

    @model_validator(mode="after")
    def _stride_fits(self) -> "Measure":
        if self.stride > self.length:
            raise ValueError(f"stride must be at most length ({self.length})")
        return self


class Recipe(_Strict):
    """The whole job. ``text`` fields name a built-in text (``python``, ``held_out_python``) or a UTF-8 file.

    With ``images`` it is about an image model: ``convnet``, ``vit`` or a folder that `run` wrote; texts do not count.
    """

    title: str = "Dense against sparse"
    model: str = "embedded"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    calibration: Calibration = Calibration()
    measure: Measure = Measure()
    images: ImageData | None = None
    training: Training | None = None
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]

    @classmethod
    def build(cls, **fields: Any) -> "Recipe":
        """A recipe from Python values; steps may be dicts as in YAML.

        Raises:
            InputError: on the first field that is wrong or unknown.
        """
        return cls._validated(fields, "recipe")

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file.

        Raises:
            InputError: if the file is absent, is no YAML mapping, or a field is wrong or unknown.
        """
        data = read_yaml(path, "recipe")
        return cls._validated(data, str(path))

    @classmethod
    def _validated(cls, data: dict[str, Any], where: str) -> "Recipe":
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise one_line(error, where, _known_keys(error, data)) from None

    def using(
        self, *, model: str | None = None, text: str | None = None, calibration_text: str | None = None
    ) -> "Recipe":
        """The same recipe on another model or other texts; None keeps what the recipe says.

        Raises:
            InputError: if a recipe about images is given a text.
        """
        if self.images is not None and (text or calibration_text):
            raise fail("run", "text", "be left out of a recipe about images", text or calibration_text)
        changes: dict[str, Any] = {"model": model} if model else {}
        if text:
            changes["measure"] = self.measure.model_copy(update={"text": text})
        if calibration_text:
            changes["calibration"] = self.calibration.model_copy(update={"text": calibration_text})
        return self.model_copy(update=changes)

    def to_yaml(self) -> str:
        """The recipe with every default written out, as YAML that `load` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def built(model: type[Built], data: dict[str, Any], where: str) -> Built:
    """A model from plain values, with errors of one line.

    Raises:
        InputError: on the first field that is wrong or unknown.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise one_line(error, where, list(model.model_fields)) from None


def read_yaml(path: str | Path, function: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: in the name of ``function``, if the file is absent or holds no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{function}: path must be a YAML file, got {path}, which does not exist.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{function}: {path} must be valid YAML, got: {reason}.") from None
    if not isinstance(data, dict):
        raise InputError(f"{function}: {path} must hold a mapping of keys to values, got {type(data).__name__}.")
    return data


def one_line(error: ValidationError, where: str, known: Collection[str]) -> InputError:
    """The first thing that is wrong, as one line; an unknown key is answered with the nearest of the ``known`` ones."""
    first = error.errors()[0]
    path = [part for part in first["loc"] if part != "options"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if first["type"] == "extra_forbidden":
        near = did_you_mean(str(path[-1]), known)
        return InputError(f"{where}: {name} must be one of {', '.join(known)}, got {path[-1]}{near}.")
    if first["type"] == "missing":
        return InputError(f"{where}: {name} must be given.")
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if " must " in message:  # a check of this package: its own words, with the place instead of the function
        message = re.sub(r"^\w+: ", "", message)
        return InputError(f"{where}: {'.'.join(part for part in (name, message) if part)}.")
    _, found, constraint = message.partition(" should ")
    constraint = constraint if found else f"be valid ({message})"
    return InputError(f"{where}: {name} must {constraint}, got {first['input']!r}.")


def _known_keys(error: ValidationError, data: Any) -> list[str]:
    """The keys that a recipe knows where the first error is, if that is an unknown key."""
    first = error.errors()[0]
    path = [part for part in first["loc"][:-1] if part != "options"]
    if first["type"] != "extra_forbidden":
        return []
    if path[:1] == ["steps"]:
        options_for, _ = catalog.get(str(data["steps"][path[1]]["method"])).installer()
        return ["method", *options_for(str(data["steps"][path[1]]["method"])).model_fields]
    model: Any = Recipe
    for part in path:
        kind = model.model_fields[str(part)].annotation
        model = next((one for one in get_args(kind) if hasattr(one, "model_fields")), kind)
    return list(model.model_fields)
