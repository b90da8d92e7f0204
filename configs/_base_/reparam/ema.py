# Overlay: an exponential moving average of the whole model, BatchNorm statistics included.
ema_hook = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.002, update_buffers=True)
