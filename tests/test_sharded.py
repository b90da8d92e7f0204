"""``fully_shard`` as docs/scaling.md has it: experts sharded along their width are averaged as in one process."""
from test_ddp import two_ranks

RANK = """
import torch, ewa3d
from ewa3d.layers.block import Block
from ewa3d.layers.stacked import iter_experts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(8, 2), Block(8, 2), torch.nn.Linear(8, 4))
    ewa3d.expand(model, [dict(type='EWAFFN', at='*.mlp', num_experts=4, init_noise_std=0.1)])
    return model

def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ewa3d.attach_ewa(optimizer, model, share_rate=0.3, schedule='constant')
    for step in range(3):
        torch.manual_seed(step)
        model(points).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model

def shard(model, place):
    for block in model[:2]:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)

torch.distributed.init_process_group('gloo')
mesh, points = init_device_mesh('cpu', (2,)), torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3))
model = make()
experts = {id(p) for _, module in iter_experts(model) for p in module.expert_parameters()}
train(shard(model, lambda p: Shard(1) if id(p) in experts else Shard(0)))
expected = train(make()).state_dict()
for name, value in model.state_dict().items():
    torch.testing.assert_close(value.full_tensor(), expected[name], msg=name)
try:
    train(shard(make(), lambda p: Shard(0)))
except ValueError as error:
    assert 'sharded along its expert dimension' in str(error), error
else:
    raise AssertionError('experts sharded along dimension 0 were averaged')
torch.distributed.destroy_process_group()
"""


def test_sharded_experts_are_averaged_as_in_one_process():
    two_ranks('-c', RANK)
