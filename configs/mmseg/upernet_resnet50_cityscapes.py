_base_ = [
    './_base_/models/upernet_resnet50.py',
    './_base_/datasets/cityscapes_832x832.py',
    './_base_/schedules/schedule_80k.py',
    './_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size))
