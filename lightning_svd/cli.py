"""The command ``lightning-svd``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, the process's own by default; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ModuleNotFoundError as missing:
        command = options.command
        raise SystemExit(f"{command} needs {missing.name}: pip install 'lightning-svd[{command}]'") from None
    return 0


def _demo(options: argparse.Namespace) -> None:
    from lightning_svd.demo import run_demo

    run_demo(options.out, options.seeds, options.target_macs, options.epochs, options.logger)


def _wandb_workspace(options: argparse.Namespace) -> None:
    from lightning_svd.wandb_workspace import build_workspace, save_workspace

    print(save_workspace(build_workspace(options.entity, options.project, options.name)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-svd", description="SVD training for PyTorch Lightning.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    demo = commands.add_parser(
        "demo",
        help="train a small ResNet on digits, dense and low-rank, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("lightning-svd-demo"), help="folder for the report and the files"
    )
    demo.add_argument("--seeds", type=_integers, default=[0], help="comma-separated, for instance 0,1,2")
    demo.add_argument("--target-macs", type=float, default=0.35, help="share of the MACs to keep")
    demo.add_argument("--epochs", type=int, default=30, help="epochs of each training")
    demo.add_argument(
        "--logger", choices=("wandb", "tensorboard", "csv", "none"), default="wandb", help="W&B runs offline"
    )
    demo.set_defaults(run=_demo)
    workspace = commands.add_parser(
        "wandb-workspace",
        help="save a W&B workspace laid out for SVD training",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    workspace.add_argument("--entity", required=True, help="W&B user or team")
    workspace.add_argument("--project", required=True, help="its project")
    workspace.add_argument("--name", default="SVD training", help="of the workspace")
    workspace.set_defaults(run=_wandb_workspace)
    return parser


def _integers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
