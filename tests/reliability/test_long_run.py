"""2,000 steps of training and 200 evaluations: neither memory nor the number of open files grows."""
import json
import os
import statistics
from pathlib import Path

import pytest
from engine_toys import on_cpu, toy_config  # noqa: F401

from ewa3d.engine.runner import Runner

EPOCHS, STEPS = 200, 10
WARM_UP = 40  # epochs: allocators, caches of kernels and the first log lines settle
LIMIT = 4.0  # MiB that the medians of the first and the last quarter behind it may differ


def usage(pid: int) -> dict[str, float]:
    """MiB of a process that are in memory, and how many files it has open."""
    resident = int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return dict(memory=resident / 2 ** 20, files=len(os.listdir(f'/proc/{pid}/fd')))


def children() -> list[int]:
    return [int(pid) for task in Path('/proc/self/task').iterdir() for pid in (task / 'children').read_text().split()]


def train(folder: Path) -> None:
    cfg = toy_config(folder, ewa=True, ema=True, epochs=EPOCHS, workers=1)
    cfg['train_dataloader']['dataset']['num_samples'] = 4 * STEPS
    cfg['default_hooks']['checkpoint'].update(interval=10, max_keep_ckpts=1, save_best='OA')
    runner, call = Runner.from_cfg(cfg), Runner.call_hook

    def measuring(stage: str, **kwargs) -> None:
        call(runner, stage, **kwargs)
        if stage == 'after_val':
            found = dict(process=usage(os.getpid()), **{f'worker{i}': usage(pid) for i, pid in enumerate(children())})
            with (folder / 'usage.jsonl').open('a') as file:
                file.write(json.dumps(found) + '\n')

    runner.call_hook = measuring
    runner.train()


@pytest.mark.reliability
@pytest.mark.skipif(not Path('/proc/self/statm').is_file(), reason='needs /proc of Linux')
def test_nothing_grows(tmp_path):
    pid = os.fork()  # what other tests of this process did is not counted
    if pid == 0:
        code = 1
        try:
            train(tmp_path)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lines = list(map(json.loads, (tmp_path / 'usage.jsonl').read_text().splitlines()))
    assert len(lines) == EPOCHS and len(lines[-1]) == 3  # a worker for training, one for validation
    settled = lines[WARM_UP:]
    print(f'\n{EPOCHS * STEPS} steps, {EPOCHS} evaluations; medians of the first and last quarter after {WARM_UP} of '
          'them:')
    for name in lines[-1]:
        quarters = [[line[name] for line in part] for part in (settled[:40], settled[-40:])]
        first, last = (statistics.median(found['memory'] for found in part) for part in quarters)
        counts = sorted({line[name]['files'] for line in settled})
        print(f'  {name:<9}{first:8.1f} MiB {last:8.1f} MiB, {last - first:+.2f}; open files {counts}')
        assert last - first < LIMIT, name
        assert counts[-1] - counts[0] <= 2, name  # a batch that travels holds a file
