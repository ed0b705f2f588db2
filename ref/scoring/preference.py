"""Rewards of networks that judge: the cosine of an image and its prompt, and the aesthetic predictor."""

from jaxtyping import Float
from torch import Tensor, nn

from ref.scoring.encoders import Encoder
from ref.scoring.reward import Reward


class Cosine(Reward):
    """cos(phi(x), phi(c)) of an encoder with a text tower: PickScore, CLIP score, HPSv2."""

    def __init__(self, name: str, encoder: Encoder):
        super().__init__(name)
        if type(encoder).embed_text is Encoder.embed_text:
            encoder.embed_text([])  # raises: this encoder reads no text
        self.encoder = encoder

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        return (self.encoder(images) * self.encoder.text(prompts).to(images.device)).sum(1)


class Aesthetic(Reward):
    """Aesthetic Predictor v2.5 (github.com/discus0434/aesthetic-predictor-v2-5): w . SigLIP(x) / ||SigLIP(x)|| + b.

    The published head is five linear layers with dropout between them and no nonlinearity.
    """

    def __init__(self, name: str, encoder: Encoder, weights: dict[str, Tensor]):
        super().__init__(name)
        widths = [encoder.model.config.hidden_size, 1024, 128, 64, 16, 1]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.Dropout(0.5))]
        self.head = nn.Sequential(*layers[:-1])
        self.head.load_state_dict({k.removeprefix("scoring_head."): v for k, v in weights.items()})
        self.head.eval().requires_grad_(False).to(encoder.device)
        self.encoder = encoder

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        return self.head(self.encoder(images).to(self.encoder.device))[:, 0]
