"""Runs the key service and its verifiers in several regions on one machine, with real servers and injected lag.

Nothing imports this package: it may use `keyservice` and `verifier`, they never use it.
"""
