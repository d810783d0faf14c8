"""The workspace as the real package builds it, with no server to ask."""

import socket
import sys

import pytest

from lightning_svd.cli import main
from lightning_svd.lightning.wandb_workspace import STEP, build_workspace, save_workspace

# pydantic's about wandb_workspaces, on import only.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def sent(monkeypatch):
    """What would be sent to the server."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.workspaces import internal

    views = []

    def keep(view):
        views.append(view)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.setattr(internal, "upsert_view2", keep)
    monkeypatch.setattr(ws.Workspace, "url", property(lambda self: f"https://wandb.ai/{self.entity}/{self.project}"))
    return views


def panels(workspace):
    return {section.name: section.panels for section in workspace.sections}


def test_sections_come_in_the_order_in_which_a_person_asks():
    workspace = build_workspace("me", "mine")
    assert (workspace.entity, workspace.project, workspace.name) == ("me", "mine", "SVD training")
    assert list(panels(workspace)) == [
        "Overview",
        "Ranks per layer",
        "Spectra",
        "Penalties and strength",
        "Your metrics",
    ]
    assert all(section.is_open for section in workspace.sections)
    assert workspace.auto_generate_panels  # what no section names is not hidden


def test_the_overview_shows_macs_parameters_and_ranks_over_the_trainers_step():
    lines = panels(build_workspace("me", "mine"))["Overview"][:3]
    assert [line.y for line in lines] == [["svd/macs_ratio"], ["svd/params_ratio"], ["svd/total_rank"]]
    assert all(line.x == STEP for line in lines)
    assert lines[0].range_y == (0.0, 1.0)


def test_every_key_that_it_names_is_one_that_is_logged():
    from test_monitor import FINAL, KEYS

    workspace = build_workspace("me", "mine")
    every = [panel for found in panels(workspace).values() for panel in found]
    named = {key for panel in every for key in [*getattr(panel, "y", []), *getattr(panel, "metrics", [])]}
    assert named <= KEYS | FINAL
    media = {key for panel in every for key in getattr(panel, "media_keys", [])}
    assert media == {"svd/spectrum_heatmap", "layer/spectrum_heatmap"}
    assert {panel.table_name for panel in every if hasattr(panel, "table_name")} == {"svd_layers", "svd_plan"}
    regexes = {panel.metric_regex for panel in every if getattr(panel, "metric_regex", None)}
    assert {"^svd_rank/", "^layer_effective_rank/", "^layer_stable_rank/"} <= regexes


@pytest.mark.parametrize("argument", ["entity", "project", "name"])
def test_what_is_empty_is_refused_by_name(argument):
    arguments = {"entity": "me", "project": "mine", "name": "view"} | {argument: ""}
    with pytest.raises(ValueError, match=f"`{argument}` must not be empty"):
        build_workspace(**arguments)


def test_it_is_sent_when_it_is_saved_and_not_before(sent):
    workspace = build_workspace("me", "mine", "view")
    assert sent == []
    assert save_workspace(workspace) == "https://wandb.ai/me/mine"
    (view,) = sent
    assert (view.entity, view.project, view.display_name) == ("me", "mine", "view")
    assert len(view.spec.section.panel_bank_config.sections) == 5
    assert view.spec.section.settings.x_axis == STEP


def test_the_command_prints_the_address(sent, capsys):
    assert main(["wandb-workspace", "--entity", "me", "--project", "mine", "--name", "view"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://wandb.ai/me/mine"
    assert sent[0].display_name == "view"


def test_the_command_asks_for_what_it_needs(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["wandb-workspace", "--entity", "me"])
    assert "--project" in capsys.readouterr().err


def test_the_command_says_what_to_install(monkeypatch):
    import wandb_workspaces.workspaces  # noqa: F401

    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    with pytest.raises(SystemExit, match=r"needs wandb_workspaces.*: pip install 'lightning-svd\[wandb-workspace\]'"):
        main(["wandb-workspace", "--entity", "me", "--project", "mine"])
