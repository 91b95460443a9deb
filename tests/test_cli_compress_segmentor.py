"""`deepmoe compress CONFIG`: from a trained dense segmentor to a cheaper gated one, on generated street scenes."""

import json

import pytest
import torch

pytest.importorskip('mmseg')

from mmengine.config import Config
from mmengine.runner import Runner
from small_segmentors import ITERATIONS, backbone_config, loader, segmentor, small_street_scenes

from deepmoe_plugin import find_deepmoe, set_budget
from deepmoe_plugin.cli import compress, compress_segmentor, compression, test, train
from deepmoe_plugin.mmseg.hooks import compress_hook


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return small_street_scenes(tmp_path_factory.mktemp('scenes'))


@pytest.fixture(scope='module')
def dense(config, tmp_path_factory):
    """Checkpoint of the dense twin, trained by `deepmoe train` on the dense config."""
    folder = tmp_path_factory.mktemp('dense')
    path = folder / 'dense.py'
    settings = Config.fromfile(config)
    for name in ('target_kept', 'target_steps'):
        settings.model.backbone.pop(name)
    settings.model.backbone.gated = False
    settings.custom_hooks = []
    settings.dump(str(path))
    train.main([str(path), '--work-dir', str(folder)])
    return folder / f'iter_{ITERATIONS}.pth'


def run(config, dense, folder, *more):
    return compress.main(
        [str(config), '--checkpoint', str(dense), '--output', str(folder), '--stage2', '0.5', *map(str, more)]
    )


def test_segmentor_spends_the_budget_and_can_be_tested(config, dense, tmp_path):
    summary = run(config, dense, tmp_path, '--macs', 0.6, '--baselines', 'dense')
    before, longer, gated = summary['results']
    assert [row['name'] for row in summary['results']] == [
        'dense',
        *(f'{n}, {ITERATIONS} iterations' for n in ('dense', 'gated')),
    ]
    assert before['gmacs'] == longer['gmacs']
    weights = [
        torch.load(path, weights_only=True)['state_dict']
        for path in (dense, tmp_path / f'dense_longer/iter_{ITERATIONS}.pth')
    ]
    assert not torch.equal(*(state['decode_head.conv_seg.weight'] for state in weights))
    assert gated['gmacs'] / before['gmacs'] == pytest.approx(0.6, abs=0.06)
    assert gated['kept_experts'] < 1
    assert 0 <= gated['dynamic_experts'] <= 1
    assert json.loads((tmp_path / 'results.json').read_text())['results'] == summary['results']
    assert (tmp_path / 'results.md').read_text().count('\n') == 5
    assert (tmp_path / 'experts.png').stat().st_size > 1000
    test.main([str(tmp_path / 'compressed.py'), str(tmp_path / 'compressed.pth'), '--work-dir', str(tmp_path / 'test')])
    logged = next((tmp_path / 'test').rglob('*.json')).read_text()
    assert json.loads(logged.splitlines()[-1])['mIoU'] == pytest.approx(gated['mIoU'])


