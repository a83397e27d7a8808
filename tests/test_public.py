"""What the package promises as a whole: its names, a quiet import, examples that run."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import torchrec_exfm
from torchrec_exfm import das

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODULES = sorted(
    ["torchrec_exfm"]
    + [m.name for m in pkgutil.walk_packages(torchrec_exfm.__path__, "torchrec_exfm.")]
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

SNAPSHOT = """
import json, logging, os, random, sys, warnings
import torch
import torch.distributed as dist
import torch.distributed.tensor
import torchrec
import torchrec.distributed.train_pipeline
import torchrec.metrics.metric_module

def snapshot():
    names = [None, *logging.root.manager.loggerDict]
    loggers = [logging.getLogger(name) for name in names]
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "handlers": {str(l.name): [repr(h) for h in l.handlers] for l in loggers if l.handlers},
        "levels": {str(l.name): l.level for l in loggers if l.level},
        "filters": [repr(entry) for entry in warnings.filters],
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.displayhook, warnings.showwarning)],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "torch_rng": torch.random.get_rng_state().tolist(),
        "python_rng": repr(random.getstate()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "process_group": dist.is_available() and dist.is_initialized(),
        "cuda": torch.cuda.is_initialized(),
        "patched": patched(),
    }

def patched():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "torchrec", "fbgemm_gpu"):
            for owner in [module, *(v for v in vars(module).values() if isinstance(v, type))]:
                for key, value in list(vars(owner).items()):
                    if str(getattr(value, "__module__", "")).startswith("torchrec_exfm"):
                        found[f"{name}.{key}"] = repr(value)
    return found

before, modules = snapshot(), set(sys.modules)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torchrec_exfm
after = snapshot()
new = sorted({name.split(".")[0] for name in set(sys.modules) - modules})
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps({"changed": changed, "new": new, "warned": [str(w.message) for w in caught]}))
"""


def test_the_public_names_are_frozen() -> None:
    assert torchrec_exfm.__all__ == [
        "AuxiliaryHead",
        "DistillationHead",
        "DistillationTerm",
        "DistillationWarning",
        "ExFMBatch",
        "ExFMMetrics",
        "ExFMSteps",
        "ExFMWarning",
        "ExFMWrapper",
        "LiveTeacher",
        "MetricsRestartedWarning",
        "NotPipelinedWarning",
        "OutputsOf",
        "RunMonitor",
        "StudentAdapter",
        "Task",
        "TeacherMissingWarning",
        "TeacherOutputs",
        "TeacherSource",
        "TrainPipelineExFM",
        "adapter_step",
        "export_student",
        "functional",
        "load_training",
        "losses",
        "save_training",
        "student_state_dict",
    ]
    assert das.__all__ == [
        "ForgetReport",
        "LookupCounters",
        "ScoringReport",
        "Shard",
        "Snapshot",
        "StoreError",
        "TeacherLogger",
        "TeacherLookup",
        "TeacherStore",
        "Window",
        "WriteReport",
        "data_files",
        "forget",
        "hash_ids",
        "hash_ids_sql",
        "join_sql",
        "load_snapshot",
        "newest_snapshot",
        "publish",
        "published",
        "score",
        "score_windows",
        "train_teacher",
        "train_windows",
        "wait_for_outputs",
    ]
    assert torchrec_exfm.functional.__all__ == [
        "correct_sampling",
        "masked_mean",
        "scale_gradient",
        "scale_label",
        "soft_bce_with_logits",
        "squared_error",
    ]
    assert torchrec_exfm.losses.__all__ == [
        "Loss",
        "LossInputs",
        "cosine_of_embeddings",
        "in_batch_positives",
        "in_batch_softmax",
        "listwise",
        "pairwise",
        "squared_error_of_embeddings",
        "squared_error_of_logits",
        "task_loss",
        "temperature",
    ]


@pytest.mark.parametrize("name", MODULES)
def test_every_listed_name_exists_and_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", []):
        assert getattr(module, public).__doc__, f"{public} has no docstring"


def test_nothing_public_is_missing_from_the_list() -> None:
    here = {n for n, value in vars(torchrec_exfm).items() if not isinstance(value, ModuleType)}
    public = {name for name in here if not name.startswith("_")}
    assert public <= set(torchrec_exfm.__all__)


def test_importing_changes_nothing() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SNAPSHOT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {"changed": {}, "new": ["torchrec_exfm"], "warned": []}


def examples() -> list[doctest.DocTest]:
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for name in MODULES:
        module = importlib.import_module(name)
        names = vars(torchrec_exfm) | {"torch": importlib.import_module("torch")} | vars(module)
        found += [test for test in finder.find(module, name, globs=names) if test.examples]
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_docstring_examples_run(example: doctest.DocTest) -> None:
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append)
    assert results.attempted > 0 and not results.failed, "".join(said)


@pytest.mark.parametrize(
    "name",
    [
        *(f"functional.{name}" for name in torchrec_exfm.functional.__all__),
        "adapter.StudentAdapter",
        "batch.TeacherOutputs",
        "das.index.WindowIndex",
        "das.logger.TeacherLogger",
        "das.lookup.TeacherLookup",
        "das.store.TeacherStore",
        "auxiliary.AuxiliaryHead",
        "heads.DistillationHead",
        "monitor.RunMonitor",
        "resume.load_training",
    ],
)
def test_what_can_be_shown_in_a_line_has_an_example(name: str) -> None:
    assert f"torchrec_exfm.{name}" in {example.name for example in examples()}
