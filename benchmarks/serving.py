"""Does the exported student serve as the bare one does: equal outputs, at the same latency?

    python benchmarks/serving.py [--json] [--quick]

The exported student is what export_student returns for an ExFMWrapper around a DLRM, after steps of
training with two terms, one of them adapted. The bare student is a DLRM that was never wrapped and
has loaded student_state_dict. The same five functions serve both: eager; TorchScript; torch.export,
as the module of a program for batches of any size; AOTInductor, which compiles that program; and
TorchRec's quantize_embeddings (int8).

identical_outputs: whether outputs are equal to the bit, in every way, on several batches of each
    size.
extra_parameters, extra_keys: what the exported student has beyond the bare one.
latency_ratio_*: exported over bare for batches of 1, where the overhead of a call weighs most; the
    median of rounds in which both serve the same batches, in alternating order. The details have
    the quartiles, the larger batches, and the milliseconds of a call.

Everything runs on one thread. Latency is the time that the process had the core, so that other work
counts less. --quick has 4 tables instead of 26, as AOTInductor compiles them faster, and fewer
rounds. TorchScript is by torch.jit.script, as torch.jit.trace fixes the size of the batch.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from reference import CPU, KEYS, STUDENT, TAP, Batch, Stream, dlrm
from torch import Tensor, nn
from torchrec.inference.modules import quantize_embeddings
from training import AH_SA, over, take_turns

from torchrec_exfm import (
    ExFMBatch,
    ExFMWrapper,
    StudentAdapter,
    TeacherOutputs,
    adapter_step,
    export_student,
    student_state_dict,
)
from torchrec_exfm.batch import StepInputs

sys.path.insert(1, str(Path(__file__).parents[1] / "examples"))

from serve import Flat, Inputs, compile_to, export_program, inputs

CALLS = {1: 16, 512: 2}  # of a round, for each size of batch
AIMS = {
    "identical_outputs": "True",
    "extra_parameters": "0",
    "extra_keys": "0",
    "latency_ratio_eager": "1.00 within the spread",
    "latency_ratio_torchscript": "1.00 within the spread",
    "latency_ratio_torch_export": "1.00 within the spread",
    "latency_ratio_aot_inductor": "1.00 within the spread",
    "latency_ratio_quantized_embeddings": "1.00 within the spread",
}


def compiled(model: Flat, example: Inputs) -> Callable[..., Tensor]:
    with tempfile.TemporaryDirectory(prefix="benchmark-serving-") as folder:
        compile_to(path := f"{folder}/model.pt2", model, example)
        return torch._inductor.aoti_load_package(path)


WAYS: dict[str, Callable[[Flat, Inputs], Callable[..., Tensor]]] = {
    "eager": lambda model, _: model,
    "torchscript": lambda model, _: torch.jit.script(model),
    "torch_export": lambda model, example: export_program(model, example).module(),
    "aot_inductor": compiled,
    "quantized_embeddings": lambda model, _: quantize_embeddings(model, torch.int8, inplace=False),
}


def measure(quick: bool) -> dict[str, Any]:
    return common.in_process(serve, KEYS[:4] if quick else KEYS, 30 if quick else 100)


def serve(keys: list[str], rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    stream = Stream(4096, keys)
    wrapper = trained(keys, stream.pool(16, 512))
    exported, bare = export_student(wrapper), dlrm(STUDENT, tables="cpu", keys=keys)
    bare.load_state_dict(student_state_dict(wrapper))
    students = {"bare": bare.eval(), "exported": exported}
    requests = {size: [inputs(batch) for batch in stream.pool(4, size)] for size in CALLS}
    with torch.no_grad():
        ways = {way: compare(make, students, requests, rounds) for way, make in WAYS.items()}
    return {
        "identical_outputs": all(way["identical_outputs"] for way in ways.values()),
        "extra_parameters": parameters(exported) - parameters(bare),
        "extra_keys": len(exported.state_dict().keys() - bare.state_dict().keys()),
        **{
            f"latency_ratio_{name}": way["batches_of_1"]["latency_ratio"]["median"]
            for name, way in ways.items()
        },
        "details": {"tables": len(keys), "parameters": parameters(bare), **ways},
    }


def trained(keys: list[str], batches: Sequence[Batch]) -> ExFMWrapper:
    """Return a student after a step on each batch."""
    wrapper = ExFMWrapper(dlrm(STUDENT, tables="cpu", keys=keys), tap=TAP, terms=AH_SA)
    adapter = StudentAdapter()
    optimizer, adapter_optimizer = (
        torch.optim.Adagrad(module.parameters(), 0.02) for module in (wrapper, adapter)
    )
    for plain_batch in batches:
        batch = ExFMBatch(plain_batch, TeacherOutputs(plain_batch.logits))
        adapted = adapter_step(adapter, adapter_optimizer, batch.teacher, plain_batch.labels)
        batch.step_inputs = StepInputs(batch.teacher, adapted=adapted)
        optimizer.zero_grad()
        wrapper(batch)[0].backward()
        optimizer.step()
    return wrapper


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def compare(
    make: Callable[[Flat, Inputs], Callable[..., Tensor]],
    students: dict[str, nn.Module],
    requests: dict[int, list[Inputs]],
    rounds: int,
) -> dict[str, Any]:
    """Serve both students in one way; compare their outputs, then their latency."""
    example = requests[max(requests)][0]
    served = {name: make(Flat(student.model), example) for name, student in students.items()}
    every = list(itertools.chain(*requests.values()))
    same = [torch.equal(served["bare"](*call), served["exported"](*call)) for call in every]
    latencies = {f"batches_of_{n}": latency(served, requests[n], rounds, CALLS[n]) for n in CALLS}
    return {"identical_outputs": all(same), **latencies}


def latency(
    served: dict[str, Callable[..., Tensor]], requests: list[Inputs], rounds: int, calls: int
) -> dict[str, Any]:
    arms = {name: partial(answer, model, requests) for name, model in served.items()}
    times = take_turns(arms, CPU, rounds=rounds, steps=calls)
    _, ratio = over(times, "exported", "bare")
    milliseconds = {
        f"{name}_ms": common.spread([1000 * core for _, core in times[name]]) for name in times
    }
    return {"latency_ratio": ratio, **milliseconds}


def answer(model: Callable[..., Tensor], requests: list[Inputs], calls: int) -> None:
    for request in itertools.islice(itertools.cycle(requests), calls):
        model(*request)


def markdown(result: dict[str, Any]) -> str:
    details = result["details"]
    sizes = [f"batches_of_{size}" for size in CALLS]
    header = ["way of serving", "equal to the bit"]
    header += [f"exported over bare, {size.replace('_', ' ')}" for size in sizes]
    header += [f"exported, ms a call, {size.replace('_', ' ')}" for size in sizes]
    rows = [
        [
            way.replace("_", " "),
            "yes" if details[way]["identical_outputs"] else "no",
            *(details[way][size]["latency_ratio"] for size in sizes),
            *(details[way][size]["exported_ms"] for size in sizes),
        ]
        for way in WAYS
    ]
    return (
        "The bare student was never wrapped, and has the trained student's state. It has "
        f"{details['tables']} tables and {details['parameters']:,} parameters. The exported one "
        f"holds {result['extra_parameters']} parameters and {result['extra_keys']} keys more. Both "
        "are served on one thread. The latency is the time on a core.\n\n"
        f"{common.table(header, rows)}"
    )


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    common.show(measure(options.quick), options.json, AIMS)


if __name__ == "__main__":
    main()
