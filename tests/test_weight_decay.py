"""Through a whole fit: decay acts on s, and the user's groups and learning rates are those of a dense run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from models import SmallMLP, data, quiet_trainer, trained_parameters
from torch.optim import lr_scheduler

from lightning_svd import FallToBudget, Regularizer, SVDTrainingCallback, decompose, svd_layers

DECAY = 0.3


def is_frame(name):
    return name.endswith((".U", ".V"))


class Keep(Callback):
    """What is trained after each batch, and the groups before and after every step; listed first, before a cut."""

    def __init__(self):
        self.groups = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(trainer)
        self.parameters = {name: p.detach().clone() for name, p in trained_parameters(pl_module).items()}

    def note(self, trainer):
        self.groups.append(
            [
                {key: len(value) if key == "params" else value for key, value in group.items()}
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
            ]
        )


class ByHandGroups(SmallMLP):
    """Matrices decay, vectors do not, and the head learns slower, as in many training recipes."""

    def configure_optimizers(self):
        head = set(self.head.parameters())
        rest = [p for p in self.parameters() if p not in head]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for p in head if p.ndim > 1], "lr": 0.01, "weight_decay": 0.5 * DECAY},
            {"params": [p for p in head if p.ndim == 1], "lr": 0.01, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def expected_decay(model, name):
    """What decays in a dense run of the same model, s standing for the weight."""
    if is_frame(name):
        return 0.0
    if not isinstance(model, ByHandGroups):
        return DECAY
    return (0.5 * DECAY if name.startswith("head") else DECAY) if name.endswith(".s") else 0.0


OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-3},
    "Adagrad": {"lr": 1e-2},
}


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "by hand"])
@pytest.mark.combination("Weight decay on s only", "{optimizer}")
def test_decay_acts_on_singular_values_and_plain_parameters_only(optimizer):
    if optimizer == "by hand":
        model = ByHandGroups()
    else:
        model = SmallMLP(optimizer, weight_decay=DECAY, **OPTIMIZERS[optimizer])
    twin = copy.deepcopy(model)
    decompose(twin)
    ours = twin.configure_optimizers()
    group_of = {p: group for group in ours.param_groups for p in group["params"]}
    reference = type(ours)(
        [
            {**group_of[p], "params": [p], "weight_decay": expected_decay(model, name)}
            for name, p in twin.named_parameters()
        ]
    )
    for x, y in data():
        reference.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        reference.step()

    keep = Keep()
    callback = SVDTrainingCallback(
        target_macs=1.0,
        regularizer=Regularizer(sparsity=None, orthogonality_weight=0.0),
        schedule=FallToBudget(start=1.0, end=1.0),
    )
    quiet_trainer(callbacks=[keep, callback], max_epochs=1).fit(model, data())
    for name, p in twin.named_parameters():
        assert torch.equal(keep.parameters[name], p), name
    assert keep.groups == [keep.groups[0]] * 16
    # The dense layers' groups, with U, s, V for each of the 3 weights.
    dense = [group["params"] for group in type(model)().configure_optimizers().param_groups]
    assert sum(group["params"] for group in keep.groups[0]) == sum(map(len, dense)) + 2 * 3


@pytest.mark.parametrize("final", ["dense", "factored"])
def test_names_in_the_users_groups_follow_their_parameters(final):
    class Named(SmallMLP):
        def configure_optimizers(self):
            return torch.optim.SGD(self.named_parameters(), lr=0.05)

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            group = trainer.optimizers[0].param_groups[0]
            of_weights = [name.rpartition(".weight")[0] or name for name in group["param_names"]]
            layers = {id(p): name for name, layer in svd_layers(pl_module).items() for p in layer.form.trained}
            names = {id(p): name for name, p in pl_module.named_parameters()}
            assert of_weights == [layers.get(id(p)) or names[id(p)] for p in group["params"]]

    model = Named()
    names = [name for name, _ in model.named_parameters()]
    trainer = quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4, final=final), Look()])
    trainer.fit(model, data())
    group = trainer.optimizers[0].param_groups[0]
    assert len(group["param_names"]) == len(group["params"])
    assert (group["param_names"] == names) == (final == "dense")


# ------------------------------------------------------------------------------------------------------ learning rates


def warm_up(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6), lr_scheduler.CosineAnnealingLR(optimizer, 26)]
    return lr_scheduler.SequentialLR(optimizer, parts, [6])


SCHEDULERS = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=32),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [5, 14, 20]),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda k: 0.9**k, lambda k: 1 / (1 + k)]),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 32),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=3),
    "SequentialLR": warm_up,
}


class Scheduled(SmallMLP):
    """Two groups, and a learning rate that changes with every step."""

    def __init__(self, scheduler="MultiStepLR"):
        super().__init__()
        self.scheduler = scheduler

    def training_step(self, batch, batch_idx):
        self.log("level", 1.0)  # a plateau
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in self.parameters() if p.ndim == 1]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
        scheduler = {"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": "step", "monitor": "level"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class TwoScheduled(SmallMLP):
    """Two optimizers, each with its schedule, in manual mode."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self):
        head = torch.optim.Adam(self.head.parameters(), lr=1e-3, weight_decay=DECAY)
        body = [p for name, p in self.named_parameters() if not name.startswith("head")]
        body = torch.optim.SGD(body, lr=0.05, momentum=0.9, weight_decay=DECAY)
        return [head, body], [
            lr_scheduler.OneCycleLR(head, 0.01, total_steps=32),
            lr_scheduler.ExponentialLR(body, 0.9),
        ]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, None])
@pytest.mark.combination("Schedulers, resumed too", "{scheduler}")
def test_learning_rates_are_those_of_a_dense_run_and_go_on_when_resumed(scheduler, tmp_path):
    def build():
        return Scheduled(scheduler) if scheduler else TwoScheduled()

    def groups(*callbacks, **options):
        keep = Keep()
        quiet_trainer(callbacks=[*callbacks, keep], enable_checkpointing=True, **options).fit(build(), data(), **resume)
        return [[{**group, "params": None} for group in moment] for moment in keep.groups]

    resume = {}
    save = ModelCheckpoint(tmp_path / "ours", "{epoch}", save_top_k=-1)
    dense = groups(ModelCheckpoint(tmp_path / "dense"))
    assert len({moment[0]["lr"] for moment in dense}) > 2
    assert groups(SVDTrainingCallback(target_macs=0.4), save) == dense

    resume = {"ckpt_path": tmp_path / "ours" / "epoch=0.ckpt"}
    resumed = groups(SVDTrainingCallback(target_macs=0.4), ModelCheckpoint(tmp_path / "resumed"))
    assert resumed == dense[16:]
