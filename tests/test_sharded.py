"""``fully_shard`` as docs/scaling.md has it: whichever dimension it splits, training is that of one process."""
import pytest
import torch
from engine_toys import same
from ranks import run_ranks
from torch import nn

import ewa3d
from ewa3d.engine.averaging import expert_spread
from ewa3d.engine.checkpoint import load_model_state, read_checkpoint, write_checkpoint
from ewa3d.layers.block import Block
from ewa3d.layers.experts import iter_experts

STEPS = 3


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(8, 2), Block(8, 2), nn.Linear(8, 4))


def expanded(num_experts: int = 3) -> nn.Module:
    model = plain()
    ewa3d.expand(model, [dict(type='EWAFFN', at='*.mlp', num_experts=num_experts, init_noise_std=0.1)])
    return model


def train(model: nn.Module) -> nn.Module:
    points = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ewa3d.attach_ewa(optimizer, model, share_rate=0.3, schedule='constant', average_moments=True)
    for step in range(STEPS):
        torch.manual_seed(step)  # all ranks have the same batch and partition, as the one process
        model(points).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def sharded(model: nn.Module, mesh, dim: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    experts = {id(p) for _, module in iter_experts(model) for p in module.expert_parameters()}

    def place(parameter):
        return Shard(min(dim, parameter.ndim - 1)) if id(parameter) in experts else Shard(0)

    for block in model[:2]:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)


def shard_and_train(rank: int, folder: str) -> list:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    flat, square = init_device_mesh('cpu', (4,)), init_device_mesh('cpu', (2, 2), mesh_dim_names=('copies', 'shards'))
    results = []
    # 3 experts on 4 ranks: one of them has none; and shards within a pair of ranks, copies between pairs
    for mesh, dim in ((flat, 0), (flat, 1), (square, 0), (flat, 2)):
        model = train(sharded(expanded(), mesh, dim))
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        results.append(dict(spread=expert_spread(model), copy=[p.to_local().clone() for p in model.parameters()]))
        if rank == 0:
            write_checkpoint(f'{folder}/{len(results)}.pth', state)
    with pytest.raises(ValueError, match=r'fuse\(\) needs .* whole, and 0\.norm1\.weight is a DTensor.*full_state_'):
        ewa3d.fuse(model)
    with pytest.raises(ValueError, match=r'expand\(\) needs .* whole.*expand first'):
        ewa3d.expand(model, [dict(type='EWAFFN', at='*.mlp')])
    inner = expanded()
    fully_shard(inner[0].mlp.fc1, mesh=flat)
    with pytest.raises(ValueError, match=r"fully_shard was called on 0\.mlp\.fc1, a part of '0\.mlp'"):
        ewa3d.attach_ewa(torch.optim.SGD(inner.parameters(), lr=0.1), inner, schedule='constant')
    with pytest.raises(TypeError, match=r'state_dict\.0\.norm1\.weight is a DTensor.*full_state_dict'):
        write_checkpoint(f'{folder}/parts.pth', model.state_dict())
    return results


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    return folder, run_ranks(shard_and_train, 4, str(folder))


@pytest.mark.parametrize('case', [1, 2, 3, 4], ids=['experts', 'widths', 'copies of shards', 'inputs'])
def test_sharded_training_is_that_of_one_process(runs, case):
    folder, ranks = runs
    expected = train(expanded())
    state = read_checkpoint(folder / f'{case}.pth')['state_dict']
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)
    spread = expert_spread(expected)
    for rank in ranks:
        assert rank[case - 1]['spread'] == pytest.approx(spread, rel=1e-4)
    for one, other in ((0, 2), (1, 3)):  # copies of the same shard, bit for bit
        assert case != 3 or same(ranks[one][2]['copy'], ranks[other][2]['copy'])


def test_a_gathered_checkpoint_fuses(runs):
    model, fused = expanded(), plain()
    load_model_state(model, read_checkpoint(runs[0] / '1.pth')['state_dict'])
    x = torch.randn(2, 5, 8)
    expected = model.eval()(x)
    ewa3d.fuse(model)
    fused.load_state_dict(model.state_dict())  # the plain layout
    torch.testing.assert_close(fused.eval()(x), expected)

