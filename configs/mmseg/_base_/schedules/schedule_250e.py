# Section 5.4: 5e-4, a tenth of it after 200 epochs. The paper does not say when training ends.
_base_ = './sgd.py'
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=1e-4))
param_scheduler = [dict(type='MultiStepLR', milestones=[200], gamma=0.1, by_epoch=True)]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=250, val_interval=10)
log_processor = dict(by_epoch=True)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=10))
