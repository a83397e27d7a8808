"""A serving process without torchrec_exfm: the outputs of each file for given requests.

python -I serve_files.py MODEL_FOLDER FOLDER
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

PACKAGE = "torchrec_exfm"


class Absent(MetaPathFinder):
    """Hides the package, as if it were not installed, and records who imports it."""

    def __init__(self):
        self.asked = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PACKAGE:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


absent = Absent()
sys.meta_path.insert(0, absent)
sys.path.insert(0, sys.argv[1])

import serve  # noqa: E402
import torch  # noqa: E402


def names(model):
    """Return parameter names with their shapes; a compiled model has no shapes."""
    if hasattr(model, "get_constant_fqns"):
        return dict.fromkeys(model.get_constant_fqns())
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def main(folder):
    requests = torch.load(folder / "requests.pt", weights_only=True)
    results = {}
    for file, (_, read) in serve.WAYS.items():
        if (folder / file).exists():
            model = read(str(folder / file))
            with torch.no_grad():
                results[file] = (names(model), [model(*request) for request in requests])
    torch.save(results, folder / "results.pt")


main(Path(sys.argv[2]))
here = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
assert not here, f"loaded: {here}"
assert not absent.asked, f"asked for: {absent.asked}"
try:
    importlib.import_module(PACKAGE)
except ModuleNotFoundError:
    pass
else:
    raise AssertionError(f"{PACKAGE} can be imported here, so that nothing was proved")
