"""report.json: the versioned schema, its reading and writing, and the verdict in words.

Every measured figure may be None: it was not measured. A figure that came out infinite or undefined is kept as such
(``"Infinity"``, ``"NaN"`` in the JSON), never dropped.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..checks import InputError, fail
from . import units
from .ability import PART, Ability, said
from .images import ImageMeasurement

SCHEMA_VERSION = 1
TIME_RESOLUTION = 0.03
"""Share by which the same model can differ from itself in one run on a busy machine."""
QUALITY_LIMIT = 0.05
"""The relative rise of bits per byte up to which the verdict says that quality is kept."""


class _Part(BaseModel):
    model_config = PART


class Environment(_Part):
    """Versions, processor, threads, and the active kernels by name."""

    paucity: str
    python: str
    torch: str
    transformers: str
    platform: str = ""
    cpu: str
    device: str = "cpu"
    threads: int
    kernels: dict[str, str] = {}


class ModelFacts(_Part):
    """The model that was made sparse."""

    model_config = ConfigDict(protected_namespaces=())
    source: str
    architecture: str
    num_parameters: int
    dtype: str
    notes: list[str] = []


class TextFacts(_Part):
    """A text by the names of its parts, with its size in tokens of the model and in UTF-8 bytes."""

    names: list[str]
    tokens: int | None = None
    bytes: int | None = None


class TextUse(_Part):
    """The text that was measured on, and the one that methods were calibrated on."""

    evaluated: TextFacts | None = None
    calibrated: TextFacts | None = None


class Retrieval(_Part):
    """One retrieval task at one prompt length (tokens): accuracy in [0, 1] with its 95 % interval."""

    task: str
    length: int
    accuracy: float
    low: float
    high: float
    num_prompts: int


class PrefillTime(_Part):
    """Median prefill time of a prompt of ``tokens``, and its fastest and slowest round."""

    tokens: int
    ms: float
    low: float | None = None
    high: float | None = None


class Measurement(_Part):
    """What was measured on one model, dense or sparse.

    Times are medians in ms, with ``low`` and ``high`` the fastest and the slowest round; memory is in MB of 10^6 bytes.
    """

    bits_per_byte: float | None = None
    bits_per_byte_low: float | None = None
    bits_per_byte_high: float | None = None
    perplexity: float | None = None
    decoded_bits_per_byte: float | None = None
    """Of tokens read one by one after prompts of ``decoded_context`` tokens: what the cache gives."""
    decoded_context: int | None = None
    cache_mb: float | None = None
    """Memory of the cache after these."""
    passkey_accuracy: float | None = None
    """At the largest length of the retrieval task ``passkey``; in [0, 1]."""
    retrieval: list[Retrieval] = []
    prefill_tokens: int | None = None
    prefill_ms: float | None = None
    prefill_ms_low: float | None = None
    prefill_ms_high: float | None = None
    prefill_ms_by_length: list[PrefillTime] = []
    decode_ms_per_token: float | None = None
    decode_ms_per_token_low: float | None = None
    decode_ms_per_token_high: float | None = None
    peak_memory_mb: float | None = None
    flops: float | None = None
    """As executed in one prefill of ``prefill_tokens``."""
    density: dict[str, float] = {}
    """Kept fraction in [0, 1] by site; 1.0 for dense."""
    images: ImageMeasurement | None = None

    def at_largest(self, task: str) -> Retrieval | None:
        """The result of ``task`` at its largest length, None where it was not measured."""
        found = [entry for entry in self.retrieval if entry.task == task]
        return max(found, key=lambda entry: entry.length) if found else None


class AttentionLayer(_Part):
    """What sparse attention did to one prompt of ``tokens`` in one layer; lists have an entry for each query head.

    ``sparse_ms`` holds ``select_ms``; ``pictures`` are PNG files in base64, of queries down and keys across.
    """

    layer: int
    tokens: int
    density: list[float]
    recall: list[float] | None = None
    output_error: list[float]
    select_ms: float
    sparse_ms: float
    dense_ms: float
    pictures: list[str] = []


class StepRecord(_Part):
    """One applied method: its options, the mean density that it reached, and the seconds it took."""

    method: str
    family: str
    options: dict[str, Any] = {}
    density: float | None = None
    seconds: float | None = None
    notes: list[str] = []


class Report(_Part):
    """report.json. ``verdict`` is written from the figures when it is left empty."""

    schema_version: Literal[1] = 1
    title: str
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    seconds: float
    recipe: dict[str, Any]
    environment: Environment
    model: ModelFacts
    text: TextUse = TextUse()
    dense: Measurement
    sparse: Measurement
    steps: list[StepRecord]
    head_density: list[list[float | None]] | None = None
    """Attention density, layers x heads; None in place of a head that stayed dense by design."""
    attention: list[AttentionLayer] = []
    abilities: list[Ability] = []
    verdict: list[str] = []

    @field_validator("created")
    @classmethod
    def _utc(cls, value: datetime) -> datetime:
        return value.astimezone(UTC)

    @field_validator("head_density")
    @classmethod
    def _rectangular(cls, value: list[list[float | None]] | None) -> list[list[float | None]] | None:
        if value is not None and len({len(row) for row in value}) > 1:
            raise ValueError("must have as many heads in every layer")
        return value

    @model_validator(mode="after")
    def _with_verdict(self) -> "Report":
        if not self.verdict:
            self.verdict = [*verdict(self.dense, self.sparse), *said(self.abilities)]
        return self

    def write(self, path: str | Path) -> None:
        """Write as JSON, complete or not at all (a temporary name first)."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: str | Path) -> "Report":
        """Read what `write` wrote.

        Raises:
            InputError: if there is no such file, it is no report, or a newer version of it.
        """
        path = Path(path)
        if not path.is_file():
            raise fail("report", "path", "be a report.json", f"{path}, which does not exist")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise fail("report", str(path), "be valid JSON", "something else") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if not isinstance(version, int) or isinstance(version, bool):
            raise fail("report", str(path), "be a report with a schema_version", repr(version))
        if version > SCHEMA_VERSION:
            raise fail("report", "schema_version", f"be at most {SCHEMA_VERSION} (a newer paucity reads it)", version)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise InputError(f"report: {path} must be a valid report, got {where}: {first['msg']}.") from None


