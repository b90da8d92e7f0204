"""What a run starts from: process groups on machines without a GPU, and the record of versions and hardware."""
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.device import get_device

import ewa3d

__all__ = ['check_device', 'check_launcher', 'describe_environment', 'describe_hardware', 'init_gloo', 'versions']


_FROM_SLURM = dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID')


def check_launcher(launcher: str) -> None:
    """Raise ``ValueError`` where the variables that torchrun or slurm set are not there."""
    needed = dict(slurm=_FROM_SLURM.values(), pytorch=('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'))
    missing = [name for name in needed.get(launcher, ()) if name not in os.environ]
    if missing:
        raise ValueError(f'launcher {launcher!r}: the environment lacks {", ".join(missing)}; start with torchrun '
                         '(--launcher pytorch) or srun (--launcher slurm)')


def check_device(cfg: Mapping) -> None:
    """Raise ``ValueError`` where the optimizer wrapper needs another device than this machine has."""
    kind = (cfg.get('optim_wrapper') or {}).get('type')
    if kind in ('AmpOptimWrapper', 'mmengine.AmpOptimWrapper') and get_device() in ('cpu', 'mps'):
        raise ValueError("optim_wrapper.type is 'AmpOptimWrapper', which needs a GPU, and there is none; use "
                         "'AutocastOptimWrapper' (bfloat16 on any device), or 'OptimWrapper' with --amp")


def init_gloo(launcher: str, timeout: float) -> None:
    """A gloo process group from the variables that torchrun or slurm set (see :func:`check_launcher`), whose ranks wait
    ``timeout`` seconds for one another."""
    if launcher == 'slurm':
        for ours, theirs in _FROM_SLURM.items():
            os.environ.setdefault(ours, os.environ[theirs])
        os.environ.setdefault('MASTER_ADDR', os.environ.get('SLURM_LAUNCH_NODE_IPADDR', '127.0.0.1'))
        os.environ.setdefault('MASTER_PORT', '29500')
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=timeout))


def versions() -> dict[str, str]:
    """The versions that a result depends on; packages are not imported for it."""
    found = dict(ewa3d=ewa3d.__version__, python=platform.python_version(), system=platform.platform(terse=True))
    for name in ('torch', 'numpy', 'mmengine', 'timm', 'torchvision', 'scipy', 'numba', 'pytorch3d'):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_environment(**more) -> dict:
    """What ``environment.json`` holds."""
    cuda = torch.cuda.is_available()
    return dict(device=torch.cuda.get_device_name() if cuda else f'CPU ({torch.get_num_threads()} threads)',
                devices=torch.cuda.device_count() if cuda else 0, cuda=torch.version.cuda,
                cudnn=torch.backends.cudnn.version() if cuda else None, platform=platform.platform(),
                cpu_count=os.cpu_count(), threads=torch.get_num_threads(), versions=versions(), command=sys.argv,
                started=time.strftime('%Y-%m-%dT%H:%M:%S%z'), **more)


def describe_hardware(device: torch.device) -> dict:
    """The processor, its cores and load, and the GPU when one is used."""
    found = dict(cpu=_cpu_name(), cores=os.cpu_count(), usable_cores=_usable_cores(),
                 cpu_capability=torch.backends.cpu.get_cpu_capability(),
                 load_average=list(os.getloadavg()) if hasattr(os, 'getloadavg') else None, gpu=None)
    if device.type == 'cuda':
        found.update(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    return found


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    if info.exists():
        names = [line.partition(':')[2].strip() for line in info.read_text(errors='replace').splitlines()
                 if line.startswith(('model name', 'Model'))]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
