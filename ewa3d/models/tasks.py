"""The tasks of a model that has several of them on one backbone."""
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ewa3d.checks import check_number
from ewa3d.layers.video_tokens import frames_of_backbone
from ewa3d.models.base import build_module
from ewa3d.registry import nearest
from ewa3d.structures import Sample

__all__ = ['Task', 'build_branch', 'build_tasks', 'features_by_task', 'predict_tasks', 'tasks_of_batch']


class Task(nn.Module):
    """A neck and a head on a shared backbone, and what they learn from.

    Attributes:
        modality: the input that the task sees; ``None`` where the backbone takes one kind only.
        data: the source of a ``MixedDataset`` that it learns from.
        loss_weight: its losses are multiplied by this.
    """

    def __init__(self, neck: nn.Module | None, head: nn.Module, modality: str | None, data: str, loss_weight: float):
        super().__init__()
        self.neck, self.head = neck, head
        self.modality, self.data, self.loss_weight = modality, data, loss_weight

    def extra_repr(self) -> str:
        return f'modality={self.modality!r}, data={self.data!r}, loss_weight={self.loss_weight:g}'


def build_branch(backbone: nn.Module, neck: dict | nn.Module | None, head: dict | nn.Module | None,
                 modality: str | None = None) -> tuple[nn.Module | None, nn.Module | None]:
    """Neck and head, with what follows from the backbone (and from the tokenizer of ``modality``) filled in."""
    tokenizer = getattr(backbone, 'tokenizer', None)
    tokenizer = tokenizer[modality] if modality is not None else tokenizer
    neck = build_module(neck, num_prefix_tokens=getattr(backbone, 'num_prefix_tokens', 0),
                        embed_dim=backbone.embed_dim, in_channels=getattr(tokenizer, 'in_channels', 3),
                        skip_origin=getattr(tokenizer, 'skip_origin', False),
                        num_frames=frames_of_backbone(backbone))
    width = backbone.embed_dim
    if hasattr(neck, 'out_channels'):
        width = neck.out_channels(width)
    return neck, build_module(head, in_channels=width)


def build_tasks(backbone: nn.Module, tasks: Mapping[str, Mapping]) -> nn.ModuleDict:
    """The tasks of ``name → dict(head, neck, modality, data, loss_weight)``; ``data`` is the name unless given.

    Raises:
        TypeError: a task that is no dict, or has an unknown key. ValueError: no task, no head, a modality that the
            backbone has no tokenizer for, a name that cannot be one.
    """
    modalities = getattr(backbone, 'modalities', ())
    if not tasks:
        raise ValueError('TaskModel: tasks is empty; at least one was expected')
    built = nn.ModuleDict()
    for name, cfg in tasks.items():
        where = f'TaskModel: tasks.{name}'
        if 'loss' in name or '.' in name or '/' in name or not name:
            raise ValueError(f"{where}: a task's name has no '.', '/' or 'loss' in it: it stands before its losses")
        if not isinstance(cfg, Mapping):
            raise TypeError(f'{where} is a {type(cfg).__name__}; dict(head=…, neck=…, modality=…) was expected')
        for key in cfg:
            if key not in ('neck', 'head', 'modality', 'data', 'loss_weight'):
                raise TypeError(f'{where} takes no {key!r}; '
                                f'{nearest(key, ("neck", "head", "modality", "data", "loss_weight"))}')
        if cfg.get('head') is None:
            raise ValueError(f'{where} has no head')
        modality = cfg.get('modality')
        if modality not in modalities and (modalities or modality is not None):
            has = f'tokenizers for {", ".join(modalities)}' if modalities else 'one tokenizer, without a name'
            raise ValueError(f'{where}: modality={modality!r} has no tokenizer; the backbone has {has}')
        weight = check_number(f'{where}: loss_weight', cfg.get('loss_weight', 1.), '(0, inf)')
        neck, head = build_branch(backbone, cfg.get('neck'), cfg['head'], modality)
        built[name] = Task(neck, head, modality, cfg.get('data') or name, weight)
    return built


