"""Write a trained student to five kinds of files, read each back, and compare it with the student.

    python examples/serve.py FOLDER

Only ``train`` needs torchrec_exfm; a serving process does not.
"""

# No `from __future__ import annotations`: TorchRec's tracer makes wrong TorchScript of it.
import argparse
import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental import _config as symbolic_shapes
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.random import RandomRecDataset
from torchrec.datasets.utils import Batch
from torchrec.fx.tracer import Tracer
from torchrec.inference.modules import quantize_inference_model
from torchrec.models.dlrm import DLRM, DLRMTrain

KEYS, ROWS, WIDTH, NUM_DENSE = ["user", "item"], 1000, 8, 4

Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor]


def dlrm() -> DLRM:
    tables = [EmbeddingBagConfig(ROWS, WIDTH, name=key, feature_names=[key]) for key in KEYS]
    collection = EmbeddingBagCollection(tables, device=torch.device("cpu"))
    return DLRM(collection, NUM_DENSE, [16, WIDTH], [16, 1])


class Flat(nn.Module):
    """A DLRM on plain tensors: dense features, and ids and lengths of the sparse features."""

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.model = model
        self.keys = list(model.sparse_arch.sparse_feature_names)

    def forward(self, dense: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        sparse = KeyedJaggedTensor(keys=self.keys, values=values, lengths=lengths)
        return self.model(dense, sparse)


def inputs(batch: Batch) -> Inputs:
    sparse = batch.sparse_features
    return batch.dense_features, sparse.values(), sparse.lengths()


def export_program(model: Flat, example: Inputs) -> ExportedProgram:
    """Export for batches of any size, also of one example, which needs the option below."""
    size = Dim("size", min=1)
    shapes = ({0: size}, {0: Dim.DYNAMIC}, {0: len(model.keys) * size})
    with symbolic_shapes.patch(backed_size_oblivious=True):
        return torch.export.export(model, example, dynamic_shapes=shapes)


def compile_to(path: str, model: Flat, example: Inputs) -> None:
    """Compile by AOTInductor, which calls a C++ compiler: seconds, or minutes for many tables."""
    torch._inductor.aoti_compile_and_package(export_program(model, example), package_path=path)


def quantize(model: Flat) -> torch.jit.ScriptModule:
    """Quantize the tables to int8; trace, as torch.jit.script does not take TorchRec's forward."""
    int8 = quantize_inference_model(copy.deepcopy(model))
    tracer = Tracer(leaf_modules=["IntNBitTableBatchedEmbeddingBagsCodegen"])
    return torch.jit.script(GraphModule(int8, tracer.trace(int8)))


def read_eager(path: str) -> Flat:
    model = dlrm()
    model.load_state_dict(torch.load(path, weights_only=True))
    return Flat(model).eval()


# For each file: write(path, model, example) and read(path), which returns a callable. Where
# torch.jit.script does not take a model (DLRM_DCN), script the GraphModule of TorchRec's tracer.
WAYS: dict[str, tuple[Callable[[str, Flat, Inputs], Any], Callable[[str], Any]]] = {
    "eager.pt": (lambda p, m, _: torch.save(m.model.state_dict(), p), read_eager),
    "torchscript.pt": (lambda p, m, _: torch.jit.script(m).save(p), torch.jit.load),
    "torch_export.pt2": (
        lambda p, m, example: torch.export.save(export_program(m, example), p),
        lambda p: torch.export.load(p).module(),
    ),
    "aot_inductor.pt2": (compile_to, torch._inductor.aoti_load_package),
    "quantized.pt": (lambda p, m, _: quantize(m).save(p), torch.jit.load),
}


def random_batches(size: int, count: int = 1) -> Iterable[Batch]:
    return RandomRecDataset(
        KEYS, size, ROWS, num_dense=NUM_DENSE, manual_seed=size, num_batches=count
    )


def train() -> DLRM:
    """Train a student for some steps with a teacher, whose logits are made up here."""
    from torchrec_exfm import ExFMBatch, ExFMWrapper, TeacherOutputs, export_student

    wrapper = ExFMWrapper(DLRMTrain(dlrm()), tap="model.over_arch")
    optimizer = torch.optim.Adagrad(wrapper.parameters(), lr=0.02)
    for batch in random_batches(32, count=10):
        optimizer.zero_grad()
        wrapper(ExFMBatch(batch, TeacherOutputs(torch.randn(32))))[0].backward()
        optimizer.step()
    return export_student(wrapper).model


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    student = Flat(train()).eval()
    requests = [inputs(batch) for size in (8, 1, 100) for batch in random_batches(size)]
    with torch.no_grad():
        for file, (write, read) in WAYS.items():
            path = folder / file
            write(str(path), student, requests[0])
            served = read(str(path))
            error = max((served(*r) - student(*r)).abs().max() for r in requests)
            print(f"{file:17}{path.stat().st_size:>10,} bytes, logits off by at most {error:.1g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage="python examples/serve.py FOLDER")
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
