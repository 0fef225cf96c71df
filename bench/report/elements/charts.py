"""Small inline SVG charts. Colours are CSS classes, so a chart follows the page's light or dark theme; sizes are
those of one column of a phone, so text is never scaled down."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 24, 34


@dataclass
class Series:
    """`points` are (x, y) or (x, y, low, high); `colour` is the index of a contestant's colour;
    `shift` moves the dots sideways by so many pixels, for whiskers that would lie on each other; `labels` stand beside the
    dots, one for each; one that `failed` the quality guard has hollow dots and a dashed line."""

    label: str
    colour: int
    points: list[tuple[float, ...]]
    dots: bool = True
    line: bool = True
    shift: float = 0.0
    labels: list[str] = field(default_factory=list)
    failed: bool = False


@dataclass
class Axis:
    label: str
    log: bool = False
    zero: bool = False
    ticks: list[tuple[float, str]] = field(default_factory=list)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range, with their halves and fifths where there are few; even steps in a range too narrow
    for those."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**exponent for exponent in exponents if low * 0.999 <= 10.0**exponent <= high * 1.001]
    if len(tens) >= 2:
        return tens
    finer = [
        factor * 10.0**exponent
        for exponent in exponents
        for factor in (1, 2, 5)
        if low * 0.999 <= factor * 10.0**exponent <= high * 1.001
    ]
    return finer if len(finer) >= 2 else nice_ticks(low, high)


def number(value: float) -> str:
    """Short: 1200 -> 1.2k, 0.0123 -> 0.012."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def tick(value: float) -> str:
    """In full: ticks stand at even distances, which rounding to three digits would belie."""
    return number(value) if abs(value) >= 1000 else f"{value:g}"


class _Scale:
    def __init__(self, axis: Axis, values: list[float], start: float, end: float) -> None:
        self._log = axis.log
        low, high = min(values), max(values)
        if axis.zero:
            low = 0.0
        if not axis.log and not axis.zero:
            pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
            low, high = low - pad, high + pad
        if axis.zero:
            high *= 1.08
        if axis.log:
            low, high = low / 1.15, high * 1.15
        self.low, self.high, self._start, self._end = low, high or 1.0, start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self._log:
            value, low, high = math.log(max(value, self.low)), math.log(low), math.log(high)
        return self._start + (value - low) / (high - low) * (self._end - self._start)


def line_chart(series: list[Series], x: Axis, y: Axis, title: str) -> Markup:
    """Lines with optional dots and interval whiskers. An empty list of points gives an empty string."""
    series = [one for one in series if one.points]
    if not series:
        return Markup("")
    xs = [point[0] for one in series for point in one.points]
    ys = [value for one in series for point in one.points for value in point[1:]]
    to_x = _Scale(x, xs, LEFT, WIDTH - RIGHT)
    to_y = _Scale(y, ys, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    y_ticks = log_ticks(to_y.low, to_y.high) if y.log else nice_ticks(to_y.low, to_y.high)
    for value in y_ticks:
        at = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{tick(value)}</text>')
    x_ticks = x.ticks or [(value, tick(value)) for value in nice_ticks(to_x.low, to_x.high, 5)]
    for value, text in x_ticks:
        at = to_x(value)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{escape(text)}</text>'
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text class="axis-label" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
    )
    parts.append(f'<text class="axis-label" x="4" y="{TOP - 12}">{escape(y.label)}</text>')
    for one in series:
        path = " ".join(f"{to_x(point[0]):.1f},{to_y(point[1]):.1f}" for point in one.points)
        marks = f"c{one.colour} failed" if one.failed else f"c{one.colour}"
        if one.line:
            parts.append(f'<polyline class="line {marks}" points="{path}"/>')
        for index, point in enumerate(one.points if one.dots else []):
            at_x, at_y = to_x(point[0]) + one.shift, to_y(point[1])
            if len(point) == 4:
                parts.append(
                    f'<line class="whisker c{one.colour}" x1="{at_x:.1f}" x2="{at_x:.1f}" '
                    f'y1="{to_y(point[2]):.1f}" y2="{to_y(point[3]):.1f}"/>'
                )
            guard = ", failed the quality guard" if one.failed else ""
            tip = f"{escape(one.label)}: {number(point[1])} {escape(y.label)}{guard}"
            parts.append(
                f'<circle class="dot {marks}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="3.2"><title>{tip}</title></circle>'
            )
            if one.labels:
                parts.append(
                    f'<text class="tick" x="{at_x + 5:.1f}" y="{at_y - 5:.1f}">{escape(one.labels[index])}</text>'
                )
    parts.append("</svg>")
    return Markup("".join(parts))