def tasks_of_batch(tasks: nn.ModuleDict, inputs: Mapping | Tensor,
                   samples: Sequence[Sample] | None = None) -> dict[str, Task]:
    """The tasks that a batch is for: those that learn from its samples' ``source``; where samples do not say one, those
    whose modality is among the inputs.

    Raises:
        ValueError: samples of two sources in one batch, or no task for it.
    """
    sources = {sample.get('source') for sample in samples or ()}
    if len(sources) > 1:
        raise ValueError(f'one batch has samples of the sources {", ".join(map(repr, sources))}; batches of one source '
                         "were expected: sampler=dict(type='MixedSampler'), batch_sampler=dict(type='MixedBatches')")
    source = sources.pop() if sources else None
    given = set(inputs) if isinstance(inputs, Mapping) else set()
    found = {name: task for name, task in tasks.items()
             if (task.data == source if source is not None else task.modality is None or task.modality in given)}
    if not found:
        what = f'data {source!r}' if source is not None else f'inputs {sorted(map(str, given))}'
        wanted = {task.data if source is not None else task.modality for task in tasks.values()}
        raise ValueError(f'no task of the model learns from {what}; its tasks want '
                         f'{", ".join(sorted(map(str, wanted)))}')
    return found


def features_by_task(backbone: nn.Module, tasks: Mapping[str, Task], inputs: Mapping | Tensor) -> dict[str, Tensor]:
    """What each task's head takes, of one pass of the backbone for each modality."""
    feats = {}
    for modality in dict.fromkeys(task.modality for task in tasks.values()):
        group = {name: task for name, task in tasks.items() if task.modality == modality}
        given = inputs if modality is None else {key: value for key, value in inputs.items()
                                                 if key == modality or key not in backbone.modalities}
        feats.update(_features(backbone, group, given, modality))
    return feats


def _features(backbone: nn.Module, group: Mapping[str, Task], inputs, modality: str | None) -> dict[str, Tensor]:
    """Of tasks that share a modality; necks that ask for blocks get theirs, the others the last one's."""
    asked = {i for task in group.values() for i in getattr(task.neck, 'out_indices', ())}
    if not asked:
        x = backbone(inputs)
        return {name: x if task.neck is None else task.neck(x) for name, task in group.items()}
    depth = len(backbone.blocks)
    blocks = sorted({i % depth for i in asked} | {depth - 1})
    tokens = backbone.tokenize(inputs)
    options = {} if modality is None else dict(modality=modality)
    if tokens.prefix_pos is not None:
        options['prefix_pos'] = tokens.prefix_pos
    outputs = dict(zip(blocks, backbone.encode(tokens.x, tokens.pos, blocks, **options)))
    feats = {}
    for name, task in group.items():
        if hasattr(task.neck, 'out_indices'):
            feats[name] = task.neck([outputs[i % depth] for i in task.neck.out_indices], tokens.coord, inputs)
        else:
            x = outputs[depth - 1]
            feats[name] = x if task.neck is None else task.neck(x)
    return feats


def predict_tasks(tasks: Mapping[str, Task], feats: Mapping[str, Tensor],
                  samples: Sequence[Sample] | None = None) -> list[Sample]:
    """The samples with what each task's head predicts. Heads may write into the same fields, so where there are several
    tasks each sample has them apart as well: ``by_task``, task → field → value."""
    found = {name: task.head.predict(feats[name], samples and [sample.new() for sample in samples])
             for name, task in tasks.items()}
    samples = [Sample() for _ in next(iter(found.values()))] if samples is None else list(samples)
    for sample, *own in zip(samples, *found.values()):
        fields = [{key: value for key, value in mine.items() if value is not sample.get(key)} for mine in own]
        for predicted in fields:
            sample.set_data(predicted)
        if len(fields) > 1:
            sample.by_task = dict(zip(found, fields))
    return samples
