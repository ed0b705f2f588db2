"""What a run shows: a plan on standard output, lines and bars on standard error, pictures on disk and in the trackers.

Lines and bars are those of the first process, and there are none where nobody wants to see them: within `showing(False)`,
and outside of any `showing`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import Tensor

from ref.scale.checkpoint import atomic_write

SHOWN = ContextVar("shown", default=None)  # the open bars, None where nothing is shown


@contextmanager
def showing(wanted: bool) -> Iterator[None]:
    """At its end bars are closed, so that what is said next, an error perhaps, has a line of its own."""
    token = SHOWN.set([] if wanted else None)
    try:
        yield
    finally:
        for each in reversed(SHOWN.get() or []):
            each.close()
        SHOWN.reset(token)


def bar(things=None, what: str = "", logged: bool = False, **options):
    """tqdm's bar over things, or over a `total`; on a terminal only, unless it is `logged`, too."""
    from tqdm import tqdm

    shown = SHOWN.get()
    made = tqdm(things, what, disable=True if shown is None else False if logged else None, **options)
    if shown is not None:
        shown[:] = [each for each in shown if not each.disable] + [made]  # a closed one is disabled
    return made


def say(text: str, stream=None) -> None:
    """A line above the bar, on standard error or another stream."""
    from tqdm import tqdm

    if SHOWN.get() is not None:
        tqdm.write(text, file=stream or sys.stderr)


def clock(seconds: float, more: int) -> str:
    """When a run ends of which one iteration took so long and so many follow."""
    left = seconds * more
    hours = f"{left / 3600:.1f} h" if left > 3600 else f"{left / 60:.1f} min"
    end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
    return f"the first iteration took {seconds:.1f} s; {more} more take {hours}, until {end}, and evaluations"


def grid(images: Tensor, columns: int, widest: int | None = None) -> Tensor:
    """[B, C, H, W] as one picture [3, h, w] with a line for each prompt, at most `widest` pixels wide."""
    from torchvision.transforms.v2.functional import resize
    from torchvision.utils import make_grid

    picture = make_grid(images.float().clamp(0, 1), columns)
    if widest and picture.shape[2] > widest:
        picture = resize(picture, [round(picture.shape[1] * widest / picture.shape[2]), widest], antialias=True)
    return picture


def save_grid(path: Path, images: Tensor, columns: int, widest: int | None = None) -> None:
    from torchvision.utils import save_image

    picture = grid(images, columns, widest)
    atomic_write(path, lambda temporary: save_image(picture, temporary, format="png"))


def log_grid(trackers: list, images: Tensor, columns: int, step: int) -> None:
    """One picture for each of accelerate's trackers, TensorBoard or W&B, as each takes it."""
    from torchvision.transforms.v2.functional import to_pil_image

    for tracker in trackers:
        picture = grid(images, columns, widest=1024)
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": picture[None].numpy()}, step=step)
        else:
            tracker.log_images({"samples": [to_pil_image(picture)]}, step=step)
