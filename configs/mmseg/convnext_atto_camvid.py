# A small ConvNeXt from random weights: its features, brought to the size of the first, then 1x1 convolutions.
_base_ = './resnet18_camvid.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DeepMoEConvNeXt',
        arch='atto',
        gated=False,
        out_indices=(0, 1, 2, 3),
        layer_scale_init_value=1.0,
    ),
    decode_head=dict(in_channels=[40, 80, 160, 320]),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'gating.gates': dict(decay_mult=0.0), 'gamma': dict(decay_mult=0.0)},
    ),
)
