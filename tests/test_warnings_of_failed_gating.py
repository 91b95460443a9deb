"""Gating that has failed is said so once, with a remedy, in the log of the host."""

import copy
import logging

import pytest
import torch
from small_networks import images, randomise, small
from timm.task import ClassificationTask
from torch import nn

import deepmoe_plugin
from deepmoe_plugin.gating import watch

SHUT = dict(gate_norm='sum', gate_loss_weight=8.0)
LAST_LINE = '*** Best metric: 50.0 (epoch 0)'  # of timm's train.py


def train(model: nn.Module, steps: int, host: str, **kwargs) -> None:
    """Steps of training in a host; each ends as training in it does, if it does."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, **kwargs)
    model.train()
    task = ClassificationTask(model, nn.CrossEntropyLoss()) if host == 'timm' else None
    criterion = deepmoe_plugin.DeepMoELoss(model, nn.CrossEntropyLoss())
    for step in range(steps):
        x, y = images(8, seed=step), torch.arange(8) % 10
        loss = task(x, y)['loss'] if task is not None else criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if host == 'timm':
        logging.getLogger('train').info(LAST_LINE)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize('host', ['timm', 'a loop'])
def test_all_gates_closed(host, caplog):
    torch.manual_seed(0)
    train(small('cifar', **SHUT), 12, host)
    (warning,) = warnings(caplog)
    assert 'No image keeps any expert' in warning
    assert "gate_loss_weight (it is 8, with gate_norm='sum')" in warning
    assert 'target_kept' in warning


def test_a_target_opens_closed_gates_again(caplog):
    model = small('cifar', target_kept=0.5)
    nn.init.constant_(model.gating.gates.weight, -0.01)
    train(model, 4, 'a loop')
    assert warnings(caplog) == []


def test_static_at_the_end_of_training(caplog):
    train(small('cifar', gate_loss_weight=0.0), 4, 'timm')  # all gates still are about one
    (warning,) = warnings(caplog)
    assert 'All images keep the same 100% of the experts' in warning
    assert 'warm_start' in warning
    assert 'target_kept' in warning
    caplog.clear()
    logging.getLogger('train').info(LAST_LINE)
    assert warnings(caplog) == []


def test_dynamic_gating_is_not_warned_of(caplog):
    train(randomise(small('cifar', gate_loss_weight=0.0)), 4, 'timm')
    assert warnings(caplog) == []


def test_gating_that_becomes_static_in_any_loop(caplog, monkeypatch):
    monkeypatch.setattr(watch, 'WINDOW', 3)
    model = randomise(small('cifar', gate_loss_weight=0.0))
    train(model, 3, 'a loop')
    with torch.no_grad():
        model.gating.gates.weight[::2] = 1
        model.gating.gates.weight[1::2] = -1
    assert warnings(caplog) == []
    deepmoe_plugin.freeze_gating(model)
    train(model, 9, 'a loop')
    (warning,) = warnings(caplog)
    assert 'All images keep the same 50%' in warning


def test_experts_that_hardly_any_image_keeps_otherwise_are_static(caplog):
    model = small('cifar')
    kept = torch.ones(16, 400, dtype=torch.bool)
    kept[:8, :2] = False  # 2 of 400 are dynamic
    model.watch.see(kept, '', recovers=True)
    model.finish_training()
    assert 'All images keep the same 100% of the experts (but for 0.5%)' in warnings(caplog)[0]
    model = small('cifar')
    kept[:8, :6] = False
    model.watch.see(kept, '', recovers=True)
    model.finish_training()
    assert len(warnings(caplog)) == 1


def test_copies_warn_for_themselves():
    model = small('cifar')
    model.watch.warn = logging.getLogger('x').warning
    model.watch.see(torch.zeros(2, 3, dtype=torch.bool), '', recovers=False)
    twin = copy.deepcopy(model)
    assert twin.watch is not model.watch
    assert twin.watch.warn != model.watch.warn


def test_the_log_of_mmengine(tmp_path):
    pytest.importorskip('mmseg')
    from small_segmentors import CLASSES, backbone_config, make_runner, segmentor

    for name, value, expected in (('static', 1, 'All images keep the same 100%'), ('closed', -1, 'No image keeps any')):
        model = segmentor(backbone_config(num_classes=CLASSES, gate_loss_weight=0.0))
        nn.init.constant_(model.backbone.gating.gates.weight, value)
        make_runner(model, tmp_path / name, dict(type='DeepMoELossHook'), iters=8).train()
        logs = [path.read_text() for path in (tmp_path / name).rglob('*.log')]
        assert ''.join(logs).count(expected) == 1
