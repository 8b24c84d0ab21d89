"""Recording verifiers: a real verifier in a process of its own that says what it accepted, when, and how fresh it was.

`python -m regions.recorder` is the process: commands as JSON lines on stdin, events as JSON lines on stdout (`events`).
`tape` folds verifications into runs and is pure; `process` verifies; `client` is what a harness holds.
"""

from regions.recorder.client import Recorder, recorder_environment
from regions.recorder.events import Run, Sample, Verdict

__all__ = ["Recorder", "Run", "Sample", "Verdict", "recorder_environment"]
