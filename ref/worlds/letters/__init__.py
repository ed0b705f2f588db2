"""Text-to-image in miniature: SD3's own classes, trained from scratch on coloured capitals of free typefaces.

Data are A to Z of some hundred typefaces (`weights/faces.csv` names each with its package and licence)
as masks of 32 x 32 pixels, in random ink on random paper, captioned "a letter A". The model is a real
`SD3Transformer2DModel` on the latents of a real `AutoencoderKL`, only small: 4 x 8 x 8 latents, 16 tokens.

    python -m ref.worlds.letters.base        # trains everything again, into outputs/letters_base (hours)
    python -m ref.worlds.letters.fonts DIR   # draws the masks again from Debian's font packages (minutes)
    python -m ref.worlds.letters.quality     # the base model beside its data

**Reward.** What RLHF has: a hidden rater (`utility`: legible, heavy, contrasty) chose among pairs of the base model's samples,
and a network learnt to predict the choices (`Preference`). It can be over-optimised. A second network, trained on
other pairs, and the rater's own utility are held out. `Lean` is another reward, a rule: ink to the right of the
middle, read by RapidOCR. The base model rarely meets it, and every face and every hue can.

**Perceptual space.** phi is trained contrastively (SimCLR, arXiv 2002.05709) to tell one picture from others of
the same letter, in the same colours or the same face, whatever noise, blur, compression and blotches do to it:
it sees the face and the hues and is blind to what a policy could spoil a picture with. Of base samples it spreads 8
directions; `sharp`, the same at the usual low temperature, 32: there all pictures are about equally far apart, and PEC
has little to choose between.

**Words** (captions.py) stand in place of text encoders.

**Judges** (judges.py). RapidOCR's recogniser, which nobody here trained, says how many letters are
read; a classifier of typefaces says how many faces are drawn.
"""

from pathlib import Path

from ref.models.sd3 import SD3
from ref.worlds.letters.captions import VOCABULARY, CaptionEncoder
from ref.worlds.letters.data import LETTERS, PROMPTS, WEIGHTS, label, labels, masks, paint, palettes, renders
from ref.worlds.letters.judges import Judge, Lean, Phi, Preference, ink, measures, read_head, read_heads, right, spaces

__all__ = [
    "LETTERS", "PROMPTS", "VOCABULARY", "WEIGHTS", "Judge", "Lean", "Phi", "Preference", "ink",
    "label", "labels", "load", "load_model", "masks", "measures", "paint", "palettes", "read_heads", "renders", "right", "spaces",
]  # fmt: skip


def load_model(folder: Path | str = WEIGHTS, guidance_scale: float = 1.0) -> SD3:
    """The text-to-image model alone, frozen. Raises FileNotFoundError with the remedy."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    folder = Path(folder)
    if not (folder / "captions.safetensors").exists():
        raise FileNotFoundError(
            f"no letters weights in {folder}; make them with: python -m ref.worlds.letters.base --output-dir {folder}"
        )
    captions = read_head(CaptionEncoder(), folder / "captions.safetensors")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer").float()
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return SD3(transformer, vae, scheduler, captions, guidance_scale=guidance_scale)


def load(folder: Path | str = WEIGHTS, guidance_scale: float = 1.0) -> tuple[SD3, Preference, Phi, Judge]:
    """(model, reward, encoder, judge), frozen and in eval mode. Raises FileNotFoundError with the remedy."""
    model, heads = load_model(folder, guidance_scale), read_heads(Path(folder))
    return model, heads["preference"], heads["phi"], Judge()
