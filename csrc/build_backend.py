"""setuptools' build backend, which also finds the torch of the target environment.

Under build isolation torch is not importable, yet the extension must be built against the torch it
will run with. Appending the target's site-packages keeps the isolated setuptools in front.
"""

import importlib.util
import os
import sys
import sysconfig

from setuptools.build_meta import *  # noqa: F403


def _append_installed_torch():
    if importlib.util.find_spec("torch") is not None:
        return
    for key in ("purelib", "platlib"):
        path = sysconfig.get_paths()[key]
        if os.path.isfile(os.path.join(path, "torch", "version.py")):
            sys.path.append(path)
            return


_append_installed_torch()
