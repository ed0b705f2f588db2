"""GenEval (arXiv 2310.11513): does the image show what the prompt asks for? Objects are found, rules count them.

Prompts come from GenEval's own file, `--prompts evaluation_metadata.jsonl`, a line of which is

    {"tag": "color_attr", "prompt": "a photo of a red cup and a blue dog",
     "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]}

with "position": ["left of", 0] for a place relative to the clause of that number, and "exclude" for what may not be
there. A Mask2Former trained on COCO finds objects; those above a confidence of 0.3 count, 0.9 where the tag is "counting".
Each requirement is met to a share of 0 to 1:

    count      of the n objects asked for, those that are there           the n surest are looked at from here on
    color      of the n, those that CLIP (ViT-L/14) calls so: cut out along their mask, on grey, among ten colours
    position   of the pairs, those that stand so: the distance of the centres, less a tenth of both boxes' sides, has to be
               more than half of it in this direction
    exclude    1 below the count, else (count - 1) / objects found

`geneval_strict` is 1 where all shares are 1, else 0: GenEval's own verdict. `geneval` is the shares' mean, a reward that
says how far off an image is (our choice; Flow-GRPO's server grades likewise, by other fractions). Confidences are those of
transformers' port of the detector, so a verdict at a threshold may differ from mmdetection's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ref.options import near
from ref.scale.textfiles import read_json
from ref.scoring.encoders import Encoder, find, one_line, to_bytes
from ref.scoring.reward import Reward

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
SURE, SURE_COUNTING, MARGIN = 0.3, 0.9, 0.1
GREY = 0x99 / 255
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis (x, y), sign
CLASSES = (  # COCO's 80 in their order, under GenEval's names
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """An object that was found."""

    sure: float  # confidence, 0 .. 1
    mask: Bool[Tensor, "H W"]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """left, top, right, bottom; the last two are those of the first column and row behind it."""
        rows, columns = (self.mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
        return columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1


def stands(a: Thing, side: str, b: Thing) -> bool:
    """Whether a is on this side of b."""
    boxes = torch.tensor([a.box, b.box], dtype=torch.float64).view(2, 2, 2)  # object, corner, axis
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    apart = (offset.abs() - MARGIN * (boxes[:, 1] - boxes[:, 0]).sum(0)).clamp(min=0) * offset.sign()
    axis, sign = SIDES[side]
    return bool(sign * apart[axis] > 0.5 * offset.norm())


def shares(wants: dict, found: dict[str, list[Thing]], color: Callable[[Thing, str], str]) -> list[float]:
    """To what share each requirement is met, in the order of the prompt's clauses.

    wants   a line of GenEval's file
    found   the objects of each class, the surest first
    color   of an object of a class
    """
    met, groups = [], []
    for clause in wants["include"]:
        kind, n = clause["class"], clause["count"]
        groups.append(things := found.get(kind, [])[:n])
        met.append(len(things) / n)
        if "color" in clause:
            met.append(sum(color(thing, kind) == clause["color"] for thing in things) / n)
        if "position" in clause:
            side, other = clause["position"]
            pairs = n * wants["include"][other]["count"]
            met.append(sum(stands(a, side, b) for a in things for b in groups[other]) / pairs)
    for clause in wants.get("exclude", ()):
        there = len(found.get(clause["class"], []))
        met.append(1.0 if there < clause["count"] else (clause["count"] - 1) / there)
    return met


def check(wants: dict) -> None:
    """Raises ValueError for a line of the file that the rules cannot read."""
    clauses = [("include", clause) for clause in wants["include"]] + [("exclude", c) for c in wants.get("exclude", ())]
    for number, (part, clause) in enumerate(clauses):
        kind, n = clause["class"], clause["count"]
        if kind not in CLASSES:
            raise ValueError(f"no object is called {kind!r}; {near(str(kind), CLASSES)}COCO's 80 classes are known")
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"count must be a number from 1, got {n!r}")
        if clause.get("color", "red") not in COLORS:
            raise ValueError(f"color must be one of {', '.join(COLORS)}, got {clause['color']!r}")
        if part == "include" and "position" in clause:
            side, other = clause["position"]
            if side not in SIDES or other not in range(number):
                raise ValueError(
                    f"position must be one of {', '.join(SIDES)} and an earlier clause, got {clause['position']!r}"
                )
    if not wants["include"]:
        raise ValueError("include is empty")


class GenEval(Reward):
    """Mean of the shares, of `geneval_strict` 1 where all are 1; see the top of this file.

    source   a folder that holds the two models as `mask2former` and `clip`; None: those of the hub
    """

    def __init__(
        self, name: str, source: str | None, encoder: Callable[[str], Encoder], device="cpu", dtype=torch.float32
    ):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        super().__init__(name)
        place = f"{source}/mask2former" if source else MASK2FORMER
        kind = read_json(find(name, place, "config.json")).get("model_type")
        if kind != "mask2former":
            raise ValueError(f"cannot load {name}: {place} holds a model of type {kind}, not mask2former")
        with one_line(name, place):
            self.processor = AutoImageProcessor.from_pretrained(place)
            detector, report = Mask2FormerForUniversalSegmentation.from_pretrained(
                place, dtype=dtype, output_loading_info=True
            )
        if report["missing_keys"]:
            raise ValueError(f"cannot load {name}: {place} lacks the weight {min(report['missing_keys'])}")
        if detector.config.num_labels != len(CLASSES):
            raise ValueError(f"cannot load {name}: {place} knows {detector.config.num_labels} classes, not COCO's 80")
        self.detector, self.micro_batch = detector.eval().requires_grad_(False).to(device), 8
        self.clip = encoder(f"clip={source}/clip" if source else "clip")

    @staticmethod
    def check_prompts(prompts: list[str]) -> None:
        for prompt in prompts:
            wants = getattr(prompt, "wants", None)
            if wants is None:
                raise ValueError(f"the GenEval reward needs what a prompt asks for, its \"include\" in a .jsonl file like GenEval's evaluation_metadata.jsonl; got {str(prompt)!r}")  # fmt: skip
            try:
                check(wants)
            except (ValueError, TypeError, LookupError) as error:
                why = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"the GenEval reward cannot read {str(prompt)!r}: {why}") from None

    def find(self, images: Float[Tensor, "B 3 H W"], sure: list[float]) -> list[dict[str, list[Thing]]]:
        """The objects of each image by class, those above its confidence, the surest first."""
        size, found = tuple(images.shape[2:]), []
        for part in to_bytes(images).split(self.micro_batch):
            pixels = self.processor(images=list(part), return_tensors="pt")["pixel_values"]
            said = self.detector(pixel_values=pixels.to(self.detector.device, self.detector.dtype))
            read = self.processor.post_process_instance_segmentation(
                said, threshold=SURE, target_sizes=[size] * len(part), return_binary_maps=True
            )
            for one in read:
                things = {}
                for n, info in sorted(enumerate(one["segments_info"]), key=lambda item: -item[1]["score"]):
                    if info["score"] > sure[len(found)]:
                        thing = Thing(info["score"], one["segmentation"][n].bool().cpu())
                        things.setdefault(CLASSES[info["label_id"]], []).append(thing)
                found.append(things)
        return found

    def color(self, image: Float[Tensor, "3 H W"], thing: Thing, kind: str) -> str:
        """What CLIP calls the colour of an object that is cut out along its mask."""
        left, top, right, bottom = thing.box
        cut = torch.where(thing.mask, image.cpu(), GREY)[None, :, top:bottom, left:right]
        forms = ("a photo of a {} {kind}", "a photo of a {}-colored {kind}", "a photo of a {} object")
        words = [form.format(color, kind=kind) for color in COLORS for form in forms]
        names = self.clip.text(words).view(len(COLORS), len(forms), -1).mean(1)
        likeness = torch.nn.functional.normalize(names, dim=1) @ self.clip(cut)[0].to(names.device)
        return COLORS[likeness.argmax()]

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        self.check_prompts(prompts)
        sure = [SURE_COUNTING if prompt.wants.get("tag") == "counting" else SURE for prompt in prompts]
        values = []
        for image, prompt, found in zip(images, prompts, self.find(images, sure)):
            met = shares(prompt.wants, found, lambda thing, kind: self.color(image, thing, kind))
            values.append(float(min(met) == 1) if self.name.endswith("strict") else sum(met) / len(met))
        return torch.tensor(values)
