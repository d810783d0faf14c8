"""Files that others wrote: weights are found in them, and what is no data or does not fit is refused in a line."""

import argparse
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lightning_svd import compress, save_low_rank
from lightning_svd.files.foreign import read_contents, state_dicts
from lightning_svd.files.loading import build, dense_weights, load
from lightning_svd.layers.pairs import low_rank_pairs


class Net(nn.Module):
    """A convolution, a normalization and two layers that share their weight."""

    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.conv(x).mean((2, 3))))


class OneLayer(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(32, 32))


def net(seed=0, width=6):
    torch.manual_seed(seed)
    return Net(width).eval()


def weights(seed=0, width=6):
    return dict(net(seed, width).state_dict())


def named(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def is_net(model, seed=0):
    expected = net(seed).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def refusal(*arguments, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        load(Net, *arguments, {}, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OPTIMIZER = {"state": {0: {"step": torch.zeros(()), "exp_avg": torch.zeros(6, 6)}}, "param_groups": [{"lr": 0.1}]}
SHAPES = {
    "bare": lambda: weights(),
    "nested": lambda: {"epoch": 3, "model": weights(), "optimizer": OPTIMIZER, "loss": torch.zeros(())},
    "deeper": lambda: {"state": {"net": {"weights": weights()}, "rng": torch.zeros(8, dtype=torch.uint8)}},
    "state_dict": lambda: {"state_dict": weights(), "best_acc1": 0.5},
    "distributed": lambda: {"model_state_dict": named("module.", weights())},
    "compiled": lambda: {"net": named("_orig_mod.", weights())},
    "compiled inside": lambda: {k.replace("conv.", "conv._orig_mod."): v for k, v in weights().items()},
    "wrapped twice": lambda: {"model_state": named("model._orig_mod.", weights())},
    "average": lambda: {"ema": {"n_averaged": torch.tensor(3), **named("module.", weights())}},
    "of Lightning": lambda: {
        "pytorch-lightning_version": "2",
        "state_dict": named("net.", weights()),
        "ema": weights(1),
    },
    "old": lambda: {name: value for name, value in weights().items() if "num_batches" not in name},
    "tied once": lambda: {name: value for name, value in weights().items() if name != "second.weight"},
}


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt", "pth.tar"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_found_wherever_they_are(shape, suffix, tmp_path):
    torch.save(SHAPES[shape](), tmp_path / f"file.{suffix}")
    assert is_net(load(Net, tmp_path / f"file.{suffix}", {}))


def test_files_of_old_versions_of_torch_open(tmp_path):
    torch.save({"model": weights()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert is_net(load(Net, tmp_path / "a.pth", {}))


@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
def test_safetensors_open_with_tied_tensors_once(prefix, tmp_path):
    state = {name: value for name, value in weights().items() if name != "second.weight"}
    save_file(named(prefix, state), tmp_path / "a.safetensors")
    assert is_net(load(Net, tmp_path / "a.safetensors", {}))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["model", "net", "a", "b.c", "state_dict"]), max_size=4), st.booleans())
def test_any_nesting_is_found_and_its_key_names_it(tmp_path_factory, keys, wrapped):
    path = tmp_path_factory.mktemp("nested") / "a.pt"
    contents = named("module.", weights()) if wrapped else weights()
    for key in reversed(keys):
        contents = {key: contents, "step": 1}
    torch.save(contents, path)
    (found,) = state_dicts(read_contents(path))
    assert found.key == ".".join(keys)
    assert is_net(load(Net, path, {})) and is_net(load(Net, path, {}, found.key or None))


def test_a_choice_is_asked_for_and_the_key_makes_it(tmp_path):
    path = tmp_path / "a.pt"
    both = {"model": weights(0), "ema": {"shadow": named("module.", weights(1))}, "teacher.0": weights(2)}
    torch.save({**both, "optimizer": OPTIMIZER, **named("student.", weights(3))}, path)
    message = refusal(path)
    for part in (str(path), "several state dicts that fit Net", "`--key` must say which", "`ema.shadow` (10 tensors)"):
        assert part in message
    for seed, key in enumerate(("model", "ema.shadow", "teacher.0", "student")):
        assert is_net(load(Net, path, {}, key), seed)
    message = refusal(path, key="average")
    assert "`--key`" in message and "'average'" in message and "`ema.shadow`" in message


def test_of_a_lightning_checkpoint_the_key_takes_another(tmp_path):
    torch.save(SHAPES["of Lightning"](), tmp_path / "a.ckpt")
    assert is_net(load(Net, tmp_path / "a.ckpt", {}, "ema"), 1)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda state: state.pop("conv.0.bias"), ["does not fit Net: missing `conv.0.bias`"]),
        (lambda state: state.update(extra=torch.zeros(1)), ["unexpected `extra`"]),
        (lambda state: state.update({"first.bias": torch.zeros(7)}), ["`first.bias` is (7,) there, (6,) here"]),
        (lambda state: state.update({f"x{k}": torch.zeros(1) for k in range(9)}), ["`x2` and 6 more"]),
        (
            lambda state: state.update({"first.bias": torch.zeros(6, dtype=torch.int8)}),
            ["`first.bias` holds whole numbers there, floating-point numbers here"],
        ),
        (
            lambda state: (state.pop("conv.1.bias"), state.update({"a.b": torch.zeros(1)})),
            ["missing `conv.1.bias`", "unexpected `a.b`"],
        ),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_does_not_fit_is_named(change, parts, nested, tmp_path):
    state = weights()
    change(state)
    torch.save({"model": state, "other": {"a": torch.zeros(1)}} if nested else state, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt")
    assert all(part.replace("fit Net:", "fit Net at `model`:" if nested else "fit Net:") in message for part in parts)
    assert ("`--key` takes another" in message) == nested


def test_another_width_is_a_few_shapes(tmp_path):
    torch.save(weights(width=8), tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt")
    assert "`conv.0.weight` is (8, 3, 3, 3) there, (6, 3, 3, 3) here" in message and "more differ in shape" in message


# ------------------------------------------------------------------------------------------------ what is not unpickled


class Trap:
    """Sets a flag when it is unpickled."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def written(kind, path):
    contents = {
        "module": net(),
        "module inside": {"epoch": 1, "model": net()},
        "namespace": {"args": argparse.Namespace(lr=0.1), "model": weights()},
        "trap": {"model": weights(), "trap": Trap()},
        "list": [torch.zeros(3)],
        "nothing": {"epoch": 3},
    }
    if kind == "old module":
        torch.save(net(), path, _use_new_zipfile_serialization=False)
    elif kind == "script":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": Trap()}))
    elif kind == "text":
        path.write_text("hello")
    elif kind == "noise":
        path.write_bytes(b"PK\x03\x04" + bytes(100))
    else:
        torch.save(contents[kind], path)
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("module", ["whole pickled module (`test_foreign_files.Net`)", "`torch.save(model.state_dict(), FILE)`"]),
        ("module inside", ["whole pickled module", "Net"]),
        ("old module", ["whole pickled module", "Net"]),
        ("namespace", ["holds more than data (`argparse.Namespace`)", "model.state_dict()"]),
        ("trap", ["holds more than data (`setattr`)"]),
        ("script", ["TorchScript archive", "`torch.save(torch.jit.load(FILE).state_dict(), OTHER)`"]),
        ("pickle", ["a.pt"]),
        ("noise", ["cannot be read as a checkpoint"]),
        ("text", ["cannot be read as a checkpoint: it is nothing that `torch.save` writes"]),
        ("list", ["must hold weights by name, got a list"]),
        ("nothing", ["must hold weights by name, got no tensors"]),
    ],
)
def test_code_is_refused_by_name_and_never_run(kind, parts, tmp_path):
    message = refusal(written(kind, tmp_path / "a.pt"))
    assert str(tmp_path) in message and all(part in message for part in parts)
    assert not Trap.sprung and len(message) < 500


def test_a_file_that_is_not_there():
    for name in ("nowhere.pt", "nowhere.safetensors"):
        assert name in refusal(name)


# -------------------------------------------------------------------------------------------------------------- folders


def shards(folder, suffix, save):
    state = {name: value.clone() for name, value in weights().items()}
    names = list(state)
    parts = {f"part-{k}.{suffix}": {name: state[name] for name in names[k::2]} for k in range(2)}
    for file, part in parts.items():
        save(part, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return folder / f"{name}.index.json"


@pytest.mark.parametrize(("suffix", "save"), [("safetensors", save_file), ("bin", torch.save)])
def test_folders_open_whole_and_in_parts(suffix, save, tmp_path):
    index = shards(tmp_path, suffix, save)
    assert is_net(load(Net, tmp_path, {})) and is_net(load(Net, index, {}))
    assert dense_weights(tmp_path)[0].keys() == weights().keys()
    (tmp_path / f"part-1.{suffix}").unlink()
    assert f"names part-1.{suffix}, which is not there" in refusal(tmp_path)
    torch.save(weights(1), tmp_path / "pytorch_model.bin")
    if suffix == "bin":
        assert is_net(load(Net, tmp_path, {}), 1)


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "is no index of weights"),
        ("[]", "is no index of weights"),
        ('{"weight_map": {"a": 3}}', "is no index of weights"),
        ('{"weight_map": {"a": "../a.bin"}}', "must name files beside it"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "must name files beside it"),
    ],
)
def test_a_damaged_index_is_refused(index, why, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert why in refusal(tmp_path)


def test_an_empty_folder_says_what_it_should_hold(tmp_path):
    assert "must hold one of model.safetensors" in refusal(tmp_path)


def test_a_folder_may_hold_a_low_rank_model(tmp_path):
    model = OneLayer()
    small, _ = compress(model, [torch.randn(8, 32)], importance="spectrum", progress=False)
    save_low_rank(small, tmp_path / "model.safetensors")
    loaded = load(OneLayer, tmp_path, {})
    assert low_rank_pairs(loaded).keys() == {"0"}
    with pytest.raises(ValueError, match="holds a low-rank model: give its class"):
        dense_weights(tmp_path)


# ------------------------------------------------------------------------------------------------------ without a model


def test_without_a_class_the_one_place_with_matrices_is_read(tmp_path):
    torch.save(SHAPES["nested"](), tmp_path / "a.pt")
    assert dense_weights(tmp_path / "a.pt")[0].keys() == weights().keys()
    torch.save({"model": weights(), "ema": weights(1)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"must hold one state dict, or `--key` say which, got `model` .*, `ema`"):
        dense_weights(tmp_path / "b.pt")
    assert torch.equal(dense_weights(tmp_path / "b.pt", "ema")[0]["first.bias"], weights(1)["first.bias"])


# --------------------------------------------------------------------------------------------------------- transformers

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA["vocab_size"] = 20


def test_a_model_of_transformers_is_built_from_a_dict_or_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    config = LLAMA | {"tie_word_embeddings": True}
    model = build(kind, {"config": config})
    assert model.config.hidden_size == 16 and not model.training
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for arguments in ({}, {"config": config}):
        loaded = load(kind, tmp_path, arguments)
        assert loaded.dtype == torch.float32  # of the model as it was built
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())
    # Before its version 5 a configuration takes any type, and the model cannot be built with it.
    checked = int(transformers.__version__.partition(".")[0]) >= 5
    said = "`config` is no LlamaConfig: " if checked else "LlamaForCausalLM cannot be built with "
    with pytest.raises(ValueError, match=f"`--arguments`: {said}") as refused:
        build(kind, {"config": {"hidden_size": "wide"}})
    assert "\n" not in str(refused.value)
