_base_ = './deepmoe_resnet18_camvid.py'
model = dict(backbone=dict(depth=34))
