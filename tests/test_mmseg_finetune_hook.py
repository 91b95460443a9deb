"""Two stages in one run, and runs that are killed and resumed."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmseg')

from runs_of_hooks import GATING, LOSS, MU, STATISTICS, WEIGHTS, Kill, State, Watch, finetune
from small_segmentors import CLASSES, backbone_config, make_runner, segmentor


@pytest.mark.parametrize(('begin', 'by_epoch'), [(1, True), (2, False), (3, False), (0, True)])
def test_stage_two(begin: int, by_epoch: bool, tmp_path: Path) -> None:
    model = segmentor(backbone_config(**WEIGHTS))
    watch = Watch()
    runner = make_runner(model, tmp_path, watch, LOSS, finetune(begin, by_epoch), epochs=3)
    runner.train()
    begin *= 2 if by_epoch else 1
    states = [*watch.states, model.state_dict()]
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert any(key.startswith(GATING) for key in moved) == (i < begin)
        assert any(not key.startswith(GATING) for key in moved)
    histories = runner.message_hub.log_scalars
    for term in ('loss_gate', 'loss_embed'):
        count = len(histories[f'train/{term}'].data[0]) if f'train/{term}' in histories else 0
        assert count == begin
    assert len(histories['train/kept_experts'].data[0]) == 6
    assert not any(module.training for module in model.backbone.gating.modules())


def test_stage_two_between_accumulated_batches(tmp_path: Path) -> None:
    """Gradients of stage 1 that wait for their step are dropped with it."""
    model, watch = segmentor(backbone_config(**WEIGHTS)), Watch()
    make_runner(model, tmp_path, watch, LOSS, finetune(3, False), iters=4, optim=dict(accumulative_counts=2)).train()
    heads = GATING + 'gates.weight'
    assert not torch.equal(watch.states[2][heads], watch.states[1][heads])
    assert torch.equal(model.state_dict()[heads], watch.states[2][heads])
    assert not any(name.startswith(GATING) for name in watch.grads[1])


def last_state(folder: Path, *hooks: Any, **kwargs: Any) -> State:
    model = segmentor(backbone_config(target_kept=0.4, target_steps=4, embed_loss_weight=MU, num_classes=CLASSES))
    runner = make_runner(model, folder, LOSS, STATISTICS, *hooks, **kwargs)
    runner.train()
    momenta = runner.optim_wrapper.optimizer.state_dict()['state']
    return {**model.state_dict(), **{f'momentum {i}': state['momentum_buffer'] for i, state in momenta.items()}}


@pytest.mark.parametrize(
    ('limit', 'begin', 'killed'),
    [
        (dict(epochs=3), None, 3),
        (dict(epochs=3), 2, 3),
        (dict(epochs=3), 1, 5),
        (dict(iters=6, interval=2), None, 3),
        (dict(iters=6, interval=2), 3, 3),
        (dict(iters=6, interval=2), 3, 5),
    ],
)
def test_killed_and_resumed_is_uninterrupted(limit: dict[str, int], begin: Any, killed: int, tmp_path: Path) -> None:
    hooks = [] if begin is None else [finetune(begin, 'epochs' in limit)]
    expected = last_state(tmp_path / 'whole', *hooks, **limit)
    with pytest.raises(KeyboardInterrupt):
        last_state(tmp_path / 'parts', *hooks, Kill(killed), **limit)
    resumed = last_state(tmp_path / 'parts', *hooks, resume=True, **limit)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
    assert expected['backbone.gating.gates.threshold'] > 0
