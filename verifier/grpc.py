"""gRPC server interceptors: claims for the handlers, a status with its reason for everyone else.

    server = grpc.server(pool, interceptors=[AuthInterceptor(verifier)])
    server = grpc.aio.server(interceptors=[AsyncAuthInterceptor(verifier)])

The token is in the call's metadata, ``authorization: Bearer …``; ``trust-position`` may come with it. Handlers ask
:func:`~verifier.current_claims`. Refusals, by what :mod:`verifier.bearer` answers over HTTP: 400 INVALID_ARGUMENT, 401
UNAUTHENTICATED, 403 PERMISSION_DENIED, 503 UNAVAILABLE. Trailing metadata: ``auth-code``, the stable code; with
UNAVAILABLE ``retry-after``, whole seconds, and ``grpc-retry-pushback-ms``, which a client's retry policy obeys.

Over threads a call is judged in the thread that will serve it, never in the one that takes calls in: it may wait.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final, NoReturn, TypedDict, Unpack

from .bearer import Challenge, checked_scopes, claims_variable
from .claims import Claims
from .errors import ConfigurationError
from .guard import Guard, below, odd, path_prefixes
from .verifier import Verifier

try:
    import grpc
    import grpc.aio
except ImportError as error:
    raise ImportError("verifier.grpc needs grpcio: pip install grpcio") from error

__all__ = ["AsyncAuthInterceptor", "AuthInterceptor", "InterceptorSettings"]

_STATUS: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class InterceptorSettings(TypedDict, total=False):
    """Methods are named ``/package.Service/Method``, or ``/package.Service`` for all of a service.

    ``required=False``, or ``optional_methods``: a call without a token passes with no claims, one with a bad token does
    not. ``public_methods`` are passed on unseen, for instance ``/grpc.health.v1.Health``. ``scopes`` maps methods to
    the scopes that they need, all of them. ``trust_position=False`` ignores that metadata.
    """

    required: bool
    optional_methods: Collection[str]
    public_methods: Collection[str]
    scopes: Mapping[str, Collection[str]]
    trust_position: bool


class _Gate:
    """What both interceptors know of a method."""

    def __init__(self, verifier: Verifier, settings: InterceptorSettings) -> None:
        self.guard = Guard(verifier, trust_position=settings.get("trust_position", True))
        self._required = settings.get("required", True)
        self._optional = _methods("optional_methods", settings.get("optional_methods", ()))
        self._public = _methods("public_methods", settings.get("public_methods", ()))
        scopes = settings.get("scopes", {})
        names = _methods("scopes", scopes)
        self._scopes = [((name,), checked_scopes(scopes)) for name, scopes in zip(names, scopes.values(), strict=True)]

    def public(self, method: str) -> bool:
        return below(method, self._public)

    def rule(self, method: str) -> tuple[bool, frozenset[str]]:
        """Whether a token is required, and the scopes it needs: all, where others may read another method."""
        scopes = [scopes for name, scopes in self._scopes if odd(method) or below(method, name)]
        return self._required and not below(method, self._optional), frozenset().union(*scopes)


def _methods(setting: str, names: Collection[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(name.startswith("/") for name in names):
        message = f"{setting}: expected /package.Service/Method or /package.Service"
        raise ConfigurationError("setting_invalid", message, setting=setting)
    return path_prefixes(names)


def _headers(metadata: Iterable[tuple[str, str | bytes]] | None) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in metadata or ()]


def _trailers(challenge: Challenge) -> tuple[tuple[str, str], ...]:
    trailers = [("auth-code", challenge.stable_code)]
    if challenge.retry_after_s is not None:
        trailers.append(("retry-after", str(max(1, math.ceil(challenge.retry_after_s)))))
        trailers.append(("grpc-retry-pushback-ms", str(math.ceil(challenge.retry_after_s * 1000))))
    return tuple(trailers)


def _details(challenge: Challenge) -> str:
    return challenge.detail or "a bearer token is required"


def _behaviour(handler: Any) -> Callable[[Any, Any], Any]:
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    behaviour: Callable[[Any, Any], Any] = next(behaviour for behaviour in kinds if behaviour is not None)
    return behaviour


def _like(handler: Any, behaviour: Callable[[Any, Any], Any], *, raw: bool = False) -> Any:
    """A handler of the same kind with another behaviour; ``raw`` leaves the caller's bytes unread."""
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(behaviour, None if raw else handler.request_deserializer, handler.response_serializer)


def _blocking(handler: Any, enter: Callable[[Any], Claims | None]) -> Any:
    """The handler, in whose thread ``enter(context)`` gives the claims first, or ends the call."""
    behaviour = _behaviour(handler)

    def unary(request: Any, context: Any) -> Any:
        claims_variable.set(enter(context))
        try:
            return behaviour(request, context)
        finally:
            claims_variable.set(None)

    def stream(request: Any, context: Any) -> Iterator[Any]:
        claims_variable.set(enter(context))
        try:
            yield from behaviour(request, context)
        finally:
            claims_variable.set(None)

    return _like(handler, stream if handler.response_streaming else unary)


class AuthInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpcio carries no types
    """For ``grpc.server``. ``settings`` are :class:`InterceptorSettings`."""

    def __init__(self, verifier: Verifier, **settings: Unpack[InterceptorSettings]) -> None:
        self._gate = _Gate(verifier, settings)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Called by gRPC for each call."""
        handler, method = continuation(handler_call_details), handler_call_details.method
        if handler is None or self._gate.public(method):
            return handler

        def enter(context: Any) -> Claims | None:
            headers = _headers(context.invocation_metadata())
            required, scopes = self._gate.rule(method)
            try:
                return self._gate.guard.admit_blocking(headers, required=required, scopes=scopes)
            except Challenge as challenge:
                _abort(context, challenge)

        return _blocking(handler, enter)


def _abort(context: Any, challenge: Challenge) -> NoReturn:
    context.set_trailing_metadata(_trailers(challenge))
    context.abort(_STATUS[challenge.status], _details(challenge))
    raise AssertionError("abort raises") from challenge


class AsyncAuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio carries no types
    """For ``grpc.aio.server``. ``settings`` are :class:`InterceptorSettings`."""

    def __init__(self, verifier: Verifier, **settings: Unpack[InterceptorSettings]) -> None:
        self._gate = _Gate(verifier, settings)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Called by gRPC for each call."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or self._gate.public(method):
            return handler
        headers = _headers(handler_call_details.invocation_metadata)
        required, scopes = self._gate.rule(method)
        try:
            claims = await self._gate.guard.admit(headers, required=required, scopes=scopes)
        except Challenge as challenge:
            return _refusing(handler, challenge)
        claims_variable.set(claims)  # the handler runs in this task, one per call
        if inspect.iscoroutinefunction(_behaviour(handler)) or inspect.isasyncgenfunction(_behaviour(handler)):
            return handler
        return _blocking(handler, lambda _: claims)  # a plain function, for which the server takes a thread


def _refusing(handler: Any, challenge: Challenge) -> Any:
    async def unary(_request: Any, context: Any) -> None:
        await context.abort(_STATUS[challenge.status], _details(challenge), _trailers(challenge))

    async def stream(request: Any, context: Any) -> Any:
        await unary(request, context)
        yield  # never reached: it makes this a stream

    return _like(handler, stream if handler.response_streaming else unary, raw=True)
