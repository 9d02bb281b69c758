"""Train the tokenizer and the CogLM that notebook 04 starts from.

    OMP_NUM_THREADS=1 python scripts/make_shapes.py [FOLDER]

The script writes ``text.model``, ``vqvae.safetensors`` and ``coglm.safetensors`` (half precision) into the package, or
into FOLDER, and prints how many pictures are exactly right. It takes about seven minutes on one thread.

The tokenizer is designed for composition: 16 x 16 pixels become 4 x 4 cells with only 24 codes. There are more kinds of
cells than codes, so no code can mean "a red circle". A shape takes several codes, and a colour and a shape that CogLM
never sees together take codes that it knows. That is necessary for composition, though not sufficient, as the notebook
shows. For the same reason no loss term has to make the encoder local, as one does for the emoji in
``training/vqvae.py``. The tokenizer knows no words and learns from all scenes; CogLM never sees a held-out pair of
colour and shape.

Rounding and the number format that is chosen differ between machines: expect similar numbers, not equal ones.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

import minicogview
from minicogview.checkpoints.weight_files import save_model
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, TransformerConfig, VQVAEConfig
from minicogview.data import shapes
from minicogview.tokenizer import Tokenizer
from minicogview.training import RunOptions, Settings, fit
from minicogview.training.codebook import CodebookLearner
from minicogview.training.coglm import CogLMData, CogLMObjective, CogLMRecipe, embed_codebook
from minicogview.training.text import train_text_tokenizer
from minicogview.training.vqvae import COMMITMENT, reconstruction
from minicogview.vqvae import VQVAE

PIXELS, GRID, CODES, SEED = 16, 4, 24, 0
ENGLISH = ["a", *shapes.COLOURS, *shapes.SHAPES, *shapes.SIZES, "above", "below", "left", "right", "of", "to", "the"]
CHINESE = [*shapes.CHINESE.values(), "在"]
N_PIECES = 404  # bytes, letters and punctuation, and one piece for each of the words above

VQVAE_CONFIG = VQVAEConfig(
    channels=16,
    encoder_multipliers=(1, 2, 2),
    encoder_blocks=1,
    codebook_size=CODES,
    codebook_dim=8,
    latent_channels=32,
    decoder_multipliers=((1, 2, 2),),  # one level: 4 pixels a token
    n_groups=4,
)
LAYOUT = LayoutConfig(max_text=20, grid=GRID, n_patches=2, patch_size=2)
QUIET = RunOptions(progress=False)
# First much noise and a large weight on text, then new scenes with little noise: (recipe, steps, lr, seed).
ROUNDS = (
    (CogLMRecipe(max_noise=0.1, lookalike=0.2, n_neighbours=4), 2500, 3e-3, 2),
    (CogLMRecipe(max_noise=0.05, lookalike=0.2, n_neighbours=4, spread=0.0, text_weight=1.0), 3000, 2e-3, 4),
)


def scenes(n: int, seed: int, heldout_share: float = 0.0) -> list[shapes.Scene]:
    """``n`` random scenes; ``heldout_share`` of them contain a held-out pair of colour and shape."""
    rng = random.Random(seed)
    return [shapes.random_scene(rng, rng.random() < heldout_share) for _ in range(n)]


def pictures(some: list[shapes.Scene]) -> Tensor:
    """The scenes as pictures (N, 3, 16, 16) in 0..1."""
    drawn = torch.from_numpy(np.stack([shapes.draw(scene, PIXELS) for scene in some]))
    return rearrange(drawn, "n h w c -> n c h w").float() / 255


class TokenizerObjective:
    """Trains with a reconstruction and a commitment loss; the codebook follows the encoder. See ``training.fit``."""

    calls_parts = True

    def __init__(self, model: VQVAE, data: Tensor, steps: int, batch_size: int = 32):
        self.model, self.data, self.batch_size = model, data, batch_size
        self.warm_up, self.revive_until = steps // 10, 6 * steps // 10  # steps
        self.learner = CodebookLearner(model.quantizer.codebook)
        self._seen: tuple[Tensor, Tensor] | None = None

    def batch(self, step: int, size: int) -> Tensor:
        """``size`` pictures, which depend on the step alone."""
        return self.data[torch.randint(len(self.data), (size,), generator=self._generator(step))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of this step's batch, and nothing to log. During the warm-up, vectors are not quantized."""
        if step == self.warm_up:
            with torch.no_grad():
                self.learner.place(self._vectors(self.batch(step, 512))[1], self._generator(step))
        batch = self.batch(step, self.batch_size)
        z, flat = self._vectors(batch)
        rows, commitment = z, z.new_zeros(())
        if step >= self.warm_up:
            rows, commitment, codes = self.model.quantizer.straight_through(z)
            self._seen = codes.flatten(), flat.detach()
        output = self.model.decoder(0)(rows)
        return reconstruction(output, self.model.normalise(batch)) + COMMITMENT * commitment, {}

    def after_step(self, step: int) -> None:
        """Update the codebook; until step ``revive_until``, also move unused rows to where they are needed."""
        if self._seen is not None:
            self.learner.update(*self._seen)
            if step < self.revive_until and step % 10 == 0:
                self.learner.revive(self._seen[1], self._generator(step))

    def _vectors(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output, before quantization: as a grid (B, C, h, w) and as vectors (B * h * w, C)."""
        z = self.model.quantizer.project(self.model.features(batch, 0))
        return z, rearrange(z, "b c h w -> (b h w) c")

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(SEED * 1_000_003 + step)


@torch.no_grad()
def exact(vqvae: VQVAE, codes: Tensor, some: list[shapes.Scene]) -> float:
    """The share of codes (N, h, w) whose decoded pictures show everything in their scenes."""
    drawn = rearrange((vqvae.decode(codes, 0).clamp(0, 1) * 255).round().byte(), "n c h w -> n h w c").numpy()
    return float(np.mean([all(shapes.check(one, scene).values()) for one, scene in zip(drawn, some, strict=True)]))


def train_vqvae(steps: int) -> VQVAE:
    """Train the picture tokenizer; it is returned in eval mode."""
    torch.manual_seed(SEED)
    model = VQVAE(VQVAE_CONFIG)
    objective = TokenizerObjective(model, pictures(scenes(4000, 1, heldout_share=0.2)), steps)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(steps=steps, lr=3e-3, warmup=20, betas=(0.9, 0.99), ema_decay=0.995, precision="fp32")
        fit(objective, folder, settings, QUIET)
    return model


def new_coglm(vqvae: VQVAE, tokenizer: Tokenizer) -> CogLM:
    """An untrained CogLM with 0.66 million parameters."""
    torch.manual_seed(SEED)
    sizes = TransformerConfig(
        n_layers=3,
        d_model=128,
        n_heads=4,
        vocab_size=tokenizer.vocab_size,
        max_positions=LAYOUT.max_text + 1 + LAYOUT.n_image,
    )
    model = CogLM(CogLMConfig(sizes, LAYOUT, tokenizer.special_ids, CODES))
    for module in model.modules():
        if isinstance(module, nn.Linear):  # at this width a sandwich model starts slowly from 0.02 (notebook 02)
            nn.init.normal_(module.weight, std=sizes.d_model**-0.5)
    embed_codebook(model, vqvae.quantizer.codebook.detach(), torch.Generator().manual_seed(SEED))
    return model


def train_round(model: CogLM, tokenizer: Tokenizer, recipe: CogLMRecipe, steps: int, lr: float, seed: int) -> None:
    """Train on 4,000 scenes from this seed; afterwards the model has the averaged weights and is in eval mode."""
    some, vqvae = scenes(4000, seed), tokenizer.vqvae
    assert vqvae is not None
    with torch.no_grad():
        codes = vqvae.encode(pictures(some), 0).flatten(1)
    data = CogLMData(
        codes,
        lambda i, language, rng: shapes.caption(some[i], language),
        lambda i, language: shapes.caption(some[i], language),
        tokenizer,
    )
    objective = CogLMObjective(model, data, vqvae.quantizer.codebook.detach(), recipe)
    with tempfile.TemporaryDirectory() as folder:
        fit(objective, folder, Settings(steps=steps, lr=lr, ema_decay=0.99), QUIET)


def round_off(model: nn.Module) -> None:
    """Round all weights to half precision, the format in which they are stored."""
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})


def drawn_exactly(model: CogLM, tokenizer: Tokenizer, some: list[shapes.Scene]) -> float:
    """The share of scenes that the model draws exactly, by greedy sampling from their English captions."""
    texts = [tokenizer.encode(shapes.caption(scene, "en")) for scene in some]
    codes = model.generate(texts, lambda logits, step: logits.argmax(-1)).tokens
    assert tokenizer.vqvae is not None
    return exact(tokenizer.vqvae, rearrange(codes, "b (h w) -> b h w", h=GRID), some)


def main(folder: Path, vqvae_steps: int = 4000) -> None:
    """Train the models, write all three files to ``folder`` and print how good they are."""
    folder.mkdir(parents=True, exist_ok=True)
    train_text_tokenizer((ENGLISH + CHINESE) * 8, folder / "text.model", N_PIECES, whole=CHINESE)
    vqvae = train_vqvae(vqvae_steps)
    save_model(folder / "vqvae.safetensors", vqvae, vqvae.config, "vqvae")
    round_off(vqvae)
    tokenizer = Tokenizer(folder / "text.model", CODES, vqvae)
    tests = {name: scenes(500, 3, share) for name, share in (("seen pairs", 0.0), ("unseen pairs", 1.0))}
    for name, some in tests.items():
        with torch.no_grad():
            copies = exact(vqvae, vqvae.encode(pictures(some), 0), some)
        print(f"tokenizer, {name}: {copies:.1%} of scenes exact", flush=True)
    model = new_coglm(vqvae, tokenizer)
    for number, a_round in enumerate(ROUNDS, start=1):
        train_round(model, tokenizer, *a_round)
        round_off(model)
        for name, some in tests.items():
            print(f"CogLM after round {number}, {name}: {drawn_exactly(model, tokenizer, some):.1%} exact", flush=True)
    save_model(folder / "coglm.safetensors", model, model.config, "coglm")


if __name__ == "__main__":
    shipped = Path(minicogview.__file__).parent / "weights" / "shapes"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else shipped)
