"""What a result came from: the state of the code and the data, recorded with a run and compared later."""
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

import ewa3d
from ewa3d.checks import some
from ewa3d.datasets.base import PointDataset, error_text, shared_ids
from ewa3d.datasets.cache import NotPrepared, only_prepared
from ewa3d.datasets.fingerprint import differences, fingerprint, same_split
from ewa3d.engine.derive import dataset_cfgs
from ewa3d.engine.hooks import get_rng_state, set_rng_state, walk_datasets
from ewa3d.files import atomic_write
from ewa3d.registry import DATASETS, HOOKS

__all__ = ['ProvenanceHook', 'changed_data', 'describe_data', 'git_state', 'train_fingerprint']

CHANGED = 20  # files that are listed at most
UNREADABLE = (OSError, ValueError, KeyError, TypeError, ImportError)


@HOOKS.register_module()
class ProvenanceHook(Hook):
    """Records in every checkpoint (``meta.data``, ``meta.git``) and in ``environment.json`` which data a run was given,
    a :func:`~ewa3d.datasets.fingerprint.fingerprint` of each split, the commit of the code, and on what it was judged
    (``judged``, see :func:`describe_data`). A run that goes on warns where its data are others by now.
    """

    def __init__(self):
        self.record: dict = {}
        self._before: Mapping = {}

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if runner._resume:
            self._before = (checkpoint.get('meta') or {}).get('data') or {}

    def before_train(self, runner) -> None:
        state = get_rng_state()
        self.record = dict(data=_fingerprints(runner), git=git_states(), judged=_judged(runner))
        set_rng_state(state)
        for text in changed_data(self._before, self.record['data']):
            runner.logger.warning(f'{text}: the resumed run is another one than the run without a stop')
        path = Path(runner.work_dir) / 'environment.json'
        if is_main_process() and path.is_file():
            environment = json.loads(path.read_text(encoding='utf-8'))
            atomic_write(path, json.dumps({**environment, **self.record}, indent=2))

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['meta'].update(self.record)


def describe_data(loader: Mapping, dataset, read: bool = True) -> dict:
    """What has to agree before numbers are compared: ``dataset``, ``split``, ``points`` (of the clouds that the model
    is given; ``None`` without clouds, and of a mixture) and ``samples``.

    Args:
        loader: the config of the loader. dataset: what was built from it.
        read: a sample, which is where ``points`` is from.
    """
    if hasattr(dataset, 'names'):  # a mixture
        return dict(dataset=' + '.join(dataset.names), split=dataset.split, points=None, samples=len(dataset))
    inner = dataset_cfgs(loader)[-1]
    points, samples = dataset[0]['inputs'].get('points') if read else None, len(dataset)
    kind = inner.get('type')
    while not hasattr(dataset, 'split') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset  # wrappers: the split is the data set's own
    root = getattr(dataset, 'data_root', None)
    of_folder = f' {Path(root).resolve().name}' if kind == 'FolderPointCloud' and root else ''
    return dict(dataset=f'{kind}{inner.get("variant", "")}{of_folder}',
                split=getattr(dataset, 'split', inner.get('split')),
                points=None if points is None else int(points.shape[-2]), samples=samples)


def _judged(runner) -> dict | None:
    """On what a run is validated, where it is. Samples of data sets of others are left to their workers."""
    loader = runner.cfg.get('val_dataloader')
    if runner.val_loop is None or not dataset_cfgs(loader):
        return None
    dataset = runner.val_loop.dataloader.dataset
    inner = dataset
    while not isinstance(inner, PointDataset) and hasattr(inner, 'dataset'):
        inner = inner.dataset
    try:
        return describe_data(loader, dataset, read=isinstance(inner, PointDataset))
    except (*UNREADABLE, IndexError):  # what cannot be read is told when it is validated
        return None


def _fingerprints(runner) -> dict:
    """By split. Data that only a test will need are read now, too; where they are not there, that is no error yet."""
    found = dict(train=fingerprint(runner.train_dataloader.dataset))
    loaders = {split: runner.cfg.get(f'{split}_dataloader') for split in ('val', 'test')}
    configs = {split: loader.get('dataset') if isinstance(loader, Mapping) else None
               for split, loader in loaders.items()}
    if runner.val_loop is not None:
        found['val'] = fingerprint(runner.val_loop.dataloader.dataset)
    if 'val' in found and configs['test'] is not None and configs['test'] == configs['val']:
        found['test'] = found['val']
    elif isinstance(configs['test'], Mapping):
        try:
            tested = DATASETS.build(dict(configs['test']))
            found['test'] = fingerprint(tested)
            shared = shared_ids(walk_datasets(runner.train_dataloader.dataset), walk_datasets(tested))
            if shared:
                runner.logger.warning(f'{len(shared)} samples are in the training and in the test data, so a test will '
                                      f'be too good: {some(shared)}')
        except UNREADABLE as error:
            runner.logger.info(f'the data of the test cannot be read ({error_text(error)}): a test will not be able to '
                               'tell whether they are others')
    return found


def train_fingerprint(cfg: Mapping | None) -> dict | None:
    """The fingerprint of the training data of a loader's config, where they are at hand: nothing is prepared for it."""
    dataset = (cfg or {}).get('dataset')
    if not isinstance(dataset, Mapping) or any(c.get('on_error') == 'skip' for c in dataset_cfgs(cfg)):
        return None  # which would read every sample
    try:
        with only_prepared():
            return fingerprint(DATASETS.build(dict(dataset)))
    except (NotPrepared, *UNREADABLE):
        return None


def changed_data(then: Mapping, now: Mapping) -> list[str]:
    """Sentences about the data that differ from those that were recorded, one a split.

    Args:
        then: split of the run → fingerprint, as a checkpoint has it; empty where it has none.
        now: the same for what is used now. A split is compared with what was recorded for it; where that is of
            another split of the data (the validation data are tested, say), with the record of the same one.
    """
    then, texts = {role: found for role, found in then.items() if isinstance(found, Mapping)}, []
    for role, found in now.items():
        recorded = [then[role]] if role in then else []
        recorded += [other for other in then.values() if other not in recorded]
        if not recorded:
            continue
        alike = [other for other in recorded if same_split(other, found)] or recorded[:1]
        differ = min((differences(other, found) for other in alike), key=len)
        if differ:
            texts.append(f'the {role} data are not those that the training recorded: {"; ".join(differ)}')
    return texts


def git_states() -> dict:
    """Of the checkout that ewa3d runs from, and of the one that is the working folder, where they are some."""
    root = Path(ewa3d.__file__).resolve().parents[1]
    found = dict(ewa3d=git_state(root) if (root / '.git').exists() else None, working_folder=git_state(Path.cwd()))
    return {name: state for name, state in found.items() if state}


def git_state(folder: Path) -> dict | None:
    """``commit`` and ``changed`` (tracked files that differ from it) of a git checkout; ``None`` for any other folder.
    """
    commit = _git(folder, 'rev-parse', 'HEAD')
    if commit is None:
        return None
    status = _git(folder, 'status', '--porcelain', '--untracked-files=no')
    changed = None if status is None else [line[3:] for line in status.splitlines()]
    return dict(commit=commit.strip(), changed=changed and changed[:CHANGED])


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(['git', '-C', str(folder), *args], capture_output=True, timeout=5, check=True,
                              env=dict(os.environ, GIT_OPTIONAL_LOCKS='0'))
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode('utf-8', 'replace')
