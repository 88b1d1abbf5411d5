"""Import every module of an installed lenslrp, and nothing from a checkout.

Run outside the repository, with the interpreter of the environment that holds the wheel.
"""

import importlib.util
import pkgutil
import sys
from pathlib import Path

import lenslrp

installed = Path(lenslrp.__file__).resolve().parent
if not installed.is_relative_to(Path(sys.prefix).resolve()):
    sys.exit(f"lenslrp came from {installed}, not from {sys.prefix}")

names = [m.name for m in pkgutil.walk_packages(lenslrp.__path__, "lenslrp.")]
for name in names:
    importlib.import_module(name)

missing = {"lenslrp.hooks", "lenslrp.analysis", "lenslrp.cli"} - set(names)
if missing:
    sys.exit(f"not in the wheel: {sorted(missing)}")
if not (installed / "py.typed").is_file():
    sys.exit("py.typed is not in the wheel")
bare = [name for name in ("hooks", "analysis") if importlib.util.find_spec(name)]
if bare:
    sys.exit(f"importable as bare top-level modules: {bare}")
for name in lenslrp.__all__:
    getattr(lenslrp, name)
print(f"wheel: {len(names)} modules import, {len(lenslrp.__all__)} public names resolve")
