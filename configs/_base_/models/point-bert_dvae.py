# Point-BERT's tokenizer at its official size: 64 groups of 32 points, a vocabulary of 8,192 codes of 256; 27.6 M
# parameters. The hook has the published schedules, in optimizer steps whatever the length of the run; the dictionaries
# of a leaf config change them (see DVAEScheduleHook).
model = dict(
    type='DiscreteVAE',
    data_preprocessor=dict(type='Preprocessor'),
    num_groups=64,
    group_size=32,
    skip_origin=True,
    encoder_dim=256,
    num_tokens=8192,
    token_dim=256,
    decoder_dim=256)
dvae_hook = dict(
    type='DVAEScheduleHook',
    temperature=dict(start=1.0, target=0.0625, length=100_000),
    kl_weight=dict(start=0.0, target=0.1, begin=10_000, length=100_000))
