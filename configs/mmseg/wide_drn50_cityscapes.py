# Wide-DRN-A-50, the wide baseline of Table 5.
_base_ = './drn50_cityscapes.py'
model = dict(backbone=dict(widen=2, init_cfg=dict(checkpoint='torchvision://wide_resnet50_2')))
