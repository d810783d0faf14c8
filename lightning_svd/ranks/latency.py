"""A table of how long a model and its layers take, as a file that is measured once and used anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_svd.layers.views import View
from lightning_svd.plain_data import Fits, by_name, each, having, is_count, is_finite, is_mapping, is_text, row
from lightning_svd.ranks.costs import LayerLatency, ModelCost, ModelLatency
from lightning_svd.writing import whole_file

FORMAT, VERSION = "lightning-svd latency table", 1


@dataclass(frozen=True)
class TimedLayer:
    """What was timed of one layer.

    Attributes:
        view: How its weight is seen as a matrix, as plain data.
        latency: Its seconds.
    """

    view: dict[str, Any]
    latency: LayerLatency


@dataclass(frozen=True)
class LatencyTable:
    """How long a model and its layers take, dense and as factors of some ranks; from :func:`~lightning_svd.profile`.

    Attributes:
        layers: By name.
        whole: Of the model, against the sum of its layers.
    """

    layers: Mapping[str, TimedLayer]
    whole: ModelLatency

    def applied(self, cost: ModelCost, views: Mapping[str, View], source: str = "the table") -> ModelCost:
        """The cost with these latencies.

        Args:
            cost: Of the model, counted.
            views: Its factorized layers.
            source: What to call the table in an error.

        Raises:
            ValueError: If the table has no times of a layer, or those of another one; the message names it.
        """
        prices = dict(cost.layers)
        for name, price in cost.layers.items():
            timed = self.layers.get(name)
            if timed is None and price.dense_macs and price.break_even:
                raise ValueError(
                    f"`latency_table`: {source} has no times of `{name}`: make one of this model, with the same "
                    f"`conv_mode`, or leave the layer out, `exclude_modules=['{name}']`"
                )
            if timed is None:  # not used, a lookup, or dense at any rank
                continue
            here = views[name].to_dict()
            if _plain(timed.view) != _plain(here):
                differ = next(key for key in here if _plain(here[key]) != _plain(timed.view.get(key)))
                raise ValueError(
                    f"`latency_table`: {source} is of another `{name}`, whose {differ} is {timed.view.get(differ)!r}, "
                    f"not {here[differ]!r}: make one of this model"
                )
            prices[name] = replace(price, latency=timed.latency)
        others = sum(timed.latency.dense for name, timed in self.layers.items() if name not in cost.layers)
        return replace(cost, layers=prices, latency=replace(self.whole, others=others))

    def save(self, path: str | Path) -> Path:
        """Write it as JSON.

        Raises:
            OSError: If the file cannot be written.
        """
        layers = {
            name: {"layer": timed.view, "dense": timed.latency.dense, "factored": timed.latency.factored}
            for name, timed in self.layers.items()
        }
        whole = {"dense": self.whole.dense, "samples": self.whole.samples}
        content = {"format": FORMAT, "version": VERSION, "conditions": dict(self.whole.conditions)}
        with whole_file(path) as beside:
            text = json.dumps(content | {"seconds": whole, "layers": layers}, indent=1)
            Path(beside).write_text(text + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If it is no such file, or one of a newer version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"`latency_table`: cannot read a table from {path}: {why}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"`latency_table`: {path} is no latency table: `lightning-svd profile` makes one")
        if content.get("version") != VERSION:
            raise ValueError(
                f"`latency_table`: {path} is of version {content.get('version')!r}, this lightning-svd reads "
                f"{VERSION}: make it anew, or update lightning-svd"
            )
        if not _IS_TABLE(content):
            raise ValueError(f"`latency_table`: {path} is damaged: make it anew")
        layers = {}
        for name, entry in content["layers"].items():
            factored = tuple((rank, seconds) for rank, seconds in entry["factored"])
            if any(low >= high for (low, _), (high, _) in pairwise(factored)):
                raise ValueError(
                    f"`latency_table`: {path} is damaged, the ranks of `{name}` are in disorder: make it anew"
                )
            layers[name] = TimedLayer(entry["layer"], LayerLatency(entry["dense"], factored))
        samples = tuple((one, whole) for one, whole in content["seconds"]["samples"])
        if any(not (a[0] < b[0] and a[1] < b[1]) for a, b in pairwise(samples)):
            raise ValueError(f"`latency_table`: {path} is damaged, `samples` are in disorder: make it anew")
        whole = ModelLatency(content["seconds"]["dense"], samples, conditions=content["conditions"])
        return cls(layers, whole)


def _is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0


def _is_condition(value: Any) -> bool:
    return is_text(value) or is_count(value)


def _some(fits: Fits) -> Fits:
    return lambda value: bool(value) and each(fits)(value)


_IS_LAYER = having(layer=is_mapping, dense=_is_positive, factored=_some(row(is_count, _is_positive)))
_IS_TABLE = having(
    format=is_text,
    version=is_count,
    conditions=by_name(_is_condition),
    seconds=having(dense=_is_positive, samples=_some(row(_is_positive, _is_positive))),
    layers=by_name(_IS_LAYER),
)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
