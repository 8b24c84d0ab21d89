"""The names that users rely on (DESIGN 11), and the lists that must agree with the code."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import verifier
from verifier import Verifier, errors
from verifier.errors import CODES

PACKAGE = Path(verifier.__file__).parent
MODULES = sorted(module.name for module in pkgutil.iter_modules([str(PACKAGE)]) if module.name != "__main__")


def strings_in(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.glob("*.py")):
        yield path.name, ast.parse(path.read_text())


def test_the_package_exports_what_it_says_sorted() -> None:
    assert verifier.__all__ == sorted(verifier.__all__)
    for name in verifier.__all__:
        assert getattr(verifier, name) is not None
    assert {
        "ConfigurationError", "InvalidToken", "RevokedToken", "Undecidable", "Verifier", "current_claims", "errors",
    } <= set(verifier.__all__)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_module_exports_only_what_it_has(name: str) -> None:
    module = importlib.import_module(f"verifier.{name}")
    for exported in getattr(module, "__all__", ()):
        assert hasattr(module, exported)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("verifier.jws", ["verify_compact"]),
        ("verifier.asgi", ["AuthMiddleware"]),
        ("verifier.fastapi", ["bearer", "optional_bearer"]),
        ("verifier.gateway", ["app", "gateway"]),
        ("verifier.grpc", ["AsyncAuthInterceptor", "AuthInterceptor"]),
        ("verifier.wsgi", ["AuthMiddleware"]),
        ("verifier.testing", ["ManualClock", "StaticKeys", "StaticRevocations", "make_key", "sign"]),
    ],
)
def test_the_fixed_names_stand_where_the_design_puts_them(module: str, names: list[str]) -> None:
    for name in names:
        assert name in importlib.import_module(module).__all__


DEFAULTS = {
    "issuer": "<required>",
    "audience": "<required>",
    "jwks_urls": "<required>",
    "redis_url": inspect.Parameter.empty,
    "issuers": None,
    "on_stale": "allow",
    "on_unsynced": "deny",
    "max_staleness_s": 5.0,
    "leeway_s": 30,
    "region": None,
    "jwks": None,
    "token_cache_size": 10_000,
    "token_cache_ttl_s": None,
    "require_iat": True,
    "allow_insecure_http": False,
    "keys_max_age_s": 3_600,
    "min_position_wait_s": 0.5,
    "max_token_lifetime_s": 86_400,
    "max_skew_s": 5,
    "drop_grace_s": 300,
}


def test_the_constructor_has_the_parameters_and_defaults_of_the_design() -> None:
    parameters = inspect.signature(Verifier).parameters
    assert "hs256_secrets" in parameters
    defaults = {name: parameters[name].default for name in DEFAULTS}
    defaults |= {name: repr(defaults[name]) for name in ("issuer", "audience", "jwks_urls")}
    assert defaults == DEFAULTS
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ["verify", "averify", "status", "start", "close", "wait_ready", "from_env"])
def test_the_verifier_has_the_methods_of_the_design(name: str) -> None:
    assert callable(getattr(Verifier, name))
    assert getattr(Verifier, name).__doc__


def test_status_has_the_fields_of_the_design() -> None:
    fields = {
        "ready", "position", "epoch", "nonce", "staleness_s", "fresh", "mirror_entries", "keys", "generation",
        "connection", "counters",
    }  # fmt: skip
    assert fields <= set(verifier.Status.__struct_fields__)


def test_every_code_that_is_raised_is_in_the_list() -> None:
    raised = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if node.func.id in ("InvalidToken", "Undecidable", "ConfigurationError") and isinstance(
                    first, ast.Constant
                ):
                    raised.add(first.value)
    assert len(raised) > 15
    assert raised <= set(CODES)


def test_every_code_in_the_list_is_used() -> None:
    used = set().union(*(strings_in(tree) for name, tree in trees() if name != "errors.py"))
    used |= {"token_revoked"}  # raised by RevokedToken itself
    assert set(CODES) <= used


def test_an_unknown_code_cannot_be_raised() -> None:
    with pytest.raises(KeyError):
        errors.InvalidToken("no_such_code", step=1)


def test_errors_are_split_by_whose_fault_it_is() -> None:
    assert issubclass(errors.RevokedToken, errors.InvalidToken)
    for one in (errors.InvalidToken, errors.Undecidable, errors.ConfigurationError):
        assert issubclass(one, errors.VerifierError)
    assert not issubclass(errors.Undecidable, errors.InvalidToken)
    assert not issubclass(errors.InvalidToken, ValueError)


def test_every_limit_has_a_reason() -> None:
    tree = ast.parse((PACKAGE / "limits.py").read_text())
    statements = list(tree.body)
    names = [
        node.target.id for node in statements if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    undocumented = []
    for statement, following in zip(statements, [*statements[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if not documented:
                undocumented.append(statement.target.id)
    assert len(names) > 15
    # The first of a pair shares the reason of the second, the ceiling that of the default.
    assert undocumented == ["RECONNECT_DELAY_MIN_S", "JWKS_MAX_AGE_CEILING_S"]


def test_importing_the_package_imports_no_client_and_no_framework() -> None:
    heavy = {
        "django", "fastapi", "flask", "grpc", "httpx", "opentelemetry", "prometheus_client", "pydantic", "redis",
        "starlette", "uvicorn",
    }  # fmt: skip
    modules = "verifier, verifier.asgi, verifier.gateway, verifier.jws, verifier.wsgi"
    program = f"import sys, {modules}; print({heavy} & set(sys.modules))"
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("verifier.fastapi", "fastapi"),
        ("verifier.grpc", "grpc"),
        ("verifier.metrics", "prometheus_client"),
        ("verifier.tracing", "opentelemetry"),
    ],
)
def test_an_adapter_without_its_framework_names_what_to_install(module: str, package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None\ntry: import {module}\nexcept ImportError as e: print(e)"
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert f"{module} needs" in told.stdout
    assert "pip install" in told.stdout
