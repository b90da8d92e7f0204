"""Norms of which each modality has its own."""
from collections.abc import Iterable

from torch import Tensor, nn

__all__ = ['ModalityNorm', 'select_modality']


class ModalityNorm(nn.ModuleDict):
    """A norm for each modality in the place of one; :func:`select_modality` says which one works.

    Weights of the one norm load into all of them.

    Shape:
        - as the norm's.
    """

    def __init__(self, norms: dict[str, nn.Module]):
        super().__init__(norms)
        self.active = next(iter(norms))

    def forward(self, x: Tensor) -> Tensor:
        return self[self.active](x)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in next(iter(self.values())).state_dict():
            if prefix + key in state_dict:
                value = state_dict.pop(prefix + key)
                state_dict.update({f'{prefix}{name}.{key}': value for name in self})
        super()._load_from_state_dict(state_dict, prefix, *args)


def select_modality(modules: Iterable[nn.Module], modality: str) -> None:
    """Let the norms of ``modality`` work in all ``modules`` that have some of their own."""
    for module in modules:
        if isinstance(module, ModalityNorm):
            module.active = modality
