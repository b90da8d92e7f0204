# What every run shares: scope, hooks, logging, seed.
default_scope = 'ewa3d'
randomness = dict(seed=0)
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    finite=dict(type='FiniteHook', action='raise'),
    metrics=dict(type='MetricsHook', on_error='raise'),
)
log_level = 'INFO'
load_from = None
resume = False
