# Overlay: a moving average of the whole model, BatchNorm statistics included. The first 500 steps weigh alike (a plain
# mean); a fixed momentum from the first step on would keep some of the initial statistics for thousands of steps.
ema_hook = dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.002, gamma=1, update_buffers=True)
