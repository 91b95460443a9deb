_base_ = './drn50_camvid.py'
model = dict(backbone=dict(widen=2, init_cfg=dict(checkpoint='torchvision://wide_resnet50_2')))
