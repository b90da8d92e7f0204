"""``fully_shard`` (FSDP2) by config: parameters, gradients and the optimizer's state are shared out over the ranks;
checkpoints stay those of one process."""
from collections.abc import Mapping

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from torch import Tensor, nn

from ewa3d.layers.stacked import iter_experts
from ewa3d.registry import HOOKS, nearest
from ewa3d.reparam import glob

__all__ = ['EvenForwardsHook', 'FULLY_SHARD', 'gathered', 'shard', 'shared_out']

FULLY_SHARD = 'FullyShard'  # the name in `model_wrapper_cfg`, which is no wrapper


def shard(model: nn.Module, at: str = 'backbone.blocks.*', reshard_after_forward: bool = True) -> nn.Module:
    """Share ``model`` out over all ranks, in place; what each of the named modules has is gathered when it runs.

    Experts are cut along their width where it is a multiple of the number of ranks: averaging them needs no other rank
    then. ``model.load_state_dict`` takes whole tensors afterwards, those of a plain checkpoint included.

    Args:
        at: names of modules, with ``*`` for any part.
        reshard_after_forward: give the gathered parameters back between forward and backward.

    Raises:
        ValueError: ``at`` names no module.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    names = {name: module for name, module in model.named_modules() if name}
    chosen = [module for name, module in names.items() if glob(at).fullmatch(name)]
    if not chosen:
        raise ValueError(f'model_wrapper_cfg.at={at!r} names no module of {type(model).__name__}; {nearest(at, names)}')
    ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks,))
    experts = {id(p) for _, module in iter_experts(model) for p in module.expert_parameters()}

    def place(parameter: nn.Parameter) -> Shard:
        even = parameter.ndim > 1 and parameter.shape[1] % ranks == 0
        return Shard(1 if even and id(parameter) in experts else 0)

    for module in (*chosen, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, shard_placement_fn=place)
    model.register_load_state_dict_pre_hook(_share_out_state)
    return model


@HOOKS.register_module()
class EvenForwardsHook(Hook):
    """Lets all ranks of a sharded model evaluate equally many batches: gathering its parameters takes all of them, and
    where no sample is repeated, ranks have different numbers. What the further ones give is not counted."""
    priority = 'LOWEST'

    def before_val_epoch(self, runner) -> None:
        self._begin(runner, runner.val_dataloader)

    def before_test_epoch(self, runner) -> None:
        self._begin(runner, runner.test_dataloader)

    def _begin(self, runner, loader) -> None:
        most = torch.tensor(len(loader))
        all_reduce(most, 'max')
        self._length, self._missing = len(loader), int(most) - len(loader)
        if not self._length:
            self._run(runner, loader.collate_fn([loader.dataset[0]]))

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if batch_idx + 1 == self._length:
            self._run(runner, data_batch)

    after_test_iter = after_val_iter

    @torch.no_grad()
    def _run(self, runner, batch) -> None:
        runner.model.eval()
        for _ in range(self._missing):
            runner.model.val_step(batch)


def gathered(value):
    """A tree with every DTensor as a whole tensor on the CPU. All ranks have to ask; the first one gets the values."""
    if hasattr(value, 'full_tensor'):
        full = value.detach().full_tensor()
        return full.cpu() if is_main_process() else None
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    return type(value)(map(gathered, value)) if isinstance(value, (list, tuple)) else value


def shared_out(state: Mapping, optimizer: torch.optim.Optimizer) -> dict:
    """The state of an optimizer, whole, as the optimizer of a sharded model takes it."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    if not any(hasattr(p, 'full_tensor') for p in parameters):
        return dict(state)
    entries = {i: {key: _like(parameters[i], value) for key, value in entry.items()}
               for i, entry in state['state'].items() if i < len(parameters)}
    return {**state, 'state': entries}


def _share_out_state(model: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    for name, own in model.state_dict().items():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor):
            plain = value.ndim > 0 and value.shape == own.shape[1:]  # of one expert: that of all
            state_dict[prefix + name] = _like(own, value.expand(own.shape) if plain else value)


def _like(own: Tensor, value):
    """``value`` cut up as ``own`` is; one of another shape (the count of steps, a mistake) itself."""
    if not (hasattr(own, 'full_tensor') and isinstance(value, Tensor)) or value.shape != own.shape \
            or hasattr(value, 'full_tensor'):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(own.device).contiguous(), own.device_mesh, own.placements, src_data_rank=None)
