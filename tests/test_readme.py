"""Training loops of the README and of docs/ do what they say; those of other libraries where these are installed.

That all blocks run is seen to by ``test_doc_blocks.py``.
"""
import functools
import re
from pathlib import Path

import pytest
import timm
import torch

from ewa3d.layers.experts import iter_experts

ROOT = Path(__file__).resolve().parents[1]
README, LOOPS = ROOT / 'README.md', ROOT / 'docs' / 'training_loops.md'


def example(file: Path, mark: str) -> str:
    """The example in Python that has ``mark`` in it."""
    blocks = re.findall(r'```python\n(.*?)```', file.read_text(encoding='utf-8'), re.DOTALL)
    return next(block for block in blocks if mark in block)


@pytest.fixture
def tiny_vit(tmp_path, monkeypatch):
    """timm makes a tiny model of every name, and files go into a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, 'create_model', functools.partial(
        timm.create_model, img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2))


def test_five_lines_for_a_timm_model(tmp_path, monkeypatch):
    code = example(README, "timm.create_model('vit_small_patch16_224'")
    assert sum('ewa3d' in line.split('#')[0] for line in code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    namespace = dict(loader=[(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))] * 2)
    exec(code, namespace)
    plain = timm.create_model('vit_small_patch16_224', num_classes=10)
    before = plain.blocks[1].mlp.fc1.weight.clone()
    plain.load_state_dict(torch.load('vit.pth', weights_only=True), strict=True)
    assert not torch.equal(plain.blocks[1].mlp.fc1.weight, before)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(plain.eval()(x), namespace['model'].eval()(x))


def test_lightning(tiny_vit):
    lightning = pytest.importorskip('lightning')
    code = example(LOOPS, 'lightning.LightningModule')
    made, fit = code.split('lightning.Trainer(')[0], code[code.index('ewa3d.fuse'):]
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8))
    namespace = dict(loader=torch.utils.data.DataLoader(data, batch_size=2))
    options = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_checkpointing=False,
                   accumulate_grad_batches=2)
    trainer = lightning.Trainer(max_epochs=1, **options)
    exec(made, namespace)
    trainer.fit(namespace['module'], namespace['loader'])
    assert namespace['module'].ewa.step == trainer.global_step == 2
    trainer.save_checkpoint('half.ckpt')
    exec(made, namespace)
    lightning.Trainer(max_epochs=2, **options).fit(namespace['module'], namespace['loader'], ckpt_path='half.ckpt')
    assert namespace['module'].ewa.step == 4 and namespace['module'].ewa.rate == 0.3
    exec(fit, namespace)
    assert not list(iter_experts(namespace['module']))


def test_hugging_face_trainer(tiny_vit):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    code = example(LOOPS, 'transformers.TrainerCallback')
    namespace = dict(dataset=[dict(pixel_values=torch.randn(3, 16, 16), labels=i) for i in range(8)])
    for epochs in (1, 2):  # the second goes on from the first
        namespace['args'] = transformers.TrainingArguments(
            'run', per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=epochs, use_cpu=True,
            report_to='none', save_strategy='epoch', disable_tqdm=True)
        exec(code.replace('.train()', f'.train(resume_from_checkpoint={epochs == 2})'), namespace)
        assert namespace['callback'].ewa.step == 2 * epochs and namespace['callback'].ewa.rate == 0.3
    assert not list(iter_experts(namespace['model']))
