"""What a run shows, and that it shows nothing where nobody wants to see it."""

import contextvars
import io
from contextlib import redirect_stderr

import torch
from PIL import Image

from ref.scale.shown import bar, clock, grid, log_grid, save_grid, say, showing


def told(wanted: bool) -> str:
    with redirect_stderr(io.StringIO()) as said, showing(wanted):
        say("a line")
        assert list(bar([1, 2, 3], "things", logged=True)) == [1, 2, 3]
        assert list(bar([1, 2], "on a terminal")) == [1, 2]
        bar(total=2, what="never ended", logged=True).update()
    return said.getvalue()


def test_lines_and_bars_are_shown_within_showing_and_ended_with_it():
    shown = contextvars.copy_context().run(told, True)
    assert "a line\n" in shown and "things: 100%" in shown and "never ended:  50%" in shown
    assert "on a terminal" not in shown  # it is a file
    assert shown.endswith("\n")  # what comes next has a line of its own
    assert told(False) == ""
    with redirect_stderr(io.StringIO()) as said:
        say("outside")
        list(bar([1], "outside"))
    assert said.getvalue() == ""


def test_the_end_is_told():
    words = clock(30.0, 100)
    assert words.startswith("the first iteration took 30.0 s; 100 more take 50.0 min, until ")
    assert "take 25.0 h, until" in clock(90.0, 1000)


def test_a_grid_has_a_line_for_each_prompt_and_is_no_wider_than_asked(tmp_path):
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 10, 20) / 5
    picture = grid(images, 3)
    assert picture.shape == (3, 2 * 12 + 2, 3 * 22 + 2)
    assert [round(picture[0, 7 + 12 * (n // 3), 12 + 22 * (n % 3)].item() * 5) for n in range(6)] == list(range(6))
    save_grid(tmp_path / "x.png", images, 3, widest=34)
    assert Image.open(tmp_path / "x.png").size == (34, 13)


def test_tensorboard_and_wandb_get_the_picture_as_they_take_it(tmp_path):
    """TensorBoard for real. W&B is not installed; accelerate hands its list of pictures to wandb.Image one by one."""
    from accelerate.tracking import TensorBoardTracker
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, taken = TensorBoardTracker("run", tmp_path), {}
    board.start()

    class Other:
        name = "wandb"

        def log_images(self, values, step):
            taken.update({"step": step, **values})

    log_grid([board, Other()], torch.rand(4, 3, 8, 8), 2, 7)
    board.finish()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    [event] = events.Images("samples/0") if "samples/0" in events.Tags()["images"] else events.Images("samples")
    assert (event.step, event.height, event.width) == (7, 22, 22)
    assert taken["step"] == 7 and [picture.size for picture in taken["samples"]] == [(22, 22)]
