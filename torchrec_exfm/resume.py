"""Training that goes on where it was stopped: a checkpoint of all that the next step depends on.

A checkpoint is a folder of :mod:`torchrec_exfm.checkpoint`. Its tensors, by the first part of
their names: ``model``, ``adapter``; ``fused``, ``dense`` and ``adapter_optimizer``, the optimizers'
state by parameter; ``rank0``, ``rank1`` ..., what each rank has for itself; ``values``, what is no
tensor, as JSON in bytes.
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
_KINDS: dict[str, Any] = {  # of what is no tensor
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
    """Write all that the training depends on, whole or not at all; every rank must call it.

    To be called between two steps, as often as one likes: it changes nothing of the training, and
    the batches that the pipeline has loaded ahead stay there. It writes student and heads (with the
    means that margins are measured by), the adapter, the state and the numbers (rates and so on)
    of every optimizer, the position, the random numbers' state of each rank, and the metrics; no
    gradients, so where they are accumulated, call it after the optimizer's step. A process killed
    meanwhile leaves a folder that :func:`load_training` passes over, and the next save deletes; a
    save that fails, as on a full disk, removes what it has written.

    Args:
        folder: that of the run's checkpoints, which all ranks see; each gets a folder of its own
            there, named by a number that counts up. Links and files of such names are left alone.
        pipeline: that of the run: a student's, or TorchRec's own of a teacher.
        position: where the stream goes on, in numbers of yours, the same on every rank: the
            batches for which ``progress`` has returned, not those that the pipeline has asked for.
        metrics: saved as well, if there are any.
        keep: how many complete checkpoints to leave; older ones are deleted.

    Returns:
        The new checkpoint's folder.

    Raises:
        ValueError: if ``keep`` is less than 1, or the position differs between ranks.
        TypeError: if the position holds something else than whole numbers, or the state of an
            optimizer something else than tensors and plain values.
        OSError: if it can't be written.

    Example:
        See :func:`load_training`.
    """
    if keep < 1:
        raise ValueError(f"keep should be at least 1; received {keep}")
    if not all(type(value) is int for value in position.values()):
        raise TypeError(f"the position should hold whole numbers; received {dict(position)}")
    folder, optimizers = Path(folder), named_optimizers(pipeline)
    states = {key: value for each in optimizers for key, value in each.states().items()}
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
    own = {"random": torch.get_rng_state()}
    device = pipeline_parts(pipeline).device
    if device.type == "cuda":
        own["random.cuda"] = torch.cuda.get_rng_state(device)
    if metrics is not None:
        own |= {f"metrics/{key}": value for key, value in metrics.state_dict().items()}
    own = {f"rank{rank()}/{key}": value for key, value in own.items()}
    new = folder / str(on_rank_0(lambda: _next_number(folder)))
    save_checkpoint(new, {**_modules(pipeline), **tensors, **own, _VALUES: packed})
    on_rank_0(lambda: _prune(folder, keep))
    return new


def load_training(
    folder: Path | str, pipeline: Pipeline, *, metrics: ExFMMetrics | None = None
) -> dict[str, int] | None:
    """Take up the newest complete checkpoint of :func:`save_training`, in place.

    Every rank must call it, with a pipeline that is set up as it was and has made no step. Training
    then goes on as if it had not stopped: on the CPU to the bit, with the same batches (alike
    aligned in memory too), as many ranks as before and the same kind of machine, and elsewhere up
    to rounding. With more or fewer ranks the metrics start anew, and random numbers are this run's
    own. Give the loader the batches from the position on. What you have written around the
    pipeline, such as the object of a schedule, is yours to take up; the rates that it had set are
    there. (Of tables in columns TorchRec keeps the state of row-wise optimizers once a shard: those
    have to stay as many.)

    To begin a run from a plain checkpoint of the bare student, load that into
    :func:`~torchrec_exfm.student_state_dict` instead, which also gives such a checkpoint.

    Args:
        folder: as for :func:`save_training`.
        pipeline: with the same student, terms, teachers, tasks, adapter and kinds of optimizers.
        metrics: taken up as well, if there are any.

    Returns:
        The position that was saved, or None if there is no complete checkpoint.

    Raises:
        ValueError: if the checkpoint is of another run, naming what differs, or is damaged, if by
            a bit; if the pipeline has batches in flight already. Nothing was changed then, on any
            rank.

    Warns:
        MetricsRestartedWarning: if there are metrics and they have to start anew.

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
        >>> again, _, _ = resumed.progress(iter(data[position["step"] :]))
        >>> bool(again == pipeline.progress(batches)[0])
        True
    """
    optimizers = named_optimizers(pipeline)
    newest = on_rank_0(lambda: max(_complete(Path(folder)), default=None))
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
    values, own = _values_and_own(checkpoint, metadata)
    as_many = values["ranks"] == world_size()
    saved_metrics = _below("metrics/", own) if as_many and metrics is not None else {}
    state, device = _modules(pipeline), pipeline_parts(pipeline).device
    for each in optimizers:
        state |= each.states() if each.fused else each.empty_states(saved)
    numbers = _numbers(optimizers)
    needed = set().union(*gather_from_ranks([*state, *numbers]))

    def check() -> None:
        _check_run(checkpoint, saved, values, pipeline, needed)
        _check_numbers(checkpoint, saved, values, numbers)
        if as_many:
            _check_random(checkpoint, own, device)
        if metrics is not None and saved_metrics:
            _check_metrics(checkpoint, saved_metrics, metrics)

    on_every_rank(check)
    load_checkpoint(checkpoint, state, metadata)

    _trained(pipeline).load_state_dict(_below(_MODEL, state))
    for each in optimizers:
        each.take(state | values["states"], values["numbers"])
    if metrics is not None and saved_metrics:
        metrics.load_state_dict(saved_metrics)
    elif metrics is not None:
        warnings.warn(
            "the metrics start anew: none were saved, or those of another number of ranks",
            MetricsRestartedWarning,
            stacklevel=2,
        )
    if as_many:
        torch.set_rng_state(own["random"])
        if device.type == "cuda" and "random.cuda" in own:
            torch.cuda.set_rng_state(own["random.cuda"], device)
    position: dict[str, int] = values["position"]
    return position


def _modules(pipeline: Pipeline) -> dict[str, Any]:
    """The state of student, heads and adapter (or of a teacher), by reference."""
    state, adapter = _trained(pipeline).state_dict(), getattr(pipeline, "adapter", None)
    of_adapter = {} if adapter is None else adapter.state_dict()
    named = {_MODEL + key: value for key, value in state.items()}
    return named | {f"adapter/{key}": value for key, value in of_adapter.items()}


def _trained(pipeline: Pipeline) -> nn.Module:
    """The wrapper of a student, or a model that has none."""
    model = pipeline_parts(pipeline).model
    wrapper = wrapper_in(model)
    return model if wrapper is None else wrapper


def _values(
    pipeline: Pipeline,
    optimizers: list[NamedOptimizer],
    position: dict[str, int],
    states: dict[str, Any],
) -> dict[str, Any]:
    """What is no tensor, of all ranks."""
    numbers = _numbers(optimizers)
    gathered = gather_from_ranks((position, numbers))
    for index, (other, of_rank) in enumerate(gathered):
        numbers |= of_rank
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
    """Of every parameter of this rank."""
    return {name: record for each in optimizers for name, record in each.numbers().items()}


def _names(pipeline: Pipeline) -> dict[str, list[str]]:
    """Whom one learns from, and what."""
    trained = _trained(pipeline)
    if not isinstance(trained, ExFMWrapper):  # a teacher's
        return {"teachers": [], "tasks": [], "terms": []}
    head = trained.auxiliary_head
    terms = [term.name for term in head.terms]
    return {"teachers": list(head.teachers), "tasks": list(head.task_names), "terms": terms}


def _values_and_own(folder: Path, metadata: Metadata) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what is no tensor, and what this rank has for itself."""
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
    values = on_every_rank(lambda: _unpacked(folder, tensors[_VALUES]))
    return values, _below(prefix, tensors)


