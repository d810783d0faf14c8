"""A budget is met by default arguments, whatever the net: on real data, counted on the model that is left."""

import nets
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from models import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_svd import SVDTrainingCallback, summarize
from lightning_svd.demo import digits


class Classifier(LightningModule):
    def __init__(self, net):
        super().__init__()
        torch.manual_seed(0)
        self.model = nets.build(net, 1, 8, 10)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)


@pytest.fixture(scope="module")
def loader():
    images, labels = digits()[0].tensors
    return DataLoader(TensorDataset(images[:160], labels[:160]), 16)


def macs(model):
    return summarize(model.eval(), torch.zeros(1, 1, 8, 8)).dense_macs


@pytest.mark.parametrize("target", [0.35, 0.25])
@pytest.mark.parametrize("conv_mode", ["channel", "spatial"])
@pytest.mark.parametrize("net", ["resnet20", "vgg", "vit", "mlp"])
def test_the_budget_is_met_within_one_percent(net, conv_mode, target, loader):
    model, dense = Classifier(net), macs(Classifier(net).model)
    callback = SVDTrainingCallback(target_macs=target, conv_mode=conv_mode)
    quiet_trainer(max_epochs=2, callbacks=[callback]).fit(model, loader)
    assert 0.99 * target <= macs(model.model) / dense <= target
    assert callback.report.macs_ratio == pytest.approx(macs(model.model) / dense, rel=1e-3)
