"""Two ranks: experts that no token chose do not hang or stale DDP, and the gradients are the mean of both ranks'."""
import copy
import os

import torch
import torch.distributed as dist
from test_moe import batch, task_model
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = task_model(dict(type='MoEFFN', num_experts=6, top_k=1)).train()
    with torch.no_grad():  # nearly all tokens go to one expert
        for name, parameter in model.named_parameters():
            if name.endswith('router.weight'):
                parameter[1:] = parameter[:1] - 1e-3
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(rank)
    data = model.data_preprocessor(batch(), True)
    for _ in range(2):  # a parameter without gradient in the first step would fail in the second
        wrapped.zero_grad()
        losses = wrapped(**data, mode='loss')
        sum(v for k, v in losses.items() if 'loss' in k).backward()
    losses = alone(**data, mode='loss')
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    for (name, own), (_, other) in zip(model.named_parameters(), alone.named_parameters()):
        mean = other.grad.clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(own.grad, mean / 2, msg=name)
    dist.destroy_process_group()


def test_unused_experts_and_losses_under_ddp(tmp_path):
    spawn(rank_main, (str(tmp_path),), nprocs=2)
