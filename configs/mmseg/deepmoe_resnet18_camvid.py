_base_ = ['./wide_resnet18_camvid.py', './_base_/deepmoe.py']
model = dict(backbone=dict(gated=True, target_kept=0.5, gate_loss_weight=1000.0))
