# Strides 4 to 32: the features of all stages, brought to the size of the first, then 1x1 convolutions.
_base_ = './segmentor.py'
model = dict(
    backbone=dict(type='DeepMoEResNet', depth=18, gated=False, out_indices=(0, 1, 2, 3), norm_cfg=_base_.norm_cfg),
    decode_head=dict(
        type='FCNHead',
        in_channels=[64, 128, 256, 512],
        in_index=[0, 1, 2, 3],
        input_transform='resize_concat',
        channels=128,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
    ),
)
