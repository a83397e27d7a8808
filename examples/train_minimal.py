"""Train a student of two teachers, resume it where it stopped, export it for serving.

    torchrun --nproc-per-node 2 examples/train_minimal.py --steps 300 --folder results/minimal

On CPU or GPU. Started again, after a kill or for more steps, it resumes from its last checkpoint.
The data are made up: the teachers know the odds of a click, but for some noise."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, optim
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.models.dlrm import DLRM, DLRMTrain

import torchrec_exfm as exfm

NAMES, ROWS, SIZE, TAP = ["user", "item"], 500, 256, "model.over_arch.model.1"
TEACHERS, NOISE = ["large", "small"], torch.tensor([0.2, 1.0])
TERMS = [
    exfm.DistillationTerm(teacher="large"),  # a distillation head learns from this teacher
    exfm.DistillationTerm(teacher="small", weight=0.5),
    # the serving head learns from the adapter, as far as the teacher leads
    exfm.DistillationTerm(teacher="large", adapted=True, serving=True, margin=0.25),
]


def batches(first, last):
    """Yield this rank's batches of some steps, with the teachers' logits (B, M, T)."""
    appeal = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(0))
    for step in range(first, last):
        random = torch.Generator().manual_seed(1_000 * step + dist.get_rank())
        ids = torch.randint(ROWS, (2, SIZE), generator=random)
        logits = appeal.gather(1, ids).sum(0) - 1
        labels = (torch.rand(SIZE, generator=random) < logits.sigmoid()).float()
        outputs = logits.unsqueeze(1) + NOISE * torch.randn(SIZE, len(TEACHERS), generator=random)
        features = KeyedJaggedTensor(NAMES, ids.flatten(), lengths=torch.ones(2 * SIZE).int())
        batch = Batch(torch.ones(SIZE, 1), features, labels)
        yield exfm.ExFMBatch(batch, exfm.TeacherOutputs(outputs.unsqueeze(2)))


def make_pipeline(device):
    tables = [EmbeddingBagConfig(ROWS, 16, name=name, feature_names=[name]) for name in NAMES]
    bags = EmbeddingBagCollection(tables, device=torch.device("meta"))  # sharded, then allocated
    optim.apply_optimizer_in_backward(optim.RowWiseAdagrad, bags.parameters(), {"lr": 0.1})
    student = DLRMTrain(DLRM(bags, 1, [16], [32, 1]))
    wrapper = exfm.ExFMWrapper(student, tap=TAP, terms=TERMS, teachers=TEACHERS)
    plan = EmbeddingShardingPlanner().collective_plan(wrapper)
    model = DistributedModelParallel(wrapper, device=device, plan=plan)
    dense = dict(optim.optimizers.in_backward_optimizer_filter(model.named_parameters()))
    optimizer = optim.KeyedOptimizerWrapper(dense, lambda params: torch.optim.Adam(params, lr=1e-3))
    adapter = exfm.StudentAdapter(num_teachers=len(TEACHERS))
    return exfm.TrainPipelineExFM(model, optimizer, device, adapter=adapter)


def main(steps, folder):
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    pipeline = make_pipeline(device)
    metrics = exfm.ExFMMetrics(batch_size=SIZE, device=device, teachers=TEACHERS)
    checkpoints = folder / "checkpoints"
    position = exfm.load_training(checkpoints, pipeline, metrics=metrics) or {"steps": 0}
    steps = max(steps, position["steps"])  # an earlier run may have gone further
    loader = batches(position["steps"], steps)
    with exfm.RunMonitor(pipeline, metrics) as monitor:  # prints NE and coverage
        for step in range(position["steps"] + 1, steps + 1):
            monitor.step(pipeline.progress(loader))
            if step % 100 == 0 or step == steps:
                exfm.save_training(checkpoints, pipeline, position={"steps": step}, metrics=metrics)
    student = exfm.export_student(pipeline.model)  # on every rank, as the tables are gathered
    if student is not None:  # on rank 0
        torch.save(student.state_dict(), folder / "student.pt")
        print(f"trained from step {position['steps']} to {steps}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("results/minimal"))
    main(**vars(parser.parse_args()))
