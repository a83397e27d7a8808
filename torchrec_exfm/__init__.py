"""External distillation for TorchRec (ExFM, arXiv 2502.17494).

Train small students on the logged outputs of a teacher that is too large to serve::

    model = ExFMWrapper(DLRMTrain(dlrm), tap="model.over_arch.model.1")
    pipeline = TrainPipelineExFM(model, optimizer, device, teacher=columns)
    served = export_student(model)
"""

from torchrec_exfm import _versions

_versions.check()  # first, as misfits would fail in the imports below with an undefined symbol

from torchrec_exfm import functional, losses  # noqa: E402
from torchrec_exfm._warnings import (  # noqa: E402
    DistillationWarning,
    ExFMWarning,
    MetricsRestartedWarning,
    NotPipelinedWarning,
    TeacherMissingWarning,
)
from torchrec_exfm.adapter import StudentAdapter, adapter_step  # noqa: E402
from torchrec_exfm.auxiliary import AuxiliaryHead  # noqa: E402
from torchrec_exfm.batch import ExFMBatch, TeacherOutputs  # noqa: E402
from torchrec_exfm.export import export_student, student_state_dict  # noqa: E402
from torchrec_exfm.heads import DistillationHead  # noqa: E402
from torchrec_exfm.metrics import ExFMMetrics  # noqa: E402
from torchrec_exfm.monitor import RunMonitor  # noqa: E402
from torchrec_exfm.pipeline import ExFMSteps, TrainPipelineExFM  # noqa: E402
from torchrec_exfm.resume import load_training, save_training  # noqa: E402
from torchrec_exfm.sources import LiveTeacher, TeacherSource  # noqa: E402
from torchrec_exfm.tap import OutputsOf  # noqa: E402
from torchrec_exfm.tasks import Task  # noqa: E402
from torchrec_exfm.terms import DistillationTerm  # noqa: E402
from torchrec_exfm.wrapper import ExFMWrapper  # noqa: E402

__all__ = [
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
