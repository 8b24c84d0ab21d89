"""The key service: signs access tokens, publishes the public keys, and writes revocations to the trust log.

``keyservice.app`` is the one place that puts the parts together; ``python -m keyservice`` is the command line.
"""
