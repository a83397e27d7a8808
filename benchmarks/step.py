"""prototype"""

import sys, tempfile, time
import common, torch
from reference import *
from training import *
from torchrec_exfm.das import Snapshot, TeacherLookup, TeacherStore
from torchrec_exfm import LiveTeacher

WINDOW, FIRST = 86_400, 20_000


def run(device, batch, rounds, steps, which):
    stream = Stream(2**18, FIRST * WINDOW, WINDOW)
    batches = stream.pool(8, batch)
    d = tempfile.mkdtemp()
    st = TeacherStore.create(d + "/s", window_seconds=WINDOW)
    st.write(Snapshot("fm", 1, FIRST * WINDOW - 1), stream.ids, stream.logits, stream.seconds)
    arms = {}
    makers = {
        "plain": lambda: plain(device),
        "ah": lambda: exfm(device, AH),
        "ahsa": lambda: exfm(device),
        "store": lambda: exfm(device, teacher=TeacherLookup(st, "fm")),
        "wide": lambda: exfm(
            device,
            [
                DistillationTerm(beta=3.0, hidden=(512, 256)),
                DistillationTerm(beta=3.0, adapted=True, hidden=(512, 256)),
            ],
        ),
    }
    for w in which:
        arms[w] = Arm(makers[w](), batches)
    D = 26 * 27 // 2 + 16
    x = torch.randn(batch, D)
    W = torch.randn(256, D)
    W2 = torch.randn(2, 256)

    def floor(steps):
        for _ in range(steps):
            h = x @ W.t()
            o = h @ W2.t()
            gh = o @ W2
            o.t() @ h
            gh.t() @ x
            gh @ W

    arms["floor"] = floor
    t = take_turns(arms, device, rounds=rounds, steps=steps)
    return {n: (over(t, n, "plain"), sorted(a for a, _ in t[n])[len(t[n]) // 2]) for n in arms}


if __name__ == "__main__":
    import os

    for r in (1, 2):
        out = on_ranks(r, run, 8192, 8, 3, sys.argv[1].split(","))
        for n, v in out.items():
            print(
                r,
                n,
                v[1],
                v[0][0]["median"],
                v[0][0]["quartile_1"],
                v[0][0]["quartile_3"],
                v[0][1]["median"],
                flush=True,
            )
