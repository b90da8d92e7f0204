"""torch.compile with its real backend: the gradients of a whole model under bf16 autocast are those of eager mode.

The other compile tests use backends that do not generate code and cannot show what recomputation in a fused backward
does to a comparison of rounded values.
"""
import shutil

import pytest
import torch
import torch.nn.functional as F

from ewa3d import expand
from ewa3d.registry import MODELS

CONFIG = dict(
    type='TaskModel',
    backbone=dict(type='TokenEncoder', embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.,
                  tokenizer=dict(type='PointPatchEmbed', num_groups=8, group_size=4, embed_dim=16, widths=(8, 8, 16))),
    neck=dict(type='TokenPool', mode='cls+max'),
    head=dict(type='ClsHead', form='linear', num_classes=4, dropout=0.),
    expand=[dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=2, num_experts=2)])


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler, and there is no g++')
def test_compiled_training_step_has_the_gradients_of_eager_mode():
    model = MODELS.build(CONFIG).train()
    points, labels = torch.randn(6, 64, 3), torch.arange(6) % 4

    def gradients(extract):
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast('cpu', torch.bfloat16):
            logits = model.head(extract(points))
        F.cross_entropy(logits.float(), labels).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    eager, compiled = gradients(model.extract), gradients(torch.compile(model.extract))
    assert torch.isfinite(compiled).all()
    assert F.cosine_similarity(eager, compiled, dim=0) > 0.95
    assert torch.isclose(eager.norm(), compiled.norm(), rtol=0.1)


@pytest.mark.parametrize('checkpointing', [False, True], ids=['', 'checkpointing'])
@pytest.mark.parametrize('experts', [0, 3], ids=['plain', 'EWA'])
def test_blocks_are_one_graph_with_the_randomness_of_eager_mode(experts, checkpointing):
    """``fullgraph``: a break would be an error. Outputs, gradients and the generator's state, bit for bit."""
    encoder = MODELS.build(dict(CONFIG['backbone'], depth=1, drop_path_rate=0.4, proj_drop=0.2,
                                grad_checkpointing=checkpointing))
    if experts:
        expand(encoder, [dict(type='EWAFFN', at='blocks.*.mlp', num_experts=experts)])
    x, pos = torch.randn(5, 8, 16), torch.randn(5, 8, 16)
    compiled = torch.compile(encoder.encode, backend='aot_eager', fullgraph=True)
    for training in (True, False):
        found = []
        for encode in (encoder.train(training).encode, compiled):
            encoder.zero_grad()
            torch.manual_seed(1)
            out = encode(x, pos)
            out.square().mean().backward()
            found.append([out, *(p.grad for p in encoder.blocks.parameters()), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*found))
