"""Numbers as the report shows them."""

from __future__ import annotations

from collections.abc import Sequence

ABSENT = "–"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return ABSENT if value is None else f"{100 * value:.{digits}f}"


def interval(bounds: Sequence[float] | None, scale: float = 1.0, digits: int = 3) -> str:
    return ABSENT if bounds is None else f"{scale * bounds[0]:.{digits}f} to {scale * bounds[1]:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    return ABSENT if value is None else f"{value:.{digits}g}"


def p_value(p: float | None) -> str:
    return ABSENT if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def duration(seconds: float) -> str:
    """Seconds as seconds, minutes or hours, to two digits."""
    size, unit = next((size, unit) for size, unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= size or size == 1)
    return f"{seconds / size:.2g} {unit}"
