"""The errors that fixpass raises, one class for each kind of mistake, and the line a warning names.

Each error message says what was found and how to fix it.
A pattern that does not match is no error: it is a
remark on the report.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path


class FixpassError(Exception):
    """Base of every error raised by fixpass."""


class ConfigError(FixpassError, ValueError):
    """An unknown option, target or kernel, or a value that does not parse."""


class UnsupportedTorchError(FixpassError, RuntimeError):
    """The installed torch is outside the range that fixpass supports."""


class PassError(FixpassError, RuntimeError):
    """A pass raised, or broke the graph; the message names the pass and the node."""


class KernelError(FixpassError, ValueError):
    """A kernel was asked for that is not installed, or that cannot compute what was asked."""


class CheckpointError(FixpassError, ValueError):
    """A checkpoint is broken, or does not fit the model; the message names the tensor and file."""


class ShardingError(FixpassError, ValueError):
    """Nothing of a model matched what was to be sharded; the message lists what there is."""


class EngineError(FixpassError, RuntimeError):
    """A serving engine is not one that fixpass can work in; the message says what was found."""


class WeightError(FixpassError, ValueError):
    """Something about a parameter is not as it must be; the message names the parameter."""


class LayoutError(WeightError):
    """A layout does not fit a parameter, or does not fit the layout that it has."""


class UpdateError(WeightError):
    """An update of weights was refused, or undone: the weights are those of before."""


class VersionError(UpdateError):
    """An update says that it changes another version than the one that is there."""


class PoisonedError(FixpassError, RuntimeError):
    """The weights are a mixture that could not be undone: only a full update makes them whole."""


class ExpectationError(FixpassError, AssertionError):
    """A site of a model got another kernel or rewrite than expected; the message says why."""


def level_of_caller() -> int:
    """The stacklevel at which a warning names the first line outside this package."""
    skipped = (f"{Path(__file__).parents[1]}{os.sep}", contextmanager.__code__.co_filename)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame, level = frame.f_back, level + 1
    return level
