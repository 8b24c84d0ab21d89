"""HTTP: one file per family of endpoints. Bodies are read by ``body.py``, errors made by ``problems.py``."""
