"""What gates keep and images cost, in the logs of mmengine's Runner."""

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmseg')

from runs_of_hooks import LOSS, MU, STATISTICS, Watch, cost, dense, normalised
from small_segmentors import CLASSES, SIZE, backbone_config, loader, make_runner, segmentor

from deepmoe_plugin import count_macs, gate_statistics
from deepmoe_plugin.information import gate_entropy, use_entropy

SIZES = ((64, 64), (65, 97), (64, 64), (33, 64))


def test_statistics_of_images_of_different_sizes(tmp_path: Path) -> None:
    model = segmentor()
    val = loader(4, 1, sizes=SIZES)
    runner = make_runner(model, tmp_path, STATISTICS, val=val)
    metrics = {'val': runner.val(), 'test': runner.test()}
    costs = [cost(model, normalised(model, val['dataset'][i])) for i in range(4)]
    gmacs, kept = (torch.cat(values).double() for values in zip(*costs, strict=True))
    assert len(set(gmacs.tolist())) == 4
    stats = gate_statistics(model.backbone, [normalised(model, val['dataset'][i]) for i in range(4)])
    assert 0 < stats.dynamic_experts < 1
    with torch.no_grad():
        mixtures = torch.cat([model.backbone.gating.embedding(normalised(model, val['dataset'][i])) for i in range(4)])
    for mode, own in metrics.items():
        assert own['dynamic_experts'] == pytest.approx(stats.dynamic_experts, rel=1e-5)
        assert own['gate_entropy'] == pytest.approx(gate_entropy(mixtures).item(), rel=1e-5)
        assert own['use_entropy'] == pytest.approx(use_entropy(mixtures).item(), rel=1e-5)
        assert own['gate_entropy'] < own['use_entropy']
        assert 'right_where_embedding_wrong' not in own  # without a classifier on the embedding
        assert own['gmacs'] == pytest.approx(gmacs.mean().item(), rel=1e-9)
        assert own['kept_experts'] == pytest.approx(kept.mean().item(), rel=1e-6)
        assert runner.message_hub.get_scalar(f'{mode}/gmacs').current() == own['gmacs']


def test_pixels_that_the_embedding_gets_wrong(tmp_path: Path) -> None:
    model = segmentor(backbone_config(embed_loss_weight=MU, num_classes=CLASSES))
    val = loader(4, 2)
    metrics = make_runner(model, tmp_path, STATISTICS, val=val).val()
    right = total = 0
    for item in (val['dataset'][i] for i in range(4)):
        x = normalised(model, item)
        with torch.no_grad():
            found = model.predict(x, [item['data_samples']])[0].pred_sem_seg.data[0]
            seen = model.backbone.gating.class_logits(model.backbone.gating.embedding(x))[0] > 0
        truth = item['data_samples'].gt_sem_seg.data[0]
        for label in (~seen).nonzero().flatten().tolist():
            total += int((truth == label).sum())
            right += int(((truth == label) & (found == label)).sum())
    assert 0 < right < total
    assert metrics['right_where_embedding_wrong'] == pytest.approx(right / total)


def test_statistics_of_windows_add_up(tmp_path: Path) -> None:
    model = segmentor(test_cfg=dict(mode='slide', crop_size=(SIZE, SIZE), stride=(48, 48)))
    val = loader(2, 1, sizes=((64, 112), (64, 64)))
    metrics = make_runner(model, tmp_path, STATISTICS, val=val).val()
    wide, small = (normalised(model, val['dataset'][i]) for i in range(2))
    windows = torch.cat([wide[..., :64], wide[..., 48:], small])
    gmacs, kept = cost(model, windows)
    assert metrics['gmacs'] == pytest.approx(gmacs.sum().item() / 2, rel=1e-9)
    assert metrics['kept_experts'] == pytest.approx(kept.mean().item(), rel=1e-6)


