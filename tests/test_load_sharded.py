"""A dense model in safetensors, loaded into one that is factorized and sharded, which no process has as a whole."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from scaling import Live, stack
from test_sharded import Sharded, Whole, Witness, fit, fsdp, in_processes, svd_callback
from torch import nn

from lightning_svd import decompose, load_sharded, svd_layers
from lightning_svd.layers.matrices import roundoff
from lightning_svd.layers.shards import rows_of
from lightning_svd.model.surgery import counted_before

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated"),  # torch's own, for its compiler
]


class Net(nn.Module):
    """Tied tables, a layer that is left dense, running statistics, and a buffer that is in no file."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 9)
        self.hidden, self.wide = nn.Linear(9, 7), nn.Linear(7, 23)
        self.norm, self.back, self.out = nn.BatchNorm1d(23), nn.Linear(23, 9), nn.Linear(9, 11, bias=False)
        self.out.weight = self.table.weight
        with torch.device("cpu"):
            self.register_buffer("scale", torch.full((9,), 0.5), persistent=False)

    def forward(self, x):
        x = self.wide(self.hidden(self.table(x) * self.scale).relu()).relu()
        return self.out(self.back(self.norm(x)))


LEFT = ["back"]


def filled():
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean.uniform_()
    net.norm.num_batches_tracked.fill_(3)
    return net


def state_of(net):
    """As Hugging Face writes it: of tied tensors only one."""
    return {name: value.clone() for name, value in net.state_dict().items() if name != "out.weight"}


