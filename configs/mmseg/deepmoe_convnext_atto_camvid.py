_base_ = './convnext_atto_camvid.py'
model = dict(backbone=dict(gated=True, target_kept=0.5))
custom_hooks = [*_base_.custom_hooks, dict(type='DeepMoELossHook')]
