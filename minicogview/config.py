"""Every size in the system, as frozen dataclasses, and the one dict of presets.

The toy and the released 6B model are the same code with different numbers. A configuration is stored as JSON beside
its weights (``to_json``) and never guessed from a file's name.

Simplified: only sizes live here. Learning rates and batch sizes belong to the training commands.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from minicogview.errors import MiniCogViewError
from minicogview.numbers import checked

NormOrder = Literal["sandwich", "pre", "post"]
NormKind = Literal["layer", "rms"]
FineStart = Literal["tiled", "enlarged"]


@dataclass(frozen=True)
class VQVAEConfig:
    """The picture tokenizer: a convolutional VQ-VAE with one codebook and three rates, called levels.

    The rate of a level is the number of pixels along each side of a token. The defaults are the released tokenizer's.
    """

    channels: int = 128
    encoder_multipliers: tuple[int, ...] = (1, 2, 4)  # of channels, by resolution; level 0's rate is 2 ** (len - 1)
    encoder_blocks: int = 2  # residual blocks at each encoder resolution
    codebook_size: int = 20000
    codebook_dim: int = 256
    latent_channels: int = 256  # of the encoder's output, before the projection to codebook_dim
    # The decoder of level 2 comes first, as in the checkpoint: level i has decoder number 2 - i.
    decoder_multipliers: tuple[tuple[int, ...], ...] = ((1, 1, 1, 2, 4), (1, 1, 2, 4), (1, 2, 4))
    n_groups: int = 32  # of GroupNorm

    @property
    def rates(self) -> tuple[int, ...]:
        """Pixels along each side of a token at levels 0, 1, 2."""
        base = 2 ** (len(self.encoder_multipliers) - 1)
        return tuple(base * 2**level for level in range(len(self.decoder_multipliers)))


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer alone: it knows ids and positions, but not what they mean."""

    n_layers: int
    d_model: int
    n_heads: int
    vocab_size: int
    max_positions: int = 1024
    norm: NormOrder = "sandwich"
    norm_kind: NormKind = "layer"
    pb_relax: float | None = None  # scale of PB-relax (see ``attention.py``); None switches it off

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise MiniCogViewError(
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}: choose sizes that divide"
            )


@dataclass(frozen=True)
class LayoutConfig:
    """The positions of a sequence: the text counts from 0, then comes <start_of_image>, then the picture's grid."""

    max_text: int = 512  # number of text positions; it is also the position of <start_of_image>
    grid: int = 20  # tokens along each side of the coarse picture
    n_patches: int = 20  # training by patch infilling: number of patches that are chosen ...
    patch_size: int = 4  # ... and their side in tokens

    @property
    def n_image(self) -> int:
        """Number of picture tokens, ``grid * grid``."""
        return self.grid * self.grid


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that are neither picture nor text; ``tokenizer.py`` explains the vocabulary."""

    pad: int
    boi: int  # <start_of_image>
    boe: int  # <start_of_english>
    boc: int  # <start_of_chinese>


PAD_PIECE = 3  # index of <pad> among the text pieces, in the original's text model and in ours


def special_ids(codebook_size: int, n_pieces: int) -> SpecialIds:
    """The vocabulary's order: picture codes, then text pieces (one of them is <pad>), then three start tokens."""
    first = codebook_size + n_pieces
    return SpecialIds(pad=codebook_size + PAD_PIECE, boi=first, boe=first + 1, boc=first + 2)


@dataclass(frozen=True)
class CogLMConfig:
    """The first stage: a transformer, and what its ids and positions mean."""

    transformer: TransformerConfig
    layout: LayoutConfig
    ids: SpecialIds
    n_codes: int  # picture tokens are the ids 0 .. n_codes - 1


