"""How the tests compile: quickly rather than to fast code, and each program once.

Half of their time is compilation. What is compiled and run is the same program; this
file says how, and knows no program. It is imported before JAX is.
"""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Each flag as the tests have it, and as users do.
_QUICK = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    # Two processes of tests have a core each.
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # A third of the time of compiling; later ones know no other emitters.
    _QUICK["xla_cpu_use_fusion_emitters"] = (False, True)

AS_USERS_DO = {name: theirs for name, (_, theirs) in _QUICK.items()}


def quick_flags() -> list[str]:
    """Flags of XLA for the tests."""
    return [f"--{name}={str(ours).lower()}" for name, (ours, _) in _QUICK.items()]


def keep_programs() -> Path:
    """Keeps this process's compiled programs in a new directory, which it returns.

    Runs that stop and resume, and those that differ in what is not compiled, compile
    the same programs. Each process has its own directory: JAX writes files in place,
    which another process would read half written.
    """
    directory = tempfile.mkdtemp(prefix="dpojax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return Path(directory)
