"""What is reported beside the plain evaluation: a linear SVM on frozen features, and voting.

Both are hooks that add numbers to the metrics of an evaluation and change none. They run before the metrics are logged,
written down or compared, and between ``before_val`` and ``after_val``, where the run's random generators are put back.
"""
import copy
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ewa3d.checks import check_integer, check_number, some
from ewa3d.engine.derive import dataset_cfgs
from ewa3d.engine.hooks import unwrapped, walk_datasets
from ewa3d.evaluation import is_of_one_class
from ewa3d.evaluation_parts import PartIoU, vote_parts
from ewa3d.registry import DATASETS, HOOKS
from ewa3d.structures import Sample

__all__ = ['LinearSVMHook', 'VotingHook', 'extract_features', 'linear_svm', 'vote']

IN_ORDER = "sampler=dict(type='DefaultSampler', shuffle=False, round_up=False)"


# ---------------------------------------------------------------------------------------------------------------------
# A linear SVM on frozen features
# ---------------------------------------------------------------------------------------------------------------------
@HOOKS.register_module()
class LinearSVMHook(Hook):
    """``svm_acc``: the test accuracy, in percent, of a linear SVM on the frozen features ``model.extract(points)``.

    It is added to the metrics of every validation, so of pretraining by epoch, and of a test. Point-BERT chooses its
    checkpoint by this number on ModelNet40's test split; here it is watched, and the last epoch is what is reported.

    Args:
        train_dataloader: config of the loader of the labelled clouds to fit; its pipeline should not augment.
        test_dataloader: config of the one to score; by default the data that are being evaluated.
        C: inverse strength of the regularisation; 1 is scikit-learn's default, which the published code uses. The
            solver may then stop at its 1,000 iterations before it has converged, which the log says.

    Raises:
        ValueError: there is no validation to add it to, only one class to fit, test data of other classes, or a sampler
            that repeats samples.
        TypeError: a model without ``extract``.
    """
    adds_metrics = True
    priority = 'HIGHEST'  # before hooks that write, compare or log the metrics, and before an EMA goes back

    def __init__(self, train_dataloader: dict, test_dataloader: dict | None = None, C: float = 1.0):
        self.C = check_number('LinearSVMHook: C', C, '(0, inf)')
        self._cfgs = dict(train=train_dataloader, test=test_dataloader)
        self._loaders: dict[str, DataLoader] = {}

    def before_train(self, runner) -> None:
        if runner.val_loop is None:
            raise ValueError('LinearSVMHook adds svm_acc to the metrics of a validation, but the config has no '
                             'val_dataloader')

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        self._add(runner, metrics, runner.val_dataloader)

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        self._add(runner, metrics, runner.test_dataloader)

    def _add(self, runner, metrics: dict, evaluated: DataLoader) -> None:
        sets: list[np.ndarray] = []
        for name, cfg in self._cfgs.items():
            if cfg is None:
                self._loaders[name] = evaluated
            elif name not in self._loaders:
                self._loaders[name] = runner.build_dataloader(cfg, seed=runner.seed)
        check_classes(*(loader.dataset for loader in self._loaders.values()))
        for name, loader in self._loaders.items():
            sets += gather_features(runner.model, loader, f'LinearSVMHook: {name}_dataloader')
            if loader is not evaluated:
                loader._iterator = None  # ends persistent workers
        metrics['svm_acc'] = linear_svm(*sets, C=self.C)


def gather_features(model: nn.Module, loader: DataLoader, what: str) -> list[np.ndarray]:
    """Features and labels (see :func:`extract_features`) of all ranks."""
    parts = [part for part in all_gather_object(extract_features(model, loader)) if len(part[1])]
    features, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    if len(labels) > len(loader.dataset):
        raise ValueError(f'{what} gives {len(labels)} samples of {len(loader.dataset)}: its sampler repeats some; set '
                         f'{IN_ORDER}')
    return [features, labels]


def check_classes(train, test) -> None:
    """Raise ``ValueError`` where two data sets say that their labels mean different classes."""
    fitted, scored = (list((getattr(data, 'metainfo', None) or {}).get('classes') or []) for data in (train, test))
    if fitted and scored and fitted != scored:
        raise ValueError(f'LinearSVMHook: the training data have the classes {some(fitted)}, the test data '
                         f'{some(scored)}; give a test_dataloader with the same ones in the same order')


@torch.no_grad()
def extract_features(model: nn.Module, loader: DataLoader) -> tuple[np.ndarray, np.ndarray]:
    """The frozen features of a data set, and its labels. The model is in eval mode meanwhile.

    Shape:
        - returns ``(n, C)`` float32 and ``(n,)`` int64; ``n`` is 0 on a rank that is given no sample.

    Raises:
        TypeError: the model has no ``extract``. ValueError: a sample has no label.
    """
    model = unwrapped(model)
    if not hasattr(model, 'extract'):
        raise TypeError(f'{type(model).__name__} has no extract(points), which gives the features to fit')
    training = [module for module in model.modules() if module.training]
    model.eval()
    features, labels = [], []
    try:
        for batch in loader:
            batch = model.data_preprocessor(batch, False)
            features.append(model.extract(batch['inputs']['points']).float().cpu().numpy())
            for sample in batch['data_samples']:
                if 'gt_label' not in sample:
                    raise ValueError(f'sample {sample.get("name", "?")!r} has no label')
                labels.append(int(sample.gt_label))
    finally:
        for module in training:
            module.training = True
    return np.concatenate(features) if features else np.empty((0, 0), np.float32), np.array(labels, np.int64)


