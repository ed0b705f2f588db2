"""What stands for SD3's text encoders."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ref.worlds.letters.data import LETTERS

VOCABULARY = ("", "a", "letter", *LETTERS)  # the first is the empty caption, for guidance


class CaptionEncoder(nn.Module):
    """Word embeddings in place of SD3's CLIP and T5."""

    def __init__(self, dim: int = 64, length: int = 3):
        super().__init__()
        self.length = length
        self.words = nn.Embedding(len(VOCABULARY), dim)
        self.position = nn.Parameter(torch.zeros(length, dim))
        self.pool = nn.Linear(dim, dim)

    def tokens(self, prompts: list[str]) -> Int[Tensor, "B L"]:
        unknown = {w for p in prompts for w in p.split()} - set(VOCABULARY)
        if unknown:
            raise ValueError(f"unknown word {min(unknown)!r}; this model knows {', '.join(VOCABULARY[1:])}")
        rows = [[VOCABULARY.index(w) for w in p.split()][: self.length] for p in prompts]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in rows])

    def embed(self, tokens: Int[Tensor, "B L"]) -> dict[str, Tensor]:
        embeds = self.words(tokens) + self.position
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": self.pool(embeds.mean(1))}

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        """Captions -> prompt_embeds [B, L, E] and pooled_prompt_embeds [B, E], and the negative pair."""
        negative = self.embed(self.tokens([""] * len(prompts)))
        return self.embed(self.tokens(prompts)) | {f"negative_{k}": v for k, v in negative.items()}
