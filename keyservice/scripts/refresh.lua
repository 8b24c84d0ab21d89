-- What a presented refresh token is, and its rotation, in one step. KEYS: session, its sealed successor. ARGV: hash of the
-- token, hash of its family part, hash of the proposed successor, that successor sealed, grace (ms). Returns
--   fresh       it was the current one, and the successor is now
--   repeated    it was consumed within the grace; with it the sealed successor that was given then
--   reused      of this family, and neither: the family is dead from here on, and stays so until the session goes
--   unknown     no such session, or not of its family
local held = redis.call('HMGET', KEYS[1], 'family', 'refresh')
if held[1] ~= ARGV[2] then
  return {'unknown'}
end
if held[2] == ARGV[1] then
  redis.call('HSET', KEYS[1], 'refresh', ARGV[3])
  redis.call('DEL', KEYS[2])
  if tonumber(ARGV[5]) > 0 then
    redis.call('HSET', KEYS[2], 'of', ARGV[1], 'sealed', ARGV[4])
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
  end
  return {'fresh'}
end
local last = redis.call('HMGET', KEYS[2], 'of', 'sealed')
if last[1] == ARGV[1] then
  return {'repeated', last[2]}
end
redis.call('HSET', KEYS[1], 'refresh', '')
redis.call('DEL', KEYS[2])
return {'reused'}
