"""The names in fixpass.weights: what is listed is there, and names of the last release warn."""

import warnings

import pytest

from fixpass import weights

OLD = {
    "fold": "set_layout",
    "fold_model": "set_layouts",
    "unfold": "reset_layout",
    "unfold_model": "reset_layouts",
    "window": "checkpoint_layout",
    "reading": "read_lock",
    "writing": "write_lock",
    "Layout": "WeightLayout",
}


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_an_old_name_works_and_warns_of_the_new_one(old, new):
    message = f"fixpass.weights.{old} is now fixpass.weights.{new};"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        found = getattr(weights, old)
    assert found is getattr(weights, new)
    assert caught[0].filename == __file__


def test_an_old_name_can_be_imported():
    with pytest.warns(DeprecationWarning, match="fixpass.weights.set_layout;"):
        from fixpass.weights import fold
    assert fold is weights.set_layout


def test_every_listed_name_is_there_without_a_warning_and_none_is_old():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(weights, name) is not None for name in weights.__all__)
    assert set(weights.__all__).isdisjoint(OLD)


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'fixpass.weights' has no attribute 'folds'"):
        _ = weights.folds
