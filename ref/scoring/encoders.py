"""Perceptual spaces at full scale: phi maps finished images to points on the unit sphere.

    phi(x) = f(8-bit x, as f's own processor wants it) / ||...||      images [B, 3, H, W] in [0, 1] -> [B, D]

| name                          | model                                   | phi                             | text |
|-------------------------------|-----------------------------------------|---------------------------------|------|
| `pickscore`                   | yuvalkirstain/PickScore_v1, CLIP ViT-H  | projected image embedding       | yes  |
| `clip`                        | openai/clip-vit-large-patch14           | projected image embedding       | yes  |
| `clip_h`                      | laion/CLIP-ViT-H-14-laion2B-s32B-b79K   | projected image embedding       | yes  |
| `dino`                        | facebook/dinov2-large                   | class token after the last norm | no   |
| `siglip`                      | google/siglip-so400m-patch14-384        | pooled by its attention head    | no   |
| `hpsv2`                       | xswu/HPSv2, open_clip ViT-H-14          | projected image embedding       | yes  |
| `open_clip:MODEL/PRETRAINED`  | as open_clip lists them                 | projected image embedding       | yes  |
| `FILE.py:NAME`                | a function of one's own, see own.py     | what it returns                 |      |

`NAME=SOURCE` takes the weights from a local folder or another hub repository of the same kind, for
example `pickscore=/models/PickScore_v1` or `open_clip=/models/mine` (with its open_clip_config.json).

Images are rounded to 8 bits first, as a saved PNG would be, so that a score is the score of the file
that a user can look at. All preprocessing runs on tensors on the model's device.

An encoder remembers the features of the last tensor that it was called with. A reward built on the
same encoder object therefore costs no second forward pass (the paper's 1.01 x). Features do not
depend on the batch: micro-batches bound the memory and each image stands for itself.
"""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ref.models.hub import damaged, hub_errors, quiet
from ref.options import near
from ref.scale.memory import ended
from ref.scale.textfiles import read_json
from ref.scoring.own import ENCODER, find_own, is_own, load_own

HUB = {
    "pickscore": "yuvalkirstain/PickScore_v1",
    "clip": "openai/clip-vit-large-patch14",
    "clip_h": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "dino": "facebook/dinov2-large",
    "siglip": "google/siglip-so400m-patch14-384",
    "hpsv2": "xswu/HPSv2",
}
HPS_FILE = "HPS_v2.1_compressed.pt"
OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's pixels


def to_bytes(images: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Images in [0, 1] -> uint8, rounded and clamped."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def blank_bad(values: Float[Tensor, "B ..."], images: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """`values` with NaN for every image that holds one: 8-bit pixels would hide it."""
    bad = ~images.flatten(1).isfinite().all(1).to(values.device)
    return values.masked_fill(bad.view(-1, *[1] * (values.ndim - 1)), torch.nan)


class Encoder(nn.Module):
    """images [B, 3, H, W] in [0, 1] -> unit-norm features [B, D], float32, on the images' device.

    A kind of encoder is a subclass with `embed_images(uint8 [b, 3, H, W]) -> [b, D]` and, where the
    model reads text, `embed_text(prompts) -> [b, D]`. Frozen, in eval mode, without gradients.
    """

    def __init__(self, name: str, model: nn.Module, micro_batch: int = 32):
        super().__init__()
        self.name, self.micro_batch = name, micro_batch
        self.model = model
        self.eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}
        self._last = (lambda: None, None, None)  # weak reference to the images, their version, features

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def embed_text(self, prompts: list[str]) -> Float[Tensor, "B D"]:
        raise ValueError(f"the encoder {self.name} reads no text; choose pickscore, clip, clip_h or open_clip")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Float[Tensor, "B D"]:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be floating point [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        version = None if images.is_inference() else images._version  # counts writes in place
        seen, seen_version, features = self._last
        if seen() is not images or seen_version != version:
            parts = [self.embed_images(to_bytes(part.to(self.device))) for part in images.split(self.micro_batch)]
            features = F.normalize(torch.cat(parts).float(), dim=1).to(images.device)
            features = blank_bad(features, images)
            self._last = (weakref.ref(images), version, features)
        return features

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Float[Tensor, "B D"]:
        """Unit-norm features of the prompts, float32. Raises ValueError when the model reads no text.

        Each prompt is read alone and once, so that its features do not depend on what it is asked with.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = F.normalize(self.embed_text([prompt]).float(), dim=1)[0]
        return torch.stack([self._texts[prompt] for prompt in prompts])


class Transformers(Encoder):
    """DINOv2 and SigLIP: a transformers vision model with a pooled output, and its own image processor."""

    def __init__(self, name: str, model: nn.Module, processor):
        super().__init__(name, model)
        self.processor = processor

    def pixels(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        return self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.model(pixel_values=self.pixels(images)).pooler_output


class CLIP(Transformers):
    """A transformers `CLIPModel`: both towers end in one space."""

    def __init__(self, name: str, model: nn.Module, processor, tokenizer):
        super().__init__(name, model, processor)
        self.tokenizer = tokenizer

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.model.get_image_features(pixel_values=self.pixels(images)).pooler_output

    def embed_text(self, prompts: list[str]) -> Float[Tensor, "B D"]:
        # always padded to the full length, so that a prompt's neighbours do not change its padding
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.device)).pooler_output


