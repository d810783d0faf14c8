"""SVD training of parameters that are sharded by ``fully_shard``, through Lightning's ``ModelParallelStrategy``."""

import multiprocessing
import os
import re
import shutil
import socket
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from models import data, dealt, quiet_trainer
from scaling import Group, cut_numbers, step_numbers
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_svd import (
    FallToBudget,
    Regularizer,
    SVDTraining,
    SVDTrainingCallback,
    add_gradients,
    decompose,
    gather_factored,
    svd_layers,
)
from lightning_svd.files.checkpoints import check_state, saved_state
from lightning_svd.layers.matrices import roundoff
from lightning_svd.ranks.importance import Spectrum
from lightning_svd.training.sharded import ShardedLayers, ShardedTraining

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("torch has fully_shard from 2.6 on", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated"),  # torch's own, for its compiler
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Recomputed(nn.Sequential):
    """Computes again in the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def net(even=False):
    """Layers whose rows two processes cannot share evenly, nor four; or can."""
    a, b, c = (48, 40, 8) if even else (47, 41, 5)
    inner = Recomputed(nn.Linear(a, b), nn.ReLU())
    return nn.Sequential(nn.Flatten(), nn.Linear(64, a), nn.ReLU(), inner, nn.LayerNorm(b), nn.Linear(b, c)).double()


class Whole(LightningModule):
    """Its training in one process."""

    def __init__(self, optimizer="AdamW", even=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.optimizer, self.options = net(even), optimizer, {"lr": 1e-2, "weight_decay": 1e-2} | options

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)(self.parameters(), **self.options)

    def train_dataloader(self):
        return dealt(self)

    def val_dataloader(self):
        return self.train_dataloader()

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


class Sharded(Whole):
    """The same with parameters in several processes."""

    left = ("5",)  # in one process it would train as a dense layer in the end, its rank being full

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        decompose(self.net, exclude_modules=self.left)
        fsdp.fully_shard(self.net[3], mesh=mesh)
        fsdp.fully_shard(self.net, mesh=mesh)


class ByNumber(Sharded):
    """Batches by their number: in the middle of an epoch Lightning goes on with the first of a loader."""

    def training_step(self, batch, batch_idx):
        return super().training_step([*dealt(self)][batch_idx], batch_idx)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def rows(tensor):
    """Those in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class UnlikeEachOther(Sharded):
    """Other weights in each process."""

    def configure_model(self):
        torch.manual_seed(self.global_rank)
        self.net[1].reset_parameters()
        super().configure_model()


class NotSharded(Sharded):
    """Parameters are left whole."""

    def configure_model(self):
        decompose(self.net)


class NotFactorized(Sharded):
    """Its layers stay dense."""

    def configure_model(self):
        fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Grouped(Sharded):
    """A convolution in groups."""

    def configure_model(self):
        self.net.append(nn.Conv1d(4, 4, 3, groups=2))
        super().configure_model()


class Frozen(Sharded):
    """One factor is not trained."""

    def configure_model(self):
        super().configure_model()
        self.net[1].U.requires_grad_(False)


class Half(Sharded):
    """Parameters in half precision."""

    def configure_model(self):
        self.net.bfloat16()
        super().configure_model()


class Compiled(Sharded):
    """A compiled block."""

    def configure_model(self):
        super().configure_model()
        self.net[3].compile()


class InBFloat16(Sharded):
    """Computes in half precision with parameters in float32."""

    def configure_model(self):
        self.net.float()
        decompose(self.net)
        mixed = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"], mp_policy=mixed)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x.float()).float(), y)


class Counted(Sharded):
    """Its MACs are counted before it is sharded."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        decompose(self.net, exclude_modules=self.left, example_input=INPUTS[:3])
        fsdp.fully_shard(self.net, mesh=mesh)


class Manual(Sharded):
    """Manual optimization."""

    automatic_optimization = False


def svd_callback(**arguments):
    given = {
        "target_params": 0.5,
        "schedule": FallToBudget(start=0.3, cuts=3),
        "full_rank_as": "svd",
        "final": "decomposed",
        "importance": "spectrum",
    }
    penalties = Regularizer(sparsity_weight=0.02, orthogonality_weight=10.0)
    return SVDTrainingCallback(**{**given, "regularizer": penalties, **arguments})


EPOCHS = (0, 1, 2)  # of full, falling and final ranks


class FixedRanks(SVDTrainingCallback):
    """Ends with ranks that it is written for."""

    def __init__(self):
        schedule = FallToBudget(start=0.3, cuts=3)
        super().__init__(target_params=0.5, final="decomposed", schedule=schedule, importance="spectrum")

    def choose_ranks(self, energies, cost, share=None):
        return {"net.1": 10, "net.3.0": 12, "net.5": 3}


class AllFactorized(Sharded):
    """With a layer that is narrower than there are processes."""

    left = ()


class Witness(Callback):
    """Keeps the ranks after each step, the dense weights after some, and what the model puts out in the end."""

    def __init__(self, every=1):
        self.every, self.ranks, self.weights = every, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ranks.append([layer.rank for layer in svd_layers(pl_module).values()])
        if len(self.ranks) % self.every == 0:
            self.weights.append({name: whole(value).clone() for name, value in pl_module.state_dict().items()})

    def on_fit_end(self, trainer, pl_module):
        with torch.no_grad():
            self.outputs = pl_module.net(INPUTS)


INPUTS = next(iter(data(dtype=torch.float64)))[0]


def world():
    return int(os.environ.get("WORLD_SIZE", "1"))


def fit(model, *callbacks, ckpt_path=None, parallel=None, in_folders=False, **options):
    if isinstance(model, Sharded):
        sizes = parallel or {"data_parallel_size": world(), "tensor_parallel_size": 1}
        strategy = ModelParallelStrategy(**sizes, save_distributed_checkpoint=in_folders)
        options = {"strategy": strategy, "devices": world(), "use_distributed_sampler": False} | options
    quiet_trainer(callbacks=[*callbacks], **{"max_epochs": 4} | options).fit(model, ckpt_path=ckpt_path)


def in_processes(count, work, folder):
    """What each of several processes returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked from a process that has done nothing else: one that has run a thousand tests may be in any state.
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(_process, (count, port, work, folder), count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank, count, port, work, folder):
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    torch.save(work(folder), folder / f"{rank}.pt")


WAYS = {
    "AdamW": ("AdamW", {}, {}),
    "momentum, clipped, accumulated": (
        "SGD",
        {"momentum": 0.9, "lr": 0.05},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ),
    "few steps": ("AdamW", {}, {"max_epochs": 2}),
}
REFUSED = {
    "a budget of MACs that were not counted": (
        "`target_macs` needs the MACs.*give `decompose` an `example_input`",
        {"target_params": None},
    ),
    "a budget of time": (
        "`target_latency` does not work.*: give `target_params` or `target_macs`",
        {"target_params": None, "target_latency": 0.5},
    ),
    "importance of data": ('`importance` does not work.*: give "spectrum"', {"importance": "fisher"}),
    "schedule of another kind": ("`schedule` does not work.*: give FallToBudget", {"schedule": "nested"}),
    "full_rank_as='dense'": ('`full_rank_as` does not work.*: give "svd"', {"full_rank_as": "dense"}),
    "final='factored'": ('`final` does not work.*: give "decomposed", and `gather_factored`', {"final": "factored"}),
    "distillation": ("`distill` does not work", {"distill": True}),
    "measure_latency": ("`measure_latency` does not work", {"measure_latency": True}),
    "centralized gradients": ("`regularizer` does not work", {"regularizer": Regularizer(centralize=True)}),
    "layers chosen by the callback": ("`exclude_modules` does not work.*says `decompose`", {"exclude_modules": ["1"]}),
    "layers that are not sharded": ("`net.1.U` is whole in each process: call `fully_shard`", NotSharded),
    "no factorized layers": ("no layer is factorized.*call `lightning_svd.decompose`", NotFactorized),
    "weights unlike in each process": (
        "`net.1`: the columns of U and V must be orthonormal.*seed_everything",
        UnlikeEachOther,
    ),
    "convolutions in groups": ("`net.6` is in groups, which does not work with sharded parameters", Grouped),
    "frozen factors": ("`net.1.U` must be trained by one optimizer, found it in 1, `requires_grad=False`", Frozen),
    "parameters in half precision": ("`net.1.U` must be float32 or wider.*mixed precision policy", Half),
    "torch.compile": ("does not work with torch.compile", Compiled),
    "resuming from a folder that it did not write": (
        "AdamW: SVD training of sharded parameters resumes only from a checkpoint that it wrote itself.*no sharded",
        {"ckpt_path": "AdamW", "in_folders": True},
    ),
    "resuming from a folder of other layers": (
        r"epoch=1.ckpt: `net.5.U` is of shape \(5, 5\) here, and of None there: resume with the layers",
        {"ckpt_path": "folders/epoch=1.ckpt", "kind": "AllFactorized", "in_folders": True},
    ),
    "manual optimization": ("does not work with manual optimization", Manual),
    "fast_dev_run": ("does not work with `fast_dev_run`", {"fast_dev_run": True}),
    "tensor parallelism": (
        "does not work with tensor parallelism",
        {"parallel": {"data_parallel_size": 1, "tensor_parallel_size": 2}},
    ),
    "an averaged model": ("does not work with StochasticWeightAveraging", StochasticWeightAveraging),
    "resuming from weights only": (
        "resumes only from a checkpoint that it wrote itself",
        {"ckpt_path": "weights.ckpt"},
    ),
}


def trained(folder, ways):
    found = {}
    for way, (optimizer, options, of_trainer) in ways.items():
        few = way == "few steps"
        witness, ours = Witness(), FixedRanks() if few else svd_callback()
        model = (AllFactorized if few else Sharded)(optimizer, **options)
        saving = ModelCheckpoint(folder / way, "{epoch}", save_top_k=-1, every_n_epochs=1)
        fit(model, ours, witness, saving, enable_checkpointing=True, **of_trainer)
        with torch.device("meta"):
            meta = net()
        small = gather_factored(model.net, meta)
        own = {
            "ranks": witness.ranks,
            "weights": witness.weights,
            "outputs": witness.outputs,
            "report": str(ours.report),
            "layers": ours.report.layers,
        }
        found[way] = own | {"small": small}
    return found


LONG, LONG_ROUNDING = 25, 1e-8  # epochs of 4 steps; Adam divides gradients that are rounding by 1e-8


LONG_FALL = FallToBudget(start=0.3, end=0.7, cuts=5)


def long_run_of_one(even, _):
    witness = Witness(every=5)
    fit(Sharded(even=even), svd_callback(schedule=LONG_FALL), witness, max_epochs=LONG)
    return witness.ranks, witness.weights


def long_run(count, even, folder):
    """How far weights of 100 steps are from those of one process, and in how many phases; bits are those of all."""
    alone = Witness(every=5)
    fit(Whole(even=even), svd_callback(schedule=LONG_FALL, exclude_modules=["net.5"]), alone, max_epochs=LONG)
    each, off = in_processes(count, partial(long_run_of_one, even), folder), 0.0
    for ranks, weights in each:
        assert ranks == alone.ranks and len(ranks) == 4 * LONG
        for step, (values, expected) in enumerate(zip(weights, alone.weights, strict=True)):
            assert all(torch.equal(value, each[0][1][step][name]) for name, value in values.items())
            off = max(off, *(float((values[name] - value).abs().max()) for name, value in expected.items()))
    full, falling, final = alone.ranks[0], alone.ranks[len(alone.ranks) // 2], alone.ranks[-1]
    return off, len({*map(tuple, (full, falling, final))})


def few_steps_and_more(folder):
    resumed = []
    for path in ("of two processes.ckpt", "folder of two processes.ckpt"):
        witness = Witness()
        fit(Sharded(), svd_callback(), witness, ckpt_path=folder / path)
        resumed.append(witness.weights)
    return {"trained": trained(folder, {"few steps": WAYS["few steps"]}), "resumed": resumed}


def without_moments(folder):
    """Whether a run whose optimizer remembers nothing goes on from a folder to the same weights."""
    whole_run, resumed, path = Witness(), Witness(), folder / "without moments"
    plain = {"lr": 0.05, "weight_decay": 0.0}
    saving = ModelCheckpoint(path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(Sharded("SGD", **plain), svd_callback(), whole_run, saving, enable_checkpointing=True, in_folders=True)
    fit(Sharded("SGD", **plain), svd_callback(), resumed, ckpt_path=path / "epoch=2.ckpt", in_folders=True)
    ends = resumed.weights[-1], whole_run.weights[-1]
    return all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def resumed_from_folders(folder):
    """A run that is written as folders of shards, and those that go on from them."""
    saving = ModelCheckpoint(folder / "folders", "{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(Sharded(), svd_callback(), saving, enable_checkpointing=True, in_folders=True)
    resumed = {"without moments": without_moments(folder)}
    for epoch in EPOCHS:
        witness, path = Witness(), folder / "folders" / f"epoch={epoch}.ckpt"
        model = Sharded()
        # From a folder to a file, too: that is what the strategy writes, not what it reads.
        fit(model, svd_callback(), witness, ckpt_path=path, in_folders=epoch != 1)
        resumed[epoch] = witness.weights, model.strict_loading
    return resumed


def many_things(folder):
    found = {"trained": trained(folder, dict([*WAYS.items()][:2])), "resumed": {}, "refused": {}}
    for epoch in EPOCHS:  # in each of the three phases
        witness = Witness()
        model = Sharded()
        fit(model, svd_callback(), witness, ckpt_path=folder / "AdamW" / f"epoch={epoch}.ckpt")
        found["resumed"][epoch] = witness.weights, model.strict_loading
    if dist.get_rank() == 0:
        saved = torch.load(folder / "AdamW" / "epoch=0.ckpt", weights_only=True)
        torch.save({key: value for key, value in saved.items() if key != "callbacks"}, folder / "weights.ckpt")
    dist.barrier()
    found["resumed from folders"] = resumed_from_folders(folder)
    for what, (_, case) in REFUSED.items():
        found["refused"][what] = refusal(case, folder)
    found["dependent"] = with_dependent_columns()
    found["misused"] = misused()
    found["sent"] = sent()
    witness, ours = Witness(), svd_callback(target_params=None, target_macs=0.4)
    fit(Counted(), ours, witness)
    found["by macs"] = witness.ranks, witness.weights[-1], ours.report.macs_ratio
    witness, ours = Witness(), svd_callback(target_params=0.15, importance="auto")
    fit(Sharded(), ours, witness)
    found["small"] = witness.ranks, ours.report.params_ratio
    mixed, ours = InBFloat16(lr=3e-3), svd_callback()
    fit(mixed, ours)
    small = gather_factored(mixed.net, net().float())
    found["mixed"] = ours.report.params_ratio, small
    return found


def refusal(case, folder):
    """With which message a fit ends before its first step."""
    case = case if isinstance(case, dict) else {"kind": case}
    case = dict(case)
    kind, others = case.pop("kind", Sharded), []
    kind = AllFactorized if kind == "AllFactorized" else kind
    if issubclass(kind, Callback):
        kind, others = Sharded, [kind(1e-2)]
    of_fit = {key: case.pop(key) for key in ("fast_dev_run", "parallel", "ckpt_path", "in_folders") if key in case}
    if "ckpt_path" in of_fit:
        of_fit["ckpt_path"] = folder / of_fit["ckpt_path"]
    witness = Witness()
    try:
        fit(kind(), svd_callback(**case), witness, *others, **of_fit)
    except ValueError as error:
        return str(error), witness.ranks
    except BaseException as error:
        return f"{type(error).__name__}: {error}", witness.ranks
    return "", witness.ranks


def with_dependent_columns():
    """How far the weights are from those before exact factors were taken of columns that are the same."""
    model = net()
    decompose(model, exclude_modules=["5"])
    fsdp.fully_shard(model)
    layers = ShardedLayers(model, svd_layers(model), Spectrum())
    layer = svd_layers(model)["1"]
    with torch.no_grad():
        layer.U.to_local()[:, 1] = layer.U.to_local()[:, 0]
        layer.V.to_local()[:, 2] = layer.V.to_local()[:, 5] * (1 + 1e-9)
    before = whole(layer.rebuilt().detach())
    layers.refactorize()
    U, V = whole(layer.U.detach()), whole(layer.V.detach())
    defects = [float((A.mT @ A - torch.eye(47)).abs().max()) for A in (U, V)]
    return float((whole(layer.rebuilt().detach()) - before).abs().max()), defects, whole(layer.s.detach())


class Sent(TorchDispatchMode):
    """Counts the numbers in float64 that go between processes, by the way in which they do."""

    def __init__(self):
        super().__init__()
        self.numbers = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name, tensors = func.__name__.partition(".")[0], args[1 if "reduce_scatter" in str(func) else 0]
            for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                    self.numbers[name] += tensor.numel()
        return func(*args, **(kwargs or {}))


def sent():
    """What is sent in a step, and in one after which ranks are cut, by a loop without Lightning."""
    torch.manual_seed(0)
    model = net()
    decompose(model)
    fsdp.fully_shard(model[3])
    fsdp.fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"target_params": 0.5, "final": "decomposed", "schedule": FallToBudget(start=0.25, end=0.75, cuts=2)}
    training, found = ShardedTraining(model, optimizer, total_steps=4, **arguments), []
    for _ in range(2):
        with Sent() as counted:
            model(INPUTS).square().mean().backward()
            change = training.step()
            optimizer.zero_grad()
        found.append((dict(counted.numbers), change is not None))
    return found


def misused():
    """What functions for whole parameters say of sharded ones."""
    model, dense, messages = net(), net(), []
    decompose(model)
    fsdp.fully_shard(model)
    layers, optimizer = svd_layers(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (
        lambda: add_gradients(layers.values()),
        lambda: SVDTraining(model, optimizer, total_steps=4),
        lambda: model.load_state_dict(dense.state_dict()),
        lambda: gather_factored(model, nn.Sequential(*dense, nn.Linear(2, 2))),
    ):
        try:
            call()
            messages.append("")
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return in_processes(2, many_things, folder), folder


def check_as_in_one_process(found, way):
    optimizer, options, of_trainer = WAYS[way]
    alone, ours = Witness(), svd_callback(exclude_modules=["net.5"]) if way != "few steps" else FixedRanks()
    fit(Whole(optimizer, **options), ours, alone, **of_trainer)
    own = [each[way] for each in found]
    assert len(set(map(tuple, alone.ranks))) >= 3
    for each in own:
        assert each["ranks"] == alone.ranks and each["report"] == own[0]["report"]
        for weights, expected in zip(each["weights"], alone.weights, strict=True):
            assert weights.keys() == expected.keys()
            for name, value in expected.items():
                # Adam divides gradients that are rounding by 1e-8
                assert (weights[name] - value).abs().max() <= 1e-9, name
    for before, after in zip(own[0]["layers"], ours.report.layers, strict=True):
        for spectrum, expected in (
            (before.spectrum_before, after.spectrum_before),
            (before.spectrum_after, after.spectrum_after),
        ):
            assert spectrum == pytest.approx(expected, rel=1e-6, abs=1e-9)
    small, *others = (each["small"] for each in own)
    assert others == [None] * len(others)
    with torch.no_grad():
        assert (small(INPUTS) - own[0]["outputs"]).abs().max() <= roundoff((64, 47), torch.float64)
    assert (
        sum(p.numel() for p in small.parameters())
        == sum(of.params for of in own[0]["layers"]) + 47 + 41 + 2 * 41 + 5 + (0 if way == "few steps" else 205)
        <= 0.5 * sum(p.numel() for p in net().parameters())
    )


@pytest.mark.parametrize("way", [*WAYS][:2])
@pytest.mark.combination("Strategies", "ModelParallelStrategy, 2 processes with uneven shards: {way}")
def test_two_processes_train_what_one_does(way, results):
    check_as_in_one_process([each["trained"] for each in results[0]], way)


@pytest.mark.combination(
    "Strategies", "ModelParallelStrategy, 4 processes, one without a row of a factor; resuming what 2 wrote"
)
def test_four_processes_train_what_one_does_and_resume_what_two_wrote(tmp_path, results):
    found, folder = results
    (tmp_path / "of two processes.ckpt").write_bytes((folder / "AdamW" / "epoch=1.ckpt").read_bytes())
    shutil.copytree(folder / "folders" / "epoch=1.ckpt", tmp_path / "folder of two processes.ckpt")
    four = in_processes(4, few_steps_and_more, tmp_path)
    check_as_in_one_process([each["trained"] for each in four], "few steps")
    for resumed in four[0]["resumed"]:
        for weights, expected in zip(resumed, found[0]["trained"]["AdamW"]["weights"][8:], strict=True):
            assert all((weights[name] - value).abs().max() <= 1e-9 for name, value in expected.items())


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("written", ["resumed", "resumed from folders"], ids=["files", "folders"])
@pytest.mark.combination(
    "Strategies", "ModelParallelStrategy: resuming a checkpoint in one file, or a folder of shards"
)
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_interrupted(written, epoch, results):
    for each in results[0]:
        resumed, is_strict = each[written][epoch]
        whole_run = each["trained"]["AdamW"]["weights"][-len(resumed) :]
        assert is_strict and len(resumed) == 4 * (3 - epoch)
        for weights, expected in zip(resumed, whole_run, strict=True):
            assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("count", "even"), [(2, True), (4, False)], ids=["2, even", "4, uneven"])
def test_a_hundred_steps_are_those_of_one_process(count, even, tmp_path):
    off, phases = long_run(count, even, tmp_path)
    assert off <= LONG_ROUNDING and phases == 3


def test_a_run_whose_optimizer_remembers_nothing_resumes_from_a_folder(results):
    assert all(each["resumed from folders"]["without moments"] for each in results[0])


def test_a_checkpoint_has_the_dense_weights_of_the_users_own_model(results):
    found, folder = results
    saved = torch.load(folder / "AdamW" / "epoch=3.ckpt", weights_only=True)
    model = Whole()
    model.load_state_dict(saved["state_dict"])
    assert all(
        torch.equal(value, found[0]["trained"]["AdamW"]["weights"][-1][name])
        for name, value in model.state_dict().items()
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_a_folder_has_the_dense_weights_and_no_process_all_factors(results):
    found, folder = results
    path = folder / "folders" / "epoch=3.ckpt"
    state = {"state_dict": {name: torch.empty_like(value) for name, value in Whole().state_dict().items()}}
    load(state, checkpoint_id=path, no_dist=True)
    expected = found[0]["trained"]["AdamW"]["weights"][-1]
    for name, value in state["state_dict"].items():
        assert (value - expected[name]).abs().max() <= roundoff((64, 47), torch.float64) * expected[name].abs().max()
    state = saved_state(torch.load(path / "meta.pt", weights_only=True))
    assert all(not torch.is_tensor(value) for entry in state["layers"].values() for value in entry.values())
    with pytest.raises(ValueError, match="in shards: resume from the folder itself"):
        check_state(state, "the file")


@pytest.mark.parametrize(
    ("what", "message"), [(what, message) for what, (message, _) in REFUSED.items()], ids=[*REFUSED]
)
@pytest.mark.combination("Sharded parameters", "{what}", refused="{message}")
def test_what_does_not_work_on_shards_is_refused_by_name(what, message, results):
    for each in results[0]:
        got, ranks = each["refused"][what]
        assert re.search(message, got), got
        assert not ranks


@pytest.mark.combination("Strategies", "ModelParallelStrategy, a budget of MACs that `decompose` counted")
def test_a_budget_of_macs_is_that_of_one_process(results):
    alone, ours = Witness(), svd_callback(target_params=None, target_macs=0.4, exclude_modules=["net.5"])
    fit(Whole(), ours, alone)
    assert ours.report.macs_ratio <= 0.4 and ours.report.macs_ratio != ours.report.params_ratio
    for each in results[0]:
        ranks, weights, ratio = each["by macs"]
        assert ranks == alone.ranks and ratio == ours.report.macs_ratio
        assert all((weights[name] - value).abs().max() <= 1e-9 for name, value in alone.weights[-1].items())


def test_a_small_budget_is_shared_by_the_spectrum_too(results):
    alone, ours = Witness(), svd_callback(target_params=0.15, exclude_modules=["net.5"])
    fit(Whole(), ours, alone)
    assert ours.report.params_ratio <= 0.15
    for each in results[0]:
        assert each["small"] == (alone.ranks, ours.report.params_ratio)


@pytest.mark.combination("Strategies", "ModelParallelStrategy with a MixedPrecisionPolicy of bfloat16")
def test_layers_train_in_mixed_precision(results):
    (share, small), (other, _) = (each["mixed"] for each in results[0])
    assert share == other <= 0.5
    with torch.no_grad():
        right = [small(x.float()).argmax(1) == y for x, y in data(dtype=torch.float64)]
    assert torch.cat(right).double().mean() > 0.9
    assert all(p.dtype == torch.float32 for p in small.parameters())


def test_as_many_bytes_are_sent_as_the_formulas_say(results):
    groups = [
        Group(((41, 47),), ((41,),)),
        Group(((47, 64), (5, 41)), ((47,), (41,), (41,), (5,)), gathers=1),
    ]
    expected, cut = step_numbers(groups, 2), cut_numbers([41, 47, 5])
    for each in results[0]:
        (step, was_cut), (step_with_cut, is_cut) = each["sent"]
        assert (was_cut, is_cut) == (False, True)
        assert step == {
            "_allgather_base_": expected["gathered"],
            "_reduce_scatter_base_": expected["scattered"],
            "allreduce_": expected["penalties"],
        }
        assert step_with_cut == {
            **step,
            "allreduce_": expected["penalties"] + cut["added up"],
            "broadcast_": cut["sent"],
        }


def test_functions_for_whole_parameters_refuse_sharded_ones(results):
    for rank, each in enumerate(results[0]):
        regularizer, training, loading, gathering = each["misused"]
        assert "expected a whole matrix, got rows of one that is sharded" in regularizer
        assert "`1.U` is sharded: SVDTraining is for whole parameters" in training
        assert "`1.weight` cannot be loaded while U, s and V are sharded" in loading
        assert gathering == ("" if rank else "`plain.6.weight` must be of shape None, got (2, 2)")


def test_columns_that_are_nearly_the_same_are_taken_apart_exactly(results):
    for each in results[0]:
        moved, defects, s = each["dependent"]
        assert moved <= roundoff((64, 47), torch.float64)
        assert max(defects) <= roundoff((64, 47), torch.float64)
        assert (s.diff() <= 0).all()
