"""A recording verifier that is wrong on purpose, to show that the checkers see it: `python mutant_recorder.py MUTANT`.

`deaf` accepts what was revoked; `forgetful` refuses it once and then accepts it again; `strict`
refuses what is valid.
"""

from __future__ import annotations

import sys
from typing import Any

from regions.recorder.process import main
from verifier import InvalidToken, RevokedToken, Verifier
from verifier.claims import Claims


class Deaf(Verifier):
    def verify(self, token: str, **options: Any) -> Claims:
        try:
            return super().verify(token, **options)
        except RevokedToken:
            return Claims({}, token, lambda: 0.0)


class Forgetful(Verifier):
    refused: set[str]

    def verify(self, token: str, **options: Any) -> Claims:
        self.refused = getattr(self, "refused", set())
        try:
            return super().verify(token, **options)
        except RevokedToken:
            if token in self.refused:
                return Claims({}, token, lambda: 0.0)
            self.refused.add(token)
            raise


class Strict(Verifier):
    def verify(self, token: str, **options: Any) -> Claims:
        super().verify(token, **options)
        raise InvalidToken("signature_invalid", step=4)


if __name__ == "__main__":
    main({"deaf": Deaf, "forgetful": Forgetful, "strict": Strict}[sys.argv[1]].from_env)
