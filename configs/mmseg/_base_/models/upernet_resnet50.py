# UPerNet fuses all strides from 4 to 32: the network is not dilated.
_base_ = './drn50_aux.py'
model = dict(
    backbone=dict(type='DeepMoEResNet'),
    decode_head=dict(
        type='UPerHead',
        in_channels=[256, 512, 1024, 2048],
        in_index=[0, 1, 2, 3],
        channels=512,
        pool_scales=(1, 2, 3, 6),
    ),
)
