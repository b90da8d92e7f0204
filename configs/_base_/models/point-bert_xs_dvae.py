# A tokenizer that trains on one CPU core: 32 groups of 16 points, 512 codes of 96, a narrow mini-PointNet (that of
# point-bert_xs_pretrain.py) and narrow graph networks. In a run of thousands of steps instead of 200,000 the published
# schedule leaves the scores flat; here they start spread out, and a small weight keeps the codes in use all the time.
model = dict(
    type='DiscreteVAE',
    data_preprocessor=dict(type='Preprocessor'),
    num_groups=32,
    group_size=16,
    encoder_dim=96,
    num_tokens=512,
    token_dim=96,
    decoder_dim=96,
    encoder_widths=(32, 64, 128),
    graph_widths=(64, 64, 96, 96, 128),
    decoder_widths=(256, 64))
dvae_hook = dict(
    type='DVAEScheduleHook',
    temperature=dict(start=1.0, target=0.0625, length=0.5),
    kl_weight=dict(start=0.01, target=0.01, length=0.5),
    score_spread=3.0)
