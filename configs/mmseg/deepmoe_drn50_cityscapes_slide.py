# Tested in overlapping windows of the training size, each with gates of its own, instead of the whole image at once.
_base_ = './deepmoe_drn50_cityscapes.py'
model = dict(test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(555, 555)))
