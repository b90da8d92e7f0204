"""One trunk for images and clouds: encoder, tasks, metrics, and runs that stop and resume."""
import copy

import pytest
import torch
from engine_toys import same
from mixed_toys import mixed_config, mixed_model, on_cpu  # noqa: F401
from test_resume import assert_same_run, train

from ewa3d import expand, fuse
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.provenance import describe_data
from ewa3d.engine.runner import Runner
from ewa3d.evaluation_tasks import TaskMetrics
from ewa3d.layers.modality import ModalityNorm
from ewa3d.models.build import fill_model
from ewa3d.models.weights import load_plain
from ewa3d.registry import DATASETS, MODELS
from ewa3d.structures import Sample

RULES = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)]


def build(num_classes: int = 4, change=None, **backbone):
    cfg = mixed_model(**backbone)
    for task in cfg['tasks'].values():
        task['head']['num_classes'] = num_classes
    if change:
        change(cfg)
    return MODELS.build(cfg)


def batch(kind: str, size: int = 3):
    inputs = dict(points=torch.randn(size, 24, 3)) if kind == 'clouds' else dict(img=torch.randn(size, 1, 8, 8))
    return inputs, [Sample(gt_label=torch.tensor(i % 4), metainfo=dict(source=kind)) for i in range(size)]


@pytest.mark.parametrize('norms', [False, True])
def test_encoder_shares_the_blocks_and_nothing_else(norms):
    """Each modality gives what a TokenEncoder of its own would, with the same blocks."""
    model = build(modality_norms=norms).eval()
    for kind, modality in (('clouds', 'points'), ('images', 'img')):
        inputs, _ = batch(kind)
        cfg = mixed_model()['backbone']
        alone = MODELS.build(dict(cfg, tokenizer=cfg['tokenizer'][modality])).eval()
        state = {}
        for key, value in model.backbone.state_dict().items():
            parts = key.split('.')
            if any(other in parts for other in {'points', 'img'} - {modality}):
                continue
            state['.'.join(part for part in parts if part != modality)] = value
        alone.load_state_dict(state)
        feats = model.backbone(inputs)
        torch.testing.assert_close(feats, alone(inputs))
        tokens = model.backbone.tokenize(inputs)
        torch.testing.assert_close(model.backbone.encode(tokens.x, tokens.pos, (1, 0), modality=modality)[0], feats)
    assert any(isinstance(module, ModalityNorm) for module in model.modules()) == norms


def test_norms_of_a_modality_start_from_plain_weights():
    model = build(modality_norms=True)
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.normal_(norm.weight)
    target = model.backbone.blocks[0].norm1
    target.load_state_dict(norm.state_dict(), strict=True)
    assert all(torch.equal(target[name].weight, norm.weight) for name in ('points', 'img'))
    target.load_state_dict(copy.deepcopy(target.state_dict()), strict=True)


def test_plain_blocks_start_a_model_with_norms_of_each_modality():
    source, target = build(), build(modality_norms=True)
    torch.nn.init.normal_(source.backbone.blocks[1].norm2.weight)
    report = load_plain(target, source.state_dict(), parts=['backbone.blocks', 'backbone.norm'])
    for name in ('points', 'img'):
        assert torch.equal(target.backbone.blocks[1].norm2[name].weight, source.backbone.blocks[1].norm2.weight)
    assert 'backbone.norm.img.bias' in report.matched and 'backbone.cls_token.img' in report.missing


def test_how_the_test_command_names_a_mixture():
    data = DATASETS.build(mixed_config('')['test_dataloader']['dataset'])
    assert describe_data(None, data) == dict(dataset='clouds + images', split='test', points=None, samples=13)


def test_one_expert_learns_from_both():
    model = build()
    expand(model, RULES)
    expert = model.backbone.blocks[0].mlp.fc1.weight
    for kind, own, other in (('images', 'img', 'points'), ('clouds', 'points', 'img')):
        model.zero_grad()
        inputs, samples = batch(kind)
        losses = model(inputs, samples, mode='loss')
        assert set(losses) == {f'{kind}/loss_cls', f'{kind}/acc'}
        losses[f'{kind}/loss_cls'].backward()
        assert (expert.grad.flatten(1).abs().sum(1) > 0).all()
        assert all(p.grad is not None for p in model.backbone.tokenizer[own].parameters())
        assert all(p.grad is None for p in model.backbone.tokenizer[other].parameters())
        assert model.backbone.cls_token[own].grad is not None and model.backbone.cls_token[other].grad is None