@pytest.mark.parametrize('dynamic', [0, 0.25])
def test_gates_start_from_the_dense_network_and_are_warm(config, dense, tmp_path, monkeypatch, dynamic):
    started = {}

    def keep(runner, batch_idx, data_batch=None, outputs=None):
        started.setdefault('weight', find_deepmoe(runner.model).gating.gates.weight.detach().clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(
        compress_hook.CompressHook, 'after_train_iter', lambda _self, *args, **kwargs: keep(*args, **kwargs)
    )
    with pytest.raises(KeyboardInterrupt):
        run(config, dense, tmp_path, '--dynamic-experts', dynamic)
    assert (started['weight'].mean(1) - 1).abs().mean() > 0.05  # gates rank the experts
    assert bool(started['weight'].std(1).max() > 0.01) is bool(dynamic)


def test_range_of_budgets(config, dense, tmp_path):
    summary = run(config, dense, tmp_path, '--macs', 0.5, 0.8, '--resume')  # there is nothing yet
    before, *rows = summary['results']
    assert [row['name'].partition(', at ')[2] for row in rows] == ['0.8', '0.65', '0.5']
    spent = [row['gmacs'] / before['gmacs'] for row in rows]
    assert spent == pytest.approx([0.8, 0.65, 0.5], abs=0.06)
    settings = Config.fromfile(tmp_path / 'compressed.py')
    model = Runner.from_cfg({**settings, 'work_dir': str(tmp_path / 'x'), 'experiment_name': 'again'}).model
    model.load_state_dict(torch.load(tmp_path / 'compressed.pth', weights_only=True)['state_dict'])
    smallest = find_deepmoe(model).gating.gates.threshold.item()
    assert len(find_deepmoe(model).gating.norm_curve.thresholds) == compression.NORM_BUDGETS
    set_budget(model, macs=0.7)
    assert 0 <= find_deepmoe(model).gating.gates.threshold.item() < smallest


def test_resumed_run_goes_on_where_it_was(config, dense, tmp_path, monkeypatch):
    killed = 5  # in stage 2
    original = compress_hook.CompressHook.before_train_iter
    warmed = []

    def stop(self, runner, batch_idx, data_batch=None):
        if runner.iter == killed:
            raise KeyboardInterrupt
        original(self, runner, batch_idx, data_batch)

    with monkeypatch.context() as patch:
        patch.setattr(compress_hook.CompressHook, 'before_train_iter', stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, dense, tmp_path)
    monkeypatch.setattr(compress_hook, 'warm_start', lambda *args: warmed.append(args))
    summary = run(config, dense, tmp_path, '--resume')
    assert not warmed
    assert summary['results'][1]['gmacs'] / summary['results'][0]['gmacs'] == pytest.approx(0.5, abs=0.06)
    lines = [json.loads(line) for path in (tmp_path / 'gated').rglob('scalars.json') for line in path.open()]
    steps = sorted(line['step'] for line in lines if 'loss' in line)
    assert steps == [1, 2, 3, 4, 5, 5, 6]  # the checkpoint was of the fourth


def test_a_teacher_teaches():
    """The losses on the labels get what the divergence from the teacher leaves."""
    teacher, model = (segmentor(backbone_config(gated=False)) for _ in range(2))
    with torch.no_grad():
        model.decode_head.conv_seg.weight.mul_(0.5)
    items = [loader()['dataset'][i] for i in range(2)]
    batch = {key: [item[key] for item in items] for key in ('inputs', 'data_samples')}
    data = model.data_preprocessor(batch, True)
    plain = model.train()(**data, mode='loss')['decode.loss_ce'].item()
    compress_hook.Teacher(teacher, 0.25, 4.0, hint=2.0).teach(model)
    losses = model(**data, mode='loss')
    assert losses['decode.loss_ce'].item() == pytest.approx(0.75 * plain, rel=1e-4)
    with torch.no_grad():
        wanted, found = (network(data['inputs']) / 4 for network in (teacher.eval(), model))
    divergence = (wanted.softmax(1) * (wanted.log_softmax(1) - found.log_softmax(1))).sum(1).mean()
    assert losses['loss_distill'].item() == pytest.approx(0.25 * 16 * divergence.item(), rel=1e-3)
    stages = [
        network.backbone.forward_intermediates(data['inputs'], intermediates_only=True) for network in (model, teacher)
    ]
    errors = [(s - t).square().mean() / t.square().mean() for s, t in zip(*stages, strict=True)]
    assert losses['loss_hint'].item() == pytest.approx(2 * sum(errors).item(), rel=0.01)
    losses['loss_distill'].backward()
    assert model.decode_head.conv_seg.weight.grad.abs().sum() > 0
    assert teacher.decode_head.conv_seg.weight.grad is None


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        (['--macs', 0.01], 'A budget of 0.01 cannot be reached'),
        (['--stage2', 2], '--stage2 must be a fraction'),
        (['--launcher', 'pytorch'], 'one process'),
        (['--checkpoint', 'none.pth'], 'no checkpoint none.pth'),
        (['--cfg-options', 'model.backbone.type=mmseg.ResNet'], 'backbone ResNet has no gated twin'),
        (['--cfg-options', 'model.backbone.depth=34'], 'no checkpoint of the dense'),
    ],
)
def test_refused_before_any_work(config, dense, tmp_path, capsys, more, words):
    with pytest.raises(SystemExit):
        run(config, dense, tmp_path / 'out', *more)
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_the_help_of_segmentors(capsys):
    with pytest.raises(SystemExit):
        compress.main(['resnet18_camvid', '--help'])
    out = capsys.readouterr().out
    assert 'trained segmentor cheaper' in out
    assert '--cfg-options' in out
    assert compress_segmentor.BASELINES == ('dense',)