@dataclass(frozen=True)
class SuperResolutionConfig:
    """What a super-resolution stage adds to the first stage: a finer grid of tokens."""

    coglm: CogLMConfig
    n_text: int  # text slots before the picture, filled from the right; longer texts are cut
    factor: int = 3  # fine tokens per coarse token, along each side
    window: tuple[int, int] = (9, 5)  # rows and columns of fine tokens that a fine token looks at
    coarse_window: tuple[int, int] = (5, 5)  # the same on the coarse grid; direct stage only
    # What a fine token starts from. "tiled", as released: the token <start_of_image>, and a position that at first
    # repeats the coarse grid's. Not in the original: "enlarged", where the position is that of the coarse token which
    # covers it, and the token is the one found there when the coarse picture is enlarged bicubically.
    fine_start: FineStart = "tiled"
    # Not in the original, whose direct stage uses CogLM's norms and MLPs for fine tokens too: it has its own ones.
    own_layers: bool = False

    @property
    def fine_grid(self) -> tuple[int, int]:
        """Rows and columns of the fine picture, in tokens."""
        return (self.coglm.layout.grid * self.factor,) * 2


@dataclass(frozen=True)
class SamplingConfig:
    """How the next picture token is drawn: cluster sampling, explained in ``sampling.py``."""

    temperature: float = 1.15
    top_k: int = 16  # number of clusters that may be drawn
    cluster_temperature: float = 1.0  # second temperature, inside the drawn cluster
    n_clusters: int = 500  # clusters of the codebook; 0: no clusters, plain top-k over tokens
    text_weight: float = 1.4  # added to the attention scores of text tokens
    guidance: float = 1.0  # scale of classifier-free guidance; 1 switches it off

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, checked(item.name, getattr(self, item.name)))
        if 0 < self.temperature < 0.001:  # logits divided by less would overflow
            raise MiniCogViewError(f"temperature is {self.temperature}: give 0 (the likeliest token), or 0.001 to 1000")


def replace_settings(settings: SamplingConfig, overrides: dict[str, Any]) -> SamplingConfig:
    """The same settings with some of them replaced, by name.

    Raises:
        MiniCogViewError: if there is no such setting, or its value makes no sense.
    """
    known = [item.name for item in dataclasses.fields(SamplingConfig)]
    for name in overrides:
        if name not in known:
            raise MiniCogViewError(f"unknown sampling setting {name!r}: choose from {', '.join(known)}")
    return dataclasses.replace(settings, **overrides)


@dataclass(frozen=True)
class Preset:
    """One complete system: the picture tokenizer, the three stages, and how each draws its tokens."""

    name: str
    vqvae: VQVAEConfig
    coglm: CogLMConfig
    direct: SuperResolutionConfig
    iterative: SuperResolutionConfig
    n_text_pieces: int  # SentencePiece pieces, without the three start tokens
    level: int  # level of the tokenizer that the models use
    sampling: SamplingConfig = SamplingConfig()  # of the first stage
    # The original's recipes name other temperatures for super-resolution (1.5 and 1.3), which never reach its models.
    direct_sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_k=100, cluster_temperature=0.89)
    iterative_temperature: float = 1.0  # its top-k is part of LoPAR's schedule
    # How fine tokens are chosen. "sample", as released: at random. "mean": the code nearest to the mean of all codes,
    # which has the least expected error and is not random; of the settings above, it uses only the temperatures.
    fine_choice: Literal["sample", "mean"] = "sample"

    @property
    def coarse_pixels(self) -> int:
        """Side in pixels of the picture that the first stage draws."""
        return self.coglm.layout.grid * self.vqvae.rates[self.level]

    @property
    def fine_pixels(self) -> int:
        """Side in pixels of the picture after super-resolution."""
        return self.coarse_pixels * self.direct.factor

    def with_coglm(self, coglm: CogLMConfig) -> Preset:
        """The same system with a first stage of other sizes."""
        direct, iterative = (dataclasses.replace(stage, coglm=coglm) for stage in (self.direct, self.iterative))
        return dataclasses.replace(self, coglm=coglm, direct=direct, iterative=iterative)


