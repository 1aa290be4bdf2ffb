"""What several tests of updates count."""

import pytest

from fixpass.runtime.weights import update


@pytest.fixture
def plans(monkeypatch):
    """How many plans were made."""
    made, make = [], update.make_plan

    def counting(*args, **kwargs):
        made.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(update, "make_plan", counting)
    return made
