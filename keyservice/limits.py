"""Every limit of the key service, each with its reason. They are not settings: settings live in ``settings.py``."""

from __future__ import annotations

from typing import Final

# -- requests -------------------------------------------------------------------------------------------------------

BODY_BYTES_MAX: Final = 65_536
"""A form or a JSON object with one token (16 KiB) in it, with room for escapes."""

BULK_BODY_BYTES_MAX: Final = 16_777_216
"""10,000 revocations with the longest values and reasons (256 bytes each), escaped."""

KEEPER_BODY_BYTES_MAX: Final = 4 * BULK_BODY_BYTES_MAX
"""The same revocations as entries, with every field, and the keeper's names for them."""

BULK_REVOCATIONS_MAX: Final = 10_000
"""About 20 ms of the primary's time in scripts of 1,000; more is several requests."""

FORM_FIELDS_MAX: Final = 32
"""RFC 6749 requests have fewer than ten parameters."""

CLIENT_ID_CHARS_MAX: Final = 256
"""A client id is a revocation value, which has at most 256 bytes."""

CLIENT_SECRET_CHARS_MAX: Final = 1_024
"""Bounds what an unauthenticated caller can make Argon2 hash."""

SCOPE_CHARS_MAX: Final = 4_096
"""A scope ends up in a token, which travels in an HTTP header of 8 to 16 KiB."""

AUDIENCES_MAX: Final = 16
"""Of one token, for the same reason."""

ACR_CHARS_MAX: Final = 256
AMR_MAX: Final = 8
"""How somebody was authenticated, in every token of a session: names, and a handful of methods."""

LIST_PAGE_MAX: Final = 1_000
"""Revocations in one answer of ``GET /admin/revocations``."""

# -- Redis ----------------------------------------------------------------------------------------------------------

APPEND_ENTRIES_MAX: Final = 1_000
"""Entries in one script call: 1.9 ms of the primary's time (10,000 would be 20 ms, in which no replica gets a beat)."""

PRIMARY_TIMEOUT_S: Final = 2.0
"""Reply time-out of a write: ten round trips over a 90 ms link."""

CONNECT_TIMEOUT_S: Final = 2.0
"""A new connection over a 90 ms link costs about five round trips."""

CONNECTIONS_MAX: Final = 256
"""In one pool; far below the server's own limit of 10,000."""

SENTINEL_TIMEOUT_S: Final = 1.0
"""A connection to a Sentinel, and its answer: two round trips of 180 ms each, and half a second beyond."""

SENTINEL_POLL_S: Final = 0.5
"""How often every Sentinel is asked who the primary is, for the case that its announcement was lost."""

SENTINEL_SILENCE_S: Final = 5.0
"""After this long without an announcement the Sentinel is asked for a sign of life; after as long again it is left."""

SCRIPT_ATTEMPTS_MAX: Final = 4
"""Bump once, re-read once, and lose one race of each."""

KEYS_POLL_S: Final = 0.25
"""How often the region's replica is asked for the key set's generation; part of the publish lead."""

KEYS_SILENCE_MAX_S: Final = 5.0
"""An instance that could not read the key set for longer serves none until it can: what it holds may be too old."""

BEAT_TIMEOUT_S: Final = 2.0
"""A beat that takes longer is given up; the next one opens a new connection."""

# -- keepers --------------------------------------------------------------------------------------------------------

INTENT_GRACE_S: Final = 5.0
"""How long a keeper leaves an intent to the writer that stored it: longer than a write takes to fail. So long for each
script that the writer needs, because what waits for its turn must not be appended twice."""

ADDED_GRACE_S: Final = 5.0
"""How long a keeper waits for the replica to show what it added. Then it may have been deleted, and is added again."""

KEEPER_ALIVE_S: Final = 5.0
"""A keeper that reported less than this ago is alive: it reports every second at least."""

KEEPER_UNSAVED_MAX: Final = 100_000
"""Entries kept in memory while the disk cannot be written, about 50 MB; then they are read again later."""

REPORT_INTERVAL_S: Final = 0.005
"""Between two reports: what is added to a receipt's time, against what 200 revocations a second would cost."""

REPORT_REPEAT_S: Final = 1.0
"""The same report is sent again after this: the last one may be lost."""