def overlap(low: float | None, high: float | None, other_low: float | None, other_high: float | None) -> bool:
    """Whether two intervals meet; False where one of them is not known."""
    if low is None or high is None or other_low is None or other_high is None:
        return False
    return low <= other_high and other_low <= high


def indistinct(dense: Measurement, sparse: Measurement, name: str) -> bool:
    """Whether two median times ``name`` cannot be told apart; False where the range of the rounds is unknown.

    They cannot where each lies within the other's rounds, or where they differ by less than `TIME_RESOLUTION`.
    """
    inside = True
    for one, other in ((dense, sparse), (sparse, dense)):
        value, low, high = (getattr(one, name), *(getattr(other, f"{name}_{end}", None) for end in ("low", "high")))
        if value is None or low is None or high is None:
            return False
        inside = inside and low <= value <= high
    return inside or abs(getattr(sparse, name) / getattr(dense, name) - 1) < TIME_RESOLUTION


def verdict(dense: Measurement, sparse: Measurement) -> list[str]:
    """What the figures say, one plain sentence each; nothing is said of what was not measured."""
    kept = (_quality(dense, sparse, "bits_per_byte", ""), _quality(dense, sparse, "decoded_bits_per_byte", ", decoded"))
    return [s for s in (*kept, *_speed(dense, sparse), _passkey(dense, sparse)) if s]


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None or base <= 0 else value / base


def _quality(dense: Measurement, sparse: Measurement, name: str, what: str) -> str:
    ratio = _ratio(getattr(sparse, name), getattr(dense, name))
    if ratio is None:
        return ""
    kept, limit = "keeps" if ratio <= 1 + QUALITY_LIMIT else "does not keep", units.percent(QUALITY_LIMIT)
    return f"Sparse {kept} bits per byte{what} within {limit} of dense ({units.change(ratio - 1)})."


def _speed(dense: Measurement, sparse: Measurement) -> list[str]:
    said = []
    size = f" at {units.count(sparse.prefill_tokens)} tokens" if sparse.prefill_tokens else ""
    for what, name in ((f"Prefill{size}", "prefill_ms"), ("Decoding", "decode_ms_per_token")):
        speed = _ratio(getattr(dense, name), getattr(sparse, name))
        if speed is None:
            continue
        times = f"{units.fixed(speed, 2)} times the speed of dense"
        if indistinct(dense, sparse, name):
            said.append(f"{what} is not measurably faster or slower: {times}, within the noise.")
        elif round(speed, 2) > 1:
            said.append(f"{what} is faster: {times}.")
        else:
            said.append(f"{what} is not faster: {times}.")
    work = _ratio(sparse.flops, dense.flops)
    if work is not None:
        said.append(f"One prefill executes {units.percent(work)} of the FLOPs of dense.")
    return said


def _passkey(dense: Measurement, sparse: Measurement) -> str:
    was, now = dense.passkey_accuracy, sparse.passkey_accuracy
    if was is None or now is None:
        return ""
    base, ours = dense.at_largest("passkey"), sparse.at_largest("passkey")
    size = f" at {units.count(ours.length)} tokens" if ours else ""
    if now == was:
        return f"Passkey accuracy{size} stays at {units.percent(was)}."
    doubt = " (within the intervals)" if base and ours and overlap(base.low, base.high, ours.low, ours.high) else ""
    move = "falls" if now < was else "rises"
    return f"Passkey accuracy{size} {move} from {units.percent(was)} to {units.percent(now)}{doubt}."
