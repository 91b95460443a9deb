_base_ = './wide_resnet18_camvid.py'
model = dict(backbone=dict(depth=34))
