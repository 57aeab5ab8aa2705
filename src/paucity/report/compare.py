"""Dense against sparse, row by row, as text; the page and the console show the same rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from . import units
from .images import image_rows
from .schema import Measurement, Report, indistinct, overlap

Judgement = Literal["better", "worse", "same", "within noise", ""]
MARKS: dict[str, str] = {"better": "✓", "worse": "✗", "same": "=", "within noise": "≈", "": ""}
"""Judgements can be read without colour; arrows would be, where less is better, at odds with the sign of the change."""


@dataclass(frozen=True)
class Row:
    """One quantity of both models; ``judgement`` is empty where neither direction is better."""

    label: str
    dense: str
    sparse: str
    change: str
    judgement: Judgement


@dataclass(frozen=True)
class _Quantity:
    label: str
    name: str
    show: Callable[[float | None], str]
    more_is_better: bool = False
    points: bool = False


def rows(report: Report) -> list[Row]:
    """The rows that have a figure for at least one of the two models."""
    return [*_images(report), *_rows(report.dense, report.sparse), *_attention(report)]


def _images(report: Report) -> Iterator[Row]:
    for row in image_rows(report.dense.images, report.sparse.images):
        quantity = _Quantity(row.label, "", row.show, row.more_is_better, row.points)
        yield _judged(quantity, row.dense, row.sparse, row.noise)


def _rows(dense: Measurement, sparse: Measurement) -> Iterator[Row]:
    tokens = sparse.prefill_tokens or dense.prefill_tokens
    size = f", {units.count(tokens)} tokens" if tokens else ""
    context = sparse.decoded_context or dense.decoded_context
    after = f", decoded after {units.count(context)} tokens" if context else ""
    longest = sparse.at_largest("passkey") or dense.at_largest("passkey")
    passkey = f", {units.count(longest.length)} tokens" if longest else ""
    quality = (
        _Quantity("Bits per byte", "bits_per_byte", units.fixed),
        _Quantity(f"Bits per byte{after}", "decoded_bits_per_byte", units.fixed),
        _Quantity("Perplexity per token", "perplexity", lambda value: units.significant(value, 4)),
        _Quantity(f"Passkey{passkey}", "passkey_accuracy", units.percent, more_is_better=True, points=True),
    )
    cost = (
        _Quantity(f"Prefill{size}", "prefill_ms", units.ms),
        _Quantity("Decoding, per token", "decode_ms_per_token", units.ms),
        _Quantity("Peak memory", "peak_memory_mb", units.megabytes),
        _Quantity(f"Cache{after.replace('decoded after', 'after')}", "cache_mb", units.megabytes),
        _Quantity(f"Work of a prefill{size}", "flops", units.flop),
    )
    for quantity in quality:
        yield from _row(quantity, dense, sparse)
    yield from _tasks(dense, sparse)
    for quantity in cost:
        yield from _row(quantity, dense, sparse)
    if sparse.density:
        kept = [
            sum(model.density.values()) / len(model.density) if model.density else None for model in (dense, sparse)
        ]
        label = f"Mean density of {units.count(len(sparse.density))} sites"
        yield Row(label, units.percent(kept[0]), units.percent(kept[1]), "", "")


def _attention(report: Report) -> Iterator[Row]:
    """The attention part of a prefill, and its share of it where that was measured at the same length."""
    layers = report.attention
    if not layers:
        return
    tokens, shown = layers[0].tokens, []
    was, now = sum(entry.dense_ms for entry in layers), sum(entry.sparse_ms for entry in layers)
    for model, part in ((report.dense, was), (report.sparse, now)):
        whole = model.prefill_ms if model.prefill_tokens == tokens else None
        share = part / whole if whole else None  # of another run: on a busy machine it can be any number
        shown.append(units.ms(part) + (f" ({units.percent(share, 0)})" if share and share <= 1 else ""))
    label = f"Attention, {units.count(tokens)} tokens"
    quantity = _Quantity(label, "", units.ms)
    row = _judged(quantity, was, now, False)
    yield replace(row, dense=shown[0], sparse=shown[1])
    select = sum(entry.select_ms for entry in layers)
    yield Row("of that, choosing", units.DASH, units.ms(select), "", "")


def _row(quantity: _Quantity, dense: Measurement, sparse: Measurement) -> Iterator[Row]:
    was, now = getattr(dense, quantity.name), getattr(sparse, quantity.name)
    if was is None and now is None:
        return
    if quantity.name == "passkey_accuracy":
        base, ours = dense.at_largest("passkey"), sparse.at_largest("passkey")
        noise = bool(base and ours and overlap(base.low, base.high, ours.low, ours.high))
    else:  # bits per byte are never noise: over the same windows, the change is far surer than either figure
        noise = not quantity.name.endswith("bits_per_byte") and indistinct(dense, sparse, quantity.name)
    yield _judged(quantity, was, now, noise)


def _tasks(dense: Measurement, sparse: Measurement) -> Iterator[Row]:
    """The other retrieval tasks, each at its largest length."""
    for task in dict.fromkeys(entry.task for entry in sparse.retrieval if entry.task != "passkey"):
        base, ours = dense.at_largest(task), sparse.at_largest(task)
        if base is None or ours is None or base.length != ours.length:
            continue
        name = task.replace("_", " ").capitalize()
        quantity = _Quantity(f"{name}, {units.count(ours.length)} tokens", "", units.percent, True, True)
        yield _judged(quantity, base.accuracy, ours.accuracy, overlap(base.low, base.high, ours.low, ours.high))


def _judged(quantity: _Quantity, was: float | None, now: float | None, noise: bool) -> Row:
    shown = (quantity.show(was), quantity.show(now))
    if was is None or now is None or (was <= 0 and not quantity.points):
        return Row(quantity.label, *shown, units.DASH, "")
    moved = now - was if quantity.points else now / was - 1
    text = units.change(moved, "points" if quantity.points else "%")
    if moved != moved:
        return Row(quantity.label, *shown, units.DASH, "worse" if now != now else "")
    judgement: Judgement = "better" if (moved > 0) == quantity.more_is_better else "worse"
    if text[0].isdigit():
        judgement = "same"
    elif noise:
        judgement = "within noise"
    return Row(quantity.label, *shown, text, judgement)
