"""Resuming a training: a checkpoint of all that the next step depends on.

A checkpoint is a folder of :mod:`torchrec_exfm.checkpoint`. Its tensors, by the first part of
their names: ``model`` and ``adapter``, the weights; ``fused``, ``dense`` and ``adapter_optimizer``,
the optimizers' state by parameter; ``rank0``, ``rank1`` ..., the local state of each rank;
``values``, everything that is not a tensor, as JSON in bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata
from torchrec.distributed.train_pipeline import TrainPipeline

from torchrec_exfm._compat import batches_in_flight, pipeline_parts
from torchrec_exfm._manifest import METADATA, fits, refusal
from torchrec_exfm._optimizers import NamedOptimizer, named_optimizers
from torchrec_exfm._ranks import gather_from_ranks, on_rank_0, rank, world_size
from torchrec_exfm._warnings import MetricsRestartedWarning
from torchrec_exfm.checkpoint import (
    load_checkpoint,
    on_every_rank,
    open_checkpoint,
    save_checkpoint,
)
from torchrec_exfm.metrics import ExFMMetrics
from torchrec_exfm.wrapper import ExFMWrapper, wrapper_in

__all__ = ["load_training", "save_training"]

Pipeline: TypeAlias = "TrainPipeline[Any, Any]"

_MODEL = "model/"
_VALUES = "values"
_VERSION = 1
_NUMBER = (int, float)
_VALUES_KIND: dict[str, Any] = {  # see _manifest.fits
    "version": int,
    "ranks": int,
    "position": {str: int},
    "names": {"teachers": [str], "tasks": [str], "terms": [str]},
    "states": {str: (*_NUMBER, bool, str, type(None))},
    "numbers": {
        str: {"kind": str, "steps": [int], "group": {str: (*_NUMBER, [(*_NUMBER, [_NUMBER])])}}
    },
}


def save_training(
    folder: Path | str,
    pipeline: Pipeline,
    *,
    position: Mapping[str, int],
    metrics: ExFMMetrics | None = None,
    keep: int = 2,
) -> Path:
    """Save all that the training depends on, atomically; every rank must call it.

    Call it between two steps, as often as you like. It leaves the training unchanged, including the
    batches that the pipeline has loaded ahead. Saved are the student, the heads (with the running
    means behind the margins), the adapter, every optimizer's state and hyperparameters, the
    position, each rank's random state, and the metrics. Gradients are not: where they are
    accumulated, call it after the optimizer's step.

    A process killed during a save leaves a folder that :func:`load_training` ignores and the next
    save deletes. A save that fails, for example on a full disk, removes what it has written.

    Args:
        folder: the folder of the run's checkpoints, visible to all ranks. Each checkpoint is a
            folder in it, numbered upwards. Links and files with such names are left alone.
        pipeline: the run's pipeline: a student's, or TorchRec's own for a teacher.
        position: where the stream continues, as integers of your choice, the same on every rank.
            Count the batches for which ``progress`` has returned, not those it has asked for.
        metrics: saved as well, if given.
        keep: how many complete checkpoints to keep; older ones are deleted.

    Returns:
        The new checkpoint's folder.

    Raises:
        ValueError: if ``keep`` is less than 1, or the position differs between ranks.
        TypeError: if the position holds anything but integers, or an optimizer's state anything
            but tensors and plain values.
        OSError: if it can't be written.

    Example:
        See :func:`load_training`.
    """
    if keep < 1:
        raise ValueError(f"keep should be at least 1; received {keep}")
    if not all(type(value) is int for value in position.values()):
        raise TypeError(f"the position should hold whole numbers; received {dict(position)}")
    folder, optimizers = Path(folder), named_optimizers(pipeline)
    states = {key: value for named in optimizers for key, value in named.states().items()}
    tensors = {key: value for key, value in states.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in states.items() if key not in tensors}
    for key, value in plain.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise TypeError(
                "the state of an optimizer should hold tensors and plain values; received "
                f"{key!r}, of type {type(value).__name__}"
            )
    values = json.dumps(_values(pipeline, optimizers, dict(position), plain)).encode()
    packed = torch.frombuffer(bytearray(values), dtype=torch.uint8)
    local_state = {"random": torch.get_rng_state()}
    device = pipeline_parts(pipeline).device
    if device.type == "cuda":
        local_state["random.cuda"] = torch.cuda.get_rng_state(device)
    if metrics is not None:
        local_state |= {f"metrics/{key}": value for key, value in metrics.state_dict().items()}
    local_state = {f"rank{rank()}/{key}": value for key, value in local_state.items()}
    new_folder = folder / str(on_rank_0(lambda: _next_number(folder)))
    state = {**_module_state(pipeline), **tensors, **local_state, _VALUES: packed}
    save_checkpoint(new_folder, state)
    on_rank_0(lambda: _prune(folder, keep))  # only now, when the new one is complete on all ranks
    return new_folder


def load_training(
    folder: Path | str, pipeline: Pipeline, *, metrics: ExFMMetrics | None = None
) -> dict[str, int] | None:
    """Restore the newest complete checkpoint of :func:`save_training`, in place.

    Every rank must call it, with a pipeline that is set up as before and has made no step. Give the
    loader the batches from the returned position on. Training then continues as if it had not
    stopped. On the CPU it does so to the bit, given the same batches (with the same alignment in
    memory), as many ranks and the same kind of machine; otherwise up to rounding.

    With more or fewer ranks the metrics start anew, and the random state stays this process's own.
    Column-wise sharded tables with a row-wise optimizer need the same number of shards, as TorchRec
    keeps that state once per shard. Restore objects of your own yourself, such as a learning-rate
    schedule; the rates that it had set are restored.

    To start a run from a plain checkpoint of the bare student, load that into
    :func:`~torchrec_exfm.student_state_dict` instead, which also gives such a checkpoint.

    Args:
        folder: as for :func:`save_training`.
        pipeline: with the same student, terms, teachers, tasks, adapter and optimizer classes.
        metrics: restored as well, if given.

    Returns:
        The saved position, or None if there is no complete checkpoint.

    Raises:
        ValueError: if the checkpoint is of another run (the message names what differs), or is
            damaged, even by one bit; if the pipeline already has batches in flight. Nothing has
            changed then, on any rank.

    Warns:
        MetricsRestartedWarning: if metrics are given and have to start anew.

    Example:
        >>> import tempfile
        >>> from torchrec.datasets.random import RandomRecDataset
        >>> from torchrec.models.dlrm import DLRM, DLRMTrain
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> def new_pipeline():
        ...     table = EmbeddingBagConfig(
        ...         name="t", embedding_dim=4, num_embeddings=10, feature_names=["f"])
        ...     dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 3, [4], [5, 1])
        ...     model = ExFMWrapper(DLRMTrain(dlrm), tap="model.over_arch")
        ...     optimizer = torch.optim.Adam(model.parameters())
        ...     return TrainPipelineExFM(model, optimizer, torch.device("cpu"),
        ...         teacher=lambda batch: TeacherOutputs(torch.zeros(len(batch.labels))))
        >>> data = list(RandomRecDataset(
        ...     ["f"], 2, hash_size=10, num_dense=3, manual_seed=0, num_batches=10))
        >>> folder, pipeline = tempfile.mkdtemp(), new_pipeline()
        >>> batches = iter(data)
        >>> for step in range(1, 7):
        ...     loss, logits, labels = pipeline.progress(batches)
        ...     if step % 3 == 0:
        ...         path = save_training(folder, pipeline, position={"step": step})
        >>> resumed = new_pipeline()  # in a process of its own, after the other one was killed
        >>> position = load_training(folder, resumed)
        >>> position
        {'step': 6}
        >>> resumed_loss, _, _ = resumed.progress(iter(data[position["step"] :]))
        >>> bool(resumed_loss == pipeline.progress(batches)[0])
        True
    """
    optimizers = named_optimizers(pipeline)
    # One answer for all ranks: each may see a shared folder at another moment.
    newest = on_rank_0(lambda: max(_complete_numbers(Path(folder)), default=None))
    if newest is None:
        return None
    in_flight = batches_in_flight(pipeline)
    if in_flight:
        raise ValueError(
            "the pipeline should have no batches in flight; received one with "
            f"{in_flight}; load into a new one, before its first step"
        )
    checkpoint = Path(folder) / str(newest)
    metadata = open_checkpoint(checkpoint)
    saved = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    values, local_state = _read_values(checkpoint, metadata)
    same_ranks = values["ranks"] == world_size()
    saved_metrics = _strip("metrics/", local_state) if same_ranks and metrics is not None else {}
    state, device = _module_state(pipeline), pipeline_parts(pipeline).device
    for named in optimizers:
        state |= named.states() if named.fused else named.empty_states(saved)
    numbers = _numbers(optimizers)
    # Of all ranks: a table's optimizer state is known only to the ranks that hold a shard of it.
    needed = set().union(*gather_from_ranks([*state, *numbers]))

    def check() -> None:
        _check_run(checkpoint, saved, values, pipeline, needed)
        _check_numbers(checkpoint, saved, values, numbers)
        if same_ranks:
            _check_random(checkpoint, local_state, device)
        if metrics is not None and saved_metrics:
            _check_metrics(checkpoint, saved_metrics, metrics)

    on_every_rank(check)  # all checks on all ranks before anything changes on any
    load_checkpoint(checkpoint, state, metadata)

    _trained_module(pipeline).load_state_dict(_strip(_MODEL, state))
    for named in optimizers:
        named.restore(state | values["states"], values["numbers"])
    if metrics is not None and saved_metrics:
        metrics.load_state_dict(saved_metrics)
    elif metrics is not None:
        warnings.warn(
            "the metrics start anew: none were saved, or those of another number of ranks",
            MetricsRestartedWarning,
            stacklevel=2,
        )
    if same_ranks:
        torch.set_rng_state(local_state["random"])
        if device.type == "cuda" and "random.cuda" in local_state:
            torch.cuda.set_rng_state(local_state["random.cuda"], device)
    position: dict[str, int] = values["position"]
    return position


def _module_state(pipeline: Pipeline) -> dict[str, Any]:
    """Return the state of student, heads and adapter (or of a teacher), by reference."""
    state, adapter = _trained_module(pipeline).state_dict(), getattr(pipeline, "adapter", None)
    adapter_state = {} if adapter is None else adapter.state_dict()
    module_state = {_MODEL + key: value for key, value in state.items()}
    return module_state | {f"adapter/{key}": value for key, value in adapter_state.items()}


def _trained_module(pipeline: Pipeline) -> nn.Module:
    """Return a student's wrapper, or a teacher's model, which has none."""
    model = pipeline_parts(pipeline).model
    wrapper = wrapper_in(model)
    return model if wrapper is None else wrapper


def _values(
    pipeline: Pipeline,
    optimizers: list[NamedOptimizer],
    position: dict[str, int],
    states: dict[str, Any],
) -> dict[str, Any]:
    """Return everything to save that is not a tensor, of all ranks."""
    numbers = _numbers(optimizers)
    gathered = gather_from_ranks((position, numbers))
    for index, (other, rank_numbers) in enumerate(gathered):
        numbers |= rank_numbers
        if other != gathered[0][0]:
            raise ValueError(
                f"the position should be the same on every rank; received {gathered[0][0]} on rank "
                f"0 and {other} on rank {index}"
            )
    return {
        "version": _VERSION,
        "ranks": world_size(),
        "position": position,
        "names": _names(pipeline),
        "states": states,
        "numbers": numbers,
    }


def _numbers(optimizers: list[NamedOptimizer]) -> dict[str, dict[str, Any]]:
    """Return the optimizers' hyperparameters for every parameter of this rank."""
    return {name: record for named in optimizers for name, record in named.numbers().items()}


