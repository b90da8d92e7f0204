"""The quickstart on tiny configs: its numbers are those of an independent evaluation, and a second run repeats them."""
import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from ewa3d import quickstart

REPO = Path(__file__).resolve().parents[1]
PLAIN = """
_base_ = [{base!r}]
pipeline = [dict(type='Normalize'), dict(type='Resample', num_points=48, method='random'), dict(type='Pack')]
model = dict(
    backbone=dict(tokenizer=dict(num_groups=8, group_size=8, embed_dim=16, widths=(8, 8, 16)), embed_dim=16, depth=2,
                  num_heads=2),
    head=dict(hidden=16))
train_dataloader = dict(batch_size=16, dataset=dict(num_samples=64, num_points=64, pipeline=pipeline))
test_dataloader = val_dataloader = dict(batch_size=16, dataset=dict(num_samples=40, num_points=64, pipeline=pipeline))
train_cfg = dict(max_epochs=2, val_interval=1)
"""
EWA = """
_base_ = ['plain.py', {overlay!r}]
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
"""


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('configs')
    (folder / 'plain.py').write_text(PLAIN.format(base=str(REPO / 'configs/quickstart/plain.py')))
    (folder / 'ewa.py').write_text(EWA.format(overlay=str(REPO / 'configs/_base_/reparam/ewa.py')))
    return [str(folder / 'plain.py'), str(folder / 'ewa.py')]


@pytest.fixture(scope='module')
def finished(configs, tmp_path_factory):
    """A quickstart that was run twice into the same folder: the folder, the results of both runs, the console."""
    work_dir = tmp_path_factory.mktemp('runs').resolve() / 'quick'
    results, console = [], io.StringIO()
    for _ in range(2):
        with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
            assert quickstart.main(['--work-dir', str(work_dir), '--seed', '3', '--debug', '--configs', *configs]) == 0
        results.append(json.loads((work_dir / 'results.json').read_text()))
    return work_dir, results, console.getvalue()


def numbers(results):
    return [{k: v for k, v in row.items() if k != 'ms_per_batch'} for row in results['rows']]


def test_a_second_run_with_the_same_seed_gives_the_same_numbers(finished):
    _, (first, second), _ = finished
    assert numbers(first) == numbers(second)


def test_the_table_says_what_an_evaluation_gives(finished, configs):
    """The fused checkpoint, read by the plain config, judged by hand."""
    from mmengine.config import Config

    from ewa3d import build
    from ewa3d.registry import DATASETS
    work_dir, (results, _), _ = finished
    model = build(configs[0], str(work_dir / 'ewa' / 'fused.pth'), num_classes=results['classes']).eval()
    data = DATASETS.build(Config.fromfile(configs[0]).test_dataloader.dataset)
    items = [data[i] for i in range(len(data))]
    with torch.no_grad():
        logits = model(dict(points=torch.stack([item['inputs']['points'] for item in items])))
    labels = torch.tensor([int(item['data_samples'].gt_label) for item in items])
    right = logits.argmax(1) == labels
    by_class = [right[labels == c].double().mean() for c in labels.unique()]
    fused = results['rows'][2]
    assert fused['OA'] == pytest.approx(100 * right.double().mean().item())
    assert fused['mAcc'] == pytest.approx(100 * torch.stack(by_class).mean().item())


def test_fusing_changes_the_size_and_nothing_else(finished):
    _, (results, _), _ = finished
    plain, expanded, fused = results['rows']
    assert [row['model'] for row in results['rows']] == ['plain', 'EWA (expanded)', 'EWA fused']
    assert 0 <= fused['max_output_difference'] < 1e-5
    assert (fused['OA'], fused['mAcc']) == (expanded['OA'], expanded['mAcc'])
    assert plain['parameters_training'] == plain['parameters_deployed'] == fused['parameters_deployed']
    ffn = 16 * 64 + 64 + 64 * 16 + 16  # every second of 2 blocks, 4 experts: 3 more FFNs
    assert fused['parameters_training'] == expanded['parameters_deployed'] == plain['parameters_training'] + 3 * ffn
    assert all(row['ms_per_batch'] > 0 for row in results['rows'])


def test_files(finished):
    from matplotlib.image import imread
    work_dir, (_, results), _ = finished
    for name in ('predictions.png', 'curves.png', 'confusion.png'):
        image = imread(work_dir / name)[..., :3]
        assert min(image.shape[:2]) > 200 and image.min() < 0.5 < image.mean()
    assert (work_dir / 'results.md').read_text() == quickstart.table(results) + '\n'
    assert all(Path(path).is_file() for path in results['checkpoints'].values())


def test_the_console_is_short_and_names_the_files(finished):
    work_dir, _, console = finished
    assert console.count('At most 5 minutes') == console.count('| EWA fused') == 2
    assert all(console.count(str(work_dir / name)) == 2 for name in quickstart.PRODUCTS)
    assert len(console.splitlines()) < 2 * 30 and 'arning' not in console


def test_a_fusion_that_changes_the_model_ends_it(configs, tmp_path, monkeypatch, capsys):
    def refuse(checkpoint, out):
        return fuse_checkpoint(checkpoint, out, tolerance=-1.)
    fuse_checkpoint = quickstart.fuse_checkpoint
    monkeypatch.setattr(quickstart, 'fuse_checkpoint', refuse)
    assert quickstart.main(['--work-dir', str(tmp_path / 'q'), '--configs', *configs]) == 2
    assert 'changed the model' in capsys.readouterr().err
    assert not (tmp_path / 'q' / 'results.json').exists() and not (tmp_path / 'q' / 'ewa' / 'fused.pth').exists()


def test_threads_are_given_back(configs, tmp_path, capsys):
    before = torch.get_num_threads()
    assert quickstart.main(['--work-dir', str(tmp_path / 'q'), '--threads', '2', '--configs', 'a.py', 'b.py']) == 2
    assert torch.get_num_threads() == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / 'thesis.tex').write_text('years')
    assert quickstart.main(['--work-dir', str(tmp_path)]) == 2
    assert 'choose another --work-dir' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']
    assert quickstart.main(['--work-dir', str(tmp_path / 'thesis.tex')]) == 2
    assert 'is a file' in capsys.readouterr().err


def test_an_own_folder_is_emptied_of_results_only(tmp_path):
    folder = quickstart.claim(tmp_path / 'a' / 'b')
    for name in ('results.json', 'notes.txt', 'plain/epoch_1.pth', 'mine/data.txt'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert quickstart.claim(folder) == folder
    left = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())
    assert left == sorted([quickstart.MARKER, 'notes.txt', 'mine/data.txt'])


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert quickstart._configs(None) == {n: REPO / 'configs' / 'quickstart' / f'{n}.py' for n in ('plain', 'ewa')}
    assert quickstart.main(['--configs', 'no.py', 'nor.py']) == 2
    assert f'no config {tmp_path / "no.py"}' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('argv', [['--threads', '0'], ['--seed', '-1'], ['--configs', 'one.py'], ['--epochs', '3']])
def test_bad_command_lines(argv, capsys):
    with pytest.raises(SystemExit) as error:
        quickstart.main(argv)
    assert error.value.code == 2 and 'error' in capsys.readouterr().err
