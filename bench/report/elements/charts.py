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
    `shift` moves the dots sideways by so many pixels, for whiskers that would lie on each other; one that `failed` the
    quality guard has hollow dots and a dashed line."""

    label: str
    colour: int
    points: list[tuple[float, ...]]
    dots: bool = True
    line: bool = True
    shift: float = 0.0
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
    """Powers of ten within the range, with their halves and fifths where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**exponent for exponent in exponents if low * 0.999 <= 10.0**exponent <= high * 1.001]
    if len(tens) >= 2:
        return tens
    return [
        factor * 10.0**exponent
        for exponent in exponents
        for factor in (1, 2, 5)
        if low * 0.999 <= factor * 10.0**exponent <= high * 1.001
    ]


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
        for point in one.points if one.dots else []:
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
    parts.append("</svg>")
    return Markup("".join(parts))


def dot_whiskers(rows: list[tuple[str, int, float, float | None, float | None]], unit: str, title: str) -> Markup:
    """One line per row (label, colour, value, low, high) on a common scale from zero, with a dashed line at 1."""
    if not rows:
        return Markup("")
    height = 20 + 26 * len(rows) + 20
    top = max(max(value, high or value) for _, _, value, _, high in rows) * 1.12
    left = 84

    def at(value: float) -> float:
        return left + value / top * (WIDTH - left - 46)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for value in nice_ticks(0, top, 4):
        x = at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - 22}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick(value)}{unit}</text>')
    if top > 1:
        parts.append(f'<line class="grid one" x1="{at(1):.1f}" x2="{at(1):.1f}" y1="6" y2="{height - 22}"/>')
    for index, (label, colour, value, low, high) in enumerate(rows):
        y = 22 + 26 * index
        parts.append(f'<text class="row-label" x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        if low is not None and high is not None:
            parts.append(
                f'<line class="whisker wide c{colour}" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y}" y2="{y}"/>'
            )
        parts.append(f'<circle class="dot c{colour}" cx="{at(value):.1f}" cy="{y}" r="4.5"/>')
        parts.append(f'<text class="value" x="{at(high or value) + 9:.1f}" y="{y + 4}">{value:.2f}{unit}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))
