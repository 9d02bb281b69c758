"""The picture tokenizer, a VQ-VAE: an encoder turns pixels into a grid of integer codes, and a decoder turns them back.

The idea: the encoder makes a feature vector for every cell of a grid. A VQ-VAE replaces each vector by the nearest row
of a codebook and keeps only the number of that row, the *code*. CogView2's is hierarchical: the encoder's features may
be halved in size once or twice more before they are quantized, so that one model with one codebook offers three rates.
At level 0, 1 and 2, a code stands for 4, 8 or 16 pixels along each side, and each level has a decoder of its own.

CogView2, section 3 (tokenizer). Mirrors ``icetk/vqvae`` of the original, weight for weight: ``from_official_name``
translates the names.

Shapes: ``B`` pictures, ``H x W`` pixels, ``h x w`` codes, ``C`` feature channels, ``K`` codebook rows.

Different on purpose: normalising by the mean and standard deviation of the training pictures happens inside the model.
The codebook is trained by a moving average, not by gradients; the code for this is in ``training/vqvae.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from minicogview.config import VQVAEConfig
from minicogview.errors import MiniCogViewError

PIXEL_MEAN = (0.79093, 0.76271, 0.75340)  # of red, green and blue, on the scale 0..1
PIXEL_STD = (0.30379, 0.32279, 0.32800)

# The original puts attention where a 256-pixel picture would be 16 wide, whatever the real size: an accident that the
# weights depend on. That is resolution number 4, which only decoders with five multipliers have.
ATTENTION_RESOLUTION = 4


def _norm(channels: int, n_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(n_groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """GroupNorm, swish and a 3x3 convolution, twice, added to the input: (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, n_groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(c_in, n_groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out, n_groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x) + y


class PixelAttention(nn.Module):
    """Self-attention of one head over all cells, added to the input: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, n_groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, n_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(part(y), "b c h w -> b (h w) c") for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # scores are scaled by C ** -0.5
        return x + self.out(rearrange(y, "b (h w) c -> b c h w", h=x.shape[2]))


class Middle(nn.Module):
    """The layers at the coarsest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, n_groups: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, n_groups)
        self.attention = PixelAttention(channels, n_groups)
        self.block2 = ResidualBlock(channels, channels, n_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class Halve(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2; with ``pool``, the 2x2 averages are added to it.

    As in the original, zeros are padded only below (one row) and on the right (one column).
    """

    def __init__(self, channels: int, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, h/2, w/2)
        return y + F.avg_pool2d(x, 2) if self.pool else y


class Double(nn.Module):
    """Double height and width by repeating every value, then apply a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """All layers at one resolution: residual blocks, attention where ``attend`` is true, then a change of size."""

    def __init__(self, c_in: int, c_out: int, n_blocks: int, n_groups: int, attend: bool, resize: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(c_out if i else c_in, c_out, n_groups) for i in range(n_blocks)))
        self.attention = PixelAttention(c_out, n_groups) if attend else nn.Identity()
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.attention(self.blocks(x)))


