# DRN-A-50 without gates, from ImageNet weights.
_base_ = './segmentor.py'
model = dict(
    backbone=dict(
        type='DeepMoEDRN',
        depth=50,
        gated=False,
        out_indices=(0, 1, 2, 3),
        norm_cfg=_base_.norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    )
)