def _unpacked(folder: Path, packed: Tensor) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(packed.numpy().tobytes())
    except (TypeError, ValueError, RecursionError) as error:
        raise refusal(folder, "hold JSON as values of a training", f"{error!r:.80}") from error
    if not fits(values, _KINDS):
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
    """Check that the checkpoint is of this run, or say what differs."""
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
    """Check that the optimizers, of which these numbers are, can take those that were saved."""
    if twice := values["states"].keys() & saved.keys():
        raise refusal(folder, "hold each state of an optimizer once", f"{_some(twice)} twice")
    for name, record in numbers.items():
        found = values["numbers"][name]
        if record["kind"] != found["kind"]:
            raise ValueError(
                f"{folder} should be of a run with {record['kind']} for {name!r}; received one "
                f"with {found['kind']}"
            )
        same_form = all(
            _form(value) == _form(found["group"].get(key, value))
            for key, value in record["group"].items()
        )
        counts = len(found["steps"]) >= len(record["steps"]) and all(
            0 <= count < 2**63 for count in found["steps"]
        )
        if not same_form or not counts or "params" in found["group"]:
            raise refusal(folder, f"hold numbers of {name!r} such as {record}", f"{found!r:.200}")


def _form(value: Any) -> Any:
    """What a number of a group has to agree in: a single one, or a list of so many."""
    return [_form(each) for each in value] if isinstance(value, (list, tuple)) else None


