"""The discrete point tokenizer that Point-BERT predicts: patches to codes of a learnt vocabulary, and back."""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import broadcast
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import Pointwise
from ewa3d.layers.dgcnn import DGCNN
from ewa3d.layers.tokenizers import PatchEncoder, group_points, points_of
from ewa3d.models.base import ExpandableModel, check_mode
from ewa3d.ops import neighbours
from ewa3d.ops.chamfer import chamfer_distance
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

__all__ = ['DiscreteVAE', 'FoldingDecoder', 'code_usage', 'count_codes', 'gumbel_softmax', 'kl_from_uniform']

FOLD = 4  # fine points of each coarse one, on a grid of 2 × 2


class FoldingDecoder(nn.Module):
    """A patch from its feature: coarse points by an MLP, and around each a small grid that a second MLP bends.

    The first layer of the second MLP sees ``[feature, grid, coarse point]``; its weight is kept as published and used
    in three parts, so that the feature's is computed once a patch and not once a point.

    Args:
        group_size: fine points of a patch, a multiple of 4.
        widths: hidden widths of the first and of the second MLP.

    Shape:
        - ``(B, G, in_channels)`` to coarse ``(B, G, group_size / 4, 3)`` and fine ``(B, G, group_size, 3)``, in local
          coordinates.

    Raises:
        TypeError, ValueError: a ``group_size`` that is no multiple of 4, widths that are not two positive integers.
    """

    def __init__(self, in_channels: int, group_size: int, widths: Sequence[int] = (1024, 512)):
        super().__init__()
        if group_size % FOLD:
            raise ValueError(f'FoldingDecoder: group_size must be a multiple of {FOLD}, got {group_size}')
        if not isinstance(widths, Sequence) or len(widths) != 2:
            raise ValueError(f'FoldingDecoder: widths must be two integers, got {widths!r}')
        inner, outer = (check_integer('FoldingDecoder: each of widths', width, 1) for width in widths)
        self.mlp = nn.Sequential(nn.Linear(in_channels, inner), nn.ReLU(inplace=True), nn.Linear(inner, inner),
                                 nn.ReLU(inplace=True), nn.Linear(inner, 3 * (group_size // FOLD)))
        self.final_conv = nn.Sequential(
            Pointwise(in_channels + 5, outer), nn.BatchNorm1d(outer), nn.ReLU(inplace=True),
            Pointwise(outer, outer), nn.BatchNorm1d(outer), nn.ReLU(inplace=True), Pointwise(outer, 3))
        sides = torch.tensor([-0.05, 0.05])
        self.register_buffer('grid', torch.cartesian_prod(sides, sides).flip(-1), persistent=False)  # x runs first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, G, C = x.shape
        x = x.reshape(B * G, C)
        coarse = at_least_single(self.mlp(x)).view(B * G, -1, 1, 3)
        first, *others = self.final_conv
        of_feature, of_grid, of_point = first.weight.split([C, 2, 3], 1)
        y = F.linear(x, of_feature, first.bias).view(B * G, 1, 1, -1) + F.linear(self.grid, of_grid) \
            + F.linear(coarse, of_point)  # (B G, M, 4, W)
        y = y.flatten(1, 2)  # (B G, K, W)
        for layer in others:
            y = layer(y) if isinstance(layer, Pointwise) else layer(y.flatten(0, 1)).view(y.shape)
        fine = coarse + at_least_single(y).view(B * G, -1, FOLD, 3)
        return coarse.view(B, G, -1, 3), fine.view(B, G, -1, 3)


@MODELS.register_module()
class DiscreteVAE(ExpandableModel):
    """Point-BERT's tokenizer (Yu et al. 2022): patches, a mini-PointNet, a graph network that scores the codes, a
    Gumbel-softmax choice of codes, and a graph network and folding decoder that reconstruct the patches from them.

    The loss is the Chamfer distance (ℓ1) of the coarse and of the fine points, and ``kl_weight`` times the divergence
    KL(uniform ‖ mean choice of a cloud). ``DVAEScheduleHook`` sets ``temperature`` and ``kl_weight``.

    Args:
        num_groups: G, patches of a cloud. group_size: K, points of a patch.
        encoder_dim, token_dim, decoder_dim: width of a patch's feature, of a code, and of what the decoder takes.
        num_tokens: codes of the vocabulary, a multiple of 4 (groups of the norm).
        encoder_widths, graph_widths, decoder_widths: of :class:`~ewa3d.layers.tokenizers.PatchEncoder`,
            :class:`~ewa3d.layers.dgcnn.DGCNN` (both) and :class:`FoldingDecoder`.
        num_neighbors: centres that each centre is connected to, itself included.
        temperature: of the Gumbel softmax, until somebody sets the attribute.
        kl_weight: likewise.
        skip_origin: sample centres by the rule of the published kernel (see :func:`ewa3d.ops.fps`).
        expand, pretrained, data_preprocessor: see :class:`~ewa3d.models.base.ExpandableModel`.

    Shape:
        - inputs ``dict(points=(B, N, 3))``.
        - ``'loss'``: ``loss_recon``, ``loss_kl`` and statistics: both Chamfer distances, the divergence, the share of
          the vocabulary that the batch uses and the perplexity of this use.
        - ``'predict'``: samples with ``pred_points`` ``(num_groups * group_size, 3)`` and ``pred_tokens``
          ``(num_groups,)``, each patch from the code with the highest score. (The published validation draws noise.)
        - ``'tensor'``: every stage by name, see :meth:`stages`.

    Raises:
        TypeError, ValueError: a size out of range, clouds of another shape or with too few points, noise of another
            shape.
    """
    compiled = 'reconstruct'

    def __init__(self, num_groups: int = 64, group_size: int = 32, encoder_dim: int = 256, num_tokens: int = 8192,
                 token_dim: int = 256, decoder_dim: int = 256, encoder_widths: Sequence[int] = (128, 256, 512),
                 graph_widths: Sequence[int] = (128, 256, 512, 512, 1024), decoder_widths: Sequence[int] = (1024, 512),
                 num_neighbors: int = 4, temperature: float = 1., kl_weight: float = 0., skip_origin: bool = False,
                 expand: Sequence[dict] | None = None, pretrained: str | dict | None = None,
                 data_preprocessor: dict | nn.Module | None = None):
        super().__init__(data_preprocessor)
        for name, value in (('num_groups', num_groups), ('group_size', group_size), ('encoder_dim', encoder_dim),
                            ('num_tokens', num_tokens), ('token_dim', token_dim), ('decoder_dim', decoder_dim),
                            ('num_neighbors', num_neighbors)):
            check_integer(f'DiscreteVAE: {name}', value, 1)
        if num_neighbors > num_groups:
            raise ValueError(f'DiscreteVAE: num_neighbors={num_neighbors} cannot be found among '
                             f'num_groups={num_groups}')
        self.num_groups, self.group_size, self.num_tokens = num_groups, group_size, num_tokens
        self.num_neighbors, self.skip_origin = num_neighbors, skip_origin
        self.temperature = check_number('DiscreteVAE: temperature', temperature, '(0, inf)')
        self.kl_weight = check_number('DiscreteVAE: kl_weight', kl_weight, '[0, inf)')
        self.encoder = PatchEncoder(3, encoder_dim, encoder_widths)
        self.dgcnn_1 = DGCNN(encoder_dim, num_tokens, graph_widths)
        self.codebook = nn.Parameter(torch.randn(num_tokens, token_dim))
        self.dgcnn_2 = DGCNN(token_dim, decoder_dim, graph_widths)
        self.decoder = FoldingDecoder(decoder_dim, group_size, decoder_widths)
        self.finish(pretrained, expand)

    # ---- steps -------------------------------------------------------------------------------------------------------
    def group(self, inputs: dict | Tensor) -> tuple[Tensor, Tensor]:
        """Centres ``(B, G, 3)`` and patches ``(B, G, K, 3)`` relative to them."""
        points = points_of(inputs)
        if points.ndim != 3 or points.shape[-1] != 3:
            raise ValueError(f'points must have the shape (B, N, 3), got {tuple(points.shape)}')
        return group_points(points, self.num_groups, self.group_size, self.skip_origin)

    def graph(self, center: Tensor) -> Tensor:
        """The neighbours of each centre ``(B, G, num_neighbors)``; all graph layers share them."""
        return neighbours(center, center, self.num_neighbors)

    def scores(self, center: Tensor, patches: Tensor, graph: Tensor | None = None) -> Tensor:
        """Scores of all codes ``(B, G, num_tokens)``, in single precision where the layers run in half."""
        features = self.encoder(patches.flatten(0, 1)).view(*patches.shape[:2], -1)  # (B, G, encoder_dim)
        return at_least_single(self.dgcnn_1(features, self.graph(center) if graph is None else graph))

    @torch.no_grad()
    def spread_scores(self, inputs: dict | Tensor, spread: float) -> None:
        """Set the last norm of the scores so that, over the patches of these clouds, every code's score has mean 0 and
        standard deviation ``spread`` (before the activation).

        An untrained network scores all patches alike, with the same few codes on top, by less than the Gumbel noise,
        and a short run ends with these. (Ours; the published network, trained for 200,000 steps, starts as it is.)
        """
        activation, self.dgcnn_1.layer5[2] = self.dgcnn_1.layer5[2], nn.Identity()
        try:
            scores = self.scores(*self.group(inputs)).flatten(0, 1)  # (B G, V)
        finally:
            self.dgcnn_1.layer5[2] = activation
        norm, deviation = self.dgcnn_1.layer5[1], scores.std(0).clamp_min(1e-6)
        norm.bias.copy_((norm.bias - scores.mean(0)) * spread / deviation)
        norm.weight.mul_(spread / deviation)
        for parameter in (norm.weight, norm.bias):  # every rank has clouds of its own: those of the first count
            broadcast(parameter)

    @torch.no_grad()
    def labels(self, inputs: dict | Tensor) -> Tensor:
        """The code with the highest score of each patch, ``(B, G)`` int64."""
        return self.scores(*self.group(inputs)).argmax(-1)

    def decode(self, codes: Tensor, graph: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``(B, G, decoder_dim)``, coarse and fine points from vectors of codes ``(B, G, token_dim)``."""
        features = self.dgcnn_2(codes, graph)
        return features, *self.decoder(features)

    def reconstruct(self, center: Tensor, patches: Tensor, temperature: Tensor, noise: Tensor | None = None,
                    hard: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, coarse and fine points of patches.

        Args:
            temperature: ``()``; a number would have a compiled function made anew for each.
            noise: added to the scores, ``(B, G, num_tokens)``; drawn from a Gumbel distribution where not given.
            hard: choose one code for each patch (its gradient is that of the soft choice).
        """
        graph = self.graph(center)
        scores = self.scores(center, patches, graph)
        if noise is None:
            noise = -torch.empty_like(scores).exponential_().log()
        choice = gumbel_softmax(scores, noise, temperature, hard)
        return scores, *self.decode(choice @ self.codebook, graph)[1:]

    # ---- mmengine's calls --------------------------------------------------------------------------------------------
    def forward(self, inputs: dict | Tensor, data_samples: Sequence[Sample] | None = None, mode: str = 'tensor',
                noise: Tensor | None = None, hard: bool = False, temperature: float | Tensor | None = None):
        check_mode(mode)
        center, patches = self.group(inputs)
        if temperature is None:
            temperature = self.temperature
        if not isinstance(temperature, Tensor):
            check_number('DiscreteVAE: temperature', temperature, '(0, inf)')
        temperature = torch.as_tensor(temperature, dtype=center.dtype, device=center.device)
        if noise is not None:
            noise = self._checked(noise, center)
        if mode == 'loss':
            return self.loss(patches, *self.reconstruct(center, patches, temperature, noise, hard))
        if mode == 'predict':
            return self.predict(center, patches, data_samples)
        return self.stages(points_of(inputs), center, patches, temperature, noise, hard)

    def loss(self, patches: Tensor, scores: Tensor, coarse: Tensor, fine: Tensor) -> dict[str, Tensor]:
        """Losses and statistics of a reconstruction."""
        target = patches.flatten(0, 1)
        coarse, fine = (chamfer_distance(x.flatten(0, 1), target, norm='l1') for x in (coarse, fine))
        kl = kl_from_uniform(scores)
        used, perplexity = code_usage(count_codes(scores.argmax(-1), self.num_tokens))
        return dict(loss_recon=coarse + fine, loss_kl=self.kl_weight * kl, cdl1_coarse=coarse.detach(),
                    cdl1_fine=fine.detach(), kl=kl.detach(), codes_used=used, code_perplexity=perplexity)

    @torch.no_grad()
    def predict(self, center: Tensor, patches: Tensor, samples: Sequence[Sample] | None = None) -> list[Sample]:
        """The samples with ``pred_points`` and ``pred_tokens``, on the CPU."""
        graph = self.graph(center)
        tokens = self.scores(center, patches, graph).argmax(-1)
        fine = self.decode(F.embedding(tokens, self.codebook), graph)[-1]
        points = (fine + center.unsqueeze(2)).flatten(1, 2).cpu()  # (B, G K, 3)
        samples = [Sample() for _ in points] if samples is None else list(samples)
        for sample, cloud, codes in zip(samples, points, tokens.cpu()):
            sample.pred_points, sample.pred_tokens = cloud, codes
        return samples

    def stages(self, points: Tensor, center: Tensor, patches: Tensor, temperature: Tensor,
               noise: Tensor | None = None, hard: bool = False) -> dict[str, Tensor]:
        """Everything that is computed on the way, by name.

        ``center``, ``neighborhood``, ``patch_features``, ``logits``, ``token_index``; ``dgcnn_1_layer{1..5}_max``, of
        which every eighth channel ``(B, C / 8, G)``; and for each kind of choice ``dgcnn_2``, ``coarse``, ``fine``,
        ``whole_fine`` (the cloud), ``loss_recon``, ``loss_kl`` (unweighted), ``cdl1_coarse``, ``cdl1_fine`` and
        ``whole_fine_cdl{1,2}``: under ``argmax/``, with ``noise`` also under ``soft/`` and ``hard/``, and without a
        prefix for the kind that was asked for (``argmax`` where no noise is given, otherwise as ``hard`` says).
        """
        graph = self.graph(center)
        features = self.encoder(patches.flatten(0, 1)).view(*patches.shape[:2], -1)
        layers = self.dgcnn_1.features(features, graph)
        scores = at_least_single(self.dgcnn_1.join(layers))
        found = dict(center=center, neighborhood=patches, patch_features=features, logits=scores,
                     token_index=scores.argmax(-1))
        found |= {f'dgcnn_1_layer{i}_max': x[..., ::8].transpose(1, 2) for i, x in enumerate([*layers, scores], 1)}
        choices = dict(argmax=gumbel_softmax(scores, torch.zeros_like(scores), 1., hard=True))
        if noise is not None:
            found['hard/token_index'] = (scores + noise).argmax(-1)
            choices |= {kind: gumbel_softmax(scores, noise, temperature, kind == 'hard') for kind in ('soft', 'hard')}
        results = {kind: self._decoded(points, center, patches, scores, choice, graph)
                   for kind, choice in choices.items()}
        found |= {f'{kind}/{name}': value for kind, result in results.items() for name, value in result.items()}
        return {**found, **results['argmax' if noise is None else 'hard' if hard else 'soft']}

    def _decoded(self, points: Tensor, center: Tensor, patches: Tensor, scores: Tensor, choice: Tensor,
                 graph: Tensor) -> dict[str, Tensor]:
        features, coarse, fine = self.decode(choice @ self.codebook, graph)
        losses = self.loss(patches, scores, coarse, fine)
        whole = (fine + center.unsqueeze(2)).flatten(1, 2)
        return dict(dgcnn_2=features, coarse=coarse, fine=fine, whole_fine=whole, loss_recon=losses['loss_recon'],
                    loss_kl=losses['kl'], cdl1_coarse=losses['cdl1_coarse'], cdl1_fine=losses['cdl1_fine'],
                    whole_fine_cdl1=chamfer_distance(whole, points, norm='l1'),
                    whole_fine_cdl2=chamfer_distance(whole, points, norm='l2'))

    def _checked(self, noise: Tensor, center: Tensor) -> Tensor:
        expected = (*center.shape[:2], self.num_tokens)
        if not isinstance(noise, Tensor) or noise.shape != expected:
            found = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise ValueError(f'DiscreteVAE: noise must be a tensor of the shape (B, G, num_tokens) = {expected}, got '
                             f'{found}')
        return noise.to(center)


def at_least_single(x: Tensor) -> Tensor:
    """``x`` in float32 where it is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gumbel_softmax(scores: Tensor, noise: Tensor, temperature: float | Tensor, hard: bool = False) -> Tensor:
    """Weights of the codes: ``softmax((scores + noise) / temperature)``; ``hard``: the highest one alone, with the
    gradient of the soft weights (Jang et al. 2017).

    Shape:
        - ``(..., V)``, kept.
    """
    soft = ((scores + noise) / temperature).softmax(-1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.)
    return one_hot - soft.detach() + soft


def kl_from_uniform(scores: Tensor) -> Tensor:
    """KL(uniform ‖ q), with q the mean of ``softmax(scores)`` over the patches of a cloud; the mean over clouds.

    Shape:
        - ``(B, G, V)`` to ``()``.
    """
    G, V = scores.shape[1:]
    log_mean = scores.log_softmax(-1).logsumexp(1) - math.log(G)  # (B, V); in logarithms, so that nothing underflows
    return -(log_mean.mean(-1) + math.log(V)).mean()


def count_codes(tokens: Tensor, num_tokens: int) -> Tensor:
    """How often each code occurs, ``(num_tokens,)`` int64; nothing waits for the device."""
    tokens = tokens.flatten()
    return tokens.new_zeros(num_tokens).scatter_add_(0, tokens, torch.ones_like(tokens))


def code_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of how often each code was chosen: the share of the codes that were chosen at all, in percent, and the
    perplexity of the distribution, the number of codes that an even use would need.

    Shape:
        - ``(V,)`` to two ``()``.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    return 100 * (counts > 0).double().mean(), torch.special.entr(share).sum().exp()
