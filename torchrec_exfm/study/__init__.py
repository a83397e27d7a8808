"""Does a teacher pay for a student of yours, and with which setting: a study on your own stream.

    python -m torchrec_exfm.study my_study.py --seeds 3

``my_study.py`` gives a student, a stream and a teacher (:class:`Study`); each arm goes once through
the stream in time order, and every figure is of examples scored before they were trained on. It
needs the extra ``study`` (numpy, SciPy, matplotlib).
"""

from torchrec_exfm.study.figures import figures
from torchrec_exfm.study.passes import ARMS, Arm, Pass, Study, run_pass
from torchrec_exfm.study.runs import run

__all__ = ["ARMS", "Arm", "Pass", "Study", "figures", "run", "run_pass"]