def linear_svm(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
               test_labels: np.ndarray, C: float = 1.0) -> float:
    """The accuracy in percent, on the test set, of scikit-learn's ``LinearSVC`` fitted to the training set.

    Shape:
        - features ``(n, C)``; labels ``(n,)``.

    Raises:
        ValueError: features that are not finite, or labels of a single class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC
    for name, features in (('training', train_features), ('test', test_features)):
        if not np.isfinite(features).all():
            raise ValueError(f'linear SVM: {name} features are not finite; the model has diverged or its input is bad')
    if len(np.unique(train_labels)) < 2:
        raise ValueError(f'linear SVM: the training set has one class only, label {train_labels[0]}')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', ConvergenceWarning)
        # the dual problem, as the published code has it: on features of a LayerNorm the other solver may take minutes
        svm = LinearSVC(C=C, dual=True, random_state=0).fit(train_features, train_labels)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        print_log(f'linear SVM: stopped after {svm.max_iter} iterations with C={C}, not converged', 'current')
    return float(100 * np.mean(svm.predict(test_features) == test_labels))


# ---------------------------------------------------------------------------------------------------------------------
# Voting
# ---------------------------------------------------------------------------------------------------------------------
@HOOKS.register_module()
class VotingHook(Hook):
    """``OA_vote10``, ``mAcc_vote10``: the metrics of a test once more, of logits averaged over ``times`` passes.

    Each pass draws its points and its augmentation anew. The number of passes is fixed and voting is done once, from a
    seed: published code repeats it and keeps the best repetition, which is biased upwards. Of part segmentation,
    probabilities are averaged at all points of a cloud (see :func:`~ewa3d.evaluation_parts.vote_parts`).

    Args:
        times: number of passes.
        pipeline: transforms of the voting passes in place of the test's; those of the training, as a rule.
        seed: of the passes; by default the run's.

    Raises:
        ValueError: no pipeline, or fewer than one pass.
    """
    adds_metrics = True
    priority = 'HIGHEST'

    def __init__(self, times: int = 10, pipeline: Sequence[dict] = (), seed: int | None = None):
        self.times = check_integer('VotingHook: times', times, 1)
        if not pipeline:
            raise ValueError('VotingHook needs the pipeline of its passes; that of the training, as a rule')
        self.pipeline = list(pipeline)
        self.seed = None if seed is None else check_integer('VotingHook: seed', seed, 0)

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        cfg = copy.deepcopy(runner.cfg.test_dataloader)
        seed = runner.seed if self.seed is None else self.seed
        for dataset in dataset_cfgs(cfg):
            if not {'dataset', 'datasets'} & set(dataset):  # what wraps others has no pipeline
                dataset.update(pipeline=self.pipeline, seed=seed)
        if any(isinstance(metric, PartIoU) for metric in runner.test_evaluator.metrics):
            batches = vote_parts(unwrapped(runner.model), runner.test_dataloader, DATASETS.build(cfg['dataset']),
                                 self.times)
        else:
            batches = [vote(runner.model, runner.build_dataloader(cfg, seed=seed), self.times)]
        for samples in batches:
            runner.test_evaluator.process(data_samples=samples)
        voted = runner.test_evaluator.evaluate(len(runner.test_dataloader.dataset))
        metrics.update({f'{key}_vote{self.times}': value for key, value in voted.items() if not is_of_one_class(key)})


@torch.no_grad()
def vote(model: nn.Module, loader: DataLoader, times: int) -> list[Sample]:
    """The samples of ``loader`` with ``pred_scores`` and ``pred_label`` of logits averaged over ``times`` passes.

    The model should be in eval mode; pass ``i`` is epoch ``i`` of the data set.

    Raises:
        TypeError: a data set without epochs, of which every pass would be the same; a model that does not give logits
            ``(B, K)``, one row a sample: scores of points are of other points in each pass, and clips have several
            views by themselves.
        ValueError: a loader that gives the samples in another order each time.
    """
    model = unwrapped(model)
    datasets = [dataset for dataset in walk_datasets(loader.dataset) if hasattr(dataset, 'set_epoch')]
    if not datasets:
        raise TypeError(f'{type(loader.dataset).__name__} has no set_epoch: every pass of a vote would be the same')
    total: Tensor | float = 0.0
    order = None
    for epoch in range(times):
        for dataset in datasets:
            dataset.set_epoch(epoch)
        logits, samples = _pass(model, loader)
        names = [(sample.get('name'), sample.get('index')) for sample in samples]
        if order not in (None, names):
            raise ValueError(f'voting needs a loader that gives the samples in one order: {IN_ORDER}')
        order, total = names, total + logits
    scores = (total / times).softmax(-1).float()
    for sample, score in zip(samples, scores):
        sample.pred_scores, sample.pred_label = score, score.argmax()
    return samples


def _pass(model: nn.Module, loader: DataLoader) -> tuple[Tensor, list[Sample]]:
    logits, samples = [], []
    for batch in loader:
        batch = model.data_preprocessor(batch, False)
        output = model(batch['inputs'], mode='tensor')
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(batch['data_samples']):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f'voting averages the logits (B, K) of a classifier, {type(model).__name__} gives {found} '
                            f'for {len(batch["data_samples"])} samples')
        logits.append(output.double().cpu())
        samples += batch['data_samples']
    loader._iterator = None
    return torch.cat(logits) if logits else torch.empty(0, 1), samples
