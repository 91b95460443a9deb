# DRN-A-50, the baseline of Table 5.
_base_ = [
    './_base_/models/fcn_drn50.py',
    './_base_/datasets/cityscapes_832x832.py',
    './_base_/schedules/schedule_250e.py',
    './_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size))
