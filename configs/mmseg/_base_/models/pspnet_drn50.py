_base_ = './drn50_aux.py'
model = dict(decode_head=dict(type='PSPHead', in_channels=2048, in_index=3, channels=512, pool_scales=(1, 2, 3, 6)))
