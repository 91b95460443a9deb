# DRN-A-50 with a second head on its third stage, in training only, as DeepLabV3+, PSPNet and UPerNet have it in mmseg.
_base_ = './drn50.py'
model = dict(
    auxiliary_head=dict(
        _base_.model.decode_head,
        type='FCNHead',
        in_channels=1024,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        loss_decode=dict(_base_.model.decode_head.loss_decode, loss_weight=0.4),
    )
)
