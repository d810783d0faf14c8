"""Reports to read and to draw, of any size."""

import math

from lightning_svd.report.data import LayerReport, Pause, RankChange, SVDReport

STEPS = 12000


def layer_report(index, name=None, full_rank=None, rank=None, **changes):
    """A layer of 64 to 512 rows whose singular values fall from 3 to 0.1, cut at a rank that differs by layer."""
    m = full_rank or (64, 128, 256, 384, 512)[index % 5]
    n, positions = 4 * m, (1024, 256, 64)[index % 3]
    rank = rank or max(1, round(m * (0.15 + 0.7 * (index * 0.618 % 1))))
    break_even = (m * n - 1) // (m + n)
    factored = rank <= break_even
    params = rank * (m + n) if factored else m * n
    before = tuple(3 * math.exp(-3.4 * k / m) for k in range(m))
    values = {
        "name": name if name is not None else f"encoder.layers.{index // 2}.{('self_attn.out_proj', 'mlp')[index % 2]}",
        "kind": "Conv2d",
        "matrix_shape": (m, n),
        "conv_mode": "channel",
        "full_rank": m,
        "break_even": break_even,
        "rank": rank,
        "form": "factored" if factored else "dense",
        "dense_macs": m * n * positions,
        "macs": params * positions,
        "dense_params": m * n,
        "params": params,
        "spectrum_before": before,
        "spectrum_after": tuple(1.3 * value for value in before[:rank]),
    }
    return LayerReport(**(values | changes))


def svd_report(layers, **changes):
    """A whole model of these layers, cut 20 times between 30 % and 70 % of the run, watched and with a pause."""
    dense_macs, dense_params = sum(x.dense_macs for x in layers) + 10**6, sum(x.dense_params for x in layers) + 10**3
    macs, params = sum(x.macs for x in layers) + 10**6, sum(x.params for x in layers) + 10**3
    timeline = []
    for cut in range(1, 21):
        done, step = 1 - (1 - cut / 20) ** 3, round(STEPS * (0.3 + 0.4 * cut / 20))
        ranks = {x.name: round(x.full_rank - done * (x.full_rank - x.rank)) for x in layers}
        ratios = (1 - done * (1 - macs / dense_macs), 1 - done * (1 - params / dense_params))
        timeline.append(RankChange(step, step // 400, ranks, *ratios))
    values = {
        "layers": tuple(layers),
        "skipped": (
            ("embedding", "Embedding", "unsupported type"),
            ("head", "Linear", "excluded by `exclude_modules`"),
        ),
        "dense_macs": dense_macs,
        "macs": macs,
        "dense_params": dense_params,
        "params": params,
        "timeline": tuple(timeline),
        "warnings": ("the target, 0.35 of the macs, was not reached",),
        "strengths": ((0, 0.0), (3600, 0.002), (8399, 0.002), (8400, 0.0), (STEPS, 0.0)),
        "metric": "val_accuracy",
        "metric_values": tuple((400 * k, 0.98 - 0.1 / k) for k in range(1, 31)),
        "pauses": (Pause(4800, 5600, 0.93, 0.96), Pause(11600, None, 0.95, 0.98)),
        "arguments": {"target_macs": 0.35, "exclude_modules": ["head"], "regularizer": "hoyer", "monitor": None},
    }
    return SVDReport(**(values | changes))


def report_of(count):
    """A model of so many layers."""
    return svd_report([layer_report(index) for index in range(count)])
