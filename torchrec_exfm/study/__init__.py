"""A study on your own stream: does a teacher pay for your student, and with which setting?

    python -m torchrec_exfm.study my_study.py --seeds 3

``my_study.py`` defines a student, a stream and a teacher (:class:`Study`). Each arm passes once
through the stream in time order. Every figure is of examples scored before they were trained on.
It needs the packages of the extra ``study``: matplotlib, numpy, SciPy and tqdm.
"""

try:
    import matplotlib  # noqa: F401
    import numpy  # noqa: F401
    import scipy  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "torchrec_exfm.study needs matplotlib, numpy, SciPy and tqdm, and "
        f"{error.name} is not installed: pip install 'torchrec-exfm[study]'",
        name=error.name,
    ) from error

from torchrec_exfm.study.figures import figures
from torchrec_exfm.study.passes import ARMS, Arm, Pass, Study, run_pass
from torchrec_exfm.study.runs import run

__all__ = ["ARMS", "Arm", "Pass", "Study", "figures", "run", "run_pass"]
