"""Layer-wise learning rates are those that mmseg gives to mmpretrain's ConvNeXt."""

import pytest

pytest.importorskip('mmseg')

from mmseg.registry import MODELS
from small_segmentors import TYPES, segmentor, segmentor_config


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_layer_wise_learning_rates_are_those_of_mmpretrains_convnext(decay_type):
    from mmengine.optim import build_optim_wrapper

    model = MODELS.build(segmentor_config({**TYPES['convnext'], 'arch': 'atto', 'linear_pw_conv': True}))
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            constructor='DeepMoELearningRateDecay',
            paramwise_cfg=dict(decay_rate=0.9, decay_type=decay_type, num_layers=6),
        ),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(p)].removeprefix('backbone.'): g for g in wrapper.optimizer.param_groups for p in g['params']}
    assert len(groups) == len(names) == sum(len(group['params']) for group in wrapper.optimizer.param_groups)
    stage_wise = decay_type == 'stage_wise'
    depths = {
        'stem.0.weight': 0,
        'stages.0.blocks.0.mlp.fc1.weight': 1,
        'stages.3.blocks.0.gamma': 4 if stage_wise else 6,
    }
    depths.update({'stages.1.downsample.1.weight': 0 if stage_wise else 2, 'decode_head.conv_seg.weight': 7})
    for name, depth in depths.items():
        assert groups[name]['lr'] == pytest.approx(0.9 ** (7 - depth)), name
    assert groups['gating.gates.weight']['lr'] == 1
    assert groups['gating.gates.weight']['weight_decay'] == groups['stages.0.blocks.0.gamma']['weight_decay'] == 0
    assert groups['stem.0.weight']['weight_decay'] == groups['gating.embedding.mixture.weight']['weight_decay'] == 0.05


def test_layer_wise_learning_rates_are_for_convnexts():
    from mmengine.optim import build_optim_wrapper

    config = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0), constructor='DeepMoELearningRateDecay')
    with pytest.raises(ValueError, match='DeepMoEConvNeXt'):
        build_optim_wrapper(segmentor(), {**config, 'paramwise_cfg': dict(num_layers=6, decay_rate=0.9)})
