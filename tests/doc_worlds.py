"""What a page of the documentation takes for granted: files in the working directory, names of Python."""
import functools
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from doc_blocks import Page
from official_detr import checkpoint as official_detr

import ewa3d
from ewa3d.datasets.io import import_open3d
from ewa3d.engine.checkpoint import write_checkpoint

__all__ = ['WORLDS']


def tiny_vits(monkeypatch) -> None:
    """timm makes a tiny model of every name."""
    monkeypatch.setattr(timm, 'create_model', functools.partial(
        timm.create_model, img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2))


def readme(page: Page, monkeypatch) -> None:
    tiny_vits(monkeypatch)
    model = ewa3d.build('point-mae_xs_scratch_modelnet10-1k', num_classes=10)
    write_checkpoint('fused.pth', model.state_dict(), dict(dataset_meta=dict(classes=list('abcdefghij'))))
    np.save('chair.npy', np.random.rand(1500, 3))
    page.names['loader'] = [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))] * 2


def vits(page: Page, monkeypatch) -> None:
    tiny_vits(monkeypatch)


def detection(page: Page, monkeypatch) -> None:
    torch.save(official_detr(masked=True), 'scannet_masked_ep1080.pth')
    page.names['points'] = torch.rand(2, 300, 3)


def relatives(page: Page, monkeypatch) -> None:
    tiny_vits(monkeypatch)
    page.names.update(images=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1]), token=torch.randn(1, 64),
                      criterion=torch.nn.functional.cross_entropy)


def vit(page: Page, monkeypatch) -> None:
    tiny_vits(monkeypatch)
    model = ewa3d.build('vit/vit_s_ft_folder_ewa', num_classes=10)
    write_checkpoint('epoch_50.pth', model.state_dict(), {})


def pictures(page: Page, monkeypatch) -> None:
    page.names.update(paths=['a', 'b'], read=str)


def small(page: Page, monkeypatch) -> None:
    """One epoch on a few samples."""
    smaller = {'max_epochs=60': 'max_epochs=1', 'epoch_60': 'epoch_1', "('train', 40)": "('train', 12)",
               "('test', 10)": "('test', 2)", "('val', 8)": "('val', 2)", 'num_queries=96': 'num_queries=12',
               'num_points=1024': 'num_points=256', 'num_points=8192': 'num_points=1024'}

    def change(text: str) -> str:
        for old, new in smaller.items():
            text = text.replace(old, new)
        return text

    page.change = change


def clouds(page: Page, monkeypatch) -> None:
    try:
        import_open3d()
    except ImportError as error:
        pytest.skip(str(error))
    small(page, monkeypatch)


WORLDS: dict[str, Callable[[Page, object], None]] = {
    'README.md': readme,
    'docs/concepts.md': vits,
    'docs/extending.md': vits,
    'docs/faq.md': vits,
    'configs/detection/README.md': detection,
    'configs/relatives/README.md': relatives,
    'configs/vit/README.md': vit,
    'docs/pictures.md': pictures,
    'docs/tutorial_boxes.md': small,
    'docs/tutorial_classification.md': clouds,
    'docs/tutorial_parts.md': clouds,
}
