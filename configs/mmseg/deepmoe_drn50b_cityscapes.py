# Bottleneck B (Fig. 2c). No published weights have this shape: give your own as model.backbone.init_cfg.
_base_ = './deepmoe_drn50_cityscapes.py'
model = dict(backbone=dict(bottleneck='B', init_cfg=None))
