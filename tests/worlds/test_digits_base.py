"""The command that makes the base weights of the digits."""

import torch

from ref.worlds import digits


def test_base_weights_command_makes_a_loadable_model(tmp_path, capsys):
    """`python -m ref.worlds.digits_base`, a thousandth of its length: every part trains, saves and loads."""
    from ref.worlds.digits_base import main as make

    assert make(["--output-dir", str(tmp_path), "--scale", "0.001"]) == 0
    assert "of unseen digits read" in capsys.readouterr().out
    model, reward, phi, judge = digits.load(tmp_path)
    cond = model.encode(digits.PROMPTS)
    v = model.velocity(torch.zeros(10, *model.latent_shape), torch.tensor(1.0), cond)
    assert v.shape == (10, *model.latent_shape) and v.isfinite().all()
