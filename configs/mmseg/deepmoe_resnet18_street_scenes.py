_base_ = ['./resnet18_street_scenes.py', './_base_/deepmoe.py']
model = dict(backbone=dict(gated=True, target_kept=0.5))
