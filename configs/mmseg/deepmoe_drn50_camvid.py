_base_ = ['./wide_drn50_camvid.py', './_base_/deepmoe.py']
model = dict(backbone=dict(gated=True, target_kept=0.5))
