"""The command ``lightning-svd``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, the process's own by default; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        from lightning_svd.demo import run_demo
    except ModuleNotFoundError as missing:
        raise SystemExit(f"the demo needs {missing.name}: pip install 'lightning-svd[demo]'") from None
    run_demo(options.out, options.seeds, options.target_macs, options.epochs, options.logger)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-svd", description="SVD training for PyTorch Lightning.")
    commands = parser.add_subparsers(required=True, metavar="command")
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
    return parser


def _integers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