def _names(pipeline: Pipeline) -> dict[str, list[str]]:
    """Return the names of teachers, tasks and terms; empty lists for a teacher's run."""
    trained = _trained_module(pipeline)
    if not isinstance(trained, ExFMWrapper):  # a teacher's
        return {"teachers": [], "tasks": [], "terms": []}
    head = trained.auxiliary_head
    terms = [term.name for term in head.terms]
    return {"teachers": list(head.teachers), "tasks": list(head.task_names), "terms": terms}


def _read_values(folder: Path, metadata: Metadata) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the values that are not tensors, and this rank's local state."""
    saved, prefix = metadata.state_dict_metadata, f"rank{rank()}/"
    if _VALUES not in saved:
        raise ValueError(
            f"{folder} should hold a training; received another checkpoint; load one of a bare "
            "student into student_state_dict(model)"
        )
    tensors = {
        key: torch.zeros(tensor.size, dtype=tensor.properties.dtype)
        for key, tensor in cast(dict[str, TensorStorageMetadata], saved).items()
        if key == _VALUES or key.startswith(prefix)
    }
    load_checkpoint(folder, tensors, metadata)
    values = on_every_rank(lambda: _unpack(folder, tensors[_VALUES]))
    return values, _strip(prefix, tensors)


def _unpack(folder: Path, packed: Tensor) -> dict[str, Any]:
    """Parse the values; raise a ValueError for any that save_training would not write."""
    try:
        values: dict[str, Any] = json.loads(packed.numpy().tobytes())
    except (TypeError, ValueError, RecursionError) as error:
        raise refusal(folder, "hold JSON as values of a training", f"{error!r:.80}") from error
    if not fits(values, _VALUES_KIND):
        raise refusal(folder, "hold values of a training", f"others: {values!r:.80}")
    if values["version"] != _VERSION:
        raise refusal(folder, f"hold values of version {_VERSION}", f"{values['version']}")
    return values


