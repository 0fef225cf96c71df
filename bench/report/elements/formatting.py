"""How numbers and names are written: one place, so that page, Markdown and terminal agree."""

from __future__ import annotations

from bench.measure.stats import Estimate
from distill.common.files import size_text
from distill.models.architectures import ARCHITECTURES

STAGE_NAMES = {
    "prepare": "prepare",
    "tokenise": "tokenise",
    "text_encoders": "text encoders",
    "denoise": "denoise",
    "vae_decode": "VAE decode",
    "post_process": "post-process",
}
NONE = "–"


def stage_name(stage: str) -> str:
    return STAGE_NAMES.get(stage, stage)


def milliseconds(value: float | None) -> str:
    if value is None:
        return NONE
    if value < 0.995:
        return f"{value:.2f} ms"
    if value < 99.5:
        return f"{value:.1f} ms"
    return f"{value:,.0f} ms" if value < 1e4 else f"{value / 1e3:.1f} s"


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    if value < 100:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60)} s"


def long_seconds(value_ms: float | None) -> str:
    """Milliseconds written as seconds with two decimals, for the long times of full-size models."""
    return NONE if value_ms is None else f"{value_ms / 1e3:.2f} s"


def signed_percent(value: float) -> str:
    return f"{100 * value + 0.0:+.0f} %".replace("+0 %", "0 %").replace("-0 %", "0 %")


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    return NONE if value is None else size_text(round(value))


def count(value: float | None) -> str:
    """13.5 T, 2.57 B, 745 M."""
    if value is None:
        return NONE
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f}"


def joules(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:.{digits}f} J"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def percent(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def interval(estimate: Estimate | None, unit: str = "ms") -> str:
    """`[low, high]` in the unit, or why there is none."""
    if estimate is None:
        return NONE
    if estimate.low is None or estimate.high is None:
        return "too few runs"
    if unit == "x":
        return f"{estimate.low:.2f}–{estimate.high:.2f}×"
    if estimate.value >= 1e4:
        return f"{estimate.low / 1e3:.1f}–{estimate.high / 1e3:.1f} s"
    digits = 1 if estimate.value < 99.5 else 0
    return f"{estimate.low:,.{digits}f}–{estimate.high:,.{digits}f} ms"


def by_size(resolution: str) -> str:
    """`1024x1024` with spaces at which no line breaks."""
    return resolution.replace("x", "\u00a0×\u00a0")


def title_of(name: str) -> str:
    """A contestant's name as a heading: known models as their makers write them."""
    head, space, tail = name.partition(" ")
    known = ARCHITECTURES.get(head.lower())
    return (known.title if known else "Teacher" if head == "teacher" else head) + space + tail
