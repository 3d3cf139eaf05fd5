"""From a CT volume to lesion masks: the encoder and the localizer's three stages.

Shape letters: B batch; d, h, w voxels; D, H, W tokens, P = H W; C token channels; L diseases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn
from torch.nn.functional import pad

from ...text.disease_set import DiseaseSet, load_disease_set
from ..blocks import DenoisedFeatures, DenoisingTransformer, TextEmbedder, TextGuidedAttentionUNet
from ..layers import pad_to_patches
from .three_d_vision_encoder import ThreeDVisionEncoder, TokenFeatures

__all__ = ["LesionLocalizationModule", "LesionProbabilities", "PlainLocalizer", "cut_crops"]

PASSES = ("shared", "per_disease")

LocalFeatures = tuple[Tensor, Tensor, Tensor | None]

_PADDING_LOGIT = -30.0  # a probability of 1e-13


def cut_crops(volumes: Tensor, crop_start: Tensor, crop_size: Sequence[int]) -> Tensor:
    """Cut (B · K, ..., *crop_size) out of volumes (B, ..., d, h, w), for starts (B, K, 3) [z, y, x].

    Raises:
        ValueError: if a crop does not lie in the volume.
    """
    crops = []
    for volume, starts in zip(volumes, crop_start.tolist(), strict=True):
        for start in starts:
            if any(s < 0 or s + n > size for s, n, size in zip(start, crop_size, volume.shape[-3:], strict=True)):
                raise ValueError(
                    f"a crop of {tuple(crop_size)} at {tuple(start)} does not lie in {tuple(volume.shape[-3:])}; fill "
                    f"the volume up, or make crop_size smaller."
                )
            crops.append(volume[(..., *(slice(s, s + n) for s, n in zip(start, crop_size, strict=True)))])
    return torch.stack(crops)


def mask_output(logits: Tensor, disease_set: DiseaseSet) -> dict[str, Any]:
    """Return ``logits``, ``probabilities`` and ``masks`` of logits (B, L, d, h, w)."""
    probabilities = logits.float().sigmoid()
    masks = {key: probabilities[:, index] for index, key in enumerate(disease_set.keys)}
    return {"logits": logits, "probabilities": probabilities, "masks": masks}


class LesionLocalizationModule(nn.Module):
    """`ThreeDVisionEncoder`, `TextEmbedder`, `DenoisingTransformer` and `TextGuidedAttentionUNet`, whose state dict is
    what a localization checkpoint holds.

    Args:
        encoder: the vision encoder; only its local features are used.
        text_embedder: stage 1.
        denoising_transformer: stage 2.
        unet: stage 3; its `patch_size` is the encoder's.
        passes: "shared" runs stages 2 and 3 once for all diseases; "per_disease" once for each, with its text alone
            from the beginning, for comparison. The weights are the same.
        window_size: (d, h, w) voxels of the windows in which stage 3 draws outside training, multiples of the patch;
            None draws the whole volume at once. Stage 2 sees the whole scan in either case.
        window_overlap: share of a window that its neighbour covers too; rounded down to whole patches.

    Attributes:
        thresholds: (L,) probability from which a voxel belongs to the lesion, from validation data; 0.5 before that.
        presence_thresholds: (L,) probability that a lesion must reach somewhere to be drawn; likewise.

    Raises:
        ValueError: for other `passes`, or a window that is no multiple of the patch.
    """

    thresholds: Tensor
    presence_thresholds: Tensor

    def __init__(
        self,
        encoder: ThreeDVisionEncoder,
        text_embedder: TextEmbedder,
        denoising_transformer: DenoisingTransformer,
        unet: TextGuidedAttentionUNet,
        passes: str = "shared",
        window_size: Sequence[int] | None = None,
        window_overlap: float = 0.25,
    ) -> None:
        super().__init__()
        if passes not in PASSES:
            raise ValueError(f"passes must be one of {PASSES}, got {passes!r}.")
        patch_size = encoder.patch_size
        if window_size is not None and any(n < p or n % p for n, p in zip(window_size, patch_size, strict=True)):
            raise ValueError(f"window_size must be multiples of the patch {patch_size}, got {tuple(window_size)}.")
        self.encoder = encoder
        self.text_embedder = text_embedder
        self.denoising_transformer = denoising_transformer
        self.unet = unet
        self.passes = passes
        self.window_size = tuple(window_size) if window_size is not None else None
        self.window_overlap = window_overlap
        self.disease_set = text_embedder.disease_set
        self.register_buffer("thresholds", torch.full((self.disease_set.num_diseases,), 0.5))
        self.register_buffer("presence_thresholds", torch.full((self.disease_set.num_diseases,), 0.5))

    def forward(
        self, image: Tensor, spacing_mm: Tensor | None = None, valid_size: Tensor | None = None
    ) -> dict[str, Any]:
        """Draw all diseases.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1], any size.
            spacing_mm: (B, 3) voxel spacing [z, y, x]; None assumes the encoder's `reference_spacing_mm`.
            valid_size: (B, 3) voxels of each volume before it was padded to the batch's size; None where nothing was.

        Returns:
            ``logits`` and ``probabilities``, (B, L, d, h, w), and ``masks``: disease key -> (B, d, h, w) probabilities.
        """
        logits, _ = self.logits_and_denoising(image, spacing_mm, valid_size)
        return mask_output(logits, self.disease_set)

    def logits_and_denoising(
        self,
        image: Tensor,
        spacing_mm: Tensor | None = None,
        valid_size: Tensor | None = None,
        crop_start: Tensor | None = None,
        crop_size: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw whole scans, or crops of them; see `forward` for the first arguments.

        The encoder and stage 2 see the whole scan once; stage 3 draws the crops, whose tokens are cut out of the
        scan's.

        Args:
            crop_start: (B, K, 3) first voxel of each crop, multiples of the patch; None draws whole scans.
            crop_size: (d, h, w) voxels of a crop, multiples of the patch.

        Returns:
            Logits (B, L, d, h, w), or (B · K, L, *crop_size); and the loss of stage 2, None where no noise was put.

        Raises:
            ValueError: if a crop is not made of whole patches, or does not lie in the scan.
        """
        local = self.local_features(image, spacing_mm, valid_size)
        return self.draw_from_tokens(image, local, valid_size, crop_start, crop_size)

    def draw_from_tokens(
        self,
        image: Tensor,
        local: LocalFeatures,
        valid_size: Tensor | None = None,
        crop_start: Tensor | None = None,
        crop_size: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run stages 2 and 3 on what the encoder's trunk has given (`local_features`, `local_features_of_tokens`);
        arguments and result as `logits_and_denoising`."""
        texts = self.texts()
        refined = self.refine(local, texts)
        if crop_start is None or crop_size is None:
            return self.draw_scans(image, refined, valid_size), refined.loss
        patch = self.encoder.patch_size
        if bool((crop_start % torch.tensor(patch, device=crop_start.device)).any()) or any(
            n % p for n, p in zip(crop_size, patch, strict=True)
        ):
            raise ValueError(
                f"crops must begin and end where patches of {patch} do, got crop_size {tuple(crop_size)} and "
                f"crop_start {crop_start.tolist()}; make both multiples of the patch."
            )
        crops = cut_crops(pad_to_patches(image, patch), crop_start, crop_size)
        grid = [n // p for n, p in zip(crop_size, patch, strict=True)]
        token_start = torch.div(crop_start, torch.tensor(patch, device=crop_start.device), rounding_mode="floor")
        tokens = cut_crops(refined.features.movedim(-1, -4), token_start, grid).movedim(-4, -1)
        return self.draw(crops, tokens, texts), refined.loss

    def texts(self) -> Tensor:
        """Return the projected disease texts (L, C)."""
        return self.text_embedder()

    def local_features(
        self, image: Tensor, spacing_mm: Tensor | None = None, valid_size: Tensor | None = None
    ) -> LocalFeatures:
        """Run the encoder's trunk; see `local_features_of_tokens`."""
        return self.local_features_of_tokens(self.encoder.encode_tokens(image, spacing_mm, valid_size), image)

    def local_features_of_tokens(self, tokens: TokenFeatures, image: Tensor) -> LocalFeatures:
        """Return local features (B, D, H, W, C), heights of the slabs in mm (B, D), and the token mask (B, D, P) or
        None."""
        grid = [-(-n // p) for n, p in zip(image.shape[2:], self.encoder.patch_size, strict=True)]
        features = tokens.local_features.unflatten(1, grid)
        depth_mm = tokens.positions_mm.unflatten(1, grid)[:, :, 0, 0, 0]
        mask = tokens.token_mask
        return features, depth_mm, mask.unflatten(1, (grid[0], -1)) if mask is not None else None

    def refine(self, local: LocalFeatures, texts: Tensor) -> DenoisedFeatures:
        """Run stage 2 on what `local_features` returned.

        Returns:
            Features (B, D, H, W, C); with `passes` "per_disease" (B, L, D, H, W, C).
        """
        features, depth_mm, mask = local
        batch, grid, num_texts = features.shape[0], features.shape[1:4], texts.shape[0]
        tokens, heard = features.flatten(2, 3), texts.expand(batch, *texts.shape)
        if self.passes == "per_disease":
            tokens, depth_mm = (part.repeat_interleave(num_texts, 0) for part in (tokens, depth_mm))
            mask = mask.repeat_interleave(num_texts, 0) if mask is not None else None
            heard = texts[None].expand(batch, *texts.shape).reshape(-1, 1, texts.shape[-1])
        refined = self.denoising_transformer(tokens, heard, depth_mm, mask)
        result = refined.features.unflatten(2, grid[1:])
        if self.passes == "per_disease":
            result = result.unflatten(0, (batch, num_texts))
        return DenoisedFeatures(result, refined.loss)

    def draw(self, image: Tensor, tokens: Tensor, texts: Tensor) -> Tensor:
        """Run stage 3 on a part of the scan and the refined tokens of that part; return logits (B, L, d, h, w)."""
        if self.passes == "shared":
            return self.unet(image, tokens, texts)
        logits = [
            self.unet(image, tokens[:, index], texts[index : index + 1], texts[index].expand(image.shape[0], 1, -1))
            for index in range(texts.shape[0])
        ]
        return torch.cat(logits, dim=1)

    def draw_scans(self, image: Tensor, refined: DenoisedFeatures, valid_size: Tensor | None = None) -> Tensor:
        """Run stage 3 on whole scans; return logits (B, L, d, h, w).

        Outside training each scan of a padded batch is drawn alone, at its own size, so that its masks do not depend on
        the others' sizes; where it was padded, its logits are those of a probability of next to nothing.
        """
        if self.training or valid_size is None:
            return self.draw_windows(image, refined)
        patch, size = self.encoder.patch_size, image.shape[2:]
        scans: list[Tensor] = []
        for row, (depth, height, width) in enumerate(valid_size.tolist()):
            cut = [slice(-(-n // p)) for n, p in zip((depth, height, width), patch, strict=True)]
            features = refined.features[row : row + 1, ..., cut[0], cut[1], cut[2], :]
            scan = image[row : row + 1, :, :depth, :height, :width]
            logits = self.draw_windows(scan, DenoisedFeatures(features, None))
            missing = [most - n for most, n in zip(size, (depth, height, width), strict=True)]
            scans.append(pad(logits, (0, missing[2], 0, missing[1], 0, missing[0]), value=_PADDING_LOGIT))
        return torch.cat(scans)

    def draw_windows(self, image: Tensor, refined: DenoisedFeatures) -> Tensor:
        """Run stage 3 on the whole scan, window by window if `window_size` says so; return logits (B, L, d, h, w)."""
        texts, size = self.texts(), image.shape[2:]
        if self.window_size is None or all(n <= window for n, window in zip(size, self.window_size, strict=True)):
            return self.draw(image, refined.features, texts)
        patch = self.encoder.patch_size
        image = pad_to_patches(image, patch)
        padded = image.shape[2:]
        window = [min(n, w) for n, w in zip(padded, self.window_size, strict=True)]
        # a whole number of patches, so that a window begins where a token begins; half a voxel less, because MONAI
        # rounds the step w (1 - overlap) down, and a step of 8 that is computed as 7.999 must not become 7
        overlap = [max(0.0, int(self.window_overlap * w / p) * p - 0.5) / w for w, p in zip(window, patch, strict=True)]

        def draw_window(part: Tensor, coordinates: Sequence[Sequence[slice]]) -> Tensor:
            logits = []
            for row, where in enumerate(coordinates):
                sample = slice(where[0].start, where[0].stop)
                cut = [slice(s.start // p, s.stop // p) for s, p in zip(where[2:], patch, strict=True)]
                tokens = refined.features[sample, ..., cut[0], cut[1], cut[2], :]
                logits.append(self.draw(part[row : row + 1], tokens, texts))
            return torch.cat(logits)

        logits = sliding_window_inference(
            image, window, 1, draw_window, overlap=overlap, mode="gaussian", with_coord=True
        )
        return torch.as_tensor(logits)[:, :, : size[0], : size[1], : size[2]]


class LesionProbabilities(LesionLocalizationModule):
    """`LesionLocalizationModule` for export: one image in, probabilities out, the same weights under the same names.
    The disease texts are among the weights, so no text encoder is needed."""

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        """Return probabilities (B, L, d, h, w).

        Args:
            image: (B, in_channels, d, h, w) in [0, 1], of the encoder's `reference_spacing_mm`.
        """
        return super().forward(image)["probabilities"]


class PlainLocalizer(nn.Module):
    """Any network from an image to one logit per disease, trained and measured like `LesionLocalizationModule`: what a
    user would take instead, to stand beside it.

    Args:
        network: (B, in_channels, d, h, w) to logits (B, L, d, h, w), such as MONAI's SegResNet.
        disease_set: name or path.
        window_size: (d, h, w) voxels of the sliding windows outside training, usually the training crops; None draws
            the whole volume at once.
        window_overlap: share of a window that its neighbour covers too.

    Attributes:
        thresholds: as in `LesionLocalizationModule`; and
        presence_thresholds: likewise.
    """

    thresholds: Tensor
    presence_thresholds: Tensor

    def __init__(
        self,
        network: nn.Module,
        disease_set: str = "chest_ct_5",
        window_size: Sequence[int] | None = None,
        window_overlap: float = 0.25,
    ) -> None:
        super().__init__()
        self.network = network
        self.disease_set = load_disease_set(disease_set)
        self.window_size = window_size
        self.window_overlap = window_overlap
        self.register_buffer("thresholds", torch.full((self.disease_set.num_diseases,), 0.5))
        self.register_buffer("presence_thresholds", torch.full((self.disease_set.num_diseases,), 0.5))

    def forward(
        self, image: Tensor, spacing_mm: Tensor | None = None, valid_size: Tensor | None = None
    ) -> dict[str, Any]:
        """Draw all diseases; arguments and result as `LesionLocalizationModule.forward`, spacing is not used."""
        return mask_output(self.logits_and_denoising(image)[0], self.disease_set)

    def logits_and_denoising(
        self,
        image: Tensor,
        spacing_mm: Tensor | None = None,
        valid_size: Tensor | None = None,
        crop_start: Tensor | None = None,
        crop_size: Sequence[int] | None = None,
    ) -> tuple[Tensor, None]:
        """Draw whole scans or crops, as `LesionLocalizationModule.logits_and_denoising`; there is no denoising."""
        if crop_start is not None and crop_size is not None:
            return self.network(cut_crops(image, crop_start, crop_size)), None
        if self.window_size is None:
            return self.network(image), None
        logits = sliding_window_inference(
            image, self.window_size, 4, self.network, overlap=self.window_overlap, mode="gaussian"
        )
        return torch.as_tensor(logits), None
