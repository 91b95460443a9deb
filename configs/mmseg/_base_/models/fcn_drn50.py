# Section 5.4, as DRN does it: a 1x1 convolution classifies, bilinear interpolation enlarges its output 8 times.
_base_ = './drn50.py'
model = dict(
    decode_head=dict(
        type='FCNHead',
        in_channels=2048,
        in_index=3,
        channels=2048,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
    )
)