class OpenCLIP(Encoder):
    """An open_clip model; its image recipe is `model.visual.preprocess_cfg`, applied to tensors."""

    def __init__(self, name: str, model: nn.Module, tokenizer):
        super().__init__(name, model)
        self.tokenizer, self.recipe = tokenizer, model.visual.preprocess_cfg

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        from torchvision.transforms.v2.functional import normalize

        pixels = fit(images, **{k: self.recipe[k] for k in ("size", "resize_mode", "interpolation", "fill_color")})
        pixels = normalize(pixels.float() / 255, list(self.recipe["mean"]), list(self.recipe["std"]))
        return self.model.encode_image(pixels.to(self.dtype))

    def embed_text(self, prompts: list[str]) -> Float[Tensor, "B D"]:
        return self.model.encode_text(self.tokenizer(prompts).to(self.device))


def fit(
    images: UInt8[Tensor, "B 3 H W"], size, resize_mode: str, interpolation: str, fill_color: int
) -> UInt8[Tensor, "B 3 h w"]:
    """Bring images to `size` as open_clip does, antialiased.

    shortest: scale the shorter side to fit and cut the centre out; longest: scale the longer side to fit
    and pad; squash: scale both.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import center_crop, pad, resize

    height, width = (size, size) if isinstance(size, int) else size
    mode = InterpolationMode(interpolation)
    if resize_mode == "squash":
        return resize(images, [height, width], mode)
    if resize_mode == "shortest" and height == width:
        return center_crop(resize(images, [height], mode), [height, width])
    ratios = (images.shape[2] / height, images.shape[3] / width)
    ratio = max(ratios) if resize_mode == "longest" else min(ratios)
    images = resize(images, [round(images.shape[2] / ratio), round(images.shape[3] / ratio)], mode)
    missing_h, missing_w = max(height - images.shape[2], 0), max(width - images.shape[3], 0)
    left, top = missing_w // 2, missing_h // 2
    return center_crop(pad(images, [left, top, missing_w - left, missing_h - top], fill=fill_color), [height, width])


def find(name: str, source: str, file: str) -> Path:
    """`file` of a local folder or hub repository. Raises OSError with one line: what is missing, and the remedy."""
    from huggingface_hub import hf_hub_download

    path = Path(source) / file
    if path.parent.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"cannot load {name}: the folder {source} has no {file}")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise FileNotFoundError(f"cannot load {name}: there is no folder {source}")
    with hub_errors(source):
        return Path(hf_hub_download(source, file))


@contextmanager
def one_line(name: str, source: str) -> Iterator[None]:
    """What libraries have to say about unreadable, foreign or unsafe weights, as an OSError of one line.

    Libraries seldom name the file: of a folder it is looked for. Their warnings are kept back.
    """
    try:
        with quiet():
            yield
    except Exception as error:  # whatever comes: a missing key, a pickle, an attribute of something else
        if ended(error) or getattr(error, "errno", None) is not None:  # memory's or the system's end, a full disk
            raise
        reason = damaged(Path(source)) if Path(source).is_dir() else None
        reason = reason or " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"cannot load {name} from {source}: {reason}; fetch it again, or give another folder") from error


def transformers_encoder(name: str, source: str, dtype: torch.dtype) -> Transformers:
    """pickscore, clip, clip_h, dino or siglip; weights that the model lacks are refused, not drawn at random."""
    import transformers

    family = {"dino": "dinov2", "siglip": "siglip"}.get(name.partition("=")[0], "clip")
    found = read_json(find(name, source, "config.json")).get("model_type")
    if not str(found).startswith(family):
        raise ValueError(f"cannot load {name}: {source} holds a model of type {found}, not {family}")
    kind = {"dinov2": transformers.Dinov2Model, "siglip": transformers.SiglipVisionModel, "clip": transformers.CLIPModel}[family]  # fmt: skip
    with one_line(name, source):
        model, report = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"cannot load {name}: {source} lacks the weight {min(report['missing_keys'])}")
    recipe = source
    folder, processors = Path(source), ("preprocessor_config.json", "processor_config.json")
    alone = folder.is_dir() and not any((folder / file).exists() for file in processors)
    if source == HUB["pickscore"] or name.startswith("pickscore") and alone:
        # tuned from this model, whose processor all its users take
        recipe = HUB["clip_h"]
        find(name, recipe, "preprocessor_config.json")
    with one_line(name, recipe):
        processor = transformers.AutoImageProcessor.from_pretrained(recipe)
        if family == "clip":
            return CLIP(name, model, processor, transformers.AutoTokenizer.from_pretrained(recipe))
    return Transformers(name, model, processor)


def open_clip_encoder(name: str, source: str | None, dtype: torch.dtype) -> OpenCLIP:
    """`open_clip:MODEL/PRETRAINED`, `open_clip=SOURCE` or `hpsv2`. Pickled weights load with weights_only=True."""
    import open_clip

    recipe = None
    if name.startswith("hpsv2"):  # HPSv2 scales the longer side and pads, unlike the model that it was tuned from
        model, weights, recipe = "ViT-H-14", str(find(name, source, HPS_FILE)), {"resize_mode": "longest"}
    elif source is not None:
        find(name, source, "open_clip_config.json")
        model, weights = ("local-dir:" if Path(source).is_dir() else "hf-hub:") + source, None
    else:
        model, _, weights = name.partition(":")[2].partition("/")
        if (model, weights) not in open_clip.list_pretrained():
            known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none; see open_clip.list_pretrained()"
            raise ValueError(f"open_clip has no weights {weights!r} of {model!r}; write open_clip:MODEL/PRETRAINED, known for this model: {known}")  # fmt: skip
        repository = open_clip.get_pretrained_cfg(model, weights).get("hf_hub", "").strip("/")
        if repository:
            find(name, repository, "open_clip_config.json")
    with one_line(name, weights or model):
        network = open_clip.create_model(model, weights, force_preprocess_cfg=recipe, require_pretrained=True)
    return OpenCLIP(name, network.to(dtype), open_clip.get_tokenizer(model))


def check_name(name: str) -> None:
    """Raises ValueError for a name that no encoder has, as `find_own` for FILE.py:NAME; no weights are loaded."""
    if is_own(name):
        find_own(name, ENCODER)
        return
    word, _, source = name.partition("=")
    if word not in HUB and not word.startswith("open_clip:") and not (word == "open_clip" and source):
        guess = near(word, [*HUB, "open_clip"])
        raise ValueError(f"unknown encoder {name!r}; {guess}choose {', '.join(HUB)}, open_clip:MODEL/PRETRAINED, NAME=FOLDER or FILE.py:NAME")  # fmt: skip


def load_encoder(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Callable:
    """The encoder called `name`: a row of the table above, or NAME=SOURCE.

    dtype is that of weights and activations; features are float32. bfloat16 is good enough for phi, but its
    rounding is of the size of the differences between PickScores within a group: rewards want float32.

    Raises ValueError for an unknown name or weights of another kind of model, OSError with one line that
    names the model and the remedy when weights cannot be had (gated, missing, no network).
    """
    check_name(name)
    if is_own(name):
        return load_own(name, ENCODER)
    word, _, source = name.partition("=")
    source = source or HUB.get(word)
    make = open_clip_encoder if word.startswith("open_clip") or word == "hpsv2" else transformers_encoder
    return make(name, source, dtype).to(device)
