"""timm's vision transformers behind the calls of our backbones."""
import functools
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ewa3d.checks import some
from ewa3d.layers.image_tokens import grid_coordinates, images_of
from ewa3d.models.backbone import block_numbers
from ewa3d.models.weights import state_dict_of
from ewa3d.registry import MODELS, nearest
from ewa3d.structures import Tokens

__all__ = ['TimmBackbone', 'from_torchvision', 'timm_weights']


@MODELS.register_module()
class TimmBackbone(nn.Module):
    """A model of timm as a backbone: ViT, DeiT, BEiT, EVA, Swin and others that turn patches into tokens.

    Its parameters have timm's own names (``backbone.blocks.0.mlp.fc1.weight``), so rules of ``expand`` mean the same
    blocks as in a ``TokenEncoder``, and the state dict of this module, fused, is that of
    ``timm.create_model(name, num_classes=0)``; :func:`timm_weights` adds the classifier.

    Args:
        name: as in ``timm.create_model``, of an architecture, without weights: nothing is downloaded.
        checkpoint: a local ``.safetensors`` or ``.pth`` in timm's or torchvision's layout; positions, relative ones
            too, and patches are resized to this model's. A classifier in it is left out.
        pool: give what the model's own head would take, ``(B, embed_dim)`` (no neck is needed then), instead of tokens.
        **kwargs: to ``timm.create_model``: ``img_size``, ``drop_path_rate``, ….

    Shape:
        - ``inputs['img']`` (or a tensor) ``(B, C, H, W)``; returns ``(B, num_prefix_tokens + L, embed_dim)``, after
          the final norm, or with ``pool`` ``(B, embed_dim)``.

    Raises:
        ValueError: a name or a tag that timm does not have, weights of another architecture, a model that is no
            transformer on patches or gives no tokens. NotImplementedError: ``out_indices`` of a model whose blocks timm
            cannot give one by one.
        FileNotFoundError: there is no such checkpoint. TypeError: a keyword that the model does not take.
    """

    def __init__(self, name: str, checkpoint: str | Path | None = None, pool: bool = False, **kwargs):
        super().__init__()
        model = create(name, kwargs)
        # One module with timm's parts as its own: the two share the dictionaries of what is registered.
        self.__dict__['model'] = model
        for shared in ('_parameters', '_buffers', '_modules', '_non_persistent_buffers_set'):
            self.__dict__[shared] = model.__dict__[shared]
        self.name, self.pooled = name, bool(pool)
        self.num_prefix_tokens = 0 if pool else getattr(model, 'num_prefix_tokens', 0)
        self.embed_dim = getattr(model, 'head_hidden_size', model.num_features) if pool else model.num_features
        if checkpoint is not None:
            self.load(checkpoint)

    def train(self, mode: bool = True):
        self.model.training = mode
        return super().train(mode)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that the model's authors did not decay."""
        return set(self.model.no_weight_decay()) if hasattr(self.model, 'no_weight_decay') else set()

    def init_weights(self) -> None:
        """Nothing: timm's constructors initialise. mmengine would call timm's method and wipe loaded weights."""

    # ---- calls of a backbone ----------------------------------------------------------------------------------------
    def forward(self, inputs: Mapping | Tensor, out_indices: Sequence[int] = ()):
        """Tokens after the final norm, or with ``out_indices`` a tuple of what these blocks (a Swin's: stages) give,
        each ``(B, num_prefix_tokens + L, C)``; a stage may have another width and number of tokens."""
        img = self._images(inputs)
        if out_indices:
            return self._intermediates(img, out_indices)
        x = self.model.forward_features(img)
        return self.model.forward_head(x, pre_logits=True) if self.pooled else tokens_of(x, self.embed_dim, self.name)

    def tokenize(self, inputs: Mapping | Tensor) -> Tokens:
        """Patch tokens and their positions, without prefix tokens; plain ViTs only (see :meth:`encode`)."""
        model = self._plain_vit('tokenize')
        x = model.patch_embed(self._images(inputs))
        grid = tuple(x.shape[1:3]) if x.ndim == 4 else model.patch_embed.grid_size  # 4: dynamic_img_size
        x = x.flatten(1, -2)  # (B, L, C)
        pos = torch.zeros_like(x[:1]) if model.pos_embed is None else \
            model.pos_embed if model.no_embed_class else model.pos_embed[:, model.num_prefix_tokens:]
        if pos.shape[1] != x.shape[1]:
            pos = _resized(pos, grid, model.patch_embed.grid_size)
        coord = grid_coordinates(grid).to(x)
        return Tokens(x, pos.expand(x.shape[0], -1, -1), coord.expand(x.shape[0], -1, -1))

    def encode(self, x: Tensor, pos: Tensor, out_indices: Sequence[int] = (), norm: bool = True,
               prefix_pos: Tensor | None = None):
        """Features of tokens ``x`` at ``pos``, of all patches or of some; see :meth:`TokenEncoder.encode`.

        Raises:
            NotImplementedError: a model whose blocks need more than the tokens (windows, rotary positions).
            ValueError: a block number that does not exist or occurs twice.
        """
        model = self._plain_vit('encode')
        wanted = block_numbers(len(model.blocks), out_indices)
        x = x + pos
        prefix = [token for token in (model.cls_token, model.reg_token, getattr(model, 'dist_token', None))
                  if token is not None]
        if prefix:
            prefix = torch.cat(prefix, 1)
            if model.pos_embed is not None and not model.no_embed_class:
                prefix = prefix + model.pos_embed[:, :prefix.shape[1]]
            prefix = prefix if prefix_pos is None else prefix + prefix_pos
            x = torch.cat([prefix.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
        x = model.norm_pre(model.pos_drop(x))
        outputs = {}
        for i, block in enumerate(model.blocks):
            x = block(x)
            if i in wanted:
                outputs[i] = model.norm(x) if norm else x
        return tuple(outputs[i] for i in wanted) if wanted else model.norm(x) if norm else x

    def _plain_vit(self, what: str) -> nn.Module:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import VisionTransformer
        if type(self.model) not in (VisionTransformer, VisionTransformerDistilled):
            raise NotImplementedError(f'{self.name} ({type(self.model).__name__}) has no {what}(): its blocks need '
                                      'more than tokens (windows, rotary or relative positions); call the backbone '
                                      'itself')
        return self.model

    def _images(self, inputs: Mapping | Tensor) -> Tensor:
        """The images, if the model takes such."""
        img, patches = images_of(inputs), getattr(self.model, 'patch_embed', None)
        # the first convolution sees the image: that of the patches, or of a hybrid's convolutional network
        first = next((m for m in patches.modules() if isinstance(m, nn.Conv2d)), None) if patches is not None else None
        channels = img.shape[1] if first is None else first.in_channels
        strict = getattr(patches, 'strict_img_size', False) and patches.img_size is not None
        size = tuple(patches.img_size if strict else img.shape[2:])
        if img.shape[1:] != (channels, *size):
            raise ValueError(f'{self.name} takes images (B, {channels}, {size[0]}, {size[1]}), got {tuple(img.shape)}; '
                             "the pipeline resizes them, img_size and in_chans are the backbone's")
        return img

    def _intermediates(self, img: Tensor, out_indices: Sequence[int]) -> tuple[Tensor, ...]:
        if not hasattr(self.model, 'forward_intermediates'):
            raise NotImplementedError(f'{self.name} ({type(self.model).__name__}) has no forward_intermediates in '
                                      'timm, so out_indices cannot be given')
        wanted = block_numbers(len(getattr(self.model, stages_of(self.model))), out_indices)
        options = dict(indices=sorted(wanted), norm=True, intermediates_only=True)
        if 'return_prefix_tokens' in inspect.signature(self.model.forward_intermediates).parameters:
            options.update(output_fmt='NLC', return_prefix_tokens=True)
        try:
            found = self.model.forward_intermediates(img, **options)
        except (AssertionError, UnboundLocalError) as error:  # what timm has not written for this architecture
            raise NotImplementedError(f'{self.name} ({type(self.model).__name__}): timm gives no normalised tokens of '
                                      f'single blocks, so out_indices cannot be given ({error})') from error
        if self.num_prefix_tokens and any(isinstance(features, Tensor) for features in found):
            raise NotImplementedError(f'{self.name} ({type(self.model).__name__}): timm gives the patches of single '
                                      'blocks without the class token, so out_indices cannot be given')
        found = dict(zip(sorted(wanted), found))
        return tuple(_joined(found[i]) for i in wanted)

    # ---- weights ----------------------------------------------------------------------------------------------------
    def load(self, checkpoint: str | Path | Mapping) -> None:
        """Load plain weights in timm's or torchvision's layout; nothing is changed where they do not fit.

        Raises:
            FileNotFoundError, ValueError: no such file, or weights of another architecture.
        """
        name = str(checkpoint) if isinstance(checkpoint, (str, Path)) else 'the given weights'
        state = from_torchvision(state_dict_of(checkpoint, name))
        if any(key.startswith('backbone.') for key in state):
            raise ValueError(f'{name} holds a whole model of ewa3d (backbone.…): give it to the model, as pretrained=; '
                             "checkpoint= takes timm's or torchvision's layout")
        heads = tuple(f'{name}.' for name in {*classifiers_of(self.model), 'head_dist'})
        state = {key: value for key, value in state.items() if not key.startswith(heads)}
        convert = getattr(sys.modules[type(self.model).__module__], 'checkpoint_filter_fn', None)
        own = self.model.state_dict()
        try:
            state = convert(dict(state), self.model) if convert else state
        except (RuntimeError, ValueError, AttributeError, KeyError, IndexError, TypeError, AssertionError) as error:
            raise ValueError(f'{name} holds the weights of another architecture than {self.name}: {error}') from error
        state = {key: value for key, value in state.items() if not key.startswith(heads)}
        missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
        shapes = [f'{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}'
                  for key in own if key in state and state[key].shape != own[key].shape]
        if missing or unexpected or shapes:
            raise ValueError(f'{name} holds the weights of another architecture than {self.name}: '
                             f'not in it: {some(missing, 4)}; not in the model: {some(unexpected, 4)}; of another '
                             f'shape: {some(shapes, 3)}')
        self.model.load_state_dict(state)


def create(name: str, kwargs: dict) -> nn.Module:
    """timm's model without weights and without a classifier."""
    import timm
    from timm.models import is_model, list_models
    if not isinstance(name, str) or name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) or '/' in name:
        raise ValueError(f'TimmBackbone: name={name!r}; the name of an architecture in timm was expected, weights are '
                         'given as a local file with checkpoint=')
    if not is_model(name.split('.')[0]):
        raise ValueError(f'TimmBackbone: timm {timm.__version__} has no model {name!r}; '
                         f'{nearest(name.split(".")[0], list_models())}')
    refused = sorted(kwargs.keys() & {'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path',
                                      'cache_dir', 'num_classes'})
    if refused:
        raise TypeError(f'TimmBackbone takes no {refused[0]}: weights are a local file (checkpoint=), the classifier '
                        'is the head of the model')
    architecture, _, tag = name.partition('.')
    tags = [known.partition('.')[2] for known in list_models(f'{architecture}.*', pretrained=True)]
    if tag and tag not in tags:
        raise ValueError(f'TimmBackbone: timm {timm.__version__} has no weights {tag!r} of {architecture}; '
                         f'{nearest(tag, tags)} (the tag may be left out: weights are given with checkpoint=)')
    try:
        model = timm.create_model(architecture, pretrained=False, num_classes=0, **kwargs)
    except TypeError as error:
        raise TypeError(f'TimmBackbone: {name}: {error}') from error
    if not (hasattr(model, 'patch_embed') or hasattr(model, 'embeds')) or stages_of(model) is None:
        raise ValueError(f'TimmBackbone: {name} ({type(model).__name__}) is not built as embedded patches and blocks, '
                         'layers or stages behind them; ViT-like models such as vit_small_patch16_224, '
                         'deit_small_patch16_224, eva02_tiny_patch14_224 or swin_tiny_patch4_window7_224 were expected')
    return model


def stages_of(model: nn.Module) -> str | None:
    """The name of what a timm model runs one after another."""
    return next((name for name in ('blocks', 'layers', 'stages') if hasattr(model, name)), None)


def tokens_of(x: Tensor, width: int, name: str) -> Tensor:
    """What ``forward_features`` gave, as ``(B, L, width)``; a Swin's is ``(B, H, W, width)``, SAM's channels first."""
    if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == width != x.shape[-1]:
        x = x.permute(0, 2, 3, 1)
    if not isinstance(x, Tensor) or x.ndim not in (3, 4) or x.shape[-1] != width:
        raise ValueError(f'TimmBackbone: {name} gives no tokens (B, L, C), but '
                         f'{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}')
    return x.flatten(1, 2) if x.ndim == 4 else x


def _resized(pos: Tensor, grid: tuple[int, int], own: tuple[int, int]) -> Tensor:
    """Positions of a grid ``own`` for another, as timm resizes them, ``(1, L, C)``."""
    from timm.layers import resample_abs_pos_embed
    return resample_abs_pos_embed(pos, grid, own, num_prefix_tokens=0)


def _joined(features) -> Tensor:
    """Tokens of an intermediate: ``(tokens, prefix)``, tokens alone, or a map ``(B, C, H, W)``; as ``(B, L, C)``."""
    if isinstance(features, (tuple, list)):
        return torch.cat([features[1], features[0]], 1)
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def classifiers_of(model: nn.Module) -> tuple[str, ...]:
    """Where a timm model keeps its classifier, or its two: ``head``, ``head.fc``, ``head_dist``."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or 'head'
    return (names,) if isinstance(names, str) else tuple(names)


def timm_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a fused ``TaskModel`` with a ``TimmBackbone``, for ``timm.create_model(name, num_classes=…)`` and
    ``load_state_dict(strict=True)``: with the classifier where the head is linear and sees what timm's own would, else
    without (``num_classes=0``). Both classifiers of a distilled model, whose mean it gives, are the head.

    Raises:
        ValueError: another backbone, or experts that were not fused.
    """
    from ewa3d.layers.experts import iter_experts
    backbone = getattr(model, 'backbone', model)
    if not isinstance(backbone, TimmBackbone):
        raise ValueError(f'timm_weights: the backbone is a {type(backbone).__name__}, a TimmBackbone was expected')
    experts = next(iter_experts(backbone), None)
    if experts is not None:
        raise ValueError(f'timm_weights: {experts[0]} still has experts; ewa3d.fuse(model) first')
    state = dict(backbone.state_dict())
    layers = getattr(getattr(model, 'head', None), 'layers', None)
    if layers is not None and len(layers) == 1 and pools_as_timm(backbone, model.neck):
        for name in classifiers_of(backbone.model):
            state.update({f'{name}.{key}': value for key, value in layers[0].state_dict().items()})
    return state


def pools_as_timm(backbone: TimmBackbone, neck: nn.Module | None) -> bool:
    """Whether the head gets what the timm model would give its classifier: the model pools, or the neck and the model
    both take the class token, or the mean of the patches, as it is."""
    if neck is None:
        return backbone.pooled
    timms = backbone.model
    alike = dict(token=['cls'], avg=['mean']).get(getattr(timms, 'global_pool', None))
    return alike is not None and getattr(neck, 'parts', None) == alike \
        and getattr(timms, 'dist_token', None) is None and isinstance(getattr(timms, 'fc_norm', None), nn.Identity)


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's names
# ---------------------------------------------------------------------------------------------------------------------
_VIT = ((r'^class_token$', 'cls_token'), (r'^conv_proj\.', 'patch_embed.proj.'),
        (r'^encoder\.pos_embedding$', 'pos_embed'), (r'^encoder\.layers\.encoder_layer_(\d+)\.', r'blocks.\1.'),
        (r'\.ln_(\d)\.', r'.norm\1.'), (r'\.self_attention\.in_proj_', '.attn.qkv.'),
        (r'\.self_attention\.out_proj\.', '.attn.proj.'), (r'\.mlp\.(0|linear_1)\.', '.mlp.fc1.'),
        (r'\.mlp\.(3|linear_2)\.', '.mlp.fc2.'), (r'^encoder\.ln\.', 'norm.'), (r'^heads\.head\.', 'head.'))
_SWIN = ((r'^features\.0\.0\.', 'patch_embed.proj.'), (r'^features\.0\.2\.', 'patch_embed.norm.'),
         (r'\.mlp\.0\.', '.mlp.fc1.'), (r'\.mlp\.3\.', '.mlp.fc2.'), (r'^head\.', 'head.fc.'))


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of torchvision's ViT, Swin or Swin V2 under timm's names; others as they are."""
    if any(key.startswith('encoder.layers.encoder_layer_0.') for key in state):
        return {_substituted(key, _VIT): value for key, value in state.items()}
    if any(key.startswith('features.1.0.attn.') for key in state):
        state = {_substituted(_swin_stage(key), _SWIN): value for key, value in state.items()}
        return _split_bias(state) if any(key.endswith('.attn.logit_scale') for key in state) else state
    return dict(state)


def _split_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of Swin V2: timm has no bias of the keys, and torchvision has one that it sets to zero."""
    split = {}
    for key, value in state.items():
        if key.endswith('.attn.qkv.bias'):
            stem = key.removesuffix('qkv.bias')
            split[f'{stem}q_bias'], _, split[f'{stem}v_bias'] = value.chunk(3)
        else:
            split[key] = value
    return split


def _substituted(key: str, table: tuple[tuple[str, str], ...]) -> str:
    return functools.reduce(lambda name, pair: re.sub(*pair, name), table, key)


def _swin_stage(key: str) -> str:
    """torchvision counts stages and the reductions between them: 1, 3, … are timm's 0, 1, …; 2 is a part of 1."""
    found = re.match(r'features\.(\d+)\.(.*)', key)
    if not found or found[1] == '0':
        return key
    number, rest = int(found[1]), found[2]
    return f'layers.{number // 2}.blocks.{rest}' if number % 2 else f'layers.{number // 2}.downsample.{rest}'
