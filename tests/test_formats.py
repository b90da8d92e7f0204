"""Upgrades: checkpoints of every format version there was are read, those of a newer one say what to do.

A new version comes with its fixture (tests/formats/make.py) and keeps the older ones.
"""
import shutil

import pytest
import torch
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from formats import make

from ewa3d.engine import checkpoint
from ewa3d.engine.checkpoint import FORMAT_VERSION, read_checkpoint, select_weights, write_checkpoint
from ewa3d.engine.plain import to_plain
from ewa3d.engine.runner import Runner

VERSIONS = range(1, FORMAT_VERSION + 1)


@pytest.mark.parametrize('version', VERSIONS)
def test_a_checkpoint_of_every_version_is_read(version):
    found, parts = read_checkpoint(make.FOLDER / f'v{version}.pth'), make.content()
    assert found.pop('format_version') == version and len(found.pop('checksum')) == 64
    assert found.keys() == parts.keys()
    for key, value in parts.items():
        assert same(found[key], to_plain(value) if key == 'meta' else value), key
    weights, kind = select_weights(found)
    assert kind == 'ema' and same(weights, parts['state_dict'])
    assert same(select_weights(found, 'raw')[0]['mask'], parts['ema_state_dict']['module.mask'])


@pytest.mark.parametrize('version', VERSIONS)
def test_weights_of_every_version_are_read(version):
    found, parts = read_checkpoint(make.FOLDER / f'v{version}.safetensors'), make.content()
    assert found['format_version'] == version and same(found['state_dict'], parts['state_dict'])
    assert found['meta'] == to_plain(parts['meta'])


def test_the_fixtures_are_small_and_are_what_the_script_writes(tmp_path, monkeypatch):
    files = sorted(make.FOLDER.glob('v*'))
    assert len(files) == 2 * FORMAT_VERSION and all(file.stat().st_size < 10_000 for file in files)
    monkeypatch.setattr(make, 'FOLDER', tmp_path)
    make.main()
    for suffix in ('pth', 'safetensors'):
        name = f'v{FORMAT_VERSION}.{suffix}'
        assert same(read_checkpoint(tmp_path / name), read_checkpoint(files[0].with_name(name)))


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_newer_one_says_so_and_what_to_do(tmp_path, monkeypatch, suffix):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'FORMAT_VERSION', FORMAT_VERSION + 1)
        path = write_checkpoint(tmp_path / f'x.{suffix}', make.content()['state_dict'])
    with pytest.raises(ValueError, match=rf'x\.{suffix} has format version {FORMAT_VERSION + 1}, .* up to '
                                         rf'{FORMAT_VERSION}; .* newer release.*pip install --upgrade ewa3d'):
        read_checkpoint(path)


def test_files_from_before_there_were_versions(tmp_path):
    """Weights as torch or mmengine saves them load; a run does not go on from them, and says so."""
    cfg = toy_config(tmp_path / 'run', epochs=1)
    runner = Runner.from_cfg(cfg)
    weights = {k: v + 1 if v.is_floating_point() else v for k, v in runner.model.state_dict().items()}
    for name, content in (('plain', weights), ('mmengine', dict(meta=dict(epoch=1), state_dict=weights))):
        torch.save(content, tmp_path / f'{name}.pth')
        runner.load_checkpoint(tmp_path / f'{name}.pth')
        assert same(dict(runner.model.state_dict()), weights)
    with pytest.raises(ValueError, match='holds weights but no training state'):
        Runner.from_cfg(dict(cfg, resume=str(tmp_path / 'mmengine.pth'))).train()


def test_a_run_goes_on_from_a_checkpoint_that_records_no_data(tmp_path):
    """As those of before fingerprints were recorded."""
    cfg = toy_config(tmp_path, epochs=2)
    Runner.from_cfg(dict(cfg, train_cfg=dict(by_epoch=True, max_epochs=1))).train()
    path = tmp_path / 'epoch_1.pth'
    content = read_checkpoint(path)
    for key in ('format_version', 'checksum'):
        content.pop(key)
    for key in ('data', 'git'):
        content['meta'].pop(key)
    shutil.move(path, tmp_path / 'whole.pth')
    write_checkpoint(path, **content)
    runner = Runner.from_cfg(dict(cfg, resume=True))
    runner.train()
    assert runner.epoch == 2 and 'data are not those' not in (tmp_path / 'train.log').read_text()
