"""Which ranks when: what is to change in a run after a step."""

from lightning_svd.training.policies.alternating import Alternating
from lightning_svd.training.policies.fall import FallToBudget, Finetune
from lightning_svd.training.policies.nested import Nested
from lightning_svd.training.policies.policy import Change, Choose, ChooseRanks, PlannedPolicy, RankPolicy

SCHEDULES: dict[str, type[RankPolicy]] = {
    "fall": FallToBudget,
    "finetune": Finetune,
    "alternating": Alternating,
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
    "Nested",
    "PlannedPolicy",
    "RankPolicy",
]
