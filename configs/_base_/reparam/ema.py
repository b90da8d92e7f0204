# Overlay: an exponential moving average of the parameters. BatchNorm statistics are the current ones: averaged over
# hundreds of steps, those of early training linger, and where a variance is small they are far too large.
ema_hook = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.002)