def make_preset(
    name: str,
    vqvae: VQVAEConfig,
    layout: LayoutConfig,
    transformer: dict[str, Any],
    n_text_pieces: int,
    level: int,
    direct: dict[str, Any] | None = None,
    iterative: dict[str, Any] | None = None,
    **sampling: Any,
) -> Preset:
    """Make a preset; sizes that follow from others need not be given: the vocabulary and the number of positions.

    Args:
        transformer: fields of ``TransformerConfig``, at least ``n_layers``, ``d_model`` and ``n_heads``.
        direct, iterative: fields of ``SuperResolutionConfig`` that differ from the released stages.
        sampling: the remaining fields of ``Preset``.
    """
    sizes = {
        "vocab_size": vqvae.codebook_size + n_text_pieces + 3,
        "max_positions": layout.max_text + 1 + layout.n_image,
        **transformer,
    }
    ids = special_ids(vqvae.codebook_size, n_text_pieces)
    coglm = CogLMConfig(TransformerConfig(**sizes), layout, ids, vqvae.codebook_size)
    first = SuperResolutionConfig(coglm, **{"n_text": 96, **(direct or {})})
    second = SuperResolutionConfig(coglm, **{"n_text": 16, **(iterative or {})})  # reads only the first words
    return Preset(name, vqvae, coglm, first, second, n_text_pieces, level, **sampling)


PRESETS: dict[str, Preset] = {
    "toy": make_preset(
        "toy",
        VQVAEConfig(
            channels=32,
            encoder_multipliers=(1, 2, 3),
            encoder_blocks=1,
            codebook_size=1024,
            codebook_dim=16,
            latent_channels=64,
            decoder_multipliers=((1, 1, 1, 2, 3), (1, 1, 2, 3), (1, 2, 3)),
            n_groups=8,
        ),
        LayoutConfig(max_text=48, grid=8, n_patches=3, patch_size=3),
        {"n_layers": 5, "d_model": 256, "n_heads": 4},
        n_text_pieces=4500,
        level=0,
        direct={"n_text": 48, "fine_start": "enlarged", "own_layers": True},
        iterative={"fine_start": "enlarged"},
        sampling=SamplingConfig(temperature=0.3, top_k=16, n_clusters=64, text_weight=0.0, guidance=1.5),
        direct_sampling=SamplingConfig(temperature=0.25, n_clusters=0),
        iterative_temperature=0.25,
        fine_choice="mean",
    ),
    "small": make_preset(
        "small",
        VQVAEConfig(codebook_size=8192),
        LayoutConfig(max_text=112, grid=20),
        {"n_layers": 12, "d_model": 768, "n_heads": 12},
        n_text_pieces=32000,
        level=1,
        sampling=SamplingConfig(temperature=1.0, n_clusters=500),
    ),
    "cogview2": make_preset(
        "cogview2",
        VQVAEConfig(),
        LayoutConfig(),
        {"n_layers": 48, "d_model": 3072, "n_heads": 48, "max_positions": 1024},
        n_text_pieces=130000,
        level=1,
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        MiniCogViewError: if there is no such preset; the message lists them all.
    """
    if name not in PRESETS:
        raise MiniCogViewError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def to_json(config: Any) -> str:
    """A configuration dataclass as JSON, to be stored beside its weights."""
    return json.dumps(dataclasses.asdict(config))


RETIRED = {"dropout": 0.0}  # fields that older files still have, with the only value that they ever had


def _build(kind: Any, value: Any) -> Any:
    """JSON's ``value`` as the type ``kind``: dictionaries become nested dataclasses, lists become tuples."""
    if dataclasses.is_dataclass(kind):
        types = get_type_hints(kind)
        fields = {key: item for key, item in value.items() if key in types or RETIRED.get(key, ...) != item}
        return kind(**{key: _build(types.get(key), item) for key, item in fields.items()})  # type: ignore[operator]
    return tuple(_build(None, item) for item in value) if isinstance(value, list) else value


def from_json(kind: type, text: str) -> Any:
    """Rebuild a configuration dataclass of type ``kind`` from the text that ``to_json`` made.

    Raises:
        MiniCogViewError: if the text has a field that ``kind`` does not have, or lacks one that it needs.
    """
    try:
        return _build(kind, json.loads(text))
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise MiniCogViewError(f"stored {kind.__name__} does not fit this version: {error}") from None
