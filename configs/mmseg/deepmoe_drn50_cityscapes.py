# Wide-DeepMoE-50-A on DRN-A-50 (Table 5). Half of the experts cost 705 GMACs without shortcut convolutions, as much as
# DRN-A-50; the 804 of the table are target_macs=0.396.
_base_ = './wide_drn50_cityscapes.py'
# The budget falls during the first fifth of the training, here on 8 GPUs (186 steps an epoch).
model = dict(backbone=dict(gated=True, target_kept=0.5, target_steps=9000))
# Stage 2 (Procedure 1) when the gates have settled at the lower learning rate.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='DeepMoELossHook'),
    dict(type='DeepMoEFinetuneHook', begin=225, by_epoch=True),
]
