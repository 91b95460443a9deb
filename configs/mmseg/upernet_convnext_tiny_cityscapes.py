_base_ = [
    './_base_/models/upernet_convnext_tiny.py',
    './_base_/datasets/cityscapes_832x832.py',
    './_base_/schedules/schedule_160k_adamw.py',
    './_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size))