def write(state, folder, parts=3):
    folder.mkdir(exist_ok=True)
    names, files = list(state), {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = names[part::parts]
        save_file({name: state[name].contiguous() for name in mine}, folder / file)
        files |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def sharded(net):
    decompose(net, exclude_modules=LEFT)
    fsdp.fully_shard(net.wide)
    fsdp.fully_shard(net)
    return net


def on_meta():
    with torch.device("meta"):
        return Net()


def here(net):
    values = {name: rows_of(p.detach()).clone() for name, p in net.named_parameters()}
    return values | {name: value.clone() for name, value in net.named_buffers()}


def loaded_in_two(folder):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    with Live() as live, live.phase("load"):
        net = load_sharded(sharded(on_meta()), folder / "net")
    whole = sharded(filled())
    found = {"loaded": here(net), "whole": here(whole), "tied": net.out.weight is net.table.weight}
    found["again"] = here(load_sharded(whole, folder / "net"))
    x = torch.arange(11)
    found["outputs"] = [each.eval()(x).detach() for each in (net, whole)]
    with torch.device("meta"):
        large = stack(60, 20)
    decompose(large)
    for layer in large:
        fsdp.fully_shard(layer)
    fsdp.fully_shard(large)
    with Live() as live, live.phase("load"):
        load_sharded(large, folder / "large")
    found["peak"] = live.peaks["load"]
    found["refused"] = {}
    for name in WRONG:
        target = sharded(on_meta())
        try:
            load_sharded(target, folder / name)
        except Exception as error:
            found["refused"][name] = f"{type(error).__name__}: {error}"
        assert all(p.is_meta for p in target.parameters())
    found["fit"] = fitted(folder)
    return found


def fitted(folder):
    """The dense weights after each step of a fit that begins on the meta device, and of one that does not."""
    weights = []
    for kind in (FromFolder, Sharded):
        model, witness = kind(), Witness()
        model.folder = folder / "fit"
        fit(model, svd_callback(), witness, max_epochs=2)
        weights.append(witness.weights)
    return weights


class FromFolder(Sharded):
    """Its weights come from a folder."""

    def configure_model(self):
        self.net.to("meta")
        super().configure_model()
        load_sharded(self.net, self.folder)


def without(name):
    return lambda state: state.pop(name)


WRONG = {
    "lacking": (without("wide.weight"), "ValueError: .*lacking does not fit the model: it lacks `wide.weight`"),
    "more": (
        lambda state: state.update(other=torch.zeros(2)),
        "ValueError: .*more does not fit the model: it has, beside the model's, `other`",
    ),
    "shapes": (
        lambda state: state.update({"wide.weight": torch.zeros(23, 8)}),
        r"ValueError: .*`wide.weight` is \(23, 8\) there, \(23, 7\) here",
    ),
    "dtypes": (
        lambda state: state.update({"hidden.bias": torch.zeros(7, dtype=torch.int64)}),
        "ValueError: .*`hidden.bias` holds whole numbers there",
    ),
    "no part": (None, "FileNotFoundError: .*index.json names model-00002-of-00003.safetensors, which is not there"),
    "damaged": (None, "ValueError: .*model-00002-of-00003.safetensors is no safetensors file"),
    "index of others": (None, "ValueError: .*says that `elsewhere` is in model-00001.*, and it is not"),
    "no index": (None, "ValueError: .*is no index of weights"),
    "nothing": (None, "FileNotFoundError: the folder .*nothing must hold one of model.safetensors"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    write(state_of(filled()), folder / "net")
    torch.manual_seed(1)
    write(stack(60, 20).state_dict(), folder / "large")
    write(Whole().net.state_dict(), folder / "fit", parts=2)
    for name, (change, _) in WRONG.items():
        state = state_of(filled())
        if change:
            change(state)
        write(state, folder / name)
    (folder / "no part" / "model-00002-of-00003.safetensors").unlink()
    (folder / "damaged" / "model-00002-of-00003.safetensors").write_bytes(b"x" * 100)
    index = folder / "index of others" / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    known["weight_map"]["elsewhere"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(known))
    (folder / "no index" / "model.safetensors.index.json").write_text("[]")
    for path in (folder / "nothing").iterdir():
        path.unlink()
    return in_processes(2, loaded_in_two, folder)


@pytest.mark.combination(
    "Sharded parameters", "a model on the meta device, its weights read from a folder of safetensors"
)
def test_loading_by_shards_is_loading_the_whole_and_decomposing(results):
    for each in results:
        assert each["tied"]
        for way in ("loaded", "again"):
            assert each[way].keys() == each["whole"].keys()
            assert all(torch.equal(value, each["whole"][name]) for name, value in each[way].items())
        assert torch.equal(*each["outputs"])


def test_no_process_has_more_than_its_share_and_a_few_layers(results):
    layer = 4 * 2 * 60 * 60
    for each in results:
        assert each["peak"] <= 20 * layer / 2 + 5 * layer


@pytest.mark.parametrize(("name", "message"), [(name, message) for name, (_, message) in WRONG.items()])
def test_folders_of_other_models_are_refused_and_nothing_is_changed(name, message, results):
    for each in results:
        assert re.match(message, each["refused"][name]), each["refused"][name]


def test_a_fit_from_the_meta_device_is_that_from_weights_in_memory(results):
    for each in results:
        for weights, expected in zip(*each["fit"], strict=True):
            assert all(torch.equal(weights[name], value) for name, value in expected.items())


LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def llama_in_two(folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    dist.init_process_group("gloo")
    config = LlamaConfig(**LLAMA)
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    net.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are in no file
    decompose(net, exclude_modules=["lm_head"])
    for block in net.model.layers:
        fsdp.fully_shard(block)
    fsdp.fully_shard(net)
    load_sharded(net, folder / "saved")
    with torch.no_grad():
        return net.eval()(input_ids=torch.arange(16)[None]).logits, len(svd_layers(net))


def test_a_llama_as_transformers_saves_it_computes_what_it_did(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")  # before, rotary embeddings are built otherwise
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    net.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len([*(tmp_path / "saved").glob("model-*-of-*.safetensors")]) > 2
    with torch.no_grad():
        expected = net(input_ids=torch.arange(16)[None]).logits
    for logits, layers in in_processes(2, llama_in_two, tmp_path):
        assert layers == 2 * 7
        assert (logits - expected).abs().max() <= roundoff((64, 48), torch.float32) * expected.abs().max()


def test_one_process_loads_a_single_file_and_layers_on_the_meta_device_have_no_values(tmp_path):
    net = filled()
    save_file(state_of(net), tmp_path / "model.safetensors")
    twin = on_meta()
    plans = decompose(twin, exclude_modules=LEFT)
    assert [of.name for of in plans if not of.skipped] == ["hidden", "wide"]
    assert all(p.is_meta for p in twin.parameters()) and twin.wide.V.shape == (7, 7)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_sharded(twin, tmp_path / "other.safetensors")
    assert load_sharded(twin, tmp_path) is twin
    decompose(net, exclude_modules=LEFT)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), net.parameters(), strict=True))
    assert load_file(tmp_path / "model.safetensors").keys() == twin.state_dict().keys() - {"out.weight"}


def test_macs_are_counted_on_the_meta_device_too():
    costs = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 23), nn.Linear(23, 3))
        whole = nn.Sequential(net)
        decompose(net, exclude_modules=["3"], example_input=torch.zeros(2, 9, device=device))
        costs.append(counted_before(whole, svd_layers(whole)))
    assert costs[0] == costs[1] and costs[0].counted and costs[0].other_macs == 2 * 23 * 3
    assert {name: of.dense_macs for name, of in costs[0].layers.items()} == {"0.0": 2 * 9 * 7, "0.2": 2 * 7 * 23}
    other = filled()
    decompose(other, exclude_modules=LEFT)
    assert not counted_before(other, svd_layers(other)).counted


def test_an_example_that_the_model_cannot_take_leaves_it_as_it_was():
    net, before = filled(), filled().state_dict()
    with pytest.raises(ValueError, match="`example_input`: the model fails on it: IndexError: index out of range"):
        decompose(net, exclude_modules=LEFT, example_input=torch.tensor([99]))
    assert not svd_layers(net) and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_layers_that_cannot_take_a_weight_by_rows_are_refused(tmp_path):
    net = filled()
    save_file(state_of(net), tmp_path / "model.safetensors")
    decompose(net, exclude_modules=LEFT)
    svd_layers(net)["wide"].keep(3)
    with pytest.raises(ValueError, match="`wide` must have all of its 7 ranks, found 3"):
        load_sharded(net, tmp_path)
    with torch.device("meta"):
        net = Net()
        net.register_buffer("positions", torch.arange(3), persistent=False)
    with pytest.raises(ValueError, match=r"`positions` is a buffer without values.*outside of `torch.device"):
        load_sharded(net, tmp_path)


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path):
    state = state_of(filled())
    state["wide.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "model.safetensors")
    net = on_meta()
    decompose(net, exclude_modules=LEFT)
    with pytest.raises(ValueError, match="`wide`: expected finite weights, got 1 NaN"):
        load_sharded(net, tmp_path)
