_base_ = './upernet_convnext_tiny_cityscapes.py'
model = dict(backbone=dict(gated=True, target_kept=0.5))
custom_hooks = [*_base_.custom_hooks, dict(type='DeepMoELossHook')]
