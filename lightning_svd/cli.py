"""The command ``lightning-svd``."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_svd import __version__

if TYPE_CHECKING:
    from lightning_svd.compression.report import CompressionReport

# Of the package, that a command needs; its own name otherwise.
_EXTRAS = {"convert": "export", "compress": "files", "inspect": "files", "plan": "files"}

_MODEL = "package.module:Class or path/to/file.py:Class, or a function there that returns the model"
_DATA = "package.module:function or path/to/file.py:function that returns batches of inputs, given the model if it asks"

_LONGEST = 1000  # characters of an error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, the process's own by default; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every console has the bars of a spectrum
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ModuleNotFoundError as missing:
        if "pip install" in str(missing):
            raise SystemExit(f"{options.command} {str(missing).removeprefix('this ')}") from None
        extra = _EXTRAS.get(options.command, options.command)
        raise SystemExit(f"{options.command} needs {missing.name}: pip install 'lightning-svd[{extra}]'") from None
    except (ValueError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())  # those of the user's model may have lines
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        raise SystemExit(f"lightning-svd {options.command}: {text}") from None
    except KeyboardInterrupt:
        print(f"lightning-svd {options.command}: interrupted", file=sys.stderr)
        return 130  # as shells say it
    return 0


def _demo(options: argparse.Namespace) -> None:
    from lightning_svd.demo import run_demo

    # Progress bars and tables must not mix with the JSON.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        pairs = run_demo(options.out, options.seeds, options.target_macs, options.epochs, options.logger)
    if options.json:
        seeds = zip(options.seeds, pairs, strict=True)
        print(_as_json([{"seed": seed, "dense": a.numbers(), "low_rank": b.numbers()} for seed, (a, b) in seeds]))


def _wandb_workspace(options: argparse.Namespace) -> None:
    from lightning_svd.lightning.wandb_workspace import build_workspace, save_workspace

    print(save_workspace(build_workspace(options.entity, options.project, options.name)))


def _plan(options: argparse.Namespace) -> None:
    from lightning_svd.files.loading import build, model_maker
    from lightning_svd.model.plan import plan, write_plan
    from lightning_svd.report.data import plan_table

    model = build(model_maker(options.model), options.arguments)
    layers = plan(model, options.target_modules, options.exclude_modules or (), options.conv_mode)
    print(_as_json([asdict(layer) for layer in layers]) if options.json else plan_table(layers))
    if options.out:
        write_plan(layers, options.out)


def _inspect(options: argparse.Namespace) -> None:
    from lightning_svd.files.loading import dense_weights, example_input, load, model_maker
    from lightning_svd.report.inspection import as_table, inspect_model, inspect_weights, left_alone

    if options.model:
        model = load(model_maker(options.model), options.file, options.arguments, options.key)
        example = example_input(options.example_input, model)
        report = inspect_model(model, example, options.target_macs, options.target_params)
        compressed = _curve(model, options) if options.data else None
        if options.json:
            shown: dict[str, Any] = json.loads(report.to_json())
            if compressed:
                shown |= {"curve": dict(compressed.curve), "measure": compressed.measure}
            print(json.dumps(shown, indent=2))
        else:
            print(report)
            if compressed:
                print(compressed.curve_table())
        if options.html:
            print(report.to_html(options.html))
        return
    for name in ("html", "target_macs", "data", "example_input", "arguments"):
        if getattr(options, name):
            raise ValueError(f"`--{name.replace('_', '-')}` needs the model: `--model package.module:Class`")
    weights, ranks = dense_weights(options.file, options.key)
    layers, rest = inspect_weights(weights, ranks, options.target_params), left_alone(weights)
    if options.json:
        print(_as_json([asdict(layer) for layer in layers]))
    else:
        print("\n".join([as_table(layers), *([f"left alone: {rest}"] if rest else [])]))


def _curve(model: Any, options: argparse.Namespace) -> CompressionReport:
    """What compressing a copy of a model to every budget would do to its outputs."""
    from lightning_svd.compression.compress import compress
    from lightning_svd.files.loading import calibration_batches
    from lightning_svd.model.surgery import to_dense

    def at(macs: float | None, params: float | None) -> CompressionReport:
        batches = calibration_batches(options.data, model)  # anew: it may be a generator
        copied = to_dense(model)
        return compress(copied, batches, target_macs=macs, target_params=params, curve=True, inplace=True)[1]

    if options.target_macs or options.target_params:
        return at(options.target_macs, options.target_params)
    try:
        return at(0.5, None)  # any budget gives the same curve
    except ValueError:
        return at(0.9, None)  # what little of the model can be factorized does not allow for less


def _compress(options: argparse.Namespace) -> None:
    from lightning_svd.compression.compress import compress
    from lightning_svd.files.loading import (
        calibration_batches,
        check_file,
        check_output,
        load,
        model_maker,
        write_compressed,
    )
    from lightning_svd.layers.pairs import low_rank_pairs
    from lightning_svd.model.surgery import to_dense

    check_output(options.to, options.out, options.fold)
    if options.out.exists() and options.out.samefile(options.file):
        raise ValueError(f"`--out` is the file of the trained weights, {options.out}: give another")
    for option, path in {"report": options.report, "html": options.html}.items():
        if path:
            check_file(option, path)
    model = load(model_maker(options.model), options.file, options.arguments, options.key)
    if low_rank_pairs(model):
        model = to_dense(model)  # shares are of the dense model
    batches = calibration_batches(options.data, model)
    first = list(itertools.islice(batches, 1))  # to follow the model with, for onnx
    try:
        small, report = compress(
            model,
            itertools.chain(first, batches),
            target_macs=options.target_macs,
            target_params=options.target_params,
            target_latency=options.target_latency,
            latency_table=options.latency_table,
            importance=options.importance,
            inputs=options.inputs,
            reconstruct=options.reconstruct,
            curve=options.curve,
            inplace=True,
        )
    except ValueError as error:
        raise ValueError(f"{error}, with the weights of {options.file}") from None
    if options.report:
        report.to_json(options.report)
    if options.html:
        report.to_html(options.html)
    written = write_compressed(small, options.to, options.out, first[0], options.fold)
    if options.json:
        print(json.dumps({**json.loads(report.to_json()), "written": written}, indent=2))
    else:
        print(report)
        print("\n".join(f"{name}: {value}" for name, value in written.items()))


def _profile(options: argparse.Namespace) -> None:
    from lightning_svd.files.loading import build, check_file, example_input, model_maker
    from lightning_svd.model.timing import Timing, profile

    check_file("out", options.out)
    timing = Timing(options.batch_size, options.runtime, options.seconds)
    model = build(model_maker(options.model), options.arguments)
    example = example_input(options.example_input, model)
    if example is None:
        raise ValueError(
            "give the shape of an input, `--example-input 1,3,32,32`: the model has no `example_input_array`"
        )
    layers = {"target_modules": options.target_modules, "exclude_modules": options.exclude_modules}
    table = profile(model, example, timing, **layers, conv_mode=options.conv_mode)
    table.save(options.out)
    least = table.whole.samples[0][1] / table.whole.dense
    shown = {"written": str(options.out), "seconds": table.whole.dense, "layers": len(table.layers)}
    shown |= {"least share of the time that was measured": round(least, 4), **table.whole.conditions}
    print(_as_json(shown) if options.json else "\n".join(f"{name}: {value}" for name, value in shown.items()))


def _convert(options: argparse.Namespace) -> None:
    from lightning_svd.files.loading import convert, example_input, load, model_maker

    model = load(model_maker(options.model), options.file, options.arguments, options.key)
    example = example_input(options.example_input, model)
    result = convert(model, options.to, options.out, example, options.batch_size, options.fold)
    print(_as_json(result) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-svd", description="SVD training for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"lightning-svd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "train a small ResNet on digits, dense and low-rank, and compare")
    demo.add_argument(
        "--out", type=Path, default=Path("lightning-svd-demo"), help="folder for the report and the files"
    )
    demo.add_argument("--seeds", type=_integers, default=[0], help="comma-separated, for instance 0,1,2")
    demo.add_argument("--target-macs", type=_share, default=0.35, help="share of the MACs to keep")
    demo.add_argument("--epochs", type=_count, default=30, help="epochs of each training")
    demo.add_argument(
        "--logger", choices=("wandb", "tensorboard", "csv", "none"), default="wandb", help="W&B runs offline"
    )
    demo.add_argument("--json", action="store_true", help="print the figures of each seed as JSON")

    planned = command("plan", _plan, "what would become of each layer of a model; as YAML to edit and pass back")
    _add_model(planned, required=True)
    planned.add_argument("--target-modules", nargs="+", help="names, types, patterns, all-linear")
    planned.add_argument("--exclude-modules", nargs="+", help="layers to leave alone")
    planned.add_argument("--conv-mode", default="channel", help="channel, spatial or auto")
    planned.add_argument("--out", type=Path, help="YAML file to write")

    inspected = command("inspect", _inspect, "spectra and ranks of a file, and what a budget would keep")
    _add_file(inspected)
    _add_model(inspected, required=False)
    inspected.add_argument("--example-input", type=_shape, help="shape of an input, to count MACs: 1,3,32,32")
    budget = inspected.add_mutually_exclusive_group()
    budget.add_argument("--target-macs", type=_share, help="share to keep")
    budget.add_argument("--target-params", type=_share, help="share to keep")
    inspected.add_argument("--html", type=Path, help="page to write, with the spectra drawn")
    inspected.add_argument("--data", help=f"{_DATA}: how far outputs would move at each budget")

    compressed = command("compress", _compress, "a trained model made smaller without training")
    _add_file(compressed)
    _add_model(compressed, required=True)
    compressed.add_argument("--data", required=True, help=_DATA)
    budget = compressed.add_mutually_exclusive_group()
    budget.add_argument("--target-macs", type=_share, help="share to keep; 0.5 if no budget is given")
    budget.add_argument("--target-params", type=_share, help="share to keep")
    budget.add_argument("--target-latency", type=_share, help="share of the time to keep")
    compressed.add_argument("--latency-table", type=Path, help="of `lightning-svd profile`; measured if not given")
    compressed.add_argument("--to", choices=("factored", "onnx"), required=True)
    compressed.add_argument("--out", type=Path, required=True, help="file to write; safetensors but for onnx")
    _add_fold(compressed)
    compressed.add_argument("--inputs", type=_count, default=256, help="how many to take from the data")
    compressed.add_argument("--importance", default="auto", help="auto, fisher, outputs or spectrum")
    compressed.add_argument("--reconstruct", type=int, default=0, help="steps of training towards the original outputs")
    compressed.add_argument("--curve", action="store_true", help="say how far outputs would move at other budgets")
    compressed.add_argument("--report", type=Path, help="JSON file to write the report to")
    compressed.add_argument("--html", type=Path, help="page to write the report to")

    profiled = command("profile", _profile, "how long a model takes here, layer by layer: a table to train or cut by")
    _add_model(profiled, required=True)
    profiled.add_argument("--example-input", type=_shape, help="shape of an input: 1,3,32,32")
    profiled.add_argument("--batch-size", type=_count, help="inputs at a time; those of the example if not given")
    profiled.add_argument("--runtime", default="eager", help="eager, compiled or onnx")
    profiled.add_argument("--seconds", type=float, default=30.0, help="about how long to measure")
    profiled.add_argument("--target-modules", nargs="+", help="names, types, patterns, all-linear")
    profiled.add_argument("--exclude-modules", nargs="+", help="layers to leave out")
    profiled.add_argument("--conv-mode", default="channel", help="channel, spatial or auto")
    profiled.add_argument("--out", type=Path, required=True, help="JSON file to write")

    converted = command("convert", _convert, "a checkpoint or safetensors file in another form, checked against it")
    _add_file(converted)
    _add_model(converted, required=True)
    converted.add_argument("--to", choices=("dense", "factored", "onnx"), required=True)
    converted.add_argument("--out", type=Path, required=True, help="file to write; safetensors but for onnx")
    converted.add_argument("--example-input", type=_shape, help="shape of an input, for onnx: 1,3,32,32")
    converted.add_argument("--batch-size", type=_count, default=64, help="for the timing of onnx against dense")
    _add_fold(converted)

    workspace = command("wandb-workspace", _wandb_workspace, "save a W&B workspace laid out for SVD training")
    workspace.add_argument("--entity", required=True, help="W&B user or team")
    workspace.add_argument("--project", required=True, help="its project")
    workspace.add_argument("--name", default="SVD training", help="of the workspace")
    return parser


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="of torch.save, Lightning or safetensors, or a folder with one")
    parser.add_argument("--key", help="where in the file the weights are: model, state.ema; found if one place fits")


def _add_fold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fold", action="store_true", help="merge batch normalizations into layers, in onnx")


def _add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--model", required=required, help=_MODEL)
    parser.add_argument(
        "--arguments", type=_json_object, default={}, help="of that, as JSON; a checkpoint brings its own"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _integers(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between them, got {text!r}") from None


def _shape(text: str) -> list[int]:
    sizes = _integers(text)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be integers >= 1, got {text!r}")
    return sizes


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) <= 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")


def _as_json(value: Any) -> str:
    """As JSON, with null for what is not finite."""
    from lightning_svd.report.data import finite

    return json.dumps(finite(value), allow_nan=False)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON ({error}): {text!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, such as '{{\"width\": 64}}', got {text!r}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
