# What a gated network needs besides its backbone: J (Eq. 7) as its loss, and its kept experts and MACs in the log.
custom_hooks = [dict(type='DeepMoELossHook'), dict(type='GateStatisticsHook')]
