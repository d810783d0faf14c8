"""Which ranks when: what is to change in a run after a step."""

from lightning_svd.training.policies.alternating import Alternating
from lightning_svd.training.policies.fall import FallToBudget, Finetune
from lightning_svd.training.policies.grow_and_prune import GrowAndPrune
from lightning_svd.training.policies.nested import Nested
from lightning_svd.training.policies.policy import Change, Choose, ChooseRanks, PlannedPolicy, RankPolicy

SCHEDULES: dict[str, type[RankPolicy]] = {
    "fall": FallToBudget,
    "finetune": Finetune,
    "alternating": Alternating,
    "grow_and_prune": GrowAndPrune,
    "nested": Nested,
}

__all__ = [
    "SCHEDULES",
    "Alternating",
    "Change",
    "Choose",
    "ChooseRanks",
    "FallToBudget",
    "Finetune",
    "GrowAndPrune",
    "Nested",
    "PlannedPolicy",
    "RankPolicy",
]
