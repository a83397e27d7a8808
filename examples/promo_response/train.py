"""Train one student of the promotion-response stream from an existing teacher store.

    python examples/promo_response/main.py  # writes the store
    python examples/promo_response/train.py --vertical MEAT-PCKGD

A student is named by its vertical, so that `torchx_components/exfm.py:train` can start several.
Runs on one rank or several (torchrun), on CPU or CUDA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import data
import main as demo
import torch.distributed as dist

from torchrec_exfm.das import TeacherStore


def main() -> None:
    """Train the student; print its figures, scored before each update."""
    options = parse_options()
    device = demo.set_up()
    stream = data.load_stream(options.cache, progress=dist.get_rank() == 0)
    demo.check_verticals(stream, [options.vertical])
    part = stream.select(demo.rows_of(stream, options.vertical))
    store = TeacherStore(options.store)
    logits, speed = demo.train_student(part, store, options.teacher, options.arm, options, device)
    ne, auc, calibration = demo.evaluate(part, logits)
    if dist.get_rank() == 0:
        print(
            f"{options.vertical}, {options.arm}: NE {ne:.4f}, AUC {auc:.4f}, "
            f"calibration {calibration:.3f}, {speed:,.0f} samples/s"
        )
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    """Read the command line; the student's settings are those of `main.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("results/promo_response/store"))
    parser.add_argument("--teacher", default=demo.TEACHER_NAME, help="its name in the store")
    parser.add_argument("--vertical", "--student", default="DRUG GM", help="the department")
    parser.add_argument("--arm", choices=demo.ARMS, default="AH")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder of the built stream")
    parser.set_defaults(
        batch_size=demo.BATCH,
        learning_rate=5e-3,
        table_learning_rate=0.5,
        serving_head_weight=demo.SERVING_TERM.weight,
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
