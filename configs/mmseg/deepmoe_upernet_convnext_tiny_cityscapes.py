_base_ = './upernet_convnext_tiny_cityscapes.py'
# The budget falls during the first fifth of the training; in the rest, the network trains at its final budget.
model = dict(backbone=dict(gated=True, target_kept=0.5, target_steps=32000))
custom_hooks = [*_base_.custom_hooks, dict(type='DeepMoELossHook')]
