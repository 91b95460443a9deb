"""The hooks in mmengine's own Runner: J against a hand-written one, two stages, statistics, sparse validation."""

import contextlib
import copy
import itertools
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip('mmseg')

from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import CheckpointLoader
from small_networks import images, randomise, small
from small_segmentors import CLASSES, SIZE, backbone_config, loader, make_runner, segmentor

from deepmoe_plugin import count_macs, gate_statistics
from deepmoe_plugin.information import gate_entropy, use_entropy
from deepmoe_plugin.mmseg.hooks.loss_hook import class_presence
from deepmoe_plugin.sparse import SparseNetwork

LAMBDA, MU = 0.7, 0.3
LOSS = dict(type='DeepMoELossHook')
STATISTICS = dict(type='GateStatisticsHook')
SPARSE = dict(type='SparseInferenceHook')
WEIGHTS = dict(gate_loss_weight=LAMBDA, embed_loss_weight=MU, num_classes=CLASSES)
State = dict[str, Tensor]
load_checkpoint = CheckpointLoader.load_checkpoint


def finetune(begin: int, by_epoch: bool = True) -> dict[str, Any]:
    return dict(type='DeepMoEFinetuneHook', begin=begin, by_epoch=by_epoch)


class Watch(Hook):
    """Remembers the data of each iteration, the gradients of each step and the state before each iteration."""

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.grads: list[State] = []
        self.states: list[State] = []

    def before_train(self, runner: Any) -> None:
        def remember(*_: Any) -> None:
            named = runner.model.named_parameters()
            grads = {name.removeprefix('module.'): p.grad.clone() for name, p in named if p.grad is not None}
            self.grads.append(grads)

        runner.optim_wrapper.optimizer.register_step_pre_hook(remember)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(copy.deepcopy(data_batch))
        self.states.append(copy.deepcopy(runner.model.state_dict()))


class Kill(Hook):
    """Ends the process, as far as a test can, before an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """What AmpOptimWrapper does on an accelerator: forward pass and losses under autocast."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def hand_written_j(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J, and its terms L_b, L_g and L_e, in plain torch."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    gating = model.backbone.gating
    mixture = gating.embedding(data['inputs'])
    with torch.autocast('cpu', enabled=False):  # gates are float32 under mixed precision too
        gates = (mixture @ gating.gates.weight.t()).clamp(min=0)
    layers = list(gates.split(gating.gates.widths, dim=1))
    gating.forward = lambda _: layers
    base = model.loss(data['inputs'], data['data_samples'])['decode.loss_ce']
    del gating.forward
    shown = torch.zeros(len(gates), CLASSES)
    for i, sample in enumerate(data['data_samples']):
        for label in sample.gt_sem_seg.data.unique().tolist():
            if label != 255:
                shown[i, label] = 1
    embed = F.binary_cross_entropy_with_logits(gating.class_scores(mixture * mixture.shape[1]), shown)
    return base + LAMBDA * gates.mean() + MU * embed, base, gates.mean(), embed


