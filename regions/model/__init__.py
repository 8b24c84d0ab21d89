"""The keeper rules under virtual time: seeded schedules of faults, then healing, checked at every step.

The model runs the product's own decisions (`keyservice.core.keepers`, `verifier.reader`, `verifier.freshness`,
`verifier.revocations`). Only the servers, the network, disks and clocks are stand-ins: `server` does what Redis and the
scripts do, `world` holds the regions and the connections between them, `schedule` draws what happens, `checkers` says
what must hold, `mutants` leaves one rule out at a time.
"""
