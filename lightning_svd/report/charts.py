"""Line charts as geometry: where ticks, lines and labels go; knows neither HTML nor reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

SIZE = 1000  # a plot is a square of this side, stretched to whatever room the page has
CLOSEST = 5  # points of a curve that are closer than this in both directions are one


@dataclass(frozen=True)
class Axis:
    """One axis of a chart, from ``low`` to ``high``.

    Attributes:
        title: What the values are, with their unit.
        low: Value at the start.
        high: Value at the end, larger.
        label: Value -> text of a tick.
        most_ticks: At most so many.
        whole: Ticks at whole numbers only.
    """

    title: str
    low: float
    high: float
    label: Callable[[float], str] = "{:,.10g}".format
    most_ticks: int = 6
    whole: bool = False

    def place(self, value: float) -> float:
        """Where ``value`` is, 0 at the start and ``SIZE`` at the end."""
        return SIZE * (value - self.low) / (self.high - self.low)

    def round_values(self) -> list[float]:
        """Values for ticks, evenly spaced."""
        step = _round_step((self.high - self.low) / self.most_ticks)
        step = max(1.0, step) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]

    def ticks(self) -> list[tuple[str, str]]:
        """(place, text) of each tick."""
        return [(percent(self.place(value)), self.label(value)) for value in self.round_values()]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: What it shows.
        path: SVG path data in a square of side ``SIZE``.
        look: Class name for its style.
        hue: Angle of its color in degrees, where the style uses it.
        index: Which of its kind it is.
        tip: What is said where it is pointed at.
    """

    name: str
    path: str
    look: str
    hue: int = 0
    index: int = 0
    tip: str = ""


@dataclass(frozen=True)
class Mark:
    """A vertical line with a text beside it.

    Attributes:
        at: Where, from 0 to ``SIZE``.
        text: What it says.
        look: Class name for its style.
    """

    at: float
    text: str
    look: str

    @property
    def place(self) -> str:
        """Where, for style."""
        return percent(self.at)

    @property
    def path(self) -> str:
        """The line as SVG path data."""
        return f"M{round(self.at)} 0V{SIZE}"

    @property
    def beyond_middle(self) -> bool:
        """Whether the text has more room on the left."""
        return self.at > SIZE / 2


@dataclass(frozen=True)
class Band:
    """A part of the x axis that is tinted, from 0 to ``SIZE``."""

    start: float
    end: float

    @property
    def style(self) -> str:
        """Its edges."""
        return f"left: {percent(self.start)}; right: {percent(SIZE - self.end)}"


@dataclass(frozen=True)
class EndLabel:
    """A text at the right end of a line.

    Attributes:
        line: Where the line ends, from 0 at the top to ``SIZE``.
        at: Where the text is.
        text: What it says.
        hue: Of the line.
    """

    line: float
    at: float
    text: str
    hue: int

    @property
    def place(self) -> str:
        """Where the text is, for style."""
        return percent(self.at)

    @property
    def path(self) -> str:
        """From the line to the text, beyond the plot, as SVG path data."""
        return f"M{SIZE} {round(self.line)}L{SIZE + 12} {round(self.at)}"


@dataclass(frozen=True)
class Chart:
    """Lines over two axes.

    Attributes:
        title: Its heading.
        description: The same in words, for people who do not see it.
        x: Horizontal axis.
        y: Vertical axis.
        lines: The last one is on top.
        marks: Vertical lines.
        bands: Tinted parts.
        ends: Labels at the right.
    """

    title: str
    description: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    bands: Sequence[Band] = ()
    ends: Sequence[EndLabel] = ()

    def grid(self) -> str:
        """A horizontal line for each tick, as SVG path data."""
        return "".join(f"M0 {round(SIZE - self.y.place(value))}H{SIZE}" for value in self.y.round_values())

    def key(self) -> list[tuple[str, str, int]]:
        """(look, name, hue) of each line."""
        return [(line.look, line.name, line.hue) for line in sorted(self.lines, key=lambda line: line.index)]

    def smaller(self) -> Chart:
        """With fewer ticks, for a small place."""
        return replace(self, x=replace(self.x, most_ticks=4), y=replace(self.y, most_ticks=3), ends=())


def percent(place: float) -> str:
    """A place as style has it."""
    return f"{100 * place / SIZE:.6g}%"


def curve(x: Axis, y: Axis, points: Iterable[tuple[float, float]]) -> str:
    """Straight lines through the points that are finite; a dot if there is one."""
    kept: list[tuple[int, int]] = []
    last = None
    for a, b in points:
        if math.isfinite(b):
            last = (round(x.place(a)), round(SIZE - y.place(b)))
            if not kept or max(abs(last[0] - kept[-1][0]), abs(last[1] - kept[-1][1])) >= CLOSEST:
                kept.append(last)
    if last is not None and kept[-1] != last:
        kept.append(last)
    dot = "h0" if len(kept) == 1 else ""
    return "M" + "L".join(f"{a} {b}" for a, b in kept) + dot if kept else ""


def spot(x: Axis, y: Axis, a: float, b: float) -> str:
    """A dot."""
    return f"M{round(x.place(a))} {round(SIZE - y.place(b))}h0"


def decades(title: str, values: Iterable[float], label: Callable[[float], str]) -> Axis:
    """An axis of common logarithms, from a power of ten to another.

    Args:
        title: What the values are.
        values: That have to be on it; those that have no logarithm are left out.
        label: Value, not its logarithm -> text.
    """
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    low = math.floor(min(logs) + 1e-9)
    high = max(low + 1, math.ceil(max(logs) - 1e-9))
    return Axis(title, low, high, lambda log: label(10.0**log), whole=True)


def staircase(x: Axis, y: Axis, points: Sequence[tuple[float, float]]) -> str:
    """From each point to the right, and there up or down to the next; the last one goes on to the end of ``x``."""
    (a, b), *rest = [(round(x.place(a)), round(SIZE - y.place(b))) for a, b in points]
    return f"M{a} {b}" + "".join(f"H{a}V{b}" for a, b in rest) + f"H{SIZE}"


def spread(places: Sequence[float], gap: float, high: float) -> list[float]:
    """The places in [0, high] moved as little as one sweep needs to lie ``gap`` apart, in the same order.

    Args:
        places: Where labels should be.
        gap: Least distance.
        high: Largest place; with too many labels for it they lie closer.
    """
    gap = min(gap, high / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [0.0] * len(places)
    least = 0.0
    for index in order:
        moved[index] = least = max(places[index], least)
        least += gap
    most = high
    for index in reversed(order):
        moved[index] = most = min(moved[index], most)
        most -= gap
    return moved


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
