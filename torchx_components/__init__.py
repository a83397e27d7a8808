"""TorchX components, one module each: see `exfm.py`."""
