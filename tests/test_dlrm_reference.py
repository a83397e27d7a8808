"""The rounding bound of stored outputs: what it allows, and what it does not."""

from __future__ import annotations

import dlrm_reference as reference
import fault_jobs
import numpy as np
import pytest
import rank_models as rm
import torch

from torchrec_exfm.das.schema import Resolution, StoreFormat


@pytest.mark.parametrize("resolution", ["float32", "bfloat16"])
def test_what_float32_may_say(resolution: Resolution) -> None:
    """The model is within the bound in any batches; a wrong value or exchanged rows are not."""
    data, teacher = fault_jobs.Data(), rm.two_task_student()
    examples = data.batch(torch.arange(fault_jobs.ROWS))
    expected = reference.logits_alone(
        teacher.model, examples.dense_features, examples.sparse_features
    )
    with torch.no_grad():
        batches = (data.batch(rows) for rows in torch.arange(fault_jobs.ROWS).split(1_000))
        outputs = torch.cat([teacher(batch)[1][1] for batch in batches])
    stored = StoreFormat(resolution=resolution).round(outputs.numpy())
    reference.assert_within_rounding(stored, expected, resolution)

    wrong = stored.copy()
    steps = 2.0**-6 * abs(wrong[7, 1])  # two of bfloat16, at least
    wrong[7, 1] += {"float32": 3 * float(expected.error[7, 1]), "bfloat16": steps}[resolution]
    others = np.roll(stored, 1, axis=0)
    for wrong_outputs in wrong, others, np.full_like(stored, np.nan):
        with pytest.raises(AssertionError):
            reference.assert_within_rounding(wrong_outputs, expected, resolution)
    assert (expected.error / expected.size).max() < 1e-4
