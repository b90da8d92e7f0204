"""Functions on several gloo ranks. One server imports torch and forks every rank, so that a rank costs next to nothing.
"""
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PRELOADED = ['torch.distributed.fsdp', 'torch.distributed.checkpoint.state_dict', 'ewa3d.engine.runner', 'ewa3d.models',
             'ewa3d.datasets', 'ewa3d.layers', 'ewa3d.evaluation_boxes', 'ewa3d.evaluation_tasks', 'pytest']


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def run_ranks(function, count: int, *args, timeout: float = 3600) -> list:
    """What ``function(rank, *args)`` returns on each of ``count`` ranks; its error, where one of them fails.

    The function is one of a module's, and what it returns is tensors and plain values.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(function, rank, count, port, folder, args))
                 for rank in range(count)]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        failed = [path.read_text() for path in sorted(Path(folder).glob('*.txt'), key=lambda p: p.stat().st_mtime_ns)]
        codes = [process.exitcode for process in ranks]
        assert not failed and codes == [0] * count, f'exit codes {codes}\n{failed[0] if failed else ""}'
        return [torch.load(f'{folder}/{rank}.pt', weights_only=True) for rank in range(count)]


def _wait(ranks: list, timeout: float) -> None:
    """Until all ended, or one failed: the others would wait for it."""
    end = time.monotonic() + timeout
    while any(p.exitcode is None for p in ranks) and not any(p.exitcode for p in ranks) and time.monotonic() < end:
        time.sleep(0.02)


def _rank(function, rank: int, count: int, port: int, folder: str, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES='')
    torch.set_num_threads(1)
    try:
        dist.init_process_group('gloo')
        torch.save(function(rank, *args), f'{folder}/{rank}.pt')
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f'{rank}.txt').write_text(traceback.format_exc())
        raise SystemExit(1) from None