class Encoder(nn.Module):
    """Normalised pixels (B, 3, H, W) to features (B, latent_channels, H/r, W/r), where r is the rate of level 0."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        groups, c = config.n_groups, config.channels
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.stages = nn.ModuleList()
        last = len(config.encoder_multipliers) - 1
        for i, multiplier in enumerate(config.encoder_multipliers):
            c_out = config.channels * multiplier
            resize = Halve(c_out) if i < last else nn.Identity()
            self.stages.append(Stage(c, c_out, config.encoder_blocks, groups, False, resize))
            c = c_out
        self.middle = Middle(c, groups)
        self.norm_out = _norm(c, groups)
        self.conv_out = nn.Conv2d(c, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Codebook rows (B, C, h, w) to normalised pixels (B, 3, h*r, w*r); stage 0 is the finest, as in the encoder."""

    def __init__(self, config: VQVAEConfig, multipliers: tuple[int, ...]) -> None:
        super().__init__()
        groups = config.n_groups
        channels = [config.channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(config.codebook_dim, channels[-1], 3, padding=1)
        self.middle = Middle(channels[-1], groups)
        self.stages = nn.ModuleList()
        for i, c_out in enumerate(channels):
            c_in = channels[min(i + 1, len(channels) - 1)]
            resize = Double(c_out) if i > 0 else nn.Identity()
            self.stages.append(Stage(c_in, c_out, 1, groups, i == ATTENTION_RESOLUTION, resize))
        self.norm_out = _norm(channels[0], groups)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv_in(x))
        for stage in reversed(self.stages):
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook, which all levels share: features in, the number of the nearest row out."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        # Each row follows a moving average of the vectors that it replaces, so it needs no gradient.
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.codebook_dim), requires_grad=False)

    def nearest(self, z: Tensor) -> Tensor:
        """Codes (...) int64: for each vector of z (..., C), the codebook row at the least squared distance."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would often find another row
            flat = z.reshape(-1, z.shape[-1]).float()
            codebook = self.codebook.float()
            # |z - e|^2 for every row e, without |z|^2, which does not change the order
            distance = codebook.pow(2).sum(1) - 2 * flat @ codebook.T
        return distance.argmin(1).reshape(z.shape[:-1])

    def rows(self, codes: Tensor) -> Tensor:
        """Codebook rows (B, C, h, w) of codes (B, h, w)."""
        return rearrange(self.codebook[codes], "b h w c -> b c h w")

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize features (B, latent_channels, h, w).

        Returns:
            codebook rows (B, C, h, w), whose gradient is passed to the features unchanged (the straight-through
            estimator); their mean squared distance to the projected features (the commitment loss, which has weight 1);
            and codes (B, h, w).
        """
        return self.straight_through(self.project(features))

    def straight_through(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``forward`` for features that are already projected, z (B, C, h, w)."""
        z = rearrange(z, "b c h w -> b h w c").float()
        codes = self.nearest(z)
        rows = self.codebook[codes]
        commitment = (rows - z).pow(2).mean()
        straight = z + (rows - z).detach()
        return rearrange(straight, "b h w c -> b c h w"), commitment, codes


class VQVAE(nn.Module):
    """Pictures (B, 3, H, W) in 0..1 to codes (B, h, w) and back, at each of three levels.

    Example:
        >>> from minicogview.config import get_preset
        >>> vqvae = VQVAE(get_preset("toy").vqvae).eval()
        >>> vqvae.encode(torch.ones(1, 3, 32, 32), level=0).shape
        torch.Size([1, 8, 8])
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = len(config.decoder_multipliers)
        self.encoder = Encoder(config)
        self.halvers = nn.ModuleList(Halve(config.latent_channels, pool=True) for _ in range(self.levels - 1))
        self.quantizer = Quantizer(config)
        self.decoders = nn.ModuleList(Decoder(config, m) for m in config.decoder_multipliers)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def decoder(self, level: int) -> nn.Module:
        """The decoder of a level. They are stored as in the checkpoint, that of the coarsest level first."""
        return self.decoders[self.levels - 1 - level]

    def normalise(self, pictures: Tensor) -> Tensor:
        """Pictures in 0..1 to mean 0 and standard deviation 1 in each colour, approximately."""
        return (pictures - self.pixel_mean) / self.pixel_std

    def denormalise(self, pictures: Tensor) -> Tensor:
        """The inverse of ``normalise``; the result may lie slightly outside 0..1 and is not clamped."""
        return pictures * self.pixel_std + self.pixel_mean

    def features(self, pictures: Tensor, level: int) -> Tensor:
        """Features (B, latent_channels, h, w) at a level, before projection and quantization, of pictures in 0..1."""
        self._check(pictures, level)
        x = self.encoder(self.normalise(pictures))
        for halve in self.halvers[:level]:
            x = halve(x)
        return x

    def encode(self, pictures: Tensor, level: int) -> Tensor:
        """Codes (B, h, w) int64 of pictures (B, 3, H, W) in 0..1, where h = H / rate and w = W / rate.

        Raises:
            MiniCogViewError: if there is no such level, or the sides are not multiples of its rate.
        """
        projected = self.quantizer.project(self.features(pictures, level))
        return self.quantizer.nearest(rearrange(projected, "b c h w -> b h w c"))

    def decode(self, codes: Tensor, level: int) -> Tensor:
        """Pictures (B, 3, H, W), on the scale 0..1 but not clamped to it, from codes (B, h, w).

        Raises:
            MiniCogViewError: if there is no such level.
        """
        self._check_level(level)
        return self.denormalise(self.decoder(level)(self.quantizer.rows(codes)))

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Encode and decode at every level, for training.

        Args:
            pictures: (B, 3, H, W) in 0..1.

        Returns:
            normalised reconstructions, one for each level from 0; the sum of their commitment losses; and their codes.
        """
        self._check(pictures, self.levels - 1)
        x = self.encoder(self.normalise(pictures))
        outputs, codes = [], []
        commitment = x.new_zeros((), dtype=torch.float32)
        for level in range(self.levels):
            if level > 0:
                x = self.halvers[level - 1](x)
            rows, distance, numbers = self.quantizer(x)
            outputs.append(self.decoder(level)(rows))
            codes.append(numbers)
            commitment = commitment + distance
        return outputs, commitment, codes

    def _check_level(self, level: int) -> None:
        if not 0 <= level < self.levels:
            raise MiniCogViewError(f"level {level}: this tokenizer has levels 0 to {self.levels - 1}")

    def _check(self, pictures: Tensor, level: int) -> None:
        self._check_level(level)
        rate = self.config.rates[level]
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise MiniCogViewError(f"pictures have shape {tuple(pictures.shape)}: expected (B, 3, H, W)")
        if pictures.shape[2] % rate or pictures.shape[3] % rate:
            height, width = pictures.shape[2:]
            raise MiniCogViewError(
                f"a picture of {width}x{height} pixels cannot be cut into cells of {rate}: "
                f"resize it to multiples of {rate}"
            )


# Parts of the official weight names and what we call them; the replacements are made in this order.
OFFICIAL_NAMES: tuple[tuple[str, str], ...] = (
    (r"^enc\.", "encoder."),
    (r"^decs\.", "decoders."),
    (r"^down_samplers\.(\d+)\.conv_down_sampler\.conv\.", r"halvers.\1.conv."),
    (r"^quantize\.proj\.", "quantizer.project."),
    (r"^quantize\.embed\.weight$", "quantizer.codebook"),
    (r"\.mid\.block_([12])\.", r".middle.block\1."),
    (r"\.mid\.attn_1\.", ".middle.attention."),
    (r"\.(?:down|up)\.(\d+)\.(?:down|up)sample\.conv\.", r".stages.\1.resize.conv."),
    (r"\.(?:down|up)\.(\d+)\.block\.", r".stages.\1.blocks."),
    (r"\.up\.(\d+)\.attn\.0\.", r".stages.\1.attention."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.attention\.proj_out\.", ".attention.out."),
)


def from_official_name(name: str) -> str:
    """Our name for a weight of the released tokenizer, such as ``enc.mid.attn_1.q.weight``."""
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def official_config(shapes: Mapping[str, Sequence[int]]) -> VQVAEConfig:
    """Sizes of a released tokenizer, from the shapes of its weights, since its file holds no configuration.

    Args:
        shapes: from official weight names to shapes.

    Raises:
        MiniCogViewError: if a weight that every tokenizer has is missing.
    """
    try:
        channels = shapes["enc.conv_in.weight"][0]
        codebook_size, codebook_dim = shapes["quantize.embed.weight"]
        latent_channels = shapes["enc.conv_out.weight"][0]
    except KeyError as error:
        raise MiniCogViewError(f"not the weights of a CogView2 picture tokenizer: {error} is missing") from None

    def multipliers(part: str) -> tuple[int, ...]:
        widths: list[int] = []
        while (name := f"{part}.{len(widths)}.block.0.conv1.weight") in shapes:
            widths.append(shapes[name][0] // channels)
        return tuple(widths)

    n_levels = len({name.split(".")[1] for name in shapes if name.startswith("decs.")})
    n_blocks = len({name.split(".")[4] for name in shapes if name.startswith("enc.down.0.block.")})
    return VQVAEConfig(
        channels=channels,
        encoder_multipliers=multipliers("enc.down"),
        encoder_blocks=n_blocks,
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        latent_channels=latent_channels,
        decoder_multipliers=tuple(multipliers(f"decs.{i}.up") for i in range(n_levels)),
        n_groups=32,  # always, in the original
    )


def from_official(weights: Mapping[str, Tensor]) -> VQVAE:
    """The tokenizer with released weights (the ``module`` dictionary of their file), in float32 and evaluation mode.

    Raises:
        MiniCogViewError: if weights are missing, are too many, or have another shape.
    """
    model = VQVAE(official_config({name: value.shape for name, value in weights.items()}))
    try:
        model.load_state_dict({from_official_name(name): value.float() for name, value in weights.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MiniCogViewError(f"the weights do not fit the picture tokenizer: {reason[:300]}") from None
    return model.eval()