def gradient_of_j(model: nn.Module, batches: list[Any]) -> State:
    """Gradient of the mean of J over the batches."""
    model = model.train()
    (sum(hand_written_j(model, batch)[0] for batch in batches) / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(grads: State, expected: State, tolerance: float = 1e-4) -> None:
    assert grads.keys() == expected.keys()
    assert any('gating.gates' in name for name in grads)
    for name, grad in grads.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(grad, expected[name], rtol=tolerance, atol=tolerance * max(scale, 1e-3), msg=name)
        assert scale > 0, name


CASES: dict[str, dict[str, Any]] = {
    'iterations': dict(iters=1),
    'epochs': dict(epochs=1),
    'accumulation': dict(iters=2, optim=dict(accumulative_counts=2)),
    'statistics too': dict(iters=1, hooks=[STATISTICS]),
    'checkpointing': dict(iters=1, with_cp=True),
}


@pytest.mark.parametrize('case', CASES)
def test_training_optimises_j(case: str, tmp_path: Path) -> None:
    config = dict(CASES[case])
    model = segmentor(backbone_config(**WEIGHTS, with_cp=config.pop('with_cp', False)))
    twin, watch = copy.deepcopy(model), Watch()
    make_runner(model, tmp_path, watch, LOSS, *config.pop('hooks', []), **config).train()
    counts = config.get('optim', {}).get('accumulative_counts', 1)
    assert_same(watch.grads[0], gradient_of_j(twin, watch.batches[:counts]))


def test_terms_in_the_log(tmp_path: Path) -> None:
    model = segmentor(backbone_config(**WEIGHTS))
    twin, watch = copy.deepcopy(model).train(), Watch()
    runner = make_runner(model, tmp_path, watch, LOSS, iters=1)
    runner.train()
    j, base, mean_gate, embed = hand_written_j(twin, watch.batches[0])
    expected = {'loss': j, 'loss_gate': LAMBDA * mean_gate, 'loss_embed': MU * embed, 'decode.loss_ce': base}
    logged = {name: runner.message_hub.get_scalar(f'train/{name}').current() for name in expected}
    assert logged == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
    assert 0 < runner.message_hub.get_scalar('train/kept_experts').current() < 1


def test_without_the_embedding_loss_nothing_of_it_is_there(tmp_path: Path) -> None:
    model = segmentor(backbone_config())
    runner = make_runner(model, tmp_path, LOSS, iters=1)
    runner.train()
    assert 'train/loss_gate' in runner.message_hub.log_scalars
    assert 'train/loss_embed' not in runner.message_hub.log_scalars


def test_mixed_precision(tmp_path: Path) -> None:
    model = segmentor(backbone_config(**WEIGHTS))
    twin, watch = copy.deepcopy(model), Watch()
    make_runner(model, tmp_path, watch, LOSS, iters=1, optim=dict(type='CpuAmpOptimWrapper')).train()
    with torch.autocast('cpu', torch.bfloat16):
        expected = gradient_of_j(twin, watch.batches)
    assert_same(watch.grads[0], expected, tolerance=0.02)
    plain = gradient_of_j(copy.deepcopy(segmentor(backbone_config(**WEIGHTS))), watch.batches)
    name = 'backbone.gating.gates.weight'
    assert not torch.equal(watch.grads[0][name], plain[name])
    cosine = F.cosine_similarity(watch.grads[0][name].flatten(), plain[name].flatten(), dim=0)
    assert cosine > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_amp_on_a_gpu(dtype: str, tmp_path: Path) -> None:
    model = segmentor(backbone_config(**WEIGHTS))
    watch = Watch()
    amp = dict(type='AmpOptimWrapper', dtype=dtype, loss_scale=8.0)
    make_runner(model, tmp_path, watch, LOSS, iters=3, optim=amp).train()
    twin = segmentor(backbone_config(**WEIGHTS)).cuda()
    expected = gradient_of_j(twin, watch.batches[:1])
    for name in ('backbone.gating.gates.weight', 'backbone.gating.embedding.mixture.weight'):
        cosine = F.cosine_similarity(watch.grads[0][name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.95, name
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_training(tmp_path: Path) -> None:
    """`Runner(compile=True)`: the hook is there before the first compiled call."""
    states, logs = [], []
    for compiled in (False, True):
        head = dict(type='FCNHead', in_channels=64, in_index=0, channels=8, num_convs=1, dropout_ratio=0.0)
        model = segmentor(backbone_config(**WEIGHTS, gate_norm='macs', out_indices=(0,)), head=head)
        runner = make_runner(
            model, tmp_path / str(compiled), LOSS, STATISTICS, finetune(2, False), iters=3, cfg=dict(compile=compiled)
        )
        runner.train()
        states.append(model.state_dict())
        histories = runner.message_hub.log_scalars
        logs.append([histories[f'train/{key}'].data[0] for key in ('loss_gate', 'loss_embed', 'kept_experts', 'gmacs')])
        assert len(histories['train/loss_gate'].data[0]) == 2
        assert len(histories['train/gmacs'].data[0]) == 3
    torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-4)
    for compiled, plain in zip(logs[1], logs[0], strict=True):
        assert list(compiled) == pytest.approx(list(plain), rel=1e-2)


def test_classes_shown() -> None:
    sample = loader()['dataset'][3]['data_samples']
    other = loader()['dataset'][1]['data_samples']
    sample.gt_sem_seg.data.clamp_(1)  # ignored pixels are 255 and stay
    assert class_presence([sample, other], CLASSES, 255).tolist() == [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    sample.gt_sem_seg.data[0, 5] = 4
    assert class_presence([sample], CLASSES, 255).tolist() == [[0, 1, 1, 1, 1]]
    sample.gt_sem_seg.data.clamp_(max=4)
    assert class_presence([sample], CLASSES, 4).tolist() == [[0, 1, 1, 1, 0]]


def refused(match: str, tmp_path: Path, *hooks: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=match):
        make_runner(model or segmentor(), tmp_path, *hooks, **kwargs).train()


def dense() -> nn.Module:
    return segmentor(backbone_config(gated=False))


def test_mistakes_are_named(tmp_path: Path) -> None:
    for hook in (LOSS, finetune(0, False)):
        refused(rf'{hook["type"]} needs one DeepMoE network .*gated=True', tmp_path, hook, model=dense(), iters=1)
    wrong = segmentor(backbone_config(embed_loss_weight=1.0, num_classes=7))
    refused(r'num_classes=7 .* num_classes=5', tmp_path, LOSS, model=wrong, iters=1)
    refused(r'by_epoch=True never begins', tmp_path, finetune(0), iters=1)
    refused(r'begin=2 is not before the end of training, 2', tmp_path, finetune(2), epochs=2)
    refused(r'begin=4 is not before the end of training, 4', tmp_path, finetune(4, False), epochs=2)
    refused(r'begin must be a whole number', tmp_path, finetune(-1), epochs=2)
    plain = segmentor(dict(type='mmseg.ResNet', depth=18))
    refused(r'GateStatisticsHook needs one', tmp_path, STATISTICS, model=plain, iters=1)
    refused(r'SparseInferenceHook needs one', tmp_path, SPARSE, model=dense(), epochs=1, val=loader(1, 1))


def test_a_whole_backbone_without_gradients_is_refused(tmp_path: Path) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.backbone, x.requires_grad_(), use_reentrant=True)

    model = segmentor()
    model.backbone = Checkpointed(model.backbone)
    refused('with_cp=True', tmp_path, LOSS, model=model, iters=1)


@pytest.mark.parametrize(('decay', 'warned'), [(None, True), ({'gating.gates': dict(decay_mult=0.0)}, False)])
def test_weight_decay_of_the_heads_is_warned_of(decay: Any, warned: bool, tmp_path: Path) -> None:
    optim = {} if decay is None else dict(paramwise_cfg=dict(custom_keys=decay))
    runner = make_runner(segmentor(), tmp_path, LOSS, iters=1, optim=optim)
    runner.train()
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert ('Weight decay closes gates' in log) == warned


def test_copied_models_optimise_their_own_network(tmp_path: Path) -> None:
    model = segmentor(backbone_config(**WEIGHTS))
    for name in ('first', 'second'):  # a second run must not add the terms twice
        make_runner(model, tmp_path / name, LOSS, iters=1).train()
    twin = copy.deepcopy(model)
    items = [loader()['dataset'][i] for i in range(2)]
    batch = {key: [item[key] for item in items] for key in ('inputs', 'data_samples')}
    for own in (twin, model):
        own.train().zero_grad()
        data = own.data_preprocessor(copy.deepcopy(batch), True)
        own.parse_losses(own(**data, mode='loss'))[0].backward()
        grads = {name: parameter.grad for name, parameter in own.named_parameters()}
        reference = copy.deepcopy(own)
        reference.zero_grad()
        assert_same(grads, gradient_of_j(reference, [batch]))


class Classifier(BaseModel):
    """A model as other frameworks on mmengine have them, around a timm network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor, data_samples: Any, mode: str) -> Any:
        logits = self.network(inputs)
        return {'loss_ce': F.cross_entropy(logits, data_samples)} if mode == 'loss' else logits


class Digits(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Any]:
        return dict(inputs=images(1, seed=i)[0], data_samples=i)


def test_models_of_other_frameworks(tmp_path: Path) -> None:
    digits = {**loader(), 'dataset': Digits(), 'collate_fn': dict(type='default_collate')}
    digits['sampler'] = dict(type='DefaultSampler', shuffle=False)
    model = Classifier(small('cifar', gate_loss_weight=LAMBDA))
    model.init_weights()
    randomise(model.network)
    hooks = Watch(), LOSS, STATISTICS, finetune(1)
    runner = make_runner(model, tmp_path, *hooks, epochs=2, train_dataloader=digits)
    twin = copy.deepcopy(model)
    runner.train()
    gates = torch.cat(twin.network.train().gating(torch.cat([images(1, seed=i) for i in range(2)])), 1)
    histories = runner.message_hub.log_scalars
    assert len(histories['train/loss_gate'].data[0]) == 2
    assert histories['train/loss_gate'].data[0][0] == pytest.approx(LAMBDA * gates.mean().item(), rel=1e-4)
    assert len(histories['train/gmacs'].data[0]) == len(histories['train/kept_experts'].data[0]) == 4
    unclear = Classifier(randomise(small('cifar', embed_loss_weight=MU)))
    refused('gt_sem_seg', tmp_path, LOSS, model=unclear, epochs=1, train_dataloader=digits)


GATING = 'backbone.gating.'


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


def cost(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """GMACs and kept experts of each image."""
    backbone = model.backbone
    return count_macs(backbone, images).total.double() / 1e9, gate_statistics(backbone, images).by_image()


def normalised(model: nn.Module, item: Any) -> Tensor:
    return model.data_preprocessor(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]))['inputs']


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


# Two processes.

SHARED: dict[str, Any] = dict(cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)))


def two_process_runs(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """What each process does: J's gradient, stage 2 halfway, statistics of a validation."""
    results: dict[str, Any] = {}
    for name, accumulative_counts in (('one', 1), ('accumulated', 2)):
        model = segmentor(backbone_config(**WEIGHTS))
        twin, watch = copy.deepcopy(model), Watch()
        optim = dict(accumulative_counts=accumulative_counts)
        make_runner(model, folder / name, watch, LOSS, iters=2, optim=optim, **kwargs).train()
        expected = gradient_of_j(twin, watch.batches[:accumulative_counts])
        results[name] = (watch.grads[0], expected, watch.states[-1])
    model, watch = segmentor(backbone_config(**WEIGHTS)), Watch()
    runner = make_runner(
        model, folder / 'stages', watch, LOSS, STATISTICS, finetune(1), epochs=3, val=loader(4, 1), **kwargs
    )
    runner.train()
    states = [{key.removeprefix('module.'): value for key, value in state.items()} for state in watch.states]
    results['stages'] = [*states, model.state_dict()]
    last = (runner.message_hub.get_scalar(f'val/{name}').current() for name in ('gmacs', 'kept_experts'))
    results['metrics'] = [float(value) for value in last]
    return results


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    results = two_process_runs(Path(folder), launcher='pytorch', **SHARED)
    torch.save(results, f'{folder}/rank{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp('ddp')
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f'rank{rank}.pt', weights_only=True) for rank in range(2)]


@pytest.mark.parametrize('case', ['one', 'accumulated'])
def test_two_processes_optimise_j(ranks: list[dict[str, Any]], case: str) -> None:
    (grads, first, _), (others, second, _) = (rank[case] for rank in ranks)
    assert not torch.equal(first['backbone.gating.gates.weight'], second['backbone.gating.gates.weight'])
    assert_same(grads, {name: (first[name] + second[name]) / 2 for name in first})
    for name, grad in grads.items():
        assert torch.equal(grad, others[name])


def test_two_processes_reach_stage_two_together(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank['stages'] for rank in ranks)
    heads = GATING + 'gates.weight'
    assert len(first) == 4  # one iteration an epoch
    assert not torch.equal(first[0][heads], first[1][heads])
    for i in (2, 3):
        assert torch.equal(first[i][heads], first[1][heads])
        weight = 'backbone.layer1.0.conv1.weight'
        assert not torch.equal(first[i][weight], first[i - 1][weight])
        assert torch.equal(first[i][weight], second[i][weight])


def test_two_processes_count_all_images(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]['metrics'] == ranks[1]['metrics']
    model = segmentor(backbone_config(**WEIGHTS))
    model.load_state_dict(ranks[0]['stages'][-1])
    dataset = loader(4, 1)['dataset']
    costs = [cost(model, normalised(model, dataset[i])) for i in range(4)]
    gmacs, kept = (torch.cat(values).double().mean().item() for values in zip(*costs, strict=True))
    # Norm statistics of the base network differ between processes; those of the gating network are frozen.
    assert ranks[0]['metrics'][0] == pytest.approx(gmacs, rel=0.05)
    assert ranks[0]['metrics'][1] == pytest.approx(kept, rel=0.05)
