_base_ = [
    './_base_/models/fcn_drn50.py',
    './_base_/datasets/camvid_480x480.py',
    './_base_/schedules/schedule_10k.py',
    './_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size), decode_head=dict(num_classes=11))
