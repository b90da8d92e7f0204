"""A trained model as a graph: tensors in, named tensors out, the tokenizer inside."""
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ewa3d.models.detection.head import DETRHead
from ewa3d.models.partseg import PartSegHead
from ewa3d.models.task import TaskModel
from ewa3d.models.tasks import Task, features_by_task
from ewa3d.registry import nearest

__all__ = ['Deployed', 'deploy', 'inputs_of_task']


class Deployed(nn.Module):
    """A :class:`~ewa3d.models.task.TaskModel`, or one task of it, without samples, losses and checks of values.

    Args:
        task: one of the model's, where it has several.
        features: give what the head would take instead of what it gives.

    Shape:
        - inputs by name, as the model takes them; returns a dict of tensors. Of a classifier ``logits`` and
          ``probabilities`` ``(B, num_classes)``; of a part segmentation ``log_probabilities`` ``(B, N, num_parts)``; of
          a detector ``boxes`` ``(B, Q, 7)``, ``scores`` ``(B, Q, num_classes)`` and ``objectness`` ``(B, Q)``, of all
          queries; ``features`` where those are asked for or there is no head.
    """

    def __init__(self, model: TaskModel, task: str | None = None, features: bool = False):
        super().__init__()
        self.model, self.task, self.features = model, task, features

    def answer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        branch: TaskModel | Task = self.model if self.task is None else self.model.tasks[self.task]
        feats = self.model.extract(inputs) if self.task is None else \
            features_by_task(self.model.backbone, {self.task: branch}, inputs)[self.task]
        return _features(feats) if self.features or branch.head is None else _outputs(branch.head, feats)


class _OfClouds(Deployed):
    def forward(self, points: Tensor) -> dict[str, Tensor]:
        return self.answer(dict(points=points))


class _OfNamedClouds(Deployed):
    def forward(self, points: Tensor, category: Tensor) -> dict[str, Tensor]:
        return self.answer(dict(points=points, category=category))


class _OfImages(Deployed):
    def forward(self, img: Tensor) -> dict[str, Tensor]:
        return self.answer(dict(img=img))


class _OfVideos(Deployed):
    def forward(self, video: Tensor) -> dict[str, Tensor]:
        return self.answer(dict(video=video))


_FORMS = {('points',): _OfClouds, ('points', 'category'): _OfNamedClouds, ('img',): _OfImages, ('video',): _OfVideos}


def inputs_of_task(model: nn.Module, example: Mapping[str, Tensor], task: str | None) -> dict[str, Tensor]:
    """Those of the model's inputs that it needs, or one of its tasks.

    Raises:
        ValueError: a task that the model does not have, or none for a model of several. TypeError: a model without
            outputs to deploy.
    """
    if not isinstance(model, TaskModel):
        raise TypeError(f'a {type(model).__name__} cannot be exported: it is for pretraining, and what it gives are '
                        'losses of what it masks at random; a TaskModel (a classifier, a part segmentation, a '
                        'detector) was expected')
    if model.tasks is None:
        if task is not None:
            raise ValueError(f'task={task!r}: the model has one task, without a name')
        return dict(example)
    names = list(model.tasks)
    if task is None and len(names) > 1:
        raise ValueError(f'the model has the tasks {", ".join(names)}; say which one is exported: --task {names[0]}')
    if task is not None and task not in names:
        raise ValueError(f'the model has no task {task!r}; {nearest(task, names)}')
    modality = model.tasks[task or names[0]].modality
    return {name: value for name, value in example.items() if modality in (None, name)}


def deploy(model: TaskModel, inputs: Sequence[str], task: str | None = None, features: bool = False) -> Deployed:
    """``model`` with a ``forward`` whose arguments are ``inputs``, in eval mode; the modules are shared.

    Raises:
        NotImplementedError: inputs that no exported model takes.
    """
    if tuple(inputs) not in _FORMS:
        raise NotImplementedError(f'a model of the inputs {", ".join(inputs)} cannot be exported; one of '
                                  f'{"; ".join(", ".join(names) for names in _FORMS)} was expected')
    if model.tasks is not None and task is None:
        task = next(iter(model.tasks))
    return _FORMS[tuple(inputs)](model, task, features).eval()


def _outputs(head: nn.Module, feats) -> dict[str, Tensor]:
    if isinstance(head, PartSegHead):
        return dict(log_probabilities=head(feats))
    if isinstance(head, DETRHead):
        last = head.predictions(feats._replace(x=feats.x[-1:]))
        last = {name: value[0] for name, value in last.items()}
        probabilities = last['sem_cls_logits'].softmax(-1)
        return dict(boxes=head.coder.boxes(last), scores=probabilities[..., :-1], objectness=1 - probabilities[..., -1])
    found = head(feats)
    if isinstance(found, Tensor):
        return dict(logits=found, probabilities=found.softmax(-1))
    if isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values()):
        return dict(found)
    raise NotImplementedError(f'the head ({type(head).__name__}) gives a {type(found).__name__}; a tensor or a dict of '
                              'tensors was expected')


def _features(feats) -> dict[str, Tensor]:
    """What a head takes: a tensor, or a named tuple of such."""
    if isinstance(feats, Tensor):
        return dict(features=feats)
    return {name: value for name, value in feats._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()}