def test_both_heads_run_on_the_one_fused_trunk():
    model = build()
    expand(model, RULES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for kind in ('images', 'clouds', 'images'):
        optimizer.zero_grad()
        sum(v for k, v in model.train()(*batch(kind), mode='loss').items() if 'loss' in k).backward()
        optimizer.step()
    both = {**batch('clouds')[0], **batch('images')[0]}
    expected = model.eval()(both)
    assert set(expected) == {'clouds', 'images'}
    fuse(model)
    for name, logits in model(both).items():
        torch.testing.assert_close(logits, expected[name])
    assert set(model(batch('images')[0])) == {'images'}
    predicted = model(*batch('images'), mode='predict')
    assert predicted[0].pred_scores.shape == (4,) and predicted[0].get('source') == 'images'


def test_loss_weight():
    model = build().eval()
    inputs, samples = batch('images')
    weighted = model(inputs, samples, mode='loss')['images/loss_cls']
    plain = model.tasks['images'].head.loss(model.extract(inputs)['images'], samples)['loss_cls']
    torch.testing.assert_close(weighted, 0.5 * plain)


def test_two_tasks_of_one_modality():
    """Classification and part segmentation of the same cloud, in one pass of the backbone."""
    def change(cfg):
        neck = dict(type='PointFeaturePropagation', out_indices=(0, 1), hidden=8, out_dim=8, category_dim=4,
                    num_categories=2)
        cfg['tasks']['parts'] = dict(modality='points', data='clouds', neck=neck,
                                     head=dict(type='PartSegHead', num_parts=3, hidden=(8, 8)))

    model = build(change=change)
    calls = []
    model.backbone.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    inputs, samples = batch('clouds')
    inputs['category'] = torch.arange(3) % 2
    for sample in samples:
        sample.gt_parts = torch.arange(24) % 3
    losses = model(inputs, samples, mode='loss')
    assert {'clouds/loss_cls', 'parts/loss_seg'} <= set(losses) and len(calls) == 1
    model.eval()
    predicted = model(inputs, samples, mode='predict')
    assert 'pred_label' in predicted[0] and 'pred_parts' in predicted[0]
    expected = model.backbone(dict(points=inputs['points']))
    torch.testing.assert_close(model.tasks['clouds'].neck(expected), model.extract(inputs)['clouds'])


def test_two_tasks_with_heads_of_a_kind_are_judged_apart():
    """Both write pred_label; each one's metric looks at its own."""
    def change(cfg):
        cfg['tasks']['again'] = dict(copy.deepcopy(cfg['tasks']['clouds']), data='clouds')

    model = build(change=change).eval()
    inputs, samples = batch('clouds', 8)
    for name, wrong in (('clouds', 0), ('again', 1)):  # the labels by heart, and all one beside
        head = model.tasks[name].head
        head.forward = lambda feats, wrong=wrong: torch.eye(4)[(torch.arange(8) + wrong) % 4]
    metric = TaskMetrics(dict(clouds=dict(type='Accuracy'), again=dict(type='Accuracy')), data=dict(again='clouds'))
    metric.dataset_meta = dict(sources=dict(clouds=dict(classes=list('abcd'))))
    for _ in range(2):  # also on samples that have predictions already
        predicted = model(inputs, samples, mode='predict')
        assert [predicted[1].by_task[name]['pred_label'].item() for name in ('clouds', 'again')] == [1, 2]
        assert predicted[1].gt_label == 1 and set(predicted[1].by_task['again']) == {'pred_scores', 'pred_label'}
        metric.process(None, [sample.to_dict() for sample in predicted])
        values = metric.evaluate(8)
        assert (values['clouds/OA'], values['again/OA']) == (100, 0)
    assert 'by_task' not in model(*batch('images'), mode='predict')[0]
    assert set(model(inputs, mode='predict')[0].by_task) == {'clouds', 'again'}


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(('change', 'error', 'message'), [
    (lambda c: c['tasks']['images'].update(modality='image'), ValueError, "images: modality='image' has no tokenizer"),
    (lambda c: c['tasks']['images'].pop('modality'), ValueError, 'modality=None has no tokenizer'),
    (lambda c: c['tasks']['images'].update(head=None), ValueError, 'tasks.images has no head'),
    (lambda c: c['tasks']['images'].update(haed={}), TypeError, "takes no 'haed'; did you mean 'head'"),
    (lambda c: c['tasks']['images'].update(loss_weight=0), ValueError, 'loss_weight must lie in'),
    (lambda c: c['tasks'].update(x=3), TypeError, 'tasks.x is a int'),
    (lambda c: c['tasks'].update({'my_loss': c['tasks']['images']}), ValueError, "a task's name has no"),
    (lambda c: c.update(tasks={}), ValueError, 'tasks is empty'),
    (lambda c: c.update(head=c['tasks']['images']['head']), ValueError, 'with tasks, each has'),
    (lambda c: c.pop('tasks'), ValueError, 'tokenizers for points, img; which task sees which'),
    (lambda c: c['backbone']['tokenizer']['img'].update(embed_dim=8), ValueError, 'embed_dim=8')])
def test_wrong_tasks(change, error, message):
    with pytest.raises(error, match=message):
        build(change=change)


def test_wrong_batches():
    model = build()
    inputs, samples = batch('images')
    with pytest.raises(KeyError, match='exactly one modality'):
        model.backbone({**inputs, **batch('clouds')[0]})
    with pytest.raises(KeyError, match='exactly one modality'):
        model.backbone(dict(video=inputs['img']))
    with pytest.raises(TypeError, match='inputs must be a dict'):
        model.backbone(inputs['img'])
    tokens = model.backbone.tokenize(inputs)
    for modality in (None, 'video'):
        with pytest.raises(ValueError, match=f'modality={modality!r} has no tokenizer'):
            model.backbone.encode(tokens.x, tokens.pos, modality=modality)
    with pytest.raises(ValueError, match="needs data_samples"):
        model(inputs, mode='loss')
    with pytest.raises(ValueError, match='no task of the model learns from inputs'):
        model(dict(video=inputs['img']))
    strange = [Sample(metainfo=dict(source='cifar'))]
    with pytest.raises(ValueError, match="no task of the model learns from data 'cifar'; its tasks want clouds, im"):
        model(inputs, strange, mode='loss')
    with pytest.raises(ValueError, match='one batch has samples of the sources'):
        model(inputs, [*samples, *strange], mode='loss')
    with pytest.raises(ValueError, match='modality_norms belong to several'):
        MODELS.build(dict(type='TokenEncoder', tokenizer=dict(type='ImagePatchEmbed'), modality_norms=True))


def test_tasks_and_data_must_agree():
    info = dict(sources=dict(clouds=dict(classes=list('abc')), images=dict(classes=list('abcde'))))
    cfg = mixed_model()
    fill_model(cfg, info, 'train')
    assert [task['head']['num_classes'] for task in cfg['tasks'].values()] == [3, 5]
    cfg['tasks']['images']['data'] = 'imges'
    with pytest.raises(ValueError, match=r"tasks\.images has no data: .* no source 'imges'; did you mean 'images'"):
        fill_model(cfg, info, 'train')
    del cfg['tasks']['images']
    with pytest.raises(ValueError, match=r"no task of model\.tasks learns from 'images'"):
        fill_model(cfg, info, 'train')


def test_metrics_by_task():
    metric = TaskMetrics(dict(a=dict(type='Accuracy'), b=dict(type='Accuracy')), data=dict(b='other'))
    metric.dataset_meta = dict(sources=dict(a=dict(classes=['x', 'y']), other=dict(classes=['u', 'v', 'w'])))
    for source, truth, guess in (('a', 0, 0), ('a', 1, 0), ('other', 2, 2)):
        metric.process(None, [dict(source=source, gt_label=truth, pred_label=guess)])
    values = metric.evaluate(3)
    assert values['a/OA'] == 50 and values['b/OA'] == 100 and 'b/acc/w' in values and 'a/acc/y' in values
    with pytest.raises(ValueError, match="task 'a': Accuracy: there is nothing"):
        metric.evaluate(3)
    with pytest.raises(ValueError, match="the task 'b' has no data: there is no source 'other'"):
        metric.dataset_meta = dict(sources=dict(a={}))
    for tasks, error in (({}, ValueError), ([], TypeError), (dict(type='Accuracy'), TypeError)):
        with pytest.raises(error, match='tasks'):
            TaskMetrics(tasks)
    with pytest.raises(ValueError, match="no task 'c'"):
        TaskMetrics(dict(a=dict(type='Accuracy')), data=dict(c='a'))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
def test_a_mixed_run_resumes_bit_for_bit(tmp_path):
    """Stopped at an epoch boundary and inside an epoch; with a worker, dropout and experts."""
    options = dict(weights=dict(clouds=1, images=1), workers=1)
    train(mixed_config(tmp_path / 'whole', **options))
    cfg = mixed_config(tmp_path / 'a', **options)
    train(cfg, stop_after=1)
    torch.manual_seed(7)
    runner = train({**cfg, 'resume': True})
    assert_same_run(tmp_path / 'whole', tmp_path / 'a', 2)
    assert {'clouds/OA', 'images/OA'} <= set(runner.last_metrics)
    assert runner.train_dataloader.batch_sampler.sampler.epoch == 1  # told by the hook: epochs differ
    cfg = mixed_config(tmp_path / 'b', **options)
    cfg['custom_hooks'] = [dict(type='CheckpointHook', interval=5, by_epoch=False)]
    train(cfg, stop_after=6, stop_in='after_train_iter')
    torch.manual_seed(8)
    train({**cfg, 'resume': True})
    states = [read_checkpoint(tmp_path / name / 'epoch_2.pth') for name in ('whole', 'b')]
    for key in ('state_dict', 'rng'):
        assert same(states[0][key], states[1][key]), key


def test_a_task_without_data_is_an_error_before_training(tmp_path):
    cfg = mixed_config(tmp_path)
    del cfg['train_dataloader']['dataset']['sources']['images']
    with pytest.raises(ValueError, match=r"model.tasks.images has no data: the train data have no source 'images'"):
        Runner.from_cfg(cfg)