def test_statistics_in_the_log_and_every_visualizer(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = segmentor()
    twin, watch = copy.deepcopy(model), Watch()
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    visualizer = dict(type='SegLocalVisualizer', vis_backends=backends, name=tmp_path.name)
    runner = make_runner(
        model, tmp_path, watch, STATISTICS, epochs=1, val=loader(2, 1), visualizer=visualizer, log_level='INFO'
    )
    runner.train()
    val = {name: runner.message_hub.get_scalar(f'val/{name}').current() for name in ('gmacs', 'kept_experts')}
    test = runner.test()
    first = twin.data_preprocessor(copy.deepcopy(watch.batches[0]), True)['inputs']
    expected = count_macs(twin.backbone, first).total.double().mean().item() / 1e9
    log_dir = Path(runner.log_dir)
    lines = [json.loads(line) for line in (log_dir / 'vis_data' / 'scalars.json').read_text().splitlines()]
    train = next(line for line in lines if 'loss' in line)
    # In training the embedding's norms take their statistics from the batch, and gates differ a little.
    assert train['gmacs'] == pytest.approx(expected, rel=0.2)
    assert 0 < train['kept_experts'] < 1
    assert next(line for line in lines if 'mean' in line)['gmacs'] == pytest.approx(val['gmacs'])
    assert next(line for line in lines if 'test/gmacs' in line)['test/gmacs'] == pytest.approx(test['gmacs'])
    events = EventAccumulator(str(log_dir / 'vis_data'))
    events.Reload()
    shown = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    assert shown['gmacs'] == pytest.approx([*(line['gmacs'] for line in lines if 'gmacs' in line)], rel=1e-5)
    assert shown['test/kept_experts'] == pytest.approx([test['kept_experts']], rel=1e-5)
    text = next(log_dir.glob('*.log')).read_text()
    for line in text.splitlines():
        if 'Epoch(' in line and ('loss' in line or 'mean' in line):
            assert 'gmacs' in line, line
            assert 'kept_experts' in line, line
    assert text.count('gmacs: ') >= 4


def test_writers_get_layers_and_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: list[dict[str, Any]] = []
    wandb = types.SimpleNamespace(
        init=lambda **_: None, log=lambda row, commit: rows.append(row), Histogram=list, join=lambda: None
    )
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    backends = [dict(type='TensorboardVisBackend', name='board'), dict(type='WandbVisBackend')]
    visualizer = dict(type='SegLocalVisualizer', vis_backends=backends, name=tmp_path.name)
    val = loader(3, 2)
    model = segmentor()
    runner = make_runner(model, tmp_path, STATISTICS, epochs=2, val=val, visualizer=visualizer)
    runner.train()
    runner.test()
    events = EventAccumulator(str(Path(runner.log_dir) / 'vis_data'))
    events.Reload()
    stats = gate_statistics(model.backbone, [normalised(model, val['dataset'][i]) for i in range(3)])
    by_image = sorted(stats.by_image().tolist())
    assert len(set(by_image)) > 1
    for mode, steps in (('val', [2, 4]), ('test', [4])):
        name = f'{mode}_gates/kept_experts'
        for layer, kept in stats.by_layer().items():
            scalars = events.Scalars(f'{name}/{layer}')
            assert [event.step for event in scalars] == steps
            assert scalars[-1].value == pytest.approx(kept, rel=1e-5)
        histogram = events.Histograms(f'{name}/by_image')[-1].histogram_value
        assert (histogram.num, histogram.min, histogram.max) == pytest.approx((3, by_image[0], by_image[-1]), rel=1e-5)
        assert events.Histograms(f'{name}/by_expert')[-1].histogram_value.num == sum(stats.widths)
        shown = [row for row in rows if name in row]
        assert len(shown) == len(steps)
        assert shown[-1][name] == pytest.approx(stats.kept_experts, rel=1e-5)
        assert sorted(shown[-1][f'{name}/by_image']) == pytest.approx(by_image, rel=1e-5)


def test_a_test_with_a_writer_builds_no_training(tmp_path: Path) -> None:
    visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='TensorboardVisBackend')], name=tmp_path.name)
    runner = make_runner(segmentor(), tmp_path, STATISTICS, epochs=1, val=loader(1, 1), visualizer=visualizer)
    runner.test()
    assert isinstance(runner._train_loop, dict)


def test_train_statistics_are_those_of_the_pass(tmp_path: Path) -> None:
    model = segmentor(backbone_config(freeze_gating=True))  # gates of training are gates of evaluation
    twin, watch = copy.deepcopy(model), Watch()
    runner = make_runner(model, tmp_path, watch, LOSS, STATISTICS, iters=2)
    runner.train()
    for i, batch in enumerate(watch.batches):
        gmacs, kept = cost(twin, twin.data_preprocessor(copy.deepcopy(batch), True)['inputs'])
        logged = {name: runner.message_hub.get_scalar(f'train/{name}').data[0] for name in ('gmacs', 'kept_experts')}
        assert logged['gmacs'][i] == pytest.approx(gmacs.mean().item(), rel=1e-9)
        assert logged['kept_experts'][i] == pytest.approx(kept.mean().item(), rel=1e-5)
        assert len(logged['kept_experts']) == 2


def test_statistics_of_a_dense_twin(tmp_path: Path) -> None:
    model = dense()
    metrics = make_runner(model, tmp_path, STATISTICS, val=loader(1, 1)).val()
    expected = count_macs(model.backbone, torch.zeros(1, 3, SIZE, SIZE)).total.item() / 1e9
    assert metrics['gmacs'] == pytest.approx(expected, rel=1e-9)
    assert 'kept_experts' not in metrics
