# Gates in DRN-A-50's own widths.
_base_ = './drn50_cityscapes.py'
# The budget falls during the first fifth of the training, here on 8 GPUs (186 steps an epoch).
model = dict(backbone=dict(gated=True, target_kept=0.7, target_steps=9000))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='DeepMoELossHook'),
    dict(type='DeepMoEFinetuneHook', begin=225, by_epoch=True),
]