def _check_run(
    folder: Path,
    saved: Iterable[str],
    values: Mapping[str, Any],
    pipeline: Pipeline,
    needed: set[str],
) -> None:
    """Raise a ValueError that says what differs, unless the checkpoint is of this run."""
    for what, names in _names(pipeline).items():
        if values["names"][what] != names:
            raise ValueError(
                f"{folder} should be of a run with the {what} {names}; received one with "
                f"{values['names'][what]}"
            )
    received = {key for key in saved if key != _VALUES and not key.startswith("rank")}
    received |= values["numbers"].keys()
    if needed != received:
        what = "these optimizers and this sharding plan"
        if any(name.startswith((_MODEL, "adapter/")) for name in needed ^ received):
            what = "this student, these terms and adapter"
        raise ValueError(
            f"{folder} should be of a run with {what}; received one without "
            f"{_some(needed - received)} and with {_some(received - needed)}"
        )


def _check_numbers(
    folder: Path, saved: Mapping[str, Any], values: Mapping[str, Any], numbers: Mapping[str, Any]
) -> None:
    """Raise a ValueError unless optimizers with these numbers can restore the saved ones."""
    if twice := values["states"].keys() & saved.keys():
        raise refusal(folder, "hold each state of an optimizer once", f"{_some(twice)} twice")
    for name, record in numbers.items():
        stored = values["numbers"][name]
        if record["kind"] != stored["kind"]:
            raise ValueError(
                f"{folder} should be of a run with {record['kind']} for {name!r}; received one "
                f"with {stored['kind']}"
            )
        # A group may have gained keys since: what was not saved keeps the value it has.
        same_form = all(
            _form(value) == _form(stored["group"].get(key, value))
            for key, value in record["group"].items()
        )
        counts = len(stored["steps"]) >= len(record["steps"]) and all(
            0 <= count < 2**63 for count in stored["steps"]
        )
        if not same_form or not counts or "params" in stored["group"]:
            raise refusal(folder, f"hold numbers of {name!r} such as {record}", f"{stored!r:.200}")


