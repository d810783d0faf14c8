"""Watching a metric while ranks fall: pruning pauses when it falls too far, and goes on when it has recovered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_svd.arguments import check_choice, check_weight, shown
from lightning_svd.report.data import Pause


@dataclass
class MetricGuard:
    """What was seen of a metric, and whether it keeps ranks from falling.

    Attributes:
        monitor: Name of the metric.
        mode: "min" if less is better, "max" if more is.
        max_drop: How far below its best the metric may be before pruning pauses; infinity to only watch it.
        values: (step, value) of every validation.
        pauses: In order; the last one may go on.
        lacking_in: Epochs of this fit in which the metric was not there yet.
    """

    monitor: str
    mode: str
    max_drop: float = math.inf
    values: list[tuple[int, float]] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    lacking_in: set[int] = field(default_factory=set)

    @property
    def paused(self) -> bool:
        """Whether ranks must not fall now."""
        return bool(self.pauses) and self.pauses[-1].end is None

    @property
    def best(self) -> float | None:
        """The best value so far; None before the first that is finite."""
        finite = [value for _, value in self.values if math.isfinite(value)]
        return (max if self.mode == "max" else min)(finite, default=None)

    def has_fallen(self, value: float) -> bool:
        """Whether this value is further below the best than is allowed; one that is not finite is."""
        if self.max_drop == math.inf:
            return False
        if not math.isfinite(value):
            return True
        drop = 0.0 if self.best is None else (self.best - value if self.mode == "max" else value - self.best)
        return drop > self.max_drop

    def see(self, step: int, value: float, fallen: bool) -> Pause | None:
        """Take note of a validation.

        Args:
            step: Optimizer steps so far.
            value: The metric.
            fallen: :meth:`has_fallen`, as all processes have agreed on.

        Returns:
            The pause that began or ended with it.
        """
        best, paused = self.best, self.paused
        self.values.append((step, value))
        if fallen and not paused:
            self.pauses.append(Pause(step, None, value, value if best is None else best))
        elif paused and not fallen:
            self.pauses[-1] = replace(self.pauses[-1], end=step)
        return self.pauses[-1] if fallen != paused else None

    def steps_paused(self, step: int) -> int:
        """How many steps until this one were spent in pauses; the schedule of ranks stands still in them."""
        ends = (step if pause.end is None else min(step, pause.end) for pause in self.pauses)
        return sum(max(0, end - pause.start) for pause, end in zip(self.pauses, ends, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and dicts for a checkpoint."""
        return {"values": list(self.values), "pauses": [asdict(pause) for pause in self.pauses]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self.values = [(step, value) for step, value in state["values"]]
        self.pauses = [Pause(**pause) for pause in state["pauses"]]


def guard_on(monitor: str | None, mode: str | None, max_metric_drop: float | None) -> MetricGuard | None:
    """The guard that these arguments of the callback ask for; None without ``monitor``.

    Raises:
        ValueError: If they do not fit together; the message names the argument.
    """
    if monitor is None:
        for name, value in (("mode", mode), ("max_metric_drop", max_metric_drop)):
            if value is not None:
                raise ValueError(f"`{name}` needs `monitor`, the name of the metric, got {name}={shown(value)} alone")
        return None
    if not isinstance(monitor, str) or not monitor.strip():
        raise ValueError(f"`monitor` must be the name of a logged metric, got {shown(monitor)}")
    check_choice("mode", mode, ("min", "max"))
    if max_metric_drop is not None:
        check_weight("max_metric_drop", max_metric_drop)
    return MetricGuard(monitor, str(mode), math.inf if max_metric_drop is None else max_metric_drop)
