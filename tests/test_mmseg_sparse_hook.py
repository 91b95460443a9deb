"""Sparse validation predicts the same and leaves no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip('mmseg')

from mmengine.hooks import Hook
from runs_of_hooks import LOSS, SPARSE, STATISTICS, load_checkpoint
from small_segmentors import loader, make_runner, segmentor

from deepmoe_plugin.sparse import SparseNetwork


@pytest.fixture
def sparse_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    forward = SparseNetwork.forward

    def count(self: SparseNetwork, x: Tensor) -> Any:
        calls.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(SparseNetwork, 'forward', count)
    return calls


EMA = dict(type='EMAHook', momentum=0.5)
BEST = dict(type='CheckpointHook', interval=1, save_best='mean', rule='greater')


@pytest.mark.parametrize('extra', [[], [EMA, STATISTICS, BEST]])
def test_sparse_validation_predicts_the_same(extra: list[Any], sparse_calls: list[int], tmp_path: Path) -> None:
    logits: dict[bool, list[list[Tensor]]] = {}
    states = []
    for sparse in (False, True):
        seen: list[list[Tensor]] = []

        class Keep(Hook):
            def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
                seen.append(runner.val_evaluator.metrics[0].logits)  # noqa: B023

        model = segmentor()
        hooks = [*([SPARSE] if sparse else []), LOSS, *extra, Keep()]  # priorities, not this order, decide
        runner = make_runner(model, tmp_path / str(sparse), *hooks, epochs=2, val=loader(3, 1))
        runner.train()
        assert not any(module.training for module in model.modules())
        runner.test()
        logits[sparse] = [*seen, runner.test_evaluator.metrics[0].logits]
        states.append(model.state_dict())
        folder = tmp_path / str(sparse)
        saved = load_checkpoint(str(folder / 'epoch_2.pth'))['state_dict']
        assert saved.keys() == model.state_dict().keys()
        best = [load_checkpoint(str(file))['state_dict'] for file in folder.glob('best*')]
        assert len(best) == (BEST in extra)
        assert all(state.keys() == saved.keys() for state in best)
    assert sparse_calls == [1] * 9
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    for masked, own in zip(logits[False], logits[True], strict=True):
        torch.testing.assert_close(own, masked, rtol=1e-3, atol=1e-4 * masked[0].abs().max().item())
    assert not torch.allclose(logits[True][0][0], logits[True][1][0], rtol=1e-3)