def _form(value: Any) -> Any:
    """Return None for a number, and for a list of numbers, such as Adam's betas, one of Nones."""
    return [_form(item) for item in value] if isinstance(value, (list, tuple)) else None


def _check_random(folder: Path, local_state: Mapping[str, Tensor], device: torch.device) -> None:
    """Raise a ValueError unless fresh generators, which nobody uses, accept the random state."""
    generators = {"random": torch.Generator()}
    if device.type == "cuda" and "random.cuda" in local_state:
        generators["random.cuda"] = torch.Generator(device)
    try:
        for key, generator in generators.items():
            generator.set_state(local_state[key])
    except (KeyError, RuntimeError, TypeError) as error:
        raise refusal(folder, "hold the state of random numbers", f"{error!r:.80}") from error


def _check_metrics(folder: Path, saved: Mapping[str, Tensor], metrics: ExFMMetrics) -> None:
    """Raise a ValueError unless the metrics can restore a state, by its dtypes and shapes."""
    metrics.check_state_dict(saved)
    for key, current in metrics.state_dict().items():
        tensor, sizes = saved[key], saved.get(f"{key}.sizes")
        received, expected = ((t.dtype, list(t.shape)) for t in (tensor, current))
        if sizes is not None or key.endswith(".sizes"):
            # The AUC's window may have another number of parts, of other sizes.
            received[1][-1:] = expected[1][-1:] = [-1]
        parts = sizes is None or (int(sizes.sum()) == tensor.shape[-1] and bool((sizes >= 0).all()))
        if received != expected or not parts:
            raise refusal(folder, f"hold metrics with {key!r} of {expected}", f"{received}")


def _some(names: set[str]) -> str:
    """Return the first few names, those of modules before those of optimizers."""
    ordered = sorted(names, key=lambda name: (not name.startswith((_MODEL, "adapter/")), name))
    return f"{ordered[:5]}" + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _numbered(folder: Path) -> dict[int, Path]:
    """Return the checkpoints by number, complete or not; no links, which may lead elsewhere."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {
        int(path.name): path
        for path in paths
        if re.fullmatch("[1-9][0-9]{,17}", path.name) and path.is_dir() and not path.is_symlink()
    }


def _next_number(folder: Path) -> int:
    number = max(_numbered(folder), default=0) + 1
    while os.path.lexists(folder / str(number)):  # a file or a link of somebody else's
        number += 1
    return number


def _complete_numbers(folder: Path) -> list[int]:
    return sorted(n for n, path in _numbered(folder).items() if (path / METADATA).exists())


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the newest complete checkpoints."""
    newest = _complete_numbers(folder)[-keep:]
    ours = (".distcp", ".metadata", ".metadata.tmp", METADATA, f"{METADATA}.tmp")
    for path in [path for number, path in _numbered(folder).items() if number not in newest]:
        with contextlib.suppress(OSError):  # a failed clean-up does not undo a good save
            # metadata.json first: a kill in between leaves what load_training ignores.
            names = sorted(os.listdir(path), key=lambda name: name != METADATA)
            if all(name.endswith(ours) for name in names):
                for name in names:
                    (path / name).unlink()
                path.rmdir()


def _strip(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values whose keys have the prefix, by the rest of the key."""
    return {key.removeprefix(prefix): values[key] for key in values if key.startswith(prefix)}