def _check_random(folder: Path, own: Mapping[str, Tensor], device: torch.device) -> None:
    """Check that the state of random numbers is one, on a generator that nobody uses."""
    generators = {"random": torch.Generator()}
    if device.type == "cuda" and "random.cuda" in own:
        generators["random.cuda"] = torch.Generator(device)
    try:
        for key, generator in generators.items():
            generator.set_state(own[key])
    except (KeyError, RuntimeError, TypeError) as error:
        raise refusal(folder, "hold the state of random numbers", f"{error!r:.80}") from error


def _check_metrics(folder: Path, saved: Mapping[str, Tensor], metrics: ExFMMetrics) -> None:
    """Check that metrics can take a state: of their dtypes and shapes, but for parts of windows."""
    metrics.check_state_dict(saved)
    for key, here in metrics.state_dict().items():
        tensor, sizes = saved[key], saved.get(f"{key}.sizes")
        form, wanted = ((each.dtype, list(each.shape)) for each in (tensor, here))
        if sizes is not None or key.endswith(".sizes"):
            form[1][-1:] = wanted[1][-1:] = [-1]
        parts = sizes is None or (int(sizes.sum()) == tensor.shape[-1] and bool((sizes >= 0).all()))
        if form != wanted or not parts:
            raise refusal(folder, f"hold metrics with {key!r} of {wanted}", f"{form}")


def _some(names: set[str]) -> str:
    """The first few, those of modules before those of optimizers."""
    ordered = sorted(names, key=lambda name: (not name.startswith((_MODEL, "adapter/")), name))
    return f"{ordered[:5]}" + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _numbered(folder: Path) -> dict[int, Path]:
    """Checkpoints, complete or not. A link is none: it may lead out of the folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {
        int(path.name): path
        for path in paths
        if re.fullmatch("[1-9][0-9]{,17}", path.name) and path.is_dir() and not path.is_symlink()
    }


def _next_number(folder: Path) -> int:
    number = max(_numbered(folder), default=0) + 1
    while os.path.lexists(folder / str(number)):  # a file or a link, of others
        number += 1
    return number


def _complete(folder: Path) -> list[int]:
    return sorted(n for n, path in _numbered(folder).items() if (path / METADATA).exists())


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the newest complete checkpoints; of each, what completes it first."""
    kept = _complete(folder)[-keep:]
    ours = (".distcp", ".metadata", ".metadata.tmp", METADATA, f"{METADATA}.tmp")
    for path in [path for number, path in _numbered(folder).items() if number not in kept]:
        with contextlib.suppress(OSError):  # the new checkpoint is complete all the same
            names = sorted(os.listdir(path), key=lambda name: name != METADATA)
            if all(name.endswith(ours) for name in names):
                for name in names:
                    (path / name).unlink()
                path.rmdir()


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose keys begin so, by the rest of the key."""
    return {key.removeprefix(prefix): values[key] for key in values if key.startswith(prefix)}
