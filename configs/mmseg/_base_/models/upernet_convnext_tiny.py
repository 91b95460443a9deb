# As mmseg's UPerNet on mmpretrain's ConvNeXt, which starts from the weights of ConvNeXt's authors.
_base_ = './segmentor.py'
model = dict(
    backbone=dict(
        type='DeepMoEConvNeXt',
        arch='tiny',
        gated=False,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224_ema.pth',
        ),
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[96, 192, 384, 768],
        in_index=[0, 1, 2, 3],
        channels=512,
        pool_scales=(1, 2, 3, 6),
    ),
    auxiliary_head=dict(
        _base_.model.decode_head,
        type='FCNHead',
        in_channels=384,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        loss_decode=dict(_base_.model.decode_head.loss_decode, loss_weight=0.4),
    ),
)
