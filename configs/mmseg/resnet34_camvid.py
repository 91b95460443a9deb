_base_ = './resnet18_camvid.py'
model = dict(backbone=dict(depth=34))
