"""Run Python in a process of its own, with the environment of this one."""

import os
import subprocess
import sys


def run_python(*words, cwd=None, **environ):
    """What the process prints; a failure is an assertion that shows both of its outputs."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
