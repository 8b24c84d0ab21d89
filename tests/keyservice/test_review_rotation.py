"""The key set of a region whose primary takes in what is sent and answers nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from keyservice.limits import KEYS_SILENCE_MAX_S
from keyservice.settings import Settings
from tests.keyservice.support import Proxy, Server


async def test_a_region_that_starts_while_its_primary_is_mute_goes_on_serving_its_keys(
    server: Server, proxy: Proxy, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    settings = make_settings(server.url, primary_url=proxy.url, start_timeout_s=1)
    running = await start_service(settings)
    await running.service.stop()
    proxy.eats_answers = True
    again = await start_service(settings, ready=False)
    await again.until(lambda: again.frontend.ring.document is not None)
    deadline = time.monotonic() + 2 * KEYS_SILENCE_MAX_S
    worst_s = 0.0
    while time.monotonic() < deadline:
        worst_s = max(worst_s, again.service.poll.silence_s)
        await asyncio.sleep(0.05)
    assert worst_s < KEYS_SILENCE_MAX_S, again.service.readiness()
    assert (await again.public.get("/.well-known/jwks.json")).status_code == 200
    assert again.service.poll.problem is None
