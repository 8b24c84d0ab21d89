-- Store a session in one step with its end. KEYS: session. ARGV: data (JSON), hash of its refresh tokens' family part, hash
-- of the first refresh token, end (Unix seconds).
redis.call('HSET', KEYS[1], 'data', ARGV[1], 'family', ARGV[2], 'refresh', ARGV[3])
redis.call('EXPIREAT', KEYS[1], ARGV[4])
return 1
