"""Any list of layers: the losses of transformers with that list, by one program, on a mesh too."""

import numpy as np
import pytest

from solar_jax.training.layer_run import mean_of_rows
from tests.inspecting.models import LAYERS, ROWS, ready, reference, torch_losses

ALL = list(range(LAYERS))
ORDERS = {
    "whole": ALL,
    "without the third": [0, 1, 3, 4, 5],
    "reordered": [0, 3, 2, 1, 4, 5],
    "one twice": [0, 1, 1, 2, 5, 5],
    "none": [],
}


@pytest.fixture(params=(1, 4), ids=("one device", "four devices"))
def model(request, tmp_path_factory):
    return ready(tmp_path_factory, request.param)


def test_any_list_of_layers_has_the_losses_of_transformers_with_that_list(model):
    run, start = model.runner, model.runner.start(model.params, model.batch)
    found = {name: run.losses(model.params, model.batch, run.run(model.params, model.batch, start, order))
             for name, order in ORDERS.items()}  # fmt: skip
    for name, order in ORDERS.items():
        np.testing.assert_allclose(found[name][:ROWS], torch_losses(reference(), order), rtol=2e-5, err_msg=name)
    # A negative control: the lists differ by far more than the tolerance.
    means = sorted(np.nanmean(x) for x in found.values())
    assert min(np.diff(means)) > 1e-3
    # Rows that only fill the batch have no loss that could enter a mean.
    assert np.isnan(found["whole"][ROWS:]).all()


def test_a_list_may_begin_anywhere_and_lists_of_every_length_share_one_program(model):
    run = model.runner
    whole = run.run(model.params, model.batch, run.start(model.params, model.batch), ALL)
    for at in (0, 2, LAYERS):
        x = run.input_at(model.stream.inputs, at)
        x = run.run(model.params, model.batch, x, ALL[at:])
        np.testing.assert_allclose(np.asarray(x), np.asarray(whole), rtol=1e-5, atol=1e-5)
    assert run._run._cache_size() <= 2  # of inputs with and without a sharding of their own
    before = run._run._cache_size()
    run.run(model.params, model.batch, run.input_at(model.stream.inputs, 3), [5, 5, 5, 1])
    assert run._run._cache_size() == before


def test_a_list_that_is_too_long_or_names_no_layer_is_refused(tmp_path_factory):
    model = ready(tmp_path_factory)
    for layers in ([*ALL, 0], [LAYERS], [-1]):
        with pytest.raises(ValueError, match="at most 6 layers below 6"):
            model.runner.run(model.params, model.batch, model.stream.inputs[0], layers)


def test_the_error_of_a_mean_is_that_of_its_rows_alone():
    mean, error = mean_of_rows([1.0, 2.0, 6.0, np.nan], 3)
    assert (mean, error) == (3.0, pytest.approx((7 / 3) ** 0.5))  # deviations 4 + 1 + 9 over 2, over 3 rows
    assert mean_of_rows([1.5], 1) == (1.5, None)
