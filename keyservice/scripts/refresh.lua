-- Consume a refresh token and put its successor in its place, in one step. KEYS: session. ARGV: the hash that the session
-- must hold, the hash of the successor. Returns 1, or 0 if the session is gone or the token was used before.
if redis.call('HGET', KEYS[1], 'refresh') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'refresh', ARGV[2])
return 1
