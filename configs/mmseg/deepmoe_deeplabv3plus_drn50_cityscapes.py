_base_ = './deeplabv3plus_drn50_cityscapes.py'
model = dict(
    backbone=dict(
        gated=True,
        widen=2,
        target_kept=0.5,
        target_steps=16000,  # a fifth of the training; in the rest, the network trains at its final budget
        init_cfg=dict(checkpoint='torchvision://wide_resnet50_2'),
    )
)
custom_hooks = [*_base_.custom_hooks, dict(type='DeepMoELossHook')]
