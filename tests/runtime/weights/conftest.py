"""What several tests of updates count."""

import pytest

from fixpass.runtime.weights import collected


@pytest.fixture
def plans(monkeypatch):
    """How many plans were made."""
    made, make = [], collected.make_plan

    def counting(*args, **kwargs):
        made.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(collected, "make_plan", counting)
    return made
