# Gates in DRN-A-50's own widths.
_base_ = './drn50_cityscapes.py'
model = dict(backbone=dict(gated=True, target_kept=0.7))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='DeepMoELossHook'),
    dict(type='DeepMoEFinetuneHook', begin=225, by_epoch=True),
]
