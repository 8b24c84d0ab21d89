"""A service that starts its verifier and forks afterwards, as a preforking server does. Run by test_fork.py."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any


def main(settings: dict[str, Any]) -> None:
    from verifier import Verifier
    from verifier.errors import VerifierError

    def say(**words: Any) -> None:
        print(json.dumps(words), flush=True)

    def outcome(token: str) -> str:
        try:
            return str(verifier.verify(token).subject)
        except VerifierError as error:
            return error.code

    tokens = settings.pop("tokens")
    verifier = Verifier(**settings).start()
    say(ready=verifier.wait_ready(60), good=outcome(tokens["good"]), revoked=outcome(tokens["revoked"]))
    sys.stdin.readline()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        say(good=outcome(tokens["good"]), revoked=outcome(tokens["revoked"]))
        verifier.close()
        return
    status = verifier.status()
    say(cached=status.token_cache_entries, staleness_s=status.staleness_s, good=outcome(tokens["good"]))
    sys.stdin.readline()
    say(ready=verifier.wait_ready(60), good=outcome(tokens["good"]), revoked=outcome(tokens["revoked"]))
    verifier.close()
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Python 3.12 and later warn about a fork beside threads
    main(json.loads(sys.argv[1]))
