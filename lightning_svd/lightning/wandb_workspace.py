"""A W&B workspace laid out for SVD training; needs the extra ``wandb-workspace``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

STEP = "trainer/global_step"  # WandbLogger's axis


def build_workspace(entity: str, project: str, name: str = "SVD training") -> ws.Workspace:
    """The workspace, not saved; asks no server anything.

    Panels go by the keys of ``SVDTrainingCallback`` and ``SpectrumMonitor``, those of layers by their section, so that
    one workspace fits every model. What it does not name, W&B adds in sections of its own, the histograms and spectra
    of layers among them.

    Args:
        entity: User or team.
        project: Its project.
        name: Of the workspace.

    Raises:
        ValueError: If one of them is empty.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    for argument, value in (("entity", entity), ("project", project), ("name", name)):
        if not value:
            raise ValueError(f"`{argument}` must not be empty")
    final = [f"svd_final/{ratio}" for ratio in ("macs_ratio", "params_ratio", "rank_ratio")]
    sections = {
        "Overview": [
            _line("MACs, share of the dense model", "svd/macs_ratio", share=True),
            _line("Parameters, share of the dense model", "svd/params_ratio", share=True),
            _line("Ranks in all layers", "svd/total_rank"),
            wr.BarPlot(title="At the end, share of the dense model", metrics=final),
        ],
        "Ranks per layer": [
            _line("Ranks", regex="^svd_rank/"),
            wr.WeavePanelSummaryTable(table_name="svd_layers"),
            wr.WeavePanelSummaryTable(table_name="svd_plan"),
        ],
        "Spectra": [
            wr.MediaBrowser(title="Singular values, index over epoch", media_keys=["svd/spectrum_heatmap"]),
            wr.MediaBrowser(title="The same by SpectrumMonitor", media_keys=["layer/spectrum_heatmap"]),
            _line("Effective ranks", regex="^layer_effective_rank/"),
            _line("Stable ranks", regex="^layer_stable_rank/"),
        ],
        "Penalties and strength": [
            _line("Orthogonality error", "svd/orthogonality_error"),
            _line("Orthogonality penalty", "svd/orthogonality_penalty"),
            _line("Sparsity penalty", "svd/sparsity_penalty"),
            _line("Sparsity strength", "svd/sparsity_strength"),
        ],
        "Your metrics": [
            _line("Losses", regex="loss"),
            _line("Scores", regex="acc|auc|auroc|f1|iou|mAP|bleu|rouge|perplexity"),
        ],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(pinned_columns=[f"summary:{key}" for key in final]),
        auto_generate_panels=True,
    )


def save_workspace(workspace: ws.Workspace) -> str:
    """Save a workspace on the W&B server that this machine is logged in to; returns its address."""
    return str(workspace.save().url)


def _line(title: str, key: str | None = None, regex: str | None = None, share: bool = False) -> wr.LinePlot:
    import wandb_workspaces.reports.v2 as wr

    limits = (0.0, 1.0) if share else (None, None)
    return wr.LinePlot(title=title, x=STEP, y=[key] if key else [], metric_regex=regex, range_y=limits)
