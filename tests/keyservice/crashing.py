"""A key service that dies beside one step: ``python -m tests.keyservice.crashing STEP before|after INTENDS``.

It is the whole service with its settings in the environment, and kills itself the hard way before or after the first
call of that step once more than INTENDS writers' intents have come (-1: from the start).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from keyservice.app import Service, build
from keyservice.serve import _serve
from keyservice.settings import load_settings

STEPS: dict[str, Callable[[Service], tuple[Any, str]]] = {
    "intend": lambda service: (service.intents, "intend"),
    "store": lambda service: (service.keeper.disk, "store"),  # type: ignore[union-attr]
    "append": lambda service: (service.trust, "append"),
    "appended": lambda service: (service.intents, "appended"),
    "report": lambda service: (service.trust, "report"),
    "settle": lambda service: (service.receipts, "settle"),
    "register": lambda service: (service.trust, "register"),
    "bump": lambda service: (service.trust, "bump"),
    "add": lambda service: (service.trust, "add"),
    "promise": lambda service: (service.keeper.disk, "make_promise"),  # type: ignore[union-attr]
    "open": lambda service: (service.trust, "open_epoch"),
    "put-back-keys": lambda service: (service.trust, "put_back_keys"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrapped(call: Any, *, armed: Callable[[], bool], after: bool) -> Any:
    @functools.wraps(call)
    def plain(*args: Any) -> Any:
        now = armed() and bool(args[0])  # a write of nothing, at every round, is no step
        if now and not after:
            die()
        result = call(*args)
        if now:
            die()
        return result

    @functools.wraps(call)
    async def asynchronous(*args: Any, **options: Any) -> Any:
        if armed() and not after:
            die()
        result = await call(*args, **options)
        if armed():
            die()
        return result

    return asynchronous if inspect.iscoroutinefunction(call) else plain


def main(step: str, when: str, let_through: int) -> None:
    service = build(load_settings())
    came = 0

    def armed() -> bool:
        return came > let_through

    target, name = STEPS[step](service)
    setattr(target, name, wrapped(getattr(target, name), armed=armed, after=when == "after"))
    intend = service.intents.intend

    async def counted(entries: Any) -> Any:
        nonlocal came
        came += 1
        return await intend(entries)

    service.intents.intend = counted  # type: ignore[method-assign]
    asyncio.run(_serve(service))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
