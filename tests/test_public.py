"""What the package promises as a whole: its public names, an import that does nothing, examples."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import torchrec_exfm
from torchrec_exfm import das

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ["torchrec_exfm"]
    + [m.name for m in pkgutil.walk_packages(torchrec_exfm.__path__, "torchrec_exfm.")]
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

SNAPSHOT = """
import json, logging, os, random, sys, warnings
import torch, torch.distributed as dist, torch.distributed.tensor
import torchrec, torchrec.distributed.train_pipeline, torchrec.metrics.metric_module

def snapshot():
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "logging": [repr((l.name, l.level, l.handlers)) for l in loggers if l.handlers or l.level],
        "warnings": [repr(entry) for entry in warnings.filters],
        "hooks": repr((sys.excepthook, sys.displayhook, warnings.showwarning)),
        "random": [torch.random.get_rng_state().tolist(), repr(random.getstate())],
        "defaults": repr((torch.get_default_dtype(), torch.get_default_device())),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "modes": [torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()],
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "started": [dist.is_available() and dist.is_initialized(), torch.cuda.is_initialized()],
        "patched": sorted(patched()),
    }

def patched():
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "torchrec", "fbgemm_gpu"):
            for owner in [module, *(v for v in vars(module).values() if isinstance(v, type))]:
                for key, value in list(vars(owner).items()):
                    if str(getattr(value, "__module__", "")).startswith("torchrec_exfm"):
                        yield f"{name}.{key}: {value!r}"

before, modules = snapshot(), set(sys.modules)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torchrec_exfm
after = snapshot()
new = sorted({name.split(".")[0] for name in set(sys.modules) - modules})
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps({"changed": changed, "new": new, "warned": [str(w.message) for w in caught]}))
"""


@pytest.mark.parametrize(("module", "page"), [(torchrec_exfm, "api.md"), (das, "api_das.md")])
def test_the_public_names_are_those_of_the_reference(module: ModuleType, page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    names = re.findall(r"^\.\. auto\w+:: (?:torchrec_exfm\.)?(\w+)", text, re.MULTILINE)
    names = [name for name in names if name != "das"]  # the module that the page is of
    assert sorted(names) == sorted(module.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_every_listed_name_exists_and_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", []):
        assert getattr(module, public).__doc__, f"{public} has no docstring"


def test_nothing_public_is_missing_from_the_list() -> None:
    values = {n for n, value in vars(torchrec_exfm).items() if not isinstance(value, ModuleType)}
    assert {name for name in values if not name.startswith("_")} <= set(torchrec_exfm.__all__)


def test_importing_changes_nothing() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SNAPSHOT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {"changed": {}, "new": ["torchrec_exfm"], "warned": []}


def examples() -> list[doctest.DocTest]:
    finder, tests = doctest.DocTestFinder(exclude_empty=True), []
    for name in MODULES:
        module = importlib.import_module(name)
        names = vars(torchrec_exfm) | {"torch": importlib.import_module("torch")} | vars(module)
        tests += [test for test in finder.find(module, name, globs=names) if test.examples]
    return tests


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_docstring_examples_run(example: doctest.DocTest) -> None:
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert results.attempted > 0 and not results.failed, "".join(report)
