"""The loss hook in mmengine's own Runner: J against a hand-written one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip('mmseg')

from mmengine.model import BaseModel
from runs_of_hooks import (
    LAMBDA,
    LOSS,
    MU,
    SPARSE,
    STATISTICS,
    WEIGHTS,
    Watch,
    assert_same,
    dense,
    finetune,
    gradient_of_j,
    hand_written_j,
)
from small_networks import images, randomise, small
from small_segmentors import CLASSES, backbone_config, loader, make_runner, segmentor

from deepmoe_plugin.mmseg.hooks.loss_hook import class_presence

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


def test_a_network_of_timm_in_mmsegs_own_backbone(tmp_path: Path) -> None:
    backbone = dict(
        type='TIMMBackbone',
        model_name='wide_deepmoe_resnet18',
        pretrained=False,
        features_only=True,
        out_indices=(1, 2, 3, 4),
        layers=(1, 1, 1, 1),
        gate_loss_weight=LAMBDA,
    )
    model, watch = segmentor(backbone), Watch()
    runner = make_runner(model, tmp_path, watch, LOSS, iters=1)
    runner.train()
    assert runner.message_hub.get_scalar('train/loss_gate').current() > 0
    gates = next(grad for name, grad in watch.grads[0].items() if name.endswith('gates.weight'))
    assert gates.abs().sum() > 0


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
