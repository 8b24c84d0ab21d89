"""How a service of a benchmark joins a region that runs: the settings of its verifier, as environment variables."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from regions.cluster_file import ClusterFile

__all__ = ["verifier_environment"]


def verifier_environment(cluster: ClusterFile) -> dict[str, str]:
    """For `Verifier.from_env`, in the primary's region. Holds a password."""
    urls = cluster.regions[cluster.primary]
    server = urlsplit(urls.verifier_redis_url)
    return {
        "VERIFIER_ISSUER": cluster.issuer,
        "VERIFIER_AUDIENCE": cluster.audience,
        "VERIFIER_REGION": cluster.primary,
        "VERIFIER_JWKS_URLS": f"{urls.keyservice_url}/.well-known/jwks.json",
        "VERIFIER_SOURCE_ADDRESS": urls.bind_address,
        "REDIS_ADDR": f"{server.hostname}:{server.port}",
        "REDIS_USERNAME": unquote(server.username or ""),
        "REDIS_PASSWORD": unquote(server.password or ""),
    }