REPORTS_UNANSWERED_MAX: Final = 16
"""On a link of 90 ms that is a report every 12 ms."""

KEEPER_TICK_S: Final = 0.05
"""How often a keeper looks whether a closed epoch may open."""

KEEPER_TAIL_BLOCK_MS: Final = 50
"""A round of a key service's mirror: beats wake nobody, so this is part of every confirmation."""

KEEPER_SECRET_CHARS_MIN: Final = 32
"""As for a shared HS256 secret: 128 random bits or more in any usual encoding."""

KEEPER_TIMEOUT_S: Final = 2.0
"""An answer of the region's keeper: one commit to a disk."""

KEEPER_CONNECTIONS_MAX: Final = 64
"""From one API instance to its keeper."""

RECEIPT_POLL_S: Final = 0.004
"""How often the own region's server is asked for evidence while somebody waits for a receipt."""

# -- the revocation feed --------------------------------------------------------------------------------------------

FEED_CONSUMERS_MAX: Final = 2_000
"""Open streams of one process: each costs a socket and what its queue holds back."""

FEED_QUEUE_BYTES_MAX: Final = 8_388_608
"""Events that one consumer may hold back: about 25,000 revocations, or ten minutes of beats. Consumers share them."""

FEED_PAGE_ENTRIES: Final = 256
"""Entries in one event: at most 1.5 MB where every character is escaped, far below what a verifier reads (4 MiB)."""

FEED_TAIL_BLOCK_MS: Final = 200
"""One round, as in a verifier: it paces the beats that consumers see."""

FEED_KEEPALIVE_S: Final = 1.0
"""A round after this much silence, or a comment where there is none to send; a verifier takes three seconds of silence
for a dead connection."""

FEED_RECHECK_S: Final = 5.0
"""How often a stream's token is looked at again: 30 µs for each consumer."""

# -- keys -----------------------------------------------------------------------------------------------------------

RSA_BITS: Final = 2_048
"""RFC 7518 section 3.3 requires 2048 bits or more for RS256; more doubles the cost of every verification."""

KEYS_REQUESTED_MAX: Final = 90
"""With more keys than this nobody rotates on request: the rest of JWKS_KEYS_MAX (100) is left to rotation by plan and
to successors of revoked keys."""

ROTATION_STEPS_MAX: Final = 8
"""Steps that one tick may take: create, publish, activate, create the next standby, and lost races."""

# -- client authentication ------------------------------------------------------------------------------------------

ARGON2_TIME_COST: Final = 2
ARGON2_MEMORY_KIB: Final = 19_456
ARGON2_PARALLELISM: Final = 1
"""OWASP's parameters for Argon2id: 19 MiB, 2 passes, 1 lane; about 20 ms."""

ARGON2_THREADS: Final = 2
"""Hashes at one time, so that guessing secrets cannot take all the memory."""

ARGON2_WAITING_MAX: Final = 64
"""Verifications that may wait for a thread; more are answered 503 at once."""

CLIENTS_MAX: Final = 10_000
"""Clients made by the admin API: every instance holds all of them, about 1 kB each."""

CLIENT_KEYS_MAX: Final = 8
"""Keys of one client: two suffice to change from one to the next."""

CLIENT_LIST_MAX: Final = 64
"""Scopes, and audiences, of one client: they end up in tokens and error messages."""

CLIENTS_POLL_S: Final = 1.0
"""How often the region's replica is asked whether clients changed: one GET."""

ASSERTION_LIFE_MAX_S: Final = 300.0
"""``exp`` of a client assertion lies no further ahead: so long its ``jti`` is remembered (RFC 7523 section 3)."""

ASSERTIONS_REMEMBERED_MAX: Final = 10_000
"""Of one instance, about 1 MB; only assertions of registered clients are remembered."""

VERIFIED_SECRETS_MAX: Final = 1_024
"""Recently verified client secrets kept as keyed hashes."""

VERIFIED_SECRET_TTL_S: Final = 300.0
"""After this a secret is hashed again."""

# -- process --------------------------------------------------------------------------------------------------------

SHUTDOWN_GRACE_S: Final = 5
"""Requests under way get this long after SIGTERM."""

SKEW_PROBE_S: Final = 1.0
"""How often the clock is compared with the primary's while they disagree."""
