_base_ = './resnet18_camvid.py'
model = dict(backbone=dict(widen=2))
