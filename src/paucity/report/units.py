"""Numbers as text: significant digits, thousands separated, the unit after a space; None reads as a dash."""

import math
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def _odd(value: float | None) -> str | None:
    """The text of a value that is no finite number."""
    if value is None:
        return DASH
    if math.isnan(value):
        return "not a number"
    return None if math.isfinite(value) else "∞" if value > 0 else f"{MINUS}∞"


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, never fewer than all before the point: ``0.0412``, ``81.2``, ``12,345``."""
    if value is None or not math.isfinite(value):
        return _odd(value) or DASH
    rounded = float(f"{value:.{digits}g}")
    magnitude = math.floor(math.log10(abs(rounded))) if rounded else 0
    if magnitude >= digits - 1:
        return _signed(f"{value:,.0f}")
    return _signed(f"{rounded:,.{digits - 1 - magnitude}f}")


def fixed(value: float | None, digits: int = 3) -> str:
    """``digits`` after the point: ``1.235``."""
    return _odd(value) or _signed(f"{value:,.{digits}f}")


def count(value: int | None) -> str:
    """A whole number with its thousands separated: ``4,096``."""
    return DASH if value is None else _signed(f"{value:,}")


def ms(value: float | None) -> str:
    """Milliseconds: ``0.0412 ms``, ``81.2 ms``, ``12,345 ms``."""
    return _odd(value) or f"{significant(value)} ms"


def scaled(value: float | None, unit: str) -> str:
    """An SI prefix before ``unit``, three significant digits: ``1.23 GFLOP``."""
    odd = _odd(value)
    if odd or value is None:
        return odd or DASH
    step = 0
    while step < len(_PREFIXES) - 1 and abs(float(f"{value:.3g}")) >= 1000:
        value, step = value / 1000, step + 1
    return f"{significant(value)} {_PREFIXES[step]}{unit}".rstrip()


def flop(value: float | None) -> str:
    """Floating point operations: ``1.23 GFLOP``."""
    return scaled(value, "FLOP")


def megabytes(value: float | None) -> str:
    """Megabytes (10^6 bytes), as gigabytes from 10,000 on: ``812 MB``, ``12.3 GB``."""
    odd = _odd(value)
    if odd or value is None:
        return odd or DASH
    return f"{significant(value)} MB" if abs(value) < 9999.5 else f"{significant(value / 1000)} GB"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction as per cent, without needless zeros: ``0.512`` is ``51.2 %``, ``1.0`` is ``100 %``."""
    odd = _odd(fraction)
    if odd or fraction is None:
        return odd or DASH
    text = f"{100 * fraction:,.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{'0' if text == '-0' else _signed(text)} %"


def change(fraction: float | None, unit: str = "%", digits: int = 1) -> str:
    """A signed change: ``+2.1 %``, ``−29.8 %``; what rounds to nothing has no sign."""
    odd = _odd(fraction)
    if odd or fraction is None:
        return odd or DASH
    text = f"{100 * fraction:+,.{digits}f}"
    return f"{_signed(text if float(text.replace(',', '')) else text[1:])} {unit}"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``42 s``, ``2 min 3 s``, ``1 h 2 min``."""
    odd = _odd(seconds)
    if odd or seconds is None:
        return odd or DASH
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
