# From random weights, within half an hour on one processor core.
_base_ = './schedule_80k.py'
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=50, end=1000, by_epoch=False),
]
train_cfg = dict(max_iters=1000, val_interval=250)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=250))
