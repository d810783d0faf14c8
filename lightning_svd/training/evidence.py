"""Which batches are observed ahead of a rank cut, and whether they are enough to judge ranks by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_svd.layers.forms import PairForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.ranks.importance import OnData
from lightning_svd.training import processes
from lightning_svd.training.judging import Verdict
from lightning_svd.training.observation import Listener, Observer
from lightning_svd.training.policies.policy import RankPolicy


class Evidence:
    """Has batches observed ahead of each cut that judges ranks, and holds a cut back until there are enough.

    The first cut waits for as many as are wanted, and so does one that nobody foresaw, or that met NaN.

    Args:
        importance: How ranks are judged, and by how many batches.
        observer: What collects statistics.
        policy: What says when ranks are cut.
        check_weights: Raises ``ValueError`` by a layer's name where the weights are not finite themselves.

    Attributes:
        observes: Whether the next batch is observed.
        waits: Whether a cut waits for more of them.
        not_finite: The layers whose data had NaN or infinity in it when a cut was due.
    """

    def __init__(
        self, importance: OnData, observer: Observer, policy: RankPolicy, check_weights: Callable[[], None]
    ) -> None:
        self.importance, self.observer, self.policy = importance, observer, policy
        self.observes = self.waits = False
        self.not_finite: list[str] = []
        self._check_weights = check_weights

    def rest(self) -> None:
        """Watch nothing any more."""
        self.observer.rest()

    # ------------------------------------------------------------------------------------------------------ a batch

    def listen(self) -> None:
        """Observe the loss that is trained, in its own backward pass, from the next batch on."""
        self.observer.rest()
        self.observer = Listener(self.observer.model, self.observer.layers)

    def plan(self, clock: int) -> None:
        """Say whether the next batch is observed: ahead of a cut, or for one that waits.

        Args:
            clock: The step count of the schedule of ranks.
        """
        wanted, soon = self.importance.steps, False
        if self.policy.pending is not None and self.policy.is_due(clock + wanted):
            ahead = range(clock + 1, clock + wanted + 1)
            soon = any(self.policy.is_due(later) and self.policy.judges(later) for later in ahead)
        self.observes = soon or self.waits

    def begin_batch(self) -> None:
        """Observe the batch that comes, if it is to be: a loop of plain PyTorch tells nobody that its first begins."""
        if self.observes:
            self.observer.begin_batch()
        else:
            self.observer.rest()

    def end_batch(self, device: torch.device) -> None:
        """The batch is over that was observed, if one was; processes meet on this device."""
        if self.observer.is_open:
            processes.meet(device)
            self.observer.end_batch()

    # -------------------------------------------------------------------------------------------------------- a cut

    def is_enough(self, due: bool, *, may_cut: bool, is_first: bool, is_last: bool) -> bool:
        """Whether ranks are judged now.

        Args:
            due: Whether the policy says so.
            may_cut: Whether ranks may fall now.
            is_first: Whether none was cut before.
            is_last: Whether this was the last step, after which nothing comes that could be waited for.

        Raises:
            ValueError: If there is NaN or infinity in the data because it is in a layer's weights.
        """
        if due and (is_first or not self.observer.batches):
            self.waits = True
        if self.waits:
            due = may_cut and (is_last or self.observer.batches >= self.importance.steps)
        if due:
            self.not_finite = processes.decide(self.observer.not_finite)
            if self.not_finite:
                self._check_weights()
                self.observer.forget()
                due = False
            self.waits = not due
        return due

    def verdict(self, layers: Mapping[str, SVDLayer]) -> Verdict:
        """What the ranks of these layers are worth by what was observed, which is then forgotten."""
        judged = {name: layer for name, layer in layers.items() if not isinstance(layer.form, PairForm)}
        verdict = Verdict(judged, self.importance, self.observer.seen)
        self.observer.forget()
        return verdict

    def drop(self) -> None:
        """Forget what was observed, and what waited for more of it: ranks have changed without it."""
        self.waits = False
        self.observer.forget()

    # ------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What was observed so far, and what is to be."""
        listens = isinstance(self.observer, Listener)
        return {"waits": self.waits, "observes": self.observes, "listens": listens, **self.observer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: If that is not of these layers at these ranks.
        """
        self.waits, self.observes = state["waits"], state["observes"]
        if state["listens"] and not isinstance(self.observer, Listener):
            self.listen()
        self.observer.load_state_dict(state)
