"""Components for TorchX, in files of their own: see `exfm.py`."""
