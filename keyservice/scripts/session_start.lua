-- Store a session in one step with its end. KEYS: session. ARGV: data (JSON), refresh token's hash, end (Unix seconds).
redis.call('HSET', KEYS[1], 'data', ARGV[1], 'refresh', ARGV[2])
redis.call('EXPIREAT', KEYS[1], ARGV[3])
return 1
