_base_ = [
    './_base_/models/fcn_resnet18.py',
    './_base_/datasets/street_scenes_112x112.py',
    './_base_/schedules/schedule_1k.py',
    './_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size))
