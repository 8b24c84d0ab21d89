"""Every limit of the verifier, each with its reason and source.

A limit bounds what a stranger's input may cost (bytes, nesting, keys) or how long the library waits. They are not
settings: a token or document past one of them is refused. Settings live in :class:`verifier.Verifier`.
"""

from __future__ import annotations

from typing import Final

# -- tokens ---------------------------------------------------------------------------------------------------------

TOKEN_CHARS_MAX: Final = 16_384
"""A bearer token travels in one HTTP header; common servers refuse header lines past 8-16 KiB."""

HEADER_BYTES_MAX: Final = 2_048
"""A JOSE header holds ``alg``, ``kid``, ``typ``; 2 KiB leaves room for headers that we ignore (RFC 7515 section 4)."""

KID_BYTES_MAX: Final = 256
"""A thumbprint ``kid`` has 43 characters (RFC 7638); anything past 256 bytes is an attack on a log or a cache."""

JSON_DEPTH_MAX: Final = 16
"""Claims are flat or nearly so; bounds the stack of every JSON reader downstream."""

INTEGER_DIGITS_MAX: Final = 32
"""A NumericDate has ten digits (RFC 7519 section 2); bounds the quadratic cost of big integers."""

IDENTIFIER_BYTES_MAX: Final = 256
"""``jti``, ``sid``, ``sub`` and ``client_id`` are revocation values, and an entry's value has at most 256 bytes."""

# -- JWK sets -------------------------------------------------------------------------------------------------------

JWKS_BYTES_MAX: Final = 262_144
"""Three regions publish about nine keys in 4 kB; 256 KiB holds :data:`JWKS_KEYS_MAX` RSA-8192 keys with a chain."""

JWKS_KEYS_MAX: Final = 100
"""Past this a set is a mistake: one region publishes about three keys."""

RSA_BITS_MIN: Final = 2_048
"""RFC 7518 section 3.3: a key of size 2048 bits or larger MUST be used with RS256."""

RSA_BITS_MAX: Final = 8_192
"""Verification cost grows with the modulus; no authority recommends larger keys for signatures."""

HMAC_SECRET_BYTES_MIN: Final = 32
"""RFC 7518 section 3.2: a key of the same size as the hash output (256 bits) or larger MUST be used with HS256."""

# -- the trust log --------------------------------------------------------------------------------------------------

ENTRY_VALUE_BYTES_MAX: Final = 256
"""Bounds a mirror's memory; every identifier that a token may carry fits (:data:`IDENTIFIER_BYTES_MAX`)."""

ENTRY_ID_CHARS_MAX: Final = 64
"""A caller's idempotency key; a UUID has 36 characters."""

ENTRY_REASON_BYTES_MAX: Final = 256
"""A note for the audit trail, not a document."""

READ_BATCH_ENTRIES: Final = 250
"""Entries a read: about 40 kB, applied in a millisecond, so that verification threads are not starved. And so few
objects that Python's garbage collector, which stops every thread, is hardly ever due: with 500 it took a tenth of the
time, and tens of milliseconds at once."""

FIRST_READ_PAUSE_S: Final = 0.000_05
"""After each batch of the first read, whose thread would otherwise hold Python's lock for 5 ms at a time; a thread that
verifies wants it twice, before the signature and after. Shorter than this the system does not wake another thread."""

# -- waiting --------------------------------------------------------------------------------------------------------

TAIL_BLOCK_MS: Final = 200
"""One round of the tail: a finite BLOCK recovers from a full resync, which wakes no reader, and paces beat reads."""

REDIS_TIMEOUT_S: Final = 2.0
"""A reply later than this means a dead connection: far above the longest block, far below the staleness bound."""

RECONNECT_DELAY_MIN_S: Final = 0.05
RECONNECT_DELAY_MAX_S: Final = 2.0
"""Reconnects back off between these, with full jitter, so that a returning replica is not stampeded."""

BREAKER_OPEN_S: Final = 30.0
"""How long an open circuit breaker leaves Redis alone: long enough to matter beside a back-off that ends at 2 s."""

FEED_CONNECT_TIMEOUT_S: Final = 2.0
"""A new connection over a 90 ms link costs about five round trips, with TLS seven."""

FEED_READ_TIMEOUT_S: Final = 3.0
"""The server says something every second; silence for longer is a dead connection, below the staleness bound of 5 s."""

FEED_EVENT_BYTES_MAX: Final = 4_194_304
"""The server sends at most 256 entries in one event, of up to 6 kB each where every character is escaped."""

FEED_TOKEN_REPLY_BYTES_MAX: Final = 65_536
"""A token response (RFC 6749 section 5.1) is one token of 16 KiB at most; a problem document is small too."""

FEED_TOKEN_MARGIN_S: Final = 30.0
"""A token is renewed this long before it ends, or at half of a life shorter than a minute: clocks may differ by 5 s."""

HTTP_TIMEOUT_S: Final = 3.0
"""One JWKS fetch, all of it; the next URL is tried after that."""

JWKS_COOLDOWN_S: Final = 5.0
"""At most one fetch per source in this time, plus one fast retry; a forged ``kid`` cannot cause more."""

JWKS_MAX_AGE_DEFAULT_S: Final = 300.0
"""Used where a source sends no ``max-age``; also the ceiling of what its header may ask for is one day."""

JWKS_MAX_AGE_CEILING_S: Final = 86_400.0

JWKS_FILE_MAX_AGE_S: Final = 5.0
"""A file is looked at a little more often than this: looking costs microseconds, and nobody else is asked."""

UNKNOWN_KID_WAIT_S: Final = 0.5
"""How long one ``verify`` waits for the fetch that its unknown ``kid`` started, before it answers ``keys_behind``."""

UNKNOWN_KID_WAITERS_MAX: Final = 20
"""How many threads may wait so at once, others are answered at once: half of what a web framework's pool usually has
(40 in AnyIO), so that forged ``kid`` s cannot hold all of them."""

PUBLICATION_LAG_S: Final = 5.0
"""How long a key that signs may be missing from another region's JWKS: replication lag and poll."""
