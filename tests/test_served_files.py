"""Served files hold nothing of the training, and are read without this package.

One process trains a student and writes it in every way of examples/serve.py. Another, without
torchrec_exfm, reads the files and answers requests (serve_files.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import dlrm_reference as reference
import pytest
import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.inference.modules import quantize_embeddings
from torchrec.models.dlrm import DLRMTrain

from torchrec_exfm import (
    DistillationTerm,
    ExFMBatch,
    ExFMWrapper,
    StudentAdapter,
    TeacherOutputs,
    adapter_step,
    export_student,
    student_state_dict,
)
from torchrec_exfm.batch import StepInputs

ROOT = Path(__file__).parents[1]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "examples")
    import serve

pytestmark = [
    pytest.mark.slow,  # AOTInductor calls a C++ compiler
    # Warnings of TorchScript and torch.export about TorchRec's, FBGEMM's and torch's own classes.
    pytest.mark.filterwarnings("ignore:TorchScript will treat type annotations"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]

COMPILED, QUANTIZED = "aot_inductor.pt2", "quantized.pt"
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
every_file = pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=needs_compiler if f == COMPILED else ()) for f in serve.WAYS],
)

INLINED = 8  # AOTInductor inlines tensors of up to so many numbers into its code
# Parts of the package's names. Paths are cut out first: that of a clone may hold the name, too.
TRACES = (b"exfm", b"teacher", b"distil", b"adapter", b"auxiliary")
PATHS = [str(path).lower().encode() for path in (sys.prefix, ROOT)]


class Trained(NamedTuple):
    wrapper: ExFMWrapper
    bare: nn.Module  # never wrapped, with the student's weights, for serving
    left_behind: dict[str, Tensor]  # what else the training holds


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    terms = [DistillationTerm(), DistillationTerm(adapted=True)]
    wrapper = ExFMWrapper(DLRMTrain(serve.dlrm()), tap="model.over_arch", terms=terms)
    adapter = StudentAdapter()
    optimizer, adapter_optimizer = (
        torch.optim.Adagrad(m.parameters(), 0.05) for m in (wrapper, adapter)
    )
    for batch in serve.random_batches(32, count=8):
        exfm_batch = ExFMBatch(batch, TeacherOutputs(torch.randn(32)))
        adapted = adapter_step(adapter, adapter_optimizer, exfm_batch.teacher, batch.labels)
        exfm_batch.step_inputs = StepInputs(exfm_batch.teacher, adapted=adapted)
        optimizer.zero_grad()
        wrapper(exfm_batch)[0].backward()
        optimizer.step()
    bare = DLRMTrain(serve.dlrm())
    bare.load_state_dict(student_state_dict(wrapper))
    left_behind = {
        **prefixed("head", wrapper.auxiliary_head.state_dict()),
        **prefixed("adapter", adapter.state_dict()),
        **prefixed("sum of", {k: optimizer.state[p]["sum"] for k, p in wrapper.named_parameters()}),
        "teacher": exfm_batch.teacher.values,
        "adapted": adapted,
    }
    return Trained(wrapper.eval(), serve.Flat(bare.model).eval(), left_behind)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select tensors that are too large to be found by chance."""
    return {f"{prefix} {key}": value for key, value in tensors.items() if value.numel() >= 4}


@pytest.fixture(scope="module")
def requests() -> list[serve.Inputs]:
    some = [serve.inputs(b) for size in (1, 2, 7, 64) for b in serve.random_batches(size, count=2)]
    without_ids = (torch.ones(1, serve.NUM_DENSE), torch.empty(0).long(), torch.zeros(2).int())
    return [*some, without_ids]


@pytest.fixture(scope="module")
def folder(
    trained: Trained, requests: list[serve.Inputs], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Write the trained student's files with the example's main."""
    folder = tmp_path_factory.mktemp("served")
    torch.save(requests, folder / "requests.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "train", lambda: export_student(trained.wrapper).model)
        if not HAS_COMPILER:
            patch.delitem(serve.WAYS, COMPILED)
        serve.main(folder)
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> Any:
    """Return parameters and outputs by file, from a process without the package."""
    script = Path(__file__).with_name("serve_files.py")
    command = [sys.executable, "-I", str(script), str(ROOT / "examples"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt", weights_only=True)


@every_file
def test_nothing_of_the_training_is_in_the_file(file: str, folder: Path, trained: Trained) -> None:
    contents = everything_in(folder / file)
    lower = contents.lower()
    for path in PATHS:
        lower = lower.replace(path, b"")
    assert [trace for trace in TRACES if trace in lower] == []
    assert [key for key, value in trained.left_behind.items() if raw(value) in contents] == []
    # The search above can fail: it finds the served student's own tensors.
    state = trained.bare.state_dict().items()
    large = [value for key, value in state if "bags" not in key and value.numel() > INLINED]
    assert len(large) == 6 and all(raw(value) in contents for value in large)


def everything_in(file: Path) -> bytes:
    """Return a file's bytes, and those of its unpacked members."""
    with zipfile.ZipFile(file) as archive:
        members = [name.encode() + b"\n" + archive.read(name) for name in archive.namelist()]
    return b"\n".join([file.read_bytes(), *members])


def raw(value: Tensor) -> bytes:
    return value.detach().numpy().tobytes()


@every_file
def test_the_file_has_the_parameters_of_the_bare_student(
    file: str, answers: Any, trained: Trained
) -> None:
    bare = trained.bare if file != QUANTIZED else quantized(trained.bare)
    expected = {name: tuple(value.shape) for name, value in bare.named_parameters()}
    held, _ = answers[file]
    if file == COMPILED:
        small = {name for name, value in bare.named_parameters() if value.numel() <= INLINED}
        assert held.keys() | small == expected.keys() | {"model.inter_arch.triu_indices"}
    else:
        assert held == expected


@pytest.mark.parametrize("file", [file for file in serve.WAYS if file != COMPILED])
def test_the_outputs_are_those_of_the_wrapper_to_the_bit(
    file: str, answers: Any, trained: Trained, requests: list[serve.Inputs]
) -> None:
    _, outputs = answers[file]
    for request, output in zip(requests, outputs, strict=True):
        with torch.no_grad():
            if file == QUANTIZED:
                expected = quantized(trained.bare)(*request)
            else:
                expected = trained.wrapper(labelled(request))[1][1][:, None]
        assert output.dtype == expected.dtype and torch.equal(output, expected)


@needs_compiler
def test_compiled_outputs_are_those_of_the_student_up_to_rounding(
    answers: Any, trained: Trained, requests: list[serve.Inputs]
) -> None:
    """The compiler aligns the operands of products in its own way."""
    _, outputs = answers[COMPILED]
    for request, output in zip(requests, outputs, strict=True):
        batch = labelled(request)
        reference.assert_within_rounding(
            output.numpy(),
            reference.logits_alone(trained.bare.model, batch.dense_features, batch.sparse_features),
        )
        assert output.dtype == torch.float32


def quantized(bare: nn.Module) -> nn.Module:
    return quantize_embeddings(bare, torch.int8, inplace=False)


def labelled(request: serve.Inputs) -> Batch:
    dense, values, lengths = request
    sparse = KeyedJaggedTensor(serve.KEYS, values, lengths=lengths)
    return Batch(dense, sparse, labels=torch.zeros(len(dense)))
