"""Every setting has a range; what cannot be meant is refused by name."""

import dataclasses

import pytest

from .small import SMALL


@pytest.mark.parametrize(
    "change",
    [
        dict(group_size=1),
        dict(steps=1),
        dict(updates=9),
        dict(window=4),
        dict(lr=-1.0),
        dict(omega="x"),
        dict(ema=1.0),
        dict(trained=0.0),
        dict(window=3, trained=0.5),
        dict(tail_steps=2),
        dict(window_moves="sliding"),
        dict(trained_at_random=True),
        dict(trained_at_random=True, trained=0.5, window=1),
        dict(global_std=True, std_normalize=False),
        dict(best_and_worst=4),
    ],
)
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)
