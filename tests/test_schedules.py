import numpy as np
import oracle
import pytest

from tf_pcl import schedules
from tf_pcl.errors import UserError
from tf_pcl.options import Options


@pytest.mark.parametrize("epoch", [0, 0.5, 3, 39.99, 79.999, 80, 150, 300])
def test_ramp_up(epoch):
    assert schedules.ramp_up(epoch, 80, 2.0).numpy() == pytest.approx(
        oracle.omega(epoch, 80, 2.0), rel=1e-5
    )


def test_ramp_up_of_no_epochs_is_the_fixed_weight():
    assert schedules.ramp_up(0.0, 0, 0.7).numpy() == pytest.approx(0.7)


@pytest.mark.parametrize("g", [1, 2, 3, 500, 1000, 1001, 10**6])
def test_ema_decay(g):
    assert schedules.ema_decay(g, 0.999).numpy() == pytest.approx(oracle.phi(g, 0.999), abs=1e-6)


def test_default_ema_decay_spans_at_most_a_hundredth():
    assert schedules.default_ema_decay(117_000) == 0.999
    assert schedules.default_ema_decay(3900) == pytest.approx(1 - 1 / 39)
    assert schedules.default_ema_decay(50) == 0.0


def test_learning_rate_drops_on_the_first_step_after_the_epoch():
    rate = schedules.step_decay(0.1, [1.5, 2], 10)
    got = [float(rate(step)) for step in range(25)]
    np.testing.assert_allclose(got, [0.1] * 15 + [0.01] * 5 + [0.001] * 5, rtol=1e-6)


def test_epochs_of_drops_keep_their_digits_in_flags():
    given = Options(epochs=20000, lr_decay_epochs=(150.0, 466.66666666666663, 12345.678))
    assert given.as_flags()["lr_decay_epochs"] == "150,466.666666666667,12345.678"


def test_checkpoint_every_counts_steps_or_epochs():
    assert Options(checkpoint_every="500steps").checkpoint_steps(39) == 500
    assert Options(checkpoint_every="2epochs").checkpoint_steps(39) == 78
    for wrong in ("0steps", "often", "5", "-1epoch"):
        with pytest.raises(UserError, match="500steps or 2epochs"):
            Options(checkpoint_every=wrong)
