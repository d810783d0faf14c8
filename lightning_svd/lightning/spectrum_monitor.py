"""``SpectrumMonitor``: spectra and ranks of any model while it trains."""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_svd.arguments import check_choice, check_count, check_targets
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import effective_rank, energy_rank, numerical_rank, stable_rank
from lightning_svd.layers.views import CONV_MODES, View, supported_type
from lightning_svd.lightning.loggers import SpectrumHistory, metric_name
from lightning_svd.model.plan import LayerPlan, Targets, default_targets, layers_of, matching, plan
from lightning_svd.report.metrics import singular_values

ENERGY_PERCENTAGES = (90, 95, 99)
SECTION = "layer"


class SpectrumMonitor(Callback):
    """Draws the spectrum of each layer and logs its ranks, for models that are factorized or not.

    At the start of a fit, every ``every_n_epochs`` epochs and at the end, each linear layer and convolution, subclasses
    and factorized ones included, gives ``layer_stable_rank/<layer>``, ``layer_effective_rank/<layer>``,
    ``layer_energy_rank_90/<layer>`` (95 and 99 too), ``layer_break_even_rank/<layer>`` and, as a share of the full
    rank, ``layer_numerical_rank/<layer>``, on every logger. W&B and TensorBoard also get the pictures that they get
    from ``SVDTrainingCallback``, as ``layer_histogram``, ``layer_spectrum`` and ``layer/spectrum_heatmap``. Works with
    no argument and with no logger.

    The spectrum of a plain layer takes an SVD each time, in the first process only, while others wait for it. The
    model is only read.

    Args:
        target_modules: Layers to watch: a list of names (whole, or their ends after a dot), or one regular
            expression for whole names. None: every one.
        exclude_modules: Layers to leave out, in the same form.
        conv_mode: The matrix that a plain convolution is seen as: "channel" (out, in*kh*kw), "spatial"
            (out*kw, in*kh), or "auto".
        every_n_epochs: How often.

    Attributes:
        layers: What is watched, once a fit has started.
        spectra: Layer -> its latest singular values (r,) on the CPU, descending; in the first process.
        ranks: Layer -> notion of rank, named as in the keys -> its latest value; in the first process.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
        self,
        *,
        target_modules: str | list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        conv_mode: str = "channel",
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__()
        check_targets("target_modules", target_modules)
        check_targets("exclude_modules", exclude_modules)
        check_choice("conv_mode", conv_mode, (*CONV_MODES, "auto"))
        check_count("every_n_epochs", every_n_epochs)
        self.target_modules: Targets = target_modules
        self.exclude_modules: Targets = exclude_modules
        self.conv_mode = conv_mode
        self.every_n_epochs = every_n_epochs

        self.layers: list[LayerPlan] = []
        self.spectra: dict[str, Tensor] = {}
        self.ranks: dict[str, dict[str, float]] = {}
        self._history = SpectrumHistory({}, section=SECTION)
        self._seen_at = -1
        self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        us, strategy = type(self).__name__, trainer.strategy
        if strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"{us} does not work with {type(strategy).__name__}, which shards parameters: use one device or DDP"
            )
        self.layers = watched_layers(pl_module, self.target_modules, self.exclude_modules, self.conv_mode)
        shapes = {layer.name: layer.matrix_shape for layer in self.layers if layer.matrix_shape}
        self._history = SpectrumHistory(shapes, section=SECTION)
        self._seen_at, self._warned = -1, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._look(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module, trainer.current_epoch, last=True)

    def _look(self, trainer: Trainer, pl_module: LightningModule, epoch: int, last: bool = False) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        if step != self._seen_at:  # an epoch's end and the fit's may be one moment
            self._seen_at = step
            self.spectra = self._finite_spectra(pl_module)
            self.ranks = {
                layer.name: ranks_of(self.spectra[layer.name], layer)
                for layer in self.layers
                if layer.name in self.spectra
            }
            for logger in trainer.loggers:
                logger.log_metrics(self._scalars(), step=step)
        self._history.draw(trainer.loggers, lambda: {n: s.tolist() for n, s in self.spectra.items()}, epoch, step, last)

    def _scalars(self) -> dict[str, float]:
        return {
            f"{SECTION}_{notion}/{metric_name(name)}": value
            for name, ranks in self.ranks.items()
            for notion, value in ranks.items()
        }

    def _finite_spectra(self, pl_module: LightningModule) -> dict[str, Tensor]:
        spectra, modules = {}, layers_of(pl_module)
        for layer in self.layers:
            spectrum = _spectrum(modules[layer.name], layer.conv_mode)
            if spectrum is not None:
                spectra[layer.name] = spectrum
            elif not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"{type(self).__name__}: `{layer.name}` has no finite spectrum; such layers are left out"
                )
        return spectra


def _spectrum(layer: nn.Module, conv_mode: str | None) -> Tensor | None:
    """On the CPU; None where it is not finite or the SVD does not converge."""
    try:
        spectrum = singular_values(layer, conv_mode or "channel").cpu()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in __all__
        return None
    return spectrum if torch.isfinite(spectrum).all() else None


def watched_layers(
    module: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None, conv_mode: str = "channel"
) -> list[LayerPlan]:
    """The layers of ``module`` whose spectra can be drawn, as if none was skipped.

    More than :func:`~lightning_svd.model.surgery.plan` would factorize: what only stands in the way of factors (a tied
    weight, a forward of its own, a shape too thin) does not matter here.

    Args:
        module: Any module.
        target_modules: As for :func:`~lightning_svd.model.surgery.decompose`.
        exclude_modules: As for :func:`~lightning_svd.model.surgery.decompose`.
        conv_mode: As for :func:`~lightning_svd.model.surgery.decompose`; "auto" is "channel" where factors are not
            possible.

    Raises:
        ValueError: If a pattern matches no layer, or no layer is left.
    """
    plans = {layer.name: layer for layer in plan(module, target_modules, exclude_modules, conv_mode)}
    modules = layers_of(module)
    targeted = default_targets(modules)
    if target_modules is not None:
        targeted = matching(modules, target_modules, "target_modules")
    targeted -= matching(modules, exclude_modules, "exclude_modules")
    watched = [_watched(plans[name], modules[name], conv_mode) for name in modules if name in targeted]
    layers = [layer for layer in watched if layer.matrix_shape]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer or convolution to watch")
    return layers


def _watched(layer_plan: LayerPlan, layer: nn.Module, conv_mode: str) -> LayerPlan:
    """The plan as if the layer was not skipped; without a matrix shape if it cannot be watched."""
    if not layer_plan.skipped:
        return layer_plan
    shape = layer_plan.weight_shape
    if isinstance(layer, SVDLayer):
        view = layer.view
    elif shape and supported_type(layer):
        view = View.of(layer, "channel" if conv_mode == "auto" else conv_mode)
    else:
        return layer_plan
    return replace(layer_plan, matrix_shape=view.matrix_shape, conv_mode=view.conv_mode, skipped=None)


def ranks_of(spectrum: Tensor, layer: LayerPlan) -> dict[str, float]:
    """Notions of rank of a layer with these singular values (r,)."""
    assert layer.matrix_shape
    energies = {f"energy_rank_{share}": float(energy_rank(spectrum, share / 100)) for share in ENERGY_PERCENTAGES}
    return {
        "stable_rank": stable_rank(spectrum),
        "effective_rank": effective_rank(spectrum),
        **energies,
        "break_even_rank": float(layer.break_even),
        "numerical_rank": numerical_rank(spectrum, layer.matrix_shape) / layer.full_rank,
    }
